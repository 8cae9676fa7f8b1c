"""Traced programs: their equations, what is inside of them, their evaluation one by one, and programs made of them."""

import functools
from collections.abc import Callable
from typing import cast

import jax
from jax.core import ShapedArray
from jax.extend import core


def shaped(atom: core.Var | core.Literal) -> ShapedArray:
    """Shape and type of a variable."""
    return cast(ShapedArray, atom.aval)


def inside(equation: core.JaxprEqn) -> list[core.Jaxpr]:
    """The programs that an equation calls: bodies of loops, branches, jitted functions and the like."""
    values = (
        value for param in equation.params.values() for value in (param if isinstance(param, tuple) else (param,))
    )
    opened = (value.jaxpr if isinstance(value, core.ClosedJaxpr) else value for value in values)
    return [value for value in opened if isinstance(value, core.Jaxpr)]


def opened(equation: core.JaxprEqn) -> tuple[core.Jaxpr, list]:
    """The one program that an equation calls, and its constants."""
    inner = next(equation.params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in equation.params)
    return (inner.jaxpr, inner.consts) if isinstance(inner, core.ClosedJaxpr) else (inner, [])


def run(jaxpr: core.Jaxpr, consts: list, args: list, apply: Callable[[core.JaxprEqn, list], list]) -> list:
    """A program's results, where `apply(equation, operands)` gives the results of each equation."""
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

    def read(atom):
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    for equation in jaxpr.eqns:
        operands = [read(atom) for atom in equation.invars]
        values.update(zip(equation.outvars, apply(equation, operands), strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def evaluate(jaxpr: core.Jaxpr, equation: core.JaxprEqn, values: list) -> list:
    """The results of a program's equation. Not by its primitive alone: some want their parameters in another form."""
    variables = list(dict.fromkeys(atom for atom in equation.invars if not isinstance(atom, core.Literal)))
    of_variable = {atom: value for atom, value in zip(equation.invars, values, strict=True) if atom in variables}
    outvars = [atom for atom in equation.outvars if not isinstance(atom, core.DropVar)]
    nameless = jaxpr.debug_info._replace(arg_names=None, result_paths=None)
    alone = core.Jaxpr([], variables, outvars, [equation], equation.effects, nameless)
    results = iter(core.jaxpr_as_fun(core.ClosedJaxpr(alone, []))(*(of_variable[atom] for atom in variables)))
    return [None if isinstance(atom, core.DropVar) else next(results) for atom in equation.outvars]


def trace(f: Callable, *args) -> tuple[core.ClosedJaxpr, Callable]:
    """The program of a function, and what puts its results together again."""
    closed, shapes = jax.make_jaxpr(f, return_shape=True)(*args)
    return closed, lambda results: jax.tree.unflatten(jax.tree.structure(shapes), results)


def holds(jaxpr: core.Jaxpr, wanted: Callable[[core.JaxprEqn], bool]) -> bool:
    """Whether an equation that is wanted is in a program, or in the programs within."""
    return any(wanted(equation) or any(holds(inner, wanted) for inner in inside(equation)) for equation in jaxpr.eqns)


def rewritten(f: Callable, wanted: Callable[[core.JaxprEqn], bool], change: Callable[..., jax.Array]) -> Callable:
    """f with `change(equation, *operands)` for the result of each equation that is wanted, also in the programs within,
    but for the rules of functions that bring their own derivative."""

    @functools.wraps(f)
    def g(*args):
        closed, together = trace(f, *args)
        return together(_run_rewritten(closed.jaxpr, closed.consts, jax.tree.leaves(args), wanted, change))

    return g


def _run_rewritten(jaxpr: core.Jaxpr, consts: list, args: list, wanted: Callable, change: Callable) -> list:
    if not holds(jaxpr, wanted):
        return core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, consts))(*args)

    def apply(equation: core.JaxprEqn, operands: list) -> list:
        if wanted(equation):
            return [change(equation, *operands)]
        if not any(holds(inner, wanted) for inner in inside(equation)):
            return evaluate(jaxpr, equation, operands)
        if equation.primitive.name in ("jit", "pjit"):
            return _run_rewritten(*opened(equation), operands, wanted, change)
        return evaluate(jaxpr, equation.replace(params=within(equation.params)), operands)

    def within(params: dict) -> dict:
        return {name: changed(value) for name, value in params.items()}

    def changed(value):
        if type(value) is tuple:  # not of names
            return tuple(map(changed, value))
        if isinstance(value, core.ClosedJaxpr):
            run_inner = lambda *args: _run_rewritten(value.jaxpr, value.consts, args, wanted, change)  # noqa: E731
            return jax.make_jaxpr(run_inner)(*(jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in value.in_avals))
        return changed(core.ClosedJaxpr(value, [])).jaxpr if isinstance(value, core.Jaxpr) else value

    return run(jaxpr, consts, args, apply)
