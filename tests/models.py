"""Models as users bring them, which know nothing of target propagation."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx


class DenseNet(nn.Module):
    """Concatenations and BatchNorm."""

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Conv(8, (3, 3))(x)
        for _ in range(2):
            y = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
            x = jnp.concatenate([x, nn.Conv(4, (3, 3))(nn.relu(y))], -1)
        return nn.Dense(10)(x.mean((1, 2)))


class ConvNeXt(nn.Module):
    """Depthwise convolutions, LayerNorm, layer scale, dropout."""

    @nn.compact
    def __call__(self, x, *, deterministic):
        x = nn.Conv(8, (2, 2), (2, 2))(x)
        y = nn.LayerNorm()(nn.Conv(8, (3, 3), feature_group_count=8)(x))
        y = nn.Dropout(0.1)(nn.Dense(8)(nn.gelu(nn.Dense(32)(y))), deterministic=deterministic)
        x = x + self.param("scale", nn.initializers.constant(0.5), (8,)) * y
        return nn.Dense(10)(nn.LayerNorm()(x.mean((1, 2))))


class Mixer(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(12, (2, 2), (2, 2))(x).reshape(len(x), -1, 12)
        y = nn.LayerNorm()(x).swapaxes(1, 2)
        x = x + nn.Dense(16)(nn.gelu(nn.Dense(8)(y))).swapaxes(1, 2)
        return nn.Dense(10)((x + nn.Dense(12)(nn.gelu(nn.Dense(24)(nn.LayerNorm()(x))))).mean(1))


class Encoder(nn.Module):
    """Embeddings of integers, attention with dropout."""

    @nn.compact
    def __call__(self, ids, train=True):
        x = nn.Embed(17, 8)(ids) + self.param("positions", nn.initializers.normal(0.02), (ids.shape[1], 8))
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(2, dropout_rate=0.1, deterministic=not train)(y, y)
        return nn.Dense(10)((x + nn.Dense(8)(nn.gelu(nn.Dense(16)(nn.LayerNorm()(x))))).mean(1))


class Shared(nn.Module):
    @nn.compact
    def __call__(self, x):
        x, dense = nn.Dense(12)(x.reshape(len(x), -1)), nn.Dense(12)
        for _ in range(3):
            x = x + nn.tanh(dense(x))
        return nn.Dense(10)(x)


class UNet(nn.Module):
    """Regression: images to images."""

    @nn.compact
    def __call__(self, x):
        wide = nn.relu(nn.Conv(6, (3, 3))(x))
        narrow = nn.relu(nn.Conv(8, (3, 3))(nn.max_pool(wide, (2, 2), (2, 2))))
        return nn.Conv(1, (3, 3))(jnp.concatenate([wide, nn.ConvTranspose(6, (2, 2), (2, 2))(narrow)], -1))


class Partitioned(nn.Module):
    """Boxed parameters, computation in bfloat16."""

    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
        x = nn.relu(nn.Dense(24, kernel_init=init, dtype=jnp.bfloat16)(x.reshape(len(x), -1)))
        return nn.Dense(10, kernel_init=init, dtype=jnp.bfloat16)(x)


class InNNX(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.hidden = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(2)])
        self.out = nnx.Linear(8, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x))).mean((1, 2))
        for linear in self.hidden:
            x = nnx.relu(linear(x))
        return self.out(self.dropout(x))


def init(key, x):
    kernels = jax.random.split(key)
    return {"lower": 0.1 * jax.random.normal(kernels[0], (64, 16)), "upper": jax.random.normal(kernels[1], (16, 10))}


def apply(params, x):
    return jnp.tanh(x.reshape(len(x), -1) @ params["lower"]) @ params["upper"]


class Lower(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.elu(nn.Dense(24)(x.reshape(len(x), -1)))


class Middle(nn.Module):
    """Sows what its own feedback may know."""

    @nn.compact
    def __call__(self, x):
        y = nn.elu(nn.Dense(16)(x))
        self.sow("switches", "slope", jnp.minimum(y + 1, 1.0))
        return y


class MirroredMiddle(nn.Module):
    @nn.compact
    def __call__(self, y, switches):
        (slope,) = switches["slope"]
        return nn.Dense(24, use_bias=False)(slope * y)


def three_blocks(num_classes=10):
    return [Lower(), Middle(), nn.Dense(num_classes)]


class Cholesky(nn.Module):
    """Has a routine of LAPACK for each example of a batch."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(32)(x.reshape(len(x), -1))
        factor = jnp.linalg.cholesky(x[:, :, None] * x[:, None, :] + jnp.eye(32))
        return nn.Dense(self.num_classes)(nn.tanh(jnp.einsum("bij,bj->bi", factor, x)))


class Slow(nn.Module):
    """A convolution, so that on the CPU each step is a call of its own, beside 70 GFLOP for nothing."""

    @nn.compact
    def __call__(self, x):
        square = jnp.ones((2048, 2048))
        work = jax.lax.fori_loop(0, 4, lambda _, product: product @ square / 2048, square * x.mean())
        x = x + jax.lax.stop_gradient(work).mean()
        return nn.Dense(10)(nn.Conv(2, (3, 3), strides=2)(x).reshape(len(x), -1))
