"""A run's directory: whose it is, and that only one run uses it at a time."""

import contextlib
import json
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from filelock import FileLock, Timeout
from ml_collections import ConfigDict

from jaxdtp.configuration.config import default_config, flatten
from jaxdtp.data import Dataset
from jaxdtp.system import lease, storage
from jaxdtp.system.errors import ConfigError, one_line, shown
from jaxdtp.system.places import is_local, of_storage

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
def claim(workdir: epath.Path, config: ConfigDict) -> Iterator[Callable[[], bool]]:
    """Create `workdir`, or check that it belongs to this configuration, and keep other runs out meanwhile: by a lock
    or, on object storage, by a lease.

    Yields:
        Whether they are still kept out.

    Raises:
        ConfigError: it can't be written, another run is using it, or it belongs to another configuration, whose keys
            that differ are named.
    """
    with contextlib.ExitStack() as held:
        try:
            storage.make_directory(workdir)
            if is_local(workdir):
                # The system lets go of the lock when the process ends, however it ends.
                held.enter_context(FileLock(workdir / "lock", timeout=0))
                ours = lambda: True  # noqa: E731
            else:
                ours = held.enter_context(lease.hold(workdir))
            check(workdir, config)
        except (Timeout, lease.InUseError) as error:
            who = f" ({error})" if isinstance(error, lease.InUseError) else ""
            raise ConfigError(
                f"--workdir: {workdir} is in use by another run{who}; allowed: one run at a time"
            ) from error
        except Exception as error:
            if not of_storage(error):
                raise
            reason = f"can't write to {workdir} ({one_line(str(error) or type(error).__name__)})"
            raise ConfigError(f"--workdir: {reason}; allowed: a writable directory") from error
        yield ours


def remember(workdir: epath.Path, config: ConfigDict, epochs: int) -> None:
    """Write the configuration of a run with so many epochs done.

    Raises:
        ConfigError: it was to have fewer.
    """
    if config.num_epochs < epochs:
        raise ConfigError(
            f"config.num_epochs: got {config.num_epochs}; allowed: {epochs} or more, which the run in {workdir} has had"
        )
    storage.write(workdir / CONFIG, json.dumps(flatten(config), indent=2) + "\n")


def remembered(workdir: epath.Path) -> dict[str, Any] | None:
    """The configuration of the run in a directory, by dotted key; None where there is no run.

    Raises:
        ConfigError: it can't be read.
    """
    path = workdir / CONFIG
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except Exception as error:
        if not (of_storage(error) or isinstance(error, ValueError | TypeError)):
            raise
        raise ConfigError(f"{path}: can't be read ({error}); allowed: the file as a training run wrote it") from error


def stored_config(workdir: epath.Path | None, overrides: dict[str, Any] | None = None) -> ConfigDict:
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


class About(NamedTuple):
    """What a run's model takes and gives, and on which data, which its configuration alone doesn't say.

    Attributes:
        image_shape, dtype: of raw images.
        classes: their names, by label.
        examples: how many there are, by split; None where a run doesn't say.
        labels: a checksum of all of them; None where a run doesn't say.
    """

    image_shape: tuple[int, ...]
    dtype: str
    classes: tuple[str, ...]
    examples: dict[str, int] | None
    labels: int | None


def about_data(dataset: Dataset) -> About:
    """What is remembered of a data set."""
    splits = {name: split for name, split in dataset._asdict().items() if name != "classes"}
    images, labels = dataset.train.images, 0
    for split in splits.values():
        labels = zlib.crc32(np.ascontiguousarray(split.labels[split.rows]).data, labels)
    sizes = {name: len(split.rows) for name, split in splits.items()}
    return About(images.shape[1:], str(images.dtype), dataset.classes, sizes, labels)


def describe(workdir: epath.Path, ours: About) -> None:
    """Write what a run's model takes and gives."""
    storage.write(workdir / DATA, json.dumps(ours._asdict(), indent=2) + "\n")


def check_data(workdir: epath.Path, ours: About, fields: tuple[str, ...] = About._fields) -> None:
    """Raise ConfigError, which names the fields that differ, where the run in `workdir` was begun on other data."""
    found = described(workdir) if (workdir / DATA).exists() else ours
    differing = [
        f"{name} (there {shown(getattr(found, name))}, here {shown(getattr(ours, name))})"
        for name in fields
        if getattr(found, name) not in (getattr(ours, name), None)
    ]
    if differing:
        raise ConfigError(
            f"config.dataset: {workdir} belongs to a run on other data: {', '.join(differing)}; allowed: the same, or "
            "another workdir"
        )


def described(workdir: epath.Path) -> About:
    """What is remembered of the data of the run in a directory.

    Raises:
        ConfigError: it isn't there.
    """
    path = workdir / DATA
    try:
        content = json.loads(path.read_text())
        shape, classes = tuple(content["image_shape"]), tuple(content["classes"])
        # Runs of before the last three were written had bytes for pixels.
        return About(shape, content.get("dtype", "uint8"), classes, content.get("examples"), content.get("labels"))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path}: can't be read ({error}); allowed: the file as a training run wrote it") from error


def check(workdir: epath.Path, config: ConfigDict) -> None:
    """Raise ConfigError, which names the keys that differ, where `workdir` belongs to another configuration."""
    found = remembered(workdir)
    if found is None:
        return
    differing = [words for key, words in differences(found, config).items() if not key.startswith(MAY_CHANGE)]
    if differing:
        raise ConfigError(
            f"--workdir: {workdir} belongs to a run with another configuration: {', '.join(differing)}; "
            "allowed: the same configuration, or another directory"
        )


def differences(there: dict[str, Any], config: ConfigDict) -> dict[str, str]:
    """The keys whose values differ between a configuration as it was written, by dotted key, and another one, in words.
    Keys that are younger than what was written had the effect of their defaults."""
    defaults = {key: value for key, value in flatten(default_config()).items() if key != "when"}
    defaults, here = (json.loads(json.dumps(values)) for values in (defaults, flatten(config)))
    there = defaults | there
    return {
        key: f"{key} (there {there.get(key)!r}, here {here.get(key)!r})"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key)
    }
