"""How long fast L-DRL must probe: the mismatch of every block's feedback weights while a network learns.

    python -m benchmarks.probing --config=mnist_lenet_fast --steps=1600 --data_dir=DIR

trains three times with the same seed: with probes in every step; as fast L-DRL is, with one in `layers.RARELY` steps
after `layers.steps_to_match`; and with none after that. Writes benchmarks/results/probing_CONFIG.json and .png.
"""

import argparse
import importlib
import json
from functools import partial
from unittest import mock

import jax
import matplotlib.pyplot as plt
import numpy as np

from benchmarks.record import RESULTS, origin
from jaxdtp import data
from jaxdtp.alignment import weight_alignment
from jaxdtp.configuration.config import resolve
from jaxdtp.learning import train_feedback
from jaxdtp.learning.layers import RARELY
from jaxdtp.learning.state import init_state
from jaxdtp.learning.step import train_step
from jaxdtp.results.plots import style
from jaxdtp.running.build import build_network, build_preprocessing, build_settings, steps_in_epoch
from jaxdtp.running.epoch import measure_alignment, normalise

POINTS = 40
NEVER = 10**9
VARIANTS = {"in every step": 1, f"later in one of {RARELY}": RARELY, "later in none": NEVER}


def run(network, settings, config, dataset, steps: int, every: int) -> dict:
    """By block the relative distance of feedback to forward weights before the steps 0, ... of a run, and at its end
    the largest angle of a block's update to the backpropagation gradient in degrees; probes come `every` steps."""
    init_key, key = jax.random.split(jax.random.key(config.seed))
    state = init_state(network, settings, init_key)
    shuffle, count = np.random.default_rng(config.seed), steps * config.batch_size
    epochs = [shuffle.permutation(len(dataset.train.rows)) for _ in range(0, count, len(dataset.train.rows))]
    order = np.concatenate(epochs)[:count]
    preprocessing = build_preprocessing(config)
    prepare = jax.jit(partial(normalise, preprocessing))
    curves = {block.name: [] for block in network[1:]}
    with mock.patch.object(train_feedback, "RARELY", every):
        step = jax.jit(partial(train_step, network, settings), donate_argnums=0)
        for number, chosen in enumerate(order.reshape(steps, config.batch_size)):
            if number % (steps // POINTS) == 0:
                distances = weight_alignment(state.forward, {name: state.feedback[name] for name in curves})
                for name, curve in curves.items():
                    curve.append(float(distances["weight_distance"][name]))
            batch = data.read(dataset.train, chosen)
            state, _ = step(state, prepare(batch.images), batch.labels, jax.random.fold_in(key, number))
        angles = measure_alignment(network, settings, preprocessing, 2, False, state, batch, key)["update_angle"]
    return {"weight_distance": curves, "largest_update_angle": max(map(float, angles.values()))}


def plot(curves: dict[str, dict], after: int, steps: int, title: str) -> plt.Figure:
    """A panel for each block but the first, whose feedback weights carry nothing."""
    blocks = list(next(iter(curves.values()))["weight_distance"])
    figure, axes = plt.subplots(1, len(blocks), figsize=(3.2 * len(blocks), 3.6), sharey=True, layout="constrained")
    for panel, block in zip(axes, blocks, strict=True):
        for (name, found), style_of_line in zip(curves.items(), ("-", "--", ":"), strict=True):
            distances = found["weight_distance"][block]
            panel.plot(np.arange(len(distances)) * (steps // POINTS), distances, style_of_line, label=name)
        panel.axvline(after, color="grey", linestyle=":", linewidth=0.8)
        panel.set(title=block, yscale="log", xlabel="training step")
        style(panel)
    axes[0].set_ylabel("relative distance of feedback\nto forward weights")
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=3)
    figure.suptitle(title)
    return figure


def main() -> None:
    """Train three times, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="mnist_lenet_fast", help="of configs/, with one layer a block")
    parser.add_argument("--steps", type=int, default=1600, help="of each run")
    parser.add_argument("--data_dir", default="", help="of TFDS; empty: its own default")
    arguments = parser.parse_args()
    config = importlib.import_module(f"configs.{arguments.config}").get_config()
    config.dataset.data_dir = arguments.data_dir
    config = resolve(config)
    dataset = data.load(config.dataset, config.seed)
    network = build_network(config, dataset.train.images.shape[1:], len(dataset.classes))
    settings = build_settings(config, network, steps_in_epoch(config, dataset))
    steps = arguments.steps // POINTS * POINTS
    state = init_state(network, settings, jax.random.key(config.seed))
    after = int(train_feedback.steps_with_probes(network, settings, state, config.batch_size, jax.random.key(0)))
    curves = {}
    for name, every in VARIANTS.items():
        curves[name] = run(network, settings, config, dataset, steps, every)
        print(f"probes {name}: largest angle {curves[name]['largest_update_angle']:.2g} degrees", flush=True)
    command = f"python -m benchmarks.probing --config={arguments.config} --steps={arguments.steps} --data_dir=DIR"
    result = origin(command) | {"seed": config.seed, "steps_to_match": after, "steps": steps, "probes": curves}
    path = RESULTS / f"probing_{arguments.config}"
    path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    title = f"Fast L-DRL, {arguments.config}: probes in every step until the dotted line"
    plot(curves, after, steps, title).savefig(path.with_suffix(".png"), dpi=160)


if __name__ == "__main__":
    main()
