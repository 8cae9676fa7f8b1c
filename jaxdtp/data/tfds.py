"""Data sets of TensorFlow Datasets, read through `as_data_source`, which needs no TensorFlow."""

import functools
import io
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from jaxdtp.data.stored import Found, Stored, check_dtype, first_line, parts_by_tfds
from jaxdtp.system.errors import ConfigError
from jaxdtp.system.places import is_local, place, stamp


def find(config: ConfigDict) -> Found:
    """The prepared data set of the configuration group `dataset`.

    Raises:
        ConfigError: it isn't there, is damaged, or has no images with labels.
    """
    builder = open_builder(config)
    info = builder.info
    image_key = choose("image_key", config.image_key, info, _is_image)
    label_key = choose("label_key", config.label_key, info, _is_class, or_else=_is_whole)
    filled = {name: split for name, split in info.splits.items() if split.num_examples}
    # Copies live as long as what reads them.
    source = functools.cache(functools.partial(_source, builder, image_key, []))
    splits = {name: _stored(builder, name, image_key, label_key, source) for name in filled}
    lengths = {name: list(split.shard_lengths) for name, split in filled.items()}
    names = getattr(info.features[label_key], "names", None)
    return Found(info.full_name, splits, names and tuple(names), parts_by_tfds(lengths))


def open_builder(config: ConfigDict) -> Any:
    """The builder of a prepared data set."""
    import tensorflow_datasets as tfds  # takes seconds, and other kinds do without

    data_dir = config.data_dir and os.fspath(place(config.data_dir, "config.dataset.data_dir"))
    data_dir = data_dir or tfds.core.constants.DATA_DIR
    ways_out = (
        f"prepare it where there is a network with tfds.builder({config.name!r}, "
        "file_format='array_record').download_and_prepare(), or name the TFDS directory that holds it with "
        "--config.dataset.data_dir"
    )
    try:
        builder = tfds.builder(config.name, data_dir=data_dir, file_format="array_record")
        prepared, _ = builder.is_prepared(), builder.info.features
    except Exception as error:  # a damaged data set makes TFDS raise nearly anything
        unknown = isinstance(error, tfds.core.DatasetNotFoundError)
        what = "is neither 'digits', 'folder', 'npz' nor a data set of TFDS" if unknown else "can't be opened by TFDS"
        raise ConfigError(
            f"config.dataset.name: {config.name!r} {what} in {data_dir} ({first_line(error)}); allowed: names that "
            "TFDS knows, or that the directory holds with dataset_info.json and features.json as TFDS wrote them; "
            f"{ways_out}; or FILE.py:NAME of a function that gives data"
        ) from error
    if not prepared:
        raise ConfigError(f"config.dataset.name: {config.name!r} is not prepared in {data_dir}; {ways_out}")
    return builder


def choose(
    key: str,
    wanted: str,
    info: Any,
    fits: Callable[[Any], bool],
    or_else: Callable[[Any], bool] = lambda feature: False,
) -> str:
    """The feature that a key names; '': the one with the usual name, or the only one that fits."""
    features, usual = dict(sorted(info.features.items())), key.removesuffix("_key")
    candidates = [name for name in features if fits(features[name])]
    candidates = candidates or [name for name in features if or_else(features[name])]
    allowed = [name for name in features if fits(features[name]) or or_else(features[name])]
    if wanted in allowed:
        return wanted
    if not wanted and (usual in candidates or len(candidates) == 1):
        return usual if usual in candidates else candidates[0]
    raise ConfigError(
        f"config.dataset.{key}: got {wanted!r} for {info.full_name} with the features "
        f"{', '.join(f'{name} ({_described(features[name])})' for name in features)}; allowed: "
        f"{' or '.join(allowed) or f'data sets with a feature that can be the {usual}'}"
    )


def _described(feature: Any) -> str:
    return f"{type(feature).__name__} {getattr(feature, 'np_dtype', '')} {getattr(feature, 'shape', '')}".strip()


def _is_image(feature: Any) -> bool:
    shape, dtype = getattr(feature, "shape", None), getattr(feature, "np_dtype", None)
    return isinstance(shape, tuple) and len(shape) in (2, 3) and dtype is not None and np.dtype(dtype).kind in "uifb"


def _is_class(feature: Any) -> bool:
    return hasattr(feature, "num_classes") and not _is_image(feature)


def _is_whole(feature: Any) -> bool:
    dtype = getattr(feature, "np_dtype", None)
    return getattr(feature, "shape", None) == () and dtype is not None and np.dtype(dtype).kind in "iub"


def _stored(builder: Any, name: str, image_key: str, label_key: str, source: Callable[[str, bool], Any]) -> Stored:
    info, feature = builder.info.splits[name], builder.info.features[image_key]
    try:
        # A data set prepared again has other files, sizes or dates, and so another identity.
        stats = [(path.name, *stamp(path)) for path in map(epath.Path, info.filepaths)]
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"config.dataset.name: the record files of the {name} split of {builder.info.full_name} can't be read "
            f"({first_line(error)}); allowed: files as TFDS wrote them; {_prepare_again(builder)}"
        ) from error

    def get(index: int) -> tuple[Any, Any]:
        example = source(name, _is_undecoded(feature))[index]
        image = example[image_key]
        if isinstance(image, bytes):
            from PIL import Image

            image = Image.open(io.BytesIO(image))
        return image, example[label_key]

    def label(index: int) -> Any:
        return source(name, True)[index][label_key]

    def where(index: int) -> str:
        file = info.filepaths[np.searchsorted(np.cumsum(info.shard_lengths), index, side="right")]
        return f"example {index} of the {name} split of {builder.info.full_name}, in {file},"

    shape = (*feature.shape, 1) if len(feature.shape) == 2 else tuple(feature.shape)
    # A colour image is what is most likely.
    shape = (*shape[:2], shape[2] or 3)
    dtype = check_dtype(feature.np_dtype, f"{builder.info.full_name}, feature {image_key},")
    identity = [str(builder.data_path), name, stats, image_key, label_key]
    return Stored(info.num_examples, get, label, where, _prepare_again(builder), shape, dtype, identity)


def _source(builder: Any, image_key: str, copies: list, split: str, undecoded: bool) -> Any:
    """Random access to a split's records, which are copied here first where they are on object storage.

    Args:
        builder: of the data set.
        image_key: of its images.
        copies: holds the copies.
        split: its name.
        undecoded: whether images are left as they are written.
    """
    import tensorflow_datasets as tfds

    decoders = {image_key: tfds.decode.SkipDecoding()} if undecoded else None
    if is_local(builder.data_path):
        return builder.as_data_source(split=split, decoders=decoders)
    copies.append(tempfile.TemporaryDirectory(prefix="jaxdtp-"))
    records = {path.name for path in map(epath.Path, builder.info.splits[split].filepaths)}
    for path in builder.data_path.iterdir():
        if path.name in records or path.suffix in (".json", ".txt"):
            (Path(copies[-1].name) / path.name).write_bytes(path.read_bytes())
    return tfds.builder_from_directory(copies[-1].name).as_data_source(split=split, decoders=decoders)


def _is_undecoded(feature: Any) -> bool:
    """Whether images are decoded here: grey ones of 16 bits, for which TFDS wants OpenCV."""
    deep = np.dtype(feature.np_dtype) == np.uint16 and feature.shape[2:] == (1,)
    return deep and hasattr(feature, "encoding_format")


def _prepare_again(builder: Any) -> str:
    return f"delete {os.fspath(builder.data_path)} and prepare the data set again"
