"""Targets against those of backpropagation and of Gauss-Newton."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdtp.alignment.vectors import Match, match
from jaxdtp.models.blocks import Block, Number, Pass
from jaxdtp.models.networks import Network, NetworkParameters


@functools.partial(jax.jit, static_argnames="network")
def backprop_targets(
    network: Network, forward: NetworkParameters, passes: list[Pass], target: Float[Array, "batch *outputs"]
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
    network: Network,
    forward: NetworkParameters,
    passes: list[Pass],
    target: Float[Array, "batch classes"],
    damping: Number,
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
    jacobians: list[jax.Array] = []
    for block, clean in zip(network[:0:-1], passes[:0:-1], strict=True):
        (rows,) = jax.vmap(_pull_back(block, forward, clean))(rows)
        jacobians.insert(0, rows.reshape(classes, len(change), -1).swapaxes(0, 1))
    if not jacobians:
        return [target]
    grams = jnp.stack([jacobian @ jacobian.mT for jacobian in jacobians])
    # All blocks in one call: on a CPU, jaxlib's batched decompositions hold a thread each while they wait for others,
    # and as many at once as there are threads wait for ever.
    damped = grams + damping * jnp.eye(classes, dtype=change.dtype)
    solved = jnp.linalg.solve(damped, change[None, ..., None])[..., 0]
    targets = [
        clean.input + jnp.einsum("bkf,bk->bf", jacobian, of_block).reshape(clean.input.shape)
        for clean, jacobian, of_block in zip(passes[1:], jacobians, solved, strict=True)
    ]
    return [*targets, target]


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
            examples where one of the two changes is zero: no change has no angle.
    """

    def mean(values: jax.Array, angles: jax.Array) -> jax.Array:
        return jnp.nanmean(jnp.where(jnp.isnan(angles), jnp.nan, values))

    matches = {}
    for block, clean, target, reference in zip(network, passes, targets, references, strict=True):
        of_examples = jax.vmap(match)(target - clean.output, reference - clean.output)
        if not per_example:
            of_examples = Match(*(mean(values, of_examples.angle) for values in of_examples))
        matches[block.name] = of_examples
    return matches


def _pull_back(block: Block, forward: NetworkParameters, clean: Pass):
    """v to v^T J_F of a block at its clean input."""
    _, pull_back = jax.vjp(lambda x: block.forward(forward[block.name], x)[0], clean.input)
    return pull_back
