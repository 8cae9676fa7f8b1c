"""A block: a forward map F_n, its feedback map G_n, and what passes between them.

A block is a NamedTuple of pure functions, as an Optax transformation is. The feedback map has two parts,

    G(y; w) = project(w, gate(y, switches)),

`gate` without parameters (activation, un-pooling) and `project` affine in its input and in its parameters (dense layer,
transposed convolution). Differences of feedbacks, which is all that difference target propagation needs, then cost one
projection. In the networks of Meulemans et al. 2020 an activation follows `project`: `squash`.

Parameters are dictionaries {"kernel", "bias"} in Flax's layout ([in, out], [height, width, in, out]). Forward and
feedback kernels have one common shape: "feedback is the transposed forward" is equality of the two arrays.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxdtp.models import pooling
from jaxdtp.models.convolution import conv, conv_transpose

Parameters = dict[str, jax.Array]

Activation = Callable[[jax.Array], jax.Array]

Forward = Callable[[jax.Array], tuple[jax.Array, jax.Array]]
"""A block's forward map with its parameters filled in: from x to (y, switches)."""


def matched_elu(y: jax.Array) -> jax.Array:
    """A feedback activation whose slope at y is ELU's slope where it took the value y.

        y for y > 0,  y + y^2 / 2 for -1 <= y <= 0,  -1/2 for y < -1,    slope 1, y + 1, 0.

    With ELU itself in the feedback path J_G = J_F^T is out of reach even with transposed weights: its slope at y = -1,
    where the forward unit is shut, is still 1/e, and targets push the block below for a unit that doesn't answer.
    """
    return jnp.where(y > 0, y, 0.5 * (jnp.maximum(y, -1.0) + 1) ** 2 - 0.5)


def matched_tanh(y: jax.Array) -> jax.Array:
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
        activation: forward; not of the last block of a network.
        feedback_activation: of `Block.gate`, and 0 at 0; the published L-DRL runs have ELU.
        squash: activation of the feedback map's result, see `Block`.
        initializer: one of `INITIALIZERS`, of forward and feedback parameters.
    """

    activation: Activation = jax.nn.elu
    feedback_activation: Activation = jax.nn.elu
    squash: Activation | None = None
    initializer: Callable[[jax.Array, tuple[int, ...], int, int], jax.Array] = uniform


class Block(NamedTuple):
    """A forward map and its feedback map.

    Attributes:
        name: used in parameters, metrics and plots.
        input_shape, output_shape: of one example, [height, width, channels] or [features].
        init: `init(key)` to (forward parameters, feedback parameters).
        forward: `forward(forward_params, x)` to (y, switches): F on a batch [batch, *input_shape], and whatever its
            feedback must know of that pass (an array, or () for nothing).
        gate: `gate(y, switches)` to the input of `project`.
        project: `project(feedback_params, h)` to [batch, *input_shape]; affine in both arguments.
        squash: activation of what `project` gives; None: the feedback map ends there, and is affine in its parameters.
    """

    name: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    init: Callable[[jax.Array], tuple[Parameters, Parameters]]
    forward: Callable[[Parameters, jax.Array], tuple[jax.Array, jax.Array]]
    gate: Callable[[jax.Array, jax.Array], jax.Array]
    project: Callable[[Parameters, jax.Array], jax.Array]
    squash: Activation | None = None


class Pass(NamedTuple):
    """One block on one batch: `output`, `switches` = block.forward(params, `input`)."""

    input: jax.Array
    output: jax.Array
    switches: jax.Array


def feedback(block: Block, params: Parameters, y: jax.Array, switches: jax.Array) -> jax.Array:
    """G(y; params), from the block's output space [batch, *output_shape] to its input space [batch, *input_shape]."""
    return _project(block, params, block.gate(y, switches))


def feedback_difference(block: Block, params: Parameters, h: jax.Array, h_reference: jax.Array) -> jax.Array:
    """G(y) - G(y_reference) from the two gated values h = gate(y) and h_reference = gate(y_reference).

    One projection instead of two where the feedback map ends with it: `project` is affine, and its bias cancels.
    """
    if block.squash:
        return _project(block, params, h) - _project(block, params, h_reference)
    return block.project(_without_bias(params), h - h_reference)


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
        ValueError: the kernel size is even, `shared_maxima` is unknown, or pooling leaves no pixel.
    """
    height, width, in_channels = input_shape
    if kernel_size % 2 == 0:
        raise ValueError(f"block {name}: kernel_size is {kernel_size}; allowed: odd sizes")
    if shared_maxima not in pooling.SHARED_MAXIMA:
        allowed = ", ".join(pooling.SHARED_MAXIMA)
        raise ValueError(f"block {name}: shared_maxima is {shared_maxima!r}; allowed: {allowed}")
    pooled = pooling.pooled_size((height, width), window, stride, padding)
    if min(pooled) < 1:
        raise ValueError(f"block {name}: its input of {height}x{width} pixels is too small to be pooled again")
    kernel_shape = (kernel_size, kernel_size, in_channels, channels)

    def init(key: jax.Array) -> tuple[Parameters, Parameters]:
        # PyTorch, and so the published runs, counts the fan-in of a transposed convolution by its output channels.
        fans = (kernel_size**2 * in_channels, kernel_size**2 * channels)
        return _init_pair(units.initializer, key, kernel_shape, (channels, in_channels), fans, fans)

    def forward(params: Parameters, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        activation = units.activation(_add_bias(conv(x, params["kernel"]), params))
        return pooling.max_pool(activation, window, stride, padding)

    def gate(y: jax.Array, switches: jax.Array) -> jax.Array:
        # Activations are 0 at 0, so they may come first, where there are fewer pixels.
        values = units.feedback_activation(y)
        return pooling.max_unpool(values, switches, (height, width), window, stride, padding, shared=shared_maxima)

    def project(params: Parameters, h: jax.Array) -> jax.Array:
        return _add_bias(conv_transpose(h, params["kernel"]), params)

    return Block(name, tuple(input_shape), (*pooled, channels), init, forward, gate, project, units.squash)


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

    def init(key: jax.Array) -> tuple[Parameters, Parameters]:
        fans = (in_features, features)
        return _init_pair(units.initializer, key, fans, (features, in_features), fans, fans[::-1])

    def forward(params: Parameters, x: jax.Array) -> tuple[jax.Array, tuple[()]]:
        y = _add_bias(x.reshape(-1, in_features) @ params["kernel"], params)
        return units.activation(y) if activation else y, ()

    def gate(y: jax.Array, switches: tuple[()]) -> jax.Array:
        return units.feedback_activation(y) if activation else y

    def project(params: Parameters, h: jax.Array) -> jax.Array:
        return _add_bias(h @ params["kernel"].T, params).reshape(-1, *input_shape)

    return Block(name, tuple(input_shape), (features,), init, forward, gate, project, units.squash)


def _init_pair(initializer, key, kernel_shape, bias_sizes, forward_fans, feedback_fans):
    """Forward and feedback parameters; fans are (in, out)."""
    forward, feedback = (
        {
            "kernel": initializer(kernel_key, kernel_shape, *fans),
            "bias": initializer(bias_key, (size,), *fans),
        }
        for (kernel_key, bias_key), size, fans in zip(
            jax.random.split(key, (2, 2)), bias_sizes, (forward_fans, feedback_fans), strict=True
        )
    )
    return forward, feedback


def _project(block: Block, params: Parameters, h: jax.Array) -> jax.Array:
    value = block.project(params, h)
    return block.squash(value) if block.squash else value


def _add_bias(values: jax.Array, params: Parameters) -> jax.Array:
    return values + params["bias"] if "bias" in params else values


def _without_bias(params: Parameters) -> Parameters:
    return {name: value for name, value in params.items() if name != "bias"}
