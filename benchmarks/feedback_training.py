"""The published alignment figures: feedback training on one batch with frozen forward weights (Ernoult et al. 2022).

    python -m benchmarks.feedback_training [--quick] [--seeds=1] [--data_dir=DIR]

The same command goes on where it was stopped, after the last kind of feedback weights that was done. Writes
benchmarks/results/feedback_training[_quick].json and .png, angle and distance of feedback to transposed forward weights
over iterations, and update_angles[_quick].png, the angle of each block's update to the backpropagation gradient
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
from benchmarks.record import RESULTS, origin, spread
from jaxdtp.alignment import gradient_matching
from jaxdtp.learning.algorithms import ALGORITHMS
from jaxdtp.learning.targets import difference_target
from jaxdtp.models.blocks import to_be_derived
from jaxdtp.results.plots import style

BLOCKS = {"L-DRL": ("ldrl", "elu"), "DTP": ("dtp", "elu"), "L-DRL, matched slope": ("ldrl", "matched")}
LAYERS = {"fast L-DRL": "ldrl_fast", "weight mirror": "weight_mirror", "Kolen-Pollack": "kp"}
SYMMETRIC = {"symmetric": "elu", "symmetric, matched slope": "matched"}
LABELS = {"weight_angle": "angle (degrees)", "weight_distance": "relative distance"}
LINES = {"L-DRL, matched slope": ":"} | dict.fromkeys(LAYERS, "--")


def by_layers(network: frozen.Network) -> frozen.Network:
    """The blocks with feedback weights beside their layers in place of their own feedback maps."""
    return tuple(block._replace(gate=to_be_derived, project=to_be_derived) for block in network)


KINDS = ["random", *BLOCKS, *SYMMETRIC, *LAYERS]


def of_kind(kind: str, setting: frozen.Setting, start: frozen.Start) -> dict:
    """What one seed shows of a kind of feedback weights: 'angles' of each block's update in degrees and, where feedback
    is trained, 'curves' as from `frozen.train`."""
    network, target_rule, curves = frozen.build_network(), difference_target, None
    forward, feedback = start.forward, start.feedback
    if kind in BLOCKS:
        algorithm, activation = BLOCKS[kind]
        network = frozen.build_network(activation)
        feedback, curves = frozen.train(network, ALGORITHMS[algorithm].feedback_rule, setting, start)
    elif kind in SYMMETRIC:
        network = frozen.build_network(SYMMETRIC[kind])
        feedback = {name: start.forward[name] for name in start.feedback}
    elif kind in LAYERS:
        network, target_rule = by_layers(network), None
        forward, feedback, curves = frozen.train_layers(LAYERS[kind], setting, start)
    found = gradient_matching(network, target_rule, forward, feedback, start.images, start.labels, setting.beta)
    angles = {name: float(match["kernel"].angle) for name, match in found.items()}
    return {"angles": angles} | ({"curves": curves} if curves else {})


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
                mean, deviation = values.mean(axis=0), spread(values)
                (line,) = panel.plot(positions, mean, LINES.get(kind, "-"), label=kind)
                panel.fill_between(positions, mean - deviation, mean + deviation, color=line.get_color(), alpha=0.2)
            style(panel)
    axes[0, 0].set_ylim(0, 100)
    axes[1, 0].set_yscale("log")
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
        axes.bar(positions, values.mean(axis=0), width, yerr=spread(values), capsize=2, label=label)
    axes.set_xticks(np.arange(len(blocks)), blocks)
    axes.set(ylabel="angle of update to\nbackpropagation gradient (degrees)", ylim=(0, 100))
    axes.axhline(90, color="grey", linewidth=0.8, linestyle=":")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), title="feedback weights")
    figure.suptitle(title)
    return figure


def keep(path: Path, setting: frozen.Setting, quick: bool, found: list[dict[str, dict]]) -> None:
    """Write the result of the seeds that are done, and both figures."""
    angles = {kind: [of_one[kind]["angles"] for of_one in found] for kind in KINDS}
    curves = {kind: [of_one[kind]["curves"] for of_one in found] for kind in KINDS if "curves" in found[0][kind]}
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
    """Train and measure what isn't done yet, and write after each seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="minutes on 2 cores, not the published setting")
    parser.add_argument("--seeds", type=int, help="how many, from 0 on (default: the setting's)")
    parser.add_argument("--data_dir", default="", help="of TFDS; empty: its own default")
    parser.add_argument("--workdir", type=Path, default=Path("runs/feedback_training"), help="of what is done")
    arguments = parser.parse_args()
    setting = frozen.QUICK if arguments.quick else frozen.PUBLISHED
    setting = setting._replace(seeds=arguments.seeds or setting.seeds)
    quick = "_quick" if arguments.quick else ""
    arguments.workdir.mkdir(parents=True, exist_ok=True)
    found = []
    for seed, start in enumerate(frozen.starts(setting, arguments.data_dir)):
        found.append({})
        for kind in KINDS:
            part = arguments.workdir / f"seed{seed}{quick}-{kind}.json".replace(" ", "_")
            if not part.exists():
                part.write_text(json.dumps(of_kind(kind, setting, start)))
            found[-1][kind] = json.loads(part.read_text())
            shown = ", ".join(f"{name} {angle:.1f}" for name, angle in found[-1][kind]["angles"].items())
            print(f"seed {seed}, {kind}: degrees of updates: {shown}", flush=True)
        keep(RESULTS / f"feedback_training{quick}", setting, arguments.quick, found)


if __name__ == "__main__":
    main()
