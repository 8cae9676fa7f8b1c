"""Write the README's tables from benchmarks/results: `python -m benchmarks.readme`."""

import json
import re
from pathlib import Path

from benchmarks.record import RESULTS

README = Path(__file__).parents[1] / "README.md"
NAMES = {
    "flax_bp": "BP in plain Flax and Optax",
    "jaxdtp_bp": "BP",
    "jaxdtp_dtp": "L-DRL as published",
    "jaxdtp_dtp_fast": "fast L-DRL",
    "torch_bp": "BP in PyTorch",
    "torch_dtp": "L-DRL as published in PyTorch",
}
NETWORKS = {"vgg": "VGG", "lenet": "LeNet", "resnet20": "ResNet-20", "resnet18": "ResNet-18"}


def with_tables(readme: str) -> str:
    """The README's text with fresh tables between their markers."""
    step_times = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("step_time_*.json"))]
    tables = {
        "step times": "\n\n".join(step_time_table(result) for result in step_times),
        "published": (RESULTS / "published.md").read_text().strip(),
        "ablation": (RESULTS / "ablation.md").read_text().strip(),
        "comparison": "\n\n".join(path.read_text().strip() for path in sorted(RESULTS.glob("compare_*.md"))),
    }
    for name, text in tables.items():
        readme = _between_markers(readme, name, text)
    return readme


def _between_markers(readme: str, name: str, text: str) -> str:
    begin, end = f"<!-- {name}: written by python -m benchmarks.readme -->", f"<!-- end of {name} -->"
    pattern = f"{re.escape(begin)}.*{re.escape(end)}"
    readme, places = re.subn(pattern, lambda _: f"{begin}\n{text}\n{end}", readme, flags=re.DOTALL)
    if places != 1:
        raise ValueError(f"README.md: {places} places between {begin} and {end}; allowed: one")
    return readme


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
        "| step | seconds, median (min to max) | times BP | images/s | memory, MB | compiled in, s | share of peak |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        library = row["name"].partition("_")[0]
        memory, operations = row["peak_memory_bytes"], row["operations"]
        lines.append(
            f"| {NAMES[row['name']]} "
            f"| {row['seconds_median']:.4f} ({row['seconds_min']:.4f} to {row['seconds_max']:.4f}) "
            f"| {row['seconds_median'] / median[f'{library}_bp']:.2f} "
            f"| {row['images_per_second']:.0f} "
            f"| {'' if memory is None else format(memory / 1e6, '.0f')} "
            f"| {row['compile_seconds']:.0f} "
            f"| {'' if operations is None else format(operations / row['seconds_median'] / peak, '.0%')} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text()))
