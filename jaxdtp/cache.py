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

from jaxdtp.config import ConfigError
from jaxdtp.console import say

ARRAYS = ("images.npy", "labels.npy")
INDEX = "index.json"
BLOCK_BYTES = 2**22  # that a checksum stands for
UNFINISHED = ".unfinished"
ABANDONED_SECONDS = 3600.0  # without a write, which takes a running process less than a second


def fetch(
    path: Path, identity: str, shape: tuple[int, ...], examples: Callable[[], Iterable[tuple[np.ndarray, int]]]
) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of the directory `path`, written first where that is missing, damaged or of other data.

    Any number of processes may do so at once, on hosts that share the directory too: each writes a directory of its
    own, and the first that is complete gets the name `path`.

    Args:
        path: of the directory.
        identity: says which data these are.
        shape: [examples, height, width, channels] of the images.
        examples: `examples()` gives the images, uint8 [height, width, channels], and their labels, one after another.

    Returns:
        Images, uint8 [examples, height, width, channels], and labels, int32 [examples], mapped into memory.

    Raises:
        ConfigError: the directory can't be written.
    """
    try:
        stored = _open(path, identity)
        if stored is None:
            if path.exists():
                say(f"{path} is damaged or of other data: decoding the data set again")
                _discard(path)
            _remove_abandoned(path)
            _write(path, identity, shape, examples())
            stored = _open(path, identity)
            if stored is None:
                raise OSError("what is read there is not what was written")
    except OSError as error:
        raise ConfigError(
            f"config.dataset.cache_dir: can't write {path} ({error}); allowed: a directory with room for "
            f"{np.prod(shape) / 1e6:.0f} MB"
        ) from error
    return stored


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


def _write(path: Path, identity: str, shape: tuple[int, ...], examples: Iterable[tuple[np.ndarray, int]]) -> None:
    unfinished = _unfinished(path)
    try:
        unfinished.mkdir(parents=True)
        labels = np.empty(shape[0], np.int32)
        # A file and not a writable memory map, which a full disk would end with a bus error.
        with open(unfinished / "images.npy", "wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for index, (image, label) in enumerate(examples):
                file.write(np.ascontiguousarray(image))
                labels[index] = label
        np.save(unfinished / "labels.npy", labels)
        (unfinished / INDEX).write_text(json.dumps(_index(unfinished, identity)))
        try:
            unfinished.rename(path)
        except OSError:
            if not path.exists():
                raise
            # Another process was faster.
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


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
