"""Traced programs: their equations, what is inside of them, and their evaluation one by one."""

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
