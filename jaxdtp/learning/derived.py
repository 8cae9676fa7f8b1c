"""Feedback derived from any function, as `jax.grad` derives a gradient.

`with_feedback(f)` has the value of f and another derivative. Wherever a parameter W meets the input x in a linear
operation y = op(x, W) (matrix product, einsum, convolution), there is a second, feedback weight O of W's shape, and

    dy = op(dx, O) + op(x, dW)

so that in reverse mode errors go down through O, and W gets its local gradient: the activity before times the error
behind it. Everything else, slopes, normalisation, attention, pooling, biases, scales, is that of the forward pass. With
O = W it is `jax.vjp`; with any other O no weight of a linear operation is used on the way down. A product that is
written as multiplication and sum isn't seen as one: its factors count as scales.

The function is traced, and its operations are walked (`jaxdtp.learning.walk`) with three kinds of values: those that
depend on nothing; `Weight`, on parameters alone, which come as a forward and a feedback value (so that reshaped, cast
or normalised kernels are met as what they have become); and `Signal`, on the input. The same walk without signals finds
the layers (`layers_of`).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxdtp.learning.values import Absent, Signal, Weight, forward_value, parameter_names
from jaxdtp.learning.walk import Layer, Walk
from jaxdtp.models import jaxprs

Function = Callable[[Any, Any], Any]
"""f(params, x), pytrees of arrays to a pytree of arrays."""


def with_feedback(f: Function) -> Callable[[Any, Any, Any], Any]:
    """g(params, feedback_params, x) with the value of f(params, x), whose derivative along x goes through the feedback
    parameters wherever a parameter meets x in a linear operation, and whose derivative along params is the local one.

    Args:
        f: `f(params, x)`, any function of pytrees that JAX can trace; for a Flax module
            `lambda params, x: module.apply({"params": params}, x)`.

    Returns:
        A function of params, feedback_params (a tree like params, as from `init_feedback`) and x. It can be jitted,
        differentiated and batched. Its value doesn't depend on feedback_params, but its derivatives do.

    Raises:
        ValueError: when called, if feedback_params isn't like params, or a parameter meets x in an operation that this
            can't be done for; names both.
    """

    @functools.wraps(f)
    def g(params: Any, feedback_params: Any, x: Any) -> Any:
        _check_alike(params, feedback_params)
        closed, together = jaxprs.trace(f, params, x)
        weights = [
            Weight(forward, feedback, frozenset((index,)))
            for index, (forward, feedback) in enumerate(
                zip(jax.tree.leaves(params), jax.tree.leaves(feedback_params), strict=True)
            )
        ]
        signals = [Signal(jnp.asarray(leaf)) for leaf in jax.tree.leaves(x)]
        walk = Walk(parameter_names(params), evaluate=True)
        outputs = walk.run(closed.jaxpr, closed.consts, weights + signals)
        return together([forward_value(output) for output in outputs])

    return g


def layers_of(f: Function, params: Any, x: Any) -> tuple[list[Layer], Callable[[Any], list[jax.Array]]]:
    """The linear operations of f(params, x) in which parameters meet the input, each weight once.

    Args:
        f: as for `with_feedback`.
        params, x: arrays, or their shapes and types.

    Returns:
        The layers, and a function from parameters to each layer's weight, as it comes to the operation.
    """
    x = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), x)
    names = parameter_names(params)
    layers: list[Layer] = []

    def weights_of(params: Any) -> list[jax.Array]:
        closed = jax.make_jaxpr(f)(params, x)
        weights = [Weight(leaf, None, frozenset((index,))) for index, leaf in enumerate(jax.tree.leaves(params))]
        signals = [Absent(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(x)]
        walk = Walk(names, evaluate=False)
        walk.run(closed.jaxpr, closed.consts, weights + signals)
        layers[:] = walk.layers
        return walk.found

    jax.eval_shape(weights_of, params)
    return list(layers), weights_of


def _check_alike(params: Any, feedback_params: Any) -> None:
    """Raise ValueError where feedback parameters aren't like the forward ones."""
    forward, feedback = (
        dict(zip(parameter_names(tree), map(jnp.shape, jax.tree.leaves(tree)), strict=True))
        for tree in (params, feedback_params)
    )
    for name in forward | feedback:
        found, expected = feedback.get(name, "missing"), forward.get(name, "no such parameter")
        if found != expected:
            raise ValueError(
                f"feedback parameter {name}: got {found}; allowed: {expected}, in a tree like params, as from "
                "init_feedback"
            )
