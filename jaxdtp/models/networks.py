"""Networks as sequences of blocks, and what is done with a whole network: initialise, run forward, classify."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdtp.models.blocks import ELU, Block, Context, Inputs, Pass, Units, conv_block, dense_block, to_be_derived

Network = tuple[Block, ...]
"""Blocks 1..N in forward order, each block's output shape the next one's input shape."""

NetworkParameters = dict[str, Any]
"""Parameters by block name."""

NetworkState = dict[str, Any]
"""What blocks keep from batch to batch without learning it, by block name; empty for most."""


def mlp(
    input_shape: tuple[int, ...], num_classes: int, *, hidden: tuple[int, ...] = (256, 256), units: Units = ELU
) -> Network:
    """Dense blocks of `hidden` features and a linear block."""
    return _classifier((), input_shape, num_classes, hidden, units)


def lenet(
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    channels: tuple[int, ...] = (32, 64),
    hidden: tuple[int, ...] = (512,),
    shared_maxima: str = "last",
    units: Units = ELU,
) -> Network:
    """Blocks of 5x5 convolution and 3x3/2 max-pooling, then dense blocks (Ernoult et al. 2022: 32-64-512)."""
    geometry = {"kernel_size": 5, "window": 3, "stride": 2, "padding": 1, "shared_maxima": shared_maxima}
    return _classifier(_convolutions(input_shape, channels, geometry, units), input_shape, num_classes, hidden, units)


def vgg(
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    channels: tuple[int, ...] = (128, 128, 256, 256, 512),
    hidden: tuple[int, ...] = (),
    shared_maxima: str = "last",
    units: Units = ELU,
) -> Network:
    """Blocks of 3x3 convolution and 2x2/2 max-pooling, then dense blocks (Ernoult et al. 2022: 128-128-256-256-512 and
    one linear block)."""
    geometry = {"kernel_size": 3, "window": 2, "stride": 2, "padding": 0, "shared_maxima": shared_maxima}
    return _classifier(_convolutions(input_shape, channels, geometry, units), input_shape, num_classes, hidden, units)


def init(network: Network, key: jax.Array) -> tuple[NetworkParameters, NetworkState]:
    """Forward parameters and state of every block, by block name."""
    keys = jax.random.split(key, len(network))
    fresh = {block.name: block.init(block_key) for block, block_key in zip(network, keys, strict=True)}
    params = {name: of_block for name, (of_block, _, _) in fresh.items()}
    return params, {name: of_block for name, (_, _, of_block) in fresh.items()}


def bind(network: Network, state: NetworkState | None, key: jax.Array | None = None) -> Network:
    """The network on one batch: its blocks' forward maps are functions of parameters and input alone.

    Args:
        network: the blocks.
        state: of all blocks; None: they are bound already, or have none.
        key: of dropout and the like; None: in evaluation.
    """

    if state is None:
        return network

    def bound(index: int, block: Block) -> Block:
        own_key = None if key is None else jax.random.fold_in(key, index)
        context = Context(state[block.name], own_key)
        return block._replace(forward=lambda params, x: block.forward(params, x, context))

    return tuple(bound(index, block) for index, block in enumerate(network))


def forward_passes(network: Network, params: NetworkParameters, x: Inputs) -> list[Pass]:
    """s[n] = F_n(s[n-1]) for all blocks; s[0] = x, [batch, *network[0].input_shape]; logits are the last output."""
    return run(network, params, x)[0]


def run(network: Network, params: NetworkParameters, x: Inputs) -> tuple[list[Pass], NetworkState]:
    """As `forward_passes`, and the state of all blocks afterwards."""
    passes, states, signal = [], {}, jnp.asarray(x)
    for block in network:
        y, switches, states[block.name] = block.forward(params[block.name], signal)
        # All that a derived feedback map must know of a pass is its input.
        passes.append(Pass(signal, y, signal if block.project is to_be_derived else switches))
        signal = y
    return passes, states


def logits(network: Network, params: NetworkParameters, x: Inputs) -> Float[Array, "batch *outputs"]:
    """The network's output on a batch, [batch, classes]."""
    return forward_passes(network, params, x)[-1].output


def _convolutions(input_shape, channels, geometry: dict, units: Units) -> Network:
    blocks = []
    for index, out_channels in enumerate(channels):
        blocks.append(conv_block(f"conv_{index}", input_shape, out_channels, units=units, **geometry))
        input_shape = blocks[-1].output_shape
    return tuple(blocks)


def _classifier(blocks: Network, input_shape, num_classes: int, hidden: tuple[int, ...], units: Units) -> Network:
    """Dense blocks on top of `blocks`: `hidden` with activation, then one linear block with `num_classes` outputs."""
    shape = blocks[-1].output_shape if blocks else tuple(input_shape)
    sizes = (*hidden, num_classes)
    names = [f"fc{index}" for index in range(1, len(sizes) + 1)] if hidden else ["fc"]
    for name, size in zip(names, sizes, strict=True):
        blocks += (dense_block(name, shape, size, activation=name != names[-1], units=units),)
        shape = (size,)
    return blocks


NETWORKS = {"mlp": mlp, "lenet": lenet, "vgg": vgg}
