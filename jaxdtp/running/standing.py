"""Where a run is, on the host, and as a checkpoint. One with many seeds has all of them in each checkpoint."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from jaxdtp.learning.state import TrainState
from jaxdtp.learning.step import Metrics
from jaxdtp.results import reports
from jaxdtp.running import checkpoints
from jaxdtp.running.checkpoints import Checkpoint
from jaxdtp.running.groups import unstack


class Best(NamedTuple):
    """What a seed has learned in its best epoch.

    Attributes:
        score: of the epoch; minus infinity where there is none yet.
        step: at its end.
        learned: forward parameters, and what blocks keep without learning it, by block name.
    """

    score: float
    step: int
    learned: tuple[Any, Any]


class Standing(NamedTuple):
    """Where a run is; lists are by seed.

    Attributes:
        states: on the host.
        totals: metrics summed over the steps of the present round so far; None at a round's beginning.
        metrics: averaged over the training round of the present epoch; None before that is complete.
        faults: why a seed has been given up; None for those that go on.
        scores: of the epoch that ends here; None within an epoch, and for seeds that have been given up.
        best: of the epochs with checkpoints.
        seconds: of training in the present epoch so far.
    """

    states: Sequence[TrainState]
    totals: Sequence[Metrics | None]
    metrics: Sequence[reports.Record | None]
    faults: Sequence[str | None]
    scores: Sequence[float | None]
    best: Sequence[Best]
    seconds: float

    @property
    def step(self) -> int:
        """Training steps that all seeds have done, but for those that have been given up."""
        return min(
            (int(state.step) for state, fault in zip(self.states, self.faults, strict=True) if fault is None), default=0
        )


class Many(flax.struct.PyTreeNode):
    """The arrays of a checkpoint of many seeds, whose axis is the first.

    Attributes:
        states: of the seeds.
        best: of each seed's best epoch, as `Best.learned`.
    """

    states: TrainState
    best: tuple[Any, Any]

    @property
    def step(self) -> int:
        """How many steps there have been, of all seeds."""
        return int(np.sum(self.states.step, dtype=np.int64))


def fresh(states: list[TrainState]) -> Standing:
    """Before the first step."""
    nothing = [None] * len(states)
    best = [Best(-math.inf, 0, (state.forward, state.model)) for state in states]
    return Standing(states, nothing, nothing, nothing, nothing, best, 0.0)


def checkpoint_of(config: ConfigDict, standing: Standing) -> Checkpoint:
    """What is saved."""
    if not config.seeds:
        (state,), (totals,), (metrics,), _, (score,), *_ = standing
        progress = {"totals": totals, "metrics": metrics, "seconds": standing.seconds}
        return Checkpoint(state, -math.inf if score is None else score, progress)
    arrays = Many(_stack(standing.states), _stack([best.learned for best in standing.best]))
    progress = standing._asdict() | {"best": [best[:2] for best in standing.best]}
    del progress["states"]
    return Checkpoint(arrays, -math.inf, progress)


def standing_of(config: ConfigDict, checkpoint: Checkpoint) -> Standing:
    """The other way round."""
    if not config.seeds:
        score = None if checkpoint.score == -math.inf else checkpoint.score
        begun = fresh([checkpoint.state])
        progress = checkpoint.progress
        return begun._replace(
            totals=[progress["totals"]], metrics=[progress["metrics"]], scores=[score], seconds=progress["seconds"]
        )
    count = len(config.seeds)
    learned = unstack(checkpoint.state.best, count)
    scored = zip(checkpoint.progress["best"], learned, strict=True)
    best = [Best(score, step, arrays) for (score, step), arrays in scored]
    return Standing(unstack(checkpoint.state.states, count), **checkpoint.progress | {"best": best})


def best_of(standing: Standing) -> list[Best]:
    """What is best so far by seed, the epoch included that ends here, if one does."""
    return [
        Best(score, int(state.step), (state.forward, state.model))
        if score is not None and score >= best.score
        else best
        for score, state, best in zip(standing.scores, standing.states, standing.best, strict=True)
    ]


def restore_best(
    workdir: epath.Path, config: ConfigDict, like: list[TrainState], step: int | None = None
) -> list[Best]:
    """What each seed of the run in a directory has learned in its best epoch.

    Args:
        workdir: of the run.
        config: as from `config.resolve`.
        like: give the structure of the states, by seed.
        step: of a checkpoint of a run with one seed, instead.

    Raises:
        ConfigError: there is no such checkpoint.
    """
    found = checkpoints.restore_best(workdir, checkpoint_of(config, fresh(like)).state, step)
    standing = standing_of(config, found)
    if config.seeds:
        return best_of(standing)
    (state,) = standing.states
    return [Best(found.score, int(state.step), (state.forward, state.model))]


def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *arrays: np.stack(arrays), *trees)
