"""Feedback training on one batch with frozen forward weights: angle and distance of feedback to transposed forward
weights over iterations.

    python -m benchmarks.feedback_training [--quick] [--data_dir=DIR]

writes benchmarks/results/feedback_training[_quick].json and .png.
"""

import matplotlib.pyplot as plt
import numpy as np

from benchmarks import frozen
from jaxdtp.learning.algorithms import ALGORITHMS
from jaxdtp.results.plots import style

RULES = {"L-DRL": "ldrl", "DTP": "dtp"}
LABELS = {"weight_angle": "angle (degrees)", "weight_distance": "relative distance"}


def main() -> None:
    """Train, write the curves, draw them."""
    arguments = frozen.parse_arguments(__doc__.splitlines()[0])
    setting = frozen.QUICK if arguments.quick else frozen.PUBLISHED
    network = frozen.build_network()
    curves = {rule: [] for rule in RULES}
    for seed, start in enumerate(frozen.starts(setting, arguments.data_dir)):
        for rule, algorithm in RULES.items():
            _, of_seed = frozen.train(network, ALGORITHMS[algorithm].feedback_rule, setting, start)
            curves[rule].append(of_seed)
            last = ", ".join(f"{name} {values[-1]:.1f}" for name, values in of_seed["weight_angle"].items())
            print(f"seed {seed}, {rule}: degrees at the end: {last}", flush=True)

    path = frozen.write_result(setting, arguments, {"curves": curves})
    blocks = network[1:]
    figure, axes = plt.subplots(2, len(blocks), figsize=(10, 5.4), sharex="col", sharey="row", layout="constrained")
    for row, (metric, label) in zip(axes, LABELS.items(), strict=True):
        row[0].set_ylabel(label)
        for panel, block, iterations in zip(row, blocks, setting.iterations, strict=True):
            positions = np.linspace(0, iterations, frozen.POINTS + 1)
            for rule in RULES:
                values = np.array([of_seed[metric][block.name] for of_seed in curves[rule]])
                mean, spread = values.mean(axis=0), values.std(axis=0)
                (line,) = panel.plot(positions, mean, label=rule)
                panel.fill_between(positions, mean - spread, mean + spread, color=line.get_color(), alpha=0.2)
            style(panel)
    for top, bottom, block in zip(*axes, blocks, strict=True):
        top.set_title(block.name)
        bottom.set_xlabel("feedback iterations on one batch")
        top.set_ylim(0)
        bottom.set_ylim(0)
    axes[0, -1].legend(frameon=False)
    figure.suptitle(
        frozen.title("Feedback against transposed forward weights, which are frozen", setting, arguments.quick)
    )
    figure.savefig(path.with_suffix(".png"), dpi=160)
    print(f"wrote {path}.json and {path}.png")


if __name__ == "__main__":
    main()
