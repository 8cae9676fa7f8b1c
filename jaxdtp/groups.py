"""The seeds of a run, in groups: each group's steps are done by one call.

Where launches cost more than operations, on GPU and TPU, all seeds train together, in programs with one more axis. On
the CPU, where batched convolutions are slow and small operations use one core, each seed runs the programs of a run of
its own, and as many of them at a time as there are cores.
"""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxdtp import feeding
from jaxdtp.config import ConfigError, seeds_of
from jaxdtp.data import Dataset
from jaxdtp.feeding import Feed
from jaxdtp.parallel import Parallel, divide_seeds, gather_seeds, replicate
from jaxdtp.programs import Numbers, Programs, numbers_of, programs_of

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
        together: whether there may be several; then arrays of what they don't share have one more axis, the first.
        keys: by seed.
        programs, numbers: of the structure, and what they are called with.
        train, validation, test: their examples.
    """

    members: tuple[int, ...]
    together: bool
    keys: tuple[Keys, ...]
    programs: Programs
    numbers: Numbers
    train: Feed
    validation: Feed
    test: Feed


def keys_of(seed: int) -> Keys:
    """The random keys of a seed."""
    init, train, measure = jax.random.split(jax.random.key(seed), 3)
    return Keys(init, *jax.random.split(train), measure)


def train_together(config: ConfigDict, datasets: Sequence[Dataset], mesh: Mesh) -> bool:
    """Whether a run's seeds are one group.

    Args:
        config: as from `config.resolve`.
        datasets: by seed.
        mesh: of all devices.

    Raises:
        ConfigError: it is asked for, of data that are streamed, or with groups of devices for feedback.
    """
    if not config.seeds or config.parallel.seeds == "in_turn":
        return False
    megabytes, groups = config.dataset.device_megabytes, config.parallel.layer_groups
    reason = ""
    if not feeding.fit([dataset.train for dataset in datasets], mesh, megabytes):
        reason = f"as the training data don't fit into config.dataset.device_megabytes={megabytes:g}"
    elif groups > 1:
        reason = f"with config.parallel.layer_groups={groups}"
    if config.parallel.seeds == "together" and reason:
        raise ConfigError(f"config.parallel.seeds: got 'together'; allowed: auto, in_turn, {reason}")
    return not reason and (config.parallel.seeds == "together" or jax.default_backend() != "cpu")


def groups_of(
    config: ConfigDict, datasets: Sequence[Dataset], steps: int, parallel: Parallel, *, together: bool
) -> tuple[Group, ...]:
    """The groups of a run, their examples on the way.

    Args:
        config: as from `config.resolve`.
        datasets: by seed.
        steps: in an epoch.
        parallel: the devices.
        together: as from `train_together`.
    """
    seeds, classes = seeds_of(config), len(datasets[0].classes)
    programs = programs_of(config, datasets[0].train.images.shape[1:], classes, parallel, together=together)
    members = [tuple(range(len(seeds)))] if together else [(place,) for place in range(len(seeds))]
    sizes = {"train": config.batch_size, "validation": EVALUATION_BATCH, "test": EVALUATION_BATCH}
    feeds = {
        name: feeding.open_feeds(
            [getattr(dataset, name) for dataset in datasets],
            parallel.mesh,
            size,
            config.dataset.device_megabytes,
            together=together,
        )
        for name, size in sizes.items()
    }
    groups = []
    for number, places in enumerate(members):
        of_group = [seeds[place] for place in places]
        numbers = numbers_of(config, of_group if together else of_group[0], steps, parallel)
        examples = {name: of_split[number] for name, of_split in feeds.items()}
        groups.append(Group(places, together, tuple(map(keys_of, of_group)), programs, numbers, **examples))
    return tuple(groups)


def workers(groups: Sequence[Group], mesh: Mesh) -> int:
    """How many groups may train at a time: on several devices one, as their collectives would wait for each other."""
    alone = mesh.size > 1 or jax.default_backend() != "cpu"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return 1 if alone else min(len(groups), cores)


def place_by_seed(group: Group, of_seeds: Sequence[Any]) -> Any:
    """Arrays and random keys by seed of a group, on the devices."""
    if not group.together:
        return replicate(group.train.mesh, of_seeds[0])

    def stack(*arrays):
        return (jnp if isinstance(arrays[0], jax.Array) else np).stack(arrays)

    return divide_seeds(group.train.mesh, jax.tree.map(stack, *of_seeds))


def by_seed(group: Group, tree: Any) -> list[Any]:
    """The other way round: arrays on the host, for each seed of a group."""
    if not group.together:
        return [jax.device_get(tree)]
    return unstack(jax.device_get(gather_seeds(group.train.mesh, tree)), len(group.members))


def unstack(tree: Any, count: int) -> list[Any]:
    """Trees of the parts of arrays along their first axis, which has so many."""
    leaves, structure = jax.tree.flatten(tree)
    return [jax.tree.unflatten(structure, [leaf[number] for leaf in leaves]) for number in range(count)]
