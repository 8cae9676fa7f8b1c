"""Whole epochs on the device: shuffling, augmentation, normalisation, training steps and evaluation."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxdtp import networks
from jaxdtp.alignment import gradient_matching, jacobian_matching
from jaxdtp.data import Split
from jaxdtp.networks import Network, NetworkParameters
from jaxdtp.step import (
    Metrics,
    Settings,
    TrainState,
    classification_metrics,
    init_state,
    train_all_feedback,
    train_step,
)


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
    """(images / 255 - mean) / std as float32; images uint8 [batch, height, width, channels]."""
    mean, std = jnp.array(preprocessing.mean), jnp.array(preprocessing.std)
    return (images.astype(jnp.float32) / 255 - mean) / std


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
    static_argnames=("network", "settings", "preprocessing", "batch_size"),
    donate_argnames=("state", "totals"),
)
def train_steps(
    network: Network,
    settings: Settings,
    preprocessing: Preprocessing,
    batch_size: int,
    data: Split,
    key: jax.Array,
    epoch: int,
    state: TrainState,
    totals: Metrics,
    first: int,
    count: int,
) -> tuple[TrainState, Metrics, jax.Array]:
    """Up to `count` training steps in one call, which stops early after a step with metrics that aren't finite.

    Args:
        network, settings, preprocessing, batch_size: what stays fixed.
        data: the training split, on the device.
        key: of all training randomness; folded with the epoch for the order, with the step for augmentation and noise.
        epoch: number of the epoch, which decides the order of the examples.
        state: before the steps; donated.
        totals: step metrics summed so far in this epoch, at first `zero_metrics`; donated.
        first: number of the first of these steps within the epoch.
        count: how many steps.

    Returns:
        The state, the metrics summed over the epoch so far, and the number of steps that this call has done.
    """
    order_key, step_key = jax.random.split(key)
    order = jax.random.permutation(jax.random.fold_in(order_key, epoch), len(data.labels))

    def run(carry):
        state, totals, done = carry
        chosen = jax.lax.dynamic_slice_in_dim(order, (first + done) * batch_size, batch_size)
        augment_key, noise_key = jax.random.split(jax.random.fold_in(step_key, state.step))
        images = normalise(preprocessing, augment(preprocessing, data.images[chosen], augment_key))
        state, metrics = train_step(network, settings, state, images, data.labels[chosen], noise_key)
        return state, jax.tree.map(jnp.add, totals, metrics), done + 1

    def healthy(carry):
        _, totals, done = carry
        finite = jnp.array([jnp.isfinite(total) for total in jax.tree.leaves(totals)])
        return (done < count) & jnp.all(finite)

    return jax.lax.while_loop(healthy, run, (state, totals, jnp.zeros((), jnp.int32)))


def zero_metrics(network: Network, settings: Settings) -> Metrics:
    """Step metrics to start an epoch's sums from."""
    state = jax.eval_shape(functools.partial(init_state, network, settings), jax.random.key(0))
    images = jax.ShapeDtypeStruct((1, *network[0].input_shape), jnp.float32)
    labels = jax.ShapeDtypeStruct((1,), jnp.int32)
    step = functools.partial(train_step, network, settings)
    _, metrics = jax.eval_shape(step, state, images, labels, jax.random.key(0))
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
        weights = (index < examples).astype(jnp.float32)
        chosen = jnp.minimum(index, examples - 1)
        logits = networks.logits(network, params, normalise(preprocessing, data.images[chosen]))
        metrics = classification_metrics(logits, data.labels[chosen], weights)
        return jax.tree.map(lambda mean: mean * jnp.sum(weights), metrics)

    sums = jax.lax.map(batch_metrics, jnp.arange(0, examples, batch_size))
    return jax.tree.map(lambda values: jnp.sum(values) / examples, sums)


@functools.partial(jax.jit, static_argnames=("network", "settings", "preprocessing", "batch_size", "probes"))
def measure_alignment(
    network: Network,
    settings: Settings,
    preprocessing: Preprocessing,
    batch_size: int,
    probes: int,
    state: TrainState,
    data: Split,
    key: jax.Array,
) -> Metrics:
    """Jacobian and gradient matching in a step on the first batch of a split, as `alignment` measures them.

    Feedback weights are trained on the batch first, as the step does it, and thrown away afterwards.

    Args:
        network, settings, state: as in `train_step`; the rule has targets.
        preprocessing: only its normalisation is used.
        batch_size: examples in the batch.
        probes: for each example.
        data: uint8 images and labels.
        key: of noise and probes.

    Returns:
        By block name 'jacobian_angle' (degrees) and 'jacobian_error' (relative) of blocks 2..N, 'update_angle',
        'bias_update_angle' (degrees) and 'update_distance' (relative) of all blocks.
    """
    images, labels = normalise(preprocessing, data.images[:batch_size]), data.labels[:batch_size]
    noise_key, probe_key = jax.random.split(key)
    passes = networks.forward_passes(network, state.forward, images)
    feedback, _, _ = train_all_feedback(network, settings, state, passes, noise_key)
    jacobians = {
        block.name: jacobian_matching(
            block, state.forward[block.name], feedback[block.name], clean.input, probe_key, probes=probes
        )
        for block, clean in zip(network[1:], passes[1:], strict=True)
    }
    updates = gradient_matching(
        network, settings.algorithm.target_rule, state.forward, feedback, images, labels, settings.beta
    )
    return {
        "jacobian_error": {name: error.value for name, (error, _) in jacobians.items()},
        "jacobian_angle": {name: angle.value for name, (_, angle) in jacobians.items()},
        "update_angle": {name: match["kernel"].angle for name, match in updates.items()},
        "bias_update_angle": {name: match["bias"].angle for name, match in updates.items()},
        "update_distance": {name: match["kernel"].distance for name, match in updates.items()},
    }
