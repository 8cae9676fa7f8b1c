"""Assertions for a test suite: feedback matches the transposed Jacobian, updates match backpropagation.

They work on our networks and on a user's own `Block`; a failure is an AssertionError that leads to the fault.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdtp import alignment
from jaxdtp.alignment.jacobians import with_own_feedback
from jaxdtp.alignment.updates import by_layers
from jaxdtp.learning.derived import layers_of
from jaxdtp.learning.paths import Paths
from jaxdtp.learning.targets import Loss, TargetRule, cross_entropy
from jaxdtp.learning.walk import Layer
from jaxdtp.models import networks
from jaxdtp.models.blocks import Block, example_of, feedback, feedback_difference
from jaxdtp.models.modules import as_network, by_block, one_block
from jaxdtp.system.errors import described


def assert_jacobian_matches_transpose(
    block: Any,
    params: tuple[Any, Any],
    x: jax.Array,
    *,
    max_degrees: float | None = None,
    max_relative_error: float | None = None,
    probes: int = 16,
    seed: int = 0,
    state: Any = None,
) -> None:
    """Assert that the feedback Jacobian J_G is the transposed forward Jacobian J_F^T (`alignment.jacobian_matching`).

    Args:
        block: a block, or a model: its feedback map is the derived one (`alignment.jacobian_matching`).
        params: forward and feedback parameters.
        x: [batch, *block.input_shape].
        max_degrees: of the angle between J_G and J_F^T.
        max_relative_error: of |J_G - J_F^T|_F / |J_F|_F. One of the two tolerances or both.
        probes: for each example, 2 or more.
        seed: of the probes.
        state: of a model, what it keeps without learning it, such as {"batch_stats": ...}; fresh if left out.

    Raises:
        AssertionError: above a tolerance, or the feedback's shapes don't mirror the forward ones, or it isn't affine
            though the block says so. Names the block, what was measured with its standard error, and the output unit
            with the greatest error.
        ValueError: no tolerance, several blocks, or one whose input has no Jacobian, such as integers.
    """
    _check_tolerances(max_degrees, max_relative_error)
    network, states = one_block(block, x, state)
    (block,) = networks.bind(network, states)
    forward_params, feedback_params = params
    if not jnp.issubdtype(block.dtype, jnp.floating):
        raise ValueError(f"block {block.name}: takes {block.dtype}; allowed: a block of floating point numbers")
    _assert_mirrored(block, forward_params, feedback_params, x)
    error, angle = alignment.jacobian_matching(
        network, forward_params, feedback_params, x, jax.random.key(seed), probes=probes, state=states
    )
    if block.affine:
        _assert_affine(block, forward_params, feedback_params, x[:4])
    faults = []
    if max_degrees is not None and not angle.value <= max_degrees:
        faults.append(
            f"the angle between J_G and J_F^T is {angle.value:.3g} +- {angle.standard_error:.1g} degrees, allowed: "
            f"{max_degrees}"
        )
    if max_relative_error is not None and not error.value <= max_relative_error:
        faults.append(
            f"|J_G - J_F^T| / |J_F| is {error.value:.3g} +- {error.standard_error:.1g}, allowed: {max_relative_error}"
        )
    if faults:
        few = x[:4]  # one pass for each output unit: enough to find the fault
        errors, norms = map(np.asarray, _jacobian_unit_errors(block, forward_params, feedback_params, few))
        worst = int(np.argmax(errors))
        unit = tuple(int(i) for i in np.unravel_index(worst, block.output_shape))
        raise AssertionError(
            f"block {block.name}: {'; '.join(faults)} ({probes} probes for each of {len(x)} examples). Worst output "
            f"unit {unit} of {block.output_shape}: its gradient is off by {np.sqrt(errors[worst] / norms[worst]):.3g} "
            f"of its norm, {errors[worst] / np.sum(errors):.0%} of the block's squared error"
        )


def assert_updates_match_backprop(
    network: Any,
    params: tuple[Any, Any],
    batch: tuple[jax.Array, Any],
    *,
    max_degrees: float | None = None,
    max_relative_error: float | None = None,
    beta: float = 0.01,
    target_rule: TargetRule | None = None,
    paths: Paths | None = None,
    loss: Loss = cross_entropy,
    state: Any = None,
) -> None:
    """Assert that updates, divided by beta, are the backpropagation gradients (`alignment.gradient_matching`).

    Args:
        network: the blocks, or a model or a list of models.
        params: forward and feedback parameters by block name; of a model those of the model; of a list lists.
        batch: images [batch, ...], normalised, and labels [batch], integers.
        max_degrees: of the angle between update and gradient of each block's kernel and bias.
        max_relative_error: of |update / beta - gradient| / |gradient|. One of the two tolerances or both.
        beta: step size of the output target.
        target_rule: which carries targets downwards; None: as in `alignment.updates_and_gradients`.
        paths: of the feedback; the blocks' own feedback maps if left out.
        loss: of outputs and labels.
        state: of models, what they keep without learning it, such as {"batch_stats": ...}; fresh if left out.

    Parameters whose gradient and update are zero but for rounding errors of the others', such as the bias of
    attention's keys, have no direction and are left out.

    Raises:
        AssertionError: above a tolerance, or the feedback's shapes don't mirror the forward ones. Names the blocks from
            the top one down, which is the way the fault came, with what was measured, the mean over single examples
            with its standard error, and the output unit with the greatest error.
        ValueError: no tolerance; one layer or block alone, whose update no feedback takes part in; a batch or
            parameters that don't fit.
    """
    _check_tolerances(max_degrees, max_relative_error)
    images, labels = batch
    unbound, states = as_network(network, images, state)
    network = networks.bind(unbound, states)
    forward, feedback_params = (by_block(network, side) for side in params)
    beside_layers = by_layers(network, target_rule, feedback_params)
    layers = [layer for block in network for layer in _layers(block, forward[block.name], len(images))]
    if len(layers if beside_layers else network) < 2:
        raise ValueError(
            f"network: got one {'layer' if beside_layers else 'block'}, {network[0].name}; allowed: two or more, since "
            "no feedback weight takes part in the update of the lowest one"
        )
    x: jax.Array | jax.ShapeDtypeStruct = images
    for block in network:
        mirrored = paths is None and not beside_layers
        x = _assert_mirrored(block, forward[block.name], feedback_params.get(block.name) if mirrored else None, x)
    arguments = (unbound, target_rule, forward, feedback_params, images, labels, beta)
    options: dict[str, Any] = {"paths": paths, "loss": loss, "state": states}
    measures = {"angle": (max_degrees, " degrees"), "distance": (max_relative_error, " of the gradient's norm")}
    matches = _by_parameter(alignment.gradient_matching(*arguments, **options))
    faults = [
        (block.name, name, measure)
        for block in reversed(network)
        for name, match in matches[block.name].items()
        for measure, (limit, _) in measures.items()
        if limit is not None and not getattr(match, measure) <= limit
    ]
    if not faults:
        return
    updates, gradients = map(_by_parameter, alignment.updates_and_gradients(*arguments, **options))
    sizes = {
        (block, name): max(np.max(np.abs(array), initial=0) for array in (updates[block][name], gradient))
        for block, of_block in gradients.items()
        for name, gradient in of_block.items()
    }
    rounding = 100 * jnp.finfo(jnp.result_type(*jax.tree.leaves(gradients))).eps * max(sizes.values())
    faults = [fault for fault in faults if not sizes[fault[:2]] <= rounding]
    if not faults:
        return
    of_examples = _by_parameter(alignment.gradient_matching(*arguments, per_example=True, **options))
    lines = []
    for block, name, measure in faults:
        limit, unit = measures[measure]
        value, of_each = (getattr(match[block][name], measure) for match in (matches, of_examples))
        # An example without a gradient has no angle to it.
        of_each = of_each[np.isfinite(of_each)]
        error = jnp.std(of_each, ddof=1) / len(of_each) ** 0.5 if len(of_each) > 1 else jnp.nan
        worst, of_worst = _worst_update_unit(updates[block][name], gradients[block][name])
        lines.append(
            f"block {block}, {name}: {measure} of update / beta to the gradient is {value:.3g}{unit}, allowed: {limit} "
            f"(of single examples {jnp.mean(of_each):.3g} +- {error:.1g}; worst output unit {worst}: off by "
            f"{of_worst:.3g} of its norm)"
        )
    raise AssertionError("\n".join(lines))


def _layers(block: Block, params: Any, examples: int) -> list[Layer]:
    """What of a block can have feedback weights of its own."""
    return layers_of(lambda params, x: block.forward(params, x)[0], params, example_of(block, examples))[0]


def _by_parameter(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Values by block name and parameter, the latter with points between the names of its path."""

    def of_block(tree: Any) -> dict[str, Any]:
        leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda value: isinstance(value, alignment.Match))
        return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}

    return {name: of_block(tree) for name, tree in values.items()}


def _check_tolerances(max_degrees: float | None, max_relative_error: float | None) -> None:
    if max_degrees is None and max_relative_error is None:
        raise ValueError("max_degrees, max_relative_error: got neither; allowed: one or both")


def _assert_mirrored(
    block: Block, forward_params: Any, feedback_params: Any, x: jax.ShapeDtypeStruct | jax.Array
) -> jax.ShapeDtypeStruct:
    """Shape of F(x), with the shapes on the way there and, where there are feedback parameters, back checked."""
    input_shape, output_shape = ((x.shape[0], *shape) for shape in (block.input_shape, block.output_shape))
    if x.shape != input_shape:
        raise AssertionError(f"block {block.name}: x is {x.shape}; expected {input_shape}, the block's input_shape")
    if jnp.issubdtype(block.dtype, jnp.floating) and not jnp.issubdtype(x.dtype, jnp.floating):
        raise AssertionError(f"block {block.name}: x is {x.dtype}; expected floating point numbers")
    expected = f"expected {output_shape}, the block's output_shape"
    own = with_own_feedback(block, forward_params)
    results = _shape_of(f"block {block.name}: forward", expected, block.forward, forward_params, x)
    if not isinstance(results, tuple) or len(results) != 3:
        raise AssertionError(f"block {block.name}: forward gives {results}; expected (y, switches, state)")
    y, switches, _ = _shape_of(f"block {block.name}: forward", expected, own.forward, forward_params, x)
    if y.shape != output_shape:
        raise AssertionError(f"block {block.name}: forward gives {y.shape}; {expected}")
    if feedback_params is not None:
        what = f"block {block.name}: feedback of an output of shape {y.shape}"
        expected = f"expected {input_shape}, the block's input_shape"
        back = _shape_of(what, expected, functools.partial(feedback, own), feedback_params, y, switches)
        if back.shape != input_shape:
            raise AssertionError(f"{what} gives {back.shape}; {expected}")
    return y


def _assert_affine(block: Block, forward_params: Any, feedback_params: Any, x: jax.Array) -> None:
    """That the difference of feedbacks, as targets take it, is the difference, and linear in the parameters, as the
    loss of L-DRL takes it."""
    y, switches, _ = block.forward(forward_params, x)

    def difference(params):
        return feedback_difference(block, params, block.gate(2 * y, switches), block.gate(y, switches))

    found = difference(feedback_params)
    two = feedback(block, feedback_params, 2 * y, switches) - feedback(block, feedback_params, y, switches)
    doubled = difference(jax.tree.map(lambda leaf: 2 * leaf, feedback_params))
    for what, value, expected in (
        ("one projection of gate(2 y) - gate(y) is off by {:.2g} of G(2 y) - G(y)", found, two),
        ("with parameters twice as large it is off by {:.2g} of twice that projection", doubled, 2 * found),
    ):
        error = jnp.linalg.norm(value - expected) / (jnp.linalg.norm(expected) + jnp.finfo(expected.dtype).tiny)
        if not error <= 1e-2:
            raise AssertionError(
                f"block {block.name}: affine, but {what.format(error)}; expected: project affine in its parameters and "
                "in all that gate gives"
            )


def _shape_of(what: str, expected: str, function, *arguments):
    try:
        return jax.eval_shape(function, *arguments)
    except Exception as error:  # whatever a user's block raises
        raise AssertionError(f"{what} fails; {expected}: {described(error)}") from error


@functools.partial(jax.jit, static_argnames="block")
def _jacobian_unit_errors(
    block: Block, forward_params: Any, feedback_params: Any, x: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """For each output unit, [outputs], over the batch: squared distance of its column of J_G from its row of J_F, and
    the row's squared norm."""
    block = with_own_feedback(block, forward_params)
    y, pull_back, switches = jax.vjp(lambda x: block.forward(forward_params, x)[:2], x, has_aux=True)

    def squares(unit):
        one_hot = jnp.broadcast_to(jax.nn.one_hot(unit, y[0].size, dtype=y.dtype).reshape(y.shape[1:]), y.shape)
        (row,) = pull_back(one_hot)
        _, column = jax.jvp(lambda y: feedback(block, feedback_params, y, switches), (y,), (one_hot,))
        return jnp.sum((column - row) ** 2), jnp.sum(row**2)

    return jax.lax.map(squares, jnp.arange(y[0].size))


def _worst_update_unit(update: jax.Array, gradient: jax.Array) -> tuple[int, float]:
    """The output unit (last axis) with the greatest error, and that error relative to its gradient's norm."""
    pair = (np.atleast_1d(array) for array in (update, gradient))
    of_units, expected = (array.reshape(-1, array.shape[-1]) for array in pair)
    errors = np.linalg.norm(of_units - expected, axis=0)
    worst = int(np.argmax(errors))
    return worst, float(errors[worst] / np.linalg.norm(expected[:, worst]))
