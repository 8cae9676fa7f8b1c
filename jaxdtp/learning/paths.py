"""Feedback paths: which block's output is fed back into which block's input.

In target propagation every block feeds back into the block below (`consecutive`). In its direct forms the network's
output feeds back into every block (`direct`). A path is a block like any other, F and G, so that every feedback rule
and target rule works on both: F is all that the network does from the one end of the path to the other (`bind`).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdtp.learning.derived import with_feedback
from jaxdtp.learning.layers import init_feedback
from jaxdtp.models.blocks import (
    ELU,
    Activation,
    Block,
    Context,
    Parameters,
    Pass,
    Units,
    dense_block,
    example_of,
    to_be_derived,
)
from jaxdtp.models.networks import Network, NetworkParameters, forward_passes


class Path(NamedTuple):
    """Feedback into the input of block n, n = 2..N.

    Attributes:
        block: has the name and the input of block n, and the feedback map.
        source: index in the network of the block whose output is fed back.
    """

    block: Block
    source: int


Paths = tuple[Path, ...]
"""Of the blocks 2..N, in this order."""


def consecutive(network: Network) -> Paths:
    """Each block's own feedback map, from its output to its input (Lee et al. 2015)."""
    return tuple(Path(block, index) for index, block in enumerate(network[1:], start=1))


def bind(paths: Paths, network: Network, forward: NetworkParameters) -> Paths:
    """The paths on one batch: each block's `forward` is the network's from the path's end to its source, a function of
    the parameters of the whole network; and where a block has no feedback map of its own, the derived one,

        G(y; O) = J^T y,    J: the Jacobian of F at the clean input with feedback weights O (`derived.with_feedback`)

    Args:
        paths: as from `consecutive`, `direct` or `direct_through_hidden`.
        network: as from `networks.bind`, or of blocks that have no state.
        forward: parameters, which slopes, normalisation and the like in derived feedback depend on.
    """

    def bound(index: int, path: Path) -> Path:
        passed = network[index : path.source + 1]

        def forwards(params: NetworkParameters, x: jax.Array) -> tuple[jax.Array, Any, dict]:
            *_, last = forward_passes(passed, params, x)
            return last.output, last.switches, {}

        block = path.block
        if block.project is to_be_derived:
            block = derive(network[index], forward[block.name])
        return path._replace(block=block._replace(forward=forwards))

    return tuple(bound(index, path) for index, path in enumerate(paths, start=1))


def derive(block: Block, params: Any) -> Block:
    """A block, as from `networks.bind`, with the feedback map that is derived from its forward map with these
    parameters (`bind`), whatever feedback map it has. What that must know of a pass (switches) is its input."""
    g = with_feedback(lambda params, x: block.forward(params, x)[0])

    def forward(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array, Any]:
        y, _, state = block.forward(params, x)
        return y, x, state

    def project(feedback_params: Any, h: tuple[jax.Array, jax.Array]) -> jax.Array:
        y, x = h
        _, pull_back = jax.vjp(lambda x: g(params, feedback_params, x), x)
        return pull_back(y)[0]

    return block._replace(
        forward=forward, gate=lambda y, switches: (y, switches), project=project, affine=False, refreshes=False
    )


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
        return jnp.tanh(u @ hidden["kernel"] + hidden["bias"][None])

    features, last = len(hidden["bias"]), len(network) - 1
    return tuple(
        _direct_path(network, index, units, features, q) if index < last else _direct_path(network, index, units)
        for index in range(1, len(network))
    )


def output_features(network: Network) -> int:
    """How many numbers the network's output has, from which direct feedback leads down.

    Raises:
        ValueError: the output has more axes than one.
    """
    last = network[-1]
    if len(last.output_shape) != 1:
        raise ValueError(f"block {last.name}: gives {last.output_shape}; allowed: one axis, for direct feedback")
    return last.output_shape[0]


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

    Raises:
        ValueError: feedback can't start like the forward parameters, because it has a kernel that they haven't.
    """
    # The first block has no feedback: nothing is ever sent to the input.
    keys = feedback_keys(key, len(paths) + 1)[1:]
    return {
        path.block.name: _init_path(path.block, path_key, None if like is None else like[path.block.name])
        for path, path_key in zip(paths, keys, strict=True)
    }


def feedback_keys(key: jax.Array, blocks: int) -> jax.Array:
    """A key for the feedback of each block that no forward parameter comes from, however a model splits the keys that
    `networks.init` makes of the same one: `split(key, n)[i]` is `fold_in(key, i)`."""
    return jax.random.split(jax.random.fold_in(key, blocks), blocks)


def init_derived(block: Block, params: Any, state: Any, key: jax.Array, *, symmetric: bool = False) -> Any:
    """Feedback parameters of the map that is derived from a block's forward map (`layers.init_feedback`)."""
    f = lambda params, x: block.forward(params, x, Context(state, key))[0]  # noqa: E731
    return init_feedback(f, params, example_of(block), jax.random.fold_in(key, 1), symmetric=symmetric)


def _init_path(block: Block, key: jax.Array, like: Any) -> Any:
    forward, params, state = block.init(key)
    if params is None:
        return init_derived(
            block, forward if like is None else like, state, jax.random.clone(key), symmetric=like is not None
        )
    if like is None:
        return params
    kernels = dict(jax.tree_util.tree_leaves_with_path(like))

    def start(path: tuple, leaf: jax.Array) -> jax.Array:
        if not path or getattr(path[-1], "key", None) != "kernel":
            return leaf
        if path not in kernels or kernels[path].shape != leaf.shape:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            found = kernels[path].shape if path in kernels else "no such parameter"
            raise ValueError(
                f"block {block.name}: a symmetric start of its feedback parameter {name}, {leaf.shape}: got {found} "
                "among the forward parameters; allowed: the same name and shape"
            )
        # A copy: the train step donates its state, and one buffer cannot be donated twice.
        return jnp.copy(kernels[path])

    return jax.tree_util.tree_map_with_path(start, params)


def along_paths(paths: Paths, passes: list[Pass]) -> list[Pass]:
    """Each path's pass on a batch, from those of the network's blocks (`networks.forward_passes`)."""
    return [
        Pass(lower.output, passes[path.source].output, passes[path.source].switches)
        for path, lower in zip(paths, passes, strict=False)
    ]


def passed_again(ways: Paths, index: int, forward: NetworkParameters, clean: list[Pass]) -> list[Pass]:
    """Passes along all paths in which that of path `index`, and of those above where each leads on from the one below,
    are made anew from its input.

    Args:
        ways: as from `bind`.
        index: of the path.
        forward: parameters.
        clean: passes along all paths.
    """
    passes, x = list(clean), clean[index].input
    for place, way in enumerate(ways[index:], start=index):
        y, switches, _ = way.block.forward(forward, x)
        passes[place] = Pass(x, y, switches)
        if way.source != place + 1:
            break
        x = y
    return passes


def _direct_path(
    network: Network, index: int, units: Units, features: int | None = None, before: Activation | None = None
) -> Path:
    """Direct feedback into a block's input: the feedback half of a dense block, under the network from there upwards.

    `before` is applied to the network's output, and gives `features` features.
    """
    classes = output_features(network)
    below = network[index]
    dense = dense_block(below.name, below.input_shape, features or classes, activation=False, units=units)

    def gate(y: jax.Array, switches: Any) -> jax.Array:
        del switches
        return before(y) if before else y

    return Path(dense._replace(gate=gate, output_shape=(classes,)), len(network) - 1)
