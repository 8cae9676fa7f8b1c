"""How examples get to the devices: a split that fits stays there; a larger one is streamed, window by window.

Either way a round is the same: which examples a batch holds, in which order, is decided before.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxdtp.data import Examples, Split
from jaxdtp.devices.parallel import divide_rows, divide_seeds, replicate

WINDOW_BYTES = 2**26  # of images on each device: a step's transfer is a small part of it, and so is it of the memory


class Feed(NamedTuple):
    """A split on its way to the devices, or those of several seeds that train together.

    Attributes:
        splits: on the host, one or by seed; they choose from the same stored examples.
        mesh: the devices.
        batch_size: examples in a batch.
        resident: the examples on the devices, each with its part of the images; None if they are streamed.
        rows: int32 [examples], or [seeds, examples]: where in `resident` those of the splits are.
        window: how many batches go through the devices at a time if they are streamed, else 0.
    """

    splits: tuple[Split, ...]
    mesh: Mesh
    batch_size: int
    resident: Examples | None
    rows: np.ndarray
    window: int

    @property
    def examples(self) -> int:
        """How many each split has."""
        return self.rows.shape[-1]


class Window(NamedTuple):
    """Some batches that can be used now.

    Attributes:
        data: on the devices.
        order: positions in `data`, batch after batch; [seeds, ...] of seeds that train together.
        first: number, in the pass, of the first batch in `order`.
        stop: number of the batch after the last one.
        examples: how many examples there are in `order`; the last window may be filled up with more.
    """

    data: Examples
    order: jax.Array
    first: int
    stop: int
    examples: int


def open_feeds(
    splits: Sequence[Split], members: Sequence[tuple[int, ...]], mesh: Mesh, batch_size: int, megabytes: float
) -> list[Feed]:
    """Put splits on the devices if what they name takes up to `megabytes` (10^6 bytes) of each, else prepare to stream
    them through so much.

    Args:
        splits: by seed, of the same stored examples.
        members: places of seeds, by group; where there are several in one, `fit` must hold.
        mesh: the devices.
        batch_size: examples in a batch.
        megabytes: for all splits.

    Returns:
        A feed for each group.
    """
    groups = [tuple(splits[place] for place in places) for places in members]
    if fit(splits, mesh, megabytes):
        stored = _named(splits)
        resident = _place(splits[0], mesh, stored)
        feeds = []
        for group in groups:
            rows = [np.searchsorted(stored, split.rows).astype(np.int32) for split in group]
            feeds.append(Feed(group, mesh, batch_size, resident, np.stack(rows) if len(group) > 1 else rows[0], 0))
        return feeds
    # Four windows: one in use, one on its way, and what is not yet freed of those before.
    window_bytes = min(WINDOW_BYTES * mesh.size, megabytes * 1e6 * mesh.size / 4)
    window = max(1, int(window_bytes / (batch_size * _example_bytes(splits[0]))))
    return [Feed(group, mesh, batch_size, None, group[0].rows, window) for group in groups]


def fit(splits: Sequence[Split], mesh: Mesh, megabytes: float) -> bool:
    """Whether what splits name takes up to `megabytes` of each device."""
    return len(_named(splits)) * _example_bytes(splits[0]) <= megabytes * 1e6 * mesh.size


def windows(feed: Feed, order: np.ndarray, first: int = 0) -> Iterator[Window]:
    """The windows of one pass.

    Args:
        feed: as from `open_feeds`.
        order: positions in the split, in the order in which they are used; [seeds, ...] of seeds that train together.
        first: number of the batch to begin with.
    """
    examples = order.shape[-1]
    batches = -(-examples // feed.batch_size)
    if feed.resident is not None:
        places = np.take_along_axis(feed.rows, order, axis=-1)
        placed = (divide_seeds if order.ndim > 1 else replicate)(feed.mesh, places)
        yield Window(feed.resident, placed, 0, batches, examples)
        return

    (split,) = feed.splits
    size = feed.window * feed.batch_size
    in_window = replicate(feed.mesh, np.arange(size, dtype=np.int32))

    def load(begin: int) -> Window:
        chosen = split.rows[order[begin * feed.batch_size :][:size]]
        # All windows have one size, so that they run one program.
        data = _place(split, feed.mesh, np.pad(chosen, (0, size - len(chosen)), mode="edge"))
        return Window(data, in_window, begin, min(begin + feed.window, batches), len(chosen))

    with ThreadPoolExecutor(1) as loader:
        upcoming = loader.submit(load, first)
        for following in range(first + feed.window, batches, feed.window):
            window, upcoming = upcoming.result(), loader.submit(load, following)
            yield window
        yield upcoming.result()


def _named(splits: Sequence[Split]) -> np.ndarray:
    """The rows of the stored examples that splits name, in rising order."""
    return np.unique(np.concatenate([split.rows for split in splits]))


def _example_bytes(split: Split) -> int:
    return split.images[:1].nbytes + split.labels[:1].nbytes


def _place(split: Split, mesh: Mesh, rows: np.ndarray) -> Examples:
    return Examples(divide_rows(mesh, split.images, rows), divide_rows(mesh, split.labels, rows))
