"""Names of files and directories as users write them."""

import os
import re
from pathlib import Path

from jaxdtp.config import ConfigError


def local(name: str, at: str) -> Path:
    """The path of a name, `~` and `~user` at its beginning resolved.

    Args:
        name: of a file or directory.
        at: what to call it in errors.

    Raises:
        ConfigError: it is on another kind of storage.
    """
    # One slash is what a Path leaves of two; one letter is a drive.
    if scheme := re.match(r"[a-z][a-z0-9+.-]+:/+", name, re.IGNORECASE):
        raise ConfigError(f"{at}: got {name!r}; allowed: a local path, nothing on {scheme[0]}")
    return Path(os.path.expanduser(name))


def cache_home() -> Path:
    """Where caches go unless told otherwise: $XDG_CACHE_HOME/jaxdtp, or ~/.cache/jaxdtp."""
    # Relative ones are to be ignored (XDG Base Directory Specification).
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if os.path.isabs(home) else Path("~/.cache").expanduser()) / "jaxdtp"
