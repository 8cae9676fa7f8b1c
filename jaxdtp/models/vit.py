"""A small vision transformer (Dosovitskiy et al. 2021) as a plain Flax module: copy this file to change it."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class EncoderBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    heads: int
    dropout: float
    train: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[batch, tokens, features] to the same."""
        features, dropout = x.shape[-1], nn.Dropout(self.dropout, deterministic=not self.train)
        y = nn.LayerNorm(dtype=self.dtype)(x)
        x = x + dropout(nn.MultiHeadDotProductAttention(self.heads, dtype=self.dtype)(y, y))
        y = nn.LayerNorm(dtype=self.dtype)(x)
        y = nn.gelu(nn.Dense(2 * features, dtype=self.dtype)(y))
        return x + dropout(nn.Dense(features, dtype=self.dtype)(y))


class ViT(nn.Module):
    """Patches as tokens, learned positions, encoder blocks, mean over the tokens, dense.

    Attributes:
        num_classes: outputs.
        patch: pixels, height and width of a token.
        features: of a token.
        depth: encoder blocks.
        heads: of attention.
        dropout: share of activations.
        dtype: of the computation; parameters are float32.
    """

    num_classes: int
    patch: int = 4
    features: int = 64
    depth: int = 3
    heads: int = 4
    dropout: float = 0.0
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        """Images [batch, height, width, channels] to [batch, num_classes]."""
        dtype, patch = jnp.dtype(self.dtype), (self.patch, self.patch)
        if min(x.shape[1:3]) < self.patch:
            raise ValueError(f"images of shape {x.shape[1:]}; allowed: of one patch at least, {patch}")
        x = nn.Conv(self.features, patch, patch, padding="VALID", dtype=dtype)(x)
        x = x.reshape(len(x), -1, self.features)
        x = x + self.param("positions", nn.initializers.normal(0.02), x.shape[1:]).astype(dtype)
        for index in range(self.depth):
            x = EncoderBlock(self.heads, self.dropout, train, dtype, name=f"block{index + 1}")(x)
        return nn.Dense(self.num_classes, dtype=dtype)(nn.LayerNorm(dtype=dtype)(x).mean(1))
