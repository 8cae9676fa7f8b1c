"""Stride-1 'SAME' convolution, and the one place that knows which platform it runs on.

On GPU and TPU everything here is XLA's plain convolution. XLA on the CPU has two slow paths that difference target
propagation hits in every step (measured with jaxlib 0.10 on 2 cores, in GFLOP/s, where a matrix product reaches 160):

- the weight gradient of a convolution inside a loop takes a naive path: 1 to 2; the sum over taps below: 70 to 150;
- so does a 3x3 convolution of maps of 2x2 pixels, even outside a loop: 3 to 5; the sum over taps: 140.
"""

import functools

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero


def _plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _sum_over_taps(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The same convolution as one matrix product for each kernel position (tap), so that its transpose with respect to
    the kernel is one matrix product for each tap as well."""
    size, in_channels, out_channels = kernel.shape[0], *kernel.shape[2:]
    batch, height, width, _ = x.shape
    margin = size // 2
    padded = jnp.pad(x, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
    shifts = [padded[:, i : i + height, j : j + width] for i in range(size) for j in range(size)]
    taps = jnp.split(kernel.reshape(size * size * in_channels, out_channels), size * size)
    # As plain matrices: XLA is slower at contracting batch, height and width separately.
    products = [shift.reshape(-1, in_channels) @ tap for shift, tap in zip(shifts, taps, strict=True)]
    return sum(products).reshape(batch, height, width, out_channels)


@jax.custom_jvp
def conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolution with stride 1 that keeps height and width (zero padding).

    Args:
        x: [batch, height, width, in_channels].
        kernel: [size, size, in_channels, out_channels], `size` odd: Flax's layout.

    Returns:
        [batch, height, width, out_channels].
    """
    maps_are_tiny = max(x.shape[1:3]) <= 2
    return _sum_over_taps(x, kernel) if jax.default_backend() == "cpu" and maps_are_tiny else _plain(x, kernel)


@functools.partial(conv.defjvp, symbolic_zeros=True)
def _conv_jvp(primals, tangents):
    """d conv = conv(dx, kernel) + conv(x, d kernel). Written out so that, on the CPU, the transpose of the second term,
    the weight gradient, is made of matrix products; absent tangents cost nothing."""
    x, kernel = primals
    dx, dkernel = tangents
    by_kernel = _sum_over_taps if jax.default_backend() == "cpu" else _plain
    terms = []
    if not isinstance(dx, SymbolicZero):
        terms.append(conv(dx, kernel))
    if not isinstance(dkernel, SymbolicZero):
        terms.append(by_kernel(x, dkernel))
    return conv(x, kernel), sum(terms)


def conv_transpose(y: jax.Array, kernel: jax.Array) -> jax.Array:
    """Transpose of `conv` with respect to its input: <conv(x, kernel), y> = <x, conv_transpose(y, kernel)>.

    Args:
        y: [batch, height, width, out_channels].
        kernel: [size, size, in_channels, out_channels], in the layout of the forward convolution.

    Returns:
        [batch, height, width, in_channels].
    """
    return conv(y, jnp.flip(kernel, (0, 1)).swapaxes(2, 3))
