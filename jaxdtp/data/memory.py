"""Data of a user's own: arrays in memory or in a file of NumPy, and whatever has `__len__` and `__getitem__`."""

import io
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from jaxdtp.data.folder import SPLITS
from jaxdtp.data.images import as_array
from jaxdtp.data.stored import Found, Stored, check_dtype, common_size, first_line, parts_by_tfds
from jaxdtp.system.errors import ConfigError, shown
from jaxdtp.system.places import is_file, is_local, place

IMAGES = ("images", "image", "x", "X", "data", "img", "imgs", "pixel_values")
LABELS = ("labels", "label", "y", "Y", "targets", "target", "fine_label")
"""What arrays may be called, alone or behind or before a split's name: x_train, train_images."""

Data = Any
"""Images and labels, a pair of arrays; or what has `__len__` and `__getitem__`, whose items are pairs of an image and a
label, or have both by name; or one of these for each split, by its name."""


def of_file(config: ConfigDict) -> Found:
    """The arrays of the file, or of train.npz and test.npz in the directory, that `dataset.data_dir` names.

    Raises:
        ConfigError: there is no such file, it is damaged, or it has no images and labels.
    """
    path = place(config.data_dir, "config.dataset.data_dir")
    named = [("", path), *((split, path / f"{name}.npz") for split, names in SPLITS.items() for name in names)]
    files = {split: file for split, file in named if config.data_dir and is_file(file)}
    if not files:
        raise ConfigError(
            f"config.dataset.data_dir: got {shown(config.data_dir)}; allowed: a file NAME.npz of NumPy, or a directory "
            "with train.npz, and test.npz if there is one"
        )
    data: dict[str, Data] = {}
    for split, file in files.items():
        pairs = _pairs(config, str(file), _read(file))
        data |= {split: pairs["train"]} if split else pairs
    return of_data(config, data, str(path))


def of_data(config: ConfigDict, data: Data, name: str) -> Found:
    """Data in memory, or that a user's code reads.

    Raises:
        ConfigError: it isn't of the form that `Data` says.
    """
    by_split = data if isinstance(data, Mapping) else {"train": data}
    named = {alias: split for split, aliases in SPLITS.items() for alias in aliases}
    splits, classes = {}, None
    for key, of_split in by_split.items():
        what = f"{name}, split {key}"
        split = named.get(str(key), str(key))
        if isinstance(of_split, tuple) and len(of_split) == 2:
            splits[split] = _of_pair(*of_split, what)
        else:
            splits[split], names = _of_source(config, of_split, what)
            classes = classes or names
    filled = {split: stored for split, stored in splits.items() if stored.size}
    return Found(name, filled, classes, parts_by_tfds({split: [stored.size] for split, stored in filled.items()}))


def _read(file: epath.Path) -> dict[str, np.ndarray]:
    """The arrays of a file; objects, which would be unpickled, are refused."""
    try:
        source = os.fspath(file) if is_local(file) else io.BytesIO(file.read_bytes())
        with np.load(source, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except Exception as error:  # of NumPy, of zip files, of storage
        raise ConfigError(
            f"config.dataset.data_dir: {file} can't be read ({first_line(error)}); allowed: a file as numpy.savez "
            "writes it, with arrays of numbers or text"
        ) from error


def _pairs(config: ConfigDict, file: str, arrays: dict[str, np.ndarray]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images and labels by split."""
    of_images = (config.image_key,) if config.image_key else IMAGES
    of_labels = (config.label_key,) if config.label_key else LABELS

    def first(split: str, names: tuple[str, ...]) -> np.ndarray | None:
        spellings = [f"{alias}_{name}" for alias in SPLITS[split] for name in names]
        spellings += [f"{name}_{alias}" for alias in SPLITS[split] for name in names]
        spellings += list(names) if split == "train" else []
        return next((arrays[spelling] for spelling in spellings if spelling in arrays), None)

    found = {split: (first(split, of_images), first(split, of_labels)) for split in SPLITS}
    pairs = {
        # Without labels, which a test split may be.
        split: (images, np.full(len(images), -1) if labels is None else labels)
        for split, (images, labels) in found.items()
        if images is not None and (labels is not None or split != "train")
    }
    if "train" not in pairs:
        raise ConfigError(
            f"config.dataset.data_dir: {file} has the arrays {', '.join(arrays) or '(none)'}; allowed: "
            f"{' or '.join(of_images)} and {' or '.join(of_labels)}, with a split's name, too, such as x_train; or "
            "what dataset.image_key and dataset.label_key name"
        )
    return pairs


def _of_pair(images: Any, labels: Any, what: str) -> Stored:
    try:
        images, labels = (np.asarray(array) for array in (images, labels))
    except Exception as error:  # of another library's arrays
        raise ConfigError(
            f"config.dataset.name: {what}, can't be made arrays ({first_line(error)}); allowed: images of one size "
            "and as many labels; or what has __len__ and __getitem__, with items (image, label) of any size"
        ) from error
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4:
        raise ConfigError(
            f"config.dataset.name: {what}, has images of shape {images.shape}; allowed: [examples, height, width] or "
            "[examples, height, width, channels]"
        )
    _check_channels(images.shape[1:], what)
    if labels.dtype.kind == "S":
        labels = np.char.decode(labels, "utf-8", "replace")
    if labels.dtype.kind == "f" and (labels == np.round(labels)).all() and (np.abs(labels) < 2**31).all():
        labels = labels.astype(np.int64)
    if labels.ndim != 1 or labels.dtype.kind not in "iubU":
        raise ConfigError(
            f"config.dataset.name: {what}, has labels of type {labels.dtype} and shape {labels.shape}; allowed: whole "
            "numbers or text, [examples]"
        )
    if len(images) != len(labels):
        raise ConfigError(
            f"config.dataset.name: {what}, has {len(images)} images and {len(labels)} labels; allowed: as many"
        )
    dtype = check_dtype(images.dtype, what)
    names = labels.tolist()
    return Stored(
        len(images),
        lambda index: (images[index], names[index]),
        names.__getitem__,
        _place_in(what),
        "",
        images.shape[1:],
        dtype,
    )


def _of_source(config: ConfigDict, source: Any, what: str) -> tuple[Stored, tuple[str, ...] | None]:
    """What has `__len__` and `__getitem__`, and the names of its classes where it is of Hugging Face and has some."""
    if not (hasattr(source, "__len__") and hasattr(source, "__getitem__")) or isinstance(source, str | bytes | Mapping):
        raise ConfigError(
            f"config.dataset.name: {what}, is a {type(source).__name__}; allowed: (images, labels), or what has "
            "__len__ and __getitem__ with items (image, label), or {'image': ..., 'label': ...}"
        )
    if not len(source):
        return Stored(0, [].__getitem__, [].__getitem__, _place_in(what), "", (None, None, 1), np.dtype(np.uint8)), None
    try:
        keys = _keys(config, source[0])
        examples = [source[index] for index in range(len(source))]
        pairs = [(as_array(example[keys[0]]), example[keys[1]]) for example in examples]
    except Exception as error:  # of a user's code
        raise ConfigError(
            f"config.dataset.name: {what}, can't be read ({first_line(error)}); allowed: items (image, label), or "
            "{'image': ..., 'label': ...} with the keys that dataset.image_key and dataset.label_key name"
        ) from error
    kinds = sorted({image.shape[2:] for image, _ in pairs})
    if len(kinds) > 1 or len(kinds[0]) != 1:
        raise ConfigError(f"config.dataset.name: {what}, has images with channels {kinds}; allowed: one number of them")
    _check_channels(pairs[0][0].shape, what)
    feature = (getattr(source, "features", None) or {}).get(keys[1])
    names = getattr(feature, "names", None)
    labels = [label for _, label in pairs]
    shape = (*common_size([image.shape[:2] for image, _ in pairs]), *kinds[0])
    stored = Stored(len(pairs), pairs.__getitem__, labels.__getitem__, _place_in(what), "", shape, pairs[0][0].dtype)
    return stored, names and tuple(names)


def _check_channels(shape: tuple[int, ...], what: str) -> None:
    """Raise ConfigError where an image looks like one of PyTorch."""
    if shape[0] in (1, 3) and shape[2] > 4:
        raise ConfigError(
            f"config.dataset.name: {what}, has images of shape {shape}; allowed: channels last, [height, width, "
            "channels]"
        )


def _keys(config: ConfigDict, item: Any) -> tuple[Any, Any]:
    """Where an item has its image and its label."""
    if not isinstance(item, Mapping):
        return 0, 1
    images = [key for key, value in item.items() if hasattr(value, "convert") or np.ndim(value) >= 2]
    labels = [key for key, value in item.items() if np.ndim(value) == 0 and np.asarray(value).dtype.kind in "iubU"]

    def only(wanted: str, usual: str, fitting: list) -> Any:
        if wanted or usual in fitting:
            return wanted or usual
        if len(fitting) != 1:
            raise ValueError(f"items have {', '.join(map(str, item))}, of which none is '{usual}'")
        return fitting[0]

    return only(config.image_key, "image", images), only(config.label_key, "label", labels)


def _place_in(what: str) -> Any:
    return lambda index: f"example {index} of {what},"
