"""Splits as they are stored, of whatever kind of data set, and how they become arrays."""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxdtp.data import cache
from jaxdtp.data.images import DTYPES, as_array, resized
from jaxdtp.system.console import Unfailing
from jaxdtp.system.errors import ConfigError

Size = tuple[int | None, int | None]
"""Height and width; None for what isn't the same in all images."""


class Stored(NamedTuple):
    """One split, or a part of one, with random access to its examples.

    Attributes:
        size: how many there are.
        get: `get(index)` to an image, [height, width, channels] or [height, width] or a picture of PIL, and its label.
        label: `label(index)`, of the example alone.
        where: `where(index)`, an example in words, for errors.
        again: what can be done about a damaged one, for errors.
        shape: [height, width, channels] of all images; None for what isn't the same in all of them.
        dtype: of all images.
        identity: which data these are, as JSON has it; None for those in memory, which aren't cached.
    """

    size: int
    get: Callable[[int], tuple[Any, Any]]
    label: Callable[[int], Any]
    where: Callable[[int], str]
    again: str
    shape: tuple[int | None, int | None, int]
    dtype: np.dtype
    identity: Any = None


class Found(NamedTuple):
    """A data set as it is stored.

    Attributes:
        name: in words and in file names.
        splits: by name.
        classes: their names, by label; None where labels are numbers without names.
        parts: `parts(expression)` to names of splits, each with a first and a last but one example, in the syntax of
            TFDS.
    """

    name: str
    splits: dict[str, Stored]
    classes: tuple[str, ...] | None
    parts: Callable[[str], list[tuple[str, int, int]]]


def parts_by_tfds(shard_lengths: dict[str, list[int]]) -> Callable[[str], list[tuple[str, int, int]]]:
    """`Found.parts` of splits with such lengths."""

    def parts(expression: str) -> list[tuple[str, int, int]]:
        if expression in shard_lengths:
            return [(expression, 0, sum(shard_lengths[expression]))]
        import tensorflow_datasets as tfds  # takes seconds

        infos = {
            name: tfds.core.SplitInfo(name=name, shard_lengths=lengths, num_bytes=0)
            for name, lengths in shard_lengths.items()
        }
        sizes = {name: sum(lengths) for name, lengths in shard_lengths.items()}
        return [
            (part.splitname, part.from_ or 0, sizes[part.splitname] if part.to is None else part.to)
            for part in tfds.core.ReadInstruction.from_spec(expression).to_absolute(infos)
        ]

    return parts


def select(found: Found, expression: str, key: str) -> Stored:
    """The examples that an expression in the syntax of TFDS names, such as 'train[:80%]+validation'.

    Raises:
        ConfigError: it can't be read, or there are none; names the configuration key.
    """
    try:
        parts = found.parts(expression)
    except Exception as error:  # of TFDS, which has many
        raise ConfigError(
            f"config.dataset.{key}: got {expression!r} ({first_line(error)}); allowed: of {found.name} one of "
            f"{', '.join(found.splits)}, or parts of them in the syntax of TFDS, such as 'train[:80%]'"
        ) from error
    pieces = [(found.splits[name], first, last) for name, first, last in parts if last > first]
    if not pieces:
        sizes = ", ".join(f"{name} ({split.size})" for name, split in found.splits.items())
        raise ConfigError(
            f"config.dataset.{key}: got {expression!r}, which has no examples; allowed: what has some, of {sizes}"
        )
    if len(pieces) == 1 and pieces[0][1:] == (0, pieces[0][0].size):
        return pieces[0][0]
    ends = np.cumsum([last - first for _, first, last in pieces])

    def at(index: int) -> tuple[Stored, int]:
        piece = int(np.searchsorted(ends, index, side="right"))
        split, _, last = pieces[piece]
        return split, index - int(ends[piece]) + last

    def get(index: int) -> tuple[Any, Any]:
        split, own = at(index)
        return split.get(own)

    def label(index: int) -> Any:
        split, own = at(index)
        return split.label(own)

    def where(index: int) -> str:
        split, own = at(index)
        return split.where(own)

    splits = [split for split, _, _ in pieces]
    cached = all(split.identity is not None for split in splits)
    identity = [[split.identity, first, last] for split, first, last in pieces] if cached else None
    # Where channels or types differ, an example that isn't like those of the first split will be told.
    shape = (*common_size([split.shape[:2] for split in splits]), splits[0].shape[2])
    return Stored(int(ends[-1]), get, label, where, splits[0].again, shape, splits[0].dtype, identity)


def common_size(sizes: Sequence[Size]) -> Size:
    """The height and the width that all of these have."""
    height, width = (lengths[0] if len(set(lengths)) == 1 else None for lengths in zip(*sizes, strict=True))
    return height, width


def arrays(
    name: str, stored: Stored, size: tuple[int, int], classes: int | None, cache_dir: str
) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels, from the cache where it holds these very data.

    Args:
        name: for the cache and the progress bar.
        stored: the examples.
        size: height and width, to which images are resized that have others.
        classes: labels are below that; None where that isn't known yet.
        cache_dir: `dataset.cache_dir`.

    Returns:
        [examples, height, width, channels] and, as they come, [examples].

    Raises:
        ConfigError: an example is damaged, or not like the others, or the cache can't be written.
    """
    shape = (stored.size, *size, stored.shape[2])
    resize = size if size != stored.shape[:2] else None

    def decoded() -> Iterator[tuple[np.ndarray, Any]]:
        return _decode(name, stored, resize, shape[1:], classes)

    if stored.identity is None:
        images, found = np.empty(shape, stored.dtype), []
        for index, (image, label) in enumerate(decoded()):
            images[index] = image
            found.append(label)
        return images, np.asarray(found)
    identity = json.dumps([stored.identity, shape, str(stored.dtype)])
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    images, labels = cache.fetch(cache_dir, f"{name}-{digest}", identity, (shape, stored.dtype), decoded)
    # How many classes there are may have changed since.
    wrong = np.flatnonzero((labels < 0) | (labels >= (classes or np.inf)))
    if len(wrong):
        raise bad_label(stored, int(wrong[0]), labels[wrong[0]], classes)
    return images, labels


def _decode(
    name: str, stored: Stored, resize: tuple[int, int] | None, shape: tuple[int, int, int], classes: int | None
) -> Iterator[tuple[np.ndarray, Any]]:
    from tqdm import tqdm

    bar = {"unit": " images", "disable": None, "file": Unfailing(sys.stderr)}
    for index in tqdm(range(stored.size), desc=f"decoding {name}", **bar):
        try:
            image, label = stored.get(index)
            image, label = as_array(image), label.item() if hasattr(label, "item") else label
            if resize and image.ndim == 3 and image.dtype == stored.dtype:
                image = resized(image, resize)
        except Exception as error:  # of the records' reader, of the image decoder, of a user's code
            found = f"can't be decoded ({first_line(error)})"
            raise bad_example(stored, index, found, "examples as they were written") from error
        if image.shape != shape or image.dtype != stored.dtype:
            raise bad_example(stored, index, f"is {image.dtype} {image.shape}", f"{stored.dtype} {shape}")
        if not is_label(label, classes):
            raise bad_label(stored, index, label, classes)
        yield image, label


def is_label(label: Any, classes: int | None) -> bool:
    """Whether it is a class's number or, where these aren't known yet, its name."""
    if isinstance(label, str):
        return classes is None
    return isinstance(label, int) and 0 <= label < (classes or 2**31)


def bad_example(stored: Stored, index: int, found: str, allowed: str) -> ConfigError:
    """What is wrong with an example, in one line."""
    again = f"; {stored.again}" if stored.again else ""
    return ConfigError(f"config.dataset.name: {stored.where(index)} {found}; allowed: {allowed}{again}")


def bad_label(stored: Stored, index: int, label: Any, classes: int | None) -> ConfigError:
    """What is wrong with a label, in one line."""
    allowed = f"labels 0 to {classes - 1}" if classes else "labels that are whole numbers from 0, or names"
    shown = int(label) if isinstance(label, int | np.integer) else repr(label)
    return bad_example(stored, index, f"has label {shown}", allowed)


def first_line(error: BaseException) -> str:
    """An exception in words; the other lines of TFDS list all the data sets that it knows."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def check_dtype(dtype: Any, what: str) -> np.dtype:
    """What images of a type become, see `images.as_array`.

    Raises:
        ConfigError: images of such a type can't be read.
    """
    try:
        return as_array(np.zeros((1, 1, 1), dtype)).dtype
    except (TypeError, ValueError) as error:
        raise ConfigError(f"config.dataset.name: {what} has images of type {dtype}; allowed: {DTYPES}") from error
