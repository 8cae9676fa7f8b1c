"""XLA's own convolutions, of any stride, padding, dilation and groups, which is what users bring, on the CPU.

There XLA computes the gradient of a kernel slowly: in loops at 1 to 2 GFLOP/s (jaxlib 0.10), where a matrix product
reaches 130 to 500; outside of loops from 2 on, on maps of 32x32 pixels, to 60. Three things help: what could be a
`convolution.conv` or a matrix product becomes one (`with_fast_convolutions`), what isn't is kept out of loops
(`slow_in_loops`), and in loops that can't be left, those of feedback training within a step, it has other kernel
gradients (`fast_in_loops`). By the first a BP step of ResNet-20 takes 0.4 to 0.8 times as long, of ResNet-18 0.2 to 0.6
times; of the vision transformer for MNIST, whose patches become a product, 0.7 times with 32 and 64 images, and as long
as before with 128.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend import core

from jaxdtp.models import jaxprs
from jaxdtp.models.convolution import conv


def with_fast_convolutions(f: Callable, *like: Any) -> Callable:
    """f with `convolution.conv` in place of convolutions that are the same, of stride 1, that keep height and width,
    and a matrix product in place of those whose windows don't overlap: patches, and shortcuts of residual networks.
    Without these, for arguments like those given, f itself, which isn't traced once more each time."""
    wanted = lambda equation: _fast_form(equation) is not None  # noqa: E731
    if jax.default_backend() != "cpu" or not jaxprs.holds(jax.make_jaxpr(f)(*like).jaxpr, wanted):
        return f
    return jaxprs.rewritten(f, wanted, lambda equation, *xs: cast(Callable, _fast_form(equation))(equation, *xs))


def has_convolutions(jaxpr: core.Jaxpr) -> bool:
    """Whether XLA's convolutions are in a program, or in the programs within."""
    return jaxprs.holds(jaxpr, lambda equation: equation.primitive.name == "conv_general_dilated")


def slow_in_loops(program: core.ClosedJaxpr) -> bool:
    """Whether a program is to be called again and again, rather than put into a loop."""
    return jax.default_backend() == "cpu" and has_convolutions(program.jaxpr)


def fast_in_loops(f: Callable) -> Callable:
    """f for a loop's body: with one matrix product for each position of a kernel (tap) where XLA sums over examples.

    On a machine whose products reach 180 GFLOP/s that takes 0.01 to 0.03 times XLA's time in loops (2 cores, jaxlib
    0.10), and 0.2 to 1.5 times it outside (2.6 with 16 channels).
    """
    return jaxprs.rewritten(f, _is_kernel_gradient, _by_tap) if jax.default_backend() == "cpu" else f


def _fast_form(equation: core.JaxprEqn) -> Callable | None:
    """What is the same as a convolution, and faster: `form(equation, x, kernel)`; None where it isn't known."""
    if not _is_plain(equation):
        return None
    size, params = jaxprs.shaped(equation.invars[1]).shape[:-2], equation.params
    strides = params["window_strides"]
    keeps_size = params["padding"] == tuple((length // 2, length // 2) for length in size)
    if strides == (1, 1) and size[0] == size[1] and size[0] % 2 == 1 and keeps_size:
        return lambda equation, x, kernel: conv(x, kernel)
    return _by_cell if all(length <= stride for length, stride in zip(size, strides, strict=True)) else None


def _is_plain(equation: core.JaxprEqn) -> bool:
    """Whether an equation is a convolution in Flax's layout, without dilation and groups, of one type that Winograd's
    algorithm is for. Its primitive can't say how JAX's explicit sharding, or the checks of `jax.shard_map`, divide its
    result."""
    if equation.primitive.name != "conv_general_dilated":
        return False
    x, kernel, y = map(jaxprs.shaped, (*equation.invars, *equation.outvars))
    params, numbers, last = equation.params, equation.params["dimension_numbers"], x.ndim - 1
    space = range(1, last)
    return (
        numbers.lhs_spec == numbers.out_spec == (0, last, *space)
        and numbers.rhs_spec == (last, last - 1, *range(last - 1))
        and params["lhs_dilation"] == params["rhs_dilation"] == (1,) * len(space)
        and params["feature_group_count"] == params["batch_group_count"] == 1
        and x.dtype == kernel.dtype == y.dtype
        and x.dtype in ("float32", "float64")
        and all(map(_left_to_compiler, (x, kernel, y)))
    )


def _left_to_compiler(array: ShapedArray) -> bool:
    """Whether it is the compiler that decides how an array is divided among devices, with or without a mesh."""
    automatic = all(kind == jax.sharding.AxisType.Auto for kind in array.sharding.mesh.axis_types)
    return automatic and array.strip_weak_type() == ShapedArray(array.shape, array.dtype, sharding=array.sharding)


def _by_cell(equation: core.JaxprEqn, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A convolution whose windows don't overlap: x is divided into cells, a stride each, that begin with a window."""
    params, space = equation.params, range(1, x.ndim - 1)
    counts = jaxprs.shaped(equation.outvars[0]).shape[1:-1]
    padding, shape, window = [], [len(x)], [slice(None)]
    for axis, count, stride, (low, _) in zip(space, counts, params["window_strides"], params["padding"], strict=True):
        padding.append((low, count * stride - low - x.shape[axis], 0))
        shape += [count, stride]
        window += [slice(None), slice(kernel.shape[axis - 1])]
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *padding, (0, 0, 0)])
    windows = x.reshape(*shape, x.shape[-1])[*window]
    windows = windows.transpose(0, *range(1, windows.ndim - 1, 2), *range(2, windows.ndim, 2), windows.ndim - 1)
    seen = math.prod(kernel.shape[:-1])
    return jax.lax.dot_general(
        windows.reshape(len(x), *counts, seen),
        kernel.reshape(seen, kernel.shape[-1]),
        (((x.ndim - 1,), (0,)), ((), ())),
        params["precision"],
        params["preferred_element_type"],
    )


def _is_kernel_gradient(equation: core.JaxprEqn) -> bool:
    """Whether an equation is a convolution that sums over examples, the first axis of its left operand."""
    params = equation.params
    return (
        equation.primitive.name == "conv_general_dilated"
        and params["dimension_numbers"].lhs_spec[1] == 0
        and params["feature_group_count"] == 1
    )


def _by_tap(equation: core.JaxprEqn, x: jax.Array, y: jax.Array) -> jax.Array:
    """A convolution of x with the large kernel y: one matrix product for each of its few results along space."""
    params = equation.params
    numbers, groups = params["dimension_numbers"], params["batch_group_count"]
    out = jaxprs.shaped(equation.outvars[0])
    x, y = x.transpose(numbers.lhs_spec), y.transpose(numbers.rhs_spec)  # [channels, examples, *space], both
    padding = [
        (low, high, inner - 1) for (low, high), inner in zip(params["padding"], params["lhs_dilation"], strict=True)
    ]
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), (0, 0, 0), *padding])
    y = y.reshape(groups, -1, *y.shape[1:])
    products = []
    for tap in itertools.product(*(range(out.shape[axis]) for axis in numbers.out_spec[2:])):
        seen = [
            slice(at * stride, at * stride + (length - 1) * step + 1, step)
            for at, stride, length, step in zip(
                tap, params["window_strides"], y.shape[3:], params["rhs_dilation"], strict=True
            )
        ]
        patch = x[:, :, *seen].reshape(groups, -1, *y.shape[2:])
        axes = tuple(range(2, y.ndim))
        product = jax.lax.dot_general(
            patch, y, ((axes, axes), ((0,), (0,))), params["precision"], params["preferred_element_type"]
        )
        products.append(product.swapaxes(0, 1).reshape(product.shape[1], -1))
    space = [out.shape[axis] for axis in numbers.out_spec[2:]]
    results = jnp.stack(products, axis=-1).reshape(*products[0].shape, *space)
    return results.transpose([numbers.out_spec.index(axis) for axis in range(results.ndim)]).astype(out.dtype)
