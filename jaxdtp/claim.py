"""A run's directory: whose it is, and that only one run uses it at a time."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from ml_collections import ConfigDict

from jaxdtp import reports
from jaxdtp.config import ConfigError, default_config, flatten

CONFIG = "config.json"
DATA = "data.json"

MAY_CHANGE = (
    "beside",
    "trackers",
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


def stored_config(workdir: Path | None, overrides: dict[str, Any] | None = None) -> ConfigDict:
    """The configuration of the run in a workdir, not validated yet.

    Args:
        workdir: its directory, if one was given.
        overrides: values to set, by dotted key.

    Raises:
        ConfigError: there is no run in it.
    """
    found = remembered(workdir) if workdir else None
    if found is None:
        what = f"there is no run in {workdir} yet" if workdir else "missing"
        raise ConfigError(
            f"--config: {what}; allowed: a configuration file, for example configs/digits_mlp.py, or the --workdir of "
            "a run that was begun"
        )
    config = default_config()
    config.when = ConfigDict()  # it was applied when the run was begun
    config.update_from_flattened_dict(found | (overrides or {}))
    return config


def describe(workdir: Path, image_shape: tuple[int, ...], classes: tuple[str, ...]) -> None:
    """Write what a run's model takes and gives, which its configuration alone doesn't say."""
    content = {"image_shape": image_shape, "classes": classes}
    reports.write_atomically(workdir / DATA, json.dumps(content, indent=2) + "\n")


def described(workdir: Path) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The image shape and the classes of the run in a directory.

    Raises:
        ConfigError: they aren't there.
    """
    path = workdir / DATA
    try:
        content = json.loads(path.read_text())
        return tuple(content["image_shape"]), tuple(content["classes"])
    except (OSError, ValueError, TypeError, KeyError) as error:
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
