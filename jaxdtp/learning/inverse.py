"""Targets by iterated approximate inverses (Bengio 2020, arXiv 2007.15139): r with F(r) = t, reached with G alone.

DTP's difference target is the first of these iterations. They converge exponentially where the Lipschitz constant of
G o F - identity (or F o G - identity) is below 1. An example whose steps grow has left that region: it keeps the last
point before its steps grew, and is counted in 'target_diverged'.

Blocks are ill-conditioned, and an exact inverse follows the directions that they hardly transmit. Damping delta leaves
these alone, as in regularised inversion (Roulet & Harchaoui 2022): to first order, with G the inverse of F, the change
of the target shrinks by 1 / (1 + delta), and by more where G F is far below 1.

Both rules measure, averaged over the batch:

    target_residual     sum of |F(r) - t| over that of |F(s[n-1]) - t|, 0 where the inverse is exact
    target_contraction  the mean ratio (geometric) of the sizes of an example's successive steps, where it moved
    target_diverged     the share of examples stopped because a step was no smaller than the one before
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxdtp.learning.targets import Measurements
from jaxdtp.models import networks
from jaxdtp.models.blocks import Block, Forward, Number, Pass, feedback
from jaxdtp.models.networks import Network, NetworkParameters


def inverse_target(
    block: Block,
    feedback_params: Any,
    forward: Forward,
    clean: Pass,
    target: Float[Array, "batch *outputs"],
    *,
    iterations: int = 10,
    tolerance: Number = 1e-3,
    damping: Number = 0.0,
) -> tuple[Float[Array, "batch *inputs"], Measurements]:
    """r_0 = s,  r_{k+1} = r_k + (G(t[n]) - G(F(r_k)) - delta (r_k - s)) / (1 + delta),  s = s[n-1]: iterated in the
    space of the block's input.

    Without damping r_1 is the difference target. G un-pools with the switches of the clean pass throughout: where
    F(r) = t the step is 0.

    Args:
        block, feedback_params, forward, clean, target: as for every target rule.
        iterations: at most.
        tolerance: an example is done when its step is that much smaller than its first one.
        damping: delta; 0 as in Bengio 2020.
    """
    goal = feedback(block, feedback_params, target, clean.switches)

    def step(r: jax.Array) -> jax.Array:
        error = goal - feedback(block, feedback_params, forward(r)[0], clean.switches)
        return (error - damping * (r - clean.input)) / (1 + damping)

    first = (goal - feedback(block, feedback_params, clean.output, clean.switches)) / (1 + damping)
    reached = _iterate(step, clean.input, first, _sizes(clean.input), iterations, tolerance)
    return reached.point, _measurements(reached, forward, reached.point, clean, target)


def output_inverse_target(
    block: Block,
    feedback_params: Any,
    forward: Forward,
    clean: Pass,
    target: Float[Array, "batch *outputs"],
    *,
    iterations: int = 10,
    tolerance: Number = 1e-3,
    damping: Number = 0.0,
) -> tuple[Float[Array, "batch *inputs"], Measurements]:
    """u_0 = t - s,  u_{k+1} = u_k + (t - s - (F(G(s + u_k)) - F(G(s))) - delta u_k) / (1 + delta),  s = s[n], t = t[n];
    t[n-1] = s[n-1] + G(s + u_K) - G(s): iterated in the space of the block's output.

    This is the iteration y <- y + t - F(G(y)), t[n-1] = G(y), of Bengio 2020 in difference form, which departs from it:
    without the differences G's error of reconstruction is a part of every target, also where t = s, and nothing is
    learned. Without iterations it is the difference target. It inverts F around G(s), which isn't s[n-1] unless G has
    learned to take it there.

    Args:
        block, feedback_params, forward, clean, target: as for every target rule.
        iterations: at most.
        tolerance, damping: as in `inverse_target`.
    """
    there = feedback(block, feedback_params, clean.output, clean.switches)
    there_and_back, goal = forward(there)[0], target - clean.output

    def below(u: jax.Array) -> jax.Array:
        return feedback(block, feedback_params, clean.output + u, clean.switches)

    def step(u: jax.Array) -> jax.Array:
        return (goal - (forward(below(u))[0] - there_and_back) - damping * u) / (1 + damping)

    reached = _iterate(step, goal, step(goal), _sizes(there_and_back), iterations, tolerance)
    found = clean.input + below(reached.point) - there
    return found, _measurements(reached, forward, found, clean, target)


TARGET_RULES = (inverse_target, output_inverse_target)


class _Iterates(NamedTuple):
    """Where the iterations of a batch have come to; all but `iteration` by example."""

    point: Float[Array, "batch *space"]
    step: Float[Array, "batch *space"]
    first_size: Float[Array, " batch"]
    size: Float[Array, " batch"]
    moves: Int[Array, " batch"]
    active: Bool[Array, " batch"]
    diverged: Bool[Array, " batch"]
    iteration: Int[Array, ""]


def _iterate(
    step: Callable[[jax.Array], jax.Array],
    point: Float[Array, "batch *space"],
    first: Float[Array, "batch *space"],
    signals: Float[Array, " batch"],
    iterations: int,
    tolerance: Number,
) -> _Iterates:
    """point <- point + step(point) while an example's steps shrink, `first` being the first step; `signals` are the
    sizes of what a step is a difference of."""
    # Steps of the size of rounding errors neither shrink nor grow.
    rounding = 8 * jnp.finfo(point.dtype).eps * signals

    def advance(state: _Iterates) -> _Iterates:
        point = _where(state.active, state.point + state.step, state.point)
        taken = step(point)
        size = _sizes(taken)
        done = (size <= tolerance * state.first_size) | (size <= rounding)
        # Not "size >= state.size": what is not a number has not shrunk either.
        grown = state.active & ~done & ~(size < state.size)
        active = state.active & ~done & ~grown
        return _Iterates(
            point=point,
            step=_where(state.active, taken, state.step),
            first_size=state.first_size,
            size=jnp.where(state.active, size, state.size),
            moves=state.moves + state.active.astype(state.moves.dtype),
            active=active,
            diverged=state.diverged | grown,
            iteration=state.iteration + 1,
        )

    size = _sizes(first)
    none, zero = jnp.zeros(len(point), bool), jnp.zeros((), jnp.int32)
    start = _Iterates(point, first, size, size, jnp.zeros(len(point), jnp.int32), size > rounding, none, zero)
    return jax.lax.while_loop(lambda state: (state.iteration < iterations) & jnp.any(state.active), advance, start)


def _measurements(
    reached: _Iterates,
    forward: Forward,
    below: Float[Array, "batch *inputs"],
    clean: Pass,
    target: Float[Array, "batch *outputs"],
) -> Measurements:
    tiny = jnp.finfo(target.dtype).tiny
    residual, before = _sizes(forward(below)[0] - target), _sizes(clean.output - target)
    moved = (reached.moves > 0).astype(target.dtype)
    ratio = (reached.size / (reached.first_size + tiny)) ** (1 / jnp.maximum(reached.moves, 1))
    return {
        # By example it is anything where a target hardly differs from what is there.
        "target_residual": jnp.sum(residual) / (jnp.sum(before) + tiny),
        "target_contraction": jnp.sum(moved * ratio) / jnp.maximum(jnp.sum(moved), 1),
        "target_diverged": jnp.mean(reached.diverged.astype(target.dtype)),
    }


def scale_by_influence(
    network: Network, forward: NetworkParameters, passes: list[Pass], targets: list[jax.Array]
) -> tuple[list[jax.Array], Measurements]:
    """Scale each block's change t[n] - s[n] by its influence on the output, so that more influential blocks change
    more.

        t[n] = s[n] + a_n (t[n] - s[n]),    a_n = |J (t[n] - s[n])|^2 / |t[n] - s[n]|^2,    J = d s[N] / d s[n]

    by one `jax.jvp` for each block, squares summed over the batch: one number for each block, 1 for the last one. An
    inverse makes the change of an influential block small, J^-1 (t[N] - s[N]), where gradient descent makes it large,
    J^T (t[N] - s[N]); in one dimension a_n = J^2 turns the one into the other. Bengio 2020 asks for changes normalised
    by relative influence and leaves the measure open; this is ours.

    Args:
        network: the blocks.
        forward: parameters.
        passes: of all blocks, as from `networks.forward_passes`.
        targets: of all blocks, as from `targets.propagate_targets`.

    Returns:
        The scaled targets, and a_n by block name.
    """
    scaled, influences = [targets[-1]], {}
    for index in range(len(network) - 1, 0, -1):
        change = targets[index - 1] - passes[index].input
        upwards = functools.partial(networks.logits, network[index:], forward)
        _, effect = jax.jvp(upwards, (passes[index].input,), (change,))
        influence = jnp.sum(effect**2) / (jnp.sum(change**2) + jnp.finfo(change.dtype).tiny)
        scaled.insert(0, passes[index].input + influence * change)
        influences[network[index - 1].name] = influence
    return scaled, influences


def _sizes(values: Float[Array, "batch *space"]) -> Float[Array, " batch"]:
    """The norm of each example, [batch]."""
    return jnp.sqrt(jnp.sum(values**2, axis=tuple(range(1, values.ndim))))


def _where(
    chosen: Bool[Array, " batch"], values: Float[Array, "batch *space"], otherwise: Float[Array, "batch *space"]
) -> Float[Array, "batch *space"]:
    """By example."""
    return jnp.where(chosen.reshape(-1, *(values.ndim - 1) * (1,)), values, otherwise)
