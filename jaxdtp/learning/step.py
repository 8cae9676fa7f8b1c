"""One training step: forward pass, feedback training, targets, one forward update for all blocks together."""

import functools
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jaxdtp.learning import paths
from jaxdtp.learning.algorithms import Algorithm
from jaxdtp.learning.feedback import FeedbackTraining, examples_of, train_feedback
from jaxdtp.learning.inverse import scale_by_influence
from jaxdtp.learning.paths import Paths, along_paths
from jaxdtp.learning.targets import local_gradients, output_target, propagate_targets
from jaxdtp.models import networks
from jaxdtp.models.blocks import Parameters, Pass
from jaxdtp.models.networks import Network, NetworkParameters
from jaxdtp.parallel import Parallel, divide_jobs

Metrics = dict


class Settings(NamedTuple):
    """Everything that stays fixed during a run.

    Attributes:
        algorithm: the learning rule.
        paths: of the feedback into blocks 2..N, as from `paths.consecutive(network)`; () without feedback.
        beta: size of the output target's step.
        forward_optimizer: of all forward parameters together.
        feedback: how the feedback weights of each path are trained; () where the rule never trains them.
        symmetric_init: whether feedback weights start as the transposed forward weights.
        scale_by_influence: whether `inverse.scale_by_influence` is applied to the targets.
        parallel: how a step is divided among devices; None: it isn't.
    """

    algorithm: Algorithm
    paths: Paths
    beta: float
    forward_optimizer: optax.GradientTransformation
    feedback: tuple[FeedbackTraining, ...] = ()
    symmetric_init: bool = False
    scale_by_influence: bool = False
    parallel: Parallel | None = None


@flax.struct.dataclass
class TrainState:
    """All that changes during a run; together with the seed it is enough to continue bit for bit."""

    step: jax.Array
    forward: NetworkParameters
    feedback: NetworkParameters
    forward_optimizer: optax.OptState
    feedback_optimizer: dict[str, optax.OptState]


def init_state(network: Network, settings: Settings, key: jax.Array) -> TrainState:
    """Fresh parameters and optimizer states.

    Raises:
        ValueError: `settings.feedback` isn't one entry for each path that the rule trains.
    """
    forward = networks.init(network, key)
    feedback = paths.init(settings.paths, key, like=forward if settings.symmetric_init else None)
    trained = list(feedback) if settings.algorithm.feedback_rule else []
    if len(settings.feedback) != len(trained):
        raise ValueError(
            f"settings.feedback: got {len(settings.feedback)} entries; allowed: {len(trained)}, one for each of the "
            f"blocks {', '.join(trained)}"
        )
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        forward=forward,
        feedback=feedback,
        forward_optimizer=settings.forward_optimizer.init(forward),
        feedback_optimizer={
            name: training.optimizer.init(feedback[name])
            for name, training in zip(trained, settings.feedback, strict=True)
        },
    )


def train_step(
    network: Network, settings: Settings, state: TrainState, images: jax.Array, labels: jax.Array, key: jax.Array
) -> tuple[TrainState, Metrics]:
    """One step on one batch.

    The clean forward pass; feedback training of every block on its clean activations; targets with the trained feedback
    weights, or with those from before the batch; one forward update with the local gradients (or, for backpropagation,
    with the loss gradient), which the feedback weights take too where the rule says so.

    Args:
        network: the blocks.
        settings: rule and optimizers.
        state: before the step.
        images: [batch, *network[0].input_shape], normalised.
        labels: [batch], integers.
        key: of this step's noise.

    Returns:
        The new state, and metrics of the state before it: 'loss' (mean cross-entropy, nats), 'top1' and, above 10
        classes, 'top5' (shares of the batch), by block name 'activation' (root mean square of the output) and
        'feedback_loss' (mean over the iterations), and whatever the target rule measures.
    """
    algorithm = settings.algorithm
    passes = networks.forward_passes(network, state.forward, images)
    feedback, feedback_optimizer, losses = train_all_feedback(settings, state, passes, key)
    metrics = pass_metrics(network, passes, labels) | {"feedback_loss": losses}

    if algorithm.target_rule is None:
        gradients = backprop_gradients(network, state.forward, images, labels)
    else:
        feeding_back = state.feedback if algorithm.simultaneous else feedback
        targets, measured = all_targets(network, settings, state.forward, feeding_back, passes, labels)
        gradients = local_gradients(network, state.forward, passes, targets)
        metrics |= measured

    updates, forward_optimizer = settings.forward_optimizer.update(gradients, state.forward_optimizer, state.forward)
    if algorithm.shared_update:
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


def feedback_step(
    network: Network, settings: Settings, state: TrainState, images: jax.Array, labels: jax.Array, key: jax.Array
) -> tuple[TrainState, Metrics]:
    """A step in which only the feedback weights learn; as `train_step`, without what the target rule measures."""
    passes = networks.forward_passes(network, state.forward, images)
    feedback, feedback_optimizer, losses = train_all_feedback(settings, state, passes, key)
    state = state.replace(step=state.step + 1, feedback=feedback, feedback_optimizer=feedback_optimizer)
    return state, pass_metrics(network, passes, labels) | {"feedback_loss": losses}


def all_targets(
    network: Network,
    settings: Settings,
    forward: NetworkParameters,
    feedback: NetworkParameters,
    passes: list[Pass],
    labels: jax.Array,
) -> tuple[list[jax.Array], Metrics]:
    """Targets of all blocks on a batch, and what the target rule measures, by name and block name."""
    target = output_target(passes[-1].output, labels, settings.beta)
    rule = settings.algorithm.target_rule
    targets, measured = propagate_targets(rule, settings.paths, forward, feedback, passes, target)
    if settings.scale_by_influence:
        targets, measured["influence"] = scale_by_influence(network, forward, passes, targets)
    return targets, measured


def train_all_feedback(
    settings: Settings, state: TrainState, passes: list[Pass], key: jax.Array
) -> tuple[NetworkParameters, dict[str, optax.OptState], dict[str, jax.Array]]:
    """Feedback parameters, optimizer states and mean losses of all paths after this batch, each by block name.

    Args:
        settings, state: as in `train_step`.
        passes: as from `networks.forward_passes`.
        key: of the noise.
    """
    if not settings.feedback:
        return state.feedback, state.feedback_optimizer, {}
    jobs = {
        path.block.name: functools.partial(train_one_feedback, settings, index)
        for index, path in enumerate(settings.paths)
    }
    clean = [along_paths(settings.paths, examples_of(training, passes)) for training in settings.feedback]
    if settings.parallel and settings.parallel.owners:
        trained = divide_jobs(settings.parallel, jobs, clean, state, key)
    else:
        trained = [job(of_path, state, key) for job, of_path in zip(jobs.values(), clean, strict=True)]
    params, optimizer_states, losses = (dict(zip(jobs, values, strict=True)) for values in zip(*trained, strict=True))
    return params, optimizer_states, losses


def train_one_feedback(
    settings: Settings, index: int, clean: list[Pass], state: TrainState, key: jax.Array
) -> tuple[Parameters, optax.OptState, jax.Array]:
    """As `train_all_feedback`, of the path with this index alone; `clean` are passes along all paths of the examples
    that take part in it."""
    algorithm, training, block = settings.algorithm, settings.feedback[index], settings.paths[index].block
    return train_feedback(
        algorithm.feedback_rule,
        training,
        block,
        state.feedback[block.name],
        state.feedback_optimizer[block.name],
        algorithm.forward_map(settings.paths, index, state.forward, state.feedback, clean),
        clean[index],
        jax.random.fold_in(key, index),
    )


def backprop_gradients(
    network: Network, params: NetworkParameters, images: jax.Array, labels: jax.Array
) -> NetworkParameters:
    """Gradients of the mean cross-entropy by backpropagation, by block name."""

    def loss(params):
        return jnp.mean(cross_entropy(networks.logits(network, params, images), labels))

    return jax.grad(loss)(params)


def pass_metrics(network: Network, passes: list[Pass], labels: jax.Array) -> Metrics:
    """`classification_metrics` of a batch's forward pass, and 'activation': each block's root mean square output."""
    activations = {
        block.name: jnp.sqrt(jnp.mean(clean.output**2)) for block, clean in zip(network, passes, strict=True)
    }
    return classification_metrics(passes[-1].output, labels) | {"activation": activations}


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
