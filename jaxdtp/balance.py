"""Which group of devices trains which feedback: by measured cost."""

import functools
import time
from collections.abc import Sequence

import jax

from jaxdtp.learning.feedback import examples_of
from jaxdtp.learning.paths import along_paths
from jaxdtp.learning.step import Settings, TrainState, train_one_feedback
from jaxdtp.models import networks
from jaxdtp.models.networks import Network

ITERATIONS = 2  # that are timed, of each path's feedback training


def feedback_seconds(network: Network, settings: Settings, state: TrainState, batch_size: int) -> list[float]:
    """Seconds that the feedback training of each path takes on one device for one batch.

    Args:
        network, settings: of the run; `settings.parallel` doesn't matter.
        state: on this host.
        batch_size: examples that one device gets.
    """
    timed = [training._replace(iterations=min(training.iterations, ITERATIONS)) for training in settings.feedback]
    settings_timed = settings._replace(feedback=tuple(timed), parallel=None)
    key = jax.random.key(0)
    images = jax.random.normal(key, (batch_size, *network[0].input_shape))
    passes = jax.jit(functools.partial(networks.forward_passes, network))(state.forward, images)
    clean = [along_paths(settings.paths, examples_of(training, passes)) for training in timed]
    seconds = []
    for index, training in enumerate(settings.feedback):
        train = jax.jit(functools.partial(train_one_feedback, settings_timed, index))
        jax.block_until_ready(train(clean[index], state, key))  # compiles
        start = time.perf_counter()
        jax.block_until_ready(train(clean[index], state, key))
        seconds.append((time.perf_counter() - start) * training.iterations / timed[index].iterations)
    return seconds


def balance(costs: Sequence[float], groups: int) -> tuple[int, ...]:
    """A group for each job, so that the most loaded group has little more than the others: the most costly job that is
    left goes to the group with the least (Graham 1969: at most 4/3 of the best possible)."""
    owners, loads = [0] * len(costs), [0.0] * groups
    for job in sorted(range(len(costs)), key=lambda job: -costs[job]):
        owners[job] = loads.index(min(loads))
        loads[owners[job]] += costs[job]
    return tuple(owners)
