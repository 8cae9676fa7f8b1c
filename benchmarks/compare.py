"""Every rule on the same network, data and seeds, in one table.

    python -m benchmarks.compare --dataset=digits --network=mlp --seeds=5
    python -m benchmarks.compare --rules=bp,ddtp_linear --dataset=mnist --network=mlp --epochs=2 --data_dir=DIR

Runs configs/DATASET_NETWORK.py (with --network=mlp:searched its variant `searched`) with every rule, all seeds in one
run, each rule in a directory of its own below --workdir. The same command again goes on where it was stopped. Writes
benchmarks/results/compare_DATASET_NETWORK.json, .md and .png; rows of other rules, with the same number of epochs, are
kept.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
from etils import epath
from matplotlib.ticker import NullFormatter, ScalarFormatter
from ml_collections import ConfigDict

from benchmarks.record import RESULTS, mean_and_std, origin, spread
from benchmarks.steps import jaxdtp_step, timed
from jaxdtp import data
from jaxdtp.configuration.config import resolve
from jaxdtp.learning.algorithms import ALGORITHMS
from jaxdtp.results.plots import style
from jaxdtp.results.reports import of_blocks
from jaxdtp.results.statistics import welch
from jaxdtp.running.claim import check
from jaxdtp.running.rounds import DivergedError
from jaxdtp.running.train import train_and_evaluate
from jaxdtp.system.errors import ConfigError

DIVERGED = "diverged.txt"


def configuration(arguments: argparse.Namespace, rule: str) -> ConfigDict:
    """The resolved configuration of one rule's run; angles are measured after every epoch."""
    name, _, variant = f"{arguments.dataset}_{arguments.network}".partition(":")
    try:
        config = importlib.import_module(f"configs.{name}").get_config(*([variant] if variant else []))
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"--dataset, --network: there is no configs/{name}.py; allowed: the names of a file there"
        ) from error
    config.algorithm, config.seeds = rule, arguments.seeds
    config.dataset.data_dir = arguments.data_dir
    config.alignment.every_epochs = 1
    config.alignment.gauss_newton = True
    if arguments.epochs:
        config.num_epochs = config.forward.schedule_epochs = arguments.epochs
    return resolve(config, {"num_epochs", "forward.schedule_epochs"})


def run(config: ConfigDict, workdir: Path) -> dict | None:
    """A finished run's epochs and summary, trained first if need be; None if all of its seeds diverged.

    Raises:
        ConfigError: the run in `workdir` is one of another configuration.
    """
    check(epath.Path(workdir), config)
    summary, diverged = workdir / "summary.json", workdir / DIVERGED
    if diverged.exists():
        return None
    if not summary.exists():
        try:
            train_and_evaluate(config, workdir)
        except DivergedError as error:
            diverged.write_text(f"{error}\n")
            return None
    epochs = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {"epochs": epochs, "summary": json.loads(summary.read_text())}


def seconds_per_step(arguments: argparse.Namespace, rules: list[str]) -> dict[str, float]:
    """Median seconds of a training step by rule, all measured in turn, on random images of the data's shape."""
    config = configuration(arguments, "bp")
    shape = data.load(config.dataset, config.seed).train.images.shape[1:]
    with jax.enable_x64(config.float64):
        steps = {
            rule: jaxdtp_step(configuration(arguments, rule), rule, shape) for rule in dict.fromkeys(("bp", *rules))
        }
        times, _ = timed(steps, repeats=15, seconds=0.2)
    return {rule: float(np.median(of_rule)) for rule, of_rule in times.items()}


def median_angle(result: dict | None, metric: str) -> float | None:
    """Over hidden blocks, epochs and seeds of what `run` returns, in degrees."""
    epochs = [of_seed for epoch in result["epochs"] for of_seed in epoch["seeds"].values()] if result else []
    # Without the output block, whose target and update are exact whatever the feedback.
    angles = [angle for epoch in epochs for angle in list(of_blocks(epoch, metric).values())[:-1]]
    # Not a number: an update of zero, where the whole batch had reached its targets.
    return float(np.nanmedian(angles)) if angles else None


def row(rule: str, config: ConfigDict, result: dict | None, seconds: dict[str, float]) -> dict:
    """What the table says of one rule."""
    seeds = result["summary"]["seeds"] if result else {}
    accuracies = [100 * metrics["test_accuracy"] for metrics in seeds.values()]
    return {
        "rule": rule,
        "test_accuracies": accuracies,
        "diverged": len(config.seeds) - len(accuracies),
        "images_per_second": config.batch_size / seconds[rule],
        "times_bp": seconds[rule] / seconds["bp"],
        "update_angle": median_angle(result, "update_angle"),
        "gauss_newton_angle": median_angle(result, "gauss_newton_angle"),
        "train_seconds": result["summary"]["seconds"] / len(config.seeds) if result else None,
    }


def table(rows: list[dict]) -> str:
    """The rows in Markdown; whether a rule's accuracy differs from BP's by `statistics.welch`."""
    lines = [
        "| rule | test accuracy, mean ± std over seeds (%) | differs from BP, p (Welch) | images/s | times BP "
        "| angle to BP (°) | angle to Gauss-Newton (°) |",
        "|---|---|---|---|---|---|---|",
    ]
    of_bp = next((of_rule["test_accuracies"] for of_rule in rows if of_rule["rule"] == "bp"), [])
    for of_rule in rows:
        accuracies = of_rule["test_accuracies"]
        accuracy = mean_and_std(accuracies)
        probability = None if of_rule["rule"] == "bp" else welch(accuracies, of_bp)
        differs = "-" if probability is None else f"{probability:.2g}"
        diverged = f" ({of_rule['diverged']} of {of_rule['diverged'] + len(accuracies)} diverged)"
        angles = [
            "-" if of_rule[angle] is None else f"{of_rule[angle]:.1f}"
            for angle in ("update_angle", "gauss_newton_angle")
        ]
        lines.append(
            f"| `{of_rule['rule']}` | {accuracy}{diverged if of_rule['diverged'] else ''} | {differs} "
            f"| {of_rule['images_per_second']:.0f} | {of_rule['times_bp']:.2f} | {' | '.join(angles)} |"
        )
    return "\n".join(lines)


def markdown(rows: list[dict]) -> str:
    """The commands and the table."""
    commands = "\n".join(f"`{command}`  " for command in dict.fromkeys(of_rule["command"] for of_rule in rows))
    return f"{commands}\n\n{table(rows)}"


def plot(rows: list[dict], title: str) -> plt.Figure:
    """Test error over the cost of a step, and the two angles against each other, a point for each rule."""
    figure, (cost, angles) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    for index, of_rule in enumerate(rows):
        # A colour of its own: the map has 20, which the others take.
        colour = "black" if of_rule["rule"] == "bp" else plt.get_cmap("tab20")(index)
        look = {"color": colour, "marker": "o" if index % 2 else "s", "markersize": 6, "linestyle": ""}
        if of_rule["test_accuracies"]:
            mean, deviation = 100 - np.mean(of_rule["test_accuracies"]), spread(of_rule["test_accuracies"])
            cost.errorbar(of_rule["times_bp"], mean, deviation, label=of_rule["rule"], **look)
        # Rules whose feedback is beside the layers have no targets to compare.
        if None not in (of_rule["update_angle"], of_rule["gauss_newton_angle"]):
            angles.plot(of_rule["update_angle"], of_rule["gauss_newton_angle"], **look)
    cost.set(xscale="log", yscale="log", xlabel="seconds per step, in those of BP", ylabel="test error (%)")
    for axis in (cost.xaxis, cost.yaxis):
        axis.set_major_formatter(ScalarFormatter())
        axis.set_minor_formatter(ScalarFormatter() if axis is cost.yaxis else NullFormatter())
    angles.set(
        xlabel="median angle of updates to backpropagation (degrees)",
        ylabel="median angle of targets to Gauss-Newton (degrees)",
    )
    for axes in (cost, angles):
        style(axes)
    figure.legend(frameon=False, loc="outside right center")
    figure.suptitle(title)
    return figure


def parse_arguments() -> argparse.Namespace:
    """Those of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", default=",".join(ALGORITHMS), help="names from the README's table (default: all)")
    parser.add_argument("--network", default="mlp")
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 0 on (default 5)")
    parser.add_argument("--epochs", type=int, default=0, help="default: the configuration's")
    parser.add_argument("--data_dir", default="", help="of TFDS; empty: its own default")
    parser.add_argument("--workdir", type=Path, default=Path("runs/compare"))
    arguments = parser.parse_args()
    arguments.rules = arguments.rules.split(",")
    for rule in arguments.rules:
        if rule not in ALGORITHMS:
            parser.error(f"--rules: got {rule!r}; allowed: {', '.join(ALGORITHMS)}")
    return arguments


def main() -> None:
    """Run the grid, then write the table."""
    arguments = parse_arguments()
    source = f"{arguments.dataset}_{arguments.network}"
    name = source.replace(":", "_")
    try:
        configs = {rule: configuration(arguments, rule) for rule in arguments.rules}
        results = {
            rule: run(config, arguments.workdir / f"{name}-{config.num_epochs}" / f"{rule}-{arguments.seeds}")
            for rule, config in configs.items()
        }
    except ConfigError as error:
        sys.exit(f"benchmarks.compare: {error}")
    seconds = seconds_per_step(arguments, arguments.rules)
    (epochs,) = {config.num_epochs for config in configs.values()}
    command = " ".join(["python -m benchmarks.compare", *(arg for arg in sys.argv[1:] if "workdir" not in arg)])
    command = command.replace(f"--data_dir={arguments.data_dir}", "--data_dir=DIR") if arguments.data_dir else command
    here = origin(command)
    rows = {rule: row(rule, configs[rule], result, seconds) | here for rule, result in results.items()}
    path = RESULTS / f"compare_{name}.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    if kept.get("epochs") == epochs:
        rows = {of_rule["rule"]: of_rule for of_rule in kept["rows"]} | rows
    rows = [rows[rule] for rule in ALGORITHMS if rule in rows]
    path.write_text(json.dumps({"config": f"configs/{source}", "epochs": epochs, "rows": rows}, indent=1) + "\n")
    (RESULTS / f"compare_{name}.md").write_text(f"{markdown(rows)}\n")
    title = f"configs/{source}, {epochs} epochs, {arguments.seeds} seeds, {jax.devices()[0].device_kind}"
    plot(rows, title).savefig(RESULTS / f"compare_{name}.png", dpi=160)
    print(table(rows))


if __name__ == "__main__":
    main()
