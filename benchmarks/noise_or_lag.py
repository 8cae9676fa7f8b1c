"""What difference target propagation forgives: feedback weights that are noisy, or feedback weights that lag.

    python -m benchmarks.noise_or_lag [--data_dir=DIR]

trains LeNet on MNIST with the settings of configs/mnist_lenet.py, but feedback is not learned: it is the transposed
forward weights, disturbed. Writes benchmarks/results/noise_or_lag.json and .png.
"""

import argparse
import json
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from benchmarks.record import RESULTS, origin
from configs import mnist_lenet
from jaxdtp import data
from jaxdtp.configuration.config import resolve
from jaxdtp.learning import paths
from jaxdtp.learning.state import Settings, init_state
from jaxdtp.learning.targets import (
    cross_entropy,
    difference_target,
    local_gradients,
    output_target,
    propagate_targets,
)
from jaxdtp.models import networks
from jaxdtp.results.plots import style
from jaxdtp.running.build import build_network, build_preprocessing, build_settings, steps_in_epoch
from jaxdtp.running.epoch import normalise

STEPS = 400
SHOWN = "conv_1"  # the block whose activations are drawn


class Disturbance(NamedTuple):
    """What is wrong with the feedback weights.

    Attributes:
        noise: root mean square of a random error, relative to that of the forward weights.
        lasting: steps over which the error's correlation falls to 1/e; 0: a fresh one in every step.
        lag: steps after which the feedback weights have followed a change of the forward weights to 1 - 1/e.
    """

    noise: float = 0.0
    lasting: float = 0.0
    lag: float = 0.0


DISTURBANCES = {
    "exact": Disturbance(),
    "45° of noise, fresh in every step": Disturbance(noise=1.0),
    "20° of noise, lasting 200 steps": Disturbance(noise=0.36, lasting=200),
    "lag of 3 steps": Disturbance(lag=3),
    "lag of 12 steps": Disturbance(lag=12),
}


def disturb(disturbance: Disturbance, kernels: dict, memory: dict, key: jax.Array) -> tuple[dict, dict]:
    """Feedback parameters of one step and what the next step must know: each block's lagging weights and its error."""
    follow = 1 - np.exp(-1 / disturbance.lag) if disturbance.lag else 1.0
    keep = np.exp(-1 / disturbance.lasting) if disturbance.lasting else 0.0
    feedback, after = {}, {}
    for index, (name, kernel) in enumerate(kernels.items()):
        lagging, error = memory[name]
        lagging = lagging + follow * (kernel - lagging)
        fresh = jax.random.normal(jax.random.fold_in(key, index), kernel.shape)
        error = keep * error + (1 - keep**2) ** 0.5 * fresh
        scale = disturbance.noise * jnp.sqrt(jnp.mean(kernel**2))
        feedback[name], after[name] = {"kernel": lagging + scale * error}, (lagging, error)
    return feedback, after


def train(network, settings: Settings, disturbance: Disturbance, state, batches, key: jax.Array):
    """Loss and activation in every step; `batches`: images and labels, [steps, batch, ...]."""
    names = list(state.feedback)

    def step(carry, batch):
        forward, optimizer, memory, key = carry
        key, noise_key = jax.random.split(key)
        images, labels = batch
        kernels = {name: forward[name]["kernel"] for name in names}
        feedback, memory = disturb(disturbance, kernels, memory, noise_key)
        passes = networks.forward_passes(network, forward, images)
        target = output_target(passes[-1].output, labels, settings.beta)
        ways = paths.bind(settings.paths, network, forward)
        targets, _ = propagate_targets(difference_target, ways, forward, feedback, passes, target)
        gradients = local_gradients(network, forward, passes, targets)
        updates, optimizer = settings.forward_optimizer.update(gradients, optimizer, forward)
        loss = jnp.mean(cross_entropy(passes[-1].output, labels))
        (shown,) = (clean.output for block, clean in zip(network, passes, strict=True) if block.name == SHOWN)
        carry = optax.apply_updates(forward, updates), optimizer, memory, key
        return carry, (loss, jnp.sqrt(jnp.mean(shown**2)))

    key, error_key = jax.random.split(key)
    memory = {
        name: (state.forward[name]["kernel"], jax.random.normal(error_key, state.forward[name]["kernel"].shape))
        for name in names
    }
    return jax.lax.scan(step, (state.forward, state.forward_optimizer, memory, key), batches)[1]


def main() -> None:
    """Train with every disturbance, write and draw the curves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", default="", help="of TFDS; empty: its own default")
    config = mnist_lenet.get_config()
    config.dataset.data_dir = parser.parse_args().data_dir
    config = resolve(config)
    dataset = data.load(config.dataset, config.seed)
    network = build_network(config, dataset.train.images.shape[1:], len(dataset.classes))
    settings = build_settings(config, network, steps_in_epoch(config, dataset))
    init_key, train_key = jax.random.split(jax.random.key(config.seed))
    state = init_state(network, settings, init_key)
    chosen = np.random.default_rng(config.seed).permutation(len(dataset.train.rows))[: STEPS * config.batch_size]
    examples = data.read(dataset.train, chosen.reshape(STEPS, config.batch_size))
    images = jax.vmap(partial(normalise, build_preprocessing(config)))(examples.images)
    batches = images, examples.labels

    curves = {}
    for name, disturbance in DISTURBANCES.items():
        run = jax.jit(partial(train, network, settings, disturbance))
        loss, activation = (np.asarray(curve, float) for curve in run(state, batches, train_key))
        curves[name] = {"loss": loss.tolist(), "activation": activation.tolist()}
        print(
            f"{name}: last 50 steps: loss {loss[-50:].mean():.3f}, activation {activation[-50:].mean():.2f}", flush=True
        )

    result = origin("python -m benchmarks.noise_or_lag --data_dir=DIR") | {"seed": config.seed, "curves": curves}
    (RESULTS / "noise_or_lag.json").write_text(json.dumps(result) + "\n")
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    labels = {
        "loss": "training loss (nats), mean of 20 steps",
        "activation": f"activation of {SHOWN} (root mean square)",
    }
    for panel, (metric, label) in zip(axes, labels.items(), strict=True):
        for name, of_name in curves.items():
            panel.plot(np.convolve(of_name[metric], np.ones(20) / 20, "valid"), label=name)
        panel.set(xlabel="training step", ylabel=label)
        style(panel)
    axes[0].set_yscale("log")
    axes[1].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), title="feedback weights")
    figure.suptitle("Transposed forward weights as feedback, disturbed: LeNet on MNIST")
    figure.savefig(RESULTS / "noise_or_lag.png", dpi=160)


if __name__ == "__main__":
    main()
