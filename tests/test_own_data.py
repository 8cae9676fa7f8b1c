"""A user's own data: folders of pictures, files of NumPy, arrays and sources in memory, and TFDS with odd features."""

import json
from pathlib import Path

import numpy as np
import pytest
import stand_in
from commands import run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import jaxdtp
from jaxdtp import data
from jaxdtp.configuration.config import default_config, resolve
from jaxdtp.data import read
from jaxdtp.data.images import as_array, resized
from jaxdtp.system.errors import ConfigError

RNG = np.random.default_rng(0)
IMAGES, LABELS = RNG.integers(0, 256, (40, 6, 5, 3), np.uint8), np.arange(40) % 3


def group(name, data_dir, **keys):
    """The group `dataset` of a configuration, its cache beside the data."""
    config = default_config()
    values = {"name": name, "data_dir": str(data_dir), "cache_dir": str(Path(data_dir).parent / "cache")} | keys
    config.update_from_flattened_dict({f"dataset.{key}": value for key, value in values.items()})
    return resolve(config).dataset


def everything(split):
    return read(split, np.arange(len(split.rows)))


def refusal(load, *words):
    with pytest.raises(ConfigError) as error:
        load()
    message = str(error.value)
    assert len(message.splitlines()) == 1
    for word in ("config.dataset.", "allowed: ", *words):
        assert word in message, message


def picture(mode, size, seed=0):
    """A picture of random colours, none of which two are alike."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    if mode.startswith("I;16"):
        return Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    return Image.fromarray(pixels).convert(mode)


@pytest.fixture
def folder(tmp_path):
    """Ten photographs of two classes and different sizes, without splits."""
    for index in range(10):
        path = tmp_path / "photos" / ("cat", "dog")[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture("RGB", (20 + index, 30 - index), index).save(path)
    return tmp_path / "photos"


def test_a_folder_of_photographs(folder, capsys):
    (folder / "cat" / "notes.txt").write_text("no picture")
    (folder / "cat" / ".hidden.png").write_text("no picture")
    (folder / ".git").mkdir()
    dataset = data.load(group("folder", folder), seed=0)
    told = capsys.readouterr().out
    assert dataset.classes == ("cat", "dog")
    assert dataset.train.images.shape[1:] == (32, 32, 3)
    assert dataset.train.images.dtype == np.uint8
    assert told.count("images of different sizes are resized to 32x32 (config.dataset.size)") == 1
    assert told.count("a fixed part (1/5) of the training data is for testing") == 1
    assert [len(split.rows) for split in dataset[:3]] == [7, 1, 2]
    whole = data.load(group("folder", folder, train_split="train", test_split="train", size=(8, 6)), seed=0).test
    assert list(whole.labels) == [0] * 5 + [1] * 5
    expected = resized(np.asarray(Image.open(folder / "dog" / "3.png")), (8, 6))
    np.testing.assert_array_equal(whole.images[6], expected)


def test_folders_with_splits(folder):
    for split, source in (("train", "cat"), ("val", "dog"), ("test", "cat")):
        for name in ("cat", "dog"):
            target = folder / split / name / "deeper" / "one.PNG"
            target.parent.mkdir(parents=True)
            picture("L", (9, 7), len(source)).save(target)
    for old in ("cat", "dog"):
        (folder / old).rename(folder.parent / old)
    dataset = data.load(group("folder", folder, validation_split="validation"), seed=0)
    assert [len(split.rows) for split in dataset[:3]] == [2, 2, 2]
    assert dataset.train.images.shape == (2, 7, 9, 1)
    (folder / "test" / "horse").mkdir()
    data.load(group("folder", folder), seed=0)
    picture("L", (9, 7)).save(folder / "test" / "horse" / "a.png")
    refusal(lambda: data.load(group("folder", folder), seed=0), "horse is a class that training has no folder of")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_pictures_of_every_mode(tmp_path, mode):
    suffix = {"CMYK": "tif"}.get(mode, "png")
    for name in ("a", "b"):
        (tmp_path / "p" / name).mkdir(parents=True)
        for index in range(2):
            picture(mode, (5, 4), index).save(tmp_path / "p" / name / f"{index}.{suffix}")
    train = data.load(group("folder", tmp_path / "p", test_split="train", validation_fraction=0.0), seed=0).train
    grey = mode in ("1", "L", "LA", "I;16")
    assert train.images.shape == (4, 4, 5, 1 if grey else 3)
    assert train.images.dtype == (np.uint16 if mode == "I;16" else np.uint8)
    pixels = np.asarray(picture(mode, (5, 4), 1).convert("I" if mode == "I;16" else "L" if grey else "RGB"))
    np.testing.assert_array_equal(train.images[1], pixels.reshape(4, 5, -1))


def test_one_picture_in_colour_makes_all_colourful_and_one_of_8_bits_all_of_8(tmp_path):
    for index, (name, mode) in enumerate((("a", "I;16"), ("a", "L"), ("b", "RGB"))):
        (tmp_path / "p" / name).mkdir(parents=True, exist_ok=True)
        picture(mode, (5, 4), 7).save(tmp_path / "p" / name / f"{index}.png")
    images = data.load(group("folder", tmp_path / "p", test_split="train"), seed=0).test.images
    assert (images.shape, images.dtype) == ((3, 4, 5, 3), np.uint8)
    np.testing.assert_array_equal(images[0], np.repeat(np.asarray(picture("RGB", (5, 4), 7))[..., :1], 3, axis=-1))


@pytest.mark.parametrize("suffix", ["png", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_as_their_camera_says(tmp_path, orientation, suffix):
    seen = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    # How the camera stores it: undone by what EXIF's orientations 1 to 8 ask for.
    as_stored = {
        1: seen,
        2: seen[:, ::-1],
        3: seen[::-1, ::-1],
        4: seen[::-1],
        5: seen.T,
        6: np.rot90(seen),
        7: seen[::-1, ::-1].T,
        8: np.rot90(seen, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("a", "b"):
        (tmp_path / "p" / name).mkdir(parents=True)
        Image.fromarray(np.ascontiguousarray(as_stored)).save(tmp_path / "p" / name / f"1.{suffix}", exif=exif)
    images = data.load(group("folder", tmp_path / "p", test_split="train"), seed=0).test.images
    np.testing.assert_array_equal(images[0, ..., 0], seen)


def test_pictures_of_floating_point_numbers_stay_as_they_are(tmp_path):
    pixels = np.linspace(-0.5, 1.5, 20, dtype=np.float32).reshape(4, 5)
    for name in ("a", "b"):
        (tmp_path / "p" / name).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "p" / name / "1.tiff")
    config = group("folder", tmp_path / "p", test_split="train")
    images = data.load(config, seed=0).test.images
    np.testing.assert_array_equal(images[1, ..., 0], pixels)
    picture("L", (5, 4)).save(tmp_path / "p" / "b" / "2.tiff")
    refusal(lambda: data.load(config, seed=0), "picture ", "1.tiff has floating point numbers, where others haven't")


@pytest.mark.parametrize("value", [-1, 70000])
def test_pictures_of_more_than_16_bits_are_told(tmp_path, value):
    for name in ("a", "b"):
        (tmp_path / "p" / name).mkdir(parents=True)
        Image.fromarray(np.full((4, 5), value, np.int32)).save(tmp_path / "p" / name / "1.tiff")
    refusal(lambda: data.load(group("folder", tmp_path / "p", test_split="train"), seed=0), f"pixels from {value} to ")


def test_splits_without_one_to_train_on_are_told(folder):
    (folder / "test" / "cat").mkdir(parents=True)
    refusal(lambda: data.load(group("folder", folder), seed=0), "has test/ with folders, but no train/")


def test_bad_folders_are_told(folder, tmp_path):
    refusal(lambda: data.load(group("folder", tmp_path / "nowhere"), seed=0), "nowhere', which is no directory")
    refusal(lambda: data.load(group("folder", ""), seed=0), "data_dir: got '', which is no directory")
    refusal(lambda: data.load(group("folder", folder / "cat"), seed=0), "has folders of classes: none")
    (tmp_path / "one" / "cat").mkdir(parents=True)
    refusal(lambda: data.load(group("folder", tmp_path / "one"), seed=0), "has folders of classes: cat")
    (tmp_path / "one" / "dog").mkdir()
    refusal(lambda: data.load(group("folder", tmp_path / "one"), seed=0), "has no pictures")
    whole = (folder / "cat" / "2.png").read_bytes()
    for content in (b"", b"hello", whole[: len(whole) // 2]):
        (folder / "cat" / "2.png").write_bytes(content)
        refusal(lambda: data.load(group("folder", folder), seed=0), f"the picture {folder}/cat/2.png can't be ")


def test_changed_pictures_are_decoded_again(folder):
    config = group("folder", folder, size=4, test_split="train")
    before = data.load(config, seed=0).test.images.copy()
    picture("RGB", (40, 40), 99).save(folder / "cat" / "0.png")
    after = data.load(config, seed=0).test.images
    assert (before[0] != after[0]).any()
    np.testing.assert_array_equal(before[1:], after[1:])


SPLIT = (slice(0, 30), slice(30, 40))
LAYOUTS = {
    "keras": ("x_train", "y_train", "x_test", "y_test"),
    "medmnist": ("train_images", "train_labels", "test_images", "test_labels"),
    "plain": ("images", "labels"),
    "sklearn": ("data", "target"),
    "own": ("pics", "kinds"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_of_numpy(tmp_path, layout):
    names = LAYOUTS[layout]
    arrays = [array[rows] for rows in SPLIT for array in (IMAGES, LABELS)] if len(names) > 2 else [IMAGES, LABELS]
    labels = {names[1]: arrays[1][:, None]} if layout == "medmnist" else {}  # as it has them
    np.savez(tmp_path / "mine.npz", **(dict(zip(names, arrays, strict=True)) | labels))
    keys = {"image_key": "pics", "label_key": "kinds"} if layout == "own" else {}
    dataset = data.load(group("npz", tmp_path / "mine.npz", **keys), seed=0)
    assert dataset.classes == ("0", "1", "2")
    if len(names) > 2:
        np.testing.assert_array_equal(everything(dataset.test).images, IMAGES[SPLIT[1]])
        np.testing.assert_array_equal(everything(dataset.test).labels, LABELS[SPLIT[1]])
    assert sum(len(split.rows) for split in dataset[:3]) == 40


def test_a_directory_of_files_of_numpy_with_names_of_classes(tmp_path):
    names = np.array(["ant", "bee", "cow"])
    for split, rows in zip(("train", "test"), SPLIT, strict=True):
        np.savez(tmp_path / f"{split}.npz", x=IMAGES[rows, ..., 0], y=names[LABELS[rows]])
    dataset = data.load(group("npz", tmp_path), seed=0)
    assert dataset.classes == ("ant", "bee", "cow")
    np.testing.assert_array_equal(everything(dataset.test).labels, LABELS[SPLIT[1]])
    np.testing.assert_array_equal(everything(dataset.test).images, IMAGES[SPLIT[1], ..., :1])


def test_bad_files_of_numpy_are_told(tmp_path):
    path = tmp_path / "mine.npz"
    refusal(lambda: data.load(group("npz", path), seed=0), "mine.npz'; allowed: a file NAME.npz")
    for arrays, words in (
        ({"x": IMAGES}, "has the arrays x; allowed: images or"),
        ({"x": IMAGES, "y": LABELS[:-1]}, "has 40 images and 39 labels"),
        ({"x": IMAGES.reshape(40, -1), "y": LABELS}, "has images of shape (40, 90)"),
        ({"x": np.zeros((40, 3, 8, 8), np.uint8), "y": LABELS}, "allowed: channels last"),
        ({"x": IMAGES.astype(np.int64), "y": LABELS}, "has images of type int64; allowed: uint8, uint16"),
        ({"x": IMAGES, "y": LABELS / 2}, "has labels of type float64"),
        ({"x": IMAGES, "y": LABELS - 1}, "example 0 of "),
        ({"x": np.where(IMAGES > 250, np.nan, IMAGES), "y": LABELS}, "values that are not finite"),
        ({"x": IMAGES, "y": np.array([{}] * 40)}, "can't be read (ValueError: Object arrays"),
    ):
        np.savez(path, **arrays)
        refusal(lambda: data.load(group("npz", path), seed=0), words)
    np.save(tmp_path / "one.npy", IMAGES)
    (tmp_path / "one.npy").rename(path)
    refusal(lambda: data.load(group("npz", path), seed=0), "mine.npz can't be read (TypeError: ")
    refusal(lambda: data.load(group("npz", ""), seed=0), "got ''; allowed: a file NAME.npz")
    np.savez_compressed(path, x=IMAGES, y=LABELS)
    whole = path.read_bytes()
    path.write_bytes(whole[:1000] + bytes(500) + whole[1500:])
    refusal(lambda: data.load(group("npz", path), seed=0), "mine.npz can't be read (")
    for content in (b"", b"hello", whole[: len(whole) // 2]):
        path.write_bytes(content)
        refusal(lambda: data.load(group("npz", path), seed=0), "mine.npz can't be read (")


@pytest.mark.parametrize("labels", [LABELS.astype(float), LABELS.astype(">i2"), LABELS > 0, LABELS.astype("S1")])
def test_labels_of_any_kind(labels):
    dataset = data.load(group("digits", "/nowhere/data"), seed=0, data=(IMAGES.astype(">u2"), labels))
    assert dataset.train.images.dtype == np.uint16
    assert dataset.classes == (("0", "1") if labels.dtype == bool else ("0", "1", "2"))
    np.testing.assert_array_equal(dataset.train.labels, labels.astype(int))


def test_arrays_without_labels_are_not_for_testing(tmp_path):
    np.savez(tmp_path / "mine.npz", x_train=IMAGES, y_train=LABELS, x_test=IMAGES, x_val=IMAGES[:7], y_val=LABELS[:7])
    assert len(data.load(group("npz", tmp_path / "mine.npz"), seed=0).test.rows) == 7


@settings(max_examples=40)
@given(st.integers(0, 100), st.integers(0, 100), st.integers(0, 100), st.sampled_from(["validation", "test"]))
def test_what_is_named_elsewhere_is_no_training_data(first, second, seed, role):
    low, high = sorted((first, second))
    name = f"train[{low}%:{high}%]"
    # Of 40 examples, 0% to 99% are all: then it is the training data that is named.
    if round(0.4 * low) == round(0.4 * high) or (round(0.4 * low), round(0.4 * high)) == (0, 40):
        return
    config = group("digits", "/nowhere/data", **{f"{role}_split": name})
    dataset = data.load(config, seed, data=(IMAGES, np.arange(40)))
    seen = [set(everything(split).labels.tolist()) for split in dataset[:3]]
    assert seen[0] | seen[1] | seen[2] == set(range(40))
    assert sum(map(len, seen)) == 40
    assert seen[1 if role == "validation" else 2] == set(range(round(0.4 * low), round(0.4 * high)))


def test_parts_that_leave_nothing_to_train_on_are_told():
    config = group("digits", "/nowhere/data", validation_split="train[:50%]", test_split="train[50%:]")
    words = "train_split: got none, where validation_split and test_split take all of train"
    refusal(lambda: data.load(config, 0, (IMAGES, LABELS)), words)
    for names in ({"train_split": "train"}, {"validation_split": "train"}):
        config.update(names)
        assert len(data.load(config, 0, (IMAGES, LABELS)).train.rows) == len(IMAGES)


@pytest.mark.parametrize("label", [[0.0, 1.0], b"cat", float("nan")])
def test_labels_of_a_test_split_that_are_none_are_told(label):
    pairs = {name: Source([(image, label) for image in IMAGES[:4]]) for name in ("train", "test")}
    with pytest.raises(ConfigError, match="example 0 of the "):
        data.load(group("digits", "/nowhere/data"), 0, pairs)


def test_testing_takes_nothing_that_trains_or_chooses():
    parts = {"train": slice(0, 20), "validation": slice(20, 30), "test": slice(30, 40)}
    pairs = {name: (IMAGES[part], LABELS[part]) for name, part in parts.items()}
    for names in (
        {"train_split": "train+validation"},
        {"validation_split": "validation[:50%]"},
        {"validation_split": "test[:50%]"},
        {"train_split": "train[:50%]+test[:50%]", "validation_split": "validation"},
    ):
        for splits in (("train", "validation"), ("train", "validation", "test")):
            if "test" not in splits and "test" in str(names):
                continue
            config = group("digits", "/nowhere/data", **names)
            dataset = data.load(config, 0, {name: pairs[name] for name in splits})
            seen = [{image.tobytes() for image in everything(split).images} for split in dataset[:3]]
            assert seen[2]
            assert not seen[2] & (seen[0] | seen[1])


def test_labels_that_are_no_classes_are_told():
    """Such as hashes and identities: each would have an output of the network."""
    labels = np.where(np.arange(40) == 3, 2**31 - 2, 0)
    words = ("example 3 of ", "has label 2147483646; allowed: labels 0 to 999999")
    refusal(lambda: data.load(group("digits", "/nowhere/data", validation_fraction=0.0), 0, (IMAGES, labels)), *words)


def test_pictures_of_different_sizes_as_a_pair_are_told():
    pair = ([IMAGES[0], IMAGES[1][:3]], [0, 1])
    refusal(lambda: data.load(group("digits", "/nowhere/data"), 0, pair), "can't be made arrays (")


class Source:
    """Random access as Grain's and PyTorch's sources have it."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


class HuggingFace(Source):
    class ClassLabel:
        names = ("ant", "bee", "cow")

    features = {"img": None, "label": ClassLabel()}  # noqa: RUF012


def test_data_in_memory():
    config = group("digits", "/nowhere/data")
    pairs = list(zip(IMAGES, LABELS, strict=True))
    by_name = [{"image": image, "label": int(label), "id": "a"} for image, label in pairs]
    pictures = [{"img": Image.fromarray(image), "label": int(label)} for image, label in pairs]
    for given_data, classes in (
        ((IMAGES, LABELS), "012"),
        ((IMAGES.tolist() and IMAGES, LABELS.tolist()), "012"),
        (Source(pairs), "012"),
        (pairs, "012"),
        (Source(by_name), "012"),
        (HuggingFace(pictures), ("ant", "bee", "cow")),
        ({"train": Source(pairs)}, "012"),
    ):
        dataset = data.load(config, seed=0, data=given_data)
        assert dataset.classes == tuple(classes)
        rows = np.sort(np.concatenate([split.rows for split in dataset[:3]]))
        np.testing.assert_array_equal(rows, np.arange(40))
        np.testing.assert_array_equal(dataset.train.images, IMAGES)
        np.testing.assert_array_equal(dataset.train.labels, LABELS)
    splits = {"train": pairs[:30], "val": (IMAGES[30:], LABELS[30:]), "test": Source(by_name[:5])}
    dataset = data.load(group("digits", "/nowhere/data", validation_split="validation"), seed=0, data=splits)
    assert [len(split.rows) for split in dataset[:3]] == [30, 10, 5]
    unlabelled = splits | {"test": (IMAGES, np.full(40, -1))}
    assert len(data.load(config, seed=0, data=unlabelled).test.rows) == 10
    for bad, words in (
        ([], "got 'train' "),
        (3, "is a int; allowed: (images, labels)"),
        ([1, 2], "can't be read ("),
        ([{"a": 1, "b": 2}], "items have a, b, of which none is 'image'"),
        ([(IMAGES[0], 0), (IMAGES[0, ..., :2], 1)], "has images with channels [(2,), (3,)]"),
        ([(IMAGES[0], 0), (IMAGES[:2], 1)], "has images with channels [(3,), (5, 3)]"),
        ([(np.zeros((3, 8, 8), np.float32), 0)], "has images of shape (3, 8, 8); allowed: channels last"),
        ([(IMAGES[0], 0.5)], "has label 0.5; allowed: labels that are whole numbers from 0, or names"),
    ):
        refusal(lambda bad=bad: data.load(config, seed=0, data=bad), words)
    joined = group("digits", "/nowhere/data", train_split="train+test", test_split="train+test")
    grey = {"train": (IMAGES, LABELS), "test": (IMAGES[..., :1], LABELS)}
    refusal(lambda: data.load(joined, seed=0, data=grey), "(6, 5, 1)")


def test_images_keep_their_type():
    for dtype, scale in ((np.uint8, 255), (np.uint16, 65535), (np.float64, 1), (np.float16, 1), (bool, 1)):
        images = (IMAGES / 255 * scale).astype(dtype)
        train = data.load(group("digits", "/nowhere/data"), seed=0, data=(images, LABELS)).train
        pixels = jaxdtp.running.epoch.normalise(jaxdtp.Preprocessing((0.25,), (2.0,)), train.images[:4])
        expected = (images[:4].astype(float) / (scale if np.issubdtype(dtype, np.integer) else 1) - 0.25) / 2
        np.testing.assert_allclose(pixels, expected, atol=1e-3 if dtype == np.float16 else 1e-6)


@settings(max_examples=60)
@given(
    st.sampled_from([np.uint8, np.uint16, np.float32]),
    st.tuples(*[st.integers(1, 12)] * 2),
    st.tuples(*[st.integers(1, 12)] * 2),
    st.integers(1, 4),
    st.integers(0, 255),
)
def test_resizing_keeps_a_uniform_image_uniform(dtype, old, new, channels, value):
    image = np.full((*old, channels), value, dtype)
    after = resized(image, new)
    assert (after.shape, after.dtype) == ((*new, channels), dtype)
    np.testing.assert_allclose(after, value, rtol=1e-5)


def test_resizing_takes_the_middle_and_averages():
    image = np.zeros((4, 8, 1), np.uint8)
    image[:, 2:4], image[:, 4:6] = 100, 200
    image[:, 0], image[:, 7] = 255, 255  # beyond the middle square
    np.testing.assert_allclose(resized(image, (1, 1))[0, 0], 150, atol=1)


def test_a_picture_without_alpha_palette_and_inks():
    assert as_array(picture("P", (3, 2))).shape == (2, 3, 3)
    assert as_array(np.ones((2, 3), bool)).tolist() == [[[255]] * 3] * 2


def tfds_features(**others):
    import tensorflow_datasets as tfds

    features = {
        "image": tfds.features.Image(shape=(6, 5, 3)),
        "label": tfds.features.ClassLabel(num_classes=3),
    } | {name: make(tfds.features) for name, make in others.items()}
    return {name: feature for name, feature in features.items() if feature is not None}


def png(image):
    """As TFDS writes an image: a floating point number as four channels of bytes."""
    if image.dtype == np.float32:
        image = image.view(np.uint8).reshape(*image.shape[:2], 4)
    return stand_in.png(image[..., 0] if image.shape[-1] == 1 else image)


def examples(count, **others):
    whole = [{"image": png(IMAGES[index]), "label": int(LABELS[index])} for index in range(count)]
    made = [example | {name: make(index) for name, make in others.items()} for index, example in enumerate(whole)]
    return [{name: value for name, value in example.items() if value is not None} for example in made]


def test_splits_in_the_syntax_of_tfds(tmp_path):
    splits = {"train": examples(30), "validation": examples(7), "test": examples(5)}
    stand_in.write_features(tmp_path, "tiny", splits, tfds_features(), {})
    keys = {"train_split": "train[:50%]+validation", "validation_split": "train[50%:60%]", "test_split": "train[-4:]"}
    dataset = data.load(group("tiny", tmp_path, **keys), seed=0)
    np.testing.assert_array_equal(everything(dataset.train).images, [*IMAGES[:15], *IMAGES[:7]])
    np.testing.assert_array_equal(everything(dataset.validation).labels, LABELS[15:18])
    np.testing.assert_array_equal(everything(dataset.test).images, IMAGES[26:30])
    for key, value, words in (
        ("train_split", "trian", "got 'trian' ("),
        ("test_split", "train[:5", "got 'train[:5' ("),
        (
            "validation_split",
            "test[:0]",
            "which has no examples; allowed: what has some, of train (30), validation (7)",
        ),
    ):
        refusal(lambda key=key, value=value: data.load(group("tiny", tmp_path, **{key: value}), seed=0), words)


def test_an_unlabelled_test_split_beside_a_labelled_validation_one(tmp_path, capsys):
    unlabelled = [example | {"label": -1} for example in examples(5)]
    splits = {"train": examples(20), "validation": examples(7), "test": unlabelled}
    stand_in.write_features(tmp_path, "tiny", splits, tfds_features(), {"label": np.int64})
    dataset = data.load(group("tiny", tmp_path), seed=0)
    told = "the test split is without labels, so the validation split is for testing (config.dataset.test_split)"
    assert told in capsys.readouterr().out
    assert [len(split.rows) for split in dataset[:3]] == [18, 2, 7]


def test_other_features(tmp_path):
    others = {
        "image": lambda features: None,
        "label": lambda features: None,
        "photo": lambda features: features.Image(shape=(6, 5, 3)),
        "mask": lambda features: features.Image(shape=(6, 5, 1)),
        "kind": lambda features: features.Scalar(np.int64),
        "score": lambda features: features.Scalar(np.float32),
        "name": lambda features: features.Text(),
    }
    made = {
        "image": lambda index: None,
        "label": lambda index: None,
        "photo": lambda index: png(IMAGES[index]),
        "mask": lambda index: png(IMAGES[index, ..., :1]),
        "kind": lambda index: index % 3,
        "score": lambda index: 0.5,
        "name": lambda index: "x",
    }
    splits = {"train": examples(20, **made), "test": examples(6, **made)}
    stand_in.write_features(tmp_path, "tiny", splits, tfds_features(**others), {})
    refusal(lambda: data.load(group("tiny", tmp_path), seed=0), "image_key: got ''", "allowed: mask or photo")
    refusal(lambda: data.load(group("tiny", tmp_path, image_key="name"), seed=0), "image_key: got 'name'")
    dataset = data.load(group("tiny", tmp_path, image_key="photo"), seed=0)
    assert dataset.classes == ("0", "1", "2")
    np.testing.assert_array_equal(everything(dataset.test).images, IMAGES[:6])
    assert data.load(group("tiny", tmp_path, image_key="mask", label_key="kind"), seed=0).test.images.shape[-1] == 1


@pytest.mark.parametrize("dtype", [np.uint16, np.float32, np.bool_])
def test_other_types(tmp_path, dtype):
    images = (IMAGES[..., :1] * (257.0 if dtype == np.uint16 else 1 / 255)).astype(dtype)
    other = {"image": lambda features: features.Tensor(shape=(6, 5, 1), dtype=dtype)}
    if dtype != np.bool_:
        other = {"image": lambda features: features.Image(shape=(6, 5, 1), dtype=dtype)}
    written = (lambda image: image) if dtype == np.bool_ else png
    splits = {"train": examples(20, image=lambda index: written(images[index]))}
    written_as = tfds_features(image=lambda features: features.Image(shape=(6, 5, 4))) if dtype == np.float32 else {}
    stand_in.write_features(tmp_path, "tiny", splits, tfds_features(**other), written_as)
    for _ in range(2):  # decoded, and from the cache
        train = data.load(group("tiny", tmp_path, test_split="train"), seed=0).test
        assert train.images.dtype == (np.uint8 if dtype == np.bool_ else dtype)
        np.testing.assert_array_equal(train.images, images[:20] * np.uint8(255) if dtype == np.bool_ else images[:20])


def test_images_of_different_sizes(tmp_path, capsys):
    other = {"image": lambda features: features.Image(shape=(None, None, 3))}
    made = [RNG.integers(0, 256, (8 + index, 20 - index, 3), np.uint8) for index in range(10)]
    splits = {"train": examples(10, image=lambda index: png(made[index])), "test": examples(4)}
    stand_in.write_features(tmp_path, "tiny", splits, tfds_features(**other), {})
    dataset = data.load(group("tiny", tmp_path), seed=0)
    assert "images of different sizes are resized to 32x32" in capsys.readouterr().out
    assert dataset.train.images.shape[1:] == dataset.test.images.shape[1:] == (32, 32, 3)
    dataset = data.load(group("tiny", tmp_path, size=(6, 5)), seed=0)
    np.testing.assert_array_equal(dataset.test.images, IMAGES[:4])
    np.testing.assert_array_equal(dataset.train.images[3], resized(made[3], (6, 5)))


SHORT = (
    "--config.num_epochs=1",
    "--config.steps_per_epoch=2",
    "--config.batch_size=8",
    "--config.network.hidden=(8, 8)",
)


def test_the_command_on_a_folder_of_photographs(tmp_path):
    for index in range(60):
        path = tmp_path / "photos" / ("cat", "dog", "emu")[index % 3] / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture("RGB", (20 + index, 70 - index), index).save(path)
    keys = ("--config.dataset.name=folder", f"--config.dataset.data_dir={tmp_path}/photos")
    keys += (f"--config.dataset.cache_dir={tmp_path}/cache",)
    result = run("digits_mlp", *SHORT, *keys, f"--workdir={tmp_path}/run")
    assert result.returncode == 0, result.stderr
    assert "43 / 5 / 12 training / validation / test images" in result.stdout
    trained = jaxdtp.load(tmp_path / "run")
    assert trained.classes == ("cat", "dog", "emu")
    assert trained.predict(np.zeros((2, 32, 32, 3), np.uint8)).shape == (2, 3)
    about = json.loads((tmp_path / "run" / "data.json").read_text())
    assert about["examples"] == {"train": 43, "validation": 5, "test": 12}
    # The same workdir on other data.
    (tmp_path / "photos" / "emu" / "2.jpg").unlink()
    result = run("digits_mlp", *SHORT, *keys, f"--workdir={tmp_path}/run")
    assert result.returncode == 2
    assert "belongs to a run on other data: examples (there {'train': 43," in result.stderr


def test_the_command_on_arrays_and_on_a_function_of_the_users(tmp_path):
    np.savez(tmp_path / "mine.npz", x=IMAGES.astype(np.float32), y=LABELS)
    (tmp_path / "mine.py").write_text(
        "import numpy as np\n\n\ndef load():\n    arrays = np.load('mine.npz')\n    return arrays['x'], arrays['y']\n"
    )
    npz = ("--config.dataset.name=npz", f"--config.dataset.data_dir={tmp_path}/mine.npz")
    for keys in (npz, ("--config.dataset.name=mine.py:load",), (*npz, "--config.dataset.size=8")):
        workdir = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        result = run("digits_mlp", *SHORT, *keys, f"--workdir={workdir}", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        shape = (8, 8, 3) if "--config.dataset.size=8" in keys else (6, 5, 3)
        assert jaxdtp.load(workdir).predict(np.zeros((2, *shape), np.float32)).shape == (2, 3)
    result = run("digits_mlp", "--config.dataset.name=mine.py:other", f"--workdir={tmp_path}/x", cwd=tmp_path)
    assert result.returncode == 2
    assert "config.dataset.name: got 'mine.py:other' (" in result.stderr
    assert result.stderr.count("\n") == 1


def test_training_and_evaluation_from_python(tmp_path):
    config = default_config()
    config.num_epochs, config.batch_size, config.network.hidden, config.trackers = 1, 8, (8,), ()
    summary = jaxdtp.train_and_evaluate(config, tmp_path, data=(IMAGES, LABELS))
    again = jaxdtp.evaluate_best(config, tmp_path, data=(IMAGES, LABELS))
    assert again["test_accuracy"] == summary["test_accuracy"]
    with pytest.raises(ConfigError, match="belongs to a run on other data: labels"):
        jaxdtp.train_and_evaluate(config, tmp_path, data=(IMAGES, LABELS[::-1]))


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.one_of(st.integers(1, 9), st.tuples(st.integers(1, 9)), st.tuples(st.integers(1, 9), st.integers(1, 9))),
)
def test_every_size_that_is_allowed(size):
    train = data.load(group("digits", "/nowhere/data", size=size), seed=0, data=(IMAGES[:9], LABELS[:9])).train
    sides = (size,) if isinstance(size, int) else size
    assert train.images.shape[1:3] == (sides[0], sides[-1])
