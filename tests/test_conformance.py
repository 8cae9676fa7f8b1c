"""What every entry of a table must do: a new rule, network, activation or optimizer is tested by being entered."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stand_in
from flax import nnx
from PIL import Image

import jaxdtp
from jaxdtp import data
from jaxdtp.configuration.config import default_config, resolve
from jaxdtp.configuration.optimizers import OPTIMIZERS, SCHEDULES
from jaxdtp.learning.algorithms import ALGORITHMS
from jaxdtp.learning.state import init_state
from jaxdtp.learning.step import train_step
from jaxdtp.models.blocks import ACTIVATIONS, FEEDBACK_ACTIVATIONS, INITIALIZERS, SQUASHES
from jaxdtp.models.networks import NETWORKS
from jaxdtp.models.own import MODULES
from jaxdtp.running.build import build_network, build_settings

SIZES = {
    "mlp": {"hidden": (7, 6)},
    "lenet": {"channels": (3,), "hidden": (6,)},
    "vgg": {"channels": (3, 4), "hidden": ()},
    "vit": {"options": {"features": 8, "depth": 1, "patch": 4}},
    "residual18": {"options": {"blocks": (1, 1), "channels": (4, 6), "stem": 4}},
    "residual34": {"options": {"blocks": (1, 1), "channels": (4, 6), "stem": 4}},
}
OF_BLOCKS = [rule for rule, algorithm in ALGORITHMS.items() if algorithm.target_rule]
LAYERED = [rule for rule in ALGORITHMS if rule not in OF_BLOCKS]


def settings_of(rule, network="mlp", **changes):
    config = default_config()
    config.algorithm, config.network.name, config.batch_size = rule, network, 6
    config.feedback.iterations, config.feedback.learning_rate = (2,), (1e-3,)
    sizes = SIZES.get(network, {"options": {"width": 4}} if network in MODULES else {})
    config.update_from_flattened_dict({f"network.{name}": value for name, value in sizes.items()} | changes)
    return resolve(config, changes)


def check_steps(config, shape=(8, 8, 1), model=None):
    """Three steps are one program, and leave a state of the same form, finite and moved on."""
    network = build_network(config, shape, 10) if model is None else jaxdtp.network_of(model, jnp.zeros((1, *shape)))
    settings = build_settings(config, network, steps_per_epoch=3)
    start = state = init_state(network, settings, jax.random.key(0))
    x, labels = jax.random.normal(jax.random.key(1), (6, *shape)), jnp.arange(6)

    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(state, key):
        return train_step(network, settings, state, x, labels, key)

    for key in jax.random.split(jax.random.key(2), 3):
        state, metrics = step(state, key)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, start)
    chex.assert_tree_all_finite((state.forward, state.feedback, state.model, metrics))
    assert {"loss", "top1"} <= set(metrics)
    assert int(state.step) == 3
    moved = [bool(jnp.any(a != b)) for a, b in zip(*map(jax.tree.leaves, (state.forward, start.forward)), strict=True)]
    assert any(moved)
    rule = settings.algorithm
    if rule.feedback_rule is None and not rule.shared_update:
        chex.assert_trees_all_equal(state.feedback, start.feedback)


@pytest.mark.parametrize("rule", ALGORITHMS)
def test_rules(rule):
    check_steps(settings_of(rule))


@pytest.mark.slow
@pytest.mark.parametrize("rule", OF_BLOCKS)
@pytest.mark.parametrize("network", NETWORKS)
def test_rules_with_targets_on_networks_of_blocks(rule, network):
    check_steps(settings_of(rule, network), (16, 16, 1))


@pytest.mark.slow
@pytest.mark.parametrize("rule", LAYERED)
@pytest.mark.parametrize("network", [*NETWORKS, *MODULES])
def test_rules_of_layers_on_all_networks(rule, network):
    check_steps(settings_of(rule, network), (16, 16, 1))


class Mirror(nn.Module):
    """A feedback module: dense, with the slope of the tanh below it."""

    @nn.compact
    def __call__(self, y):
        return nn.Dense(7)(y * (1 - y**2))


def dense(key, x):
    return 0.3 * jax.random.normal(key, (x.shape[-1], 10))


# Derived feedback of Linen modules, NNX modules and functions; and feedback modules.
MODELS = {
    "linen": [nn.Dense(7), nn.Sequential([jnp.tanh, nn.Dense(10)])],
    "nnx": [nnx.Linear(8, 7, rngs=nnx.Rngs(0)), nnx.Linear(7, 10, rngs=nnx.Rngs(1))],
    "functions": [nn.Dense(7), (dense, lambda params, x: jnp.tanh(x) @ params)],
    "own": [nn.Dense(7), jaxdtp.OwnFeedback(nn.Sequential([nn.Dense(10), nn.tanh]), Mirror())],
}


@pytest.mark.parametrize("rule", ALGORITHMS)
def test_rules_on_a_users_modules(rule):
    check_steps(settings_of(rule), (8,), MODELS["linen"])


@pytest.mark.slow
@pytest.mark.parametrize("rule", ALGORITHMS)
@pytest.mark.parametrize("kind", ["nnx", "functions", "own"])
def test_rules_on_all_kinds_of_models_and_feedback(rule, kind):
    check_steps(settings_of(rule), (8,), MODELS[kind])


@pytest.mark.parametrize("key", ["network.activation", "feedback.activation", "feedback.squash", "network.init"])
def test_activations_and_initialisations(key):
    tables = {
        "network.activation": ACTIVATIONS,
        "feedback.activation": FEEDBACK_ACTIVATIONS,
        "feedback.squash": SQUASHES,
        "network.init": INITIALIZERS,
    }
    for value in tables[key]:
        check_steps(settings_of("dtp", **{key: value}))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers_and_schedules(optimizer):
    for schedule in SCHEDULES:
        changes = {"forward.optimizer": optimizer, "feedback.optimizer": optimizer, "forward.schedule": schedule}
        check_steps(settings_of("dtp", **changes))


IMAGES, LABELS = np.random.default_rng(0).integers(0, 256, (40, 6, 5, 3), np.uint8), np.arange(40) % 3


def folder(path):
    for index, (image, label) in enumerate(zip(IMAGES, LABELS, strict=True)):
        (path / str(label)).mkdir(exist_ok=True)
        Image.fromarray(image).save(path / str(label) / f"{index}.png")
    return {"name": "folder", "data_dir": str(path)}


def npz(path):
    np.savez(path / "mine.npz", images=IMAGES, labels=LABELS)
    return {"name": "npz", "data_dir": str(path / "mine.npz")}


def function(path):
    npz(path)
    code = f"import numpy as np\ndef load():\n    return tuple(np.load({str(path / 'mine.npz')!r}).values())\n"
    (path / "mine.py").write_text(code)
    return {"name": f"{path}/mine.py:load"}


def tfds(path):
    examples = [(stand_in.png(image), label) for image, label in zip(IMAGES, LABELS, strict=True)]
    stand_in.write_tfds(path, "tiny", {"train": examples[:30], "test": examples[30:]}, IMAGES.shape[1:], 3)
    return {"name": "tiny", "data_dir": str(path)}


STORED = {"digits": lambda path: {"name": "digits"}, "folder": folder, "npz": npz, "function": function, "tfds": tfds}


def test_every_kind_of_data_is_among_those_tested():
    assert set(data.KINDS) <= set(STORED)


@pytest.mark.parametrize("kind", STORED)
def test_data(kind, tmp_path):
    """All examples, each in one split, and which is which decided by the seed alone."""
    place = tmp_path / "data"
    place.mkdir()
    config = default_config()
    values = STORED[kind](place) | {"cache_dir": str(tmp_path / "cache"), "validation_fraction": 0.2}
    config.update_from_flattened_dict({f"dataset.{key}": value for key, value in values.items()})

    def loaded(seed):
        dataset = data.load(resolve(config).dataset, seed)
        return dataset.classes, [data.read(split, np.arange(len(split.rows))) for split in dataset[:3]]

    classes, splits = loaded(0)
    images, labels = (np.concatenate(arrays) for arrays in zip(*splits, strict=True))
    assert images.dtype == np.uint8
    assert labels.dtype == np.int32
    assert all(len(split.labels) for split in splits)
    if kind != "digits":
        order, expected = (sorted(map(bytes, arrays)) for arrays in (images, IMAGES))
        assert order == expected
        label_of = dict(zip(map(bytes, IMAGES), LABELS, strict=True))
        assert [classes[label] for label in labels] == [str(label_of[bytes(image)]) for image in images]
    else:
        assert (len(images), len(classes)) == (1797, 10)
    chex.assert_trees_all_equal((classes, splits), loaded(0))
    assert (loaded(1)[1][1].images != splits[1].images).any()
    chex.assert_trees_all_equal(loaded(1)[1][2], splits[2])
