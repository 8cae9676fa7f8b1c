"""Data sets as arrays: scikit-learn's digits, any TFDS image classification builder, folders of pictures, and a user's
own arrays and sources; decoded once and, where they lie on disk, cached."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from jaxdtp.data import folder, memory, tfds
from jaxdtp.data.memory import Data
from jaxdtp.data.stored import Found, Stored, arrays, bad_label, common_size, first_line, select
from jaxdtp.models import own
from jaxdtp.models.blocks import AnyArray
from jaxdtp.system.console import say
from jaxdtp.system.errors import ConfigError, one_line
from jaxdtp.system.places import of_storage

SIZE = (32, 32)
"""To which images of different sizes are resized where nothing says otherwise."""

MOST_CLASSES = 1_000_000
"""Labels above are hashes or identities rather than classes, each of which would have an output of the network."""

TEST_SHARE = 5
"""One of so many training examples is for testing where there is nothing else to test on."""


class Examples(NamedTuple):
    """Examples in memory, on the host or on devices.

    Attributes:
        images: [examples, height, width, channels], uint8, uint16 or float32.
        labels: int32 [examples].
    """

    images: AnyArray
    labels: AnyArray


class Split(NamedTuple):
    """Examples of one split, chosen from stored ones.

    Attributes:
        images: [stored, height, width, channels], uint8, uint16 or float32, possibly mapped from a file.
        labels: int32 [stored], possibly mapped from a file.
        rows: int64 [examples], which of the stored ones these are.
    """

    images: np.ndarray
    labels: np.ndarray
    rows: np.ndarray


class Dataset(NamedTuple):
    """Training, validation and test split of one data set, and the names of its classes, by label."""

    train: Split
    validation: Split
    test: Split
    classes: tuple[str, ...]


def read(split: Split, positions: np.ndarray) -> Examples:
    """Copies of the examples at these positions of a split.

    Args:
        split: where to read.
        positions: integers from 0 to `len(split.rows) - 1`, of any shape; that shape replaces `[examples]` in the
            result.
    """
    rows = split.rows[positions]
    return Examples(split.images[rows], split.labels[rows])


def load(config: ConfigDict, seed: int, data: Data = None) -> Dataset:
    """The data set of the configuration group `dataset`, its validation part taken from the training data unless
    `dataset.validation_split` names another one.

    What is missing is chosen, and said: the test data (`test_split_of`) and the size of images of different sizes. What
    other splits name of 'train', such as 'train[90%:]', is left out of training unless `dataset.train_split` is given.

    Args:
        config: the group `dataset`.
        seed: decides which training examples the validation part takes.
        data: instead of the one that `dataset.name` names: a pair (images, labels) of arrays; or what has `__len__` and
            `__getitem__`, with items (image, label) or {'image': ..., 'label': ...}; or a dictionary of these by split.

    Raises:
        ConfigError: the data set isn't there, is damaged, has no images with labels, or does not fit `dataset.mean` and
            `dataset.std`; or the cache can't be written.
    """
    return load_for_seeds(config, (seed,), data)[0]


def load_for_seeds(config: ConfigDict, seeds: Sequence[int], data: Data = None) -> list[Dataset]:
    """As `load`, by seed: they share the stored examples, and differ in which of them their splits take."""
    found = find(config, data)
    wanted = {
        "train": config.train_split or "train",
        "validation": config.validation_split,
        "test": config.test_split,
    }
    chosen = {role: select(found, split, f"{role}_split") for role, split in wanted.items() if split}
    if "test" not in chosen and (split := test_split_of(found, [config.train_split, config.validation_split])):
        wanted["test"], chosen["test"] = split, found.splits[split]
    size = size_of(config, found.name, list(chosen.values()))
    prefix, number = found.name.replace("/", "-"), len(found.classes) if found.classes else None
    read_in = {}
    for role, stored in chosen.items():
        name = f"{prefix}-{re.sub(r'[^a-z0-9]+', '_', wanted[role].lower())}"
        read_in[role] = arrays(name, stored, size, number, config.cache_dir)
    classes = found.classes or _classes(chosen["train"], read_in["train"][1])
    splits = {
        role: Split(images, _numbers(chosen[role], labels, classes), np.arange(len(labels)))
        for role, (images, labels) in read_in.items()
    }
    train = splits["train"]
    if not config.train_split:
        train = train._replace(rows=others(found, train.rows, [wanted["validation"], wanted["test"]]))
    channels = train.images.shape[-1]
    for key in ("mean", "std"):
        if len(config[key]) not in (1, channels):
            raise ConfigError(
                f"config.dataset.{key}: got {config[key]!r}; allowed: {channels} values, one for each channel of the "
                f"{found.name} images, or one for all"
            )
    if "test" not in splits:
        train, splits["test"] = _divided(train, np.random.default_rng(0), 1 / TEST_SHARE)

    def divided(seed: int) -> Dataset:
        own = (train, splits["validation"]) if "validation" in splits else None
        own = own or _divided(train, np.random.default_rng(seed), config.validation_fraction)
        return Dataset(*own, splits["test"], classes)

    return [divided(seed) for seed in seeds]


def others(found: Found, rows: np.ndarray, splits: list[str]) -> np.ndarray:
    """The rows of the split 'train' that other splits, such as 'train[90%:]', don't name, too; all of them where one
    names them all.

    Raises:
        ConfigError: several name them all together.
    """
    taken = np.zeros((len(splits), len(rows)), bool)
    for index, split in enumerate(splits):
        for name, first, last in found.parts(split) if split else []:
            if name == "train":
                taken[index] |= (rows >= first) & (rows < last)
    kept = rows[~taken.any(axis=0)]
    if not len(kept) and not taken.all(axis=1).any():
        raise ConfigError(
            "config.dataset.train_split: got none, where validation_split and test_split take all of train; allowed: "
            "one of its own, or less for these"
        )
    return kept if len(kept) else rows


def find(config: ConfigDict, data: Data = None) -> Found:
    """The data set that the configuration group `dataset` names, or `data`, as it is stored."""
    if data is not None:
        return memory.of_data(config, data, "the data given")
    if config.name in KINDS:
        try:
            return KINDS[config.name](config)
        except Exception as error:
            if not of_storage(error):
                raise
            raise ConfigError(
                f"config.dataset.data_dir: {config.data_dir} can't be read ({one_line(first_line(error))}); allowed: a "
                "place that can be"
            ) from error
    # A version, which TFDS's names may have there, is no name.
    if ":" in config.name and config.name.rpartition(":")[2].isidentifier():
        try:
            data = own.load(config.name)()
        except Exception as error:  # a user's code
            reason = one_line(f"{type(error).__name__}: {error}")
            raise ConfigError(
                f"config.dataset.name: got {config.name!r} ({reason}); allowed: a function without arguments that "
                "returns data"
            ) from error
        return memory.of_data(config, data, config.name)
    return tfds.find(config)


def test_split_of(found: Found, chosen: list[str]) -> str:
    """The split to test on: 'test' or, where there is none with labels, 'validation'; '' for a part of the training
    data. `chosen` are those that a configuration names for training and validation, of which it takes nothing."""
    labelled = [name for name in ("test", "validation") if name in found.splits and _has_labels(found, name)]
    taken = {name for split in chosen if split for name, _, _ in found.parts(split)}
    usable = [name for name in labelled if name not in taken]
    if "test" in usable:
        return "test"
    why = "not there"
    if "test" in found.splits:
        why = "taken by others" if "test" in labelled else "without labels"
    instead = "the validation split" if usable else f"a fixed part (1/{TEST_SHARE}) of the training data"
    say(f"{found.name}: the test split is {why}, so {instead} is for testing (config.dataset.test_split)")
    return usable[0] if usable else ""


def _has_labels(found: Found, split: str) -> bool:
    stored = found.splits[split]
    try:
        label = stored.label(0)
        return isinstance(label, str) or (label is not None and int(label) >= 0)
    except Exception:  # which reading all of it will tell
        return True


def size_of(config: ConfigDict, name: str, chosen: list[Stored]) -> tuple[int, int]:
    """Height and width that all images are to have.

    Raises:
        ConfigError: splits have images of different kinds.
    """
    kinds = sorted({f"{stored.dtype} with {stored.shape[2]} channel(s)" for stored in chosen})
    if len(kinds) > 1:
        raise ConfigError(f"config.dataset.name: {name} has splits in {', '.join(kinds)}; allowed: one kind of images")
    height, width = common_size([stored.shape[:2] for stored in chosen])
    if config.size:
        return config.size
    if height is None or width is None:
        say(f"{name}: images of different sizes are resized to {SIZE[0]}x{SIZE[1]} (config.dataset.size)")
        return SIZE
    return height, width


def _classes(stored: Stored, labels: np.ndarray) -> tuple[str, ...]:
    """Names for what training labels are."""
    if labels.dtype.kind == "U":
        return tuple(np.unique(labels).tolist())
    largest = int(labels.argmax())
    if labels[largest] >= MOST_CLASSES:
        raise bad_label(stored, largest, labels[largest], MOST_CLASSES)
    return tuple(map(str, range(int(labels[largest]) + 1)))


def _numbers(stored: Stored, labels: np.ndarray, classes: tuple[str, ...]) -> np.ndarray:
    """Labels as int32."""
    if labels.dtype.kind == "U":
        places = {name: place for place, name in enumerate(classes)}
        labels = np.array([places.get(label, -1) for label in labels.tolist()])
    wrong = np.flatnonzero((labels < 0) | (labels >= len(classes)))
    if len(wrong):
        raise bad_label(stored, int(wrong[0]), stored.label(int(wrong[0])), len(classes))
    return np.asarray(labels, np.int32)


def _divided(split: Split, rng: np.random.Generator, share: float) -> tuple[Split, Split]:
    """A split without a random share of it, and that share; both keep its order."""
    order = rng.permutation(len(split.rows))
    size = round(share * len(order))
    held_out, kept = np.sort(order[:size]), np.sort(order[size:])
    return split._replace(rows=split.rows[kept]), split._replace(rows=split.rows[held_out])


def _digits(config: ConfigDict) -> Found:
    """scikit-learn's 1,797 digits of 8x8 pixels, a fixed fifth of them for testing."""
    from sklearn.datasets import load_digits  # takes a second, and only this data set needs it
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.round(digits.images[..., None] * (255 / 16)).astype(np.uint8)
    train, test = train_test_split(
        np.arange(len(images)), test_size=0.2, random_state=0, stratify=digits.target.astype(np.int32)
    )
    data = {"train": (images[train], digits.target[train]), "test": (images[test], digits.target[test])}
    return memory.of_data(config, data, "digits")._replace(classes=tuple("0123456789"))


KINDS = {"digits": _digits, "folder": folder.find, "npz": memory.of_file}
"""By name; other names are TFDS's, or FILE.py:NAME and PACKAGE.MODULE:NAME of the user's functions."""
