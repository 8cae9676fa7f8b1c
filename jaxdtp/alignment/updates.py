"""The gradient matching property: updates against gradients, and feedback weights against forward ones."""

import functools
from typing import Any

import jax

from jaxdtp.alignment.vectors import angle_degrees, match, relative_distance
from jaxdtp.learning.algorithms import ALGORITHMS
from jaxdtp.learning.paths import Paths, bind, consecutive
from jaxdtp.learning.state import Settings
from jaxdtp.learning.step import backprop_gradients, check_batch, error_gradients
from jaxdtp.learning.targets import (
    Loss,
    TargetRule,
    cross_entropy,
    difference_target,
    local_gradients,
    output_target,
    propagate_targets,
)
from jaxdtp.learning.values import parameter_names
from jaxdtp.models import networks
from jaxdtp.models.modules import as_network, by_block
from jaxdtp.models.networks import Network, NetworkParameters


@functools.partial(jax.jit, static_argnames="names")
def weight_alignment(
    forward: NetworkParameters, feedback: NetworkParameters, names: frozenset[str] | None = None
) -> dict[str, dict[str, jax.Array]]:
    """'weight_angle' (degrees) and 'weight_distance' (relative) of each feedback kernel to its transposed forward
    kernel, by the name of the block, or with points between those of the block and of the layer in it.

    Args:
        forward, feedback: parameters.
        names: of the parameters to compare, such as 'block.layer.kernel'; if left out, those named kernel that both
            have in one shape.
    """
    of_forward, of_feedback = named_parameters(forward), named_parameters(feedback)

    def alike(name: str) -> bool:
        return name.endswith(".kernel") and name in of_forward and of_forward[name].shape == of_feedback[name].shape

    kernels = {
        name.removesuffix(".kernel"): (of_feedback[name].ravel(), of_forward[name].ravel())
        for name in of_feedback
        if (alike(name) if names is None else name in names)
    }
    return {
        "weight_angle": {name: angle_degrees(*pair) for name, pair in kernels.items()},
        "weight_distance": {name: relative_distance(*pair) for name, pair in kernels.items()},
    }


def named_parameters(params: NetworkParameters) -> dict[str, jax.Array]:
    """Parameters by their path, with points between."""
    return dict(zip(parameter_names(params), jax.tree.leaves(params), strict=True))


def updates_matching(updates: NetworkParameters, gradients: NetworkParameters) -> dict[str, dict[str, jax.Array]]:
    """'update_angle' (degrees), 'update_distance' and 'update_ratio' (relative to the gradient's norm) of each update
    to its gradient, by the name of what has the parameter (of those not named kernel: by their own name), and
    'bias_update_angle'."""
    matches, biases = {}, {}
    references = named_parameters(gradients)
    for name, update in named_parameters(updates).items():
        owner, _, last = name.rpartition(".")
        if last == "bias":
            biases[owner] = match(update, references[name]).angle
        else:
            matches[owner if last == "kernel" else name] = match(update, references[name])
    return {
        "update_angle": {name: of_one.angle for name, of_one in matches.items()},
        "update_distance": {name: of_one.distance for name, of_one in matches.items()},
        "update_ratio": {name: of_one.ratio for name, of_one in matches.items()},
        "bias_update_angle": biases,
    }


def updates_and_gradients(
    network: Any,
    target_rule: TargetRule | None,
    forward: Any,
    feedback: Any,
    images: jax.Array,
    labels: Any,
    beta: float,
    *,
    paths: Paths | None = None,
    loss: Loss = cross_entropy,
    state: Any = None,
) -> tuple[NetworkParameters, NetworkParameters]:
    """The updates of a rule divided by beta, and the backpropagation gradients of the mean loss, which the first ones
    estimate; both by block name.

    Args:
        network: the blocks, or a model or a list of models (`models.modules.network_of`).
        target_rule: such as `targets.difference_target`, whose local gradients are the updates. None: where the first
            block has feedback parameters too, no targets from block to block: errors go down through feedback weights
            beside those of every layer; else difference targets.
        forward, feedback: parameters by block name; of a model those of the model; of a list a list.
        images: [batch, ...], normalised.
        labels: [batch], integers; or what the loss takes.
        beta: step size of the output target.
        paths: of the feedback; the blocks' own feedback maps if left out.
        loss: of outputs and labels.
        state: of models, what they keep without learning it, see `jacobian_matching`.

    Raises:
        ValueError: the batch doesn't fit the network, or parameters of a block are missing.
    """
    network, *arrays = _checked(network, target_rule, images, labels, forward, feedback, paths, loss, state)
    return _updates_and_gradients((network, target_rule, paths, loss), *arrays, images, labels, beta)


def _checked(network: Any, target_rule, images, labels, forward: Any, feedback: Any, paths, loss, state: Any):
    """The network; its state, forward and feedback parameters by block name."""
    network, states = as_network(network, images, state)
    forward, feedback = by_block(network, forward), by_block(network, feedback)
    check_batch(network, loss, images, labels)
    names = [block.name for block in network]
    fed = names if by_layers(network, target_rule, feedback) else names[1:]
    for side, params, needed in (("forward", forward, names), ("feedback", feedback, fed)):
        if not set(needed) <= set(params):
            found = ", ".join(map(str, params)) or "none"
            raise ValueError(f"{side}: got parameters of blocks {found}; allowed: of {', '.join(needed)}")
    return network, states, forward, feedback


def by_layers(network: Network, target_rule: TargetRule | None, feedback: NetworkParameters) -> bool:
    """Whether updates come from errors that go down through feedback weights beside those of every layer."""
    return target_rule is None and network[0].name in feedback


@functools.partial(jax.jit, static_argnames="fixed")
def _updates_and_gradients(fixed, states, forward, feedback, images, labels, beta):
    network, target_rule, paths, loss = fixed
    network = networks.bind(network, states)
    gradients = backprop_gradients(network, forward, images, labels, loss)
    if by_layers(network, target_rule, feedback):
        settings = Settings(ALGORITHMS["fa"], (), 1.0, None, loss=loss)
        return error_gradients(network, settings, forward, feedback, images, labels)[0], gradients
    target_rule = target_rule or difference_target
    passes = networks.forward_passes(network, forward, images)
    target = output_target(passes[-1].output, labels, beta, loss)
    paths = bind(consecutive(network) if paths is None else paths, network, forward)
    targets, _ = propagate_targets(target_rule, paths, forward, feedback, passes, target)
    updates = jax.tree.map(lambda gradient: gradient / beta, local_gradients(network, forward, passes, targets))
    return updates, gradients


def gradient_matching(
    network: Any,
    target_rule: TargetRule | None,
    forward: Any,
    feedback: Any,
    images: jax.Array,
    labels: Any,
    beta: float,
    *,
    per_example: bool = False,
    paths: Paths | None = None,
    loss: Loss = cross_entropy,
    state: Any = None,
) -> dict[str, Any]:
    """The gradient matching property: the updates against the gradients (the reference) of `updates_and_gradients`.

    Args:
        network, target_rule, forward, feedback, images, labels, beta, paths, loss, state: as there.
        per_example: whether to compare each example's own gradients, [batch], rather than the batch's mean gradients.

    Returns:
        By block name and parameter ('kernel', 'bias', or as the model has them).

    Raises:
        ValueError: as there.
    """
    network, *arrays = _checked(network, target_rule, images, labels, forward, feedback, paths, loss, state)
    return _gradient_matching((network, target_rule, paths, loss), per_example, *arrays, images, labels, beta)


@functools.partial(jax.jit, static_argnames=("fixed", "per_example"))
def _gradient_matching(fixed, per_example, states, forward, feedback, images, labels, beta):
    def of_batch(images, labels):
        return jax.tree.map(match, *_updates_and_gradients(fixed, states, forward, feedback, images, labels, beta))

    if per_example:
        return jax.vmap(of_batch)(images[:, None], jax.tree.map(lambda array: array[:, None], labels))
    return of_batch(images, labels)
