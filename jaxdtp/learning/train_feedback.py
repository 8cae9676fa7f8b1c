"""Feedback learning of a whole network on one batch: of every path's weights, or of those beside every layer."""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from jaxdtp.devices.parallel import divide_jobs
from jaxdtp.learning import paths
from jaxdtp.learning.derived import layers_of
from jaxdtp.learning.feedback import FeedbackRule, examples_of, train_feedback
from jaxdtp.learning.layers import RARELY, LayerRule, draw_probes, match_layers, steps_to_match
from jaxdtp.learning.paths import along_paths
from jaxdtp.learning.state import Settings, TrainState, bind
from jaxdtp.learning.values import parameter_names
from jaxdtp.models.blocks import Pass, example_of
from jaxdtp.models.networks import Network, NetworkParameters


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
    feedback, optimizers, losses = _by_block(jobs, _done(settings, jobs, clean, state, key))
    return feedback, optimizers, losses


def train_one_feedback(
    network: Network, settings: Settings, index: int, clean: list[Pass], state: TrainState, key: jax.Array
) -> tuple[Any, optax.OptState, jax.Array]:
    """As `train_all_feedback`, of the path with this index alone; `clean` are passes along all paths of the examples
    that take part in it."""
    algorithm, training = settings.algorithm, settings.feedback[index]
    ways = paths.bind(settings.paths, bind(network, state, key), state.forward)
    block = ways[index].block
    if not all(block.per_example for block in network):
        # Noisy passes are those of these examples alone, with dropout and batch statistics of their own.
        clean = paths.passed_again(ways, index, state.forward, clean)
    return train_feedback(
        cast(FeedbackRule, algorithm.feedback_rule),
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

    Shared updates don't touch a mismatch of weights that are affine functions of the parameters. With them, once the
    probes of `match_layers` have removed it (`steps_to_match`), they come in one of `RARELY` steps, against rounding
    and what an optimizer may make of equal gradients. The loss of such a step counts for those without, where it is 0.

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

    def train() -> tuple[NetworkParameters, dict[str, jax.Array]]:
        probes = [block_probes(network, settings, index, state, examples, key) for index in range(len(network))]
        feedback, losses = _by_block(jobs, _done(settings, jobs, probes, state, key))
        return feedback, {name: loss.astype(float) for name, loss in losses.items()}

    if not (settings.algorithm.shared_update and settings.algorithm.feedback_rule is match_layers):
        return train()
    often = state.step.astype(float) < steps_with_probes(network, settings, state, examples, key)
    with jax.named_scope("probes"):
        skip = lambda: (state.feedback, {name: jnp.zeros(()) for name in jobs})  # noqa: E731
        feedback, losses = jax.lax.cond(often | (state.step % RARELY == 0), train, skip)
    weight = jnp.where(often, 1.0, float(RARELY))
    return feedback, {name: weight * loss for name, loss in losses.items()}


def steps_with_probes(
    network: Network, settings: Settings, state: TrainState, examples: int, key: jax.Array
) -> jax.Array:
    """The step of a run from which on probes may be rare (`steps_to_match`); never, where equal updates of parameters
    aren't equal ones of a weight. Arguments as in `train_all_layers`."""
    iterations, share, rate = settings.layers
    layers = [layer for index in range(len(network)) for layer in block_layers(network, index, state, examples, key)[0]]
    if not all(layer.affine for layer in layers):
        return jnp.asarray(jnp.inf)
    # At another rate than that of exact line search less of a mismatch is removed; from 2 on, nothing.
    removed = jnp.asarray(iterations * rate * (2 - rate), float)
    return jnp.where(removed > 0, jnp.ceil(steps_to_match(layers, share) / removed), jnp.inf)


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
    rule = cast(LayerRule, settings.algorithm.feedback_rule)
    layers, weights_of = block_layers(network, index, state, 2, key)
    feedback, found = state.feedback[name], []
    for of_iteration in probes:
        feedback, losses = rule(layers, weights_of, state.forward[name], feedback, of_iteration, settings.layers.rate)
        found += losses
    return feedback, jnp.mean(jnp.stack(found)) if found else jnp.zeros(())


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
    # NNX writes into what it keeps, which arrays of the host don't let it.
    state = jax.tree.map(jnp.asarray, state)
    for index, block in enumerate(network):
        layers, _ = block_layers(network, index, state, 2, jax.random.key(0))
        of_block = parameter_names(state.forward[block.name])
        names += [f"{block.name}.{of_block[leaf]}" for layer in layers for leaf in layer.leaves]
    return frozenset(names)
