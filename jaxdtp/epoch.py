"""Whole epochs on the device: shuffling, augmentation, normalisation, training steps and evaluation."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxdtp import networks
from jaxdtp.alignment import gauss_newton_targets, jacobian_matching, match, target_matching
from jaxdtp.data import Split
from jaxdtp.networks import Network, NetworkParameters
from jaxdtp.step import (
    Metrics,
    Settings,
    TrainState,
    all_targets,
    backprop_gradients,
    classification_metrics,
    init_state,
    train_all_feedback,
)
from jaxdtp.targets import local_gradients

GAUSS_NEWTON_DAMPING = 1e-4  # in units of J J^T


class Preprocessing(NamedTuple):
    """How uint8 images become a network's input.

    Attributes:
        mean, std: by channel, of pixels in [0, 1].
        flip: mirror half of the training images left-right.
        crop_padding: training images are shifted by up to so many pixels, their edges repeated.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool = False
    crop_padding: int = 0


def normalise(preprocessing: Preprocessing, images: jax.Array) -> jax.Array:
    """(images / 255 - mean) / std; images uint8 [batch, height, width, channels]."""
    mean, std = jnp.array(preprocessing.mean), jnp.array(preprocessing.std)
    return (images.astype(float) / 255 - mean) / std


def augment(preprocessing: Preprocessing, images: jax.Array, key: jax.Array) -> jax.Array:
    """Random crops with edge padding and random left-right flips, each image its own; uint8 to uint8."""
    batch, height, width, _ = images.shape
    row_key, column_key, flip_key = jax.random.split(key, 3)
    pad = preprocessing.crop_padding
    # Indices beyond an edge clipped to it are edge padding; reversed column indices are a flip; so one gather does all.
    row_shift = jax.random.randint(row_key, (batch, 1), -pad, pad + 1)
    column_shift = jax.random.randint(column_key, (batch, 1), -pad, pad + 1)
    rows = jnp.clip(jnp.arange(height) + row_shift, 0, height - 1)
    columns = jnp.clip(jnp.arange(width) + column_shift, 0, width - 1)
    if preprocessing.flip:
        columns = jnp.where(jax.random.bernoulli(flip_key, shape=(batch, 1)), columns[:, ::-1], columns)
    return images[jnp.arange(batch)[:, None, None], rows[:, :, None], columns[:, None, :]]


@functools.partial(
    jax.jit,
    static_argnames=("step", "network", "settings", "preprocessing", "batch_size"),
    donate_argnames=("state", "totals"),
)
def train_steps(
    step: Callable[..., tuple[TrainState, Metrics]],
    network: Network,
    settings: Settings,
    preprocessing: Preprocessing,
    batch_size: int,
    data: Split,
    key: jax.Array,
    round: int,
    state: TrainState,
    totals: Metrics,
    first: int,
    count: int,
) -> tuple[TrainState, Metrics, jax.Array]:
    """Up to `count` training steps in one call, which stops early after a step with metrics that aren't finite.

    Args:
        step: `train_step` or `feedback_step`.
        network, settings, preprocessing, batch_size: what stays fixed.
        data: the training split, on the device.
        key: of all training randomness; folded with the round for the order, with the step for augmentation and noise.
        round: number of the pass through the data, which decides the order of the examples.
        state: before the steps; donated.
        totals: step metrics summed so far in this round, at first `zero_metrics`; donated.
        first: number of the first of these steps within the round.
        count: how many steps.

    Returns:
        The state, the metrics summed over the round so far, and the number of steps that this call has done.
    """
    order_key, step_key = jax.random.split(key)
    order = jax.random.permutation(jax.random.fold_in(order_key, round), len(data.labels))

    def run(carry):
        state, totals, done = carry
        chosen = jax.lax.dynamic_slice_in_dim(order, (first + done) * batch_size, batch_size)
        augment_key, noise_key = jax.random.split(jax.random.fold_in(step_key, state.step))
        images = normalise(preprocessing, augment(preprocessing, data.images[chosen], augment_key))
        state, metrics = step(network, settings, state, images, data.labels[chosen], noise_key)
        return state, jax.tree.map(jnp.add, totals, metrics), done + 1

    def healthy(carry):
        _, totals, done = carry
        finite = jnp.array([jnp.isfinite(total) for total in jax.tree.leaves(totals)])
        return (done < count) & jnp.all(finite)

    return jax.lax.while_loop(healthy, run, (state, totals, jnp.zeros((), jnp.int32)))


def zero_metrics(step: Callable[..., tuple[TrainState, Metrics]], network: Network, settings: Settings) -> Metrics:
    """Metrics of `step` to start a round's sums from."""
    state = jax.eval_shape(functools.partial(init_state, network, settings), jax.random.key(0))
    images = jax.ShapeDtypeStruct((1, *network[0].input_shape), jnp.zeros(()).dtype)
    labels = jax.ShapeDtypeStruct((1,), jnp.int32)
    _, metrics = jax.eval_shape(functools.partial(step, network, settings), state, images, labels, jax.random.key(0))
    return jax.tree.map(lambda metric: jnp.zeros(metric.shape, metric.dtype), metrics)


@functools.partial(jax.jit, static_argnames=("network", "preprocessing", "batch_size"))
def evaluate(
    network: Network, preprocessing: Preprocessing, batch_size: int, params: NetworkParameters, data: Split
) -> Metrics:
    """'loss' (nats), 'top1' and, above 10 classes, 'top5' (shares), averaged over all examples of a split.

    Args:
        network: the blocks.
        preprocessing: only its normalisation is used.
        batch_size: examples at a time.
        params: forward parameters by block name.
        data: uint8 images and labels.
    """
    examples = len(data.labels)

    def batch_metrics(first):
        # The last batch is filled up with copies of the last example, which count nothing.
        index = first + jnp.arange(batch_size)
        weights = (index < examples).astype(float)
        chosen = jnp.minimum(index, examples - 1)
        logits = networks.logits(network, params, normalise(preprocessing, data.images[chosen]))
        metrics = classification_metrics(logits, data.labels[chosen], weights)
        return jax.tree.map(lambda mean: mean * jnp.sum(weights), metrics)

    sums = jax.lax.map(batch_metrics, jnp.arange(0, examples, batch_size))
    return jax.tree.map(lambda values: jnp.sum(values) / examples, sums)


@functools.partial(
    jax.jit, static_argnames=("network", "settings", "preprocessing", "batch_size", "probes", "gauss_newton")
)
def measure_alignment(
    network: Network,
    settings: Settings,
    preprocessing: Preprocessing,
    batch_size: int,
    probes: int,
    gauss_newton: bool,
    state: TrainState,
    data: Split,
    key: jax.Array,
) -> Metrics:
    """Jacobian and gradient matching in a step on the first batch of a split, as `alignment` measures them.

    Where the rule says so, feedback weights are trained on the batch first, and thrown away afterwards.

    Args:
        network, settings, state: as in `train_step`; the rule has targets.
        preprocessing: only its normalisation is used.
        batch_size: examples in the batch.
        probes: for each example.
        gauss_newton: whether to compare targets with those of Gauss-Newton, which takes one vjp for each class.
        data: uint8 images and labels.
        key: of noise and probes.

    Returns:
        By block name 'jacobian_angle' (degrees) and 'jacobian_error' (relative) of blocks 2..N, 'update_angle',
        'bias_update_angle' (degrees), 'update_distance' (relative) and, if asked for, 'gauss_newton_angle' (degrees,
        of the change that a target asks for to that of the damped Gauss-Newton target) of all blocks.
    """
    images, labels = normalise(preprocessing, data.images[:batch_size]), data.labels[:batch_size]
    noise_key, probe_key = jax.random.split(key)
    passes = networks.forward_passes(network, state.forward, images)
    feedback = state.feedback
    if not settings.algorithm.simultaneous:
        feedback, _, _ = train_all_feedback(settings, state, passes, noise_key)
    jacobians = {
        path.block.name: jacobian_matching(
            path.block, state.forward, feedback[path.block.name], clean.input, probe_key, probes=probes
        )
        for path, clean in zip(settings.paths, passes[1:], strict=True)
    }
    targets, _ = all_targets(network, settings, state.forward, feedback, passes, labels)
    updates = jax.tree.map(
        lambda gradient: gradient / settings.beta, local_gradients(network, state.forward, passes, targets)
    )
    matches = jax.tree.map(match, updates, backprop_gradients(network, state.forward, images, labels))
    measured = {}
    if gauss_newton:
        references = gauss_newton_targets(network, state.forward, passes, targets[-1], GAUSS_NEWTON_DAMPING)
        to_gauss_newton = target_matching(network, passes, targets, references)
        measured["gauss_newton_angle"] = {name: of_block.angle for name, of_block in to_gauss_newton.items()}
    return measured | {
        "jacobian_error": {name: error.value for name, (error, _) in jacobians.items()},
        "jacobian_angle": {name: angle.value for name, (_, angle) in jacobians.items()},
        "update_angle": {name: of_block["kernel"].angle for name, of_block in matches.items()},
        "bias_update_angle": {name: of_block["bias"].angle for name, of_block in matches.items()},
        "update_distance": {name: of_block["kernel"].distance for name, of_block in matches.items()},
    }
