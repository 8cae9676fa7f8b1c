"""One training step: forward pass, feedback training, what is fed back, one forward update for all blocks together."""

import functools
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jaxdtp.learning import paths
from jaxdtp.learning.algorithms import Algorithm
from jaxdtp.learning.derived import layers_of, parameter_names, with_feedback
from jaxdtp.learning.feedback import FeedbackTraining, examples_of, train_feedback
from jaxdtp.learning.inverse import scale_by_influence
from jaxdtp.learning.layers import draw_probes
from jaxdtp.learning.paths import Paths, along_paths
from jaxdtp.learning.targets import Loss, cross_entropy, local_gradients, output_target, propagate_targets
from jaxdtp.models import networks
from jaxdtp.models.blocks import Pass, example_of
from jaxdtp.models.networks import Network, NetworkParameters, NetworkState
from jaxdtp.parallel import Parallel, divide_jobs

Metrics = dict


class LayerTraining(NamedTuple):
    """How feedback weights are trained on each batch where they are beside those of every layer.

    Attributes:
        iterations: steps for each batch, each with fresh probes.
        share: of a batch, that a layer's probe is at most as long as.
        rate: of a step; 1 is exact line search for `layers.match_layers`, and an average's rate for `mirror_layers`.
    """

    iterations: int = 1
    share: float = 1.0
    rate: float = 1.0


class Settings(NamedTuple):
    """Everything that stays fixed during a run.

    Attributes:
        algorithm: the learning rule.
        paths: of the feedback into blocks 2..N, as from `paths.consecutive(network)`; () where there are none.
        beta: size of the output target's step.
        forward_optimizer: of all forward parameters together.
        feedback: how the feedback weights of each path are trained; () where the rule never trains them.
        layers: the same, of a rule whose paths are 'layers'.
        symmetric_init: whether feedback weights start as the transposed forward weights.
        scale_by_influence: whether `inverse.scale_by_influence` is applied to the targets.
        loss: of outputs and labels.
        parallel: how a step is divided among devices; None: it isn't.
    """

    algorithm: Algorithm
    paths: Paths
    beta: float
    forward_optimizer: optax.GradientTransformation
    feedback: tuple[FeedbackTraining, ...] = ()
    layers: LayerTraining = LayerTraining()
    symmetric_init: bool = False
    scale_by_influence: bool = False
    loss: Loss = cross_entropy
    parallel: Parallel | None = None


@flax.struct.dataclass
class TrainState:
    """All that changes during a run; together with the seed it is enough to continue bit for bit.

    Attributes:
        step: how many there have been.
        forward, feedback: parameters by block name. Where paths are 'layers', feedback has the tree of forward.
        model: what blocks keep without learning it, such as batch statistics, by block name.
        forward_optimizer, feedback_optimizer: their states; the latter by block name or, with shared updates, one.
    """

    step: jax.Array
    forward: NetworkParameters
    feedback: NetworkParameters
    model: NetworkState
    forward_optimizer: optax.OptState
    feedback_optimizer: Any


def init_state(network: Network, settings: Settings, key: jax.Array) -> TrainState:
    """Fresh parameters and optimizer states.

    Raises:
        ValueError: `settings.feedback` isn't one entry for each path that the rule trains.
    """
    algorithm = settings.algorithm
    forward, model = networks.init(network, key)
    if algorithm.paths == "layers":
        keys = jax.random.split(key, len(network))
        feedback = {
            block.name: paths.init_derived(
                block, forward[block.name], model[block.name], own_key, symmetric=settings.symmetric_init
            )
            for block, own_key in zip(network, keys, strict=True)
        }
        feedback_optimizer = settings.forward_optimizer.init(feedback) if algorithm.shared_update else {}
    else:
        feedback = paths.init(settings.paths, key, like=forward if settings.symmetric_init else None)
        trained = list(feedback) if algorithm.feedback_rule else []
        if len(settings.feedback) != len(trained):
            raise ValueError(
                f"settings.feedback: got {len(settings.feedback)} entries; allowed: {len(trained)}, one for each of "
                f"the blocks {', '.join(trained)}"
            )
        feedback_optimizer = {
            name: training.optimizer.init(feedback[name])
            for name, training in zip(trained, settings.feedback, strict=True)
        }
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        forward=forward,
        feedback=feedback,
        model=model,
        forward_optimizer=settings.forward_optimizer.init(forward),
        feedback_optimizer=feedback_optimizer,
    )


def train_step(
    network: Network, settings: Settings, state: TrainState, images: jax.Array, labels: Any, key: jax.Array
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
    """
    algorithm, optimizer = settings.algorithm, settings.forward_optimizer
    bound = bind(network, state, key)
    measured = {}
    if algorithm.target_rule:
        passes, model = networks.run(bound, state.forward, images)
        feedback, feedback_optimizer, losses = train_all_feedback(network, settings, state, passes, key)
        feeding_back = state.feedback if algorithm.simultaneous else feedback
        targets, measured = all_targets(bound, settings, state.forward, feeding_back, passes, labels)
        gradients = local_gradients(bound, state.forward, passes, targets)
    else:
        feedback, losses = train_all_layers(network, settings, state, len(images), key)
        feedback_optimizer = state.feedback_optimizer
        gradients, passes, model = error_gradients(bound, settings, state.forward, feedback, images, labels)

    updates, forward_optimizer = optimizer.update(gradients, state.forward_optimizer, state.forward)
    if algorithm.shared_update:
        feedback_updates, feedback_optimizer = optimizer.update(gradients, feedback_optimizer, feedback)
        feedback = optax.apply_updates(feedback, feedback_updates)
    return TrainState(
        step=state.step + 1,
        forward=optax.apply_updates(state.forward, updates),
        feedback=feedback,
        model=model,
        forward_optimizer=forward_optimizer,
        feedback_optimizer=feedback_optimizer,
    ), pass_metrics(network, settings, passes, labels) | {"feedback_loss": losses} | measured


def feedback_step(
    network: Network, settings: Settings, state: TrainState, images: jax.Array, labels: Any, key: jax.Array
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


def bind(network: Network, state: TrainState, key: jax.Array) -> Network:
    """The network in training on one batch, `key` the step's."""
    return networks.bind(network, state.model, jax.random.fold_in(key, len(network)))


def error_gradients(
    network: Network,
    settings: Settings,
    forward: NetworkParameters,
    feedback: NetworkParameters,
    images: jax.Array,
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

    def run(params: NetworkParameters, x: jax.Array):
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
    labels: jax.Array,
) -> tuple[list[jax.Array], Metrics]:
    """Targets of all blocks on a batch, and what the target rule measures, by name and block name; `network` as from
    `bind`."""
    target = output_target(passes[-1].output, labels, settings.beta, settings.loss)
    ways = paths.bind(settings.paths, network, forward)
    targets, measured = propagate_targets(settings.algorithm.target_rule, ways, forward, feedback, passes, target)
    if settings.scale_by_influence:
        targets, measured["influence"] = scale_by_influence(network, forward, passes, targets)
    return targets, measured


def train_all_feedback(
    network: Network, settings: Settings, state: TrainState, passes: list[Pass], key: jax.Array
) -> tuple[NetworkParameters, dict[str, optax.OptState], dict[str, jax.Array]]:
    """Feedback parameters, optimizer states and mean losses of all paths after this batch, each by block name.

    Args:
        network, settings, state: as in `train_step`.
        passes: as from `networks.forward_passes`.
        key: of the noise.
    """
    if not settings.feedback:
        return state.feedback, state.feedback_optimizer, {}
    jobs = {
        path.block.name: functools.partial(train_one_feedback, network, settings, index)
        for index, path in enumerate(settings.paths)
    }
    clean = [along_paths(settings.paths, examples_of(training, passes)) for training in settings.feedback]
    return _by_block(jobs, _done(settings, jobs, clean, state, key))


def train_one_feedback(
    network: Network, settings: Settings, index: int, clean: list[Pass], state: TrainState, key: jax.Array
) -> tuple[Any, optax.OptState, jax.Array]:
    """As `train_all_feedback`, of the path with this index alone; `clean` are passes along all paths of the examples
    that take part in it."""
    algorithm, training = settings.algorithm, settings.feedback[index]
    ways = paths.bind(settings.paths, bind(network, state, key), state.forward)
    block = ways[index].block
    return train_feedback(
        algorithm.feedback_rule,
        training,
        block,
        state.feedback[block.name],
        state.feedback_optimizer[block.name],
        algorithm.forward_map(ways, index, state.forward, state.feedback, clean),
        clean[index],
        jax.random.fold_in(key, index),
    )


def train_all_layers(
    network: Network, settings: Settings, state: TrainState, examples: int, key: jax.Array
) -> tuple[NetworkParameters, dict[str, jax.Array]]:
    """Feedback parameters and mean losses of the layers of all blocks after one batch, each by block name.

    Args:
        network, settings, state: as in `train_step`.
        examples: in the batch.
        key: of the probes.
    """
    if settings.algorithm.feedback_rule is None:
        return state.feedback, {}
    jobs = {
        block.name: functools.partial(train_one_block, network, settings, index) for index, block in enumerate(network)
    }
    probes = [block_probes(network, settings, index, state, examples, key) for index in range(len(network))]
    feedback, losses = _by_block(jobs, _done(settings, jobs, probes, state, key))
    return feedback, losses


def block_layers(network: Network, index: int, state: TrainState, examples: int, key: jax.Array):
    """`layers_of` a block in training."""
    block = bind(network, state, key)[index]
    f = lambda params, x: block.forward(params, x)[0]  # noqa: E731
    return layers_of(f, state.forward[block.name], example_of(block, examples))


def block_probes(
    network: Network, settings: Settings, index: int, state: TrainState, examples: int, key: jax.Array
) -> list[list[jax.Array]]:
    """Probes of a block's layers for each iteration."""
    layers, _ = block_layers(network, index, state, examples, key)
    keys = jax.random.split(jax.random.fold_in(key, index), settings.layers.iterations)
    return [draw_probes(layers, own_key, settings.layers.share) for own_key in keys]


def train_one_block(
    network: Network, settings: Settings, index: int, probes: list[list[jax.Array]], state: TrainState, key: jax.Array
) -> tuple[Any, jax.Array]:
    """As `train_all_layers`, of the block with this index alone."""
    name = network[index].name
    layers, weights_of = block_layers(network, index, state, 2, key)
    feedback, total = state.feedback[name], 0.0
    for of_iteration in probes:
        feedback, losses = settings.algorithm.feedback_rule(
            layers, weights_of, state.forward[name], feedback, of_iteration, settings.layers.rate
        )
        total += sum(losses) / max(1, len(losses))
    return feedback, jnp.asarray(total / len(probes))


def trained_blocks(network: Network, settings: Settings) -> list[str]:
    """The blocks whose feedback weights the rule trains."""
    if settings.algorithm.feedback_rule is None:
        return []
    ways = network if settings.algorithm.paths == "layers" else [path.block for path in settings.paths]
    return [block.name for block in ways]


def _done(settings: Settings, jobs: dict, batches: list, state: TrainState, key: jax.Array) -> list[tuple]:
    """What all jobs give, divided among groups of devices if there are any."""
    if settings.parallel and settings.parallel.owners:
        return divide_jobs(settings.parallel, jobs, batches, state, key)
    return [job(batch, state, key) for job, batch in zip(jobs.values(), batches, strict=True)]


def _by_block(jobs: dict, done: list[tuple]) -> list[dict]:
    return [dict(zip(jobs, values, strict=True)) for values in zip(*done, strict=True)]


def layer_parameters(network: Network, state: TrainState) -> frozenset[str]:
    """The parameters that have a feedback weight, by name, such as 'block.layer.kernel'."""
    names = []
    for index, block in enumerate(network):
        layers, _ = block_layers(network, index, state, 2, jax.random.key(0))
        of_block = parameter_names(state.forward[block.name])
        names += [f"{block.name}.{of_block[leaf]}" for layer in layers for leaf in layer.leaves]
    return frozenset(names)


def backprop_gradients(
    network: Network, params: NetworkParameters, images: jax.Array, labels: Any, loss: Loss = cross_entropy
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


def classification_metrics(logits: jax.Array, labels: jax.Array, weights: jax.Array | None = None) -> Metrics:
    """Cross-entropy ('loss', nats), 'top1' and, above 10 classes, 'top5', averaged over the batch.

    Args:
        logits: [batch, classes], or with more axes between.
        labels: [batch], integers.
        weights: [batch], of each example in the averages; equal weights if left out.
    """
    of_label = jnp.take_along_axis(logits, labels[..., None], axis=-1)
    # How many other classes are not strictly below: ties and NaN count against.
    rank = jnp.sum(~(logits < of_label), axis=-1) - 1
    values = {"loss": cross_entropy(logits, labels), "top1": rank < 1}
    if logits.shape[-1] > 10:
        values["top5"] = rank < 5
    return {name: jnp.average(value, weights=weights) for name, value in values.items()}
