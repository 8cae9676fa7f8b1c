"""The walk over a traced function that finds where parameters meet the input, and gives them feedback weights there."""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxdtp.learning.values import (
    ELSEWHERE,
    Absent,
    Signal,
    Weight,
    as_carried,
    forward_value,
    in_loop,
    promoted,
    same_kind,
)
from jaxdtp.models import jaxprs

LINEAR = {
    "dot_general": "matrix product",
    "conv_general_dilated": "convolution",
    "conv": "convolution",
    "conv_transpose": "transposed convolution",
}
"""Operations in which a parameter gets a feedback weight; the last two are those of `jaxdtp.models.convolution`."""

_SINGLE = frozenset(
    word
    for words in (
        "add add_any sub mul div rem pow atan2 max min clamp nextafter complex select_n",
        "eq ne lt le gt ge and or xor",
        "concatenate pad gather dynamic_slice dynamic_update_slice",
        "scatter scatter-add scatter_add scatter-sub scatter_mul scatter_min scatter_max sort",
    )
    for word in words.split()
)
"""Operations in which a parameter meets the input and stays single: biases, scales, embeddings, tokens."""

_CALLS = ("jit", "pjit", "closed_call", "core_call")

_AFFINE = frozenset(
    word
    for words in (
        "reshape transpose squeeze expand_dims broadcast_in_dim convert_element_type slice copy rev concatenate pad",
        "add add_any sub neg reduce_sum cumsum gather dynamic_slice stop_gradient sharding_constraint",
    )
    for word in words.split()
)
"""Operations on parameters that are affine in all of them."""

_SCALING = ("mul", "div", "dot_general", "select_n", "dynamic_update_slice")
"""Operations that are affine in a parameter which is none of the others' factor, divisor or choice."""

_WITHIN = ("checkpoint", "remat", "remat2", "scan", "cond")
"""Programs that are gone through where parameters, or what the input has chosen of them, may meet the input."""

_OWN_DERIVATIVE = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")


class Layer(NamedTuple):
    """A linear operation in which parameters meet the input.

    Attributes:
        product: `product(signal, weight)`, bilinear.
        signal: shape and type of the signal.
        examples: axes of the signal that count examples or positions, and may have any length.
        weight: shape and type of the weight.
        out: shape of the product.
        fan_in: how many of its weights meet in one unit of the product.
        leaves: numbers of the parameters in its weight.
        operation: in words.
        affine: whether its weight is an affine function of the parameters.
        loops: lengths of the loops that it is in, the outermost first: leading axes of what `layers_of` gives for it.
    """

    product: Callable[[jax.Array, jax.Array], jax.Array]
    signal: jax.ShapeDtypeStruct
    examples: tuple[int, ...]
    weight: jax.ShapeDtypeStruct
    out: tuple[int, ...]
    fan_in: int
    leaves: frozenset[int]
    operation: str
    affine: bool = True
    loops: tuple[int, ...] = ()


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _two_weights(product: Callable, signal: jax.Array, forward: jax.Array, feedback: jax.Array) -> jax.Array:
    return product(signal, forward)


@_two_weights.defjvp
def _two_weights_jvp(product, primals, tangents):
    signal, forward, feedback = primals
    d_signal, d_forward, _ = tangents
    return product(signal, forward), product(d_signal, feedback) + product(signal, d_forward)


class Walk:
    """A walk over a jaxpr; it collects the layers unless it evaluates."""

    def __init__(self, names: list[str], evaluate: bool, loop: int = 0):
        self.names, self.evaluate, self.loop = names, evaluate, loop
        self.layers: list[Layer] = []
        self.found: list[jax.Array] = []
        self.seen: dict[Any, Any] = {}

    def run(self, jaxpr: core.Jaxpr, consts: list, args: list) -> list:
        """The results of a program."""
        return jaxprs.run(jaxpr, consts, args, functools.partial(self.apply, jaxpr))

    def apply(self, jaxpr: core.Jaxpr, equation: core.JaxprEqn, operands: list) -> list:
        """The results of one equation."""
        weights = [operand for operand in operands if isinstance(operand, Weight)]
        signals = [operand for operand in operands if isinstance(operand, Signal | Absent)]
        name = equation.primitive.name
        chosen = frozenset().union(*(signal.chosen for signal in signals))
        # What the input has chosen is that still, whatever becomes of it, until other data have a part in it.
        still = chosen if all(signal.chosen for signal in signals) else frozenset()
        if name == "optimization_barrier":
            return list(operands)
        if name in _CALLS and (weights or chosen):
            return self.run(*jaxprs.opened(equation), operands)
        if name in LINEAR and len(signals) == 2 and chosen:
            raise ValueError(
                f"parameter {self.named(chosen)}: the input chooses which, and meets it in a {LINEAR[name]}, where its "
                "feedback can't be derived; allowed: products with all of them, and a choice among these"
            )
        if not weights and not (chosen and name in _WITHIN):
            results = self.data(jaxpr, equation, operands)
            return [result.replace(chosen=still) for result in results] if still else results
        if not signals:
            return self.weights(jaxpr, equation, operands, weights)
        if name in ("checkpoint", "remat", "remat2"):
            run = lambda *operands: self.run(*jaxprs.opened(equation), operands)  # noqa: E731
            if self.evaluate:
                run = jax.checkpoint(run, policy=equation.params["policy"], prevent_cse=equation.params["prevent_cse"])
            return run(*operands)
        if name == "scan":
            return self.scan(equation, operands)
        if name == "cond":
            return self.cond(equation, operands)
        if name in LINEAR and len(operands) == 2 and len(weights) == 1:
            return [self.linear(jaxpr, equation, operands)]
        inside = self.layers_inside(equation, operands) if name in _OWN_DERIVATIVE else []
        if inside or (name not in _SINGLE and name not in _OWN_DERIVATIVE):
            met = self.named(leaf for weight in weights for leaf in weight.leaves)
            what = f"a {inside[0].operation} inside {name}" if inside else name
            raise ValueError(
                f"parameter {met}: meets the input in {what}, where its feedback can't be derived; allowed: "
                f"{', '.join(sorted(set(LINEAR.values())))}, with scan, cond, remat and jit around them, and biases, "
                "scales and embeddings"
            )
        results = self.data(jaxpr, equation, [forward_value(operand) for operand in operands], signals=True)
        among = operands[1:] if name == "select_n" else operands[:1]
        by_choice = not any(isinstance(operand, Signal | Absent) for operand in among)
        if name in ("gather", "dynamic_slice", "select_n") and by_choice:
            still = frozenset().union(*(weight.leaves for weight in weights))
        return [result.replace(chosen=still) for result in results] if still else results

    def named(self, leaves: Iterable[int]) -> str:
        """Parameters in words."""
        return ", ".join(sorted({self.names[leaf] for leaf in leaves}))

    def data(self, jaxpr: core.Jaxpr, equation: core.JaxprEqn, operands: list, signals: bool = False) -> list:
        """An equation in which nothing is met, or what is met stays single."""
        signals = signals or any(isinstance(operand, Signal | Absent) for operand in operands)
        if signals and not self.evaluate:
            return [Absent(shaped.shape, shaped.dtype) for shaped in map(jaxprs.shaped, equation.outvars)]
        results = jaxprs.evaluate(jaxpr, equation, [forward_value(operand) for operand in operands])
        return [Signal(result) for result in results] if signals else results

    def weights(self, jaxpr: core.Jaxpr, equation: core.JaxprEqn, operands: list, weights: list[Weight]) -> list:
        """An equation of parameters alone, for both sides."""
        leaves, loop = frozenset().union(*(weight.leaves for weight in weights)), max(w.loop for w in weights)
        forward = jaxprs.evaluate(jaxpr, equation, [forward_value(operand) for operand in operands])
        feedback = [None] * len(forward)
        if self.evaluate:
            of_feedback = [operand.feedback if isinstance(operand, Weight) else operand for operand in operands]
            feedback = jaxprs.evaluate(jaxpr, equation, of_feedback)
        name, places = equation.primitive.name, [isinstance(operand, Weight) for operand in operands]
        scaled = name in _SCALING and sum(places) == 1 and not (name == "div" and places[1])
        affine = all(weight.affine for weight in weights) and (name in _AFFINE or scaled)
        return [Weight(*sides, leaves, loop, affine) for sides in zip(forward, feedback, strict=True)]

    def linear(self, jaxpr: core.Jaxpr, equation: core.JaxprEqn, operands: list) -> Signal | Absent:
        """An operation with a forward and a feedback weight."""
        left = isinstance(operands[0], Weight)
        weight, signal = operands if left else operands[::-1]

        def product(signal: jax.Array, weight: jax.Array, **params: Any) -> jax.Array:
            operands = (weight, signal) if left else (signal, weight)
            return equation.primitive.bind(*operands, **equation.params | params)

        if self.evaluate:
            return Signal(_two_weights(product, signal.value, weight.forward, weight.feedback))
        if "preferred_element_type" in equation.params:
            # Whoever asks for the layers may want to use them at another precision.
            product = functools.partial(product, preferred_element_type=None)
        out = jaxprs.shaped(equation.outvars[0])
        # A module that is called twice has one weight, and wants one probe.
        place = (id(weight.forward), str(equation.params), left)
        if weight.loop == self.loop and place not in self.seen:
            self.seen[place] = weight.forward
            of_weight = jax.ShapeDtypeStruct(weight.forward.shape, weight.forward.dtype)
            of_signal = jax.ShapeDtypeStruct(signal.shape, signal.dtype)
            axes, fan_in = _example_axes(equation, len(signal.shape), left), _fan_in(equation, of_weight.shape, left)
            operation = LINEAR[equation.primitive.name]
            known = (weight.leaves, operation, weight.affine)
            layer = Layer(product, of_signal, axes, of_weight, out.shape, fan_in, *known)
            self.layers.append(layer)
            self.found.append(weight.forward)
        return Absent(out.shape, out.dtype)

    def layers_inside(self, equation: core.JaxprEqn, operands: list) -> list[Layer]:
        """The layers inside a function with its own derivative, which would hide them."""
        walk = Walk(self.names, evaluate=False)
        weights = [Weight(o.forward, None, o.leaves) if isinstance(o, Weight) else o for o in operands]
        absent = [Absent(o.value.shape, o.value.dtype) if isinstance(o, Signal) else o for o in weights]
        walk.run(*jaxprs.opened(equation), absent)
        return walk.layers

    def cond(self, equation: core.JaxprEqn, operands: list) -> list:
        """The results of branches."""
        index, *operands = operands

        def run(branch: core.ClosedJaxpr, *operands: Any) -> list:
            return self.run(branch.jaxpr, branch.consts, list(operands))

        branches = [functools.partial(run, branch) for branch in equation.params["branches"]]
        by_data = isinstance(index, Signal | Absent)
        if not self.evaluate:
            # The layers of all branches, whichever is taken.
            found = [branch(*operands) for branch in branches]
            like = _like_all(found)
            alike = [as_carried(results, like) for results in found]
            results = like if by_data else [_selected(index, of) for of in zip(*alike, strict=True)]
        else:
            like = _like_all([jax.eval_shape(branch, *operands) for branch in branches])

            def taken(branch: Callable, *operands: Any) -> list:
                return as_carried(branch(*operands), like)

            taken_by_branch = [functools.partial(taken, branch) for branch in branches]
            results = jax.lax.switch(forward_value(index), taken_by_branch, *operands)
        return [self.chosen(result) for result in results] if by_data else results

    def chosen(self, value: Any) -> Signal | Absent:
        """A value that the input decides to take."""
        if isinstance(value, Signal | Absent):
            return value
        array, leaves = forward_value(value), value.leaves if isinstance(value, Weight) else frozenset()
        return Signal(array, leaves) if self.evaluate else Absent(jnp.shape(array), jnp.result_type(array), leaves)

    def scan(self, equation: core.JaxprEqn, operands: list) -> list:
        """The results of a loop."""
        params = equation.params
        body, split = params["jaxpr"], _scan_split(equation)
        consts, carry, xs = operands[: split[0]], operands[split[0] : split[1]], operands[split[1] :]
        if not params["length"]:
            empty = map(jaxprs.shaped, equation.outvars[len(carry) :])
            return [*carry, *(jnp.zeros(shaped.shape, shaped.dtype) for shaped in empty)]
        carry = self.settled(body, consts, carry, xs)
        loop = self.loop + 1
        walks: list[Walk] = []

        def step(carry, xs):
            inner = Walk(self.names, self.evaluate, loop)
            walks.append(inner)
            results = inner.run(body.jaxpr, body.consts, [*consts, *in_loop(carry, loop), *in_loop(xs, loop)])
            carried, ys = results[: len(carry)], results[len(carry) :]
            return as_carried(carried, carry), (ys, inner.found)

        xs_within = [x.replace(shape=x.shape[1:]) if isinstance(x, Absent) else x for x in xs]
        present = [not isinstance(x, Absent) for x in xs]

        def step_present(carry, given):
            given = iter(given)
            return step(carry, [next(given) if here else x for here, x in zip(present, xs_within, strict=True)])

        options = {name: params[name] for name in ("length", "reverse", "unroll")}
        given = [x for x, here in zip(xs, present, strict=True) if here]
        carry, (ys, found) = jax.lax.scan(step_present, carry, given, **options)
        ys = [y.replace(shape=(params["length"], *y.shape)) if isinstance(y, Absent) else y for y in ys]
        if not self.evaluate:
            length = params["length"]
            self.layers += [layer._replace(loops=(length, *layer.loops)) for layer in walks[-1].layers]
            self.found += found
            # Weights that are the same each time are probed once, as if there were no loop.
            first = [
                jax.tree.map(lambda array: array[0], x) if h else x for x, h in zip(xs_within, present, strict=True)
            ]
            self.run(body.jaxpr, body.consts, [*consts, *in_loop(carry, ELSEWHERE), *in_loop(first, ELSEWHERE)])
        return [*in_loop(carry, self.loop), *in_loop(ys, self.loop)]

    def settled(self, body: core.ClosedJaxpr, consts: list, carry: list, xs: list) -> list:
        """A scan's carry, each value of the kind that it has after any number of steps."""
        while True:  # each time round more is known, of which there is an end
            within = [x.replace(shape=x.shape[1:]) if isinstance(x, Absent) else x for x in xs]

            def one(carry, within=within):
                sliced = [x if isinstance(x, Absent) else jax.tree.map(lambda array: array[0], x) for x in within]
                walk = Walk(self.names, self.evaluate, self.loop + 1)
                return walk.run(body.jaxpr, body.consts, [*consts, *carry, *sliced])[: len(carry)]

            after = jax.eval_shape(one, carry)
            merged = [promoted(value, like) for value, like in zip(carry, after, strict=True)]
            if all(same_kind(a, b) for a, b in zip(carry, merged, strict=True)):
                return merged
            carry = merged


def _like_all(branches: list[list]) -> list:
    """Results of the kind that each has in any branch."""
    return [functools.reduce(promoted, of_branches) for of_branches in zip(*branches, strict=True)]


def _selected(index: Any, of_branches: tuple) -> Any:
    """The result of the branch that is taken, of those that are alike; of signals only shape and type are known."""
    first = of_branches[0]
    if isinstance(first, Signal | Absent):
        return first
    array = jax.lax.select_n(forward_value(index), *map(forward_value, of_branches))
    return first.replace(forward=array) if isinstance(first, Weight) else array


def _scan_split(equation: core.JaxprEqn) -> tuple[int, int]:
    """Where, among a scan's operands, those end that are the same each time, and where its carry ends. By their shapes,
    as JAX's versions write it down in different ways: what goes through step by step has one more axis outside."""

    def whole(outer: list, inner: list) -> int:
        return sum(jaxprs.shaped(a).ndim == jaxprs.shaped(b).ndim for a, b in zip(outer, inner, strict=True))

    body = equation.params["jaxpr"].jaxpr
    carry_ends = whole(equation.invars, body.invars)
    return carry_ends - whole(equation.outvars, body.outvars), carry_ends


def _example_axes(equation: core.JaxprEqn, rank: int, weight_is_left: bool) -> tuple[int, ...]:
    """The axes of an operation's signal that may have any length."""
    if equation.primitive.name == "dot_general":
        contracted, batched = equation.params["dimension_numbers"]
        side = 1 if weight_is_left else 0
        return tuple(axis for axis in range(rank) if axis not in (*contracted[side], *batched[side]))
    if equation.primitive.name == "conv_general_dilated":
        resizable = not weight_is_left and equation.params["batch_group_count"] == 1
        return (equation.params["dimension_numbers"].lhs_spec[0],) if resizable else ()
    return (0,)


def _fan_in(equation: core.JaxprEqn, shape: tuple[int, ...], weight_is_left: bool) -> int:
    """How many weights meet in one unit of an operation's result; `shape` is the weight's."""
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        contracted = params["dimension_numbers"][0][0 if weight_is_left else 1]
        return math.prod(shape[axis] for axis in contracted)
    if name == "conv_general_dilated":
        return math.prod(shape) // shape[params["dimension_numbers"].rhs_spec[0]]
    return math.prod(shape) // shape[3 if name == "conv" else 2]
