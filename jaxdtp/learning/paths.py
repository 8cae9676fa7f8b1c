"""Feedback paths: which block's output is fed back into which block's input.

In target propagation every block feeds back into the block below (`consecutive`). In its direct forms the network's
output feeds back into every block (`direct`). A path is a block like any other, F and G, so that every feedback rule
and target rule works on both: F is all that the network does from the one end of the path to the other.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxdtp.models.blocks import ELU, Activation, Block, Parameters, Pass, Units, dense_block
from jaxdtp.models.networks import Network, NetworkParameters, logits


class Path(NamedTuple):
    """Feedback into the input of block n, n = 2..N.

    Attributes:
        block: has the name and the input of block n. Its `forward` takes the parameters of the whole network.
        source: index in the network of the block whose output is fed back.
    """

    block: Block
    source: int


Paths = tuple[Path, ...]
"""Of the blocks 2..N, in this order."""


@functools.cache
def consecutive(network: Network) -> Paths:
    """Each block's own feedback map, from its output to its input (Lee et al. 2015)."""

    def path(index: int, block: Block) -> Path:
        return Path(block._replace(forward=lambda params, x: block.forward(params[block.name], x)), index)

    return tuple(path(index, block) for index, block in enumerate(network[1:], start=1))


def direct(network: Network, units: Units = ELU) -> Paths:
    """A dense feedback map from the network's output s[N] to the input of each block (Meulemans et al. 2020:
    DDTP-linear).

        G_n(s[N]) = squash(Q_n s[N] + c_n)

    Args:
        network: the blocks.
        units: its `squash` and initialisation.
    """
    return tuple(_direct_path(network, index, units) for index in range(1, len(network)))


def direct_through_hidden(network: Network, hidden: Parameters, units: Units = ELU) -> Paths:
    """Direct feedback by way of one random layer that is never trained (Meulemans et al. 2020: DDTP-RHL).

        G_n(s[N]) = squash(Q_n q(s[N]) + c_n),    q(u) = tanh(R u + r);    into the last block without q

    Args:
        network: the blocks.
        hidden: R and r as 'kernel', [classes, features], and 'bias', [features], such as from `random_hidden_layer`.
        units: its `squash` and initialisation.
    """

    def q(u: jax.Array) -> jax.Array:
        return jnp.tanh(u @ hidden["kernel"] + hidden["bias"])

    features, last = len(hidden["bias"]), len(network) - 1
    return tuple(
        _direct_path(network, index, units, features, q) if index < last else _direct_path(network, index, units)
        for index in range(1, len(network))
    )


def random_hidden_layer(key: jax.Array, classes: int, features: int) -> Parameters:
    """R and r of `direct_through_hidden`, uniform in +-1/sqrt(classes)."""
    kernel_key, bias_key = jax.random.split(key)
    bound = classes**-0.5
    return {
        "kernel": jax.random.uniform(kernel_key, (classes, features), minval=-bound, maxval=bound),
        "bias": jax.random.uniform(bias_key, (features,), minval=-bound, maxval=bound),
    }


def init(paths: Paths, key: jax.Array, like: NetworkParameters | None = None) -> NetworkParameters:
    """Feedback parameters of every path, by block name.

    Args:
        paths: the feedback paths.
        key: as given to `networks.init`, whose random numbers are others.
        like: forward parameters, to start feedback kernels as the transposed forward kernels, which are the same arrays
            in our layout.
    """
    # The first block has no feedback: nothing is ever sent to the input.
    keys = jax.random.split(key, len(paths) + 1)[1:]
    params = {path.block.name: path.block.init(path_key)[1] for path, path_key in zip(paths, keys, strict=True)}
    if like is None:
        return params
    # Copies: the train step donates its state, and one buffer cannot be donated twice.
    return {name: of_block | {"kernel": jnp.copy(like[name]["kernel"])} for name, of_block in params.items()}


def along_paths(paths: Paths, passes: list[Pass]) -> list[Pass]:
    """Each path's pass on a batch, from those of the network's blocks (`networks.forward_passes`)."""
    return [
        Pass(lower.output, passes[path.source].output, passes[path.source].switches)
        for path, lower in zip(paths, passes, strict=False)
    ]


def _direct_path(
    network: Network, index: int, units: Units, features: int | None = None, before: Activation | None = None
) -> Path:
    """Direct feedback into a block's input: the feedback half of a dense block, under the network from there upwards.

    `before` is applied to the network's output, and gives `features` features.
    """
    upper, source = network[index:], len(network) - 1
    (classes,) = network[-1].output_shape
    dense = dense_block(upper[0].name, upper[0].input_shape, features or classes, activation=False, units=units)

    def forward(params: NetworkParameters, x: jax.Array) -> tuple[jax.Array, tuple[()]]:
        return logits(upper, params, x), ()

    def gate(y: jax.Array, switches: tuple[()]) -> jax.Array:
        del switches
        return before(y) if before else y

    return Path(dense._replace(forward=forward, gate=gate, output_shape=(classes,)), source)
