"""Write the tables of the README and of docs/ from benchmarks/results and the code: `python -m benchmarks.readme`."""

import json
import re
from pathlib import Path

import numpy as np

from benchmarks.record import RESULTS
from jaxdtp.learning.algorithms import ALGORITHMS

ROOT = Path(__file__).parents[1]
NAMES = {
    "flax_bp": "BP in plain Flax and Optax",
    "jaxdtp_bp": "BP",
    "jaxdtp_dtp": "L-DRL as published",
    "jaxdtp_dtp_fast": "fast L-DRL, with probes (first steps)",
    "jaxdtp_dtp_fast_later": "fast L-DRL, later",
    "torch_bp": "BP in PyTorch",
    "torch_dtp": "L-DRL as published in PyTorch",
}
NETWORKS = {"vgg": "VGG", "lenet": "LeNet", "resnet20": "ResNet-20", "resnet18": "ResNet-18"}


def tables(path: Path) -> dict[str, str]:
    """The tables of a page, by name."""
    if path.name == "README.md":
        return {"results": results(json.loads((RESULTS / "published.json").read_text())), "rules": rules()}
    step_times = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("step_time_*.json"))]
    return {
        "step times": "\n\n".join(step_time_table(result) for result in step_times),
        "published": (RESULTS / "published.md").read_text().strip(),
        "ablation": (RESULTS / "ablation.md").read_text().strip(),
        "comparison": "\n\n".join(path.read_text().strip() for path in sorted(RESULTS.glob("compare_*.md"))),
    }


def with_tables(path: Path) -> str:
    """A page's text with fresh tables between their markers."""
    text = path.read_text()
    for name, table in tables(path).items():
        begin, end = f"<!-- {name}: written by python -m benchmarks.readme -->", f"<!-- end of {name} -->"
        pattern, fresh = f"{re.escape(begin)}.*{re.escape(end)}", f"{begin}\n{table}\n{end}"
        text, places = re.subn(pattern, lambda _, fresh=fresh: fresh, text, flags=re.DOTALL)
        if places != 1:
            raise ValueError(f"{path.name}: {places} places between {begin} and {end}; allowed: one")
    return text


PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md")


def results(lines: list[dict]) -> str:
    """Fast L-DRL and BP as published and here, in Markdown: a row for each network."""
    by_network = {}
    for line in lines:
        by_network.setdefault(line["name"], {})[line["rule"]] = line
    text = ["| network | L-DRL / BP, published | fast L-DRL / BP, here | epochs | NAME |", "|---|---|---|---|---|"]
    for name, of_rules in by_network.items():
        pair = [of_rules.get("ldrl_fast"), of_rules.get("bp")]
        if not all(line and line["accuracies"] for line in pair):
            continue
        published = ["-" if line["published"] is None else f"{100 * line['published']:.1f}" for line in pair]
        here = [f"{100 * np.mean(list(line['accuracies'].values())):.2f}" for line in pair]
        cells = (pair[0]["what"], " / ".join(published), " / ".join(here), str(pair[0]["epochs"]), f"`{name}`")
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join(text)


def rules() -> str:
    """The rules by name, with their papers, in Markdown; from the longer table of docs/rules.md."""
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", (ROOT / "docs" / "rules.md").read_text(), re.MULTILINE)
    cells = {name: rest.split(" | ") for name, rest in rows if name in ALGORITHMS}
    lines = [f"| `{name}` | {cells[name][0]} | {cells[name][-1]} |" for name in ALGORITHMS]
    return "\n".join(["| rule | feedback | paper |", "|---|---|---|", *lines])


def milliseconds(seconds: float) -> str:
    """To three digits."""
    return f"{1e3 * seconds:.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.3g}"


def step_time_table(result: dict) -> str:
    """One result in Markdown: where it comes from, and a row for every step."""
    machine, versions = result["machine"], result["versions"]
    peak = result["matmul_operations_per_second"]
    median = {row["name"]: row["seconds_median"] for row in result["rows"]}
    lines = [
        f"{NETWORKS[result['network']]} of `configs/cifar10_{result['network']}*.py`, batch {result['batch']}, "
        f"{machine['device']}, {machine['cores']} cores, {result['precision']}, jax {versions['jax']}"
        + (f", PyTorch {versions['torch']}" if "torch" in versions else "")
        + f", {result['date']} (`{result['command']}`):",
        "",
        "| step | milliseconds, median (min to max) | times BP | images/s | memory, MB | compiled, s | share of peak |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        library = row["name"].partition("_")[0]
        memory, operations = row["peak_memory_bytes"], row["operations"]
        lines.append(
            f"| {NAMES[row['name']]} "
            f"| {milliseconds(row['seconds_median'])} "
            f"({milliseconds(row['seconds_min'])} to {milliseconds(row['seconds_max'])}) "
            f"| {row['seconds_median'] / median[f'{library}_bp']:.2f} "
            f"| {row['images_per_second']:.0f} "
            f"| {'' if memory is None else format(memory / 1e6, '.0f')} "
            f"| {row['compile_seconds']:.0f} "
            f"| {'' if operations is None else format(operations / row['seconds_median'] / peak, '.0%')} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(with_tables(page))
