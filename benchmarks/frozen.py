"""The setting of the published alignment figures: feedback training on one batch, with frozen forward weights.

LeNet 32-64-512 without biases on one batch of CIFAR-10 (Ernoult et al. 2022).
"""

import argparse
import json
import sys
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax

from benchmarks.record import RESULTS, origin
from configs import cifar10_lenet
from jaxdtp import data
from jaxdtp.alignment import weight_alignment
from jaxdtp.learning import paths
from jaxdtp.learning.feedback import FeedbackRule, FeedbackTraining, train_feedback
from jaxdtp.models import networks
from jaxdtp.models.blocks import FEEDBACK_ACTIVATIONS, Pass, Units, matched_elu
from jaxdtp.models.networks import Network, NetworkParameters
from jaxdtp.running.build import build_preprocessing
from jaxdtp.running.epoch import normalise


class Setting(NamedTuple):
    """How feedback is trained; iterations, noise and learning rates of blocks 2..N in this order.

    Attributes:
        batch_size: images.
        iterations: on the one batch.
        noise_scale: sigma.
        learning_rate: of SGD.
        seeds: how many; each has its own batch, weights and noise.
        momentum: of SGD.
        beta: step size of the output target.
    """

    batch_size: int = 256
    iterations: tuple[int, ...] = (5000, 5000, 5000)
    noise_scale: tuple[float, ...] = (0.2, 0.2, 0.1)
    learning_rate: tuple[float, ...] = (1e-4, 2.5e-3, 0.01)
    seeds: int = 5
    momentum: float = 0.9
    beta: float = 0.4655


PUBLISHED = Setting()
QUICK = Setting(batch_size=64, iterations=(60, 300, 1000), learning_rate=(2e-3, 0.01, 0.03), seeds=2)
"""For two minutes on 2 CPU cores: a small batch, and few iterations with higher learning rates."""

POINTS = 20
"""Of a curve, without the one at the start."""


class Start(NamedTuple):
    """A seed's batch and weights.

    Attributes:
        images: normalised.
        labels: integers.
        forward, feedback: parameters without biases.
        passes: the clean forward passes.
        key: for the noise.
    """

    images: jax.Array
    labels: jax.Array
    forward: NetworkParameters
    feedback: NetworkParameters
    passes: list[Pass]
    key: jax.Array


def parse_arguments(description: str) -> argparse.Namespace:
    """--quick and --data_dir."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="2 minutes on 2 cores, not the published setting")
    parser.add_argument("--data_dir", default="", help="of TFDS; empty: its own default")
    return parser.parse_args()


@lru_cache
def build_network(activation: str = "elu") -> Network:
    """LeNet 32-64-512 for CIFAR-10 with one of the feedback activations."""
    return networks.lenet(
        (32, 32, 3), 10, units=Units(feedback_activation=FEEDBACK_ACTIVATIONS[activation] or matched_elu)
    )


def starts(setting: Setting, data_dir: str) -> list[Start]:
    """Batch and weights of every seed. Forward weights and batch don't depend on the feedback activation."""
    config = cifar10_lenet.get_config()
    config.dataset.data_dir = data_dir
    train = data.load(config.dataset, seed=0).train
    preprocessing, network = build_preprocessing(config), build_network()
    result = []
    for seed in range(setting.seeds):
        chosen = np.random.default_rng(seed).choice(len(train.rows), setting.batch_size, replace=False)
        batch = data.read(train, chosen)
        images = normalise(preprocessing, batch.images)
        init_key, noise_key = jax.random.split(jax.random.key(seed))
        forward, feedback = (
            {name: {"kernel": params["kernel"]} for name, params in side.items()}
            for side in (networks.init(network, init_key)[0], paths.init(paths.consecutive(network), init_key))
        )
        passes = jax.jit(partial(networks.forward_passes, network))(forward, images)
        result.append(Start(images, batch.labels, forward, feedback, passes, noise_key))
    return result


def train(
    network: Network, rule: FeedbackRule, setting: Setting, start: Start
) -> tuple[NetworkParameters, dict[str, dict[str, list[float]]]]:
    """Train all blocks' feedback weights from the start.

    Returns:
        The trained weights, and by 'weight_angle' (degrees) and 'weight_distance' (relative) and block name the curve
        over iterations: a point at the start and `POINTS` more.
    """
    feedback, curves = {}, {"weight_angle": {}, "weight_distance": {}}
    for index, (block, clean) in enumerate(zip(network[1:], start.passes[1:], strict=True)):
        name = block.name
        optimizer = _sgd(setting.learning_rate[index], setting.momentum)
        training = FeedbackTraining(setting.iterations[index] // POINTS, setting.noise_scale[index], 1, optimizer)
        params, state = start.feedback[name], optimizer.init(start.feedback[name])
        points = [weight_alignment({name: start.forward[name]}, {name: params})]
        for key in jax.random.split(jax.random.fold_in(start.key, index), POINTS):
            params, state, _ = _train_feedback(rule, training, block, params, state, start.forward[name], clean, key)
            points.append(weight_alignment({name: start.forward[name]}, {name: params}))
        feedback[name] = params
        for metric, of_blocks in curves.items():
            of_blocks[name] = [float(point[metric][name]) for point in points]
    return feedback, curves


def title(text: str, setting: Setting, quick: bool) -> str:
    """A figure's title, which says what was run."""
    iterations = " / ".join(f"{count:,}" for count in setting.iterations)
    run = f"LeNet on CIFAR-10, batch {setting.batch_size}, {iterations} feedback iterations, {setting.seeds} seeds"
    return f"{text}\n{run}" + ("\nQUICK RUN, not the published setting" if quick else "")


def write_result(setting: Setting, arguments: argparse.Namespace, values: dict) -> Path:
    """Write the script's result: values, setting and origin. Returns the path without its suffix, for the figure."""
    name = Path(sys.argv[0]).stem + ("_quick" if arguments.quick else "")
    command = f"python -m benchmarks.{Path(sys.argv[0]).stem}{' --quick' if arguments.quick else ''} --data_dir=DIR"
    path = RESULTS / name
    path.with_suffix(".json").write_text(
        json.dumps(origin(command) | {"setting": setting._asdict()} | values, indent=1) + "\n"
    )
    return path


@partial(jax.jit, static_argnames=("rule", "training", "block"))
def _train_feedback(rule, training, block, params, state, forward_params, clean, key):
    forward = partial(block.forward, forward_params)
    return train_feedback(rule, training, block, params, state, forward, clean, key)


_sgd = lru_cache(optax.sgd)
