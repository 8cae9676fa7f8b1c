"""A run's directory: whose it is, and that only one run uses it at a time."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout
from ml_collections import ConfigDict

from jaxdtp import reports
from jaxdtp.config import ConfigError, flatten

WHERE_NOT_WHAT = ("parallel.", "dataset.data_dir", "dataset.cache_dir", "dataset.device_megabytes")
"""Keys that say where a run takes place, and not what comes out of it: a run may be continued with others."""


@contextlib.contextmanager
def claim(workdir: Path, config: ConfigDict) -> Iterator[None]:
    """Create `workdir` for this configuration, or check that it belongs to it, and keep other runs out meanwhile.

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
            path = workdir / "config.json"
            if not path.exists():
                reports.write_atomically(path, json.dumps(flatten(config), indent=2) + "\n")
        except Timeout as error:
            raise ConfigError(f"--workdir: {workdir} is in use by another run; allowed: one run at a time") from error
        except OSError as error:
            reason = f"can't write to {workdir} ({error})"
            raise ConfigError(f"--workdir: {reason}; allowed: a writable directory") from error
        yield


def check(workdir: Path, config: ConfigDict) -> None:
    """Raise ConfigError, which names the keys that differ, where `workdir` belongs to another configuration."""
    path = workdir / "config.json"
    wanted = json.loads(json.dumps(flatten(config)))
    try:
        found = dict(json.loads(path.read_text()))
    except FileNotFoundError:
        return
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path}: can't be read ({error}); allowed: the file as a training run wrote it") from error
    differing = [
        f"{key} (there {found.get(key)!r}, here {wanted.get(key)!r})"
        for key in sorted(found.keys() | wanted.keys())
        if found.get(key) != wanted.get(key) and not key.startswith(WHERE_NOT_WHAT)
    ]
    if differing:
        raise ConfigError(
            f"--workdir: {workdir} belongs to a run with another configuration: {', '.join(differing)}; "
            "allowed: the same configuration, or another directory"
        )
