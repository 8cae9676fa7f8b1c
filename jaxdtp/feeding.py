"""How examples get to the devices: a split that fits stays there; a larger one is streamed, window by window.

Either way a round is the same: which examples a batch holds, in which order, is decided before.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxdtp.data import Examples, Split
from jaxdtp.parallel import divide_rows, replicate

WINDOW_BYTES = 2**26  # of images on each device: a step's transfer is a small part of it, and so is it of the memory


class Feed(NamedTuple):
    """A split on its way to the devices.

    Attributes:
        split: on the host.
        mesh: the devices.
        batch_size: examples in a batch.
        resident: the whole split on the devices, each with its part of the images; None if it is streamed.
        window: how many batches go through the devices at a time if it is streamed, else 0.
    """

    split: Split
    mesh: Mesh
    batch_size: int
    resident: Examples | None
    window: int


class Window(NamedTuple):
    """Some batches that can be used now.

    Attributes:
        data: on the devices.
        order: positions in `data`, batch after batch.
        first: number, in the pass, of the first batch in `order`.
        stop: number of the batch after the last one.
        examples: how many examples there are in `order`; the last window may be filled up with more.
    """

    data: Examples
    order: jax.Array
    first: int
    stop: int
    examples: int


def open_feed(split: Split, mesh: Mesh, batch_size: int, megabytes: float) -> Feed:
    """Put a split on the devices if it takes up to `megabytes` (10^6 bytes) of each, else prepare to stream it through
    so much."""
    example_bytes = split.images[:1].nbytes + split.labels[:1].nbytes
    budget = megabytes * 1e6 * mesh.size
    if len(split.rows) * example_bytes <= budget:
        return Feed(split, mesh, batch_size, _place(split, mesh, split.rows), 0)
    # Four windows: one in use, one on its way, and what is not yet freed of those before.
    window_bytes = min(WINDOW_BYTES * mesh.size, budget / 4)
    return Feed(split, mesh, batch_size, None, max(1, int(window_bytes / (batch_size * example_bytes))))


def windows(feed: Feed, order: np.ndarray, first: int = 0) -> Iterator[Window]:
    """The windows of one pass.

    Args:
        feed: as from `open_feed`.
        order: positions in the split, in the order in which they are used.
        first: number of the batch to begin with.
    """
    batches = -(-len(order) // feed.batch_size)
    if feed.resident is not None:
        yield Window(feed.resident, replicate(feed.mesh, order.astype(np.int32)), 0, batches, len(order))
        return

    size = feed.window * feed.batch_size
    in_window = replicate(feed.mesh, np.arange(size, dtype=np.int32))

    def load(begin: int) -> Window:
        chosen = feed.split.rows[order[begin * feed.batch_size :][:size]]
        # All windows have one size, so that they run one program.
        data = _place(feed.split, feed.mesh, np.pad(chosen, (0, size - len(chosen)), mode="edge"))
        return Window(data, in_window, begin, min(begin + feed.window, batches), len(chosen))

    with ThreadPoolExecutor(1) as loader:
        upcoming = loader.submit(load, first)
        for begin in range(first, batches, feed.window):
            window = upcoming.result()
            following = begin + feed.window
            upcoming = loader.submit(load, following) if following < batches else None
            yield window


def _place(split: Split, mesh: Mesh, rows: np.ndarray) -> Examples:
    return Examples(divide_rows(mesh, split.images, rows), divide_rows(mesh, split.labels, rows))
