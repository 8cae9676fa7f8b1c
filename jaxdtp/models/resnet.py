"""Residual networks for small images, as plain Flax modules: copy this file to change one.

ResNet-20, 32 and 56 are those of He et al. 2016 ("Deep Residual Learning for Image Recognition", section 4.2), with
projections (option B) where a block's size changes; ResNet-18 and 34 are those of ImageNet with a 3x3 stem for images
of 32x32 pixels, and no first pooling.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp


def convolution(features: int, size: int, stride: int, dtype: jnp.dtype, name: str | None = None) -> nn.Conv:
    """A size x size convolution without bias, padded by size // 2 as in PyTorch's ResNets."""
    return nn.Conv(
        features,
        (size, size),
        (stride, stride),
        padding=size // 2,
        use_bias=False,
        dtype=dtype,
        kernel_init=nn.initializers.he_normal(),
        name=name,
    )


class ResidualBlock(nn.Module):
    """relu(x + F(x)): two 3x3 convolutions, each normalised; x is projected where its shape changes."""

    features: int
    stride: int
    norm: Callable[..., nn.Module]
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[batch, height, width, channels] to [batch, height / stride, width / stride, features]."""
        y = convolution(self.features, 3, self.stride, self.dtype)(x)
        y = nn.relu(self.norm()(y))
        y = convolution(self.features, 3, 1, self.dtype)(y)
        y = self.norm()(y)
        if x.shape != y.shape:
            x = convolution(self.features, 1, self.stride, self.dtype, name="projection")(x)
            x = self.norm(name="projection_norm")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A 3x3 convolution, stages of residual blocks, of which all but the first halve the image, mean, dense.

    Attributes:
        num_classes: outputs.
        blocks: in each stage.
        width: channels of the first stage; each further one has twice as many.
        norm: 'batch' (BatchNorm) or 'group' (GroupNorm, 8 channels a group).
        dtype: of the computation; parameters are float32.
    """

    num_classes: int
    blocks: tuple[int, ...] = (3, 3, 3)
    width: int = 16
    norm: str = "batch"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        """Images [batch, height, width, channels] to [batch, num_classes]."""
        dtype = jnp.dtype(self.dtype)
        norms: dict[str, Callable[..., nn.Module]] = {
            "batch": functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, dtype=dtype),
            "group": functools.partial(nn.GroupNorm, num_groups=None, group_size=8, dtype=dtype),
        }
        if self.norm not in norms:
            raise ValueError(f"norm: got {self.norm!r}; allowed: {', '.join(norms)}")
        norm = norms[self.norm]
        x = nn.relu(norm()(convolution(self.width, 3, 1, dtype)(x)))
        for stage, count in enumerate(self.blocks):
            for index in range(count):
                stride = 2 if stage and not index else 1
                name = f"stage{stage + 1}_block{index + 1}"
                x = ResidualBlock(self.width * 2**stage, stride, norm, dtype, name=name)(x)
        return nn.Dense(self.num_classes, dtype=dtype)(x.mean((1, 2)))


resnet20 = functools.partial(ResNet, blocks=(3, 3, 3), width=16)
resnet32 = functools.partial(ResNet, blocks=(5, 5, 5), width=16)
resnet56 = functools.partial(ResNet, blocks=(9, 9, 9), width=16)
resnet18 = functools.partial(ResNet, blocks=(2, 2, 2, 2), width=64)
resnet34 = functools.partial(ResNet, blocks=(3, 4, 6, 3), width=64)
