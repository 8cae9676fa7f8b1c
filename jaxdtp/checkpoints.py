"""Checkpoints by Orbax: the latest and the best epoch are kept, a half-written one is never seen."""

from pathlib import Path

import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from jaxdtp.step import TrainState

BEST_BY = "score"


def open_checkpoints(workdir: Path) -> ocp.CheckpointManager:
    """The checkpoints of a run, by epoch."""
    # Saving in the background would read buffers that the next epoch's step is allowed to overwrite.
    options = ocp.CheckpointManagerOptions(
        preservation_policy=preservation_policy.AnyPreservationPolicy(
            [
                preservation_policy.LatestN(1),
                preservation_policy.BestN(get_metric_fn=lambda metrics: metrics[BEST_BY], n=1),
            ]
        ),
        best_fn=lambda metrics: metrics[BEST_BY],
        enable_async_checkpointing=False,
        cleanup_tmp_directories=True,
    )
    return ocp.CheckpointManager((workdir / "checkpoints").absolute(), options=options)


def save(manager: ocp.CheckpointManager, epoch: int, state: TrainState, score: float) -> None:
    """Save the state after `epoch`; the highest `score` is the best."""
    manager.save(epoch, args=ocp.args.StandardSave(state), metrics={BEST_BY: score})


def restore(manager: ocp.CheckpointManager, epoch: int, like: TrainState) -> TrainState:
    """The state after `epoch`; `like` gives its structure."""
    return manager.restore(epoch, args=ocp.args.StandardRestore(like))
