"""Names of files and directories as users write them: on a local disk or, by `etils.epath`, on object storage."""

import functools
import importlib.util
import logging
import os
import re
from pathlib import Path

from etils import epath

from jaxdtp.system.errors import ConfigError, shown

SCHEMES = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs"}
"""Kinds of object storage, and the package that each takes."""

PACKAGES = (*SCHEMES.values(), "aiobotocore", "aiohttp", "azure", "botocore", "fsspec", "google", "requests", "urllib3")
"""Whose exceptions are those of object storage."""


def place(name: str, at: str) -> epath.Path:
    """The path of a name, `~` and `~user` at its beginning resolved.

    Args:
        name: of a file or directory; SCHEME://BUCKET/... on object storage.
        at: what to call it in errors.

    Raises:
        ConfigError: it is on a kind of storage that isn't supported, or whose package is missing.
    """
    # One slash is what a Path leaves of two; one letter is a drive.
    if not (found := re.match(r"([a-z][a-z0-9+.-]+):/+", name, re.IGNORECASE)):
        return epath.Path(os.path.expanduser(name))
    scheme, rest = found[1].lower(), name[found.end() :]
    if scheme == "file":
        return epath.Path(f"/{rest}")
    if scheme not in SCHEMES or not rest.strip("/"):
        allowed = ", ".join(f"{known}://BUCKET/..." for known in SCHEMES)
        raise ConfigError(f"{at}: got {shown(name)}; allowed: a local path, {allowed}")
    if importlib.util.find_spec(SCHEMES[scheme]) is None:
        raise ConfigError(
            f"{at}: got {shown(name)}, for which the package {SCHEMES[scheme]} is missing; allowed: a local path, or "
            f"pip install {SCHEMES[scheme]}"
        )
    _prepare(scheme)
    return epath.Path(f"{scheme}://{rest}")


@functools.cache
def _prepare(scheme: str) -> None:
    import fsspec

    # Where TensorFlow is installed, epath would import it.
    os.environ.setdefault("EPATH_USE_TF", "false")
    # Remembered listings don't show what other processes write.
    ours: dict[str, object] = {"use_listings_cache": False}
    if scheme == "s3":
        ours["config_kwargs"] = {"connect_timeout": 10, "retries": {"max_attempts": 3}}
    for package in PACKAGES:
        # They log, with stack traces, what they raise.
        logging.getLogger(package).addHandler(logging.NullHandler())
    for name in (scheme, "gcs" if scheme == "gs" else scheme):
        fsspec.config.conf[name] = ours | fsspec.config.conf.get(name, {})


def of_storage(error: BaseException) -> bool:
    """Whether an exception is one of a file system or of object storage."""
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in PACKAGES


def is_local(path: epath.Path) -> bool:
    """Whether a path is on a file system: with renames, locks, appending and memory maps."""
    return "://" not in os.fspath(path)


def is_file(path: epath.Path) -> bool:
    """Whether there is a file, and no directory or device."""
    return os.path.isfile(path) if is_local(path) else path.exists() and not path.is_dir()


def stamp(path: epath.Path) -> tuple[int, int]:
    """Size and date of a file: another content has another one of these."""
    if is_local(path):
        stat = os.stat(path)
        return stat.st_size, stat.st_mtime_ns
    stat = path.stat()
    return stat.length, stat.mtime


def cache_home() -> Path:
    """Where caches go unless told otherwise: $XDG_CACHE_HOME/jaxdtp, or ~/.cache/jaxdtp.

    Raises:
        ConfigError: the user has no home directory.
    """
    # Relative ones are to be ignored (XDG Base Directory Specification).
    home = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(home) if os.path.isabs(home) else Path("~/.cache").expanduser()) / "jaxdtp"
    except RuntimeError as error:
        raise ConfigError(
            f"config.dataset.cache_dir: {error}; allowed: a directory, or HOME or XDG_CACHE_HOME in the environment"
        ) from error
