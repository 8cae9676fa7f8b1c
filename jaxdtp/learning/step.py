"""One training step: forward pass, feedback training, what is fed back, one forward update for all blocks together."""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Integer

from jaxdtp.learning import paths
from jaxdtp.learning.derived import with_feedback
from jaxdtp.learning.inverse import scale_by_influence
from jaxdtp.learning.state import Settings, TrainState, bind
from jaxdtp.learning.targets import (
    Loss,
    TargetRule,
    cross_entropy,
    local_gradients,
    output_target,
    propagate_targets,
)
from jaxdtp.learning.train_feedback import train_all_feedback, train_all_layers
from jaxdtp.models import networks
from jaxdtp.models.blocks import AnyArray, Inputs, Pass
from jaxdtp.models.networks import Network, NetworkParameters, NetworkState

Metrics = dict


class Learned(NamedTuple):
    """What a batch teaches.

    Attributes:
        gradients: of all forward parameters, by block name.
        passes: of the blocks.
        model: what blocks keep without learning it, afterwards.
        feedback, feedback_optimizer: parameters and optimizer states after feedback training.
        targets: of all blocks' outputs; None where errors are fed back.
        measured: by name and block name.
    """

    gradients: NetworkParameters
    passes: list[Pass]
    model: NetworkState
    feedback: NetworkParameters
    feedback_optimizer: Any
    targets: list[jax.Array] | None
    measured: Metrics


def train_step(
    network: Network, settings: Settings, state: TrainState, images: Inputs, labels: Any, key: jax.Array
) -> tuple[TrainState, Metrics]:
    """One step on one batch.

    Feedback training of every block on its clean activations, or of every layer; targets with the trained feedback
    weights, or with those from before the batch, and local gradients, or errors that go down through the layers'
    feedback weights (for backpropagation through the forward weights); one forward update, and one of the feedback
    weights with the same gradients where the rule says so.

    Args:
        network: the blocks.
        settings: rule and optimizers.
        state: before the step.
        images: [batch, *network[0].input_shape], normalised.
        labels: [batch], integers; or what `settings.loss` takes.
        key: of this step's noise.

    Returns:
        The new state, and metrics of the state before it: 'loss' (mean over the batch; cross-entropy in nats), of the
        cross-entropy 'top1' and, above 10 classes, 'top5' (shares of the batch), by block name 'activation' (root mean
        square of the output) and 'feedback_loss' (mean over the iterations), and whatever the target rule measures.

    Raises:
        ValueError: `check_batch`.
    """
    check_batch(network, settings.loss, images, labels)
    algorithm, optimizer = settings.algorithm, settings.forward_optimizer
    learned = learn(network, settings, state, images, labels, key)
    updates, forward_optimizer = optimizer.update(learned.gradients, state.forward_optimizer, state.forward)
    feedback, feedback_optimizer = learned.feedback, learned.feedback_optimizer
    if algorithm.shared_update:
        feedback_updates, feedback_optimizer = optimizer.update(learned.gradients, feedback_optimizer, feedback)
        feedback = optax.apply_updates(feedback, feedback_updates)
    return TrainState(
        step=state.step + 1,
        forward=optax.apply_updates(state.forward, updates),
        feedback=feedback,
        model=learned.model,
        forward_optimizer=forward_optimizer,
        feedback_optimizer=feedback_optimizer,
    ), pass_metrics(network, settings, learned.passes, labels) | learned.measured


def check_batch(network: Network, loss: Loss, images: Any, labels: Any) -> None:
    """Check that a batch fits the network and, for the cross-entropy, that its labels are classes: by their shapes and
    types, and by their values where these are known, which within `jax.jit` they aren't.

    Raises:
        ValueError: it doesn't.
    """
    if tuple(images.shape[1:]) != network[0].input_shape:
        raise ValueError(
            f"images: got shape {tuple(images.shape)}; allowed: [batch, {', '.join(map(str, network[0].input_shape))}],"
            f" the inputs of block {network[0].name}"
        )
    if loss is not cross_entropy:
        return
    if not network[-1].output_shape:
        raise ValueError(
            f"loss: got the cross-entropy for block {network[-1].name}, whose outputs are single numbers; allowed: "
            "outputs [batch, ..., classes], or another loss"
        )
    if not hasattr(labels, "shape"):
        raise ValueError(f"labels: got a {type(labels).__name__}; allowed: an array of integers")
    shape, classes = (images.shape[0], *network[-1].output_shape[:-1]), network[-1].output_shape[-1]
    if jnp.shape(labels) != shape or not jnp.issubdtype(jnp.result_type(labels), jnp.integer):
        raise ValueError(
            f"labels: got {jnp.result_type(labels)} of shape {jnp.shape(labels)}; allowed: integers of shape {shape}, "
            f"a class for each output of block {network[-1].name}"
        )
    if not isinstance(labels, jax.core.Tracer) and getattr(labels, "is_fully_addressable", True):
        values = np.asarray(labels)
        wrong = values[(values < 0) | (values >= classes)]
        if wrong.size:
            raise ValueError(
                f"labels: got {wrong.flat[0]}; allowed: 0 to {classes - 1}, the classes of block {network[-1].name}"
            )


def learn(
    network: Network, settings: Settings, state: TrainState, images: Inputs, labels: Any, key: jax.Array
) -> Learned:
    """What a batch teaches, before any forward weight moves; arguments as in `train_step`."""
    algorithm = settings.algorithm
    bound = bind(network, state, key)
    if algorithm.target_rule is None:
        feedback, losses = train_all_layers(network, settings, state, len(images), key)
        gradients, passes, model = error_gradients(bound, settings, state.forward, feedback, images, labels)
        return Learned(gradients, passes, model, feedback, state.feedback_optimizer, None, {"feedback_loss": losses})
    passes, model = networks.run(bound, state.forward, images)
    feedback, feedback_optimizer, losses = train_all_feedback(network, settings, state, passes, key)
    feeding_back = state.feedback if algorithm.simultaneous else feedback
    targets, measured = all_targets(bound, settings, state.forward, feeding_back, passes, labels)
    gradients = local_gradients(bound, state.forward, passes, targets)
    measured = {"feedback_loss": losses} | measured
    return Learned(gradients, passes, model, feedback, feedback_optimizer, targets, measured)


def feedback_step(
    network: Network, settings: Settings, state: TrainState, images: Inputs, labels: Any, key: jax.Array
) -> tuple[TrainState, Metrics]:
    """A step in which only the feedback weights learn; as `train_step`, without what the target rule measures."""
    passes, model = networks.run(bind(network, state, key), state.forward, images)
    if settings.algorithm.target_rule:
        feedback, feedback_optimizer, losses = train_all_feedback(network, settings, state, passes, key)
    else:
        feedback, losses = train_all_layers(network, settings, state, len(images), key)
        feedback_optimizer = state.feedback_optimizer
    state = state.replace(step=state.step + 1, feedback=feedback, model=model, feedback_optimizer=feedback_optimizer)
    return state, pass_metrics(network, settings, passes, labels) | {"feedback_loss": losses}


def error_gradients(
    network: Network,
    settings: Settings,
    forward: NetworkParameters,
    feedback: NetworkParameters,
    images: Inputs,
    labels: Any,
) -> tuple[NetworkParameters, list[Pass], NetworkState]:
    """Gradients of all parameters from the loss's error, beta dL/ds[N], which goes down through the feedback weights of
    every layer, or for backpropagation (without beta) through the forward weights.

    Args:
        network: as from `bind`.
        settings: rule, loss and beta.
        forward, feedback: parameters by block name.
        images, labels: as in `train_step`.

    Returns:
        The gradients, the blocks' passes and their state afterwards.
    """

    def run(params: NetworkParameters, x: Inputs):
        passes, model = networks.run(network, params, x)
        return passes[-1].output, (passes, model)

    backprop = settings.algorithm.paths == "none"
    derived = with_feedback(run)
    through = run if backprop else lambda params, x: derived(params, feedback, x)
    outputs, pull_back, (passes, model) = jax.vjp(lambda params: through(params, images), forward, has_aux=True)
    mean_loss = lambda outputs: jnp.mean(settings.loss(outputs, labels))  # noqa: E731
    error = jax.grad(mean_loss)(outputs) * (1 if backprop else settings.beta)
    (gradients,) = pull_back(error)
    return gradients, passes, model


def all_targets(
    network: Network,
    settings: Settings,
    forward: NetworkParameters,
    feedback: NetworkParameters,
    passes: list[Pass],
    labels: Any,
) -> tuple[list[jax.Array], Metrics]:
    """Targets of all blocks on a batch, and what the target rule measures, by name and block name; `network` as from
    `bind`."""
    target = output_target(passes[-1].output, labels, settings.beta, settings.loss)
    ways = paths.bind(settings.paths, network, forward)
    rule = cast(TargetRule, settings.algorithm.target_rule)
    targets, measured = propagate_targets(rule, ways, forward, feedback, passes, target)
    if settings.scale_by_influence:
        targets, measured["influence"] = scale_by_influence(network, forward, passes, targets)
    return targets, measured


def backprop_gradients(
    network: Network, params: NetworkParameters, images: Inputs, labels: Any, loss: Loss = cross_entropy
) -> NetworkParameters:
    """Gradients of the mean loss by backpropagation, by block name."""

    def mean_loss(params):
        return jnp.mean(loss(networks.logits(network, params, images), labels))

    return jax.grad(mean_loss)(params)


def pass_metrics(network: Network, settings: Settings, passes: list[Pass], labels: Any) -> Metrics:
    """The loss of a batch's forward pass, of the cross-entropy `classification_metrics`, and 'activation': each block's
    root mean square output."""
    activations = {
        block.name: jnp.sqrt(jnp.mean(clean.output**2)) for block, clean in zip(network, passes, strict=True)
    }
    outputs = passes[-1].output
    if settings.loss is cross_entropy:
        return classification_metrics(outputs, labels) | {"activation": activations}
    return {"loss": jnp.mean(settings.loss(outputs, labels)), "activation": activations}


def classification_metrics(
    logits: Float[AnyArray, "*batch classes"],
    labels: Integer[AnyArray, "*batch"],
    weights: Float[AnyArray, "*batch"] | None = None,
) -> Metrics:
    """Cross-entropy ('loss', nats), 'top1' and, above 10 classes, 'top5', averaged over the batch.

    Args:
        logits: [batch, classes], or with more axes between.
        labels: [batch], integers.
        weights: [batch], of each example in the averages; equal weights if left out.
    """
    of_label = jnp.take_along_axis(logits, labels[..., None], axis=-1)
    # How many other classes are not strictly below: ties and NaN count against.
    rank = jnp.sum(~(logits < of_label), axis=-1) - 1
    values = {"loss": cross_entropy(logits, labels), "top1": (rank < 1).astype(logits.dtype)}
    if logits.shape[-1] > 10:
        values["top5"] = (rank < 5).astype(logits.dtype)
    return {name: jnp.average(value, weights=weights) for name, value in values.items()}
