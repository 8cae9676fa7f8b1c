"""The seeds of a run, in groups: each group's steps are done by one call.

Seeds of one group share programs with one more axis: where launches cost more than operations, on GPU and TPU, that are
all seeds, unless they have convolutions on a GPU. Small operations use one core of a CPU, so there are as many groups
there as cores, each with a thread.
"""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxdtp.configuration.config import seeds_of
from jaxdtp.data import Dataset, feeding
from jaxdtp.data.feeding import Feed
from jaxdtp.devices.parallel import Parallel, divide_seeds, gather_seeds, make_mesh, replicate
from jaxdtp.learning.state import TrainState
from jaxdtp.models import networks
from jaxdtp.models.blocks import example_of
from jaxdtp.models.networks import Network
from jaxdtp.models.plain_convolutions import has_convolutions
from jaxdtp.running.programs import Numbers, Programs, numbers_of, programs_of
from jaxdtp.system.errors import ConfigError

EVALUATION_BATCH = 500


class Keys(NamedTuple):
    """A seed's random keys.

    Attributes:
        init: of the parameters.
        order: of the examples, folded with the round.
        step: of augmentation and noise, folded with the step.
        measure: of noise and probes of what is measured, folded with the epoch.
    """

    init: jax.Array
    order: jax.Array
    step: jax.Array
    measure: jax.Array


class Group(NamedTuple):
    """Seeds whose steps are done by one call.

    Attributes:
        members: their places among the seeds of the run.
        keys: by seed.
        programs, numbers: of the structure, and what they are called with.
        train, validation, test: their examples.
    """

    members: tuple[int, ...]
    keys: tuple[Keys, ...]
    programs: Programs
    numbers: Numbers
    train: Feed
    validation: Feed
    test: Feed

    @property
    def together(self) -> bool:
        """Whether there are several; then arrays of what they don't share have one more axis, the first."""
        return len(self.members) > 1


def keys_of(seed: int) -> Keys:
    """The random keys of a seed."""
    init, train, measure = jax.random.split(jax.random.key(seed), 3)
    order, step = jax.random.split(train)
    return Keys(init, order, step, measure)


def division(
    config: ConfigDict, datasets: Sequence[Dataset], network: Network, state: TrainState
) -> tuple[tuple[int, ...], ...]:
    """Which seeds train together: their places among those of the run, by group.

    Args:
        config: as from `config.resolve`.
        datasets: by seed.
        network, state: of one of them.

    Raises:
        ConfigError: 'together' is asked for, of data that are streamed, or with groups of devices for feedback.
    """
    alone = tuple((member,) for member in range(len(datasets)))
    if len(alone) == 1 or config.parallel.seeds == "in_turn":
        return alone
    megabytes, layers, reason = config.dataset.device_megabytes, config.parallel.layer_groups, ""
    if not all(feeding.fit(splits, make_mesh(), megabytes) for splits in list(zip(*datasets, strict=True))[:3]):
        reason = f"as the data don't fit into config.dataset.device_megabytes={megabytes:g}"
    elif layers > 1:
        reason = f"with config.parallel.layer_groups={layers}"
    if config.parallel.seeds == "together" and reason:
        raise ConfigError(f"config.parallel.seeds: got 'together'; allowed: auto, in_turn, {reason}")
    if reason or (config.parallel.seeds == "auto" and _slow_together(network, state)):
        return alone
    parts = np.array_split(np.arange(len(datasets)), min(at_a_time(), len(datasets)))
    return tuple(tuple(part.tolist()) for part in parts)


def _slow_together(network: Network, state: TrainState) -> bool:
    """Whether several seeds should take turns: their forward pass has convolutions with kernels of their own, which are
    slow on CPU and GPU, or can't be batched. On maps as small as those of the digits convolutions are faster together
    on a CPU, too, which one has to ask for."""
    shapes = jax.tree.map(
        lambda array: jax.ShapeDtypeStruct((2, *array.shape), array.dtype), (state.forward, state.model)
    )

    def run(params, model, x):
        return networks.logits(networks.bind(network, model), params, x)

    try:
        program = jax.make_jaxpr(jax.vmap(run, (0, 0, None)))(*shapes, example_of(network[0], 2))
        return jax.default_backend() != "tpu" and has_convolutions(program.jaxpr)
    except Exception:  # a user's operations that can't be batched
        return True


def at_a_time() -> int:
    """How many groups may train at a time: one for each core where the CPU is the one device, as small operations use
    one core; on several devices one, as their collectives would wait for each other."""
    if jax.device_count() > 1 or jax.default_backend() != "cpu":
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def groups_of(
    config: ConfigDict,
    datasets: Sequence[Dataset],
    steps: int,
    parallel: Parallel,
    members: Sequence[tuple[int, ...]],
) -> tuple[Group, ...]:
    """The groups of a run, their examples on the way.

    Args:
        config: as from `config.resolve`.
        datasets: by seed.
        steps: in an epoch.
        parallel: the devices.
        members: as from `division`.
    """
    seeds, classes = seeds_of(config), len(datasets[0].classes)
    sizes = {"train": config.batch_size, "validation": EVALUATION_BATCH, "test": EVALUATION_BATCH}
    feeds = {
        name: feeding.open_feeds(
            [getattr(dataset, name) for dataset in datasets],
            members,
            parallel.mesh,
            size,
            config.dataset.device_megabytes,
        )
        for name, size in sizes.items()
    }
    groups = []
    for number, places in enumerate(members):
        many, of_group = len(places) > 1, [seeds[place] for place in places]
        programs = programs_of(config, datasets[0].train.images.shape[1:], classes, parallel, together=many)
        numbers = numbers_of(config, of_group if many else of_group[0], steps, parallel)
        examples = {name: of_split[number] for name, of_split in feeds.items()}
        groups.append(Group(places, tuple(map(keys_of, of_group)), programs, numbers, **examples))
    return tuple(groups)


def place_by_seed(group: Group, of_seeds: Sequence[Any]) -> Any:
    """Arrays and random keys by seed of a group, on the devices."""
    if not group.together:
        return replicate(group.train.mesh, of_seeds[0])

    def stack(*arrays):
        return (jnp if isinstance(arrays[0], jax.Array) else np).stack(arrays)

    return divide_seeds(group.train.mesh, jax.tree.map(stack, *of_seeds))


def on_host(group: Group, tree: Any) -> Any:
    """A group's arrays, on every host."""
    return jax.device_get(gather_seeds(group.train.mesh, tree))


def by_seed(group: Group, tree: Any) -> list[Any]:
    """The other way round than `place_by_seed`: arrays on the host, for each seed of a group."""
    found = on_host(group, tree)
    return unstack(found, len(group.members)) if group.together else [found]


def unstack(tree: Any, count: int) -> list[Any]:
    """Trees of the parts of arrays along their first axis, which has so many."""
    leaves, structure = jax.tree.flatten(tree)
    return [jax.tree.unflatten(structure, [leaf[number] for leaf in leaves]) for number in range(count)]
