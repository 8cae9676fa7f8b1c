"""Data sets: the digits, and data sets of TFDS, whole and damaged."""

import contextlib
import functools
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stand_in
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxdtp import data
from jaxdtp.configuration.config import default_config
from jaxdtp.data import Examples
from jaxdtp.models.networks import init, mlp
from jaxdtp.running.epoch import Preprocessing, augment, evaluate, normalise
from jaxdtp.system.errors import ConfigError

SHAPE, CLASSES = (6, 5, 3), 7


def made_up(size, seed):
    rng = np.random.default_rng(seed)
    return [(rng.integers(0, 256, SHAPE, np.uint8), int(rng.integers(CLASSES))) for _ in range(size)]


TRAIN, TEST = made_up(20, seed=0), made_up(10, seed=1)


def encoded(examples):
    return [(stand_in.png(image), label) for image, label in examples]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A directory of TFDS with the data set 'tiny', in two files for each split."""
    data_dir = tmp_path_factory.mktemp("tfds")
    stand_in.write_tfds(data_dir, "tiny", {"train": encoded(TRAIN), "test": encoded(TEST)}, SHAPE, CLASSES, shards=2)
    return data_dir


@pytest.fixture
def config(prepared, tmp_path):
    """Of a copy of 'tiny', which may be damaged."""
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    return stand_in.config("tiny", tmp_path)


@pytest.fixture
def files(config, tmp_path):
    return tmp_path / "tiny" / "1.0.0"


def loaded_with(tmp_path, train=TRAIN, test=TEST, splits=("train", "test")):
    """The data set 'other' of these examples, loaded with seed 0."""
    examples = dict(zip(splits, (train, test), strict=False))
    stand_in.write_tfds(tmp_path / "others", "other", examples, SHAPE, CLASSES)
    return data.load(stand_in.config("other", tmp_path / "others"), seed=0)


def everything(split):
    return data.read(split, np.arange(len(split.rows)))


def test_examples_are_those_that_were_prepared(config):
    dataset = data.load(config, seed=0)
    assert len(dataset.classes) == CLASSES
    test = everything(dataset.test)
    np.testing.assert_array_equal(test.images, [image for image, _ in TEST])
    np.testing.assert_array_equal(test.labels, [label for _, label in TEST])
    # The validation part and the rest keep the order of the whole.
    for split, size in ((dataset.train, 15), (dataset.validation, 5)):
        assert len(split.rows) == size
        np.testing.assert_array_equal(np.sort(split.rows), split.rows)
        examples = everything(split)
        np.testing.assert_array_equal(examples.images, [TRAIN[row][0] for row in split.rows])
        np.testing.assert_array_equal(examples.labels, [TRAIN[row][1] for row in split.rows])


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(positions=st.lists(st.integers(0, 14), max_size=40))
def test_examples_are_read_by_their_positions(prepared, positions):
    train = data.load(stand_in.config("tiny", prepared), seed=0).train
    examples = data.read(train, np.array(positions, int))
    assert (examples.images.dtype, examples.labels.dtype) == (np.uint8, np.int32)
    assert examples.images.flags.c_contiguous
    assert examples.images.flags.writeable  # a copy
    assert examples.images.shape == (len(positions), *SHAPE)
    for position, image, label in zip(positions, *examples, strict=True):
        np.testing.assert_array_equal(image, TRAIN[train.rows[position]][0])
        assert label == TRAIN[train.rows[position]][1]


def test_batches_of_batches_are_read_at_once(config):
    train = data.load(config, seed=0).train
    positions = np.array([[3, 1, 4], [1, 5, 9]])
    examples = data.read(train, positions)
    for row, images, labels in zip(positions, *examples, strict=True):
        np.testing.assert_array_equal(images, data.read(train, row).images)
        np.testing.assert_array_equal(labels, data.read(train, row).labels)


def test_validation_part_is_seeded_and_disjoint(config):
    datasets = [data.load(config, seed) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(datasets[0].validation.rows, datasets[1].validation.rows)
    assert (datasets[0].validation.rows != datasets[2].validation.rows).any()
    for dataset in datasets:
        assert len(dataset.validation.rows) == 5
        assert sorted([*dataset.train.rows, *dataset.validation.rows]) == list(range(20))


def test_validation_part_is_the_one_of_earlier_versions(config):
    """Results of earlier runs stand only as long as a seed holds out the same examples."""
    np.testing.assert_array_equal(data.load(config, seed=0).validation.rows, [2, 4, 6, 13, 19])


def test_validation_split_stands_in_for_a_missing_test_split(tmp_path):
    dataset = loaded_with(tmp_path, encoded(TRAIN), encoded(TEST), splits=("train", "validation"))
    np.testing.assert_array_equal(everything(dataset.test).images, [image for image, _ in TEST])


@pytest.mark.parametrize("test", [None, []])
def test_without_a_test_split_a_fixed_part_of_training_is_one(tmp_path, test, capsys):
    splits = ("train",) if test is None else ("train", "test")
    dataset = loaded_with(tmp_path, encoded(TRAIN), test, splits)
    assert "a fixed part (1/5) of the training data is for testing" in capsys.readouterr().out
    assert [len(split.rows) for split in dataset[:3]] == [12, 4, 4]
    rows = [list(split.rows) for split in dataset[:3]]
    assert sorted([*rows[0], *rows[1], *rows[2]]) == list(range(20))
    other_seed = data.load(stand_in.config("other", tmp_path / "others"), seed=1)
    np.testing.assert_array_equal(other_seed.test.rows, dataset.test.rows)
    assert list(other_seed.validation.rows) != rows[1]


def test_a_missing_train_split_is_told(tmp_path):
    with pytest.raises(ConfigError, match=r"config.dataset.train_split: got 'train' .* one of test, or parts"):
        loaded_with(tmp_path, encoded(TRAIN), splits=("test",))


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "imagenet_resized/32x32"])
def test_unprepared_data_set_says_what_to_do(tmp_path, name):
    with pytest.raises(ConfigError) as error:
        data.load(stand_in.config(name, tmp_path), seed=0)
    for part in (name, str(tmp_path), "download_and_prepare", "--config.dataset.data_dir"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_such_thing", "'no_such_thing' is neither 'digits', 'folder', 'npz' nor a data set of TFDS"),
        ("No-name", "'No-name' can't be opened by TFDS"),
        ("imagenet_resized/31x31", "'imagenet_resized/31x31' can't be opened by TFDS"),
        ("mnist:9.9.9", "'mnist:9.9.9' can't be opened by TFDS"),
    ],
)
def test_unknown_data_sets_are_refused(tmp_path, name, words):
    with pytest.raises(ConfigError) as error:
        data.load(stand_in.config(name, tmp_path), seed=0)
    assert words in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_mean_of_another_number_of_channels_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"dataset.mean: got .* allowed: 1 values"):
        data.load(stand_in.config("digits", tmp_path), seed=0)


def refusal(load, *words):
    """Loading ends in one line that holds these words."""
    with pytest.raises(ConfigError) as error:
        load()
    message = str(error.value)
    assert len(message.splitlines()) == 1
    for word in ("config.dataset.name: ", "allowed: ", *words):
        assert word in message


OTHER_SHAPE = stand_in.png(np.zeros((5, 6, 3), np.uint8))
TRANSPARENT = stand_in.png(np.zeros((6, 5, 4), np.uint8))
BAD_EXAMPLES = {
    "label above": ((encoded(TRAIN)[0][0], CLASSES), "has label 7; allowed: labels 0 to 6"),
    "label below": ((encoded(TRAIN)[0][0], -1), "has label -1; allowed: labels 0 to 6"),
    "label beyond 32 bits": ((encoded(TRAIN)[0][0], 2**32), "has label 4294967296; allowed: labels 0 to 6"),
    "turned": ((OTHER_SHAPE, 0), "is uint8 (5, 6, 3); allowed: uint8 (6, 5, 3)"),
    "transparent": ((TRANSPARENT, 0), "is uint8 (6, 5, 4); allowed: uint8 (6, 5, 3)"),
    "no image": ((b"hello", 0), "can't be decoded ("),
    "half an image": ((encoded(TRAIN)[0][0][:100], 0), "can't be decoded ("),
}


@pytest.mark.parametrize("bad", BAD_EXAMPLES)
@pytest.mark.parametrize("split", ["train", "test"])
def test_bad_examples_are_named(tmp_path, bad, split):
    example, words = BAD_EXAMPLES[bad]
    examples = {"train": encoded(TRAIN), "test": encoded(TEST)}
    examples[split][7] = example
    where = (
        f"example 7 of the {split} split of other/1.0.0, in {tmp_path}/others/other/1.0.0/other-{split}.array_record"
    )
    refusal(lambda: loaded_with(tmp_path, **examples), where, words, "prepare the data set again")


def test_labels_are_checked_whenever_they_are_loaded(config, files):
    data.load(config, seed=0)
    features = files / "features.json"
    features.write_text(features.read_text().replace('"7"', '"3"'))
    first = next(index for index, (_, label) in enumerate(TRAIN) if label > 2)
    refusal(lambda: data.load(config, seed=0), f"example {first} of the train split", "allowed: labels 0 to 2")


def record_file(files, shard):
    return files / f"tiny-train.array_record-0000{shard}-of-00002"


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", bytes(2**17), lambda old: old[:-1], lambda old: old[:2**16], lambda old: old[: len(old) // 2 + 99],
     lambda old: old[:64] + os.urandom(500) + old[564:]],
    ids=["empty", "short", "zeros", "without the last byte", "first 64 KiB", "half", "garbage in it"],
)  # fmt: skip
@pytest.mark.parametrize("shard", [0, 1])
def test_damaged_record_files_are_named(config, files, content, shard):
    path = record_file(files, shard)
    path.write_bytes(content(path.read_bytes()) if callable(content) else content)
    where = f"example {10 * shard} of the train split of tiny/1.0.0, in {path}, can't be decoded ("
    refusal(lambda: data.load(config, seed=0), where, f"delete {files} and prepare the data set again")


def test_missing_record_files_are_named(config, files):
    record_file(files, 1).unlink()
    refusal(lambda: data.load(config, seed=0), "the train split of tiny/1.0.0", str(record_file(files, 1)))


def test_fewer_records_than_announced_are_noticed(config, files):
    info = files / "dataset_info.json"
    content = json.loads(info.read_text())
    content["splits"][0]["shardLengths"] = ["10", "12"]
    info.write_text(json.dumps(content))
    refusal(lambda: data.load(config, seed=0), "example 20 of the train split", "can't be decoded (")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_never_changes_the_data(prepared, tmp_path_factory, place, bit):
    """Where a bit of a record file is flipped, loading fails, or gives what it would have given."""
    data_dir = tmp_path_factory.mktemp("flipped")
    shutil.copytree(prepared / "tiny", data_dir / "tiny")
    path = record_file(data_dir / "tiny" / "1.0.0", 0)
    content = bytearray(path.read_bytes())
    used = np.flatnonzero(content)
    content[used[int(place * len(used))]] ^= 1 << bit
    path.write_bytes(content)
    with contextlib.suppress(ConfigError):
        train = data.load(stand_in.config("tiny", data_dir), seed=0).train
        np.testing.assert_array_equal(train.images, [image for image, _ in TRAIN])
        np.testing.assert_array_equal(train.labels, [label for _, label in TRAIN])


@pytest.mark.parametrize("content", ["", "hello", "{}", "[]", "{", None], ids=repr)
@pytest.mark.parametrize("file", ["dataset_info.json", "features.json"])
def test_damaged_metadata_is_refused(config, files, file, content):
    if content is None:
        (files / file).unlink()
    else:
        (files / file).write_text(content)
    refusal(lambda: data.load(config, seed=0), "'tiny'", str(config.data_dir), "features.json", "download_and_prepare")


def test_digits():
    config = default_config().dataset
    digits = data.load(config, seed=3)
    assert digits.train.images.shape[1:] == (8, 8, 1)
    assert digits.train.images.dtype == np.uint8
    assert digits.train.images.max() == 255
    assert len(digits.train.rows) + len(digits.validation.rows) + len(digits.test.rows) == 1797
    # The test part doesn't depend on the seed.
    np.testing.assert_array_equal(everything(digits.test).images, everything(data.load(config, seed=4).test).images)


def test_augmentation_crops_and_flips():
    """Every augmented image is a crop of the edge-padded image, mirrored or not; all crops and both sides occur."""
    image = np.random.default_rng(0).integers(0, 256, (5, 4, 2), np.uint8)
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
    crops = [padded[i : i + 5, j : j + 4] for i in range(3) for j in range(3)]
    allowed = {side.tobytes() for crop in crops for side in (crop, crop[:, ::-1])}
    batch = jnp.array(np.repeat(image[None], 500, axis=0))
    preprocessing = Preprocessing((0.5,), (0.5,), flip=True, crop_padding=1)
    augmented = np.asarray(augment(preprocessing, batch, jax.random.key(0)))
    # Each of 18 outcomes is missed by 500 images with probability (17/18)^500 < 1e-12.
    assert {one.tobytes() for one in augmented} == allowed
    unchanged = augment(Preprocessing((0.5,), (0.5,)), batch, jax.random.key(0))
    np.testing.assert_array_equal(unchanged, batch)


def test_normalisation():
    images = jnp.array([[[[0, 255]]]], jnp.uint8)
    np.testing.assert_allclose(normalise(Preprocessing((0.5, 0.2), (0.5, 0.4)), images)[0, 0, 0], [-1, 2], rtol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 7, 20, 500])
def test_evaluation_counts_every_example_once(batch_size):
    rng = np.random.default_rng(0)
    split = Examples(rng.integers(0, 256, (20, 3, 3, 1), np.uint8), rng.integers(0, 12, 20).astype(np.int32))
    network = mlp((3, 3, 1), 12, hidden=(5,))
    params, state = init(network, jax.random.key(0))
    preprocessing = Preprocessing((0.5,), (0.5,))
    order = np.arange(20)

    def sums(batch_size, order, count):
        program = jax.jit(functools.partial(evaluate, network, preprocessing, batch_size, None))
        return program(params, state, split, order, count)

    ours, whole = sums(batch_size, order, 20), sums(20, order, 20)
    assert set(ours) == {"loss", "top1", "top5"}
    for name in ours:
        np.testing.assert_allclose(ours[name], whole[name], rtol=1e-5)
    some = [sums(batch_size, order[::-1], count) for count in (5, 20)]
    rest = sums(batch_size, order[:15], 15)
    for name in ours:
        np.testing.assert_allclose(some[0][name] + rest[name], some[1][name], rtol=1e-5)
