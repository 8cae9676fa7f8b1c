"""Which group of devices trains which feedback: by measured cost."""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxdtp.learning.feedback import examples_of
from jaxdtp.learning.paths import along_paths
from jaxdtp.learning.state import Settings, TrainState, bind
from jaxdtp.learning.train_feedback import block_probes, train_one_block, train_one_feedback
from jaxdtp.models import networks
from jaxdtp.models.blocks import example_of
from jaxdtp.models.networks import Network

ITERATIONS = 2  # that are timed, of each path's feedback training


def feedback_seconds(network: Network, settings: Settings, state: TrainState, batch_size: int) -> list[float]:
    """Seconds that the feedback training of each path, or of each block's layers, takes on one device for one batch.

    Args:
        network, settings: of the run; `settings.parallel` doesn't matter.
        state: on this host.
        batch_size: examples that one device gets.
    """
    settings, key = settings._replace(parallel=None), jax.random.key(0)
    if settings.algorithm.paths == "layers":
        probes = [block_probes(network, settings, index, state, batch_size, key) for index in range(len(network))]
        jobs = [functools.partial(train_one_block, network, settings, index) for index in range(len(network))]
        return [_seconds(job, of_block, state, key) for job, of_block in zip(jobs, probes, strict=True)]
    timed = [training._replace(iterations=min(training.iterations, ITERATIONS)) for training in settings.feedback]
    example = example_of(network[0], batch_size)
    images = jax.random.normal(key, example.shape).astype(example.dtype)
    run = lambda state, images: networks.forward_passes(bind(network, state, key), state.forward, images)  # noqa: E731
    passes = jax.jit(run)(state, images)
    seconds = []
    for index, training in enumerate(settings.feedback):
        clean = along_paths(settings.paths, examples_of(timed[index], passes))
        job = functools.partial(train_one_feedback, network, settings._replace(feedback=tuple(timed)), index)
        seconds.append(_seconds(job, clean, state, key) * training.iterations / timed[index].iterations)
    return seconds


def _seconds(job: Callable, *operands: Any) -> float:
    job = jax.jit(job)
    jax.block_until_ready(job(*operands))  # compiles
    start = time.perf_counter()
    jax.block_until_ready(job(*operands))
    return time.perf_counter() - start


def balance(costs: Sequence[float], groups: int) -> tuple[int, ...]:
    """A group for each job, so that the most loaded group has little more than the others: the most costly job that is
    left goes to the group with the least (Graham 1969: at most 4/3 of the best possible)."""
    owners, loads = [0] * len(costs), [0.0] * groups
    for job in sorted(range(len(costs)), key=lambda job: -costs[job]):
        owners[job] = loads.index(min(loads))
        loads[owners[job]] += costs[job]
    return tuple(owners)
