"""The cache of decoded images: written once, verified at each load, never half, whatever processes do at once."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import stand_in

from jaxdtp import data
from jaxdtp.data import cache
from jaxdtp.system.errors import ConfigError

SIZES = {"train": 20, "test": 10}


@pytest.fixture
def config(tmp_path):
    return stand_in.config("made_up", tmp_path)


@pytest.fixture
def builder(tmp_path, monkeypatch):
    builder = stand_in.builder(tmp_path, SIZES)
    monkeypatch.setattr(data.tfds, "open_builder", lambda config: builder)
    return builder


def directory(config, split="train"):
    (found,) = (path for path in Path(config.cache_dir).glob(f"made_up-*-{split}-*") if path.suffix != ".unfinished")
    return found


def test_splits_are_decoded_once(builder, config):
    first = data.load(config, seed=0)
    assert builder.decoded == ["train", "test"]
    second = data.load(config, seed=0)
    assert builder.decoded == ["train", "test"]
    jax.tree.map(np.testing.assert_array_equal, first, second)
    everything = np.arange(10)
    np.testing.assert_array_equal(first.test.images, stand_in.images(everything, (6, 5, 3)))
    np.testing.assert_array_equal(first.test.labels, stand_in.labels(everything, 7))
    assert len(first.classes) == 7


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-1 - len(content) // 3] ^= 4
    path.write_bytes(content)


def add_a_byte(path):
    path.write_bytes(path.read_bytes() + b"0")


def replace(path):
    path.write_bytes(b"hello")


def empty(path):
    path.write_bytes(b"")


def other_type(path):
    np.save(path, np.load(path).astype(np.int16))


def other_shape(path):
    np.save(path, np.load(path)[1:])


@pytest.mark.parametrize("file", ["images.npy", "labels.npy", "index.json"])
@pytest.mark.parametrize("damage", [truncate, flip_a_bit, add_a_byte, replace, empty, Path.unlink])
def test_damaged_cache_is_rebuilt(builder, config, capsys, file, damage):
    check_rebuilt(builder, config, capsys, lambda: damage(directory(config) / file))


@pytest.mark.parametrize("file", ["images.npy", "labels.npy"])
@pytest.mark.parametrize("damage", [other_type, other_shape])
def test_cache_with_another_array_is_rebuilt(builder, config, capsys, file, damage):
    check_rebuilt(builder, config, capsys, lambda: damage(directory(config) / file))


@pytest.mark.parametrize("nonsense", [None, [], 3, {"identity": None}])
def test_cache_with_an_index_of_something_else_is_rebuilt(builder, config, capsys, nonsense):
    def damage():
        (directory(config) / "index.json").write_text(json.dumps(nonsense))

    check_rebuilt(builder, config, capsys, damage)


def test_cache_of_another_split_is_rebuilt(builder, config, capsys):
    def damage():
        train = directory(config)
        shutil.rmtree(train)
        shutil.copytree(directory(config, "test"), train)

    check_rebuilt(builder, config, capsys, damage)


def test_much_decoding_is_announced(builder, config, capsys, monkeypatch):
    monkeypatch.setattr(cache, "MANY", 20)
    for lines in (1, 0):
        data.load(config, seed=0)
        assert capsys.readouterr().out.count(": decoding 20 images, once, into ") == lines


def check_rebuilt(builder, config, capsys, damage):
    """Damage to the training split's cache doesn't change what is loaded, is told in one line, and mended."""
    everything = np.arange(20)
    data.load(config, seed=0)
    damage()
    builder.decoded.clear()
    capsys.readouterr()
    for decoded, lines in ((["train"], 1), ([], 0)):
        dataset = data.load(config, seed=0)
        assert builder.decoded == decoded
        builder.decoded.clear()
        printed = capsys.readouterr().out.splitlines()
        assert len(printed) == lines
        assert all(f"{directory(config)} is damaged" in line for line in printed)
        np.testing.assert_array_equal(dataset.train.images, stand_in.images(everything, (6, 5, 3)))
        np.testing.assert_array_equal(dataset.train.labels, stand_in.labels(everything, 7))
    assert sorted(path.name for path in Path(config.cache_dir).iterdir()) == sorted(
        directory(config, split).name for split in SIZES
    )


def test_data_set_prepared_again_is_decoded_again(builder, config):
    data.load(config, seed=0)
    builder.info.splits["train"].filepaths[0].write_bytes(b"other records")
    data.load(config, seed=0)
    assert builder.decoded == ["train", "test", "train"]


def test_a_disk_without_room(builder, config):
    """The room is taken by a limit on the size of files, at which the system fails as at the end of a disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(
            ConfigError, match=r"^config.dataset.cache_dir: can't write .*; allowed: .* room for .* MB$"
        ):
            data.load(config, seed=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(Path(config.cache_dir).iterdir()) == []
    assert len(data.load(config, seed=0).test.rows) == 10


def test_a_cache_dir_that_cannot_be_written(builder, config, tmp_path):
    (tmp_path / "file").write_text("")
    config.cache_dir = str(tmp_path / "file" / "cache")
    with pytest.raises(ConfigError, match=r"^config.dataset.cache_dir: can't write .*; allowed: .* room for .* MB$"):
        data.load(config, seed=0)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_dir_that_is_read_only_serves_what_it_has(builder, config):
    good = data.load(config, seed=0)
    cache_dir = Path(config.cache_dir)
    for path in (*directory(config).iterdir(), *cache_dir.iterdir(), cache_dir):
        path.chmod(path.stat().st_mode & ~0o222)
    try:
        jax.tree.map(np.testing.assert_array_equal, data.load(config, seed=0), good)
        assert builder.decoded == ["train", "test"]
    finally:
        for path in (cache_dir, *cache_dir.iterdir()):
            path.chmod(0o755)


def test_two_that_decode_at_once_both_go_on(builder, config, monkeypatch):
    together = threading.Barrier(2, timeout=60)
    get = stand_in.Source.__getitem__

    def wait_and_get(source, index):
        if index == source.size - 1:
            together.wait()
        return get(source, index)

    monkeypatch.setattr(stand_in.Source, "__getitem__", wait_and_get)
    loaded = []
    threads = [threading.Thread(target=lambda: loaded.append(data.load(config, seed=0))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(builder.decoded) == ["test", "test", "train", "train"]
    assert len(loaded) == 2
    for dataset in loaded:
        np.testing.assert_array_equal(dataset.train.images, stand_in.images(np.arange(20), (6, 5, 3)))
    assert len(list(Path(config.cache_dir).iterdir())) == 2


def test_what_a_killed_process_leaves_disturbs_nobody_and_is_removed_later(builder, config, tmp_path):
    script = f"""
import time
from pathlib import Path
import stand_in
from jaxdtp import data

directory = Path({str(tmp_path)!r})
builder = stand_in.builder(directory, {SIZES!r})
data.tfds.open_builder = lambda config: builder
get = stand_in.Source.__getitem__
def stop(source, index):
    if index == 10:
        print("decoding", flush=True)
        time.sleep(1000)
    return get(source, index)
stand_in.Source.__getitem__ = stop
data.load(stand_in.config("made_up", directory), seed=0)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=stand_in.environment()
    )
    assert process.stdout.readline() == "decoding\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (left,) = Path(config.cache_dir).iterdir()
    good = data.load(config, seed=0)
    assert left.exists()  # could be of a process that is still at work
    assert len(good.train.rows) == 15

    for path in (*left.iterdir(), left):
        os.utime(path, (time.time() - 86400,) * 2)
    shutil.rmtree(directory(config))
    jax.tree.map(np.testing.assert_array_equal, data.load(config, seed=0), good)
    assert not left.exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_decoding_leaves_nothing(builder, config, monkeypatch, error):
    def stop(source, index):
        if index == 10:
            raise error("stop")
        return get(source, index)

    get = stand_in.Source.__getitem__
    monkeypatch.setattr(stand_in.Source, "__getitem__", stop)
    with pytest.raises(ConfigError if error is RuntimeError else error):
        data.load(config, seed=0)
    assert list(Path(config.cache_dir).iterdir()) == []


FULL_SIZE = {"train": 1_281_167, "validation": 50_000}  # of ImageNet

LOAD_FULL_SIZE = f"""
import json
from pathlib import Path
import numpy as np
import stand_in
from jaxdtp import data

directory, shape = Path.cwd(), (32, 32, 3)
builder = stand_in.builder(directory, {FULL_SIZE!r}, shape, 1000)
data.tfds.open_builder = lambda config: builder
config = stand_in.config("made_up", directory)

def batches(split):
    rng = np.random.default_rng(0)
    for _ in range(200):
        positions = rng.integers(0, len(split.rows), 256)
        batch = data.read(split, positions)
        np.testing.assert_array_equal(batch.images, stand_in.images(split.rows[positions], shape))
        np.testing.assert_array_equal(batch.labels, stand_in.labels(split.rows[positions], 1000))

_, decoding = stand_in.anonymous_bytes_added(lambda: data.load(config, seed=0))
dataset, loading = stand_in.anonymous_bytes_added(lambda: data.load(config, seed=0))
_, reading = stand_in.anonymous_bytes_added(lambda: (batches(dataset.train), batches(dataset.validation)))
print(json.dumps([decoding, loading, reading, len(dataset.train.rows), builder.decoded]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured as Linux tells it")
def test_full_size_imagenet_needs_next_to_no_memory(tmp_path):
    """3.9 GB of images on disk, decoded, loaded and read by a process that adds less than 0.2 GB to its own memory."""
    if shutil.disk_usage(tmp_path).free < 8e9:
        pytest.skip("needs 8 GB of disk")
    script = [sys.executable, "-c", LOAD_FULL_SIZE]
    try:
        result = subprocess.run(script, cwd=tmp_path, env=stand_in.environment(), capture_output=True, text=True)
    finally:
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    assert result.returncode == 0, result.stderr
    *added, training_examples, decoded = json.loads(result.stdout.splitlines()[-1])
    assert training_examples == 960_875
    assert decoded == ["train", "validation"]
    assert max(added) < 2e8
