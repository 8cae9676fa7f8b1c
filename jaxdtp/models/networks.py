"""Networks as sequences of blocks, and what is done with a whole network: initialise, run forward, classify."""

import jax

from jaxdtp.models.blocks import ELU, Block, Parameters, Pass, Units, conv_block, dense_block

Network = tuple[Block, ...]
"""Blocks 1..N in forward order, each block's output shape the next one's input shape."""

NetworkParameters = dict[str, Parameters]
"""Parameters by block name."""


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


def init(network: Network, key: jax.Array) -> NetworkParameters:
    """Forward parameters of every block, by block name."""
    keys = jax.random.split(key, len(network))
    return {block.name: block.init(block_key)[0] for block, block_key in zip(network, keys, strict=True)}


def forward_passes(network: Network, params: NetworkParameters, x: jax.Array) -> list[Pass]:
    """s[n] = F_n(s[n-1]) for all blocks; s[0] = x, [batch, *network[0].input_shape]; logits are the last output."""
    passes = []
    for block in network:
        y, switches = block.forward(params[block.name], x)
        passes.append(Pass(x, y, switches))
        x = y
    return passes


def logits(network: Network, params: NetworkParameters, x: jax.Array) -> jax.Array:
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
