"""The setting of the published alignment figures: feedback training on one batch, with frozen forward weights.

LeNet 32-64-512 without biases on one batch of CIFAR-10 (Ernoult et al. 2022).
"""

from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from configs import cifar10_lenet, cifar10_lenet_fast
from jaxdtp import data
from jaxdtp.alignment import weight_alignment
from jaxdtp.configuration.config import resolve
from jaxdtp.learning import paths
from jaxdtp.learning.feedback import FeedbackRule, FeedbackTraining, train_feedback
from jaxdtp.learning.state import TrainState
from jaxdtp.learning.step import feedback_step, train_step
from jaxdtp.models import networks
from jaxdtp.models.blocks import FEEDBACK_ACTIVATIONS, Pass, Units, matched_elu
from jaxdtp.models.networks import Network, NetworkParameters
from jaxdtp.running.build import build_preprocessing, build_settings
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
        forward_rate: where forward weights learn, too.
    """

    batch_size: int = 256
    iterations: tuple[int, ...] = (5000, 5000, 5000)
    noise_scale: tuple[float, ...] = (0.2, 0.2, 0.1)
    learning_rate: tuple[float, ...] = (1e-4, 2.5e-3, 0.01)
    seeds: int = 5
    momentum: float = 0.9
    beta: float = 0.4655
    forward_rate: float = 0.002


PUBLISHED = Setting()
QUICK = Setting(batch_size=64, iterations=(60, 300, 1000), learning_rate=(2e-3, 0.01, 0.03), seeds=2)
"""For minutes on 2 CPU cores: a small batch, and few iterations with higher learning rates."""

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


def train_layers(
    algorithm: str, setting: Setting, start: Start
) -> tuple[NetworkParameters, NetworkParameters, dict[str, dict[str, list[float]]]]:
    """The same of a rule with feedback weights beside layers, all blocks at once, from the same weights; its settings,
    but for the forward learning rate, are those of configs/cifar10_lenet_fast.py.

    Where feedback isn't trained but shares the forward weights' updates (`kp`), these learn, too.

    Returns:
        The forward weights, which have learned or not, the trained feedback weights, and the curves as in `train`.
    """
    network, config = build_network(), cifar10_lenet_fast.get_config()
    config.algorithm, config.batch_size = algorithm, setting.batch_size
    config.forward.schedule, config.forward.learning_rate = "constant", setting.forward_rate
    settings = build_settings(resolve(config), network, steps_per_epoch=1)
    # The first block's feedback weights carry nothing.
    feedback = {network[0].name: start.forward[network[0].name]} | start.feedback
    optimizer = settings.forward_optimizer.init(start.forward)
    shared = settings.forward_optimizer.init(feedback) if settings.algorithm.shared_update else {}
    model = {block.name: {} for block in network}
    state = TrainState(jnp.zeros((), jnp.int32), start.forward, feedback, model, optimizer, shared)
    marks = {
        block.name: [round(share * iterations) for share in np.linspace(0, 1, POINTS + 1)]
        for block, iterations in zip(network[1:], setting.iterations, strict=True)
    }
    curves = {metric: {name: [] for name in marks} for metric in ("weight_angle", "weight_distance")}
    for mark in sorted(set().union(*marks.values())):
        state = _advance(network, settings, state, start.images, start.labels, start.key, mark)
        point = weight_alignment(state.forward, {name: state.feedback[name] for name in marks})
        for metric, of_blocks in curves.items():
            for name, values in of_blocks.items():
                values += [float(point[metric][name])] * marks[name].count(mark)
    return state.forward, state.feedback, curves


def title(text: str, setting: Setting, quick: bool) -> str:
    """A figure's title, which says what was run."""
    iterations = " / ".join(f"{count:,}" for count in setting.iterations)
    run = f"LeNet on CIFAR-10, batch {setting.batch_size}, {iterations} feedback iterations, seeds: {setting.seeds}"
    return f"{text}\n{run}" + ("\nQUICK RUN, not the published setting" if quick else "")


@partial(jax.jit, static_argnames=("rule", "training", "block"))
def _train_feedback(rule, training, block, params, state, forward_params, clean, key):
    forward = partial(block.forward, forward_params)
    return train_feedback(rule, training, block, params, state, forward, clean, key)


@partial(jax.jit, static_argnames=("network", "settings"))
def _advance(network, settings, state, images, labels, key, mark):
    step = feedback_step if settings.algorithm.feedback_rule else train_step
    one = lambda state: step(network, settings, state, images, labels, jax.random.fold_in(key, state.step))[0]  # noqa: E731
    return jax.lax.while_loop(lambda state: state.step < mark, one, state)


_sgd = lru_cache(optax.sgd)
