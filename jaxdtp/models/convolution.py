"""Stride-1 'SAME' convolution and its transpose, and the place that knows which platform they run on.

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
- a 5x5 convolution of an image of 3 channels: 16 to 22; one product of windows and kernel: 50, on slower cores.

From 32 channels on Winograd's algorithm does with a quarter of the multiplications (5x5 kernels: a sixth). On cores
where a matrix product reaches 134 it comes, by the operations of the definition, to 132, 164 and 94 for LeNet's second
convolution (5x5, batch 32), its transpose and its kernel gradient, where those above come to 55, 54 and 31; for a 3x3
one of 128 channels on maps of 16 pixels to 127, 125 and 157 instead of 96, 85 and 60. Kernel gradients of 16 to 31
channels take 0.5 to 0.8 times as long by it as by windows or taps. On maps of 4 and 2 pixels convolutions do without
the products with padding. What is much larger than caches is done in blocks of examples: at a batch of 256
LeNet's second convolution then comes to 167, 142 and 147 instead of 72, 115 and 96.
"""

import functools
import itertools
import math
import os
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla
from jaxtyping import Array, Float, Shaped

TILE = 4
"""Pixels along each axis of what Winograd's algorithm computes at a time."""

BLOCK = 100_000
"""Numbers that go into a convolution and come out of it at a time, for each core."""


def conv(
    x: Shaped[Array | np.ndarray, "batch height width inputs"],
    kernel: Float[Array | np.ndarray, "size size inputs outputs"],
) -> Float[Array, "batch height width outputs"]:
    """Convolution with stride 1 that keeps height and width (zero padding).

    Args:
        x: [batch, height, width, inputs], channels last, of any type.
        kernel: [size, size, inputs, outputs], `size` odd: Flax's layout.

    Returns:
        [batch, height, width, outputs].
    """
    x, kernel = (jnp.asarray(array, jnp.result_type(x, kernel)) for array in (x, kernel))
    return _plain_conv(x, kernel) if _explicit(x, kernel) else _conv.bind(x, kernel)


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
    y, kernel = (jnp.asarray(array, jnp.result_type(y, kernel)) for array in (y, kernel))
    return _plain_conv_transpose(y, kernel) if _explicit(y, kernel) else _conv_transpose.bind(y, kernel)


def _explicit(*arrays: jax.Array | np.ndarray) -> bool:
    """Whether types say how arrays are divided among devices (JAX's explicit sharding), which the primitives can't."""
    meshes = [jax.typeof(array).sharding.mesh for array in arrays]
    return any(kind == jax.sharding.AxisType.Explicit for mesh in meshes for kind in mesh.axis_types)


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
    return _transposed(lambda x: _plain_conv(x, kernel), x, y)


def _plain_kernel_gradient(x: jax.Array, y: jax.Array, size: int, transpose: bool) -> jax.Array:
    """Transpose of `conv` with respect to its kernel: <conv(x, kernel), y> = <kernel, kernel_gradient(x, y)>.

    `transpose` tells whether it is wanted beside `conv_transpose(y, kernel)` or `conv(x, kernel)`, to share their work.
    """
    kernel = jax.ShapeDtypeStruct((size, size, x.shape[-1], y.shape[-1]), x.dtype)
    return _transposed(lambda kernel: _plain_conv(x, kernel), kernel, y)


def _transposed(f: Callable, like: jax.ShapeDtypeStruct, y: jax.Array) -> jax.Array:
    """What the transpose of the linear map f, of an argument like that, makes of y."""
    (result,) = jax.linear_transpose(f, like)(y)
    return result


def _cpu_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    if _suits_taps(x, kernel.shape):
        return _sum_over_taps(x, _split_taps(kernel))
    if _suits_winograd(x, kernel.shape):
        return _winograd(False, x, kernel)
    return _product_of_windows(x, kernel) if _suits_windows(x, kernel.shape, 4) else _plain_conv(x, kernel)


def _cpu_conv_transpose(y: jax.Array, kernel: jax.Array) -> jax.Array:
    if _suits_taps(y, kernel.shape):
        return _sum_over_taps(y, [tap.T for tap in reversed(_split_taps(kernel))])
    if _suits_winograd(y, kernel.shape):
        return _winograd(True, y, kernel)
    return _plain_conv(y, jnp.flip(kernel, (0, 1)).swapaxes(2, 3))


def _cpu_kernel_gradient(x: jax.Array, y: jax.Array, size: int, transpose: bool) -> jax.Array:
    shape = (size, size, x.shape[-1], y.shape[-1])
    blocks = _blocks(x, shape)
    # Faster than taps also on maps of 4x4 pixels, and than windows with 16 channels, where the convolution is not.
    if _suits_winograd(x, shape, fewest_channels=16):
        points, swapped = size + TILE - 1, x.shape[-1] > y.shape[-1]

        def by_winograd(x, y):
            seen, written = (y, x) if transpose else (x, y)
            inputs = _at_points(seen, points)
            products = jax.ShapeDtypeStruct((*inputs.shape[:2], written.shape[-1]), x.dtype)
            outputs = _transposed(lambda products: _from_points(products, written.shape[:3]), products, written)
            # A product with fewer rows than columns takes 0.5 to 0.9 times as long as its transpose.
            few, many = (outputs, inputs) if swapped != transpose else (inputs, outputs)
            kernels = jax.lax.dot_general(few, many, (((1,), (1,)), ((0,), (0,))))
            return kernels.reshape(points, points, *kernels.shape[1:])

        kernel = jax.ShapeDtypeStruct((size, size, *sorted(shape[2:])), x.dtype)
        kernels = _sum_of_blocks(by_winograd, blocks, x, y)
        gradient = _transposed(functools.partial(_kernel_at_points, transpose), kernel, kernels)
        return gradient.swapaxes(2, 3) if swapped else gradient
    if _suits_windows(x, shape, 16):

        def by_windows(x, y):
            kernel = jax.ShapeDtypeStruct(shape, x.dtype)
            return _transposed(lambda kernel: _product_of_windows(x, kernel), kernel, y)

        return _sum_of_blocks(by_windows, blocks, x, y)

    # Not the transpose of the sum over taps, which would transpose each product again.
    def by_tap(x, y):
        taps = [
            _as_matrix(x[:, rows.seen, columns.seen]).T @ _as_matrix(y[:, rows.written, columns.written])
            for rows, columns in _spans(x, size)
        ]
        return jnp.stack(taps).reshape(shape)

    return _sum_of_blocks(by_tap, blocks, x, y)


def _blocks(x: jax.Array, kernel_shape: tuple[int, ...]) -> int:
    """How many blocks of examples a convolution is divided into where what goes into it and comes out of it is much
    more than caches hold: there memory costs more than products. As each block meets the whole kernel, which Winograd's
    algorithm makes four times as large, it isn't smaller than that."""
    batch, height, width, _ = x.shape
    block = max(BLOCK * (os.cpu_count() or 1), 4 * math.prod(kernel_shape))
    most = max(1, block // (height * width * sum(kernel_shape[2:])))
    if batch < 8 * most:
        return 1
    return next(count for count in range(1, batch + 1) if batch % count == 0 and batch // count <= most)


def _sum_of_blocks(f: Callable[..., jax.Array], blocks: int, *arrays: jax.Array) -> jax.Array:
    if blocks == 1:
        return f(*arrays)
    divided = [array.reshape(blocks, -1, *array.shape[1:]) for array in arrays]
    first = f(*(array[0] for array in divided))
    return jax.lax.fori_loop(1, blocks, lambda index, total: total + f(*(array[index] for array in divided)), first)


def _suits_taps(x: jax.Array, kernel_shape: tuple[int, ...]) -> bool:
    # Of tiny maps much is padding; and where channels are many, Winograd's transform of the kernel outweighs them.
    return max(x.shape[1:3]) <= (4 if _suits_winograd(x, kernel_shape) else 2)


def _suits_windows(x: jax.Array, kernel_shape: tuple[int, ...], most_channels: int) -> bool:
    return x.shape[-1] <= most_channels and kernel_shape[0] > 1


def _as_matrix(x: jax.Array) -> jax.Array:
    # XLA is slower at contracting several axes.
    return x.reshape(-1, x.shape[-1])


def _product_of_windows(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """One matrix product for the outputs of `size - 1` neighbouring columns at once: where channels are few, what one
    output sees in a row is too short to be copied fast, and so is what they all see. Zeros in the kernel cost less."""
    batch, height, width, channels = x.shape
    size, margin, step = kernel.shape[0], kernel.shape[0] // 2, kernel.shape[0] - 1
    cells = -(-width // step)
    padded = jnp.pad(x, ((0, 0), (margin, margin), (margin, margin + cells * step - width), (0, 0)))
    rows = padded.reshape(batch, height + step, cells + 1, step * channels)
    windows = [rows[:, i : i + height, j : j + cells] for i, j in itertools.product(range(size), range(2))]
    kernels = [jnp.pad(kernel, ((0, 0), (j, step - 1 - j), (0, 0), (0, 0))) for j in range(step)]
    products = _as_matrix(jnp.concatenate(windows, -1)) @ jnp.stack(kernels, 3).reshape(-1, step * kernel.shape[-1])
    return products.reshape(batch, height, cells * step, -1)[:, :, :width]


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


def _suits_winograd(x: jax.Array, kernel_shape: tuple[int, ...], fewest_channels: int = 32) -> bool:
    size, channels, (height, width) = kernel_shape[0], min(kernel_shape[2:]), x.shape[1:3]
    in_tiles = math.prod(-(-length // TILE) * TILE for length in (height, width))
    return len(x) > 0 and size in (3, 5) and channels >= fewest_channels and in_tiles <= 1.5 * height * width


def _winograd(transpose: bool, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Winograd's algorithm for tiles of 4x4 outputs (Lavin & Gray 2016, "Fast Algorithms for Convolutional Neural
    Networks", section 4): 36 multiplications for a 3x3 kernel instead of 144, 64 for a 5x5 kernel instead of 400. In
    float32 its rounding errors are about seven times those of the plain convolution, 3e-6 of the result's size.
    """
    kernels = _kernel_at_points(transpose, kernel.swapaxes(2, 3) if transpose else kernel)
    points = len(kernels)

    def of_block(x):
        products = _at_points(x, points) @ kernels.reshape(points**2, *kernels.shape[2:])
        return _from_points(products, x.shape[:3])

    blocks = x.reshape(_blocks(x, kernel.shape), -1, *x.shape[1:])
    return jax.lax.map(of_block, blocks).reshape(*x.shape[:3], -1)


def _kernel_at_points(flip: bool, kernel: jax.Array) -> jax.Array:
    """A kernel at the points of Winograd's algorithm, [points, points, *channels]."""
    _, of_kernel, _ = _winograd_matrices(len(kernel))
    if flip:
        of_kernel = of_kernel[:, ::-1]
    return _combinations(of_kernel, _unstack(_combinations(of_kernel, _unstack(kernel)), 1))


def _at_points(x: jax.Array, points: int) -> jax.Array:
    """The tiles of a map at the points, [points**2, tiles, channels]."""
    margin = (points - TILE) // 2
    of_inputs, _, _ = _winograd_matrices(points - TILE + 1)
    padded = jnp.pad(x, ((0, 0), *((margin, margin + -length % TILE) for length in x.shape[1:3]), (0, 0)))
    height, width = (length - 2 * margin for length in padded.shape[1:3])
    inputs = _combinations(of_inputs, [padded[:, i : i + height : TILE] for i in range(points)])
    inputs = _combinations(of_inputs, [inputs[..., j : j + width : TILE, :] for j in range(points)])
    return inputs.reshape(points**2, -1, x.shape[-1])


def _from_points(products: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    """The map of [*shape, channels], its shape [batch, height, width], that products at the points come to."""
    points, (batch, height, width) = math.isqrt(len(products)), shape
    rows, columns = -(-height // TILE), -(-width // TILE)
    _, _, of_outputs = _winograd_matrices(points - TILE + 1)
    products = products.reshape(points, points, batch, rows, columns, -1)
    outputs = _combinations(of_outputs, _unstack(_combinations(of_outputs, _unstack(products)), 1))
    outputs = outputs.transpose(2, 3, 0, 4, 1, 5).reshape(batch, rows * TILE, columns * TILE, -1)
    return outputs[:, :height, :width]


@functools.cache
def _winograd_matrices(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Transforms of inputs, kernel and products along one axis: [points, points], [points, size], [4, points].

    A convolution as a product of polynomials: both are evaluated at 0, 1, -1, 2, -2, 1/2, -1/2 and infinity (or as many
    of them as are needed), multiplied there, and interpolated; here its transpose.
    """
    points = TILE + size - 1
    finite = np.array([0, 1, -1, 2, -2, 1 / 2, -1 / 2])[: points - 1, None]

    def powers(count):
        # Of infinity only the highest one counts.
        return np.concatenate([finite ** np.arange(count), np.eye(count)[-1:]])

    of_inputs = np.linalg.inv(powers(points)).T
    of_inputs[np.abs(of_inputs) < 1e-9] = 0
    scale = np.abs(of_inputs).max(axis=1, keepdims=True)
    return of_inputs / scale, scale * powers(size), powers(TILE).T


def _combinations(matrix: np.ndarray, parts: list[jax.Array]) -> jax.Array:
    """Sums of parts, weighted by each row of a matrix with zeros, along a new first axis: one loop for XLA, where a
    matrix product would need copies of the parts side by side."""
    sums = [
        functools.reduce(jnp.add, (float(weight) * part for weight, part in zip(row, parts, strict=True) if weight))
        for row in matrix
    ]
    return jnp.stack(sums)


def _unstack(values: jax.Array, axis: int = 0) -> list[jax.Array]:
    # Not by indices, whose transposes are paddings and sums.
    return [jnp.squeeze(part, axis) for part in jnp.split(values, values.shape[axis], axis)]


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
