"""What is measured of a group of seeds: on validation or test data, and of alignment."""

import functools
import math

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxdtp.alignment import weight_alignment
from jaxdtp.data import feeding, read
from jaxdtp.data.feeding import Feed
from jaxdtp.learning.algorithms import ALGORITHMS
from jaxdtp.learning.state import TrainState
from jaxdtp.models.networks import NetworkParameters, NetworkState
from jaxdtp.results import reports
from jaxdtp.running.groups import Group, by_seed, on_host, place_by_seed, unstack


def evaluate(
    group: Group, feed: Feed, params: NetworkParameters, model: NetworkState, prefix: str
) -> list[reports.Record]:
    """`epoch.evaluate`, averaged over all examples of a split, by seed.

    Args:
        group: of the seeds.
        feed: of their splits.
        params, model: forward parameters and state by block name, on the devices.
        prefix: of the names.
    """
    order = np.broadcast_to(np.arange(feed.examples), feed.rows.shape)
    total: dict[str, np.ndarray] = {}
    for window in feeding.windows(feed, order):
        batch = (window.data, window.order, window.examples)
        sums = on_host(group, group.programs.evaluate(group.numbers, feed.batch_size, params, model, *batch))
        total = {name: total.get(name, 0.0) + np.asarray(value, float) for name, value in sums.items()}
    means = {name: value / feed.examples for name, value in total.items()}
    by_member = unstack(means, len(group.members)) if group.together else [means]
    return [reports.flat_metrics(of_member, prefix) for of_member in by_member]


def measure(
    config: ConfigDict, group: Group, layers: frozenset[str], epoch: int, state: TrainState
) -> list[reports.Record]:
    """What is measured after an epoch on the weights alone and, in some epochs, on a batch of the training data, by
    seed.

    Args:
        config: as from `config.resolve`.
        group: of the seeds.
        layers: names of the parameters that have a feedback weight beside them.
        epoch: its number; 0: before the first one.
        state: on the devices.
    """
    records: list[reports.Record] = [{} for _ in group.members]
    paths = ALGORITHMS[config.algorithm].paths
    if paths in ("consecutive", "layers"):
        align = functools.partial(weight_alignment, names=layers if paths == "layers" else None)
        align = jax.vmap(align) if group.together else align
        for record, found in zip(records, by_seed(group, align(state.forward, state.feedback)), strict=True):
            record |= reports.flat_metrics(found)
    every = config.alignment.every_epochs
    if every and epoch % every == 0 and paths != "none":
        batches = [
            read(split, _chosen(keys.measure, len(split.rows), config.batch_size))
            for keys, split in zip(group.keys, group.train.splits, strict=True)
        ]
        keys = [jax.random.fold_in(keys.measure, epoch) for keys in group.keys]
        matching = group.programs.measure_alignment(
            group.numbers, state, *(place_by_seed(group, values) for values in (batches, keys))
        )
        for record, found in zip(records, by_seed(group, matching), strict=True):
            # Where a gradient is zero there is no angle to it.
            record |= {name: value for name, value in reports.flat_metrics(found).items() if math.isfinite(value)}
    return records


def _chosen(key: jax.Array, examples: int, size: int) -> np.ndarray:
    """The examples of a seed that alignment is measured on, the same after each epoch. Not the first ones: data may be
    sorted by class."""
    # No epoch has that number.
    own_key = jax.random.fold_in(key, np.iinfo(np.int32).max)
    return np.asarray(jax.random.permutation(own_key, examples)[:size])
