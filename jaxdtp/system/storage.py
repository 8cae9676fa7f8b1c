"""Files and directories that appear whole or not at all, on a local disk or on object storage.

A disk has renames for that. Object storage hasn't; there a single object appears whole, and a directory is whole once
it has its last file, which is written after all others and removed before them.
"""

import contextlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from jaxdtp.system.places import is_local

UNFINISHED = ".unfinished"
DELETED = ".deleted"


def make_directory(path: epath.Path) -> None:
    """Make a directory where there is none. Object storage has none, and its buckets aren't made here."""
    if is_local(path):
        path.mkdir(parents=True, exist_ok=True)


def write(path: epath.Path, content: str | bytes) -> None:
    """Replace a file as a whole, so that a killed run never leaves half of one."""
    content = content.encode() if isinstance(content, str) else content
    if not is_local(path):
        path.write_bytes(content)
        return
    # Of its own, as other processes may write the same file.
    temporary = Path(f"{os.fspath(path)}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_directory(path: epath.Path, last: str) -> Iterator[Path]:
    """A local directory to write into, which becomes `path` in the end, with the file `last` in it."""
    if is_local(path):
        unfinished = Path(f"{os.path.abspath(path)}{UNFINISHED}")
        unfinished.mkdir()
        yield unfinished
        unfinished.rename(path)
        return
    with tempfile.TemporaryDirectory(prefix="jaxdtp-") as directory:
        yield Path(directory)
        _copy(epath.Path(directory), path, last)


@contextlib.contextmanager
def local_copy(path: epath.Path) -> Iterator[Path]:
    """A directory on a local disk: itself, or what it holds in a temporary one."""
    if is_local(path):
        yield Path(os.path.abspath(path))
        return
    with tempfile.TemporaryDirectory(prefix="jaxdtp-") as directory:
        _copy(path, epath.Path(directory), last="")
        yield Path(directory)


def remove_directory(path: epath.Path, last: str) -> None:
    """Remove a directory that has been whole."""
    if is_local(path):
        # Renamed first: a run that is killed while it deletes must not leave half of it behind.
        deleted = f"{os.fspath(path)}{DELETED}"
        os.replace(path, deleted)
        shutil.rmtree(deleted, ignore_errors=True)
        return
    (path / last).unlink(missing_ok=True)
    path.rmtree(missing_ok=True)


def move_directory(path: epath.Path, target: epath.Path, last: str) -> None:
    """Give a directory another name, on the same storage."""
    make_directory(target.parent)
    if is_local(path):
        os.replace(path, target)
        return
    _copy(path, target, last)
    remove_directory(path, last)


def inside(path: epath.Path) -> list[epath.Path]:
    """Files and directories in a directory; none where it isn't there, as an empty one on object storage."""
    try:
        return sorted(path.iterdir())
    except FileNotFoundError:
        return []


def files(path: epath.Path) -> list[epath.Path]:
    """All files in a directory and below, in the order of their names."""
    found = []
    for inner in inside(path):
        found += files(inner) if inner.is_dir() else [inner]
    return sorted(found)


def _copy(source: epath.Path, target: epath.Path, last: str) -> None:
    names = sorted((str(path.relative_to(source)) for path in files(source)), key=lambda name: (name == last, name))
    for name in names:
        make_directory((target / name).parent)
        (target / name).write_bytes((source / name).read_bytes())
