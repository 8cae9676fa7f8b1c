"""The Jacobian matching condition, J_G = J_F^T, of one block."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdtp.learning.paths import derive
from jaxdtp.models import networks
from jaxdtp.models.blocks import AnyArray, Block, feedback, to_be_derived
from jaxdtp.models.modules import one_block


class Estimate(NamedTuple):
    """A value estimated from random probes, and the standard error of the estimate, in the same units."""

    value: jax.Array
    standard_error: jax.Array


def jacobian_matching(
    block: Any,
    forward_params: Any,
    feedback_params: Any,
    x: Float[AnyArray, "batch *inputs"],
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
        ValueError: fewer than 2 probes, or several blocks.
    """
    if probes < 2:
        raise ValueError(f"probes: got {probes}; allowed: 2 or more, for a standard error")
    network, states = one_block(block, x, state)
    return _match_jacobian(network, states, forward_params, feedback_params, x, key, probes, per_example)


def match_jacobian(
    block: Block,
    forward_params: Any,
    feedback_params: Any,
    x: Float[AnyArray, "batch *inputs"],
    key: jax.Array,
    probes: int,
    per_example: bool = False,
) -> tuple[Estimate, Estimate]:
    """As `jacobian_matching`, for use within a jitted function, where a block may be bound to a batch."""
    block = with_own_feedback(block, forward_params)
    y, pull_back, switches = jax.vjp(lambda x: block.forward(forward_params, x)[:2], x, has_aux=True)

    def squared_norms(key):
        v = jax.random.rademacher(key, y.shape, y.dtype)
        (of_forward,) = pull_back(v)
        _, of_feedback = jax.jvp(lambda y: feedback(block, feedback_params, y, switches), (y,), (v,))
        vectors = (of_feedback - of_forward, of_forward, of_feedback)
        return jnp.stack([_sum_of_squares(vector, per_example) for vector in vectors])

    sums = jax.lax.map(squared_norms, jax.random.split(key, probes))
    without_one = (jnp.sum(sums, axis=0, keepdims=True) - sums) / (probes - 1)
    return (
        _jackknife(_relative_error, jnp.mean(sums, axis=0), without_one),
        _jackknife(_angle_from_norms, jnp.mean(sums, axis=0), without_one),
    )


@functools.partial(jax.jit, static_argnames=("network", "probes", "per_example"))
def _match_jacobian(network, states, forward_params, feedback_params, x, key, probes, per_example):
    (block,) = networks.bind(network, states)
    return match_jacobian(block, forward_params, feedback_params, x, key, probes, per_example)


@functools.partial(jax.jit, static_argnames="block")
def dense_jacobians(
    block: Block, forward_params: Any, feedback_params: Any, x: Float[Array, "batch *inputs"]
) -> tuple[Float[Array, "batch outputs inputs"], Float[Array, "batch inputs outputs"]]:
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


def with_own_feedback(block: Block, forward_params: Any) -> Block:
    """A block with a feedback map: its own, or the derived one."""
    return derive(block, forward_params) if block.project is to_be_derived else block


def _sum_of_squares(array: jax.Array, per_example: bool) -> jax.Array:
    # In float16 the sum would overflow.
    array = array.astype(jnp.promote_types(array.dtype, jnp.float32))
    return jnp.sum(array**2, axis=tuple(range(1, array.ndim)) if per_example else None)


def _jackknife(
    statistic: Callable[[jax.Array], jax.Array],
    mean: Float[Array, "3 *batch"],
    without_one: Float[Array, "probes 3 *batch"],
) -> Estimate:
    """A statistic of means, and its standard error from the means that leave out one sample each (first axis)."""
    values = jax.vmap(statistic)(without_one)
    count = len(without_one)
    return Estimate(statistic(mean), jnp.sqrt((count - 1) * jnp.var(values, axis=0)))


def _relative_error(squares: Float[Array, "3 *batch"]) -> Float[Array, "*batch"]:
    difference, of_forward, _ = squares
    return jnp.sqrt(difference / of_forward)


def _angle_from_norms(squares: Float[Array, "3 *batch"]) -> Float[Array, "*batch"]:
    """The angle between a and b, degrees, from |a - b|^2, |b|^2 and |a|^2. By half its sine,

        4 |a| |b| sin^2(angle / 2) = |a - b|^2 - (|a| - |b|)^2,

    which keeps its precision for small angles.
    """
    difference, b, a = squares
    norms = jnp.sqrt(a), jnp.sqrt(b)
    squared_half_sine = (difference - (norms[0] - norms[1]) ** 2) / (4 * norms[0] * norms[1])
    return jnp.degrees(2 * jnp.arcsin(jnp.sqrt(jnp.clip(squared_half_sine, 0, 1))))
