"""The passes through the training data that a run consists of, and how one of them is done."""

import contextlib
import functools
import math
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict
from tqdm import tqdm

from jaxdtp.configuration.config import seeds_of
from jaxdtp.data import feeding
from jaxdtp.data.feeding import Window
from jaxdtp.devices import hosts
from jaxdtp.learning.algorithms import ALGORITHMS
from jaxdtp.learning.state import Settings, TrainState
from jaxdtp.learning.step import Metrics, feedback_step, train_step
from jaxdtp.models.networks import Network
from jaxdtp.results import reports
from jaxdtp.running import checkpoints
from jaxdtp.running.epoch import finite
from jaxdtp.running.groups import Group, at_a_time, by_seed, on_host, place_by_seed
from jaxdtp.running.standing import Standing, checkpoint_of
from jaxdtp.system.console import Unfailing, say
from jaxdtp.system.signals import StoppedError

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
        network, settings: as built from it, for the first seed.
        steps: in a round.
        groups: of the seeds.
        workdir: of the checkpoints, among other things.
        layers: names of the parameters that have a feedback weight beside them.
        stops: signals received so far.
        ours: `ours()`, whether other runs are still kept out of `workdir`, which is up to the first host.
    """

    config: ConfigDict
    network: Network
    settings: Settings
    steps: int
    groups: tuple[Group, ...]
    workdir: epath.Path
    layers: frozenset[str]
    stops: list[str]
    ours: Callable[[], bool]


class Going(NamedTuple):
    """A group within a round.

    Attributes:
        state, totals: of the seeds, on the devices; metrics summed over the steps of the round so far.
        done: steps of the round.
        broken: whether none of the seeds can go on.
        window: of the examples in use, and the `windows` that follow.
        advance: `advance(state, totals, window, first, count)`, up to so many steps from the first on: state and totals
            afterwards, and how many steps there were.
        alone: `alone()`, whether that is to be called only while no other group is.
    """

    state: TrainState
    totals: Metrics
    done: int
    broken: bool
    window: Window
    windows: Iterator[Window]
    advance: Callable[..., tuple[TrainState, Metrics, Any]]
    alone: Callable[[], bool]


def train_round(run: Run, round: Round, standing: Standing) -> Standing:
    """What is left of one pass through the data, in calls of about a second, with a progress bar on a terminal and now
    and then a line elsewhere.

    Args:
        run: what stays fixed.
        round: the pass.
        standing: before it, or within it.

    Returns:
        Where the run is after the round.

    Raises:
        DivergedError: after the first step that wasn't finite, of the last seed that went on.
        StoppedError: between two calls; the state is saved.
    """
    label = f"epoch {round.epoch}" if round.step is train_step else f"epoch {round.epoch}, feedback alone"
    standing = standing._replace(scores=[None] * len(standing.states))
    going = {
        number: begin(run, round, group, standing)
        for number, group in enumerate(run.groups)
        if any(standing.faults[member] is None for member in group.members)
    }
    workers = min(len(run.groups), at_a_time())
    if workers > 1 and any(of.alone() for of in going.values()):
        workers = 1
    start, count = time.perf_counter(), 1
    with progress_bar(run, label, going) as tell, ThreadPoolExecutor(workers) as pool:
        # Contexts, of precision for one, are a thread's own.
        run_all = pool.map if workers > 1 else map
        while pending := [number for number, of in going.items() if of.done < run.steps and not of.broken]:
            stop, count = hosts.agree(bool(run.stops), count)
            if stop:
                within = standing._replace(seconds=standing.seconds + time.perf_counter() - start)
                where = f"{label}, step {min(going[number].done for number in pending)}"
                save_and_stop(run, fetch(run, within, going), where)
            # Those that are behind the others; all get as far, as there may be more of them than workers.
            chosen = sorted(pending, key=lambda number: going[number].done)[:workers]
            before = time.perf_counter()
            advanced = list(run_all(functools.partial(advance, run, count), [going[number] for number in chosen]))
            took, steps = time.perf_counter() - before, max(1, advanced[0].done - going[chosen[0]].done)
            going |= dict(zip(chosen, advanced, strict=True))
            count = max(1, math.ceil(SECONDS_PER_CALL * steps / took))
            tell(going)
    standing = standing._replace(seconds=standing.seconds + time.perf_counter() - start)
    return end(run, round, fetch(run, standing, going), label)


def begin(run: Run, round: Round, group: Group, standing: Standing) -> Going:
    """A group at its place in a round, its program compiled."""
    config, steps = run.config, run.steps
    of_group = [(standing.states[member], standing.totals[member]) for member in group.members]
    alive = [standing.faults[member] is None for member in group.members]
    done = max(
        int(state.step) - (round.number - 1) * steps for (state, _), goes in zip(of_group, alive, strict=True) if goes
    )
    keys = [jax.random.fold_in(keys.order, round.number) for keys in group.keys]
    orders = [np.asarray(jax.random.permutation(key, group.train.examples)) for key in keys]
    orders = [order[: steps * config.batch_size] for order in orders]
    zeros = jax.device_get(group.programs.zero_metrics(round.step))
    # From a checkpoint they come as JSON. A seed whose metrics aren't finite stays as it is.
    nothing = jax.tree.map(lambda zero: np.full_like(zero, np.nan), zeros)
    totals = [
        jax.tree.map(lambda zero, value: np.asarray(value, zero.dtype), zeros, so_far or zeros) if goes else nothing
        for (_, so_far), goes in zip(of_group, alive, strict=True)
    ]
    state = place_by_seed(group, [state for state, _ in of_group])
    totals, key = (place_by_seed(group, values) for values in (totals, [keys.step for keys in group.keys]))
    # A group that was done before others when the run was stopped has a window, too, though it needs none.
    first = min(done, steps - 1)
    windows = feeding.windows(group.train, np.stack(orders) if group.together else orders[0], first)
    window = next(windows)
    program = group.programs.steps(round.step, group.numbers, window.data, window.order, key, state, totals)

    def advance(state, totals, window, first, count):
        return program.run(group.numbers, window.data, window.order, key, state, totals, first - window.first, count)

    return Going(state, totals, done, done >= steps, window, windows, advance, program.alone)


def advance(run: Run, count: int, going: Going) -> Going:
    """A group up to `count` steps later."""
    window = next(going.windows) if going.done == going.window.stop else going.window
    count = min(count, window.stop - going.done)
    with jax.enable_x64(run.config.float64):
        # Without waiting, a call would seem to take no time, and the next one be of all steps that are left.
        state, totals, ran = jax.block_until_ready(going.advance(going.state, going.totals, window, going.done, count))
        ran = int(ran)
        broken = ran < count and not finite(on_host(run.groups[0], totals)).any()
    return going._replace(state=state, totals=totals, done=going.done + ran, broken=broken, window=window)


def fetch(run: Run, standing: Standing, going: dict[int, Going]) -> Standing:
    """Where a run is within a round, on the host."""
    states, totals = list(standing.states), list(standing.totals)
    for number, of in going.items():
        group = run.groups[number]
        pairs = zip(by_seed(group, of.state), by_seed(group, of.totals), strict=True)
        for member, (state, so_far) in zip(group.members, pairs, strict=True):
            if standing.faults[member] is None:
                states[member], totals[member] = state, jax.tree.map(float, so_far)
    return standing._replace(states=states, totals=totals)


def end(run: Run, round: Round, standing: Standing, label: str) -> Standing:
    """After a round: its metrics, and the seeds that something isn't finite of are given up.

    Raises:
        DivergedError: all are.
    """
    seeds, faults, metrics = seeds_of(run.config), list(standing.faults), list(standing.metrics)
    for member, (state, totals) in enumerate(zip(standing.states, standing.totals, strict=True)):
        if totals is None:  # given up before
            continue
        if fault := find_fault(run.network, state, totals):
            faults[member] = f"{label}, step {state.step}: {fault}"
        if round.step is train_step:
            means = jax.tree.map(lambda total: total / run.steps, totals)
            metrics[member] = reports.flat_metrics(means, "train_")
    if all(faults):
        good = checkpoints.saved_steps(run.workdir)
        where = f"step {good[-1]} in {run.workdir}" if good else "none yet"
        words = [f"seed {seed}: {fault}" for seed, fault in zip(seeds, faults, strict=True)]
        why = "; ".join(words) if run.config.seeds else faults[0]
        raise DivergedError(f"{why}; last good checkpoint: {where}")
    for seed, before, fault in zip(seeds, standing.faults, faults, strict=True):
        if fault and not before:
            say(f"  seed {seed} has diverged and stays as it is, the others go on: {fault}")
    return standing._replace(totals=[None] * len(seeds), metrics=metrics, faults=faults)


@contextlib.contextmanager
def progress_bar(run: Run, label: str, going: dict[int, Going]) -> Iterator[Callable[[dict[int, Going]], None]]:
    """Yields `tell(going)`, which moves the bar of a round or, without a terminal, now and then prints a line."""
    images = {number: run.config.batch_size * len(run.groups[number].members) for number in going}
    seen = lambda going: sum(of.done * images[number] for number, of in going.items())  # noqa: E731
    first = seen(going)
    start = last_line = time.perf_counter()
    with tqdm(
        total=run.steps * sum(images.values()),
        initial=first,
        desc=label,
        unit=" images",
        unit_scale=True,
        leave=False,
        disable=None if hosts.is_first() else True,
        file=Unfailing(sys.stderr),
    ) as bar:

        def tell(going: dict[int, Going]) -> None:
            nonlocal last_line
            totals = {number: on_host(run.groups[number], of.totals["loss"]) for number, of in going.items()}
            losses = np.concatenate([np.ravel(totals[number]) / of.done for number, of in going.items() if of.done])
            loss = f"loss {np.mean(losses[np.isfinite(losses)] if np.isfinite(losses).any() else losses):.4f}"
            bar.update(seen(going) - bar.n)
            bar.set_postfix_str(loss)
            now = time.perf_counter()
            if bar.disable and now - last_line > SECONDS_PER_LINE:
                speed = (seen(going) - first) / (now - start)
                left = tqdm.format_interval((run.steps * sum(images.values()) - seen(going)) / speed)
                done = min(of.done for of in going.values())
                say(f"{label}: step {done}/{run.steps}, {loss}, {speed:.0f} images/s, {left} left")
                last_line = now

        yield tell


def save_and_stop(run: Run, standing: Standing, where: str) -> None:
    """Save where a run is and raise StoppedError."""

    def save():
        check_claim(run)
        checkpoints.save(run.workdir, checkpoint_of(run.config, standing))

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
    for name, value in reports.flat_metrics(totals).items():
        if not np.isfinite(value):
            metric, _, of_block = name.partition("/")
            return f"{metric} of block {of_block} became {value}" if of_block else f"{metric} became {value}"
    return None
