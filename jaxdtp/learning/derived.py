"""Feedback derived from any function, as `jax.grad` derives a gradient.

`with_feedback(f)` has the value of f and another derivative. Wherever a parameter W meets the input x in a linear
operation y = op(x, W) (matrix product, einsum, convolution), there is a second, feedback weight O of W's shape, and

    dy = op(dx, O) + op(x, dW)

so that in reverse mode errors go down through O, and W gets its local gradient: the activity before times the error
behind it. Everything else, slopes, normalisation, attention, pooling, biases, scales, is that of the forward pass. With
O = W it is `jax.vjp`; with any other O no forward weight is used on the way down.

The function is traced to a jaxpr, which is walked with three kinds of values: those that depend on nothing; `Weight`,
on parameters alone, which come as a forward and a feedback value (so that reshaped, cast or normalised kernels are met
as what they have become); and `Signal`, on the input. The same walk without signals finds the layers (`layers_of`).
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax.extend import core

Function = Callable[[Any, Any], Any]
"""f(params, x), pytrees of arrays to a pytree of arrays."""

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
        "scatter scatter-add scatter_add scatter-sub scatter_mul scatter_min scatter_max sort optimization_barrier",
    )
    for word in words.split()
)
"""Operations in which a parameter meets the input and stays single: biases, scales, embeddings, tokens."""

_OWN_DERIVATIVE = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")

_ELSEWHERE = 1_000_000  # the loop of weights whose layers are found in another walk


@flax.struct.dataclass
class Weight:
    """A value that depends on parameters alone.

    Attributes:
        forward: from the forward parameters.
        feedback: from the feedback parameters; None where only one side is looked at.
        leaves: numbers of the parameters, in flattened order, that it depends on.
        loop: of the loops around it, by number from the outside, the innermost in which it changes; 0 for none.
    """

    forward: jax.Array
    feedback: jax.Array | None
    leaves: frozenset[int] = flax.struct.field(pytree_node=False)
    loop: int = flax.struct.field(pytree_node=False, default=0)


@flax.struct.dataclass
class Signal:
    """A value that depends on the input."""

    value: jax.Array


@flax.struct.dataclass
class Absent:
    """A signal of which only shape and type are known."""

    shape: tuple[int, ...] = flax.struct.field(pytree_node=False)
    dtype: Any = flax.struct.field(pytree_node=False)


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
    loops: tuple[int, ...] = ()


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
        closed, shapes = jax.make_jaxpr(f, return_shape=True)(params, x)
        weights = [
            Weight(forward, feedback, frozenset((index,)))
            for index, (forward, feedback) in enumerate(
                zip(jax.tree.leaves(params), jax.tree.leaves(feedback_params), strict=True)
            )
        ]
        signals = [Signal(jnp.asarray(leaf)) for leaf in jax.tree.leaves(x)]
        walk = _Walk(parameter_names(params), evaluate=True)
        outputs = walk.run(closed.jaxpr, closed.consts, weights + signals)
        return jax.tree.unflatten(jax.tree.structure(shapes), [_forward_value(output) for output in outputs])

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
    names, layers = parameter_names(params), []

    def weights_of(params: Any) -> list[jax.Array]:
        closed = jax.make_jaxpr(f)(params, x)
        weights = [Weight(leaf, None, frozenset((index,))) for index, leaf in enumerate(jax.tree.leaves(params))]
        signals = [Absent(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(x)]
        walk = _Walk(names, evaluate=False)
        walk.run(closed.jaxpr, closed.consts, weights + signals)
        layers[:] = walk.layers
        return walk.found

    jax.eval_shape(weights_of, params)
    return list(layers), weights_of


def parameter_names(params: Any) -> list[str]:
    """A name for each parameter, in flattened order: its path, with points between."""
    paths, _ = jax.tree_util.tree_flatten_with_path(params)
    return [jax.tree_util.keystr(path, simple=True, separator=".") or "params" for path, _ in paths]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _two_weights(product: Callable, signal: jax.Array, forward: jax.Array, feedback: jax.Array) -> jax.Array:
    return product(signal, forward)


@_two_weights.defjvp
def _two_weights_jvp(product, primals, tangents):
    signal, forward, feedback = primals
    d_signal, d_forward, _ = tangents
    return product(signal, forward), product(d_signal, feedback) + product(signal, d_forward)


class _Walk:
    """A walk over a jaxpr; it collects the layers unless it evaluates."""

    def __init__(self, names: list[str], evaluate: bool, loop: int = 0):
        self.names, self.evaluate, self.loop = names, evaluate, loop
        self.layers: list[Layer] = []
        self.found: list[jax.Array] = []
        self.seen: dict[Any, Any] = {}

    def run(self, jaxpr: core.Jaxpr, consts: list, args: list) -> list:
        values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

        def read(atom):
            return atom.val if isinstance(atom, core.Literal) else values[atom]

        for equation in jaxpr.eqns:
            operands = [read(atom) for atom in equation.invars]
            values.update(zip(equation.outvars, self.apply(jaxpr, equation, operands), strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def apply(self, jaxpr: core.Jaxpr, equation: core.JaxprEqn, operands: list) -> list:
        """The results of one equation."""
        weights = [operand for operand in operands if isinstance(operand, Weight)]
        signals = [operand for operand in operands if isinstance(operand, Signal | Absent)]
        name = equation.primitive.name
        if not (weights and signals):
            return self.weights(jaxpr, equation, operands, weights) if weights else self.data(jaxpr, equation, operands)
        if name in ("jit", "pjit", "closed_call", "core_call"):
            return self.run(*_opened(equation), operands)
        if name in ("checkpoint", "remat", "remat2"):
            run = lambda *operands: self.run(*_opened(equation), operands)  # noqa: E731
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
            met = ", ".join(sorted({self.names[leaf] for weight in weights for leaf in weight.leaves}))
            what = f"a {inside[0].operation} inside {name}" if inside else name
            raise ValueError(
                f"parameter {met}: meets the input in {what}, where its feedback can't be derived; allowed: "
                f"{', '.join(sorted(set(LINEAR.values())))}, with scan, cond, remat and jit around them, and biases, "
                "scales and embeddings"
            )
        return self.data(jaxpr, equation, [_forward_value(operand) for operand in operands], signals=True)

    def data(self, jaxpr: core.Jaxpr, equation: core.JaxprEqn, operands: list, signals: bool = False) -> list:
        """An equation in which nothing is met, or what is met stays single."""
        signals = signals or any(isinstance(operand, Signal | Absent) for operand in operands)
        if signals and not self.evaluate:
            return [Absent(result.aval.shape, result.aval.dtype) for result in equation.outvars]
        results = _bind(jaxpr, equation, [_forward_value(operand) for operand in operands])
        return [Signal(result) for result in results] if signals else results

    def weights(self, jaxpr: core.Jaxpr, equation: core.JaxprEqn, operands: list, weights: list[Weight]) -> list:
        """An equation of parameters alone, for both sides."""
        leaves, loop = frozenset().union(*(weight.leaves for weight in weights)), max(w.loop for w in weights)
        forward = _bind(jaxpr, equation, [_forward_value(operand) for operand in operands])
        feedback = [None] * len(forward)
        if self.evaluate:
            of_feedback = [operand.feedback if isinstance(operand, Weight) else operand for operand in operands]
            feedback = _bind(jaxpr, equation, of_feedback)
        return [Weight(*sides, leaves, loop) for sides in zip(forward, feedback, strict=True)]

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
        out = equation.outvars[0].aval
        # A module that is called twice has one weight, and wants one probe.
        place = (id(weight.forward), str(equation.params), left)
        if weight.loop == self.loop and place not in self.seen:
            self.seen[place] = weight.forward
            of_weight = jax.ShapeDtypeStruct(weight.forward.shape, weight.forward.dtype)
            of_signal = jax.ShapeDtypeStruct(signal.shape, signal.dtype)
            axes, fan_in = _example_axes(equation, len(signal.shape), left), _fan_in(equation, of_weight.shape, left)
            operation = LINEAR[equation.primitive.name]
            layer = Layer(product, of_signal, axes, of_weight, out.shape, fan_in, weight.leaves, operation)
            self.layers.append(layer)
            self.found.append(weight.forward)
        return Absent(out.shape, out.dtype)

    def layers_inside(self, equation: core.JaxprEqn, operands: list) -> list[Layer]:
        """The layers inside a function with its own derivative, which would hide them."""
        walk = _Walk(self.names, evaluate=False)
        weights = [Weight(o.forward, None, o.leaves) if isinstance(o, Weight) else o for o in operands]
        absent = [Absent(o.value.shape, o.value.dtype) if isinstance(o, Signal) else o for o in weights]
        walk.run(*_opened(equation), absent)
        return walk.layers

    def cond(self, equation: core.JaxprEqn, operands: list) -> list:
        index, *operands = operands
        branches = equation.params["branches"]
        if not self.evaluate:
            # Weights don't depend on the branch that is taken.
            results = [self.run(branch.jaxpr, branch.consts, operands) for branch in branches]
            return [_joined(of_branches) for of_branches in zip(*results, strict=True)]

        def branch_signals(branch, *operands):
            return [Signal(_forward_value(result)) for result in self.run(branch.jaxpr, branch.consts, operands)]

        taken = [functools.partial(branch_signals, branch) for branch in branches]
        return jax.lax.switch(_forward_value(index), taken, *operands)

    def scan(self, equation: core.JaxprEqn, operands: list) -> list:
        params = equation.params
        body, split = params["jaxpr"], (params["num_consts"], params["num_consts"] + params["num_carry"])
        consts, carry, xs = operands[: split[0]], operands[split[0] : split[1]], operands[split[1] :]
        carry = self.settled(body, consts, carry, xs)
        loop = self.loop + 1
        inner = None

        def step(carry, xs):
            nonlocal inner
            inner = _Walk(self.names, self.evaluate, loop)
            results = inner.run(body.jaxpr, body.consts, [*consts, *_in_loop(carry, loop), *_in_loop(xs, loop)])
            carried, ys = results[: len(carry)], results[len(carry) :]
            carried = [_promoted(value, like) for value, like in zip(carried, carry, strict=True)]
            return _like(carried, carry), (ys, inner.found)

        xs_within = [Absent(x.shape[1:], x.dtype) if isinstance(x, Absent) else x for x in xs]
        present = [not isinstance(x, Absent) for x in xs]

        def step_present(carry, given):
            given = iter(given)
            return step(carry, [next(given) if here else x for here, x in zip(present, xs_within, strict=True)])

        options = {name: params[name] for name in ("length", "reverse", "unroll")}
        given = [x for x, here in zip(xs, present, strict=True) if here]
        carry, (ys, found) = jax.lax.scan(step_present, carry, given, **options)
        ys = [Absent((params["length"], *y.shape), y.dtype) if isinstance(y, Absent) else y for y in ys]
        if not self.evaluate:
            length = params["length"]
            self.layers += [layer._replace(loops=(length, *layer.loops)) for layer in inner.layers]
            self.found += found
            # Weights that are the same each time are probed once, as if there were no loop.
            first = [
                jax.tree.map(lambda array: array[0], x) if h else x for x, h in zip(xs_within, present, strict=True)
            ]
            self.run(body.jaxpr, body.consts, [*consts, *_in_loop(carry, _ELSEWHERE), *_in_loop(first, _ELSEWHERE)])
        return [*_in_loop(carry, self.loop), *_in_loop(ys, self.loop)]

    def settled(self, body: core.ClosedJaxpr, consts: list, carry: list, xs: list) -> list:
        """A scan's carry, each value of the kind that it has after any number of steps."""
        for _ in range(2 * len(carry) + 1):
            within = [Absent(x.shape[1:], x.dtype) if isinstance(x, Absent) else x for x in xs]

            def one(carry, within=within):
                sliced = [x if isinstance(x, Absent) else jax.tree.map(lambda array: array[0], x) for x in within]
                walk = _Walk(self.names, self.evaluate, self.loop + 1)
                return walk.run(body.jaxpr, body.consts, [*consts, *carry, *sliced])[: len(carry)]

            after = jax.eval_shape(one, carry)
            merged = [_promoted(value, like) for value, like in zip(carry, after, strict=True)]
            if all(_kind(a) == _kind(b) for a, b in zip(carry, merged, strict=True)):
                return merged
            carry = merged
        return carry


def _opened(equation: core.JaxprEqn) -> tuple[core.Jaxpr, list]:
    """The jaxpr inside an equation, and its constants."""
    inner = next(equation.params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in equation.params)
    return (inner.jaxpr, inner.consts) if isinstance(inner, core.ClosedJaxpr) else (inner, [])


def _bind(jaxpr: core.Jaxpr, equation: core.JaxprEqn, values: list) -> list:
    """An equation's results. Not by its primitive alone: some want their parameters in another form there."""
    variables = list(dict.fromkeys(atom for atom in equation.invars if not isinstance(atom, core.Literal)))
    of_variable = {atom: value for atom, value in zip(equation.invars, values, strict=True) if atom in variables}
    outvars = [atom for atom in equation.outvars if not isinstance(atom, core.DropVar)]
    alone = core.Jaxpr(
        [],
        variables,
        outvars,
        [equation],
        equation.effects,
        jaxpr.debug_info._replace(arg_names=None, result_paths=None),
    )
    results = iter(core.jaxpr_as_fun(core.ClosedJaxpr(alone, []))(*(of_variable[atom] for atom in variables)))
    return [None if isinstance(atom, core.DropVar) else next(results) for atom in equation.outvars]


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


def _forward_value(value: Any) -> Any:
    """What an operation that knows nothing of feedback gets."""
    if isinstance(value, Weight):
        return value.forward
    return value.value if isinstance(value, Signal) else value


def _kind(value: Any) -> int:
    if isinstance(value, Signal | Absent):
        return 2
    return 1 if isinstance(value, Weight) else 0


def _joined(values: tuple) -> Any:
    """The kind of value that stands for all of several branches."""
    return max(values, key=_kind)


def _promoted(value: Any, like: Any) -> Any:
    """A value, made of the same kind as another one where that is a higher one."""
    if _kind(value) >= _kind(like):
        if isinstance(value, Weight) and isinstance(like, Weight):
            return value.replace(leaves=value.leaves | like.leaves, loop=max(value.loop, like.loop))
        return value
    array = _forward_value(value)
    if isinstance(like, Weight):
        return Weight(array, None if like.feedback is None else array, like.leaves, like.loop)
    return Absent(jnp.shape(array), jnp.result_type(array)) if isinstance(like, Absent) else Signal(array)


def _like(values: list, carry: list) -> list:
    """Weights with what else a carry knows of them, which doesn't change from step to step."""
    return [
        value.replace(leaves=like.leaves, loop=like.loop) if isinstance(value, Weight) else value
        for value, like in zip(values, carry, strict=True)
    ]


def _in_loop(values: list, loop: int) -> list:
    return [
        value.replace(loop=loop) if isinstance(value, Weight) and value.loop != _ELSEWHERE else value
        for value in values
    ]


def _check_alike(params: Any, feedback_params: Any) -> None:
    """Raise ValueError where feedback parameters aren't like the forward ones."""
    forward, feedback = (
        {
            jax.tree_util.keystr(path, simple=True, separator="."): jnp.shape(leaf)
            for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
        }
        for tree in (params, feedback_params)
    )
    for name in forward | feedback:
        found, expected = feedback.get(name, "missing"), forward.get(name, "no such parameter")
        if found != expected:
            raise ValueError(
                f"feedback parameter {name}: got {found}; allowed: {expected}, in a tree like params, as from "
                "init_feedback"
            )
