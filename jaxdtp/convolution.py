"""Stride-1 'SAME' convolution and its transpose, and the one place that knows which platform it runs on.

On GPU and TPU everything here is XLA's plain convolution. On the CPU difference target propagation spends nearly all of
its time here, and XLA has slow paths that it hits in every step (measured with jaxlib 0.10 on 2 cores, in GFLOP/s,
where a matrix product reaches 180 to 210):

- the weight gradient of a convolution inside a loop takes a naive path: 1 to 2; the sum over taps below: 110 to 140;
- so does a 3x3 convolution of maps of 2x2 pixels, even outside a loop: 3 to 5; the sum over taps: 140;
- JAX's transpose of a convolution inside a loop: 20 to 40; the convolution with a flipped kernel: 100 to 200.

Where channels are many, Winograd's algorithm does with a quarter of the multiplications: 3x3 convolutions with 128 to
256 channels take 8, 3 and 3 ms instead of 13, 6 and 4, their weight gradients 8, 3 and 2 instead of 22, 8 and 5 (batch
32, maps of 16, 8 and 4 pixels).
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero


def conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolution with stride 1 that keeps height and width (zero padding).

    Args:
        x: [batch, height, width, in_channels].
        kernel: [size, size, in_channels, out_channels], `size` odd: Flax's layout.

    Returns:
        [batch, height, width, out_channels].
    """
    return _convolve(False, x, kernel)


def conv_transpose(y: jax.Array, kernel: jax.Array) -> jax.Array:
    """Transpose of `conv` with respect to its input: <conv(x, kernel), y> = <x, conv_transpose(y, kernel)>.

    Args:
        y: [batch, height, width, out_channels].
        kernel: [size, size, in_channels, out_channels], in the layout of the forward convolution.

    Returns:
        [batch, height, width, in_channels].
    """
    return _convolve(True, y, kernel)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _convolve(transpose: bool, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`conv`, or `conv_transpose`, in the way that is fastest here."""
    if _on_cpu() and _suits_winograd(x, kernel):
        return _winograd(transpose, x, kernel, lambda a, b: jnp.stack([p @ q for p, q in zip(a, b, strict=True)]))
    if _on_cpu() and _maps_are_tiny(x):
        return _sum_over_taps(transpose, x, kernel)
    return _plain(jnp.flip(kernel, (0, 1)).swapaxes(2, 3) if transpose else kernel, x)


@functools.partial(_convolve.defjvp, symbolic_zeros=True)
def _convolve_jvp(transpose, primals, tangents):
    """d conv = conv(dx, kernel) + conv(x, d kernel), each written so that its transpose, the gradient with respect to
    the input or to the kernel, is fast as well; absent tangents cost nothing."""
    x, kernel = primals
    dx, dkernel = tangents
    terms = []
    if not isinstance(dx, SymbolicZero):
        terms.append(_by_input(transpose, dx, kernel))
    if not isinstance(dkernel, SymbolicZero):
        terms.append(_by_kernel(transpose, x, dkernel))
    return _convolve(transpose, x, kernel), sum(terms)


def _by_input(transpose: bool, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`_convolve` as a function of `x` that autodiff may transpose."""
    # XLA's transpose is slow in a loop: there the sum over 9 taps halves the time of VGG's BP step. 25 taps lengthen
    # LeNet's.
    if _on_cpu() and (_maps_are_tiny(x) or (not transpose and kernel.shape[0] <= 3)):
        return _sum_over_taps(transpose, x, kernel)
    return _transposable(transpose, x, kernel)


def _by_kernel(transpose: bool, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`_convolve` as a function of `kernel` that autodiff may transpose."""
    if not _on_cpu():
        return _transposable(transpose, x, kernel)
    if _suits_winograd(x, kernel):
        # Batched: XLA's transpose of products one by one would write each gradient into an array of all of them.
        return _winograd(transpose, x, kernel, jnp.matmul)
    return _sum_over_taps(transpose, x, kernel)


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def _maps_are_tiny(x: jax.Array) -> bool:
    return max(x.shape[1:3]) <= 2


def _plain(kernel: jax.Array, x: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _transposable(transpose: bool, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """XLA's convolution or JAX's transpose of it, whose own transpose is the plain convolution again: that of a
    convolution with a flipped kernel would be another one, which is slow."""
    if not transpose:
        return _plain(kernel, x)
    result = jax.ShapeDtypeStruct((*x.shape[:3], kernel.shape[2]), x.dtype)
    (transposed,) = jax.linear_transpose(functools.partial(_plain, kernel), result)(x)
    return transposed


def _sum_over_taps(transpose: bool, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """One matrix product for each kernel position (tap), so that the transpose with respect to the kernel is one matrix
    product for each tap as well."""
    size, in_channels, out_channels = kernel.shape[0], *kernel.shape[2:]
    batch, height, width, channels = x.shape
    margin = size // 2
    padded = jnp.pad(x, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
    shifts = [padded[:, i : i + height, j : j + width] for i, j in itertools.product(range(size), repeat=2)]
    # Split as a matrix: XLA chooses a slow layout for a kernel that is indexed by rows and columns.
    taps = jnp.split(kernel.reshape(size * size * in_channels, out_channels), size * size)
    if transpose:
        taps = [tap.T for tap in reversed(taps)]
    # As plain matrices: XLA is slower at contracting batch, height and width separately.
    products = [shift.reshape(-1, channels) @ tap for shift, tap in zip(shifts, taps, strict=True)]
    return sum(products).reshape(batch, height, width, -1)


def _suits_winograd(x: jax.Array, kernel: jax.Array) -> bool:
    size, fewest_channels = kernel.shape[0], min(kernel.shape[2:])
    if size not in (3, 5) or fewest_channels < (64 if size == 3 else 32):
        return False
    return all(length % (7 - size) == 0 for length in x.shape[1:3])


def _winograd(transpose: bool, x: jax.Array, kernel: jax.Array, products) -> jax.Array:
    """Winograd's algorithm on tiles of 6x6 inputs (Lavin & Gray 2016, "Fast Algorithms for Convolutional Neural
    Networks", section 4): 36 multiplications for 4x4 outputs of a 3x3 kernel instead of 144, or for 2x2 outputs of a
    5x5 kernel instead of 100. In float32 its rounding errors are about ten times those of the plain convolution, 3e-6
    of the result's size.

    `products` multiplies the 36 matrices [tiles, in_channels] by the 36 matrices [in_channels, out_channels].
    """
    size = kernel.shape[0]
    step = 7 - size
    batch, height, width, _ = x.shape
    margin = size // 2
    padded = jnp.pad(x, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
    tiles = jnp.stack(
        [
            padded[:, i : i + height - step + 1 : step, j : j + width - step + 1 : step]
            for i, j in itertools.product(range(6), repeat=2)
        ]
    )

    def transform(matrix, values):
        # Both axes of a tile at once, so that it is one matrix product.
        both_axes = jnp.asarray(np.kron(matrix, matrix), x.dtype)
        return both_axes @ values.reshape(both_axes.shape[1], -1)

    kernel_matrix = _WINOGRAD_SCALE[:, None] * _winograd_powers(size)
    if transpose:
        kernel_matrix = kernel_matrix[:, ::-1]
    kernels = transform(kernel_matrix, kernel).reshape(36, *kernel.shape[2:])
    if transpose:
        kernels = kernels.swapaxes(1, 2)
    inputs = transform(_WINOGRAD_INPUT, tiles).reshape(36, -1, x.shape[-1])
    outputs = transform(_winograd_powers(step).T, products(inputs, kernels))
    outputs = outputs.reshape(step, step, batch, height // step, width // step, -1)
    return outputs.transpose(2, 3, 0, 4, 1, 5).reshape(batch, height, width, -1)


# A convolution as a product of polynomials: both are evaluated at 0, 1, -1, 2, -2 and infinity, and multiplied there.
_WINOGRAD_INPUT = np.array(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ]
)
_WINOGRAD_SCALE = np.array([1 / 4, -1 / 6, -1 / 6, 1 / 24, 1 / 24, 1])


def _winograd_powers(count: int) -> np.ndarray:
    """Powers 0 to count - 1 of the six points, [6, count]; of infinity only the highest counts."""
    powers = np.array([0.0, 1, -1, 2, -2])[:, None] ** np.arange(count)
    return np.concatenate([powers, np.eye(count)[-1:]])
