"""Stride-1 'SAME' convolution and its transpose, and the one place that knows which platform it runs on.

Convolution, its transpose and the gradient of the kernel are one trilinear form, <conv(x, kernel), y>, each with
another of its three arguments left open. So every derivative of one of them is another one, and three JAX primitives,
each in its fastest form, are fast in every direction and at every order. Under `jax.vmap` they are XLA's own; under
`jax.shard_map` they want `check_vma=False`; the matmul precision is the one that holds where the program is compiled.

On GPU and TPU they are XLA's plain convolution. On the CPU difference target propagation spends nearly all of its time
here, and XLA has slow paths (in loops, measured with jaxlib 0.10 on 2 cores, in GFLOP/s, where a matrix product reaches
180 to 210):

- JAX's transpose of a convolution: 20 to 40; the convolution with a flipped kernel: 100 to 200;
- the gradient of the kernel: 1 to 2; one matrix product for each kernel position (tap): 110 to 140;
- a 3x3 convolution of maps of 2x2 pixels: 3 to 5; the sum over taps: 140;
- a 5x5 convolution of an image of 3 channels: 16 to 22; one product of patches and kernel: 90.

Where channels are many, Winograd's algorithm does with a quarter of the multiplications: 3x3 convolutions with 128 to
256 channels take 8 and 3 ms instead of 13 and 6 (batch 32, maps of 16 and 8 pixels), their kernel gradients 8, 3 and 2
instead of 22, 8 and 5 (of 4 pixels too). There, and of 2 pixels, convolutions do without the products with padding.
"""

import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla
from jaxtyping import Array, Float


def conv(
    x: Float[Array, "batch height width inputs"], kernel: Float[Array | np.ndarray, "size size inputs outputs"]
) -> Float[Array, "batch height width outputs"]:
    """Convolution with stride 1 that keeps height and width (zero padding).

    Args:
        x: [batch, height, width, inputs], channels last.
        kernel: [size, size, inputs, outputs], `size` odd: Flax's layout.

    Returns:
        [batch, height, width, outputs].
    """
    return _conv.bind(x, kernel)


def conv_transpose(
    y: Float[Array, "batch height width outputs"], kernel: Float[Array | np.ndarray, "size size inputs outputs"]
) -> Float[Array, "batch height width inputs"]:
    """Transpose of `conv` with respect to its input: <conv(x, kernel), y> = <x, conv_transpose(y, kernel)>.

    Args:
        y: [batch, height, width, outputs], channels last.
        kernel: [size, size, inputs, outputs], in the layout of the forward convolution.

    Returns:
        [batch, height, width, inputs].
    """
    return _conv_transpose.bind(y, kernel)


@jax.custom_jvp
def written_once(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """x; its tangents and cotangents are computed once and kept, for all that they go into.

    Without it XLA computes the cotangent of a convolution's result within the sum over pixels that is the gradient of
    the bias, which on an H100 took 0.7 of the 1.2 ms of LeNet's BP step.
    """
    return x


@written_once.defjvp
def _written_once_jvp(primals, tangents):
    return primals[0], jax.lax.optimization_barrier(tangents[0])


def _plain_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _plain_conv_transpose(y: jax.Array, kernel: jax.Array) -> jax.Array:
    x = jax.ShapeDtypeStruct((*y.shape[:3], kernel.shape[2]), y.dtype)
    (result,) = jax.linear_transpose(lambda x: _plain_conv(x, kernel), x)(y)
    return result


def _plain_kernel_gradient(x: jax.Array, y: jax.Array, size: int, transpose: bool) -> jax.Array:
    """Transpose of `conv` with respect to its kernel: <conv(x, kernel), y> = <kernel, kernel_gradient(x, y)>.

    `transpose` tells whether it is wanted beside `conv_transpose(y, kernel)` or `conv(x, kernel)`, to share their work.
    """
    kernel = jax.ShapeDtypeStruct((size, size, x.shape[-1], y.shape[-1]), x.dtype)
    (result,) = jax.linear_transpose(lambda kernel: _plain_conv(x, kernel), kernel)(y)
    return result


def _cpu_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    if _suits_taps(x, kernel.shape):
        return _sum_over_taps(x, _split_taps(kernel))
    if _suits_winograd(x, kernel.shape):
        return _winograd(False, x, kernel, _fastest_products(kernel))
    return _product_of_patches(x, kernel) if _channels_are_few(x) else _plain_conv(x, kernel)


def _cpu_conv_transpose(y: jax.Array, kernel: jax.Array) -> jax.Array:
    if _suits_taps(y, kernel.shape):
        return _sum_over_taps(y, [tap.T for tap in reversed(_split_taps(kernel))])
    if _suits_winograd(y, kernel.shape):
        return _winograd(True, y, kernel, _fastest_products(kernel))
    return _plain_conv(y, jnp.flip(kernel, (0, 1)).swapaxes(2, 3))


def _cpu_kernel_gradient(x: jax.Array, y: jax.Array, size: int, transpose: bool) -> jax.Array:
    kernel = jax.ShapeDtypeStruct((size, size, x.shape[-1], y.shape[-1]), x.dtype)
    # Faster than taps also on maps of 4x4 pixels, where the convolution is not.
    if _suits_winograd(x, kernel.shape):
        seen, written = (y, x) if transpose else (x, y)
        convolve = lambda kernel: _winograd(transpose, seen, kernel, jnp.matmul)  # noqa: E731
        return jax.linear_transpose(convolve, kernel)(written)[0]
    if _channels_are_few(x):
        return jax.linear_transpose(lambda kernel: _product_of_patches(x, kernel), kernel)(y)[0]
    # Not the transpose of the sum over taps, which would transpose each product again.
    taps = [
        _as_matrix(x[:, rows.seen, columns.seen]).T @ _as_matrix(y[:, rows.written, columns.written])
        for rows, columns in _spans(x, size)
    ]
    return jnp.stack(taps).reshape(kernel.shape)


def _suits_taps(x: jax.Array, kernel_shape: tuple[int, ...]) -> bool:
    # Of tiny maps much is padding; and where channels are many, Winograd's transform of the kernel outweighs them.
    return max(x.shape[1:3]) <= (4 if _suits_winograd(x, kernel_shape) else 2)


def _channels_are_few(x: jax.Array) -> bool:
    return x.shape[-1] <= 4


def _as_matrix(x: jax.Array) -> jax.Array:
    # XLA is slower at contracting several axes.
    return x.reshape(-1, x.shape[-1])


def _pad(x: jax.Array, size: int) -> jax.Array:
    margin = size // 2
    return jnp.pad(x, ((0, 0), (margin, margin), (margin, margin), (0, 0)))


def _product_of_patches(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """One matrix product of all that the kernel sees at each position."""
    _, height, width, _ = x.shape
    padded = _pad(x, kernel.shape[0])
    shifts = itertools.product(range(kernel.shape[0]), repeat=2)
    patches = jnp.concatenate([padded[:, i : i + height, j : j + width] for i, j in shifts], -1)
    return (_as_matrix(patches) @ _as_matrix(kernel)).reshape(*x.shape[:3], kernel.shape[-1])


def _split_taps(kernel: jax.Array) -> list[jax.Array]:
    # Split as a matrix: XLA chooses a slow layout for a kernel that is indexed by rows and columns.
    return jnp.split(_as_matrix(kernel), kernel.shape[0] ** 2)


def _sum_over_taps(x: jax.Array, taps: list[jax.Array]) -> jax.Array:
    """One matrix product for each position of the kernel."""

    def product(tap: jax.Array, rows: _Span, columns: _Span) -> jax.Array:
        seen = x[:, rows.seen, columns.seen]
        of_seen = (_as_matrix(seen) @ tap).reshape(*seen.shape[:3], tap.shape[1])
        return jnp.pad(of_seen, ((0, 0), rows.left_out, columns.left_out, (0, 0)))

    spans = _spans(x, math.isqrt(len(taps)))
    return functools.reduce(jnp.add, (product(tap, *span) for tap, span in zip(taps, spans, strict=True)))


class _Span(NamedTuple):
    """The rows or columns that one position of a kernel sees, those that it adds to, and how many the latter leave out
    before and after."""

    seen: slice
    written: slice
    left_out: tuple[int, int]


def _spans(x: jax.Array, size: int) -> list[tuple[_Span, _Span]]:
    """Rows and columns for each position of a kernel, without padding, which is much of a tiny map."""

    def along(length):
        for shift in range(-(size // 2), size // 2 + 1):
            before, after = min(length, max(0, -shift)), min(length, max(0, shift))
            yield _Span(slice(after, length - before), slice(before, length - after), (before, after))

    return list(itertools.product(along(x.shape[1]), along(x.shape[2])))


def _suits_winograd(x: jax.Array, kernel_shape: tuple[int, ...]) -> bool:
    size, fewest_channels = kernel_shape[0], min(kernel_shape[2:])
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
    padded = _pad(x, size)
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
        kernel = kernel.swapaxes(2, 3)
    kernels = transform(kernel_matrix, kernel).reshape(36, *kernel.shape[2:])
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


def _fastest_products(kernel: jax.Array):
    """`a @ b` for stacks of matrices: one after the other VGG's BP step takes 62 instead of 68 ms, but that of LeNet,
    whose matrices are narrow, 38 instead of 34."""
    return jnp.matmul if kernel.shape[0] == 5 else lambda a, b: jnp.stack([p @ q for p, q in zip(a, b, strict=True)])


def _bilinear(name: str, plain, cpu) -> Primitive:
    """A JAX primitive that is `cpu` on the CPU and `plain` elsewhere and under `jax.vmap`."""
    primitive = Primitive(name)
    primitive.def_impl(functools.partial(xla.apply_primitive, primitive))

    @primitive.def_abstract_eval
    def shape_and_dtype(*args, **params):
        result = jax.eval_shape(functools.partial(plain, **params), *args)
        return ShapedArray(result.shape, result.dtype)

    def over_new_axes(args, axes, **params):
        return jax.vmap(functools.partial(plain, **params), axes)(*args), 0

    batching.primitive_batchers[primitive] = over_new_axes
    mlir.register_lowering(primitive, mlir.lower_fun(plain, multiple_results=False))
    mlir.register_lowering(primitive, mlir.lower_fun(cpu, multiple_results=False), platform="cpu")
    return primitive


_conv = _bilinear("conv", _plain_conv, _cpu_conv)
_conv_transpose = _bilinear("conv_transpose", _plain_conv_transpose, _cpu_conv_transpose)
_kernel_gradient = _bilinear("conv_kernel_gradient", _plain_kernel_gradient, _cpu_kernel_gradient)

# Each takes the cotangent and both arguments, and returns the gradient of the first and of the second one.
ad.defbilinear(
    _conv,
    lambda y, x, kernel: _conv_transpose.bind(y, kernel),
    lambda y, x, kernel: _kernel_gradient.bind(x, y, size=kernel.aval.shape[0], transpose=False),
)
ad.defbilinear(
    _conv_transpose,
    lambda x, y, kernel: _conv.bind(x, kernel),
    lambda x, y, kernel: _kernel_gradient.bind(x, y, size=kernel.aval.shape[0], transpose=True),
)
ad.defbilinear(
    _kernel_gradient,
    lambda kernel, x, y, size, transpose: _conv_transpose.bind(y, kernel),
    lambda kernel, x, y, size, transpose: _conv.bind(x, kernel),
)
