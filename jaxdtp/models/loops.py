"""Gradients of the kernels of plain convolutions, which XLA computes 20 to 60 times slower in loops on the CPU (jaxlib
0.10: at 1 to 2 GFLOP/s, where a matrix product reaches 180). `jaxdtp.models.convolution` has convolutions that are fast
there; what users bring is XLA's own, of any stride, padding, dilation and groups.
"""

import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxdtp.models import jaxprs


def has_convolutions(jaxpr: core.Jaxpr) -> bool:
    """Whether XLA's convolutions are in a program, or in the programs within."""
    return any(
        equation.primitive.name == "conv_general_dilated" or any(map(has_convolutions, jaxprs.inside(equation)))
        for equation in jaxpr.eqns
    )


def slow_in_loops(program: core.ClosedJaxpr) -> bool:
    """Whether a program is to be called again and again, rather than put into a loop."""
    return jax.default_backend() == "cpu" and has_convolutions(program.jaxpr)


def fast_in_loops(f: Callable) -> Callable:
    """f for a loop's body: with other kernel gradients where those of XLA are slow there.

    One matrix product for each position of a kernel (tap) takes 0.2 to 1.5 times XLA's time outside of loops (2.6 with
    16 channels), and 0.01 to 0.03 times that inside (2 cores, jaxlib 0.10). So loops that can be left are better left
    (`slow_in_loops`); this is for those that can't, of feedback training within a step.
    """
    if jax.default_backend() != "cpu":
        return f

    @functools.wraps(f)
    def g(*args):
        closed, together = jaxprs.trace(f, *args)
        return together(_run(closed.jaxpr, closed.consts, jax.tree.leaves(args)))

    return g


def _run(jaxpr: core.Jaxpr, consts: list, args: list) -> list:
    def apply(equation: core.JaxprEqn, operands: list) -> list:
        if _is_kernel_gradient(equation):
            return [_by_tap(equation, *operands)]
        if equation.primitive.name in ("jit", "pjit"):
            return _run(*jaxprs.opened(equation), operands)
        return jaxprs.evaluate(jaxpr, equation.replace(params=_within(equation.params)), operands)

    return jaxprs.run(jaxpr, consts, args, apply)


def _within(params: dict) -> dict:
    """An equation's parameters, with other kernel gradients in the programs among them."""

    def changed(value):
        if type(value) is tuple:  # not of names
            return tuple(map(changed, value))
        if isinstance(value, core.ClosedJaxpr):
            run = lambda *args: _run(value.jaxpr, value.consts, args)  # noqa: E731
            return jax.make_jaxpr(run)(*(jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in value.in_avals))
        return changed(core.ClosedJaxpr(value, [])).jaxpr if isinstance(value, core.Jaxpr) else value

    return {name: changed(value) for name, value in params.items()}


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
