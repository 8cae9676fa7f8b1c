"""Blocks and networks from models that know nothing of target propagation: Flax modules, Linen or NNX, or functions.

A model is called with one array [batch, ...] and gives one. It is brought into one form, two pure functions,

    init(key, x) -> params, state
    apply(params, state, x, key) -> y, sown, state          key None: evaluation

where `state` is what the model keeps without learning it (batch statistics) and `sown` what it lets its feedback know.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from jaxdtp.models.blocks import EVALUATION, AnyArray, Block, Context
from jaxdtp.models.networks import Network, NetworkState
from jaxdtp.models.plain_convolutions import with_fast_convolutions

SWITCHES = "switches"
"""The collection into which a Linen module sows what its feedback module is to know of a pass."""

TRAINING = {"train": True, "training": True, "is_training": True, "deterministic": False, "use_running_average": False}
"""Fields or arguments that tell a Linen module whether it is in training, and what they are then."""


class OwnFeedback(NamedTuple):
    """A block whose feedback map is a module of its own, rather than derived.

    Attributes:
        module: the forward map, a Linen module, which may sow arrays [batch, ...] into the collection 'switches'.
        feedback: a Linen module that maps an output y (and, if it takes two arguments, what was sown, a dictionary) to
            the shape of the module's input. Its kernels that have names and shapes of the module's are taken to lie as
            those do, by a symmetric start and `alignment.weight_alignment`: equal where they are the transposed ones.
    """

    module: nn.Module
    feedback: nn.Module


class Functions(NamedTuple):
    """A model in the form above."""

    init: Callable[[jax.Array, jax.Array], tuple[Any, Any]]
    apply: Callable[[Any, Any, jax.Array, jax.Array | None], tuple[jax.Array, Any, Any]]


def network_of(model: Any, x: AnyArray | jax.ShapeDtypeStruct) -> Network:
    """The network of a model: one block, or of a list of models one block for each.

    Args:
        model: a Linen or NNX module, a pair of functions (init, apply) with init(key, x) to params and apply(params, x)
            or apply(params, key, x) to y, `OwnFeedback`, a `Block`, or a list of such.
        x: an input [batch, ...], or its shape and type.

    Raises:
        ValueError: a model can't be called with its input; names it, what was found and what is allowed.
    """
    models = model if isinstance(model, list) or is_network(model) else [model]
    x = jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype))
    blocks: list[Block] = []
    for index, part in enumerate(models):
        name = _name(part) if len(models) == 1 else f"{_name(part)}_{index}"
        block = part if isinstance(part, Block) else block_of(part, x, name)
        if tuple(x.shape[1:]) != block.input_shape:
            raise ValueError(
                f"block {block.name}: got an input of shape {tuple(x.shape[1:])}; allowed: {block.input_shape}"
            )
        blocks.append(block)
        x = jax.ShapeDtypeStruct((x.shape[0], *block.output_shape), jnp.zeros(()).dtype)
    names = [block.name for block in blocks]
    if len(set(names)) < len(names) or not names:
        raise ValueError(f"model: got blocks named {', '.join(names) or 'nothing'}; allowed: names, each once")
    return tuple(blocks)


def as_network(model: Any, x: AnyArray, state: Any = None) -> tuple[Network, NetworkState | None]:
    """The blocks of a model and their state, for `networks.bind`; None for blocks that are to be taken as they are.

    The blocks' functions are the same each time, for which programs have been compiled; but not of an NNX module, whose
    structure may have changed: give `network_of(module, x)` instead.

    Args:
        model: as for `network_of`.
        x: an input [batch, ...].
        state: what it keeps without learning it, such as {"batch_stats": ...}; by block name where there are several.
            Fresh if left out.
    """
    models = (model,) if isinstance(model, Block) else model
    if is_network(models):
        network, fresh = models, None
    else:
        models = tuple(model) if isinstance(model, list) else (model,)
        keeps = _hashable(models) and not any(isinstance(part, nnx.Module) for part in models)
        make = _in_fresh_state if keeps else _in_fresh_state.__wrapped__
        network, fresh = make(models, tuple(x.shape[1:]), jnp.result_type(x))
    if state is None:
        return network, fresh
    return network, {block.name: {} for block in network} | by_block(network, state)


def one_block(model: Any, x: AnyArray, state: Any = None) -> tuple[Network, NetworkState | None]:
    """As `as_network`, of a model that is one block.

    Raises:
        ValueError: it has several.
    """
    network, states = as_network(model, x, state)
    if len(network) > 1:
        raise ValueError(f"block: got {len(network)}, {', '.join(block.name for block in network)}; allowed: one")
    return network, states


def by_block(network: Network, values: Any) -> dict[str, Any]:
    """What belongs to the blocks of a network by their name: from a dictionary already, from what is the only block's,
    or from a list of all blocks', or of all but the first one's.

    Raises:
        ValueError: a list of another length.
    """
    names = [block.name for block in network]
    several = isinstance(values, list | tuple)
    if len(names) == 1:
        by_name = isinstance(values, dict) and list(values) == names
        alone = several and len(values) == 1
        # Unless the block's own look like that.
        own = jax.eval_shape(network[0].init, jax.random.key(0)) if by_name or alone else ()
        if not (by_name or alone) or any(_same_structure(values, part) for part in own):
            return {names[0]: values}
    if several and not len(names) - 1 <= len(values) <= len(names):
        raise ValueError(
            f"parameters or state: got a list of {len(values)}; allowed: of {len(names)}, for {', '.join(names)}, or "
            "of all but the first one's"
        )
    return dict(zip(names[len(names) - len(values) :], values, strict=True)) if several else values


@functools.lru_cache(maxsize=64)
def _in_fresh_state(models: tuple, shape: tuple[int, ...], dtype: Any) -> tuple[Network, NetworkState]:
    network = network_of(list(models), jax.ShapeDtypeStruct((2, *shape), dtype))
    with jax.ensure_compile_time_eval():
        return network, {block.name: block.init(jax.random.key(0))[2] for block in network}


def _hashable(models: tuple) -> bool:
    try:
        hash(models)
    except TypeError:
        return False
    return True


def block_of(model: Any, x: jax.ShapeDtypeStruct, name: str) -> Block:
    """A block of a model (see `network_of`) with inputs like x; its feedback map is derived, or its own."""
    own = model.feedback if isinstance(model, OwnFeedback) else None
    functions = functions_of(model.module if own is not None else model, name)
    key = jax.random.key(0)
    called = f"module {name}: can't be called with an input of shape {x.shape}"
    allowed = "one array to one array, of shape [batch, ...]"
    params, state = _shapes(called, allowed, functions.init, key, x)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            parameter = jax.tree_util.keystr(path, simple=True, separator=".")
            raise ValueError(
                f"module {name}: its parameter {parameter} is {leaf.dtype}; allowed: floating point or complex "
                "parameters, what doesn't learn is to be kept outside of them"
            )
    y, sown, after = _shapes(called, allowed, functions.apply, params, state, x, key)
    if not hasattr(y, "shape") or y.shape[:1] != x.shape[:1]:
        found = f"shape {y.shape}" if hasattr(y, "shape") else f"a {type(y).__name__}"
        raise ValueError(f"module {name}: gives {found}; allowed: one array of shape [{x.shape[0]}, ...]")
    if not _same_structure(after, state):
        raise ValueError(f"module {name}: its collections change from call to call; allowed: what keeps its shape")
    in_evaluation = lambda params, state, x: functions.apply(params, state, x, None)  # noqa: E731
    allowed = "no other collections and random numbers than in training; it is told by a field or an argument "
    _shapes(f"{called} in evaluation", allowed + ", ".join(TRAINING), in_evaluation, params, state, x)
    functions = functions._replace(apply=with_fast_convolutions(functions.apply, params, state, x, key))

    def forward(params: Any, x: jax.Array, context: Context = EVALUATION) -> tuple[jax.Array, Any, Any]:
        if not context.state and state:
            raise ValueError(
                f"state of block {name}: got none; allowed: its collections {', '.join(state)}, as in the state that "
                "learner.init gives, .model"
            )
        # For a derived feedback map the input is all that it must know.
        # A step may pass through a block more than once, with the same dropout each time.
        key = None if context.key is None else jax.random.clone(context.key)
        y, switches, after = functions.apply(params, context.state, x, key)
        after = jax.tree.map(lambda new, old: new.astype(old.dtype), after, context.state)
        return y, x if own is None else switches, after

    shapes = (tuple(x.shape[1:]), tuple(y.shape[1:]))
    if own is None:

        def init(key: jax.Array) -> tuple[Any, None, Any]:
            params, state = _in_precision(functions.init(key, _zeros(x)))
            return params, None, state

        return Block(name, *shapes, init, forward, dtype=x.dtype, per_example=False)
    backward = _feedback_function(own)

    def init_both(key: jax.Array) -> tuple[Any, Any, Any]:
        own_key, feedback_key = jax.random.split(key)
        params, state = _in_precision(functions.init(own_key, _zeros(x)))
        _, sown, _ = functions.apply(params, state, _zeros(x), own_key)
        feedback = own.init(feedback_key, *_arguments(own, _zeros(y), sown)).get("params", {})
        return params, _in_precision(feedback), state

    called = f"module {name}: its feedback {type(own).__name__} can't be called with an output of shape {y.shape}"
    allowed = "one array, and the dictionary of what was sown if it takes two, to one array, without collections"
    feedback = _shapes(called, allowed, init_both, key)[1]
    back = _shapes(called, allowed, backward, feedback, (y, sown))
    if back.shape != x.shape:
        raise ValueError(
            f"module {name}: its feedback {type(own).__name__} gives shape {back.shape} for an output of shape "
            f"{y.shape}; allowed: {x.shape}, that of the module's input"
        )
    gate = lambda y, switches: (y, switches)  # noqa: E731
    backward = with_fast_convolutions(backward, feedback, (y, sown))
    return Block(name, *shapes, jax.jit(init_both), forward, gate, backward, dtype=x.dtype, per_example=False)


def functions_of(model: Any, name: str) -> Functions:
    """A model as two pure functions.

    Raises:
        ValueError: it is none of the kinds of `network_of`.
    """
    if isinstance(model, nn.Module):
        return _of_linen(model)
    if isinstance(model, nnx.Module):
        return _of_nnx(model)
    pair = (model.init, model.apply) if hasattr(model, "init") and hasattr(model, "apply") else model
    modules = isinstance(pair, tuple) and any(isinstance(part, nn.Module | nnx.Module) for part in pair)
    if isinstance(pair, tuple) and len(pair) == 2 and all(map(callable, pair)) and not modules:
        return _of_pair(*pair)
    raise ValueError(
        f"model {name}: got a {type(model).__name__}; allowed: a Flax module (Linen or NNX), a pair (init, apply), "
        "OwnFeedback, a Block, or a list of these"
    )


def _of_linen(module: nn.Module) -> Functions:
    (in_training, training), (in_evaluation, evaluation) = (_in_mode(module, training) for training in (True, False))

    def init(key: jax.Array, x: jax.Array) -> tuple[Any, Any]:
        params_key, other_key = jax.random.split(key)
        rngs = {"params": params_key, "dropout": other_key}
        variables = nn.meta.unbox(in_training.init(rngs, x, **training))
        params = variables.pop("params", {})
        call = functools.partial(in_training.apply, mutable=list(variables), rngs=rngs, **training)
        _, after = jax.eval_shape(call, {"params": params, **variables}, x)
        # What is sown grows with each call; what is kept doesn't.
        kept = [
            collection for collection, values in variables.items() if _same_structure(after.get(collection), values)
        ]
        return params, {collection: variables[collection] for collection in kept}

    def apply(params: Any, state: Any, x: jax.Array, key: jax.Array | None) -> tuple[jax.Array, Any, Any]:
        variables = {"params": params, **state}
        if key is None:
            y, after = in_evaluation.apply(variables, x, mutable=[SWITCHES], **evaluation)
            return _wide(y), after.get(SWITCHES, {}), state
        # Flax falls back to the stream 'params' for those that have another name.
        rngs = dict(zip(("dropout", "params"), jax.random.split(key), strict=True))
        y, after = in_training.apply(variables, x, mutable=[*state, SWITCHES], rngs=rngs, **training)
        return _wide(y), after.get(SWITCHES, {}), {collection: after[collection] for collection in state}

    return Functions(jax.jit(init), apply)


def _of_nnx(module: nnx.Module) -> Functions:
    def split(module: nnx.Module):
        return nnx.split(module, nnx.Param, nnx.RngState, ...)

    module = nnx.clone(module)
    module.eval()
    in_evaluation, *_ = split(module)
    module.train()
    in_training, params_like, rngs_like, state_like = split(module)

    def filled(like: nnx.State, values: Any) -> nnx.State:
        like = jax.tree.map(lambda leaf: leaf, like)
        nnx.replace_by_pure_dict(like, values)
        return like

    def init(key: jax.Array, x: jax.Array) -> tuple[Any, Any]:
        del key, x  # the module has its parameters already
        # Copies: whoever donates a state must not take them from the module.
        return jax.tree.map(jnp.array, (nnx.to_pure_dict(params_like), nnx.to_pure_dict(state_like)))

    def apply(params: Any, state: Any, x: jax.Array, key: jax.Array | None) -> tuple[jax.Array, Any, Any]:
        graph, rngs = (in_evaluation, rngs_like) if key is None else (in_training, _reseeded(rngs_like, key))
        module = nnx.merge(graph, filled(params_like, params), rngs, filled(state_like, state))
        y = module(x)
        if key is None:
            return _wide(y), {}, state
        return _wide(y), {}, nnx.to_pure_dict(split(module)[3])

    return Functions(init, apply)


def _reseeded(rngs: nnx.State, key: jax.Array) -> nnx.State:
    """NNX's random streams, begun anew from a key."""
    leaves, structure = jax.tree.flatten(rngs)
    begun = [
        jax.random.fold_in(key, index) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else jnp.zeros_like(leaf)
        for index, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, begun)


def _of_pair(init: Callable, apply: Callable) -> Functions:
    takes_key = len(_positional(apply, required=True)) >= 3

    def applied(params: Any, state: Any, x: jax.Array, key: jax.Array | None) -> tuple[jax.Array, Any, Any]:
        return _wide(apply(params, key, x) if takes_key else apply(params, x)), {}, state

    return Functions(jax.jit(lambda key, x: (init(key, x), {})), applied)


def _feedback_function(module: nn.Module) -> Callable[[Any, tuple[jax.Array, Any]], jax.Array]:
    def project(params: Any, h: tuple[jax.Array, Any]) -> jax.Array:
        return _wide(module.apply({"params": params}, *_arguments(module, *h)))

    return project


def _arguments(feedback: nn.Module, y: jax.Array, sown: Any) -> tuple:
    return (y, sown) if len(_positional(feedback.__call__)) >= 2 else (y,)


def _in_mode(module: nn.Module, training: bool) -> tuple[nn.Module, dict[str, Any]]:
    """The module that knows whether it is in training, by its fields, and the arguments that tell it otherwise."""
    values = {name: value if training else not value for name, value in TRAINING.items()}
    fields, taken = type(module).__dataclass_fields__, inspect.signature(module.__call__).parameters
    told: dict[str, Any] = {name: value for name, value in values.items() if name in fields}
    arguments = {name: value for name, value in values.items() if name in taken and name not in fields}
    return module.clone(**told) if told else module, arguments


def _positional(function: Callable, *, required: bool = False) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [
        name
        for name, value in inspect.signature(function).parameters.items()
        if value.kind in kinds and not (required and value.default is not inspect.Parameter.empty)
    ]


def _in_precision(variables: Any) -> Any:
    """Variables in float64 where that is asked for: modules make them in float32 unless told otherwise."""
    double = jnp.zeros(()).dtype
    return jax.tree.map(lambda leaf: leaf.astype(double) if leaf.dtype == jnp.float32 else leaf, variables)


def _shapes(called: str, allowed: str, function: Callable, *args: Any) -> Any:
    """Shapes and types of what a function of the user's gives."""
    try:
        return jax.eval_shape(function, *args)
    except Exception as error:  # whatever it raises
        raise ValueError(f"{called} ({type(error).__name__}: {_first_line(error)}); allowed: {allowed}") from error


def _same_structure(tree: Any, other: Any) -> bool:
    return jax.tree.structure(tree) == jax.tree.structure(other)  # type: ignore[operator]  # JAX gives it no type


def _zeros(like: jax.ShapeDtypeStruct) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)


def _wide(y: Any) -> Any:
    """Outputs in float32 at least, also of a module that computes in bfloat16."""
    if hasattr(y, "dtype") and jnp.issubdtype(y.dtype, jnp.floating):
        return y.astype(jnp.promote_types(y.dtype, jnp.float32))
    return y


def is_network(model: Any) -> bool:
    """Whether a model is a tuple of blocks."""
    return isinstance(model, tuple) and bool(model) and all(isinstance(part, Block) for part in model)


def _name(model: Any) -> str:
    if isinstance(model, OwnFeedback):
        return _name(model.module)
    if isinstance(model, nn.Module):
        return model.name or type(model).__name__
    return type(model).__name__ if isinstance(model, nnx.Module) else "model"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]
