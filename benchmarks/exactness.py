"""Does a more exact inverse make better targets? The rules of Bengio 2020 on MNIST, from one step to true Jacobians.

    python -m benchmarks.exactness --data_dir=DIR

trains the MLP of configs/mnist_mlp.py for 3 epochs, after 2 of feedback training alone, with targets from more and more
iterations of the learned inverse; from ten that are damped less and less; and, without any feedback weights, from the
damped inverses of the blocks' true Jacobians. Beside it plain target propagation over the size of its steps. The same
command goes on where it was stopped. Writes benchmarks/results/exactness.json and .png.
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import jax
import matplotlib.pyplot as plt
import numpy as np
from jax.scipy.sparse.linalg import cg
from matplotlib.ticker import NullFormatter
from ml_collections import ConfigDict

from benchmarks.compare import median_angle, run
from benchmarks.record import RESULTS, origin, spread
from configs import mnist_mlp
from jaxdtp.configuration.config import resolve
from jaxdtp.learning.algorithms import ALGORITHMS, Algorithm
from jaxdtp.learning.targets import TargetRule
from jaxdtp.results.plots import style

EPOCHS, PRETRAINING = 3, 2
TRUE = "true inverse"


class Panel(NamedTuple):
    """One way to be more or less exact.

    Attributes:
        title, label: of the panel and of its x axis.
        key: what is varied.
        values: of it, from the least exact on.
        rules: names of algorithms.
        settings: of all of its runs.
    """

    title: str
    label: str
    key: str
    values: tuple[float, ...]
    rules: tuple[str, ...]
    settings: dict


PANELS = [
    Panel(
        "learned inverse, no damping",
        "iterations (1: DTP)",
        "target.iterations",
        (1, 2, 4, 10),
        ("inverse",),
        {"target.damping": 0.0},
    ),
    Panel(
        "learned inverse, 10 iterations",
        "damping",
        "target.damping",
        (10.0, 3.0, 1.0, 0.3, 0.1),
        ("inverse", "inverse_output"),
        {},
    ),
    Panel(
        "true Jacobians",
        "damping",
        "target.damping",
        (10.0, 1.0, 0.1, 0.01),
        (TRUE,),
        {"feedback.pretraining_epochs": 0},
    ),
    Panel(
        "target propagation",
        "step size beta",
        "beta",
        (100.0, 30.0, 10.0, 3.0, 1.0, 0.1),
        ("tp",),
        {"feedback.pretraining_epochs": 0},
    ),
]


def true_inverse_target(damping: float) -> TargetRule:
    """A target rule: t[n-1] = s[n-1] + J^T (J J^T + damping)^-1 (t[n] - s[n]), J the Jacobian of the block, by
    conjugate gradients."""

    def rule(block, feedback_params, forward, clean, target):
        _, down = jax.vjp(lambda x: forward(x)[0], clean.input)
        up = jax.linearize(lambda x: forward(x)[0], clean.input)[1]
        solved, _ = cg(lambda v: up(down(v)[0]) + damping * v, target - clean.output, tol=1e-6, maxiter=500)
        return clean.input + down(solved)[0], {}

    return rule


def configuration(panel: Panel, rule: str, value: float, seeds: int, data_dir: str) -> ConfigDict:
    """The resolved configuration of one run."""
    config = mnist_mlp.get_config()
    changes = {"feedback.pretraining_epochs": PRETRAINING, panel.key: value} | panel.settings
    if rule == TRUE:
        damping = changes.pop(panel.key)
        rule = f"{TRUE}, damping {damping:g}"
        ALGORITHMS[rule] = Algorithm(None, true_inverse_target(damping))
    config.algorithm, config.seeds, config.num_epochs = rule, seeds, EPOCHS
    config.dataset.data_dir = data_dir
    config.alignment.every_epochs, config.alignment.gauss_newton = 1, True
    config.update_from_flattened_dict(changes)
    return resolve(config, changes)


def point(panel: Panel, rule: str, value: float, result: dict | None) -> dict:
    """What is kept of one run; accuracies by seed, those of the best epoch by validation."""
    seeds = result["summary"]["seeds"].values() if result else []
    best = [
        max(epoch["seeds"][seed]["validation_top1"] for epoch in result["epochs"])
        for seed in map(str, range(len(seeds)))
    ]
    return {
        "panel": panel.title,
        "rule": rule,
        panel.key: value,
        "validation_accuracies": best,
        "test_accuracies": [of_seed["test_accuracy"] for of_seed in seeds],
        "update_angle": median_angle(result, "update_angle"),
        "gauss_newton_angle": median_angle(result, "gauss_newton_angle"),
    }


def plot(points: list[dict]) -> plt.Figure:
    """A column for each panel: test errors above, angles below."""
    figure, axes = plt.subplots(2, len(PANELS), figsize=(12, 6), sharey="row", sharex="col", layout="constrained")
    for column, panel in zip(axes.T, PANELS, strict=True):
        error, angle = column
        for index, rule in enumerate(panel.rules):
            chosen = [kept for kept in points if kept["panel"] == panel.title and kept["rule"] == rule]
            values = [kept[panel.key] for kept in chosen]
            means = [100 - 100 * np.mean(kept["test_accuracies"]) for kept in chosen]
            deviations = [100 * spread(kept["test_accuracies"]) for kept in chosen]
            look = {"marker": "os"[index], "markersize": 4, "linestyle": ("-", "--")[index]}
            error.errorbar(values, means, deviations, color="C0", label=rule, capsize=2, **look)
            angle.plot(values, [kept["update_angle"] for kept in chosen], color="C1", label="to BP", **look)
            angle.plot(
                values, [kept["gauss_newton_angle"] for kept in chosen], color="C2", label="to Gauss-Newton", **look
            )
        error.set(title=panel.title, xscale="log", yscale="log")
        error.set_yticks([3, 5, 10, 20, 50, 100], [3, 5, 10, 20, 50, 100])
        error.yaxis.set_minor_formatter(NullFormatter())
        angle.set_xticks(panel.values, [f"{value:g}" for value in panel.values])
        angle.xaxis.set_minor_formatter(NullFormatter())
        error.legend(frameon=False, fontsize="small", loc="upper left")
        angle.set(xlabel=panel.label)
        if panel.values[0] > panel.values[-1]:
            angle.invert_xaxis()
        for panel_axes in column:
            style(panel_axes)
    axes[0, 0].set_ylabel("test error (%)")
    axes[1, 0].set(ylabel="median angle of hidden blocks (°)", ylim=(0, 100))
    axes[1, 0].legend(frameon=False, fontsize="small")
    figure.suptitle(f"More exact inverses, and smaller steps, from left to right: MLP on MNIST, {EPOCHS} epochs")
    return figure


def main() -> None:
    """Run what is missing, then draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="", help="of TFDS; empty: its own default")
    parser.add_argument("--seeds", type=int, default=2, help="how many, from 0 on (default 2)")
    parser.add_argument("--workdir", type=Path, default=Path("runs/exactness"), help="of the runs")
    arguments = parser.parse_args()
    points = []
    for panel in PANELS:
        for rule in panel.rules:
            for value in panel.values:
                config = configuration(panel, rule, value, arguments.seeds, arguments.data_dir)
                workdir = arguments.workdir / f"{panel.title}-{rule}-{value:g}-{arguments.seeds}".replace(" ", "_")
                points.append(point(panel, rule, value, run(config, workdir)))
                print(points[-1], flush=True)
    command = f"python -m benchmarks.exactness --seeds={arguments.seeds} --data_dir=DIR"
    result = origin(command) | {"epochs": EPOCHS, "pretraining_epochs": PRETRAINING, "points": points}
    (RESULTS / "exactness.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(points).savefig(RESULTS / "exactness.png", dpi=160)


if __name__ == "__main__":
    main()
