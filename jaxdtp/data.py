"""Data sets as uint8 arrays: scikit-learn's digits, and any TFDS image classification builder, decoded once and cached.

TFDS is read through `as_data_source`, which needs no TensorFlow.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from jaxdtp import cache
from jaxdtp.config import ConfigError
from jaxdtp.console import Unfailing
from jaxdtp.places import cache_home, local


class Examples(NamedTuple):
    """Examples in memory, on the host or on devices.

    Attributes:
        images: uint8 [examples, height, width, channels].
        labels: int32 [examples].
    """

    images: np.ndarray
    labels: np.ndarray


class Split(NamedTuple):
    """Examples of one split, chosen from stored ones.

    Attributes:
        images: uint8 [stored, height, width, channels], possibly mapped from a file.
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


def load(config: ConfigDict, seed: int) -> Dataset:
    """The data set of the configuration group `dataset`, its validation part taken from the training data.

    Args:
        config: the group `dataset`.
        seed: decides which examples the validation part takes.

    Raises:
        ConfigError: the data set isn't there, is damaged, isn't an image classification data set with images of one
            size, or does not fit `dataset.mean` and `dataset.std`; or the cache can't be written.
    """
    train, test, classes = _load_digits() if config.name == "digits" else _load_tfds(config)
    channels = train.images.shape[-1]
    for key in ("mean", "std"):
        if len(config[key]) != channels:
            raise ConfigError(
                f"config.dataset.{key}: got {config[key]!r}; allowed: {channels} values, one for each channel of the "
                f"{config.name} images"
            )
    order = np.random.default_rng(seed).permutation(len(train.rows))
    validation_size = round(config.validation_fraction * len(order))
    held_out, kept = np.sort(order[:validation_size]), np.sort(order[validation_size:])
    return Dataset(train._replace(rows=kept), train._replace(rows=held_out), test, classes)


def _load_digits() -> tuple[Split, Split, tuple[str, ...]]:
    """scikit-learn's 1,797 digits of 8x8 pixels, a fixed fifth of them for testing."""
    from sklearn.datasets import load_digits  # takes a second, and only this data set needs it
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.round(digits.images[..., None] * (255 / 16)).astype(np.uint8)
    labels = digits.target.astype(np.int32)
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels)
    return _whole(images[train], labels[train]), _whole(images[test], labels[test]), tuple("0123456789")


def _whole(images: np.ndarray, labels: np.ndarray) -> Split:
    return Split(images, labels, np.arange(len(labels)))


def _load_tfds(config: ConfigDict) -> tuple[Split, Split, tuple[str, ...]]:
    """Training and test split of a TFDS builder, from the cache where it holds this very data set."""
    builder = _builder(config)
    cache_dir = local(config.cache_dir, "config.dataset.cache_dir") if config.cache_dir else cache_home()
    filled = [name for name, info in builder.info.splits.items() if info.num_examples]
    test_split = "test" if "test" in filled else "validation"
    for name in ("train", test_split):
        if name not in filled:
            raise ConfigError(
                f"config.dataset.name: {config.name} has examples in the splits {', '.join(filled) or '(none)'}; "
                "allowed: data sets with a train split and a test or validation split"
            )
    train, test = (_load_split(builder, name, cache_dir) for name in ("train", test_split))
    return train, test, tuple(builder.info.features["label"].names)


def _builder(config: ConfigDict):
    import tensorflow_datasets as tfds  # takes seconds, and the digits do without

    data_dir = os.path.expanduser(config.data_dir) or tfds.core.constants.DATA_DIR
    ways_out = (
        f"prepare it where there is a network with tfds.builder({config.name!r}, "
        "file_format='array_record').download_and_prepare(), or name the TFDS directory that holds it with "
        "--config.dataset.data_dir"
    )
    try:
        builder = tfds.builder(config.name, data_dir=data_dir, file_format="array_record")
        prepared, features = builder.is_prepared(), builder.info.features
    except Exception as error:  # a damaged data set makes TFDS raise nearly anything
        unknown = isinstance(error, tfds.core.DatasetNotFoundError)
        what = "is neither 'digits' nor a data set of TFDS" if unknown else "can't be opened by TFDS"
        raise ConfigError(
            f"config.dataset.name: {config.name!r} {what} in {data_dir} ({_first_line(error)}); allowed: names that "
            "TFDS knows, or that the directory holds with dataset_info.json and features.json as TFDS wrote them; "
            f"{ways_out}"
        ) from error
    if not prepared:
        raise ConfigError(f"config.dataset.name: {config.name!r} is not prepared in {data_dir}; {ways_out}")
    image = features["image"] if {"image", "label"} <= set(features) else None
    fixed = image is not None and len(image.shape) == 3 and None not in image.shape
    if not fixed or image.np_dtype != np.uint8 or not hasattr(features["label"], "num_classes"):
        raise ConfigError(
            f"config.dataset.name: {config.name!r} has the features {', '.join(features)} with the image {image}; "
            "allowed: data sets with a class 'label' and an 'image' of fixed height, width and channels in uint8"
        )
    return builder


def _load_split(builder, split: str, cache_dir: Path) -> Split:
    """One split from its cache directory, into which it is decoded where it isn't there yet."""
    info, features = builder.info.splits[split], builder.info.features
    try:
        stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in map(Path, info.filepaths)]
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"config.dataset.name: the record files of the {split} split of {builder.info.full_name} can't be read "
            f"({_first_line(error)}); allowed: files as TFDS wrote them; {_prepare_again(builder)}"
        ) from error
    # A data set prepared again has other files, sizes or dates, and so another identity.
    shape = (info.num_examples, *features["image"].shape)
    identity = json.dumps([str(builder.data_path), split, stats, shape])
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    path = cache_dir / f"{builder.info.full_name.replace('/', '-')}-{split}-{digest}"
    images, labels = cache.fetch(path, identity, shape, lambda: _decode(builder, split))
    # The number of classes may have changed since.
    wrong = np.flatnonzero((labels < 0) | (labels >= features["label"].num_classes))
    if len(wrong):
        raise _bad_label(builder, split, int(wrong[0]), int(labels[wrong[0]]))
    return _whole(images, labels)


def _decode(builder, split: str) -> Iterator[tuple[np.ndarray, int]]:
    """Images and labels of a split from the record files, one after another (about 5,000 a second)."""
    from tqdm import tqdm

    features = builder.info.features
    shape, num_classes = features["image"].shape, features["label"].num_classes
    source = builder.as_data_source(split=split)
    indices = range(builder.info.splits[split].num_examples)
    for index in tqdm(
        indices, desc=f"decoding {builder.info.name} {split}", unit=" images", disable=None, file=Unfailing(sys.stderr)
    ):
        try:
            example = source[index]
            image, label = np.asarray(example["image"]), int(example["label"])
        except Exception as error:  # of TFDS, of the records' reader, of the image decoder
            found = f"can't be decoded ({_first_line(error)})"
            raise _bad_example(builder, split, index, found, "records as TFDS wrote them") from error
        if image.shape != shape or image.dtype != np.uint8:
            raise _bad_example(builder, split, index, f"is {image.dtype} {image.shape}", f"uint8 {shape}")
        if not 0 <= label < num_classes:
            raise _bad_label(builder, split, index, label)
        yield image, label


def _bad_label(builder, split: str, index: int, label: int) -> ConfigError:
    allowed = f"labels 0 to {builder.info.features['label'].num_classes - 1}"
    return _bad_example(builder, split, index, f"has label {label}", allowed)


def _bad_example(builder, split: str, index: int, found: str, allowed: str) -> ConfigError:
    info = builder.info.splits[split]
    file = info.filepaths[np.searchsorted(np.cumsum(info.shard_lengths), index, side="right")]
    return ConfigError(
        f"config.dataset.name: example {index} of the {split} split of {builder.info.full_name}, in {file}, {found}; "
        f"allowed: {allowed}; {_prepare_again(builder)}"
    )


def _prepare_again(builder) -> str:
    return f"delete {builder.data_path} and prepare the data set again"


def _first_line(error: BaseException) -> str:
    # The others of TFDS list all the data sets that it knows.
    return f"{type(error).__name__}: {error}".splitlines()[0]
