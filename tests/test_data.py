"""Data sets: the digits, TFDS builders (stood in for by a small fake), and the cache of decoded images."""

import os
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdtp import data
from jaxdtp.config import ConfigError, default_config
from jaxdtp.data import Split
from jaxdtp.epoch import Preprocessing, augment, evaluate, normalise
from jaxdtp.networks import init, mlp


def fake_builder(tmp_path, splits=("train", "test"), shape=(6, 5, 3), seed=0):
    """What `data` uses of a TFDS builder, with record files on disk and a count of the decoding passes."""
    rng = np.random.default_rng(seed)
    sources = {
        name: [{"image": rng.integers(0, 256, shape, np.uint8), "label": int(rng.integers(7))} for _ in range(20)]
        for name in splits
    }
    infos = {}
    for name in splits:
        record = tmp_path / f"fake-{name}.array_record"
        record.write_bytes(os.urandom(100))
        infos[name] = SimpleNamespace(filepaths=[record])
    builder = SimpleNamespace(
        info=SimpleNamespace(
            name="fake",
            full_name="fake/1.0.0",
            splits=infos,
            features={"image": SimpleNamespace(shape=shape), "label": SimpleNamespace(num_classes=7)},
        ),
        data_path=tmp_path,
        decoded=[],
    )

    def as_data_source(split):
        builder.decoded.append(split)
        return sources[split]

    builder.as_data_source = as_data_source
    builder.sources = sources
    return builder


@pytest.fixture
def config(tmp_path):
    config = default_config().dataset
    config.name = "fake"
    config.cache_dir = str(tmp_path / "cache")
    config.mean = config.std = (0.5, 0.5, 0.5)
    config.validation_fraction = 0.25
    return config


@pytest.fixture
def builder(tmp_path, monkeypatch):
    builder = fake_builder(tmp_path)
    monkeypatch.setattr(data, "_builder", lambda config: builder)
    return builder


def test_tfds_split_is_decoded_once(builder, config):
    first = data.load(config, seed=0)
    assert builder.decoded == ["train", "test"]
    second = data.load(config, seed=0)
    assert builder.decoded == ["train", "test"]
    jax.tree.map(np.testing.assert_array_equal, first, second)
    np.testing.assert_array_equal(first.test.images, [example["image"] for example in builder.sources["test"]])
    np.testing.assert_array_equal(first.test.labels, [example["label"] for example in builder.sources["test"]])
    assert first.num_classes == 7


@pytest.mark.parametrize("damage", ["truncate", "flip a bit", "replace", "empty", "another data set"])
def test_broken_cache_is_rebuilt(builder, config, damage, tmp_path):
    good = data.load(config, seed=0)
    (path,) = (tmp_path / "cache").glob("*-train-*.npz")
    content = path.read_bytes()
    if damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flip a bit":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :])
    elif damage == "replace":
        path.write_bytes(b"hello")
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        np.savez(path.with_suffix(""), identity="other", images=np.zeros((20, 6, 5, 3), np.uint8), labels=np.zeros(20))
    builder.decoded.clear()
    jax.tree.map(np.testing.assert_array_equal, data.load(config, seed=0), good)
    assert builder.decoded == ["train"]
    builder.decoded.clear()
    data.load(config, seed=0)
    assert builder.decoded == []


def test_data_set_prepared_again_is_decoded_again(builder, config):
    data.load(config, seed=0)
    builder.info.splits["train"].filepaths[0].write_bytes(b"other records")
    data.load(config, seed=0)
    assert builder.decoded == ["train", "test", "train"]


def test_validation_part_is_seeded_and_disjoint(builder, config):
    splits = [data.load(config, seed) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(splits[0].validation.images, splits[1].validation.images)
    assert (splits[0].validation.images != splits[2].validation.images).any()
    for split in splits:
        assert len(split.validation.labels) == 5
        both = np.concatenate([split.train.images, split.validation.images])
        assert len(np.unique(both, axis=0)) == 20


def test_validation_split_stands_in_for_a_missing_test_split(tmp_path, monkeypatch, config):
    builder = fake_builder(tmp_path, splits=("train", "validation"))
    monkeypatch.setattr(data, "_builder", lambda config: builder)
    loaded = data.load(config, seed=0)
    np.testing.assert_array_equal(loaded.test.images, [e["image"] for e in builder.sources["validation"]])


def test_missing_split_is_named(tmp_path, monkeypatch, config):
    monkeypatch.setattr(data, "_builder", lambda config: fake_builder(tmp_path, splits=("train",)))
    with pytest.raises(ConfigError, match=r"fake has the splits train; allowed: .* test or validation"):
        data.load(config, seed=0)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "imagenet_resized/32x32"])
def test_unprepared_data_set_says_what_to_do(tmp_path, config, name):
    config.name, config.data_dir = name, str(tmp_path)
    with pytest.raises(ConfigError) as error:
        data.load(config, seed=0)
    for part in (name, str(tmp_path), "download_and_prepare", "--config.dataset.data_dir"):
        assert part in str(error.value)


def test_unknown_and_unsuitable_data_sets_are_refused(tmp_path, config):
    config.data_dir = str(tmp_path)
    config.name = "no_such_thing"
    with pytest.raises(ConfigError, match="'no_such_thing' is neither 'digits' nor a data set of TFDS"):
        data.load(config, seed=0)
    config.name = "digits"
    with pytest.raises(ConfigError, match=r"dataset.mean: got .* allowed: 1 values"):
        data.load(config, seed=0)


def test_digits():
    config = default_config().dataset
    digits = data.load(config, seed=3)
    assert digits.train.images.shape[1:] == (8, 8, 1)
    assert digits.train.images.dtype == np.uint8
    assert digits.train.images.max() == 255
    assert len(digits.train.labels) + len(digits.validation.labels) + len(digits.test.labels) == 1797
    # The test part doesn't depend on the seed.
    np.testing.assert_array_equal(digits.test.images, data.load(config, seed=4).test.images)


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
    split = Split(rng.integers(0, 256, (20, 3, 3, 1), np.uint8), rng.integers(0, 12, 20).astype(np.int32))
    network = mlp((3, 3, 1), 12, hidden=(5,))
    params = init(network, jax.random.key(0))
    preprocessing = Preprocessing((0.5,), (0.5,))
    ours = evaluate(network, preprocessing, batch_size, params, split)
    whole = evaluate(network, preprocessing, 20, params, split)
    assert set(ours) == {"loss", "top1", "top5"}
    for name in ours:
        np.testing.assert_allclose(ours[name], whole[name], rtol=1e-5)
