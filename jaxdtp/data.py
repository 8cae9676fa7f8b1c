"""Data sets as uint8 arrays: scikit-learn's digits, and any TFDS image classification builder, decoded once and cached.

TFDS is read through `as_data_source`, which needs no TensorFlow.
"""

import hashlib
import json
import os
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from jaxdtp.config import ConfigError


class Split(NamedTuple):
    """Examples of one split.

    Attributes:
        images: uint8 [examples, height, width, channels].
        labels: int32 [examples].
    """

    images: np.ndarray
    labels: np.ndarray


class Dataset(NamedTuple):
    """Training, validation and test split of one data set."""

    train: Split
    validation: Split
    test: Split
    num_classes: int


def load(config: ConfigDict, seed: int) -> Dataset:
    """The data set of the configuration group `dataset`, its validation part taken from the training data.

    Args:
        config: the group `dataset`.
        seed: decides which examples the validation part takes.

    Raises:
        ConfigError: the data set isn't there, isn't an image classification data set with images of one size, or does
            not fit `dataset.mean` and `dataset.std`.
    """
    train, test, num_classes = _load_digits() if config.name == "digits" else _load_tfds(config)
    channels = train.images.shape[-1]
    for key in ("mean", "std"):
        if len(config[key]) != channels:
            raise ConfigError(
                f"config.dataset.{key}: got {config[key]!r}; allowed: {channels} values, one for each channel of the "
                f"{config.name} images"
            )
    order = np.random.default_rng(seed).permutation(len(train.labels))
    validation_size = round(config.validation_fraction * len(order))
    held_out, kept = np.sort(order[:validation_size]), np.sort(order[validation_size:])
    return Dataset(
        Split(train.images[kept], train.labels[kept]),
        Split(train.images[held_out], train.labels[held_out]),
        test,
        num_classes,
    )


def _load_digits() -> tuple[Split, Split, int]:
    """scikit-learn's 1,797 digits of 8x8 pixels, a fixed fifth of them for testing."""
    from sklearn.datasets import load_digits  # takes a second, and only this data set needs it
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.round(digits.images[..., None] * (255 / 16)).astype(np.uint8)
    labels = digits.target.astype(np.int32)
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels)
    return Split(images[train], labels[train]), Split(images[test], labels[test]), 10


def _load_tfds(config: ConfigDict) -> tuple[Split, Split, int]:
    """Training and test split of a TFDS builder, from the cache where it holds this very data set."""
    builder = _builder(config)
    test_split = "test" if "test" in builder.info.splits else "validation"
    splits = []
    for name in ("train", test_split):
        if name not in builder.info.splits:
            raise ConfigError(
                f"config.dataset.name: {config.name} has the splits {', '.join(builder.info.splits)}; "
                "allowed: data sets with a train split and a test or validation split"
            )
        splits.append(_cached_split(builder, name, _cache_dir(config)))
    return *splits, builder.info.features["label"].num_classes


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
    except (tfds.core.DatasetNotFoundError, ValueError, AttributeError, OSError) as error:
        raise ConfigError(
            f"config.dataset.name: {config.name!r} is neither 'digits' nor a data set of TFDS or of {data_dir} "
            f"({_first_line(error)}); {ways_out}"
        ) from error
    if not builder.is_prepared():
        raise ConfigError(f"config.dataset.name: {config.name!r} is not prepared in {data_dir}; {ways_out}")
    features = builder.info.features
    shape = features["image"].shape if {"image", "label"} <= set(features) else None
    if shape is None or None in shape or not hasattr(features["label"], "num_classes"):
        raise ConfigError(
            f"config.dataset.name: {config.name!r} has the features {', '.join(features)} with image shape {shape}; "
            "allowed: data sets with a class 'label' and an 'image' of fixed size"
        )
    return builder


def _cache_dir(config: ConfigDict) -> Path:
    return Path(os.path.expanduser(config.cache_dir or "~/.cache/jaxdtp"))


def _cached_split(builder, split: str, cache_dir: Path) -> Split:
    """One split from its cache file; decoded, and the file written, where that is missing, broken or another one's."""
    # A data set prepared again has other files, sizes or dates, and so another identity.
    files = [Path(path) for path in builder.info.splits[split].filepaths]
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    identity = json.dumps([str(builder.data_path), split, stats])
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    path = cache_dir / f"{builder.info.full_name.replace('/', '-')}-{split}-{digest}.npz"
    cached = _read_cache(path, identity)
    if cached is None:
        cached = _decode(builder, split)
        _write_cache(path, identity, cached)
    return cached


def _read_cache(path: Path, identity: str) -> Split | None:
    """The split in a cache file, or None. The zip container's checksums find truncated and damaged files."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if str(file["identity"]) != identity:
                return None
            split = Split(file["images"], file["labels"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    well_formed = split.images.ndim == 4 and split.images.dtype == np.uint8 and len(split.images) == len(split.labels)
    return split if well_formed else None


def _write_cache(path: Path, identity: str, split: Split) -> None:
    """Write the whole file under another name, then rename it: nobody ever sees half of one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        with open(temporary, "wb") as file:
            np.savez(file, identity=identity, images=split.images, labels=split.labels)
        os.replace(temporary, path)
    except OSError as error:
        raise ConfigError(
            f"config.dataset.cache_dir: can't write {path} ({_first_line(error)}); allowed: a directory with room for "
            f"{split.images.nbytes / 1e6:.0f} MB"
        ) from error


def _decode(builder, split: str) -> Split:
    """All examples of a split, decoded from the record files (about 5,000 images a second)."""
    from tqdm import tqdm

    source = builder.as_data_source(split=split)
    images = np.empty((len(source), *builder.info.features["image"].shape), np.uint8)
    labels = np.empty(len(source), np.int32)
    description = f"decoding {builder.info.name} {split}"
    for index, example in enumerate(tqdm(source, desc=description, unit=" images", disable=None)):
        images[index], labels[index] = example["image"], example["label"]
    return Split(images, labels)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
