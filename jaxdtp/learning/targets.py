"""Targets for every block, and the local forward gradients that pull each block's output towards its target.

A target rule is one function

    rule(block, feedback_params, forward, clean, target) -> target of the block's input, measurements

from the target of a block's output, both [batch, ...]; `forward` is the block's forward map, `clean` its pass on the
batch, and the measurements are numbers by name that are logged for each block.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Integer

from jaxdtp.learning.paths import Paths, along_paths
from jaxdtp.models.blocks import AnyArray, Block, Forward, Number, Pass, feedback, feedback_difference
from jaxdtp.models.networks import Network, NetworkParameters

Measurements = dict[str, jax.Array]

Loss = Callable[[jax.Array, Any], jax.Array]
"""Of outputs and labels: [batch], or its mean."""

TargetRule = Callable[[Block, Any, Forward, Pass, jax.Array], tuple[jax.Array, Measurements]]


def difference_target(
    block: Block, feedback_params: Any, forward: Forward, clean: Pass, target: Float[Array, "batch *outputs"]
) -> tuple[Float[Array, "batch *inputs"], Measurements]:
    """t[n-1] = s[n-1] + G_n(t[n]) - G_n(s[n]): difference target propagation (Lee et al. 2015)."""
    h_target, h_clean = block.gate(target, clean.switches), block.gate(clean.output, clean.switches)
    return clean.input + feedback_difference(block, feedback_params, h_target, h_clean), {}


def first_order_target(
    block: Block, feedback_params: Any, forward: Forward, clean: Pass, target: Float[Array, "batch *outputs"]
) -> tuple[Float[Array, "batch *inputs"], Measurements]:
    """t[n-1] = s[n-1] + J_G (t[n] - s[n]): the difference target for small steps, whatever their size."""
    x, y, switches = clean
    _, change = jax.jvp(lambda y: feedback(block, feedback_params, y, switches), (y,), (target - y,))
    return x + change, {}


def plain_target(
    block: Block, feedback_params: Any, forward: Forward, clean: Pass, target: Float[Array, "batch *outputs"]
) -> tuple[Float[Array, "batch *inputs"], Measurements]:
    """t[n-1] = G_n(t[n]): target propagation without the difference correction."""
    return feedback(block, feedback_params, target, clean.switches), {}


def cross_entropy(
    logits: Float[AnyArray, "*batch classes"], labels: Integer[AnyArray, "*batch"]
) -> Float[Array, "*batch"]:
    """-log softmax(logits)[label] of each example, [batch], nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def output_target(
    outputs: Float[Array, "batch *outputs"], labels: Any, beta: Number, loss: Loss = cross_entropy
) -> Float[Array, "batch *outputs"]:
    """t[N] = s[N] - beta dL/ds[N]: one gradient step of size beta on each example's loss L. Of the cross-entropy it is

        t[N] = s[N] - beta (softmax(s[N]) - onehot(labels)).

    Args:
        outputs: s[N], [batch, ...]; of the cross-entropy [batch, classes].
        labels: whatever the loss takes; of the cross-entropy [batch], integers.
        beta: step size.
        loss: `loss(outputs, labels)`, of each example or averaged over the batch.
    """
    return outputs - beta * len(outputs) * jax.grad(lambda outputs: jnp.mean(loss(outputs, labels)))(outputs)


def propagate_targets(
    rule: TargetRule,
    paths: Paths,
    forward: NetworkParameters,
    feedback_params: NetworkParameters,
    passes: list[Pass],
    target: Float[Array, "batch *outputs"],
) -> tuple[list[jax.Array], dict[str, Measurements]]:
    """Targets t[1..N] of all blocks' outputs, from the target t[N] of the last one downwards.

    Args:
        rule: the target rule.
        paths: feedback paths into blocks 2..N, as from `paths.bind`.
        forward, feedback_params: parameters.
        passes: of all blocks, as from `networks.forward_passes`.
        target: t[N], [batch, classes].

    Returns:
        The targets, and the rule's measurements: by name, then by block name.
    """
    targets = [target]
    measured: dict[str, Measurements] = {}
    for path, clean in zip(paths[::-1], along_paths(paths, passes)[::-1], strict=True):
        block = path.block
        of_source = targets[path.source - len(passes)]  # counted from the top
        own_forward = functools.partial(block.forward, forward)
        below, measurements = rule(block, feedback_params[block.name], own_forward, clean, of_source)
        targets.insert(0, below)
        for name, value in measurements.items():
            measured.setdefault(name, {})[block.name] = value
    return targets, measured


def local_gradients(
    network: Network, params: NetworkParameters, passes: list[Pass], targets: list[jax.Array]
) -> NetworkParameters:
    """Gradients of 1/2 |F_n(s[n-1]) - t[n]|^2 (mean over the batch) for every block, s[n-1] and t[n] held constant.

    Divided by beta this is the estimate of the backpropagation gradient by target propagation.
    """

    def local_loss(block_params, block, clean, target):
        output, _, _ = block.forward(block_params, clean.input)
        return jnp.sum((output - target) ** 2) / (2 * len(target))

    return {
        block.name: jax.grad(local_loss)(params[block.name], block, clean, target)
        for block, clean, target in zip(network, passes, targets, strict=True)
    }
