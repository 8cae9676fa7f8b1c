"""One training step: forward pass, feedback training, targets, one forward update for all blocks together."""

from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jaxdtp import networks
from jaxdtp.algorithms import Algorithm
from jaxdtp.blocks import Pass
from jaxdtp.feedback import FeedbackTraining, train_feedback
from jaxdtp.networks import Network, NetworkParameters
from jaxdtp.targets import local_gradients, output_target, propagate_targets

Metrics = dict


class Settings(NamedTuple):
    """Everything that stays fixed during a run.

    Attributes:
        algorithm: the learning rule.
        beta: size of the output target's step.
        forward_optimizer: of all forward parameters together.
        feedback: how the feedback weights of blocks 2..N are trained, in this order.
        symmetric_init: whether feedback weights start as the transposed forward weights.
    """

    algorithm: Algorithm
    beta: float
    forward_optimizer: optax.GradientTransformation
    feedback: tuple[FeedbackTraining, ...]
    symmetric_init: bool = False


@flax.struct.dataclass
class TrainState:
    """All that changes during a run; together with the seed it is enough to continue bit for bit."""

    step: jax.Array
    forward: NetworkParameters
    feedback: NetworkParameters
    forward_optimizer: optax.OptState
    feedback_optimizer: dict[str, optax.OptState]


def init_state(network: Network, settings: Settings, key: jax.Array) -> TrainState:
    """Fresh parameters and optimizer states; backpropagation has no feedback parameters.

    Raises:
        ValueError: `settings.feedback` isn't one entry for each of the blocks 2..N.
    """
    forward, feedback = networks.init(network, key, symmetric=settings.symmetric_init)
    if settings.algorithm.target_rule is None:
        feedback = {}
    elif len(settings.feedback) != len(feedback):
        raise ValueError(
            f"settings.feedback: got {len(settings.feedback)} entries; allowed: {len(feedback)}, one for each of the "
            f"blocks {', '.join(feedback)}"
        )
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        forward=forward,
        feedback=feedback,
        forward_optimizer=settings.forward_optimizer.init(forward),
        feedback_optimizer={
            name: training.optimizer.init(params)
            for (name, params), training in zip(feedback.items(), settings.feedback, strict=False)
        },
    )


def train_step(
    network: Network, settings: Settings, state: TrainState, images: jax.Array, labels: jax.Array, key: jax.Array
) -> tuple[TrainState, Metrics]:
    """One step on one batch.

    The clean forward pass; feedback training of every block on its clean activations; targets with the trained feedback
    weights; one forward update with the local gradients (or, for backpropagation, with the loss gradient), which the
    feedback weights take too where the rule says so.

    Args:
        network: the blocks.
        settings: rule and optimizers.
        state: before the step.
        images: [batch, *network[0].input_shape], normalised.
        labels: [batch], integers.
        key: of this step's noise.

    Returns:
        The new state, and metrics of the state before it: 'loss' (mean cross-entropy, nats), 'top1' and, above 10
        classes, 'top5' (shares of the batch), and by block name 'activation' (root mean square of the output) and
        'feedback_loss' (mean over the iterations).
    """
    passes = networks.forward_passes(network, state.forward, images)
    metrics = classification_metrics(passes[-1].output, labels)
    metrics["activation"] = {
        block.name: jnp.sqrt(jnp.mean(clean.output**2)) for block, clean in zip(network, passes, strict=True)
    }
    feedback, feedback_optimizer, metrics["feedback_loss"] = train_all_feedback(network, settings, state, passes, key)

    if settings.algorithm.target_rule is None:
        gradients = backprop_gradients(network, state.forward, images, labels)
    else:
        target = output_target(passes[-1].output, labels, settings.beta)
        targets = propagate_targets(settings.algorithm.target_rule, network, feedback, passes, target)
        gradients = local_gradients(network, state.forward, passes, targets)

    updates, forward_optimizer = settings.forward_optimizer.update(gradients, state.forward_optimizer, state.forward)
    if settings.algorithm.shared_update:
        feedback = {
            name: params | {"kernel": params["kernel"] + updates[name]["kernel"]} for name, params in feedback.items()
        }
    return TrainState(
        step=state.step + 1,
        forward=optax.apply_updates(state.forward, updates),
        feedback=feedback,
        forward_optimizer=forward_optimizer,
        feedback_optimizer=feedback_optimizer,
    ), metrics


def train_all_feedback(
    network: Network, settings: Settings, state: TrainState, passes: list[Pass], key: jax.Array
) -> tuple[NetworkParameters, dict[str, optax.OptState], dict[str, jax.Array]]:
    """Feedback parameters, optimizer states and mean losses of blocks 2..N after this batch, each by block name.

    Args:
        network, settings, state: as in `train_step`.
        passes: as from `networks.forward_passes`.
        key: of the noise.
    """
    rule = settings.algorithm.feedback_rule
    if rule is None:
        return state.feedback, state.feedback_optimizer, {}
    params, optimizer_states, losses = {}, {}, {}
    for index, (block, training, clean) in enumerate(zip(network[1:], settings.feedback, passes[1:], strict=True)):
        name = block.name
        params[name], optimizer_states[name], losses[name] = train_feedback(
            rule,
            training,
            block,
            state.feedback[name],
            state.feedback_optimizer[name],
            state.forward[name],
            clean,
            jax.random.fold_in(key, index),
        )
    return params, optimizer_states, losses


def backprop_gradients(
    network: Network, params: NetworkParameters, images: jax.Array, labels: jax.Array
) -> NetworkParameters:
    """Gradients of the mean cross-entropy by backpropagation, by block name."""

    def loss(params):
        return jnp.mean(cross_entropy(networks.logits(network, params, images), labels))

    return jax.grad(loss)(params)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """-log softmax(logits)[label] of each example, [batch], nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def classification_metrics(logits: jax.Array, labels: jax.Array, weights: jax.Array | None = None) -> Metrics:
    """Cross-entropy ('loss', nats), 'top1' and, above 10 classes, 'top5', averaged over the batch.

    Args:
        logits: [batch, classes].
        labels: [batch], integers.
        weights: [batch], of each example in the averages; equal weights if left out.
    """
    of_label = jnp.take_along_axis(logits, labels[:, None], axis=1)
    # How many other classes are not strictly below: ties and NaN count against.
    rank = jnp.sum(~(logits < of_label), axis=1) - 1
    values = {"loss": cross_entropy(logits, labels), "top1": rank < 1}
    if logits.shape[-1] > 10:
        values["top5"] = rank < 5
    return {name: jnp.average(value, weights=weights) for name, value in values.items()}
