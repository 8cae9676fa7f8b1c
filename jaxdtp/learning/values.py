"""What a walk over a traced function (`jaxdtp.learning.walk`) knows of each value: that it depends on parameters alone,
or on the input. Of what depends on neither there is the value itself.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

ELSEWHERE = 1_000_000
"""The loop of weights whose layers are found in another walk."""


class Weight(flax.struct.PyTreeNode):
    """A value that depends on parameters alone.

    Attributes:
        forward: from the forward parameters.
        feedback: from the feedback parameters; None where only one side is looked at.
        leaves: numbers of the parameters, in flattened order, that it depends on.
        loop: of the loops around it, by number from the outside, the innermost in which it changes; 0 for none.
        affine: whether it is an affine function of the parameters: equal updates leave the difference of its sides.
    """

    forward: jax.Array
    feedback: jax.Array | None
    leaves: frozenset[int] = flax.struct.field(pytree_node=False)
    loop: int = flax.struct.field(pytree_node=False, default=0)
    affine: bool = flax.struct.field(pytree_node=False, default=True)


class Signal(flax.struct.PyTreeNode):
    """A value that depends on the input.

    Attributes:
        value: the array.
        chosen: numbers of the parameters of which the input has but chosen which: an expert's kernel, an embedding.
    """

    value: jax.Array
    chosen: frozenset[int] = flax.struct.field(pytree_node=False, default=frozenset())


class Absent(flax.struct.PyTreeNode):
    """A signal of which only shape and type are known, and `Signal.chosen`."""

    shape: tuple[int, ...] = flax.struct.field(pytree_node=False)
    dtype: Any = flax.struct.field(pytree_node=False)
    chosen: frozenset[int] = flax.struct.field(pytree_node=False, default=frozenset())


def parameter_names(params: Any) -> list[str]:
    """A name for each parameter, in flattened order: its path, with points between."""
    paths, _ = jax.tree_util.tree_flatten_with_path(params)
    return [jax.tree_util.keystr(path, simple=True, separator=".") or "params" for path, _ in paths]


def forward_value(value: Any) -> Any:
    """What an operation that knows nothing of feedback gets."""
    if isinstance(value, Weight):
        return value.forward
    return value.value if isinstance(value, Signal) else value


def kind(value: Any) -> int:
    """0 for what depends on nothing, 1 for weights, 2 for signals."""
    if isinstance(value, Signal | Absent):
        return 2
    return 1 if isinstance(value, Weight) else 0


def same_kind(value: Any, other: Any) -> bool:
    """Whether both are of one kind and, if they are weights, of the same parameters and loop."""
    if isinstance(value, Weight) and isinstance(other, Weight):
        return (value.leaves, value.loop) == (other.leaves, other.loop)
    return kind(value) == kind(other)


def promoted(value: Any, like: Any) -> Any:
    """A value, made of the same kind as another one where that is a higher one."""
    if kind(value) >= kind(like):
        if isinstance(value, Weight) and isinstance(like, Weight):
            leaves, loop, affine = value.leaves | like.leaves, max(value.loop, like.loop), value.affine and like.affine
            return value.replace(leaves=leaves, loop=loop, affine=affine)
        return value.replace(chosen=value.chosen | like.chosen) if kind(like) == 2 else value
    array = forward_value(value)
    if isinstance(like, Weight):
        return Weight(array, None if like.feedback is None else array, like.leaves, like.loop, like.affine)
    if isinstance(like, Absent):
        return Absent(jnp.shape(array), jnp.result_type(array), like.chosen)
    return Signal(array, like.chosen)


def as_carried(values: list, carry: list) -> list:
    """Values, made of the same kinds as those of a carry, and with what else it knows of them, which doesn't change
    from step to step, or between branches."""

    def carried(value: Any, like: Any) -> Any:
        value = promoted(value, like)
        if isinstance(value, Weight):
            return value.replace(leaves=like.leaves, loop=like.loop, affine=like.affine)
        return value.replace(chosen=like.chosen) if isinstance(value, Signal | Absent) else value

    return [carried(value, like) for value, like in zip(values, carry, strict=True)]


def in_loop(values: list, loop: int) -> list:
    """Weights as values that change in this loop."""
    return [
        value.replace(loop=loop) if isinstance(value, Weight) and value.loop != ELSEWHERE else value for value in values
    ]
