"""The passes through the training data that a run consists of, and how one of them is done."""

import math
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict
from tqdm import tqdm

from jaxdtp import checkpoints, feeding, hosts, reports
from jaxdtp.checkpoints import Checkpoint
from jaxdtp.console import Unfailing, say
from jaxdtp.feeding import Feed
from jaxdtp.learning.algorithms import ALGORITHMS
from jaxdtp.learning.state import Settings, TrainState
from jaxdtp.learning.step import Metrics, feedback_step, train_step
from jaxdtp.models.networks import Network
from jaxdtp.parallel import replicate
from jaxdtp.programs import Numbers, Programs
from jaxdtp.signals import StoppedError

SECONDS_PER_CALL = 1.0  # of training in one call to the device: how often the progress bar moves and signals are seen
SECONDS_PER_LINE = 30.0  # between progress lines where there is no terminal


class DivergedError(FloatingPointError):
    """An activation, a loss or a weight is no longer finite."""


class Round(NamedTuple):
    """One pass through the training data.

    Attributes:
        number: 1, 2, ... from the run's beginning; decides the order of the examples.
        epoch: 1, 2, ..., that it belongs to.
        step: `train_step`, or `feedback_step` before the first epoch and after each.
        last: whether the epoch ends with it.
    """

    number: int
    epoch: int
    step: Callable
    last: bool


def round_at(config: ConfigDict, number: int) -> Round:
    """Round `number` = 1, 2, ... of a configuration's run."""
    if ALGORITHMS[config.algorithm].feedback_rule is None:
        return Round(number, number, train_step, last=True)
    alone, of_epoch = config.feedback.pretraining_epochs, 1 + config.feedback.extra_epochs
    if number <= alone:
        return Round(number, 1, feedback_step, last=False)
    before, within = divmod(number - alone - 1, of_epoch)
    return Round(number, 1 + before, feedback_step if within else train_step, last=within == of_epoch - 1)


class Run(NamedTuple):
    """What stays fixed during training.

    Attributes:
        config: as from `config.resolve`.
        network, settings: as built from it.
        programs, numbers: of its structure, and what they are called with.
        steps: in a round.
        feed: of the training split.
        order_key, step_key: of the order of examples, folded with the round; of augmentation and noise.
        workdir: of the checkpoints, among other things.
        layers: names of the parameters that have a feedback weight beside them.
        stops: signals received so far.
        ours: `ours()`, whether other runs are still kept out of `workdir`; of the first host.
    """

    config: ConfigDict
    network: Network
    settings: Settings
    programs: Programs
    numbers: Numbers
    steps: int
    feed: Feed
    order_key: jax.Array
    step_key: jax.Array
    workdir: epath.Path
    layers: frozenset[str]
    stops: list[str]
    ours: Callable[[], bool] | None


class Progress(NamedTuple):
    """What is known of an epoch that is not complete; as JSON in a checkpoint.

    Attributes:
        totals: metrics summed over the steps of its present round so far; None at a round's beginning.
        metrics: averaged over its training round; None before that is complete.
        seconds: of training so far.
    """

    totals: dict[str, Any] | None = None
    metrics: reports.Record | None = None
    seconds: float = 0.0


def train_round(run: Run, round: Round, state: TrainState, progress: Progress) -> tuple[TrainState, Progress]:
    """What is left of one pass through the data, in calls of about a second, with a progress bar on a terminal and now
    and then a line elsewhere.

    Returns:
        The state after the round, and what is known of the epoch so far.

    Raises:
        DivergedError: after the first step that wasn't finite.
        StoppedError: between two calls; the state is saved.
    """
    batch_size, steps = run.config.batch_size, run.steps
    label = f"epoch {round.epoch}" if round.step is train_step else f"epoch {round.epoch}, feedback alone"
    order_key = jax.random.fold_in(run.order_key, round.number)
    order = np.asarray(jax.random.permutation(order_key, len(run.feed.split.rows)))[: steps * batch_size]
    zeros = run.programs.zero_metrics(round.step)
    # From a checkpoint they come as JSON.
    totals = jax.tree.map(lambda zero, value: np.asarray(value, zero.dtype), zeros, progress.totals or zeros)
    totals, key = replicate(run.feed.mesh, (totals, run.step_key))
    first = done = int(state.step) % steps
    windows = feeding.windows(run.feed, order, first)
    window = next(windows)
    advance = run.programs.steps(round.step, run.numbers, window.data, window.order, key, state, totals)
    count = 1
    start = last_line = time.perf_counter()
    with tqdm(
        total=steps * batch_size,
        initial=done * batch_size,
        desc=label,
        unit=" images",
        unit_scale=True,
        leave=False,
        disable=None if hosts.is_first() else True,
        file=Unfailing(sys.stderr),
    ) as bar:
        while done < steps:
            stop, count = hosts.agree(bool(run.stops), count)
            if stop:
                so_far = jax.tree.map(float, jax.device_get(totals))
                seconds = progress.seconds + time.perf_counter() - start
                save_and_stop(run, state, Progress(so_far, progress.metrics, seconds), f"{label}, step {done}")
            window = next(windows) if done == window.stop else window
            count = min(count, window.stop - done)
            batch = (window.data, window.order, key, state, totals)
            state, totals, ran = advance(run.numbers, *batch, done - window.first, count)
            done += int(ran)
            if int(ran) < count:
                break
            bar.update(count * batch_size)
            loss = f"loss {float(totals['loss']) / done:.4f}"
            bar.set_postfix_str(loss)
            now = time.perf_counter()
            seconds_per_step = (now - start) / (done - first)
            if bar.disable and now - last_line > SECONDS_PER_LINE:
                left = tqdm.format_interval((steps - done) * seconds_per_step)
                speed = f"{batch_size / seconds_per_step:.0f} images/s"
                say(f"{label}: step {done}/{steps}, {loss}, {speed}, {left} left")
                last_line = now
            count = max(1, math.ceil(SECONDS_PER_CALL / seconds_per_step))
    seconds = progress.seconds + time.perf_counter() - start
    totals = jax.device_get(totals)
    if fault := find_fault(run.network, state, totals):
        good = checkpoints.saved_steps(run.workdir)
        where = f"step {good[-1]} in {run.workdir}" if good else "none yet"
        raise DivergedError(f"{label}, step {state.step}: {fault}; last good checkpoint: {where}")
    if round.step is not train_step:
        return state, Progress(None, progress.metrics, seconds)
    return state, Progress(
        None, reports.flat_metrics(jax.tree.map(lambda total: total / steps, totals), "train_"), seconds
    )


def save_and_stop(run: Run, state: TrainState, progress: Progress, where: str) -> None:
    """Save the state within a round and raise StoppedError."""
    within = Checkpoint(jax.device_get(state), -math.inf, progress._asdict())

    def save():
        check_claim(run)
        checkpoints.save(run.workdir, within)

    hosts.together(save, first_alone=True)
    signals = " and ".join(run.stops) or "a signal to another host"
    raise StoppedError(
        f"{signals}: stopped and saved after {where}; the same command with the same workdir goes on from there"
    )


def check_claim(run: Run) -> None:
    """Raise StorageError where another run has taken over the workdir, which it does with one that shows no life."""
    if not run.ours():
        raise hosts.StorageError(
            f"--workdir: another run has taken over {run.workdir}, while this one couldn't be seen there; allowed: one "
            "run at a time"
        )


def find_fault(network: Network, state: TrainState, totals: Metrics) -> str | None:
    """What is not finite, beginning with what would be the cause of the rest; None if all is well."""
    for metric, words in (("activation", "activations"), ("feedback_loss", "feedback loss")):
        for block in network:
            value = totals[metric].get(block.name, 0.0)
            if not np.isfinite(value):
                return f"the {words} of block {block.name} became {value}"
    if not np.isfinite(totals["loss"]):
        return f"the training loss became {totals['loss']}"
    forward, feedback, model = jax.device_get((state.forward, state.feedback, state.model))
    for block in network:
        weights = (forward[block.name], feedback.get(block.name), model[block.name])
        if not all(np.isfinite(array).all() for array in jax.tree.leaves(weights)):
            return f"the weights of block {block.name} are no longer finite"
    return None
