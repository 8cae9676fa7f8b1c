"""A run's directory: whose it is, and that only one run uses it at a time."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from ml_collections import ConfigDict

from jaxdtp import reports
from jaxdtp.config import ConfigError, flatten

CONFIG = "config.json"

MAY_CHANGE = (
    "beside",
    "num_epochs",
    "checkpoint_every_epochs",
    "alignment.every_epochs",
    "parallel.",
    "dataset.data_dir",
    "dataset.cache_dir",
    "dataset.device_megabytes",
)
"""Keys that say how long, how often or where, not what comes out of an epoch: a run may be continued with others."""


@contextlib.contextmanager
def claim(workdir: Path, config: ConfigDict) -> Iterator[None]:
    """Create `workdir`, or check that it belongs to this configuration, and keep other runs out meanwhile.

    Raises:
        ConfigError: it can't be written, another run is using it, or it belongs to another configuration, whose keys
            that differ are named.
    """
    with contextlib.ExitStack() as held:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            # The system lets go of the lock when the process ends, however it ends.
            held.enter_context(FileLock(workdir / "lock", timeout=0))
            check(workdir, config)
        except Timeout as error:
            raise ConfigError(f"--workdir: {workdir} is in use by another run; allowed: one run at a time") from error
        except OSError as error:
            reason = f"can't write to {workdir} ({error})"
            raise ConfigError(f"--workdir: {reason}; allowed: a writable directory") from error
        yield


def remember(workdir: Path, config: ConfigDict, epochs: int) -> None:
    """Write the configuration of a run with so many epochs done.

    Raises:
        ConfigError: it was to have fewer.
    """
    if config.num_epochs < epochs:
        raise ConfigError(
            f"config.num_epochs: got {config.num_epochs}; allowed: {epochs} or more, which the run in {workdir} has had"
        )
    reports.write_atomically(workdir / CONFIG, json.dumps(flatten(config), indent=2) + "\n")


def remembered(workdir: Path) -> dict[str, Any] | None:
    """The configuration of the run in a directory, by dotted key; None where there is no run.

    Raises:
        ConfigError: it can't be read.
    """
    path = workdir / CONFIG
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path}: can't be read ({error}); allowed: the file as a training run wrote it") from error


def check(workdir: Path, config: ConfigDict) -> None:
    """Raise ConfigError, which names the keys that differ, where `workdir` belongs to another configuration."""
    found = remembered(workdir)
    if found is None:
        return
    wanted = json.loads(json.dumps(flatten(config)))
    differing = [
        f"{key} (there {found.get(key)!r}, here {wanted.get(key)!r})"
        for key in sorted(found.keys() | wanted.keys())
        if found.get(key) != wanted.get(key) and not key.startswith(MAY_CHANGE)
    ]
    if differing:
        raise ConfigError(
            f"--workdir: {workdir} belongs to a run with another configuration: {', '.join(differing)}; "
            "allowed: the same configuration, or another directory"
        )
