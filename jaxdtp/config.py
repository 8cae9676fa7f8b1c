"""The configuration: every key with its default, what an algorithm's own published run changes, and validation."""

import math
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from jaxdtp.algorithms import ALGORITHMS
from jaxdtp.blocks import FEEDBACK_ACTIVATIONS
from jaxdtp.networks import NETWORKS
from jaxdtp.pooling import SHARED_MAXIMA
from jaxdtp.schedules import SCHEDULES


class ConfigError(ValueError):
    """Bad input: one line that names the key or file, what was found and what is allowed."""


def default_config() -> ConfigDict:
    """Every configuration key with its default. A config file starts from here and changes what is its own."""
    config = ConfigDict()
    config.seed = 0
    config.num_epochs = 10
    config.batch_size = 128
    config.steps_per_epoch = 0  # 0: as many as the training data gives
    config.checkpoint_every_epochs = 1
    config.algorithm = "ldrl"
    config.beta = 0.7  # step size of the output target
    config.matmul_precision = "float32"  # of convolutions and matrix products on GPU and TPU

    config.network = ConfigDict()
    config.network.name = "mlp"
    config.network.channels = ()  # of the convolutional blocks
    config.network.hidden = (256, 256)  # features of the dense blocks below the output

    config.dataset = ConfigDict()
    config.dataset.name = "digits"  # scikit-learn's digits, or the name of a TFDS builder
    config.dataset.data_dir = ""  # of TFDS; empty: TFDS's own default
    config.dataset.cache_dir = ""  # of decoded images; empty: ~/.cache/jaxdtp
    config.dataset.validation_fraction = 0.1  # of the training data
    config.dataset.mean = (0.5,)  # by channel, of pixels in [0, 1]
    config.dataset.std = (0.5,)
    config.dataset.flip = False  # mirror left-right at random
    config.dataset.crop_padding = 0  # pixels of edge padding for random crops

    config.forward = ConfigDict()
    config.forward.learning_rate = 0.05
    config.forward.momentum = 0.9
    config.forward.weight_decay = 1e-4
    config.forward.warmup_steps = 0  # training steps in which the learning rate grows from 0
    config.forward.schedule = "cosine"
    config.forward.schedule_epochs = 85  # half a period of the cosine
    config.forward.final_learning_rate = 1e-5  # of the cosine
    config.forward.schedule_milestones = ()  # epochs after which 'step' multiplies by the factor
    config.forward.schedule_factor = 0.1

    config.feedback = ConfigDict()
    config.feedback.iterations = (10, 10)  # per batch, for blocks 2..N
    config.feedback.noise_scale = (0.1, 0.1)
    config.feedback.learning_rate = (0.01, 0.01)
    config.feedback.momentum = 0.9
    config.feedback.noise_samples = 1
    config.feedback.batch_share = ()  # of each batch that takes part, for blocks 2..N; (): all
    config.feedback.init = "random"
    config.feedback.activation = "elu"  # 'matched': the slope at y is the forward slope there
    config.feedback.shared_maxima = "last"  # 'sum': where pooling windows share a maximum, un-pool the sum

    config.alignment = ConfigDict()
    config.alignment.every_epochs = 0  # how often Jacobian and gradient matching are measured; 0: never
    config.alignment.probes = 16  # random vectors for each example

    # config.when.ALGORITHM holds keys of the groups above, with values that this algorithm takes unless the command
    # line says otherwise.
    config.when = ConfigDict()
    return config


class Rule(NamedTuple):
    """What a key's value may be: a check, and the same in words."""

    check: Callable[[Any], bool]
    allowed: str


def _whole(minimum: int) -> Rule:
    return Rule(lambda value: type(value) is int and value >= minimum, f"a whole number of {minimum} or more")


def _number(check: Callable[[float], bool], allowed: str) -> Rule:
    def is_number(value):
        return type(value) in (int, float) and math.isfinite(value) and check(value)

    return Rule(is_number, f"a number {allowed}")


def _tuple_of(rule: Rule) -> Rule:
    def check(value):
        return isinstance(value, tuple | list) and all(rule.check(item) for item in value)

    return Rule(check, f"a tuple, each item {rule.allowed}")


def _one_of(names: Collection[str]) -> Rule:
    return Rule(lambda value: value in names, f"one of {', '.join(names)}")


_POSITIVE = _number(lambda value: value > 0, "above 0")
_NOT_NEGATIVE = _number(lambda value: value >= 0, "of 0 or more")
_SHARE = _number(lambda value: 0 <= value < 1, "from 0 to below 1")
_TEXT = Rule(lambda value: isinstance(value, str), "text")
_SWITCH = Rule(lambda value: isinstance(value, bool), "True or False")

RULES = {
    "seed": _whole(0),
    "num_epochs": _whole(1),
    "batch_size": _whole(1),
    "steps_per_epoch": _whole(0),
    "checkpoint_every_epochs": _whole(1),
    "algorithm": _one_of(ALGORITHMS),
    "beta": _POSITIVE,
    "matmul_precision": _one_of(("float32", "tensorfloat32", "bfloat16")),
    "network.name": _one_of(NETWORKS),
    "network.channels": _tuple_of(_whole(1)),
    "network.hidden": _tuple_of(_whole(1)),
    "dataset.name": _TEXT,
    "dataset.data_dir": _TEXT,
    "dataset.cache_dir": _TEXT,
    "dataset.validation_fraction": _SHARE,
    "dataset.mean": _tuple_of(_NOT_NEGATIVE),
    "dataset.std": _tuple_of(_POSITIVE),
    "dataset.flip": _SWITCH,
    "dataset.crop_padding": _whole(0),
    "forward.learning_rate": _POSITIVE,
    "forward.momentum": _SHARE,
    "forward.weight_decay": _NOT_NEGATIVE,
    "forward.warmup_steps": _whole(0),
    "forward.schedule": _one_of(SCHEDULES),
    "forward.schedule_epochs": _whole(1),
    "forward.final_learning_rate": _NOT_NEGATIVE,
    "forward.schedule_milestones": _tuple_of(_whole(1)),
    "forward.schedule_factor": _POSITIVE,
    "feedback.iterations": _tuple_of(_whole(1)),
    "feedback.noise_scale": _tuple_of(_POSITIVE),
    "feedback.learning_rate": _tuple_of(_POSITIVE),
    "feedback.momentum": _SHARE,
    "feedback.noise_samples": _whole(1),
    "feedback.batch_share": _tuple_of(_number(lambda value: 0 < value <= 1, "above 0, up to 1")),
    "feedback.init": _one_of(("random", "symmetric")),
    "feedback.activation": _one_of(FEEDBACK_ACTIVATIONS),
    "feedback.shared_maxima": _one_of(SHARED_MAXIMA),
    "alignment.every_epochs": _whole(0),
    "alignment.probes": _whole(2),
}
"""What is allowed for each key of `default_config()`."""


def resolve(config: ConfigDict, overrides: Collection[str] = ()) -> ConfigDict:
    """The configuration of one run: `config.when` applied for its algorithm and removed, and everything validated.

    Args:
        config: as a config file returns it, or as the command line changed it.
        overrides: dotted keys that the command line set; `config.when` leaves them alone.

    Raises:
        ConfigError: a key is unknown or missing, or its value is not allowed.
    """
    values = flatten(config)
    published = {key.removeprefix("when."): values.pop(key) for key in list(values) if key.startswith("when.")}
    for key, value in published.items():
        algorithm, _, changed = key.partition(".")
        if algorithm not in ALGORITHMS:
            raise ConfigError(f"config.when.{algorithm}: unknown algorithm; allowed: {', '.join(ALGORITHMS)}")
        check_key(changed)
        if algorithm == values.get("algorithm") and changed not in overrides:
            values[changed] = value
    for key in values:
        check_key(key)
    for key, rule in RULES.items():
        if key not in values:
            raise ConfigError(f"config.{key}: missing; allowed: {rule.allowed}")
        check_value(key, values[key])
    _check_blocks(values)

    nested = {}
    for key, value in values.items():
        group, _, name = key.rpartition(".")
        (nested.setdefault(group, {}) if group else nested)[name] = value
    return ConfigDict(nested)


def flatten(config: ConfigDict | dict, prefix: str = "") -> dict[str, Any]:
    """Values by dotted key."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict | dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def check_key(key: str) -> None:
    """Raise ConfigError, which names the group's keys, where `key` is not a configuration key."""
    if key not in RULES:
        group = key.rpartition(".")[0]
        keys = [known for known in RULES if known.rpartition(".")[0] == group] or RULES
        raise ConfigError(f"config.{key}: unknown key; allowed: {', '.join(keys)}")


def check_value(key: str, value: Any) -> None:
    """Raise ConfigError, which says what is allowed, where `value` is not allowed for `key`."""
    if not RULES[key].check(value):
        raise ConfigError(f"config.{key}: got {value!r}; allowed: {RULES[key].allowed}")


def _check_blocks(values: dict[str, Any]) -> None:
    """Check that the values that describe blocks fit each other."""
    network, channels = values["network.name"], values["network.channels"]
    if (network == "mlp") != (len(channels) == 0):
        allowed = "(), an mlp has no convolutions" if network == "mlp" else f"one block or more, in a {network}"
        raise ConfigError(f"config.network.channels: got {channels!r}; allowed: {allowed}")
    if ALGORITHMS[values["algorithm"]].feedback_rule is None:
        return
    blocks = len(channels) + len(values["network.hidden"]) + 1
    for key in ("feedback.iterations", "feedback.noise_scale", "feedback.learning_rate", "feedback.batch_share"):
        may_be_empty = key == "feedback.batch_share"
        if len(values[key]) != blocks - 1 and not (may_be_empty and len(values[key]) == 0):
            raise ConfigError(
                f"config.{key}: got {values[key]!r}, {len(values[key])} values; allowed: {blocks - 1} values, "
                f"for blocks 2 to {blocks} of the {blocks} blocks of {network}{', or none' if may_be_empty else ''}"
            )
