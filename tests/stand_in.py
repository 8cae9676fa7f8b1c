"""Made-up data sets: one of any size, whose images are computed as they are read, and real ones of TFDS on disk."""

import io
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from jaxdtp.configuration.config import default_config

PATTERNS = 256


def images(indices, shape):
    """The computed images [*indices.shape, *shape]: one of 256 patterns with the index as its first four bytes."""
    result = np.random.default_rng(0).integers(0, 256, (PATTERNS, *shape), np.uint8)[indices % PATTERNS]
    result.reshape(*indices.shape, -1)[..., :4] = indices.astype("<u4")[..., None].view(np.uint8)
    return result


def labels(indices, num_classes):
    return indices * 7919 % num_classes


class Source(Sequence):
    """The computed examples as a TFDS data source."""

    def __init__(self, size, shape, num_classes, ended=lambda: None):
        self.size, self.num_classes, self.ended = size, num_classes, ended
        self.patterns = images(np.arange(PATTERNS), shape)

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if index == self.size - 1:
            self.ended()
        image = self.patterns[index % PATTERNS].copy()
        image.reshape(-1)[:4] = np.frombuffer(index.to_bytes(4, "little"), np.uint8)
        return {"image": image, "label": labels(index, self.num_classes)}


def builder(directory: Path, sizes: dict[str, int], shape=(6, 5, 3), num_classes=7):
    """What `data` uses of a TFDS builder, with a file for the records of each split, and a list of the splits that
    were decoded to their end."""
    splits = {}
    for name, size in sizes.items():
        record = directory / f"made_up-{name}.array_record"
        # Another process may have the same data set.
        if not record.exists():
            record.write_bytes(os.urandom(100))
        splits[name] = SimpleNamespace(filepaths=[record], num_examples=size, shard_lengths=[size])
    features = {
        "image": SimpleNamespace(shape=shape, np_dtype=np.uint8),
        "label": SimpleNamespace(num_classes=num_classes, names=[str(label) for label in range(num_classes)]),
    }
    decoded = []

    def as_data_source(split, decoders):
        return Source(sizes[split], shape, num_classes, lambda: decoded.append(split))

    info = SimpleNamespace(name="made_up", full_name="made_up/1.0.0", splits=splits, features=features)
    return SimpleNamespace(info=info, data_path=directory, as_data_source=as_data_source, decoded=decoded)


def png(image):
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    return file.getvalue()


def write_tfds(data_dir: Path, name: str, splits: dict, shape, num_classes, shards=1) -> Path:
    """Write a data set that `tfds.builder(name, data_dir=data_dir)` opens, without TensorFlow.

    Args:
        data_dir: of TFDS.
        name: of the data set.
        splits: by name the examples, pairs of an encoded image and a label, which may be wrong ones.
        shape: of the images, as the features say.
        num_classes: as the features say.
        shards: files for each split.

    Returns:
        The directory with the files.
    """
    import tensorflow_datasets as tfds

    image, label = tfds.features.Image(shape=shape), tfds.features.ClassLabel(num_classes=num_classes)
    examples = {split: [{"image": image, "label": label} for image, label in pairs] for split, pairs in splits.items()}
    # Any label can be written like this, not just those of the classes.
    return write_features(data_dir, name, examples, {"image": image, "label": label}, {"label": np.int64}, shards)


def write_features(data_dir: Path, name: str, splits: dict, features: dict, written_as: dict, shards=1) -> Path:
    """As `write_tfds`, of any features.

    Args:
        data_dir, name, shards: as there.
        splits: by name the examples, dictionaries.
        features: of TFDS, by key.
        written_as: other features than these to write some with.
    """
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter

    directory = data_dir / name / "1.0.0"
    directory.mkdir(parents=True)
    serialize = tfds.features.FeaturesDict(features | written_as).serialize_example
    infos = []
    for split, examples in splits.items():
        template = tfds.core.ShardedFileTemplate(
            data_dir=directory, dataset_name=name, split=split, filetype_suffix="array_record"
        )
        records = [serialize(example) for example in examples]
        parts = [records[len(records) * i // shards : len(records) * (i + 1) // shards] for i in range(shards)]
        for index, part in enumerate(parts):
            path = template.sharded_filepath(shard_index=index, num_shards=shards)
            writer = ArrayRecordWriter(str(path), "group_size:1")
            for record in part:
                writer.write(record)
            writer.close()
        lengths, size = [len(part) for part in parts], sum(map(len, records))
        infos.append(tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=size, filename_template=template))
    tfds.folder_dataset.write_metadata(data_dir=directory, features=features, split_infos=infos, check_data=False)
    return directory


def config(name: str, directory: Path):
    """The configuration group `dataset` for a data set in `directory`, a quarter of it for validation."""
    group = default_config().dataset
    group.name = name
    group.data_dir = str(directory)
    group.cache_dir = str(directory / "cache")
    group.mean = group.std = (0.5, 0.5, 0.5)
    group.validation_fraction = 0.25
    return group


def environment() -> dict[str, str]:
    """For a subprocess that imports this module and what the tests import, and compiles as usual."""
    return {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}


def anonymous_bytes() -> int:
    """Memory of this process that is backed by no file."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:"))
    return 1024 * int(line.split()[1])


def anonymous_bytes_added(function: Callable[[], object]) -> tuple[object, int]:
    """What `function` returns, and by how much this process's anonymous memory has grown meanwhile, at most."""
    before = peak = anonymous_bytes()
    finished = threading.Event()

    def watch():
        nonlocal peak
        while not finished.is_set():
            peak = max(peak, anonymous_bytes())
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = function()
    finally:
        finished.set()
        watcher.join()
    return result, peak - before
