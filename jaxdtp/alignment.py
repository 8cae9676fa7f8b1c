"""How close difference target propagation comes to backpropagation and to Gauss-Newton, measured by autodiff.

L-DRL (Ernoult et al. 2022) rests on two claims, and both are measured here:

- the Jacobian matching condition (JMC): the feedback Jacobian is the transposed forward Jacobian, J_G = J_F^T;
- the gradient matching property (GMP): then the forward update, divided by beta, is the backpropagation gradient.

Everything is pure and jitted, for any network of blocks and in either precision. Jacobians are never built but in
`dense_jacobians`: `jax.vjp` gives J_F^T v, `jax.jvp` gives J_G v.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdtp.learning.algorithms import ALGORITHMS
from jaxdtp.learning.derived import parameter_names
from jaxdtp.learning.paths import Paths, bind, consecutive, derive
from jaxdtp.learning.step import Settings, backprop_gradients, error_gradients
from jaxdtp.learning.targets import (
    Loss,
    TargetRule,
    cross_entropy,
    difference_target,
    local_gradients,
    output_target,
    propagate_targets,
)
from jaxdtp.models import networks
from jaxdtp.models.blocks import Block, Parameters, Pass, feedback
from jaxdtp.models.modules import as_network, by_block, is_network
from jaxdtp.models.networks import Network, NetworkParameters


class Estimate(NamedTuple):
    """A value estimated from random probes, and the standard error of the estimate, in the same units."""

    value: jax.Array
    standard_error: jax.Array


class Match(NamedTuple):
    """How far one vector is from another.

    Attributes:
        angle: degrees, 0 to 180.
        cosine: of that angle.
        ratio: |vector| / |reference|.
        distance: |vector - reference| / |reference|.
    """

    angle: jax.Array
    cosine: jax.Array
    ratio: jax.Array
    distance: jax.Array


def angle_degrees(a: jax.Array, b: jax.Array) -> jax.Array:
    """Angle between two arrays seen as vectors, in degrees from 0 to 180.

    By the half-angle tangent, which keeps its precision near 0 and 180 where the arc cosine loses it.
    """
    a, b = a / jnp.linalg.norm(a), b / jnp.linalg.norm(b)
    return jnp.degrees(2 * jnp.arctan2(jnp.linalg.norm(a - b), jnp.linalg.norm(a + b)))


def relative_distance(a: jax.Array, reference: jax.Array) -> jax.Array:
    """|a - reference| / |reference|."""
    return jnp.linalg.norm(a - reference) / jnp.linalg.norm(reference)


@functools.partial(jax.jit, static_argnames="names")
def weight_alignment(
    forward: NetworkParameters, feedback: NetworkParameters, names: frozenset[str] | None = None
) -> dict[str, dict[str, jax.Array]]:
    """'weight_angle' (degrees) and 'weight_distance' (relative) of each feedback kernel to its transposed forward
    kernel, by the name of the block, or with points between those of the block and of the layer in it.

    Args:
        forward, feedback: parameters.
        names: of the parameters to compare, such as 'block.layer.kernel'; those named kernel if left out.
    """
    of_forward, of_feedback = named_parameters(forward), named_parameters(feedback)
    kernels = {
        name.removesuffix(".kernel"): (of_feedback[name].ravel(), of_forward[name].ravel())
        for name in of_feedback
        if (name in names if names is not None else name.endswith(".kernel") and name in of_forward)
    }
    return {
        "weight_angle": {name: angle_degrees(*pair) for name, pair in kernels.items()},
        "weight_distance": {name: relative_distance(*pair) for name, pair in kernels.items()},
    }


def named_parameters(params: NetworkParameters) -> dict[str, jax.Array]:
    """Parameters by their path, with points between."""
    return dict(zip(parameter_names(params), jax.tree.leaves(params), strict=True))


def updates_matching(updates: NetworkParameters, gradients: NetworkParameters) -> dict[str, dict[str, jax.Array]]:
    """'update_angle' (degrees), 'update_distance' and 'update_ratio' (relative to the gradient's norm) of each update
    to its gradient, by the name of what has the parameter (of those not named kernel: by their own name), and
    'bias_update_angle'."""
    matches, biases = {}, {}
    references = named_parameters(gradients)
    for name, update in named_parameters(updates).items():
        owner, _, last = name.rpartition(".")
        if last == "bias":
            biases[owner] = match(update, references[name]).angle
        else:
            matches[owner if last == "kernel" else name] = match(update, references[name])
    return {
        "update_angle": {name: of_one.angle for name, of_one in matches.items()},
        "update_distance": {name: of_one.distance for name, of_one in matches.items()},
        "update_ratio": {name: of_one.ratio for name, of_one in matches.items()},
        "bias_update_angle": biases,
    }


def jacobian_matching(
    block: Any,
    forward_params: Any,
    feedback_params: Any,
    x: jax.Array,
    key: jax.Array,
    *,
    probes: int = 16,
    per_example: bool = False,
    state: Any = None,
) -> tuple[Estimate, Estimate]:
    """The Jacobian matching condition of one block, from random probes v with independent signs:

        E |J_F^T v|^2 = |J_F|_F^2,    E |J_G v|^2 = |J_G|_F^2,    E |(J_G - J_F^T) v|^2 = |J_G - J_F^T|_F^2.

    J_F is taken at x, J_G at F(x) with the switches of that pass. Averaged over the batch means: of all examples'
    Jacobians taken as one long vector.

    Args:
        block: a block, or a model (`models.modules.network_of`) that is one: its feedback map is the derived one, with
            feedback_params as from `init_feedback`.
        forward_params, feedback_params: its parameters.
        x: [batch, *block.input_shape].
        key: of the probes.
        probes: for each example, 2 or more. The standard error falls with the square root of their number.
        per_example: whether to give each example's own, [batch], rather than the batch's.
        state: of a model, what it keeps without learning it, such as {"batch_stats": ...}; fresh if left out.

    Returns:
        The relative error |J_G - J_F^T|_F / |J_F|_F and the angle between J_G and J_F^T (degrees), each with its
        standard error over the probes (jackknife; the examples are taken as given).

    Raises:
        ValueError: fewer than 2 probes.
    """
    if probes < 2:
        raise ValueError(f"probes: got {probes}; allowed: 2 or more, for a standard error")
    (block,) = as_network(block, x, state) if not isinstance(block, Block) else (block,)
    return _match_jacobian(block, forward_params, feedback_params, x, key, probes, per_example)


def match_jacobian(
    block: Block,
    forward_params: Any,
    feedback_params: Any,
    x: jax.Array,
    key: jax.Array,
    probes: int,
    per_example: bool = False,
) -> tuple[Estimate, Estimate]:
    """As `jacobian_matching`, for use within a jitted function, where a block may be bound to a batch."""
    block = with_own_feedback(block, forward_params)
    y, pull_back, switches = jax.vjp(_with_switches(block, forward_params), x, has_aux=True)

    def squared_norms(key):
        v = jax.random.rademacher(key, y.shape, y.dtype)
        (of_forward,) = pull_back(v)
        _, of_feedback = jax.jvp(lambda y: feedback(block, feedback_params, y, switches), (y,), (v,))
        vectors = (of_feedback - of_forward, of_forward, of_feedback)
        return jnp.stack([_sum_of_squares(vector, per_example) for vector in vectors])

    sums = jax.lax.map(squared_norms, jax.random.split(key, probes))
    without_one = (jnp.sum(sums, axis=0) - sums) / (probes - 1)
    return (
        _jackknife(_relative_error, jnp.mean(sums, axis=0), without_one),
        _jackknife(_angle_from_norms, jnp.mean(sums, axis=0), without_one),
    )


_match_jacobian = functools.partial(jax.jit, static_argnames=("block", "probes", "per_example"))(match_jacobian)


@functools.partial(jax.jit, static_argnames="block")
def dense_jacobians(
    block: Block, forward_params: Parameters, feedback_params: Parameters, x: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Exact Jacobians of a small block for every example: J_F at x and J_G at F(x) with the switches of that pass.

    Args:
        block: the block.
        forward_params, feedback_params: its parameters.
        x: [batch, *block.input_shape].

    Returns:
        J_F, [batch, outputs, inputs], and J_G, [batch, inputs, outputs], features flattened in row-major order.
    """

    block = with_own_feedback(block, forward_params)

    def of_example(x):
        y, switches, _ = block.forward(forward_params, x[None])

        def forward_map(x):
            return block.forward(forward_params, x[None])[0].ravel()

        def feedback_map(y):
            return feedback(block, feedback_params, y, switches).ravel()

        jacobian_f = jax.jacrev(forward_map)(x).reshape(y.size, x.size)
        jacobian_g = jax.jacfwd(feedback_map)(y).reshape(x.size, y.size)
        return jacobian_f, jacobian_g

    return jax.vmap(of_example)(x)


def updates_and_gradients(
    network: Any,
    target_rule: TargetRule | None,
    forward: Any,
    feedback: Any,
    images: jax.Array,
    labels: Any,
    beta: float,
    *,
    paths: Paths | None = None,
    loss: Loss = cross_entropy,
    state: Any = None,
) -> tuple[NetworkParameters, NetworkParameters]:
    """The updates of a rule divided by beta, and the backpropagation gradients of the mean loss, which the first ones
    estimate; both by block name.

    Args:
        network: the blocks, or a model or a list of models (`models.modules.network_of`).
        target_rule: such as `targets.difference_target`, whose local gradients are the updates. None: for blocks that
            have feedback maps of their own that one; for others, no targets from block to block: errors go down through
            feedback weights beside those of every layer.
        forward, feedback: parameters by block name; of a model those of the model; of a list a list.
        images: [batch, ...], normalised.
        labels: [batch], integers; or what the loss takes.
        beta: step size of the output target.
        paths: of the feedback; the blocks' own feedback maps if left out.
        loss: of outputs and labels.
        state: of models, what they keep without learning it, see `jacobian_matching`.
    """
    network, forward, feedback = _by_block(network, images, forward, feedback, state)
    return _updates_and_gradients(network, target_rule, forward, feedback, images, labels, beta, paths, loss)


def _by_block(network: Any, images: jax.Array, forward: Any, feedback: Any, state: Any):
    network = network if is_network(network) else as_network(network, images, state)
    return network, by_block(network, forward), by_block(network, feedback)


def by_layers(network: Network, target_rule: TargetRule | None) -> bool:
    """Whether updates come from errors that go down through feedback weights beside those of every layer."""
    return target_rule is None and any(block.project is None for block in network)


@functools.partial(jax.jit, static_argnames=("network", "target_rule", "paths", "loss"))
def _updates_and_gradients(network, target_rule, forward, feedback, images, labels, beta, paths, loss):
    gradients = backprop_gradients(network, forward, images, labels, loss)
    if by_layers(network, target_rule):
        settings = Settings(ALGORITHMS["fa"], (), 1.0, None, loss=loss)
        return error_gradients(network, settings, forward, feedback, images, labels)[0], gradients
    target_rule = target_rule or difference_target
    passes = networks.forward_passes(network, forward, images)
    target = output_target(passes[-1].output, labels, beta, loss)
    paths = bind(consecutive(network) if paths is None else paths, network, forward)
    targets, _ = propagate_targets(target_rule, paths, forward, feedback, passes, target)
    updates = jax.tree.map(lambda gradient: gradient / beta, local_gradients(network, forward, passes, targets))
    return updates, gradients


def gradient_matching(
    network: Any,
    target_rule: TargetRule | None,
    forward: Any,
    feedback: Any,
    images: jax.Array,
    labels: Any,
    beta: float,
    *,
    per_example: bool = False,
    paths: Paths | None = None,
    loss: Loss = cross_entropy,
    state: Any = None,
) -> dict[str, Any]:
    """The gradient matching property: the updates against the gradients (the reference) of `updates_and_gradients`.

    Args:
        network, target_rule, forward, feedback, images, labels, beta, paths, loss, state: as there.
        per_example: whether to compare each example's own gradients, [batch], rather than the batch's mean gradients.

    Returns:
        By block name and parameter ('kernel', 'bias', or as the model has them).
    """
    network, forward, feedback = _by_block(network, images, forward, feedback, state)
    fixed = (network, target_rule, paths, loss, per_example)
    return _gradient_matching(fixed, forward, feedback, images, labels, beta)


@functools.partial(jax.jit, static_argnames="fixed")
def _gradient_matching(fixed, forward, feedback, images, labels, beta):
    network, target_rule, paths, loss, per_example = fixed

    def of_batch(images, labels):
        pair = _updates_and_gradients(network, target_rule, forward, feedback, images, labels, beta, paths, loss)
        return jax.tree.map(match, *pair)

    if per_example:
        return jax.vmap(of_batch)(images[:, None], jax.tree.map(lambda array: array[:, None], labels))
    return of_batch(images, labels)


@functools.partial(jax.jit, static_argnames="network")
def backprop_targets(
    network: Network, forward: NetworkParameters, passes: list[Pass], target: jax.Array
) -> list[jax.Array]:
    """t[n] = s[n] + J^T (t[N] - s[N]), J = d s[N] / d s[n] of each example: what backpropagation would ask of block n.

    Args:
        network: the blocks.
        forward: parameters.
        passes: as from `networks.forward_passes`.
        target: t[N], [batch, classes].

    Returns:
        Targets of all blocks' outputs, t[N] the last.
    """
    change = target - passes[-1].output
    targets = [target]
    for block, clean in zip(network[:0:-1], passes[:0:-1], strict=True):
        (change,) = _pull_back(block, forward, clean)(change)
        targets.insert(0, clean.input + change)
    return targets


@functools.partial(jax.jit, static_argnames="network")
def gauss_newton_targets(
    network: Network, forward: NetworkParameters, passes: list[Pass], target: jax.Array, damping: float
) -> list[jax.Array]:
    """t[n] = s[n] + J^T (J J^T + damping I)^-1 (t[N] - s[N]), J = d s[N] / d s[n] of each example: the damped
    Gauss-Newton targets of Meulemans et al. 2020.

    J is built in full, one vjp of the upper blocks for each class: for small networks.

    Args:
        network: the blocks.
        forward: parameters.
        passes: as from `networks.forward_passes`.
        target: t[N], [batch, classes].
        damping: lambda, in units of J J^T, above 0 unless J has full rank. Large values give the direction of
            backpropagation.

    Returns:
        Targets of all blocks' outputs; the last is t[N] itself.
    """
    change = target - passes[-1].output
    classes = change.shape[-1]
    # Row k of J for every example, [classes, batch, *features].
    rows = jnp.broadcast_to(jnp.eye(classes, dtype=change.dtype)[:, None], (classes, *change.shape))
    targets = [target]
    for block, clean in zip(network[:0:-1], passes[:0:-1], strict=True):
        (rows,) = jax.vmap(_pull_back(block, forward, clean))(rows)
        jacobian = rows.reshape(classes, len(change), -1).swapaxes(0, 1)
        gram = jacobian @ jacobian.swapaxes(1, 2) + damping * jnp.eye(classes, dtype=change.dtype)
        solved = jnp.linalg.solve(gram, change[..., None])[..., 0]
        targets.insert(0, clean.input + jnp.einsum("bkf,bk->bf", jacobian, solved).reshape(clean.input.shape))
    return targets


@functools.partial(jax.jit, static_argnames=("network", "per_example"))
def target_matching(
    network: Network,
    passes: list[Pass],
    targets: list[jax.Array],
    references: list[jax.Array],
    *,
    per_example: bool = False,
) -> dict[str, Match]:
    """How far the changes t[n] - s[n] are from those of other targets, by block name.

    Args:
        network: the blocks.
        passes: as from `networks.forward_passes`.
        targets: of all blocks' outputs, as from `targets.propagate_targets`.
        references: likewise, as from `backprop_targets` or `gauss_newton_targets`.
        per_example: whether to give each example's own, [batch], rather than the mean over the batch, which leaves out
            examples that have reached their targets: no change has no angle.
    """
    matches = {}
    for block, clean, target, reference in zip(network, passes, targets, references, strict=True):
        of_examples = jax.vmap(match)(target - clean.output, reference - clean.output)
        matches[block.name] = of_examples if per_example else jax.tree.map(jnp.nanmean, of_examples)
    return matches


def match(vector: jax.Array, reference: jax.Array) -> Match:
    """How far one array, seen as a vector, is from another."""
    vector, reference = vector.ravel(), reference.ravel()
    angle = angle_degrees(vector, reference)
    ratio = jnp.linalg.norm(vector) / jnp.linalg.norm(reference)
    return Match(angle, jnp.cos(jnp.radians(angle)), ratio, relative_distance(vector, reference))


def with_own_feedback(block: Block, forward_params: Any) -> Block:
    """A block with a feedback map: its own, or the derived one."""
    return derive(block, forward_params) if block.project is None else block


def _with_switches(block: Block, forward_params: Any):
    """A block's forward map, from x to (y, switches)."""
    return lambda x: block.forward(forward_params, x)[:2]


def _pull_back(block: Block, forward: NetworkParameters, clean: Pass):
    """v to v^T J_F of a block at its clean input."""
    _, pull_back = jax.vjp(lambda x: block.forward(forward[block.name], x)[0], clean.input)
    return pull_back


def _sum_of_squares(array: jax.Array, per_example: bool) -> jax.Array:
    return jnp.sum(array**2, axis=tuple(range(1, array.ndim)) if per_example else None)


def _jackknife(statistic, mean: jax.Array, without_one: jax.Array) -> Estimate:
    """A statistic of means, and its standard error from the means that leave out one sample each (first axis)."""
    values = jax.vmap(statistic)(without_one)
    count = len(without_one)
    return Estimate(statistic(mean), jnp.sqrt((count - 1) * jnp.var(values, axis=0)))


def _relative_error(squares: jax.Array) -> jax.Array:
    difference, of_forward, _ = squares
    return jnp.sqrt(difference / of_forward)


def _angle_from_norms(squares: jax.Array) -> jax.Array:
    """The angle between a and b, degrees, from |a - b|^2, |b|^2 and |a|^2. By half its sine,

        4 |a| |b| sin^2(angle / 2) = |a - b|^2 - (|a| - |b|)^2,

    which keeps its precision for small angles.
    """
    difference, b, a = squares
    norms = jnp.sqrt(a), jnp.sqrt(b)
    squared_half_sine = (difference - (norms[0] - norms[1]) ** 2) / (4 * norms[0] * norms[1])
    return jnp.degrees(2 * jnp.arcsin(jnp.sqrt(jnp.clip(squared_half_sine, 0, 1))))
