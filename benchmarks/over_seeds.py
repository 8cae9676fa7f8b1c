"""Fast L-DRL against BP over seeds: `python -m benchmarks.over_seeds` draws benchmarks/results/over_seeds.png.

Runs are those recorded as benchmarks/results/CONFIG-ALGORITHM-seedN.json (`python -m benchmarks.record`).
"""

import json

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.record import RESULTS
from jaxdtp.plots import style
from jaxdtp.reports import of_blocks

CONFIGS = {
    "mnist_lenet_fast": "LeNet on MNIST",
    "cifar10_lenet_fast": "LeNet on CIFAR-10",
    "cifar10_resnet20_fast": "ResNet-20 on CIFAR-10",
    "digits_vit_fast": "ViT on the digits",
    "mnist_vit_fast": "ViT on MNIST",
}
ALGORITHMS = {"ldrl_fast": "fast L-DRL", "bp": "BP"}


def runs(config: str, algorithm: str) -> list[dict]:
    """The recorded runs of a configuration by an algorithm, by seed."""
    results = [json.loads(path.read_text()) for path in RESULTS.glob(f"{config}-{algorithm}-seed*.json")]
    return sorted(results, key=lambda result: result["config"]["seed"])


def table() -> str:
    """A row in Markdown for each configuration and algorithm; angles after each epoch, over layers, epochs and
    seeds."""
    lines = [
        "| config | algorithm | epochs | test accuracy by seed (%) | mean | update angle, median (degrees) | largest |",
        "|---|---|---|---|---|---|---|",
    ]
    for config in CONFIGS:
        for algorithm, name in ALGORITHMS.items():
            results = runs(config, algorithm)
            accuracies = [100 * result["summary"]["test_accuracy"] for result in results]
            epochs = [epoch for result in results for epoch in result["epochs"]]
            # Without the smallest one: that of the output layer, whose update is the gradient whatever the feedback.
            angles = [angle for epoch in epochs for angle in sorted(of_blocks(epoch, "update_angle").values())[1:]]
            cells = [f"{statistic(angles):.2g}" if angles else "" for statistic in (np.median, np.max)]
            lines.append(
                f"| `{config}` | {name} | {len(results[0]['epochs'])} "
                f"| {', '.join(format(accuracy, '.2f') for accuracy in accuracies)} | {np.mean(accuracies):.2f} "
                f"| {' | '.join(cells)} |"
            )
    return "\n".join(lines)


def plot() -> plt.Figure:
    """Validation accuracy over epochs, a curve for each seed, and a panel for each configuration."""
    figure, axes = plt.subplots(2, 3, figsize=(11, 6.5), layout="constrained")
    for panel, (config, title) in zip(axes.flat, CONFIGS.items(), strict=False):
        for colour, (algorithm, name) in enumerate(ALGORITHMS.items()):
            for result in runs(config, algorithm):
                epochs = [epoch["epoch"] for epoch in result["epochs"]]
                accuracies = [100 * epoch["validation_top1"] for epoch in result["epochs"]]
                label = name if result["config"]["seed"] == 0 else None
                panel.plot(epochs, accuracies, "o-", color=f"C{colour}", markersize=3, linewidth=1, label=label)
        panel.set(title=title, xlabel="epoch")
        panel.xaxis.get_major_locator().set_params(integer=True)
        style(panel)
    for row in axes:
        row[0].set_ylabel("validation accuracy (%)")
    axes.flat[-1].axis("off")
    axes.flat[-1].legend(*axes.flat[0].get_legend_handles_labels(), frameon=False, loc="center")
    return figure


if __name__ == "__main__":
    plot().savefig(RESULTS / "over_seeds.png", dpi=160)
    print(table())
