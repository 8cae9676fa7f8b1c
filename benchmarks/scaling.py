"""How the time of a training step grows with batch, width, depth and feedback iterations: VGG, BP, L-DRL, fast L-DRL.

    python -m benchmarks.scaling

Writes benchmarks/results/scaling.json and .png. One of the four grows at a time, the others stay at BASE.
"""

import argparse
import json
from typing import NamedTuple

import jax
import matplotlib.pyplot as plt
from ml_collections import ConfigDict

from benchmarks.record import RESULTS, origin
from benchmarks.steps import configure, jaxdtp_step, timed
from benchmarks.timing import summary
from configs import cifar10_vgg, cifar10_vgg_fast
from jaxdtp.results.plots import style


class Size(NamedTuple):
    """Of a step.

    Attributes:
        batch: examples.
        width: channels, as a share of the published VGG's.
        depth: convolutional blocks, the first ones of VGG.
        iterations: feedback iterations, as a share of the published ones, and at least one; fast L-DRL has one.
    """

    batch: int = 32
    width: float = 0.5
    depth: int = 5
    iterations: float = 0.25


BASE = Size()
GROWTH = {
    "batch": (8, 16, 32, 64, 128),
    "width": (0.125, 0.25, 0.5, 1.0),
    "depth": (2, 3, 4, 5),
    "iterations": (0.05, 0.125, 0.25, 0.5, 1.0),
}
LABELS = {
    "batch": "batch (examples)",
    "width": "width (share of VGG's channels)",
    "depth": "depth (convolutional blocks)",
    "iterations": "iterations (share of the published)",
}
RULES = {"bp": cifar10_vgg, "ldrl": cifar10_vgg, "ldrl_fast": cifar10_vgg_fast}


def resize(config: ConfigDict, size: Size, iterations: float) -> ConfigDict:
    """A resolved VGG configuration, in another size."""
    feedback = config.feedback
    config.batch_size = size.batch
    config.network.channels = tuple(int(size.width * channels) for channels in config.network.channels[: size.depth])
    feedback.iterations = tuple(max(1, round(iterations * count)) for count in feedback.iterations)
    for key in ("iterations", "noise_scale", "learning_rate", "batch_share"):
        # Of blocks 2 to N: the first convolutional ones and the last, dense one.
        if len(feedback[key]) > 1:
            feedback[key] = feedback[key][: size.depth - 1] + feedback[key][-1:]
    return config


def measure(what: str, repeats: int) -> list[dict]:
    """For every size of one growth, all in one interleaved run: seconds of a step by rule, median, minimum, maximum."""
    steps = {}
    for value in GROWTH[what]:
        size = BASE._replace(**{what: value})
        for rule, module in RULES.items():
            iterations = 1 if rule == "ldrl_fast" else size.iterations
            config = resize(configure(module.get_config(), rule), size, iterations)
            steps[value, rule] = jaxdtp_step(config, rule)
    times, _ = timed(steps, repeats, seconds=0.2)
    return [{"size": value, "seconds": {rule: summary(times[value, rule]) for rule in RULES}} for value in GROWTH[what]]


def plot(curves: dict[str, list[dict]], title: str) -> plt.Figure:
    """A panel for each of the four, seconds over size, both logarithmic."""
    figure, axes = plt.subplots(1, len(curves), figsize=(13, 3.6), layout="constrained", sharey=True)
    for panel, (what, points) in zip(axes, curves.items(), strict=True):
        sizes = [point["size"] for point in points]
        for rule in RULES:
            medians = [point["seconds"][rule]["seconds_median"] for point in points]
            low = [point["seconds"][rule]["seconds_min"] for point in points]
            high = [point["seconds"][rule]["seconds_max"] for point in points]
            panel.plot(sizes, medians, marker="o", markersize=4, label=rule)
            panel.fill_between(sizes, low, high, alpha=0.2)
        panel.set(xlabel=LABELS[what], xscale="log", yscale="log")
        panel.set_xticks(sizes, [f"{size:g}" for size in sizes])
        panel.minorticks_off()
        style(panel)
    axes[0].set_ylabel("seconds per step")
    axes[-1].legend(frameon=False)
    figure.suptitle(title)
    return figure


def main() -> None:
    """Measure every point, print, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="rounds through all steps of a growth (default 5)")
    repeats = parser.parse_args().repeats
    curves = {}
    for what in GROWTH:
        curves[what] = measure(what, repeats)
        for point in curves[what]:
            medians = ", ".join(f"{rule} {times['seconds_median']:.4f} s" for rule, times in point["seconds"].items())
            print(f"{what} {point['size']}: {medians}", flush=True)
    result = origin(f"python -m benchmarks.scaling --repeats={repeats}") | {
        "base": BASE._asdict(),
        "repeats": repeats,
        "curves": curves,
    }
    (RESULTS / "scaling.json").write_text(json.dumps(result, indent=1) + "\n")
    base = f"batch {BASE.batch}, width {BASE.width:g}, depth {BASE.depth}, iterations {BASE.iterations:g}"
    figure = plot(curves, f"A training step of VGG on {jax.devices()[0].device_kind}, unless varied: {base}")
    figure.savefig(RESULTS / "scaling.png", dpi=160)


if __name__ == "__main__":
    main()
