"""Networks as sequences of blocks, and what is done with a whole network: initialise, run forward, classify."""

import jax
import jax.numpy as jnp

from jaxdtp.blocks import Activation, Block, Parameters, Pass, conv_block, dense_block

Network = tuple[Block, ...]
"""Blocks 1..N in forward order, each block's output shape the next one's input shape."""

NetworkParameters = dict[str, Parameters]
"""Parameters by block name."""


def mlp(
    input_shape: tuple[int, ...],
    num_classes: int,
    *,
    hidden: tuple[int, ...] = (256, 256),
    feedback_activation: Activation = jax.nn.elu,
) -> Network:
    """Dense ELU blocks of `hidden` features and a linear block."""
    return _classifier((), input_shape, num_classes, hidden, feedback_activation)


def lenet(
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    channels: tuple[int, ...] = (32, 64),
    hidden: tuple[int, ...] = (512,),
    feedback_activation: Activation = jax.nn.elu,
    shared_maxima: str = "last",
) -> Network:
    """Blocks of 5x5 convolution, ELU and 3x3/2 max-pooling, then dense blocks (Ernoult et al. 2022: 32-64-512)."""
    geometry = {"kernel_size": 5, "window": 3, "stride": 2, "padding": 1, "shared_maxima": shared_maxima}
    convolutions = _convolutions(input_shape, channels, geometry, feedback_activation)
    return _classifier(convolutions, input_shape, num_classes, hidden, feedback_activation)


def vgg(
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    channels: tuple[int, ...] = (128, 128, 256, 256, 512),
    hidden: tuple[int, ...] = (),
    feedback_activation: Activation = jax.nn.elu,
    shared_maxima: str = "last",
) -> Network:
    """Blocks of 3x3 convolution, ELU and 2x2/2 max-pooling, then dense blocks (Ernoult et al. 2022:
    128-128-256-256-512 and one linear block)."""
    geometry = {"kernel_size": 3, "window": 2, "stride": 2, "padding": 0, "shared_maxima": shared_maxima}
    convolutions = _convolutions(input_shape, channels, geometry, feedback_activation)
    return _classifier(convolutions, input_shape, num_classes, hidden, feedback_activation)


def init(network: Network, key: jax.Array, *, symmetric: bool = False) -> tuple[NetworkParameters, NetworkParameters]:
    """Forward and feedback parameters of every block, by block name.

    The first block has no feedback parameters: nothing is ever sent to the input. With `symmetric`, feedback kernels
    start as the transposed forward kernels, which are the same arrays in our layout.
    """
    forward, feedback = {}, {}
    for block, block_key in zip(network, jax.random.split(key, len(network)), strict=True):
        forward[block.name], feedback[block.name] = block.init(block_key)
        if symmetric:
            # A copy: the train step donates its state, and one buffer cannot be donated twice.
            feedback[block.name]["kernel"] = jnp.copy(forward[block.name]["kernel"])
    del feedback[network[0].name]
    return forward, feedback


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


def _convolutions(input_shape, channels, geometry: dict, feedback_activation: Activation) -> Network:
    blocks = []
    for index, out_channels in enumerate(channels):
        blocks.append(
            conv_block(f"conv_{index}", input_shape, out_channels, feedback_activation=feedback_activation, **geometry)
        )
        input_shape = blocks[-1].output_shape
    return tuple(blocks)


def _classifier(
    blocks: Network, input_shape, num_classes: int, hidden: tuple[int, ...], feedback_activation: Activation
) -> Network:
    """Dense blocks on top of `blocks`: `hidden` with ELU, then one linear block with `num_classes` outputs."""
    shape = blocks[-1].output_shape if blocks else tuple(input_shape)
    sizes = (*hidden, num_classes)
    names = [f"fc{index}" for index in range(1, len(sizes) + 1)] if hidden else ["fc"]
    for name, size in zip(names, sizes, strict=True):
        activation = name != names[-1]
        blocks += (dense_block(name, shape, size, activation=activation, feedback_activation=feedback_activation),)
        shape = (size,)
    return blocks


NETWORKS = {"mlp": mlp, "lenet": lenet, "vgg": vgg}
