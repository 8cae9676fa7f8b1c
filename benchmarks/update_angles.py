"""Angle between the DTP update and the backpropagation gradient, by block, for feedback weights of several kinds.

    python -m benchmarks.update_angles [--quick] [--data_dir=DIR]

writes benchmarks/results/update_angles[_quick].json and .png.
"""

import matplotlib.pyplot as plt
import numpy as np

from benchmarks import frozen
from jaxdtp.alignment import gradient_matching
from jaxdtp.learning.algorithms import ALGORITHMS
from jaxdtp.learning.targets import difference_target

KINDS = {
    # name: (how the feedback weights come about, feedback activation)
    "random": ("random", "elu"),
    "DTP": ("dtp", "elu"),
    "L-DRL": ("ldrl", "elu"),
    "L-DRL, matched slope": ("ldrl", "matched"),
    "symmetric": ("symmetric", "elu"),
    "symmetric, matched slope": ("symmetric", "matched"),
}


def main() -> None:
    """Train, measure, write the angles, draw them."""
    arguments = frozen.parse_arguments(__doc__.splitlines()[0])
    setting = frozen.QUICK if arguments.quick else frozen.PUBLISHED
    angles = {kind: [] for kind in KINDS}
    for seed, start in enumerate(frozen.starts(setting, arguments.data_dir)):
        for kind, (origin, activation) in KINDS.items():
            network = frozen.build_network(activation)
            if origin == "random":
                feedback = start.feedback
            elif origin == "symmetric":
                feedback = {name: start.forward[name] for name in start.feedback}
            else:
                feedback, _ = frozen.train(network, ALGORITHMS[origin].feedback_rule, setting, start)
            matches = gradient_matching(
                network, difference_target, start.forward, feedback, start.images, start.labels, setting.beta
            )
            angles[kind].append({name: float(match["kernel"].angle) for name, match in matches.items()})
            shown = ", ".join(f"{name} {angle:.1f}" for name, angle in angles[kind][-1].items())
            print(f"seed {seed}, {kind}: degrees: {shown}", flush=True)

    path = frozen.write_result(setting, arguments, {"angles": angles})
    blocks = list(angles["random"][0])
    figure, axes = plt.subplots(figsize=(9, 4.4), layout="constrained")
    width = 0.8 / len(KINDS)
    for index, (kind, of_seeds) in enumerate(angles.items()):
        values = np.array([[of_seed[block] for block in blocks] for of_seed in of_seeds])
        positions = np.arange(len(blocks)) + (index - (len(KINDS) - 1) / 2) * width
        axes.bar(positions, values.mean(axis=0), width, yerr=values.std(axis=0), capsize=2, label=kind)
    axes.set_xticks(np.arange(len(blocks)), blocks)
    axes.set(ylabel="angle of update to\nbackpropagation gradient (degrees)", ylim=(0, 100))
    axes.axhline(90, color="grey", linewidth=0.8, linestyle=":")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), title="feedback weights")
    figure.suptitle(frozen.title("Updates against backpropagation", setting, arguments.quick))
    figure.savefig(path.with_suffix(".png"), dpi=160)
    print(f"wrote {path}.json and {path}.png")


if __name__ == "__main__":
    main()
