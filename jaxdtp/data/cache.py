"""Decoded images and labels on disk: written once, verified whenever they are opened, read through memory maps."""

import contextlib
import glob
import json
import os
import shutil
import time
import uuid
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from etils import epath

from jaxdtp.system.console import say
from jaxdtp.system.errors import ConfigError, one_line
from jaxdtp.system.places import cache_home, is_local, of_storage, place

ARRAYS = ("images.npy", "labels.npy")
INDEX = "index.json"
BLOCK_BYTES = 2**22  # that a checksum stands for
MANY = 10_000  # images, whose decoding takes longer than one waits without a word
UNFINISHED = ".unfinished"
ABANDONED_SECONDS = 3600.0  # without a write, which takes a running process less than a second


def fetch(
    cache_dir: str,
    name: str,
    identity: str,
    kind: tuple[tuple[int, ...], np.dtype],
    examples: Callable[[], Iterable[tuple[np.ndarray, int]]],
) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of a directory in the cache, written first where that is missing, damaged or of other data.

    Any number of processes may do so at once, on hosts that share the directory too: each writes a directory of its
    own, and the first that is complete gets the name. A cache on object storage is a store of such directories, from
    which they are copied into the local one; there the index, written last, makes a directory whole.

    Args:
        cache_dir: of the configuration; '': the usual one.
        name: of the directory.
        identity: says which data these are.
        kind: shape, [examples, height, width, channels], and type of the images.
        examples: `examples()` gives the images, [height, width, channels], and their labels, one after another.

    Returns:
        Images, [examples, height, width, channels], and labels, int32 [examples], mapped into memory.

    Raises:
        ConfigError: the directory can't be written.
    """
    home = place(cache_dir, "config.dataset.cache_dir") if cache_dir else epath.Path(cache_home())
    path, store = Path(home if is_local(home) else cache_home()) / name, None if is_local(home) else home / name
    try:
        stored = _open(path, identity)
        if stored is None:
            if path.exists():
                say(f"{path} is damaged or of other data: decoding the data set again")
                _discard(path)
            _remove_abandoned(path)
            if store is None or not _copied(store, path, identity):
                if kind[0][0] >= MANY:
                    say(f"{name}: decoding {kind[0][0]} images, once, into {store or path}")
                _write(path, lambda unfinished: _decode(unfinished, identity, kind, examples()))
                if store is not None:
                    _upload(path, store)
            stored = _open(path, identity)
            if stored is None:
                raise OSError("what is read there is not what was written")
    except Exception as error:
        if not of_storage(error):
            raise
        reason = f"can't write {store or path} ({one_line(str(error))})"
        room = np.prod(kind[0]) * kind[1].itemsize / 1e6
        raise ConfigError(
            f"config.dataset.cache_dir: {reason}; allowed: a directory with room for {room:.0f} MB"
        ) from error
    return stored


def _copied(store: epath.Path, path: Path, identity: str) -> bool:
    """Whether a store has had a whole directory of these data, which is at `path` now."""
    if not (store / INDEX).exists():
        return False

    def copy(unfinished: Path) -> None:
        for name in (*ARRAYS, INDEX):
            with (store / name).open("rb") as source, open(unfinished / name, "wb") as target:
                shutil.copyfileobj(source, target, BLOCK_BYTES)

    _write(path, copy)
    if _open(path, identity) is None:
        say(f"{store} is damaged or of other data: decoding the data set again")
        _discard(path)
        return False
    return True


def _upload(path: Path, store: epath.Path) -> None:
    for name in (*ARRAYS, INDEX):
        with open(path / name, "rb") as source, (store / name).open("wb") as target:
            shutil.copyfileobj(source, target, BLOCK_BYTES)


def _open(path: Path, identity: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Images and labels, or None where something isn't as it was written."""
    try:
        if json.loads((path / INDEX).read_text()) != _index(path, identity):
            return None
        # Views of the class np.ndarray, for which indexing gives plain arrays.
        images, labels = (np.asarray(np.load(path / name, mmap_mode="r")) for name in ARRAYS)
    except (OSError, ValueError):
        return None
    return images, labels


def _write(path: Path, fill: Callable[[Path], None]) -> None:
    """Give the name `path` to a directory once it has been filled."""
    unfinished = _unfinished(path)
    try:
        unfinished.mkdir(parents=True)
        fill(unfinished)
        try:
            unfinished.rename(path)
        except OSError:
            if not path.exists():
                raise
            # Another process was faster.
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _decode(
    path: Path,
    identity: str,
    kind: tuple[tuple[int, ...], np.dtype],
    examples: Iterable[tuple[np.ndarray, int]],
) -> None:
    shape, dtype = kind
    labels = np.empty(shape[0], np.int32)
    # A file and not a writable memory map, which a full disk would end with a bus error.
    with open(path / "images.npy", "wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for index, (image, label) in enumerate(examples):
            file.write(np.ascontiguousarray(image).data)
            labels[index] = label
    np.save(path / "labels.npy", labels)
    (path / INDEX).write_text(json.dumps(_index(path, identity)))


def _index(path: Path, identity: str) -> dict:
    """What `INDEX` says of the arrays in a directory."""
    return {
        "identity": identity,
        "block_bytes": BLOCK_BYTES,
        "crc32": {name: _checksums(path / name) for name in ARRAYS},
    }


def _checksums(path: Path) -> list[int]:
    """CRC-32 of each block of a file."""
    # Read, not mapped: a disk's fault is an exception then, and the pages don't count as this process's memory.
    with open(path, "rb") as file, ThreadPoolExecutor() as pool:
        starts = range(0, os.fstat(file.fileno()).st_size, BLOCK_BYTES)
        return list(pool.map(lambda start: zlib.crc32(os.pread(file.fileno(), BLOCK_BYTES, start)), starts))


def _unfinished(path: Path) -> Path:
    """A name that is no other process's, on the same file system."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}{UNFINISHED}")


def _discard(path: Path) -> None:
    aside = _unfinished(path)
    # Another process may have done so already.
    with contextlib.suppress(FileNotFoundError):
        path.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _remove_abandoned(path: Path) -> None:
    """Remove what killed processes have left behind."""
    for left in path.parent.glob(f"{glob.escape(path.name)}.*{UNFINISHED}"):
        # Its process, or another one that cleans up, may be faster.
        with contextlib.suppress(OSError):
            last_write = max(file.stat().st_mtime for file in (left, *left.iterdir()))
            if time.time() - last_write > ABANDONED_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
