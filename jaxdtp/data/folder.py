"""Pictures in folders, one for each class: DIR/CLASS/..., or DIR/train/CLASS/... beside DIR/test and DIR/validation."""

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from jaxdtp.data.images import as_array, is_grey, type_of
from jaxdtp.data.stored import Found, Stored, bad_example, common_size, first_line, parts_by_tfds
from jaxdtp.system.errors import ConfigError, shown
from jaxdtp.system.places import place, stamp

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
"""Names of splits, and what folders and arrays of them may be called."""

TURNED = range(5, 9)  # values of EXIF's Orientation for which width is height
ORIENTATION = 0x0112


def find(config: ConfigDict) -> Found:
    """The pictures below `dataset.data_dir`.

    All of them are in colour if one of them is, and have 16 bits, or floating point numbers, only if all have. A class
    is a folder's name; hidden files, and those whose names don't end like a picture's, are left out.

    Raises:
        ConfigError: there are none, they aren't in folders of at least two classes, one of them can't be read, or has
            floating point numbers beside others.
    """
    root = place(config.data_dir, "config.dataset.data_dir")
    allowed = "allowed: a directory with a folder of pictures for each class, or with such ones below train/ and test/"
    if not config.data_dir or not root.is_dir():
        raise ConfigError(f"config.dataset.data_dir: got {shown(config.data_dir)}, which is no directory; {allowed}")
    folders = {path.name.lower(): path for path in _folders(root)}
    by_split = {
        split: next((folders[name] for name in names if name in folders), None) for split, names in SPLITS.items()
    }
    if by_split["train"] is None:
        for path in by_split.values():
            if path is not None and _folders(path):
                raise ConfigError(
                    f"config.dataset.data_dir: {root} has {path.name}/ with folders, but no train/; {allowed}"
                )
        by_split = {"train": root}
    classes = tuple(path.name for path in _folders(by_split["train"]))
    if len(classes) < 2:
        names = ", ".join(classes) or "none"
        raise ConfigError(f"config.dataset.data_dir: {by_split['train']} has folders of classes: {names}; {allowed}")
    files = {split: _pictures(path, classes, split) for split, path in by_split.items() if path is not None}
    if not files["train"]:
        raise ConfigError(f"config.dataset.data_dir: {by_split['train']} has no pictures; {allowed}")

    stored = {split: _stored(root, split, of_split) for split, of_split in files.items() if of_split}
    channels = max(split.shape[2] for split in stored.values())
    dtype = _common_type({str(path): split.dtype for path, split in stored.items()}, "config.dataset.data_dir: split")
    stored = {
        name: split._replace(
            shape=(*split.shape[:2], channels),
            dtype=dtype,
            get=functools.partial(_get, files[name], channels, dtype),
            identity=[split.identity, channels],
        )
        for name, split in stored.items()
    }
    return Found(
        root.name or "folder", stored, classes, parts_by_tfds({name: [split.size] for name, split in stored.items()})
    )


def _folders(path: epath.Path) -> list[epath.Path]:
    return sorted(folder for folder in path.iterdir() if not folder.name.startswith(".") and folder.is_dir())


def _pictures(path: epath.Path, classes: tuple[str, ...], split: str) -> list[tuple[epath.Path, int]]:
    """The pictures of a split, each with its label."""
    found = []
    for folder in _folders(path):
        pictures = sorted(_below(folder))
        if pictures and folder.name not in classes:
            raise ConfigError(
                f"config.dataset.data_dir: {folder} is a class that training has no folder of; allowed: "
                f"{', '.join(classes)} in {split}"
            )
        found += [(picture, classes.index(folder.name)) for picture in pictures]
    return found


def _below(path: epath.Path) -> Iterator[epath.Path]:
    for inner in path.iterdir():
        if inner.name.startswith("."):
            continue
        if inner.suffix.lower() in _suffixes():
            yield inner
        elif inner.is_dir():
            yield from _below(inner)


@functools.cache
def _suffixes() -> frozenset[str]:
    from PIL import Image

    return frozenset(Image.registered_extensions())


def _stored(root: epath.Path, split: str, files: list[tuple[epath.Path, int]]) -> Stored:
    """A split with what its pictures' headers say: the shape and the type that they have in common."""
    identity = [(str(path.relative_to(root)), *stamp(path), label) for path, label in files]
    stored = Stored(
        size=len(files),
        get=lambda index: (_open(files[index][0]), files[index][1]),
        label=lambda index: files[index][1],
        where=lambda index: f"the picture {files[index][0]}",
        again="",
        shape=(None, None, 1),
        dtype=np.dtype(np.uint8),
        identity=[str(root), split, identity],
    )
    shapes, types = [], {}
    for index, (path, _) in enumerate(files):
        try:
            height, width, mode = _header(path)
        except Exception as error:  # of Pillow and its plugins
            found = f"can't be read ({first_line(error)})"
            raise bad_example(stored, index, found, "whole pictures that Pillow reads") from error
        shapes.append((height, width))
        types[str(path)] = type_of(mode)
        if not is_grey(mode):
            stored = stored._replace(shape=(None, None, 3))
    shape = (*common_size(shapes), stored.shape[2])
    return stored._replace(shape=shape, dtype=_common_type(types, "config.dataset.data_dir: picture"))


def _common_type(types: dict[str, np.dtype], what: str) -> np.dtype:
    """That of several, by name: the one that all have, or 8 bits."""
    floating = [name for name, dtype in types.items() if dtype == np.float32]
    if 0 < len(floating) < len(types):
        raise ConfigError(
            f"{what} {floating[0]} has floating point numbers, where others haven't; allowed: pictures that all have, "
            "or none"
        )
    return next(iter(types.values())) if len(set(types.values())) == 1 else np.dtype(np.uint8)


def _header(path: epath.Path) -> tuple[int, int, str]:
    """Height and width as it is to be seen, and mode."""
    from PIL import Image, ImageOps

    with path.open("rb") as file, Image.open(file) as picture:
        mode, (width, height) = picture.mode, picture.size
        if picture.getexif().get(ORIENTATION) in TURNED:
            # Of some formats Pillow has turned the size already.
            width, height = ImageOps.exif_transpose(picture).size
        return height, width, mode


def _open(path: epath.Path) -> Any:
    from PIL import Image

    with path.open("rb") as file, Image.open(file) as picture:
        picture.load()
        return picture


def _get(files: list[tuple[epath.Path, int]], channels: int, dtype: np.dtype, index: int) -> tuple[np.ndarray, int]:
    """A picture with so many channels, in this type, and its label."""
    path, label = files[index]
    image = as_array(_open(path))
    if image.dtype != dtype:
        image = np.round(image / 257).astype(dtype)
    return np.repeat(image, channels, axis=-1) if image.shape[-1] < channels else image, label
