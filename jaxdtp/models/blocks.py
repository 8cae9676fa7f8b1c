"""A block: a forward map F_n, its feedback map G_n, and what passes between them.

A block is a NamedTuple of pure functions, as an Optax transformation is. `jaxdtp.models.modules` makes one of any Flax
module; here are those of the published networks. The feedback map has two parts,

    G(y; w) = project(w, gate(y, switches)),

`gate` without parameters (activation, un-pooling). Where `project` is affine in its input and in its parameters (dense
layer, transposed convolution), differences of feedbacks, which is all that difference target propagation needs, cost
one projection. A block without `gate` and `project` has the feedback map that is derived from its forward map
(`jaxdtp.learning.paths.bind`).

Parameters of the blocks here are dictionaries {"kernel", "bias"} in Flax's layout ([in, out], [height, width, in,
out]). Forward and feedback kernels have one common shape: "feedback is the transposed forward" is equality of the two
arrays.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from jaxdtp.models import pooling
from jaxdtp.models.convolution import conv, conv_transpose, written_once

AnyArray = jax.Array | np.ndarray
"""As users give it."""

Inputs = Shaped[AnyArray, "batch *inputs"]
"""A network's inputs, of any type."""

Parameters = dict[str, AnyArray]

Number = float | int | jax.Array
"""A setting that may be an argument of a compiled program."""

Activation = Callable[[jax.Array], jax.Array]

Forward = Callable[[jax.Array], tuple[jax.Array, Any, Any]]
"""A block's forward map with its parameters filled in: from x to (y, switches, state)."""


class Context(NamedTuple):
    """What a forward pass depends on beside its parameters and its input.

    Attributes:
        state: what a block keeps from batch to batch without learning it, such as BatchNorm's running statistics.
        key: of dropout and other random numbers in training; None in evaluation. All passes on one batch have the same,
            so that they are passes of one function.
    """

    state: Any = {}  # noqa: RUF012
    key: jax.Array | None = None


EVALUATION = Context()
"""Of blocks that have no state."""


def matched_elu(y: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """A feedback activation whose slope at y is ELU's slope where it took the value y.

        y for y > 0,  y + y^2 / 2 for -1 <= y <= 0,  -1/2 for y < -1,    slope 1, y + 1, 0.

    With ELU itself in the feedback path J_G = J_F^T is out of reach even with transposed weights: its slope at y = -1,
    where the forward unit is shut, is still 1/e, and targets push the block below for a unit that doesn't answer.
    """
    return jnp.where(y > 0, y, 0.5 * (jnp.maximum(y, -1.0) + 1) ** 2 - 0.5)


def matched_tanh(y: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """y - y^3 / 3: a feedback activation whose slope at y, 1 - y^2, is that of tanh where it took the value y."""
    y = jnp.clip(y, -1.0, 1.0)
    return y - y**3 / 3


class Nonlinearity(NamedTuple):
    """A forward activation, and the feedback activation that has its slope."""

    forward: Activation
    matched: Activation


ACTIVATIONS = {"elu": Nonlinearity(jax.nn.elu, matched_elu), "tanh": Nonlinearity(jnp.tanh, matched_tanh)}
FEEDBACK_ACTIVATIONS = {"elu": jax.nn.elu, "tanh": jnp.tanh, "linear": lambda y: y, "matched": None}
"""By name; 'matched' depends on the forward activation."""
SQUASHES = {"none": None, "tanh": jnp.tanh}


def uniform(key: jax.Array, shape: tuple[int, ...], fan_in: int, fan_out: int) -> jax.Array:
    """Uniform in +-1/sqrt(fan_in): PyTorch's default, and that of the published L-DRL runs; biases too."""
    del fan_out
    return jax.random.uniform(key, shape, minval=-(fan_in**-0.5), maxval=fan_in**-0.5)


def xavier_normal(key: jax.Array, shape: tuple[int, ...], fan_in: int, fan_out: int) -> jax.Array:
    """Normal with variance 2 / (fan_in + fan_out), biases 0 (Glorot & Bengio 2010): that of Meulemans et al. 2020."""
    if len(shape) == 1:
        return jnp.zeros(shape)
    return jax.random.normal(key, shape) * (2 / (fan_in + fan_out)) ** 0.5


INITIALIZERS = {"uniform": uniform, "xavier_normal": xavier_normal}


class Units(NamedTuple):
    """What all blocks of a network have in common.

    Attributes:
        activation: forward, monotone; not of the last block of a network.
        feedback_activation: of `Block.gate`, and 0 at 0; the published L-DRL runs have ELU.
        squash: activation of the feedback map's result (Meulemans et al. 2020); None: none.
        initializer: one of `INITIALIZERS`, of forward and feedback parameters.
    """

    activation: Activation = jax.nn.elu
    feedback_activation: Activation = jax.nn.elu
    squash: Activation | None = None
    initializer: Callable[[jax.Array, tuple[int, ...], int, int], jax.Array] = uniform


def to_be_derived(*operands: Any) -> Any:
    """In the place of `gate` and `project`: the feedback map is to be derived from the forward map.

    Raises:
        ValueError: always, since feedback can't be derived without forward parameters (`jaxdtp.learning.paths.bind`).
    """
    raise ValueError(
        "block: its feedback map is derived; allowed: blocks with a feedback map of their own, or those of paths.bind, "
        "which have the one that is derived with their forward parameters"
    )


class Block(NamedTuple):
    """A forward map and its feedback map.

    Attributes:
        name: used in parameters, metrics and plots.
        input_shape, output_shape: of one example, [height, width, channels] or [features].
        init: `init(key)` to (forward parameters, feedback parameters, state); feedback parameters are None where the
            feedback map is derived.
        forward: `forward(forward_params, x, context)` to (y, switches, state): F on a batch [batch, *input_shape];
            whatever its feedback must know of that pass (arrays by example, or () for nothing); and the state after it.
            Without a context: in evaluation, for a block that has no state.
        gate: `gate(y, switches)` to the input of `project`.
        project: `project(feedback_params, h)` to [batch, *input_shape]. Both are `to_be_derived` if they aren't given.
        affine: whether `project` is affine in both arguments, with all that is constant in parameters named 'bias', and
            nothing in its input that isn't affine in y, such as slopes to multiply by.
        refreshes: whether a noisy pass is fed back through its own switches; else through those of the clean pass.
        dtype: of the input.
        per_example: whether what F makes of an example depends neither on the others of the batch nor on the context.
    """

    name: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    init: Callable[[jax.Array], tuple[Any, Any, Any]]
    forward: Callable[..., tuple[jax.Array, Any, Any]]
    gate: Callable[[jax.Array, Any], Any] = to_be_derived
    project: Callable[[Any, Any], jax.Array] = to_be_derived
    affine: bool = False
    refreshes: bool = True
    dtype: Any = float
    per_example: bool = True


def example_of(block: Block, examples: int = 2) -> jax.ShapeDtypeStruct:
    """Shape and type of a block's input."""
    return jax.ShapeDtypeStruct((examples, *block.input_shape), jnp.zeros((), block.dtype).dtype)


class Pass(NamedTuple):
    """One block on one batch: `output`, `switches`, _ = block.forward(params, `input`)."""

    input: Shaped[Array, "batch *inputs"]
    output: Float[Array, "batch *outputs"]
    switches: Any


def feedback(
    block: Block, params: Any, y: Float[Array, "batch *outputs"], switches: Any
) -> Float[Array, "batch *inputs"]:
    """G(y; params), from the block's output space [batch, *output_shape] to its input space [batch, *input_shape]."""
    return block.project(params, block.gate(y, switches))


def feedback_difference(block: Block, params: Any, h: Any, h_reference: Any) -> Float[Array, "batch *inputs"]:
    """G(y) - G(y_reference) from the two gated values h = gate(y) and h_reference = gate(y_reference).

    One projection instead of two where `project` is affine: its bias cancels.
    """
    if block.affine:
        return block.project(_without_bias(params), jax.tree.map(jnp.subtract, h, h_reference))
    return block.project(params, h) - block.project(params, h_reference)


ELU = Units()
"""Those of the published L-DRL runs."""


def conv_block(
    name: str,
    input_shape: tuple[int, int, int],
    channels: int,
    *,
    kernel_size: int = 3,
    window: int = 2,
    stride: int = 2,
    padding: int = 0,
    shared_maxima: str = "last",
    units: Units = ELU,
) -> Block:
    """Forward convolution -> activation -> max-pool, feedback un-pool -> activation -> transposed convolution.

    Args:
        name: the block's name.
        input_shape: height, width, channels.
        channels: of the output.
        kernel_size: of the 'SAME' convolution with stride 1, odd.
        window, stride, padding: of the pooling, pixels. VGG: 2, 2, 0; LeNet: 3, 2, 1.
        shared_maxima: of `pooling.max_unpool`; the published runs have 'last'.
        units: activations and initialisation.

    Raises:
        ValueError: the kernel size is even, the window has more positions than switches can tell (11 x 11) or none
            beside its padding, `shared_maxima` is unknown, or pooling leaves no pixel.
    """
    height, width, in_channels = input_shape
    if kernel_size % 2 == 0:
        raise ValueError(f"block {name}: kernel_size is {kernel_size}; allowed: odd sizes")
    if not 1 <= window <= pooling.LARGEST_WINDOW or not 0 <= padding < window:
        raise ValueError(
            f"block {name}: window is {window} and padding {padding}; allowed: windows up to {pooling.LARGEST_WINDOW}, "
            "and less padding than that"
        )
    if shared_maxima not in pooling.SHARED_MAXIMA:
        allowed = ", ".join(pooling.SHARED_MAXIMA)
        raise ValueError(f"block {name}: shared_maxima is {shared_maxima!r}; allowed: {allowed}")
    pooled = pooling.pooled_size((height, width), window, stride, padding)
    if min(pooled) < 1:
        raise ValueError(f"block {name}: its input of {height}x{width} pixels is too small to be pooled again")
    kernel_shape = (kernel_size, kernel_size, in_channels, channels)

    def init(key: jax.Array) -> tuple[Parameters, Parameters, dict]:
        # PyTorch, and so the published runs, counts the fan-in of a transposed convolution by its output channels.
        fans = (kernel_size**2 * in_channels, kernel_size**2 * channels)
        return _init_pair(units.initializer, key, kernel_shape, (channels, in_channels), fans, fans)

    def forward(params: Parameters, x: jax.Array, context: Context = EVALUATION) -> tuple[jax.Array, jax.Array, dict]:
        # Activations are monotone, so they may come last, where there are fewer pixels.
        maxima, switches = pooling.max_pool(
            written_once(_add_bias(conv(x, params["kernel"]), params)), window, stride, padding
        )
        return units.activation(maxima), switches, {}

    def gate(y: jax.Array, switches: jax.Array) -> jax.Array:
        # Activations are 0 at 0, so they may come first, where there are fewer pixels.
        values = units.feedback_activation(y)
        return pooling.max_unpool(values, switches, (height, width), window, stride, padding, shared=shared_maxima)

    def project(params: Parameters, h: jax.Array) -> jax.Array:
        return _squashed(units, _add_bias(conv_transpose(h, params["kernel"]), params))

    shapes = (tuple(input_shape), (*pooled, channels))
    return Block(name, *shapes, init, forward, gate, project, affine=units.squash is None)


def dense_block(
    name: str,
    input_shape: tuple[int, ...],
    features: int,
    *,
    activation: bool = True,
    units: Units = ELU,
) -> Block:
    """Forward flatten -> dense -> activation, feedback activation -> dense -> reshape.

    Args:
        name: the block's name.
        input_shape: of one example, any rank.
        features: of the output.
        activation: False for the last block of a network, which has no activation forwards and none in its gate.
        units: activations and initialisation.
    """
    in_features = math.prod(input_shape)

    def init(key: jax.Array) -> tuple[Parameters, Parameters, dict]:
        fans = (in_features, features)
        return _init_pair(units.initializer, key, fans, (features, in_features), fans, fans[::-1])

    def forward(params: Parameters, x: jax.Array, context: Context = EVALUATION) -> tuple[jax.Array, tuple[()], dict]:
        y = _add_bias(x.reshape(-1, in_features) @ params["kernel"], params)
        return units.activation(y) if activation else y, (), {}

    def gate(y: jax.Array, switches: tuple[()]) -> jax.Array:
        return units.feedback_activation(y) if activation else y

    def project(params: Parameters, h: jax.Array) -> jax.Array:
        return _squashed(units, _add_bias(h @ params["kernel"].T, params)).reshape(-1, *input_shape)

    return Block(name, tuple(input_shape), (features,), init, forward, gate, project, affine=units.squash is None)


def _init_pair(initializer, key, kernel_shape, bias_sizes, forward_fans, feedback_fans):
    """Forward and feedback parameters, and no state; fans are (in, out)."""
    forward, feedback = (
        {
            "kernel": initializer(kernel_key, kernel_shape, *fans),
            "bias": initializer(bias_key, (size,), *fans),
        }
        for (kernel_key, bias_key), size, fans in zip(
            jax.random.split(key, (2, 2)), bias_sizes, (forward_fans, feedback_fans), strict=True
        )
    )
    return forward, feedback, {}


def _squashed(units: Units, values: jax.Array) -> jax.Array:
    return units.squash(values) if units.squash else values


def _add_bias(values: jax.Array, params: Parameters) -> jax.Array:
    return values + jnp.broadcast_to(params["bias"], values.shape) if "bias" in params else values


def _without_bias(params: Any) -> Any:
    if isinstance(params, dict):
        return {name: _without_bias(value) for name, value in params.items() if name != "bias"}

    def without(path: tuple, leaf: jax.Array) -> jax.Array:
        named = path and "bias" in (getattr(path[-1], "key", ""), getattr(path[-1], "name", ""))
        return jnp.zeros_like(leaf) if named else leaf

    return jax.tree_util.tree_map_with_path(without, params)
