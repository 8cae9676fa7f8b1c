"""Targets for every block, and the local forward gradients that pull each block's output towards its target.

A target rule is one function `rule(block, feedback_params, clean, target)` from the target of a block's output to the
target of its input, both [batch, ...]; `clean` is the block's pass on the batch.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxdtp.blocks import Block, Parameters, Pass, feedback, feedback_difference
from jaxdtp.networks import Network, NetworkParameters

TargetRule = Callable[[Block, Parameters, Pass, jax.Array], jax.Array]


def difference_target(block: Block, feedback_params: Parameters, clean: Pass, target: jax.Array) -> jax.Array:
    """t[n-1] = s[n-1] + G_n(t[n]) - G_n(s[n]): difference target propagation (Lee et al. 2015)."""
    h_target, h_clean = block.gate(target, clean.switches), block.gate(clean.output, clean.switches)
    return clean.input + feedback_difference(block, feedback_params, h_target, h_clean)


def first_order_target(block: Block, feedback_params: Parameters, clean: Pass, target: jax.Array) -> jax.Array:
    """t[n-1] = s[n-1] + J_G (t[n] - s[n]): the difference target for small steps, whatever their size."""
    x, y, switches = clean
    _, h = jax.jvp(lambda y: block.gate(y, switches), (y,), (target - y,))
    return x + feedback_difference(block, feedback_params, h, jnp.zeros_like(h))


def plain_target(block: Block, feedback_params: Parameters, clean: Pass, target: jax.Array) -> jax.Array:
    """t[n-1] = G_n(t[n]): target propagation without the difference correction."""
    return feedback(block, feedback_params, target, clean.switches)


def output_target(logits: jax.Array, labels: jax.Array, beta: float) -> jax.Array:
    """t[N] = s[N] - beta (softmax(s[N]) - onehot(labels)): one gradient step of size beta on each example's loss.

    Args:
        logits: [batch, classes].
        labels: [batch], integers.
        beta: step size.
    """
    return logits - beta * (jax.nn.softmax(logits) - jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype))


def propagate_targets(
    rule: TargetRule, network: Network, feedback_params: NetworkParameters, passes: list[Pass], target: jax.Array
) -> list[jax.Array]:
    """Targets t[1..N] of all blocks' outputs, from the target t[N] of the last one downwards."""
    targets = [target]
    for block, clean in zip(network[:0:-1], passes[:0:-1], strict=True):
        targets.insert(0, rule(block, feedback_params[block.name], clean, targets[0]))
    return targets


def local_gradients(
    network: Network, params: NetworkParameters, passes: list[Pass], targets: list[jax.Array]
) -> NetworkParameters:
    """Gradients of 1/2 |F_n(s[n-1]) - t[n]|^2 (mean over the batch) for every block, s[n-1] and t[n] held constant.

    Divided by beta this is the estimate of the backpropagation gradient by target propagation.
    """

    def local_loss(block_params, block, clean, target):
        output, _ = block.forward(block_params, clean.input)
        return jnp.sum((output - target) ** 2) / (2 * len(target))

    return {
        block.name: jax.grad(local_loss)(params[block.name], block, clean, target)
        for block, clean, target in zip(network, passes, targets, strict=True)
    }
