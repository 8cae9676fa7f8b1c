"""The residual networks of the published L-DRL code (Ernoult et al. 2022): a unit is the stem, a whole stage or the
classifier, each with one target, and its feedback is the mirrored unit.

Forward, with K a convolution without bias:

    stem          relu(K(x))
    block         relu(K(relu(K(x; s))) + S(x)),    S(x) = K(x; 1x1, s) where the shape changes, else x
    classifier    dense(mean of x over height and width)

Feedback, with T the transpose of K and u = relu(y), blocks of a stage last to first:

    stem          T(u)
    block         T(relu(T(u)); s) + S'(u),         S'(u) = T(u; 1x1, s), else u
    classifier    y B^T + b, copied to every position

Nothing passes from forward to feedback: slopes of the feedback are those of its own activations, so that transposed
weights don't make its Jacobian the transposed one. Kernels have one shape and one name on both sides.
"""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxdtp.models.blocks import Block, uniform
from jaxdtp.models.convolution import conv, conv_transpose
from jaxdtp.models.modules import OwnFeedback, block_of
from jaxdtp.models.networks import Network


class Convolution(nn.Module):
    """K or, transposed, T: 'SAME' with an odd kernel [size, size, in, out] of the forward convolution, and a stride."""

    features: tuple[int, int]  # in, out, of the forward convolution
    size: int
    stride: int = 1
    transposed: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[batch, height, width, in] to [batch, height / stride, width / stride, out]; transposed the other way."""
        # PyTorch, and so the published runs, counts the fan-in of a transposed convolution by its output channels.
        fan_in = self.size**2 * self.features[1 if self.transposed else 0]
        shape = (self.size, self.size, *self.features)
        kernel = self.param("kernel", lambda key: uniform(key, shape, fan_in, 0))
        if self.transposed:
            return _transposed(x, kernel, self.stride)
        if self.size == 1:
            return x[:, :: self.stride, :: self.stride] @ kernel[0, 0]
        return conv(x, kernel)[:, :: self.stride, :: self.stride]


def _transposed(y: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    if kernel.shape[0] == 1:
        y = y @ kernel[0, 0].T
    batch, height, width, channels = y.shape
    spread = jnp.zeros((batch, height, stride, width, stride, channels), y.dtype).at[:, :, 0, :, 0].set(y)
    spread = spread.reshape(batch, height * stride, width * stride, channels)
    return conv_transpose(spread, kernel) if kernel.shape[0] > 1 else spread


class Stem(nn.Module):
    """relu(K(x))."""

    features: tuple[int, int]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[batch, height, width, in] to [batch, height, width, out]."""
        return nn.relu(Convolution(self.features, 3, name="conv")(x))


class MirroredStem(nn.Module):
    """T(relu(y))."""

    features: tuple[int, int]

    @nn.compact
    def __call__(self, y: jax.Array) -> jax.Array:
        """[batch, height, width, out] to [batch, height, width, in]."""
        return Convolution(self.features, 3, transposed=True, name="conv")(nn.relu(y))


class ResidualBlock(nn.Module):
    """relu(K(relu(K(x; s))) + S(x)), or mirrored T(relu(T(u)); s) + S'(u) with u = relu(y)."""

    features: tuple[int, int]
    stride: int
    mirrored: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[batch, height, width, in] to [batch, height / stride, width / stride, out]; mirrored the other way."""
        inside = (self.features[1], self.features[1])
        lower = Convolution(self.features, 3, self.stride, self.mirrored, name="conv1")
        upper = Convolution(inside, 3, 1, self.mirrored, name="conv2")
        shortcut = lambda x: x  # noqa: E731
        if self.stride > 1 or self.features[0] != self.features[1]:
            shortcut = Convolution(self.features, 1, self.stride, self.mirrored, name="shortcut")
        if self.mirrored:
            x = nn.relu(x)
            return lower(nn.relu(upper(x))) + shortcut(x)
        return nn.relu(upper(nn.relu(lower(x))) + shortcut(x))


class Stage(nn.Module):
    """Residual blocks one after the other, the first one with the stride; mirrored the last one first."""

    features: tuple[int, int]
    blocks: int
    stride: int
    mirrored: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[batch, height, width, in] to [batch, height / stride, width / stride, out]; mirrored the other way."""
        order = range(self.blocks)
        for index in reversed(order) if self.mirrored else order:
            features, stride = (self.features, self.stride) if index == 0 else ((self.features[1],) * 2, 1)
            x = ResidualBlock(features, stride, self.mirrored, name=f"block_{index}")(x)
        return x


class Classifier(nn.Module):
    """dense(mean of x over height and width)."""

    features: tuple[int, int]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[batch, height, width, in] to [batch, out]."""
        kernel = self.param("kernel", lambda key: uniform(key, self.features, self.features[0], 0))
        bias = self.param("bias", lambda key: uniform(key, self.features[1:], self.features[0], 0))
        return x.mean((1, 2)) @ kernel + bias


class MirroredClassifier(nn.Module):
    """y B^T + b, copied to every position."""

    features: tuple[int, int]
    height: int
    width: int

    @nn.compact
    def __call__(self, y: jax.Array) -> jax.Array:
        """[batch, out] to [batch, height, width, in]."""
        kernel = self.param("kernel", lambda key: uniform(key, self.features, self.features[1], 0))
        bias = self.param("bias", lambda key: uniform(key, self.features[:1], self.features[1], 0))
        x = y @ kernel.T + bias
        return jnp.broadcast_to(x[:, None, None], (len(y), self.height, self.width, self.features[0]))


def residual(
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    blocks: tuple[int, ...] = (2, 2, 2, 2),
    channels: tuple[int, ...] = (64, 128, 256, 512),
    stem: int = 64,
) -> Network:
    """Units `layer_0` (stem), `layer_1`, ... (stages) and `fc`: as published ResNet-18, or with 3, 4, 6, 3 blocks
    ResNet-34.

    Args:
        input_shape: height, width, channels.
        num_classes: outputs.
        blocks: in each stage.
        channels: of each stage; all but the first have stride 2.
        stem: channels of the stem.

    Raises:
        ValueError: height or width can't be halved so often, or there isn't one number of channels for each stage.
    """
    if len(blocks) != len(channels):
        raise ValueError(f"channels: got {channels}; allowed: {len(blocks)}, one for each stage of blocks {blocks}")
    halvings = 2 ** (len(blocks) - 1)
    if input_shape[0] % halvings or input_shape[1] % halvings:
        raise ValueError(
            f"input_shape: got {input_shape}; allowed: height and width divisible by {halvings}, since "
            f"{len(blocks) - 1} stages halve them"
        )
    steps = list(itertools.pairwise((input_shape[2], stem, *channels)))
    units = [OwnFeedback(Stem(steps[0]), MirroredStem(steps[0]))]
    for index, (features, count) in enumerate(zip(steps[1:], blocks, strict=True)):
        stage = (features, count, 2 if index else 1)
        units.append(OwnFeedback(Stage(*stage), Stage(*stage, mirrored=True)))
    size = [length // halvings for length in input_shape[:2]]
    last = (channels[-1], num_classes)
    units.append(OwnFeedback(Classifier(last), MirroredClassifier(last, *size)))
    names = [*(f"layer_{index}" for index in range(len(blocks) + 1)), "fc"]
    network: list[Block] = []
    shape: tuple[int, ...] = tuple(input_shape)
    for name, unit in zip(names, units, strict=True):
        network.append(block_of(unit, jax.ShapeDtypeStruct((2, *shape), jnp.zeros(()).dtype), name))
        shape = network[-1].output_shape
    return tuple(network)
