"""Compiled programs on disk, for the next process: JAX's persistent compilation cache, switched on during a run.

It lies under `places.cache_home()`, in a directory for each version of JAX and kind of processor, and holds up to
`MOST_BYTES`. JAX's own settings come first: JAX_COMPILATION_CACHE_DIR names another place, and
JAX_ENABLE_COMPILATION_CACHE=0 switches it off.
"""

import contextlib
import hashlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import jax
import jaxlib
from jax.experimental.compilation_cache import compilation_cache

from jaxdtp.system.errors import ConfigError
from jaxdtp.system.places import cache_home

MOST_BYTES = 2e9
MIN_SECONDS = 0.02
"""Programs that compile faster are compiled again."""


@contextlib.contextmanager
def kept_programs() -> Iterator[None]:
    """Meanwhile what is compiled is kept, and what has been kept isn't compiled again."""
    settings = jax.config.values
    directory = None
    if settings["jax_enable_compilation_cache"] and not settings["jax_compilation_cache_dir"]:
        directory = _ready(f"jax{jax.__version__}-jaxlib{jaxlib.__version__}-{_processor()}")
    if directory is None:
        yield
        return
    ours = {"jax_compilation_cache_dir": str(directory), "jax_persistent_cache_min_compile_time_secs": MIN_SECONDS}
    before = {name: getattr(jax.config, name) for name in ours}
    try:
        _set(ours)
        yield
    finally:
        _set(before)


def _set(values: dict) -> None:
    for name, value in values.items():
        jax.config.update(name, value)
    # It looks at its settings but once.
    compilation_cache.reset_cache()


def _ready(name: str) -> Path | None:
    """Make the directory, and room in all of them; None where nothing can be written."""
    try:
        directory = cache_home() / "compiled" / name
        directory.mkdir(parents=True, exist_ok=True)
        files = [(max(stat.st_atime, stat.st_mtime), stat.st_size, path) for path, stat in _files(directory.parent)]
        excess = sum(size for _, size, _ in files) - MOST_BYTES
        for _, size, path in sorted(files):
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= size
    except (OSError, ConfigError):
        return None
    return directory


def _files(directory: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for path in directory.glob("*/*"):
        # Another process may be making room, too.
        with contextlib.suppress(FileNotFoundError):
            yield path, path.stat()


def _processor() -> str:
    """A name for this kind of processor: programs for one may use instructions that another hasn't got."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        about = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    except OSError:
        about = [platform.machine(), platform.processor()]
    return hashlib.sha256("\n".join(about).encode()).hexdigest()[:8]
