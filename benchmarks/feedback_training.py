"""The published alignment figures: feedback training on one batch with frozen forward weights (Ernoult et al. 2022).

    python -m benchmarks.feedback_training [--quick] [--seeds=1] [--data_dir=DIR]

Writes benchmarks/results/feedback_training[_quick].json and .png, angle and distance of feedback to transposed forward
weights over iterations, and update_angles[_quick].png, the angle of each block's update to the backpropagation gradient
afterwards. L-DRL and DTP train the feedback of blocks, fast L-DRL (by its probes alone) and the weight mirror that of
layers. The rule of Kolen and Pollack needs forward weights that learn on the batch, too; where it diverges, or its
updates become zero, there is no angle.
"""

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from benchmarks import frozen
from benchmarks.record import RESULTS, origin
from jaxdtp.alignment import gradient_matching
from jaxdtp.learning.algorithms import ALGORITHMS
from jaxdtp.learning.targets import difference_target
from jaxdtp.models.blocks import to_be_derived
from jaxdtp.results.plots import style

BLOCKS = {"L-DRL": ("ldrl", "elu"), "DTP": ("dtp", "elu"), "L-DRL, matched slope": ("ldrl", "matched")}
LAYERS = {"fast L-DRL": "ldrl_fast", "weight mirror": "weight_mirror", "Kolen-Pollack": "kp"}
SYMMETRIC = {"symmetric": "elu", "symmetric, matched slope": "matched"}
LABELS = {"weight_angle": "angle (degrees)", "weight_distance": "relative distance"}


def by_layers(network: frozen.Network) -> frozen.Network:
    """The blocks with feedback weights beside their layers in place of their own feedback maps."""
    return tuple(block._replace(gate=to_be_derived, project=to_be_derived) for block in network)


def of_seed(setting: frozen.Setting, start: frozen.Start) -> tuple[dict, dict]:
    """What one seed shows: by rule the curves of `frozen.train`, and by kind of feedback weights the angle of each
    block's update in degrees."""

    def angles(network, target_rule, forward, feedback):
        found = gradient_matching(network, target_rule, forward, feedback, start.images, start.labels, setting.beta)
        return {name: float(match["kernel"].angle) for name, match in found.items()}

    network, curves = frozen.build_network(), {}
    degrees = {"random": angles(network, difference_target, start.forward, start.feedback)}
    for kind, (algorithm, activation) in BLOCKS.items():
        own = frozen.build_network(activation)
        feedback, curves[kind] = frozen.train(own, ALGORITHMS[algorithm].feedback_rule, setting, start)
        degrees[kind] = angles(own, difference_target, start.forward, feedback)
    for kind, activation in SYMMETRIC.items():
        feedback = {name: start.forward[name] for name in start.feedback}
        degrees[kind] = angles(frozen.build_network(activation), difference_target, start.forward, feedback)
    for kind, algorithm in LAYERS.items():
        forward, feedback, curves[kind] = frozen.train_layers(algorithm, setting, start)
        degrees[kind] = angles(by_layers(network), None, forward, feedback)
    return curves, degrees


def plot_curves(curves: dict[str, list], setting: frozen.Setting, title: str) -> plt.Figure:
    """A column for each block: angles above, distances below."""
    blocks = frozen.build_network()[1:]
    figure, axes = plt.subplots(2, len(blocks), figsize=(10, 5.8), sharex="col", sharey="row", layout="constrained")
    for row, (metric, label) in zip(axes, LABELS.items(), strict=True):
        row[0].set_ylabel(label)
        for panel, block, iterations in zip(row, blocks, setting.iterations, strict=True):
            positions = np.linspace(0, iterations, frozen.POINTS + 1)
            for kind, of_seeds in curves.items():
                values = np.array([of_one[metric][block.name] for of_one in of_seeds])
                mean, spread = values.mean(axis=0), values.std(axis=0)
                (line,) = panel.plot(positions, mean, "-" if kind in BLOCKS else "--", label=kind)
                panel.fill_between(positions, mean - spread, mean + spread, color=line.get_color(), alpha=0.2)
            panel.set_ylim(0)
            style(panel)
    for top, bottom, block in zip(*axes, blocks, strict=True):
        top.set_title(block.name)
        bottom.set_xlabel("feedback iterations on one batch")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=6)
    figure.suptitle(title)
    return figure


def plot_angles(angles: dict[str, list], title: str) -> plt.Figure:
    """A group of bars for each block."""
    blocks = list(angles["random"][0])
    figure, axes = plt.subplots(figsize=(9, 4.6), layout="constrained")
    width = 0.8 / len(angles)
    for index, (kind, of_seeds) in enumerate(angles.items()):
        values = np.array([[of_one[block] for block in blocks] for of_one in of_seeds])
        positions = np.arange(len(blocks)) + (index - (len(angles) - 1) / 2) * width
        label = kind if np.isfinite(values).all() else f"{kind}: none"
        axes.bar(positions, values.mean(axis=0), width, yerr=values.std(axis=0), capsize=2, label=label)
    axes.set_xticks(np.arange(len(blocks)), blocks)
    axes.set(ylabel="angle of update to\nbackpropagation gradient (degrees)", ylim=(0, 100))
    axes.axhline(90, color="grey", linewidth=0.8, linestyle=":")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), title="feedback weights")
    figure.suptitle(title)
    return figure


def keep(path: Path, setting: frozen.Setting, quick: bool, found: list[tuple[dict, dict]]) -> None:
    """Write the result of the seeds that are done, and both figures."""
    curves, angles = (
        {kind: [of_one[kind] for of_one in part] for kind in part[0]} for part in zip(*found, strict=True)
    )
    setting = setting._replace(seeds=len(found))
    options = (["--quick"] if quick else []) + [f"--seeds={len(found)}", "--data_dir=DIR"]
    result = origin(" ".join(["python -m benchmarks.feedback_training", *options]))
    result |= {"setting": setting._asdict(), "curves": curves, "angles": angles}
    path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    text = "Feedback against transposed forward weights"
    plot_curves(curves, setting, frozen.title(text, setting, quick)).savefig(path.with_suffix(".png"), dpi=160)
    figure = plot_angles(angles, frozen.title("Updates against backpropagation", setting, quick))
    figure.savefig(path.with_name(path.name.replace("feedback_training", "update_angles")).with_suffix(".png"), dpi=160)
    plt.close("all")


def main() -> None:
    """Train, measure, and write after each seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="minutes on 2 cores, not the published setting")
    parser.add_argument("--seeds", type=int, help="how many, from 0 on (default: the setting's)")
    parser.add_argument("--data_dir", default="", help="of TFDS; empty: its own default")
    arguments = parser.parse_args()
    setting = frozen.QUICK if arguments.quick else frozen.PUBLISHED
    setting = setting._replace(seeds=arguments.seeds or setting.seeds)
    path = RESULTS / ("feedback_training" + ("_quick" if arguments.quick else ""))
    found = []
    for seed, start in enumerate(frozen.starts(setting, arguments.data_dir)):
        found.append(of_seed(setting, start))
        for kind, degrees in found[-1][1].items():
            shown = ", ".join(f"{name} {angle:.1f}" for name, angle in degrees.items())
            print(f"seed {seed}, {kind}: degrees of updates: {shown}", flush=True)
        keep(path, setting, arguments.quick, found)
    print(f"wrote {path}.json and .png, and update_angles{'_quick' if arguments.quick else ''}.png")


if __name__ == "__main__":
    main()
