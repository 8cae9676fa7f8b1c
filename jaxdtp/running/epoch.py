"""Whole epochs on the device: shuffling, augmentation, normalisation, training steps and evaluation.

Pure functions of arrays; `jaxdtp.running.programs` compiles them.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxdtp.alignment import gauss_newton_targets, match_jacobian, target_matching, updates_matching
from jaxdtp.data import Examples
from jaxdtp.devices.parallel import divide_batch, keep_replicated
from jaxdtp.learning.paths import bind as bind_paths
from jaxdtp.learning.paths import derive
from jaxdtp.learning.state import Settings, TrainState, bind, init_state
from jaxdtp.learning.step import Metrics, backprop_gradients, classification_metrics, learn
from jaxdtp.models import networks
from jaxdtp.models.blocks import AnyArray, example_of
from jaxdtp.models.networks import Network, NetworkParameters, NetworkState

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
    """(pixels - mean) / std of images [batch, height, width, channels], whose pixels are integers / their largest value
    (uint8: 255, uint16: 65535), or floating point numbers as they are."""
    mean, std = (
        jnp.broadcast_to(jnp.array(values), images.shape) for values in (preprocessing.mean, preprocessing.std)
    )
    pixels = images.astype(float)
    if jnp.issubdtype(images.dtype, jnp.integer):
        pixels /= jnp.iinfo(images.dtype).max
    return (pixels - mean) / std


def augment(preprocessing: Preprocessing, images: jax.Array, key: jax.Array) -> jax.Array:
    """Random crops with edge padding and random left-right flips, each image its own; uint8 to uint8."""
    batch, height, width, _ = images.shape
    row_key, column_key, flip_key = jax.random.split(key, 3)
    pad = preprocessing.crop_padding
    # Indices beyond an edge clipped to it are edge padding; reversed column indices are a flip; so one gather does all.
    row_shift = jax.random.randint(row_key, (batch, 1), -pad, pad + 1)
    column_shift = jax.random.randint(column_key, (batch, 1), -pad, pad + 1)
    rows = jnp.clip(jnp.arange(height)[None] + row_shift, 0, height - 1)
    columns = jnp.clip(jnp.arange(width)[None] + column_shift, 0, width - 1)
    if preprocessing.flip:
        columns = jnp.where(jax.random.bernoulli(flip_key, shape=(batch, 1)), columns[:, ::-1], columns)
    return images[jnp.arange(batch)[:, None, None], rows[:, :, None], columns[:, None, :]]


class Fixed(NamedTuple):
    """What stays fixed in the steps of a program.

    Attributes:
        step: `train_step` or `feedback_step`.
        network, settings, preprocessing, batch_size: of the run.
    """

    step: Callable[..., tuple[TrainState, Metrics]]
    network: Network
    settings: Settings
    preprocessing: Preprocessing
    batch_size: int


def one_step(
    fixed: Fixed, data: Examples, order: jax.Array, key: jax.Array, state: TrainState, totals: Metrics, index: int
) -> tuple[TrainState, Metrics]:
    """The step on batch `index` of `order`, and the metrics summed so far; the rest as in `train_steps`."""
    mesh, batch_size = fixed.settings.parallel and fixed.settings.parallel.mesh, fixed.batch_size
    chosen = jax.lax.dynamic_slice_in_dim(order, index * batch_size, batch_size)
    images, labels = divide_batch(mesh, (data.images[chosen], data.labels[chosen]))
    augment_key, noise_key = jax.random.split(jax.random.fold_in(key, state.step))
    images = normalise(fixed.preprocessing, augment(fixed.preprocessing, images, augment_key))
    state, metrics = fixed.step(fixed.network, fixed.settings, state, images, labels, noise_key)
    return keep_replicated(mesh, (state, jax.tree.map(jnp.add, totals, metrics)))


def train_steps(
    fixed: Fixed,
    data: Examples,
    order: jax.Array,
    key: jax.Array,
    state: TrainState,
    totals: Metrics,
    first: int,
    count: int,
) -> tuple[TrainState, Metrics, jax.Array]:
    """Up to `count` training steps in one call, which stops early after a step with metrics that aren't finite.

    Args:
        fixed: what stays fixed.
        data: images and labels, on the devices.
        order: positions in `data`, batch after batch.
        key: folded with the number of the step for augmentation and noise.
        state: before the steps.
        totals: step metrics summed so far, at first `zero_metrics`.
        first: of the batches in `order`, the one to begin with.
        count: how many steps.

    Returns:
        The state, the metrics summed so far, and the number of steps that this call has done.
    """

    def step(state, totals, index):
        return one_step(fixed, data, order, key, state, totals, index)

    return steps_in_loop(step, state, totals, first, count)


def steps_in_loop(
    step: Callable, state: TrainState, totals: Metrics, first: int, count: int
) -> tuple[TrainState, Metrics, jax.Array]:
    """`train_steps` by `step(state, totals, index)`, of one seed or, where arrays have an axis for them, of several: it
    stops after a step in which one of them gets metrics that aren't finite. One that has such metrics at the beginning
    stays as it is; where all have, nothing is done."""
    healthy = finite(totals)

    def run(carry):
        state, totals, done = carry
        return *step(state, totals, first + done), done + 1

    def as_before(carry):
        _, totals, done = carry
        return (done < count) & jnp.any(healthy) & jnp.all(finite(totals) == healthy)

    after, sums, done = jax.lax.while_loop(as_before, run, (state, totals, jnp.zeros((), jnp.int32)))
    if healthy.ndim:
        after, sums = keep_where(healthy, (after, sums), (state, totals))
    return after, sums, done


def steps_one_by_one(step: Callable) -> Callable:
    """As `steps_in_loop`, of a `one_step` without `fixed`: for programs that are slow in loops, or not compiled."""

    def steps(numbers, data, order, key, state, totals, first, count):
        healthy, done = np.asarray(finite(totals)), 0
        # A step may take the memory of what it is given.
        before = None if healthy.all() else jax.device_get((state, totals))
        while done < count and healthy.any() and np.array_equal(finite(totals), healthy):
            state, totals = step(numbers, data, order, key, state, totals, first + done)
            done += 1
        if healthy.ndim and not healthy.all():
            state, totals = keep_where(healthy, (state, totals), before)
        return state, totals, done

    return steps


def finite(totals: Metrics) -> jax.Array:
    """Whether all metrics are finite, by seed where they have an axis for it."""
    return jnp.all(jnp.array([jnp.isfinite(total) for total in jax.tree.leaves(totals)]), axis=0)


def keep_where(healthy: AnyArray, after: Any, before: Any) -> Any:
    """`after` of the seeds for which `healthy` holds, `before` of the others."""

    def choose(new, old):
        return jnp.where(healthy.reshape(-1, *(1,) * (jnp.ndim(new) - 1)), new, old)

    return jax.tree.map(choose, after, before)


def zero_metrics(fixed: Fixed) -> Metrics:
    """Metrics of a step to start a round's sums from; the step is traced for their shapes."""
    step, network, settings, _, _ = fixed
    state = jax.eval_shape(functools.partial(init_state, network, settings), jax.random.key(0))
    labels = jax.ShapeDtypeStruct((2,), jnp.int32)
    batch = (example_of(network[0], 2), labels, jax.random.key(0))
    _, metrics = jax.eval_shape(functools.partial(step, network, settings), state, *batch)
    return jax.tree.map(lambda metric: jnp.zeros(metric.shape, metric.dtype), metrics)


def evaluate(
    network: Network,
    preprocessing: Preprocessing,
    batch_size: int,
    mesh: Mesh | None,
    params: NetworkParameters,
    model: NetworkState,
    data: Examples,
    order: jax.Array,
    count: int,
) -> Metrics:
    """'loss' (nats), 'top1' and, above 10 classes, 'top5' (shares), summed over examples.

    Args:
        network: the blocks.
        preprocessing: only its normalisation is used.
        batch_size: examples at a time.
        mesh: devices to divide a batch among; None: one device.
        params, model: forward parameters and state by block name.
        data: uint8 images and labels, on the devices.
        order: positions in `data`.
        count: how many of them, the first ones, are summed over.
    """

    def batch_metrics(first):
        # The last batch is filled up with copies of an example, which count nothing.
        index = first + jnp.arange(batch_size)
        weights = (index < count).astype(float)
        chosen = order[jnp.minimum(index, count - 1)]
        images, labels = divide_batch(mesh, (data.images[chosen], data.labels[chosen]))
        logits = networks.logits(networks.bind(network, model), params, normalise(preprocessing, images))
        metrics = classification_metrics(logits, labels, weights)
        counted = jnp.sum(weights)
        return jax.tree.map(lambda mean: jnp.where(counted > 0, mean * counted, 0.0), metrics)

    sums = jax.lax.map(batch_metrics, jnp.arange(0, len(order), batch_size))
    return jax.tree.map(jnp.sum, sums)


def measure_alignment(
    network: Network,
    settings: Settings,
    preprocessing: Preprocessing,
    probes: int,
    gauss_newton: bool,
    state: TrainState,
    batch: Examples,
    key: jax.Array,
) -> Metrics:
    """Jacobian and gradient matching in a step on a batch, as `alignment` measures them.

    Where the rule says so, feedback weights are trained on the batch first, and thrown away afterwards.

    Args:
        network, settings, state: as in `train_step`; the rule isn't backpropagation.
        preprocessing: only its normalisation is used.
        probes: for each example.
        gauss_newton: whether to compare targets with those of Gauss-Newton, which takes one vjp for each class.
        batch: uint8 images and labels.
        key: of noise and probes.

    Returns:
        'jacobian_angle' (degrees) and 'jacobian_error' (relative) by block name, of all blocks that have feedback;
        'update_angle', 'bias_update_angle' (degrees), 'update_distance' and 'update_ratio' (relative) by the name of
        what has such parameters; and, if asked for, 'gauss_newton_angle' by block name (degrees, of the change that a
        target asks for to that of the damped Gauss-Newton target).
    """
    algorithm = settings.algorithm
    images, labels = divide_batch(settings.parallel and settings.parallel.mesh, tuple(batch))
    images = normalise(preprocessing, images)
    noise_key, probe_key = jax.random.split(key)
    bound = bind(network, state, noise_key)
    learned = learn(network, settings, state, images, labels, noise_key)
    feedback = state.feedback if algorithm.simultaneous else learned.feedback
    measured = {}
    if learned.targets is not None:
        ways = bind_paths(settings.paths, bound, state.forward)
        measuring = [
            (way.block, state.forward, clean.input) for way, clean in zip(ways, learned.passes[1:], strict=True)
        ]
        if gauss_newton:
            target = learned.targets[-1]
            references = gauss_newton_targets(bound, state.forward, learned.passes, target, GAUSS_NEWTON_DAMPING)
            to_gauss_newton = target_matching(network, learned.passes, learned.targets, references)
            measured["gauss_newton_angle"] = {name: of_block.angle for name, of_block in to_gauss_newton.items()}
    else:
        measuring = [
            (derive(block, state.forward[block.name]), state.forward[block.name], clean.input)
            for block, clean in zip(bound, learned.passes, strict=True)
            if jnp.issubdtype(clean.input.dtype, jnp.floating)
        ]
    jacobians = {
        block.name: match_jacobian(block, params, feedback[block.name], x, jax.random.clone(probe_key), probes)
        for block, params, x in measuring
    }
    exact = backprop_gradients(bound, state.forward, images, labels)
    matches = updates_matching(jax.tree.map(lambda update: update / settings.beta, learned.gradients), exact)
    return (
        measured
        | matches
        | {
            "jacobian_error": {name: error.value for name, (error, _) in jacobians.items()},
            "jacobian_angle": {name: angle.value for name, (_, angle) in jacobians.items()},
        }
    )
