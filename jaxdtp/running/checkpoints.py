"""Checkpoints: Orbax writes and reads them; here is which ones stay, and whether they are what was written.

A checkpoint is a directory in WORKDIR/checkpoints, named after its training step. It appears whole or not at all
(`jaxdtp.system.storage`); on object storage it is there once it has its `ABOUT`. The two newest and the best one stay.
Orbax doesn't notice every damage to its files, so each checkpoint holds checksums of all of them.
"""

import hashlib
import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from jaxdtp.devices.hosts import StorageError
from jaxdtp.system import storage
from jaxdtp.system.console import say
from jaxdtp.system.errors import ConfigError, one_line
from jaxdtp.system.places import is_local, of_storage

NEWEST = 2
ABOUT = "about.json"

_CHUNK = 2**20  # bytes


class Checkpoint(NamedTuple):
    """What a checkpoint holds.

    Attributes:
        state: on the host, with its number of steps as `step`; of many seeds a `standing.Many`.
        score: of the epoch that it ends; minus infinity within an epoch.
        progress: what else it takes to go on with the epoch that it is in, as JSON.
    """

    state: Any
    score: float
    progress: dict[str, Any]


def tidy(workdir: epath.Path) -> None:
    """Make the directory of a run's checkpoints, or remove what a killed run has left in it half-written or
    half-deleted."""
    directory = _directory(workdir)
    storage.make_directory(directory)
    kept = {str(step) for step in saved_steps(workdir)}
    for path in storage.inside(directory):
        if path.name in kept:
            continue
        if path.is_dir():
            path.rmtree(missing_ok=True)
        else:
            path.unlink(missing_ok=True)


def save(workdir: epath.Path, checkpoint: Checkpoint) -> None:
    """Save a checkpoint, unless there is one of its step, then delete those that it makes superfluous.

    Raises:
        StorageError: it can't be written. Those that were there stay.
    """
    directory, step = _directory(workdir), int(checkpoint.state.step)
    path = directory / str(step)
    if step in saved_steps(workdir):
        return
    try:
        if is_local(directory):
            _check_room(directory, sum(array.nbytes for array in jax.tree.leaves(checkpoint.state)))
        with storage.new_directory(path, last=ABOUT) as unfinished:
            ocp, checkpointer = _orbax()
            checkpointer.save(unfinished / "state", args=ocp.args.StandardSave(checkpoint.state))
            about = {"score": checkpoint.score, "progress": checkpoint.progress, "files": _checksums(unfinished)}
            _write_about(unfinished, about)
    except Exception as error:
        if not (of_storage(error) or isinstance(error, ValueError)):  # which is Orbax's
            raise
        raise StorageError(
            f"--workdir: can't save step {step} in {directory} ({one_line(str(error))}); allowed: a "
            "writable directory with room; the checkpoints of earlier steps are intact"
        ) from error
    steps = saved_steps(workdir)
    best = max(steps, key=lambda step: _score(directory, step))
    for step in set(steps[:-NEWEST]) - {best}:
        storage.remove_directory(directory / str(step), last=ABOUT)


def take_score(workdir: epath.Path, step: int) -> None:
    """Make a checkpoint one that is never the best."""
    path = _directory(workdir) / str(step)
    _write_about(path, _read_about(path) | {"score": -math.inf})


def saved_steps(workdir: epath.Path) -> list[int]:
    """The steps that there are checkpoints of, in rising order."""
    directory = _directory(workdir)
    paths = [path for path in storage.inside(directory) if path.name.isdecimal()]
    # What lacks it on a disk is damaged, which will be told.
    return sorted(int(path.name) for path in paths if is_local(path) or (path / ABOUT).exists())


def restore_newest(workdir: epath.Path, like: Any) -> Checkpoint | None:
    """The newest intact checkpoint; None if there never was one. Newer, damaged ones are moved to damaged/.

    Args:
        workdir: of the run.
        like: gives the structure of the state.

    Raises:
        ConfigError: there are some, but none is intact.
    """
    directory, steps = _directory(workdir), saved_steps(workdir)
    if not steps:
        return None
    checkpoint = _first_intact(directory, steps[::-1], like)
    for step in steps:
        if step > checkpoint.state.step:
            aside = workdir / "damaged" / f"{step}-{time.strftime('%Y%m%d-%H%M%S')}"
            storage.move_directory(directory / str(step), aside, last=ABOUT)
    return checkpoint


def restore_best(workdir: epath.Path, like: Any, step: int | None = None) -> Checkpoint:
    """The intact checkpoint with the highest score, or that of a step; the rest as `restore_newest`, but nothing is
    moved."""
    directory = _directory(workdir)
    if step is not None:
        kept = saved_steps(workdir)
        if step not in kept:
            raise ConfigError(
                f"step: got {step}; allowed: one of {', '.join(map(str, kept)) or 'none'}, in {directory}"
            )
        return _first_intact(directory, [step], like)
    by_score = sorted(saved_steps(workdir), key=lambda step: _score(directory, step))
    return _first_intact(directory, by_score[::-1], like)


def _directory(workdir: epath.Path) -> epath.Path:
    return workdir / "checkpoints"


def _first_intact(directory: epath.Path, steps: list[int], like: Any) -> Checkpoint:
    for step in steps:
        try:
            with storage.local_copy(directory / str(step)) as path:
                return _restore(path, like)
        except ConfigError:
            raise
        except Exception as error:
            if not is_local(directory) and of_storage(error):
                raise
            why = one_line(str(error))
            say(f"the checkpoint of step {step} in {directory} is damaged, so another one is used: {why}")
    if not steps:
        raise ConfigError(f"--workdir: {directory} holds no checkpoints; allowed: the workdir of a training run")
    raise ConfigError(
        f"--workdir: all checkpoints in {directory} are damaged (steps {', '.join(map(str, steps))}); allowed: the "
        "workdir of a run with an intact one, or a fresh directory"
    )


def _restore(path: Path, like: Any) -> Checkpoint:
    about = _read_about(path)
    # Before Orbax reads them, which prints stack traces from its threads where a file is missing or cut off.
    if _checksums(path) != about["files"]:
        raise ValueError("its files are not as they were saved")
    host = jax.tree.map(lambda array: np.zeros(array.shape, array.dtype), like)
    ocp, checkpointer = _orbax()
    # Orbax would give arrays the shapes that they were saved with, and cast them to our types.
    saved = checkpointer.metadata(path / "state").item_metadata.tree
    if differing := _differing(host, saved):
        raise ConfigError(
            f"--workdir: the checkpoint of step {path.name} in {path.parent} is of another model "
            f"({', '.join(differing[:3])}); allowed: the model as it was when the run was begun, or another directory"
        )
    state = checkpointer.restore(path / "state", args=ocp.args.StandardRestore(host))
    return Checkpoint(state, about["score"], about["progress"])


def _differing(ours: Any, saved: Any) -> list[str]:
    """Arrays that are of other shapes or types than ours, or on one side only, in words."""

    def in_words(tree: Any) -> dict[str, str]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {
            jax.tree_util.keystr(where, simple=True, separator="/"): f"{np.dtype(leaf.dtype)}{list(leaf.shape)}"
            for where, leaf in leaves
        }

    here, there = in_words(ours), in_words(saved)
    return [
        f"{name} there {there.get(name, 'missing')}, here {here.get(name, 'missing')}"
        for name in here | there
        if here.get(name) != there.get(name)
    ]


def _read_about(path: epath.Path | Path) -> dict[str, Any]:
    content = json.loads((path / ABOUT).read_text())
    if content["sha256"] != _checksum(json.dumps(content["about"]).encode()):
        raise ValueError(f"{ABOUT} is not as it was saved")
    return content["about"]


def _write_about(path: epath.Path | Path, about: dict[str, Any]) -> None:
    content = {"about": about, "sha256": _checksum(json.dumps(about).encode())}
    storage.write(epath.Path(path) / ABOUT, json.dumps(content))


def _checksums(path: Path) -> dict[str, str]:
    """Of each file of a checkpoint but `ABOUT`, by its name."""
    files = [file for file in storage.files(epath.Path(path)) if file.name != ABOUT]
    return {str(file.relative_to(path)): _checksum(file.read_bytes()) for file in files}


def _checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _check_room(directory: epath.Path, size: int) -> None:
    """Raise OSError where a file of so many bytes can't be written. Orbax would say so too, but with stack traces from
    its threads."""
    probe = directory / "room"
    try:
        with open(probe, "wb") as file:
            for _ in range(0, size, _CHUNK):
                file.write(bytes(_CHUNK))
    finally:
        probe.unlink(missing_ok=True)


def _score(directory: epath.Path, step: int) -> tuple[float, int]:
    """A checkpoint's score, and its step to decide between equal ones."""
    try:
        return _read_about(directory / str(step))["score"], step
    except (OSError, ValueError, KeyError, TypeError):
        return -math.inf, step


def _orbax() -> tuple[Any, Any]:
    """Orbax, and a checkpointer of it."""
    import orbax.checkpoint as ocp  # takes a while, which importing jaxdtp shouldn't

    # The first host alone saves and restores, since all have the same state. Orbax wants to be told at every level.
    alone = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0}, barrier_sync_key_prefix="jaxdtp")
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=alone)
    return ocp, ocp.Checkpointer(handler, multiprocessing_options=alone)
