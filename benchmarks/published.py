"""The papers' tables beside ours: `python -m benchmarks.published --data_dir=DIR` runs, or continues, what is missing.

    python -m benchmarks.published --data_dir=DIR --rows=lenet_mnist --seed=3

runs a row again by other seeds, from 3 on. A row (`benchmarks.tables`) is one run of `python -m jaxdtp.main`, of all
its seeds at once, and is kept as benchmarks/results/published/NAME-RULE.json, also where it diverges; runs of other
seeds, as NAME-RULE-seed3.json, belong to it, too. Then the table is written: benchmarks/results/published.json, .md and
.png.
Without --data_dir it is written of what is there. Rows that take too long on a CPU are left to `benchmarks.gpu_runs`,
unless --rows names them.
"""

import argparse
import contextlib
import json
import math
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.record import RESULTS, mean_and_std
from benchmarks.tables import ROWS, Row
from jaxdtp.results.plots import curve, style
from jaxdtp.results.reports import of_blocks
from jaxdtp.results.statistics import over_seeds, welch

KEPT = RESULTS / "published"
DIVERGED = 3
"""The command's exit code."""
RULES = {"ldrl_fast": "fast L-DRL", "bp": "BP"}


def run_until(deadline: float, arguments: list[str], log: Path | None = None) -> int | None:
    """The exit code of `python ARGUMENTS`; None where the deadline (`time.monotonic`) cuts it short.

    Args:
        deadline: then it is asked to stop, which saves a run, and is killed if it hasn't half a minute later.
        arguments: of Python.
        log: where its output goes, after what is there; None: to the console.
    """
    if time.monotonic() > deadline:
        return None
    print("$ python", *arguments, flush=True)
    with contextlib.ExitStack() as held:
        output = held.enter_context(log.open("a")) if log else None
        process = subprocess.Popen(
            [sys.executable, *arguments], stdout=output, stderr=subprocess.STDOUT if log else None
        )
        try:
            code = process.wait(None if math.isinf(deadline) else deadline - time.monotonic())
        except subprocess.TimeoutExpired:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
            return None
    if code:
        print(f"exit {code}{f', see {log}' if log else ''}", flush=True)
    return code


def train(
    row: Row,
    workdir: Path,
    data_dir: str,
    options: tuple[str, ...] = (),
    deadline: float = math.inf,
    *,
    seed: int = 0,
    keep: bool = True,
    log: bool = False,
) -> bool:
    """Train a row, or go on with it.

    Args:
        row: what to train.
        workdir: of all rows.
        data_dir: of TFDS.
        options: of the command, besides the row's.
        deadline: of `time.monotonic`, which cuts it short.
        seed: the first one.
        keep: whether the result is recorded, also where it diverged.
        log: whether its output goes to a file beside the run's directory.

    Returns:
        Whether it has been trained to its end, or till it diverged, before the deadline.
    """
    name = f"{row.name}-{row.rule}" + (f"-seed{seed}" if seed else "")
    options = (*options, *([f"--config.seed={seed}"] if seed else []))
    run, command = workdir / name, ["-m", "jaxdtp.main", *row.command, *options]
    arguments = [*command, f"--config.dataset.data_dir={data_dir}", f"--workdir={run}"]
    code = run_until(deadline, arguments, workdir / f"{name}.log" if log else None)
    through = code in (0, DIVERGED)
    if through and keep:
        shown = " ".join(["python", *command, "--config.dataset.data_dir=DIR"])
        # In a process of its own: this one must not take a GPU's memory from the next run.
        record = [sys.executable, "-m", "benchmarks.record", str(run), f"published/{name}", shown]
        subprocess.run(record, check=True)
    return through


def kept(row: Row) -> tuple[dict[int, dict], list[str]]:
    """What is kept of a row: by seed, 'accuracy' (None: it diverged) and 'epochs', and the commands."""
    found, commands = {}, []
    name = f"{row.name}-{row.rule}"
    for path in sorted([*KEPT.glob(f"{name}.json"), *KEPT.glob(f"{name}-*.json")]):
        result = json.loads(path.read_text())
        commands.append(result["command"])
        config, summary, epochs = result["config"], result.get("summary", {}), result["epochs"]
        # Results from before a run could have many seeds have no such key.
        many = config.get("seeds", [])
        for seed in many:
            key = str(seed)
            own = [{"epoch": epoch["epoch"]} | epoch["seeds"][key] for epoch in epochs if key in epoch["seeds"]]
            found[seed] = {"accuracy": summary.get("seeds", {}).get(key, {}).get(row.metric), "epochs": own}
        if not many:
            found[config["seed"]] = {"accuracy": summary.get(row.metric), "epochs": epochs}
    return dict(sorted(found.items())), commands


def ended(results: dict[int, dict]) -> dict[int, float]:
    """The accuracies of those seeds that didn't diverge, of what `kept` returns."""
    return {seed: result["accuracy"] for seed, result in results.items() if result["accuracy"] is not None}


def is_missing(row: Row, seed: int = 0) -> bool:
    """Whether a row has not been run by all its seeds, from `seed` on."""
    return not kept(row)[0].keys() >= set(range(seed, seed + row.seeds))


def collect() -> list[dict]:
    """All rows, those without a result included.

    Returns:
        For each: 'name', 'rule', 'paper', 'what', 'published' (accuracy between 0 and 1, or None), 'accuracies' (by
        seed), 'diverged' (epochs that ended before, by seed), 'epochs', 'command', 'p' (Welch, against BP of the same
        name), 'angle' (degrees to the backpropagation gradient, median over hidden layers, epochs and seeds) and
        'needs_gpu'.
    """
    of_bp = {row.name: list(ended(kept(row)[0]).values()) for row in ROWS if row.rule == "bp"}
    lines = []
    for row in ROWS:
        results, commands = kept(row)
        accuracies = ended(results)
        epochs = [epoch for result in results.values() for epoch in result["epochs"]]
        # Without the smallest one: that of the output layer, whose update is the gradient whatever the feedback.
        angles = [angle for epoch in epochs for angle in sorted(of_blocks(epoch, "update_angle").values())[1:]]
        probability = None if row.rule == "bp" else welch(list(accuracies.values()), of_bp.get(row.name, []))
        lines.append(
            {
                "name": row.name,
                "rule": row.rule,
                "paper": row.paper,
                "what": row.what,
                "published": row.published,
                "accuracies": accuracies,
                "diverged": {seed: len(results[seed]["epochs"]) for seed in results if seed not in accuracies},
                "epochs": max((epoch["epoch"] for epoch in epochs), default=None),
                "command": "; ".join(commands) or " ".join(["python -m jaxdtp.main", *row.command]),
                "p": probability,
                "angle": float(np.nanmedian(angles)) if angles else None,
                "needs_gpu": row.gpu,
            }
        )
    return lines


def has_run(line: dict) -> bool:
    """Whether a seed has come to an end, or diverged."""
    return bool(line["accuracies"] or line["diverged"])


def table(lines: list[dict]) -> str:
    """The rows that have been run, in Markdown, and the names of the others."""
    text = [
        "| network and data | rule | published (%) | here (%) | seeds | epochs | p against BP | angle to BP (°) "
        "| again by `python -m benchmarks.published --seed=K` |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        if not has_run(line):
            continue
        accuracies = [100 * accuracy for accuracy in line["accuracies"].values()]
        seeds = len(accuracies) + len(line["diverged"])
        diverged = f" ({len(line['diverged'])} of {seeds} diverged)" if line["diverged"] else ""
        cells = [
            line["what"],
            f"`{line['rule']}`",
            "" if line["published"] is None else f"{100 * line['published']:.2f} ({line['paper']})",
            mean_and_std(accuracies) + diverged,
            f"{seeds}",
            f"{line['epochs']}",
            *("" if line[key] is None else f"{line[key]:.2g}" for key in ("p", "angle")),
            f"`--rows={line['name']}`",
        ]
        text.append(f"| {' | '.join(cells)} |")
    for needs_gpu, when in ((False, "Not run yet"), (True, "Not run yet, and too long without a GPU")):
        missing = [line for line in lines if not has_run(line) and line["needs_gpu"] == needs_gpu]
        if missing:
            text += ["", f"{when}: " + "; ".join(f"{line['what']}, by `{line['rule']}`" for line in missing) + "."]
    return "\n".join(text)


def plot() -> plt.Figure:
    """Validation accuracy over epochs, mean and standard deviation over seeds (dotted: those that diverged), and a
    panel for each network."""
    panels = {}
    for row in ROWS:
        if results := kept(row)[0]:
            panels.setdefault(row.what, []).append((row.rule, results))
    dark_and_light = plt.colormaps["tab20"].colors
    rules = dict.fromkeys(rule for curves in panels.values() for rule, _ in curves)
    colours = dict(zip(rules, (*dark_and_light[::2], *dark_and_light[1::2]), strict=False))
    columns = max(1, min(4, len(panels)))
    lines = max(1, -(-len(panels) // columns))
    figure, axes = plt.subplots(lines, columns, figsize=(12, 3 * lines), layout="constrained")
    for panel, (what, curves) in zip(np.ravel(axes), panels.items(), strict=False):
        for rule, results in curves:
            through = ended(results)
            of_epochs = zip(*(results[seed]["epochs"] for seed in through), strict=True)
            records = [over_seeds(dict(zip(through, of_epoch, strict=True))) for of_epoch in of_epochs]
            look = {"color": colours[rule], "markersize": 3, "linewidth": 1}
            curve(panel, records, "validation_top1", 100, "o-" if len(records) < 20 else "-", **look)
            for seed in results.keys() - through.keys():
                curve(panel, results[seed]["epochs"], "validation_top1", 100, ":", **look)
        panel.set_title(textwrap.fill(what.removesuffix(", top-5"), 40), fontsize="small")
        panel.set_xlabel("epoch")
        panel.xaxis.get_major_locator().set_params(integer=True)
        style(panel)
    for panel in np.ravel(axes)[len(panels) :]:
        panel.axis("off")
    figure.supylabel("validation accuracy (%)")
    shown = [plt.Line2D([], [], color=colour, label=RULES.get(rule, rule)) for rule, colour in colours.items()]
    figure.legend(handles=shown, loc="outside lower center", ncols=6, frameon=False)
    return figure


def write() -> str:
    """Write published.json, .md and .png; the table."""
    lines = collect()
    text = table(lines)
    (RESULTS / "published.json").write_text(json.dumps(lines, indent=1) + "\n")
    (RESULTS / "published.md").write_text(f"{text}\n")
    plot().savefig(RESULTS / "published.png", dpi=160)
    return text


def main() -> None:
    """Train what is missing, writing the table after each row."""
    names = list(dict.fromkeys(row.name for row in ROWS))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="", help=f"names, with commas between; allowed: {', '.join(names)}")
    parser.add_argument("--seed", type=int, default=0, help="the first of each row's seeds (default 0)")
    parser.add_argument("--data_dir", default="", help="of TFDS; without it nothing is trained")
    parser.add_argument("--workdir", type=Path, default=Path("runs/published"), help="of the runs")
    arguments = parser.parse_args()
    wanted = arguments.rows.split(",") if arguments.rows else names
    for name in wanted:
        if name not in names:
            parser.error(f"--rows: got {name!r}; allowed: {', '.join(names)}")
    print(write())
    if not arguments.data_dir:
        return
    for row in (row for name in wanted for row in ROWS if row.name == name and (arguments.rows or not row.gpu)):
        if not is_missing(row, arguments.seed):
            print(f"{row.name} by {row.rule}: from seed {arguments.seed} on it is kept in {KEPT}; --seed for others")
        elif train(row, arguments.workdir, arguments.data_dir, seed=arguments.seed):
            print(write())


if __name__ == "__main__":
    main()
