"""Max-pooling that remembers where each maximum was, and the un-pooling that puts values back there."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8

SHARED_MAXIMA = ("last", "sum")
"""What un-pooling does where overlapping windows share a maximum."""

LARGEST_WINDOW = 11
"""Whose positions an int8 can tell, pixels."""


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def max_pool(
    x: Float[Array, "batch height width channels"], window: int, stride: int, padding: int
) -> tuple[
    Float[Array, "batch out_height out_width channels"],
    Int8[Array, "batch out_height out_width channels"],
]:
    """Max-pooling with switches. Its derivative reads at them, and the transpose of that is `max_unpool` with sums.

    Args:
        x: [batch, height, width, channels].
        window, stride, padding: in pixels, the same for height and width; padding never wins.

    Returns:
        The maxima, [batch, out_height, out_width, channels] with out = (size + 2 padding - window) // stride + 1, and
        the switches, int8 of the same shape: the position (row * window + column) of each maximum in its window, the
        first in row-major order where several are equal.
    """
    _, height, width, _ = x.shape
    out_height, out_width = pooled_size((height, width), window, stride, padding)
    margin = (padding, padding)
    padded = jnp.pad(x, ((0, 0), margin, margin, (0, 0)), constant_values=-jnp.inf)
    rows, columns = (
        [slice(first, first + stride * (count - 1) + 1, stride) for first in range(window)]
        for count in (out_height, out_width)
    )
    best, *others = (padded[:, row, column] for row, column in itertools.product(rows, columns))
    switches = jnp.zeros(best.shape, jnp.int8)
    for position, value in enumerate(others, start=1):
        wins = value > best
        best, switches = jnp.where(wins, value, best), jnp.where(wins, jnp.int8(position), switches)
    return best, switches


@max_pool.defjvp
def _max_pool_jvp(window, stride, padding, primals, tangents):
    # Read as the transpose of un-pooling, whose own transpose is un-pooling again: that of slices, one for each place
    # in a window, takes XLA four times as long on the CPU.
    (x,), (tangent,) = primals, tangents
    maxima, switches = max_pool(x, window, stride, padding)
    unpool = lambda y: max_unpool(y, switches, x.shape[1:3], window, stride, padding, shared="sum")  # noqa: E731
    (read,) = jax.linear_transpose(unpool, maxima)(tangent)
    return (maxima, switches), (read, np.zeros(switches.shape, jax.dtypes.float0))


def max_unpool(
    y: Float[Array, "batch out_height out_width channels"],
    switches: Int8[Array, "batch out_height out_width channels"],
    size: tuple[int, int],
    window: int,
    stride: int,
    padding: int,
    *,
    shared: str,
) -> Float[Array, "batch height width channels"]:
    """Write each value to the position of the maximum it came from, zero elsewhere.

    Args:
        y: [batch, out_height, out_width, channels].
        switches: as from `max_pool`, same shape as `y`.
        size: height and width of the pooled map, pixels.
        window, stride, padding: as given to `max_pool`.
        shared: one of `SHARED_MAXIMA`, for a position that overlapping windows share: 'last', the later window's value
            in row-major order; 'sum', their sum, which makes un-pooling the transpose of reading at the switches.

    Returns:
        [batch, height, width, channels].
    """
    batch, out_height, out_width, channels = y.shape
    # Cut the padded map into cells of stride x stride pixels. A cell is reached by the windows that start in it, and by
    # those that start up to `reach` cells above it or to its left.
    reach = (window - 1) // stride
    cells = jnp.zeros((batch, out_height + reach, stride, out_width + reach, stride, channels), y.dtype)
    # From far to near, so that a later window overwrites an earlier one.
    for up, left in itertools.product(reversed(range(reach + 1)), repeat=2):
        around = ((0, 0), (up, reach - up), (left, reach - left), (0, 0))
        shifted = jnp.pad(y, around)[:, :, None, :, None]
        shifted_switches = jnp.pad(switches, around, constant_values=-1)[:, :, None, :, None]
        rows, columns = up * stride + np.arange(stride), left * stride + np.arange(stride)
        inside = (rows[:, None] < window) & (columns < window)
        positions = np.where(inside, rows[:, None] * window + columns, -2).astype(np.int8)
        chosen = shifted_switches == positions[None, None, :, None, :, None]
        cells = cells + jnp.where(chosen, shifted, 0) if shared == "sum" else jnp.where(chosen, shifted, cells)
    # One axis at a time, for JAX's explicit sharding.
    padded = cells.reshape(batch, (out_height + reach) * stride, out_width + reach, stride, channels)
    padded = padded.reshape(batch, padded.shape[1], (out_width + reach) * stride, channels)
    height, width = size
    # Rows and columns that no window reaches lie beyond the last window.
    missing = [max(0, padding + n - padded.shape[axis]) for axis, n in ((1, height), (2, width))]
    padded = jnp.pad(padded, ((0, 0), (0, missing[0]), (0, missing[1]), (0, 0)))
    return padded[:, padding : padding + height, padding : padding + width]


def pooled_size(size: tuple[int, int], window: int, stride: int, padding: int) -> tuple[int, int]:
    """Height and width after `max_pool`, pixels."""
    height, width = ((n + 2 * padding - window) // stride + 1 for n in size)
    return height, width
