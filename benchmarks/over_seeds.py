"""Fast L-DRL against BP over seeds: `python -m benchmarks.over_seeds` draws benchmarks/results/over_seeds.png.

Runs are those recorded as benchmarks/results/CONFIG-ALGORITHM*.json (`python -m benchmarks.record`), of many seeds at
once or of one each.
"""

import json

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.record import RESULTS, mean_and_std
from jaxdtp.plots import curve, style
from jaxdtp.reports import of_blocks
from jaxdtp.statistics import over_seeds, welch

CONFIGS = {
    "mnist_lenet_fast": "LeNet on MNIST",
    "cifar10_lenet_fast": "LeNet on CIFAR-10",
    "cifar10_resnet20_fast": "ResNet-20 on CIFAR-10",
    "digits_vit_fast": "ViT on the digits",
    "mnist_vit_fast": "ViT on MNIST",
}
ALGORITHMS = {"ldrl_fast": "fast L-DRL", "bp": "BP"}


def runs(config: str, algorithm: str) -> dict[int, dict]:
    """What was recorded of a configuration by an algorithm, 'test_accuracy' and 'epochs', by seed."""
    found = {}
    for path in (*RESULTS.glob(f"{config}-{algorithm}.json"), *RESULTS.glob(f"{config}-{algorithm}-seed*.json")):
        result = json.loads(path.read_text())
        if many := result["summary"].get("seeds"):
            for seed, summary in many.items():
                epochs = [{"epoch": epoch["epoch"]} | epoch["seeds"][seed] for epoch in result["epochs"]]
                found[int(seed)] = {"test_accuracy": summary["test_accuracy"], "epochs": epochs}
        else:
            accuracy = result["summary"]["test_accuracy"]
            found[result["config"]["seed"]] = {"test_accuracy": accuracy, "epochs": result["epochs"]}
    return dict(sorted(found.items()))


def table() -> str:
    """A row in Markdown for each configuration and algorithm; angles after each epoch, over layers, epochs and
    seeds."""
    lines = [
        "| config | algorithm | epochs | test accuracy by seed (%) | mean ± std | p (Welch) "
        "| update angle, median (degrees) | largest |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for config in CONFIGS:
        recorded = {algorithm: list(runs(config, algorithm).values()) for algorithm in ALGORITHMS}
        of_algorithm = {
            algorithm: [100 * result["test_accuracy"] for result in results] for algorithm, results in recorded.items()
        }
        for algorithm, name in ALGORITHMS.items():
            results, accuracies = recorded[algorithm], of_algorithm[algorithm]
            probability = None if algorithm == "bp" else welch(accuracies, of_algorithm["bp"])
            epochs = [epoch for result in results for epoch in result["epochs"]]
            # Without the smallest one: that of the output layer, whose update is the gradient whatever the feedback.
            angles = [angle for epoch in epochs for angle in sorted(of_blocks(epoch, "update_angle").values())[1:]]
            cells = [f"{statistic(angles):.2g}" if angles else "" for statistic in (np.median, np.max)]
            by_seed = ", ".join(format(accuracy, ".2f") for accuracy in accuracies)
            differs = "" if probability is None else format(probability, ".2g")
            lines.append(
                f"| `{config}` | {name} | {len(results[0]['epochs'])} | {by_seed} | {mean_and_std(accuracies)} "
                f"| {differs} | {' | '.join(cells)} |"
            )
    return "\n".join(lines)


def plot() -> plt.Figure:
    """Validation accuracy over epochs, mean and standard deviation, and a panel for each configuration."""
    figure, axes = plt.subplots(2, 3, figsize=(11, 6.5), layout="constrained")
    for panel, (config, title) in zip(axes.flat, CONFIGS.items(), strict=False):
        for colour, (algorithm, name) in enumerate(ALGORITHMS.items()):
            by_seed = {seed: result["epochs"] for seed, result in runs(config, algorithm).items()}
            records = [
                over_seeds(dict(zip(by_seed, of_epoch, strict=True)))
                for of_epoch in zip(*by_seed.values(), strict=True)
            ]
            look = {"color": f"C{colour}", "markersize": 3, "linewidth": 1, "label": name}
            curve(panel, records, "validation_top1", 100, "o-", **look)
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
