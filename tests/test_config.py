"""Configuration: what is refused, in which words, and what an algorithm's own published settings change."""

import contextlib
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxdtp.configuration.allowed import FOR_LAYERS, RULES
from jaxdtp.configuration.config import default_config, flatten, resolve
from jaxdtp.configuration.optimizers import schedule
from jaxdtp.data import Dataset, Split
from jaxdtp.learning.algorithms import ALGORITHMS
from jaxdtp.learning.state import init_state
from jaxdtp.running.build import build_network, build_settings, check_memory, steps_in_epoch
from jaxdtp.system.errors import ConfigError

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))


def load(path: Path) -> ConfigDict:
    namespace = {}
    exec(path.read_text(), namespace)
    return namespace["get_config"]()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_config_resolves_for_every_algorithm(path, algorithm):
    config = load(path)
    config.algorithm = algorithm
    shape, rule = (8, 8, 1) if "digits" in path.stem else (32, 32, 3), ALGORITHMS[algorithm]
    if config.feedback.init == "symmetric" and rule.paths.startswith("direct"):
        with pytest.raises(ConfigError, match=r"config.feedback.init: got 'symmetric'; allowed: random, the direct"):
            resolve(config)
        return
    config = resolve(config)
    if config.network.name.startswith(("resnet", "vit")) and rule.target_rule:  # a model of one block
        with pytest.raises(ConfigError, match=f"config.algorithm: got '{algorithm}', which feeds targets from block"):
            build_network(config, shape, 10)
        return
    network = build_network(config, shape, 10)
    settings = build_settings(config, network, steps_per_epoch=10)
    rule, paths = rule.feedback_rule, len(network) - 1 if rule.target_rule else 0
    assert settings.algorithm.feedback_rule is rule
    assert len(settings.paths) == paths
    assert len(settings.feedback) == (paths if rule else 0)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("num_epochs", np.int64(3), 3),
        ("num_epochs", jnp.array(3), 3),
        ("beta", np.logspace(-1, 0, 3)[0], 0.1),
        ("beta", np.float16(0.5), 0.5),
        ("beta", jnp.array(0.5), 0.5),
        ("beta", np.array(0.5), 0.5),
        ("beta", Fraction(1, 2), 0.5),
        ("beta", Decimal("0.5"), 0.5),
        ("beta", np.uint8(1), 1.0),
        ("network.hidden", (np.int32(12), jnp.array(7)), (12, 7)),
        ("network.hidden", np.array([12, 7]), (12, 7)),
        ("feedback.learning_rate", jnp.array([0.25, 0.5]), (0.25, 0.5)),
        ("feedback.learning_rate", [np.float32(0.25)], (0.25,)),
        ("forward.adam_betas", (np.float64(0.5), 0), (0.5, 0.0)),
        ("dataset.flip", np.bool_(True), True),
        ("network.options", {"width": np.int64(8), "rates": (np.float32(0.5),)}, {"width": 8, "rates": (0.5,)}),
    ],
)
def test_whatever_is_a_number_counts(key, value, expected):
    config, (group, _, name) = default_config(), key.rpartition(".")
    (config[group] if group else config)[name] = value
    found = flatten(resolve(config))[key]
    assert found == expected
    assert type(found) is type(expected)
    config.when.ldrl = ConfigDict({group: {name: value}} if group else {name: value})
    assert flatten(resolve(config))[key] == expected


@pytest.mark.parametrize("value", [True, np.bool_(True), jnp.array(True), np.array([[3]]), 3j, np.complex64(3), "3"])
def test_what_is_no_number_does_not_count(value):
    config = default_config()
    config.num_epochs = value
    with pytest.raises(ConfigError, match=r"config.num_epochs: got .*; allowed: a whole number from 1"):
        resolve(config)


def test_every_default_has_a_rule():
    config = default_config()
    del config.when
    assert set(flatten(config)) == set(RULES)
    resolve(default_config())


def test_published_settings_of_an_algorithm_and_the_command_line():
    config = load(CONFIGS[0].with_name("cifar10_vgg.py"))
    assert resolve(config).forward.learning_rate == 0.08
    config.algorithm = "bp"
    assert resolve(config).forward.learning_rate == 0.05
    config.forward.learning_rate = 0.3
    assert resolve(config, {"forward.learning_rate"}).forward.learning_rate == 0.3
    assert "when" not in resolve(config)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("num_epochs", 0, "got 0; allowed: a whole number from 1 to 1000000"),
        ("num_epochs", True, "got True"),
        ("beta", float("nan"), "got nan; allowed: a number above 0"),
        ("beta", "0.5", "got '0.5'"),
        ("feedback.batch_share", (0.5, 0), "each item a number above 0, up to 1"),
        ("feedback.batch_share", (), "got (); allowed: a tuple of 1 to 100, each item a number above 0, up to 1"),
        (
            "feedback.batch_share",
            (0.5, 0.5, 0.5),
            "allowed: 2 values, for blocks 2 to 3 of the 3 blocks of mlp, or one for all of them",
        ),
        ("feedback.shared_maxima", "first", "allowed: one of last, sum"),
        ("matmul_precision", "float16", "allowed: one of float32, tensorfloat32, bfloat16"),
        ("algorithm", "backprop", "allowed: one of ldrl, ldrl_parallel, ldrl_fast, dtp, "),
        ("network.name", "resnet", "allowed: one of mlp, lenet, vgg"),
        ("network.channels", (8,), "allowed: (), an mlp has no convolutions"),
        ("network.hidden", (8, -1), "each item a whole number from 1 to 1000000"),
        ("feedback.iterations", (), "got (); allowed: a tuple of 1 to 100, each item a whole number"),
        ("network.hidden", (10**12,), "got (1000000000000,); allowed: a tuple of up to 100, each item a whole number"),
        ("network.hidden", {"a": 1}, "allowed: a tuple"),
        ("seed", 2**32, "got 4294967296; allowed: a whole number from 0 to 4294967295"),
        ("beta", 1e-300, "got 1e-300; allowed: a number above 0 (from 1e-30 to 1e30)"),
        ("network", 3, "got 3; allowed: a group of keys"),
        ("when", None, "got None; allowed: a group of keys"),
        ("feedback.iterations", (3, 3, 3), "3 values; allowed: 2 values, for blocks 2 to 3 of the 3 blocks of mlp"),
        ("forward.rate_factors", (1.0, 2.0), "2 values; allowed: 3 values, for blocks 1 to 3 of the 3 blocks of mlp"),
        ("forward.adam_betas", (0.9,), "allowed: a tuple of two, each a number from 0 to below 1"),
        ("feedback.noise_scale", (0.1, 0.1, 0.1), "3 values; allowed: 2 values"),
        ("feedback.learning_rate", (0.1, "x"), "each item a number above 0"),
        ("forward.momentum", 1.0, "allowed: a number from 0 to below 1"),
        ("forward.schedule", "linear", "allowed: one of cosine, step, constant"),
        ("dataset.flip", 1, "allowed: True or False"),
    ],
)
def test_impossible_values_are_named(key, value, words):
    config = default_config()
    with config.ignore_type():
        config.update_from_flattened_dict({key: value})
    with pytest.raises(ConfigError) as error:
        resolve(config)
    assert str(error.value).startswith(f"config.{key}: ")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_and_missing_keys_are_named():
    config = default_config()
    config.feedback.sigma = 0.1
    with pytest.raises(ConfigError, match=r"config.feedback.sigma: unknown key; allowed: feedback.iterations, "):
        resolve(config)
    config = default_config()
    del config.forward["momentum"]
    with pytest.raises(ConfigError, match=r"config.forward.momentum: missing"):
        resolve(config)
    config = default_config()
    config.when = {"bp": {"forward": {"speed": 1.0}}}
    with pytest.raises(ConfigError, match=r"config.when.bp.forward.speed: unknown key"):
        resolve(config)
    config.when = {"bp": {"forward": {"learning_rate": "x"}}}
    with pytest.raises(ConfigError, match=r"config.when.bp.forward.learning_rate: got 'x'; allowed: a number above 0"):
        resolve(config)
    config.when = {"bp": {"algorithm": "ldrl"}}
    with pytest.raises(ConfigError, match=r"config.when.bp.algorithm: got 'ldrl'; allowed: every other key"):
        resolve(config)
    config.when = {"bpp": {"forward": {"learning_rate": 1.0}}}
    with pytest.raises(ConfigError, match=r"config.when.bpp: unknown algorithm; allowed: ldrl, ldrl_parallel, "):
        resolve(config)


def test_resolved_values_have_one_type_for_each_key():
    config = default_config()
    with config.ignore_type():
        config.beta, config.network.hidden, config.feedback.noise_scale = 1, [8, 8], [1]
    resolved = resolve(config)
    assert repr((resolved.beta, resolved.network.hidden, resolved.feedback.noise_scale)) == "(1.0, (8, 8), (1.0,))"


def test_feedback_settings_need_not_fit_where_there_is_no_feedback():
    config = default_config()
    config.algorithm = "bp"
    config.feedback.iterations = (10, 10, 10)
    assert resolve(config).feedback.iterations == (10, 10, 10)


@pytest.mark.parametrize("key", FOR_LAYERS)
def test_rules_of_layers_have_one_value_for_all_of_them(key):
    config = default_config()
    config.algorithm = "weight_mirror"
    group, name = key.split(".")
    config[group][name] = (1, 1) if name == "iterations" else (0.5, 0.5)
    words = rf"config.{key}: got .*, 2 values; allowed: one value, for all layers, with weight_mirror"
    with pytest.raises(ConfigError, match=words):
        resolve(config, {key})


def test_cosine_schedule_is_the_published_one():
    forward = default_config().forward
    forward.learning_rate = 0.08
    rate = schedule(forward, steps_per_epoch=10)
    assert float(rate(0)) == pytest.approx(0.08)
    assert float(rate(9)) == pytest.approx(0.08)
    assert float(rate(10)) < 0.08
    assert float(rate(42 * 10)) == pytest.approx(1e-5 + (0.08 - 1e-5) * 0.509238, rel=1e-4)
    assert float(rate(85 * 10)) == pytest.approx(1e-5, rel=1e-3)
    assert float(rate(89 * 10)) > float(rate(85 * 10))


def test_step_and_constant_schedules():
    forward = default_config().forward
    forward.learning_rate, forward.schedule, forward.schedule_milestones = 0.1, "step", (2, 4)
    rate = schedule(forward, steps_per_epoch=10)
    rates = [float(rate(10 * epoch)) for epoch in range(6)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    forward.schedule = "constant"
    assert float(schedule(forward, 10)(999)) == pytest.approx(0.1)


def test_batch_share_becomes_examples():
    config = default_config()
    config.batch_size, config.feedback.batch_share = 30, (0.1, 0.001)
    network = build_network(resolve(config), (8, 8, 1), 10)
    assert [training.examples for training in build_settings(resolve(config), network, 10).feedback] == [3, 1]
    config.feedback.batch_share = (1.0,)
    assert [training.examples for training in build_settings(resolve(config), network, 10).feedback] == [30, 30]


def test_networks_that_do_not_fit_the_images():
    config = resolve(load(CONFIGS[0].with_name("cifar10_vgg.py")))
    with pytest.raises(
        ConfigError, match=r"^config.network.channels: got .* images of shape \(16, 16, 3\): block conv_4"
    ):
        build_network(config, (16, 16, 3), 10)
    config = resolve(load(CONFIGS[0].with_name("digits_vit_fast.py")))
    with pytest.raises(ConfigError, match=r"config.network.name: vit: .* images of shape \(1, 1, 1\); allowed: "):
        build_network(config, (1, 1, 1), 10)


@pytest.mark.parametrize("algorithm", ["ldrl", "ddtp_rhl", "bp"])
def test_what_memory_does_not_hold(algorithm):
    config = default_config()
    config.algorithm, config.feedback.optimizer, config.forward.optimizer = algorithm, "adam", "adam"
    network = build_network(resolve(config), (8, 8, 1), 10)
    settings = build_settings(resolve(config), network, 10)
    state = sum(array.nbytes for array in jax.tree.leaves(init_state(network, settings, jax.random.key(0))))
    check_memory(resolve(config), network, 4 * state)
    with pytest.raises(
        ConfigError, match=r"^config.network: got {.*'hidden': \(256, 256\).*}, which needs [\de.-]+ GB"
    ):
        check_memory(resolve(config), network, state - 1)
    with pytest.raises(ConfigError, match=r"^config.batch_size: got 128, which needs [\de.-]+ GB"):
        check_memory(resolve(config), network, state)
    if settings.algorithm.feedback_rule:
        config.feedback.noise_samples = (1, 10**6)
        with pytest.raises(
            ConfigError, match=r"^config.feedback.noise_samples: got \(1, 1000000\), which needs 131 GB"
        ):
            check_memory(resolve(config), network, 10**10)
    config.network.hidden = (10**6,) * 5
    config.feedback.noise_samples = (1,)
    network = build_network(resolve(config), (8, 8, 1), 10)
    with pytest.raises(ConfigError, match=r"^config.network: got "):
        check_memory(resolve(config), network, 10**12)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 101}, "config.batch_size: got 101; allowed: up to 100"),
        ({"steps_per_epoch": 11}, "config.steps_per_epoch: got 11; allowed: up to 10, the full batches of 10"),
        ({"num_epochs": 10**6}, None),
        (
            {"num_epochs": 10**6, "feedback.extra_epochs": 1},
            "2000000 times through the data, with 10 steps each; allowed: ",
        ),
        ({"num_epochs": 10**6, "feedback.extra_epochs": 1, "algorithm": "bp"}, None),
        ({"num_epochs": 2, "feedback.pretraining_epochs": 999_999}, "up to 1000000 times"),
    ],
)
def test_steps_in_an_epoch_and_in_a_run(changes, words):
    config = default_config()
    config.update_from_flattened_dict({"batch_size": 10} | changes)
    split = Split(np.zeros((100, 8, 8, 1), np.uint8), np.zeros(100, np.int32), np.arange(100))
    dataset = Dataset(split, split, split, tuple("0123456789"))
    with pytest.raises(ConfigError, match=words) if words else contextlib.nullcontext():
        assert steps_in_epoch(resolve(config), dataset) == 10


def test_a_run_has_no_more_steps_than_int32_counts():
    config = default_config()
    config.batch_size, config.num_epochs = 1, 2**31 // 3000 + 1
    split = Split(np.zeros((3000, 1, 1, 1), np.uint8), np.zeros(3000, np.int32), np.arange(3000))
    with pytest.raises(ConfigError, match=r"config.num_epochs: got 715828, .* up to 715827 times"):
        steps_in_epoch(resolve(config), Dataset(split, split, split, tuple("0123456789")))


def test_no_data_left_for_training():
    config = default_config()
    config.dataset.validation_fraction = 0.9999
    none, some = (
        Split(np.zeros((size, 1, 1, 1), np.uint8), np.zeros(size, np.int32), np.arange(size)) for size in (0, 30)
    )
    with pytest.raises(
        ConfigError, match=r"config.dataset.validation_fraction: got 0.9999; allowed: .* of the 30 images"
    ):
        steps_in_epoch(resolve(config), Dataset(none, some, some, tuple("0123456789")))
