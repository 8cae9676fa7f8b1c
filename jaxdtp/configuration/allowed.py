"""What is allowed for each configuration key."""

import numbers
from collections.abc import Callable, Collection
from decimal import Decimal
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from jaxdtp.configuration.optimizers import OPTIMIZERS, SCHEDULES
from jaxdtp.learning.algorithms import ALGORITHMS
from jaxdtp.models.blocks import ACTIVATIONS, FEEDBACK_ACTIVATIONS, INITIALIZERS, SQUASHES
from jaxdtp.models.networks import NETWORKS
from jaxdtp.models.own import MODULES
from jaxdtp.models.pooling import SHARED_MAXIMA

LARGEST = 1_000_000
"""Of sizes and counts: beyond any use, and far from where products of some of them leave int64."""
LARGEST_INT32 = 2**31 - 1
"""Of what training counts on the device."""


def plain(value: Any) -> Any:
    """Python's own numbers, truth values and tuples for those of NumPy, JAX and others."""
    if isinstance(value, tuple | list):
        return tuple(map(plain, value))
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if hasattr(value, "tolist") and getattr(value, "ndim", 2) < 2:  # scalars and arrays
        return plain(value.tolist())
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    return float(value) if isinstance(value, numbers.Real | Decimal) and not isinstance(value, bool) else value


class Rule(NamedTuple):
    """What a key's value may be.

    Attributes:
        check: whether a value, of whatever type, is allowed.
        allowed: the same in words.
        convert: an allowed value as the one type that it has in a resolved configuration.
    """

    check: Callable[[Any], bool]
    allowed: str
    convert: Callable[[Any], Any] = lambda value: value


def _whole(minimum: int, maximum: int = LARGEST) -> Rule:
    return Rule(
        lambda value: type(value) is int and minimum <= value <= maximum, f"a whole number from {minimum} to {maximum}"
    )


def _number(check: Callable[[float], bool], allowed: str) -> Rule:
    # Comparisons alone: a whole number may be too large to be made a float.
    return Rule(lambda value: type(value) in (int, float) and check(value), f"a number {allowed}", float)


def _tuple_of(rule: Rule, minimum: int = 0) -> Rule:
    def check(value):
        fits = isinstance(value, tuple | list) and minimum <= len(value) <= 100
        return fits and all(rule.check(item) for item in value)

    return Rule(
        check,
        f"a tuple of {f'{minimum} to 100' if minimum else 'up to 100'}, each item {rule.allowed}",
        lambda value: tuple(rule.convert(item) for item in value),
    )


def _one_of(names: Collection[str]) -> Rule:
    return Rule(lambda value: type(value) is str and value in names, f"one of {', '.join(names)}")


# Float32 has them all.
_POSITIVE = _number(lambda value: 1e-30 <= value <= 1e30, "above 0 (from 1e-30 to 1e30)")
_NOT_NEGATIVE = _number(lambda value: 0 <= value <= 1e30, "of 0 or more (up to 1e30)")
_SHARE = _number(lambda value: 0 <= value < 1, "from 0 to below 1")
_BETAS = Rule(
    lambda value: isinstance(value, tuple | list) and len(value) == 2 and all(_SHARE.check(item) for item in value),
    f"a tuple of two, each {_SHARE.allowed}",
    lambda value: tuple(float(item) for item in value),
)
_TEXT = Rule(
    lambda value: type(value) is str and len(value) <= 1000 and value.isprintable(),
    "text of up to 1000 printable characters",
)
_SIZE = Rule(
    lambda value: (
        all(_whole(1, LARGEST).check(item) for item in (value if isinstance(value, tuple | list) else (value,)))
        and (not isinstance(value, tuple | list) or len(value) <= 2)
    ),
    "(), a number of pixels, or (height, width)",
    lambda value: tuple(value) * (2 // len(value) if value else 1) if isinstance(value, tuple | list) else (value,) * 2,
)
_SWITCH = Rule(lambda value: isinstance(value, bool), "True or False")

_OPTION = (int, float, bool, str, type(None))
_OPTIONS = Rule(
    lambda value: (
        isinstance(value, dict | ConfigDict)
        and all(
            str(name).isidentifier()
            and all(isinstance(item, _OPTION) for item in (option if isinstance(option, tuple | list) else (option,)))
            for name, option in value.items()
        )
    ),
    "values by name: numbers, text, True, False, None, or tuples of them",
    lambda value: {
        name: tuple(option) if isinstance(option, list) else option for name, option in sorted(value.items())
    },
)

_SEED = _whole(0, 2**32 - 1)


def _are_seeds(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return len(value) <= 1000 and all(map(_SEED.check, value)) and len(set(value)) == len(value)
    return type(value) is int and 1 <= value <= 1000


_SEEDS = Rule(
    _are_seeds,
    f"(), how many from config.seed on (1 to 1000), or a tuple of up to 1000 different ones, each {_SEED.allowed}",
    lambda value: tuple(value) if isinstance(value, tuple | list) else value,
)

RULES = {
    "seed": _SEED,
    "seeds": _SEEDS,
    "num_epochs": _whole(1),
    "batch_size": _whole(1),
    "steps_per_epoch": _whole(0, LARGEST_INT32),
    "checkpoint_every_epochs": _whole(1),
    "algorithm": _one_of(ALGORITHMS),
    "beside": _tuple_of(_one_of(ALGORITHMS)),
    "beta": _POSITIVE,
    "trackers": _tuple_of(_TEXT),
    "float64": _SWITCH,
    "matmul_precision": _one_of(("float32", "tensorfloat32", "bfloat16")),
    "network.name": _one_of((*NETWORKS, *MODULES)),
    "network.module": _TEXT,
    "network.options": _OPTIONS,
    "network.channels": _tuple_of(_whole(1)),
    "network.hidden": _tuple_of(_whole(1)),
    "network.activation": _one_of(ACTIVATIONS),
    "network.init": _one_of(INITIALIZERS),
    "dataset.name": _TEXT,
    "dataset.data_dir": _TEXT,
    "dataset.cache_dir": _TEXT,
    "dataset.train_split": _TEXT,
    "dataset.validation_split": _TEXT,
    "dataset.test_split": _TEXT,
    "dataset.image_key": _TEXT,
    "dataset.label_key": _TEXT,
    "dataset.size": _SIZE,
    "dataset.validation_fraction": _SHARE,
    "dataset.mean": _tuple_of(_number(lambda value: -1e30 <= value <= 1e30, "from -1e30 to 1e30")),
    "dataset.std": _tuple_of(_POSITIVE),
    "dataset.flip": _SWITCH,
    "dataset.crop_padding": _whole(0),
    "dataset.device_megabytes": _NOT_NEGATIVE,
    "parallel.layer_groups": _whole(1),
    "parallel.seeds": _one_of(("auto", "together", "in_turn")),
    "forward.optimizer": _one_of(OPTIMIZERS),
    "forward.learning_rate": _POSITIVE,
    "forward.rate_factors": _tuple_of(_POSITIVE),
    "forward.momentum": _SHARE,
    "forward.adam_betas": _BETAS,
    "forward.adam_epsilon": _tuple_of(_POSITIVE),
    "forward.weight_decay": _NOT_NEGATIVE,
    "forward.warmup_steps": _whole(0, LARGEST_INT32),
    "forward.schedule": _one_of(SCHEDULES),
    "forward.schedule_epochs": _whole(1),
    "forward.final_learning_rate": _NOT_NEGATIVE,
    "forward.schedule_milestones": _tuple_of(_whole(1)),
    "forward.schedule_factor": _POSITIVE,
    "feedback.iterations": _tuple_of(_whole(1), 1),
    "feedback.noise_scale": _tuple_of(_POSITIVE, 1),
    "feedback.noise_samples": _tuple_of(_whole(1), 1),
    "feedback.batch_share": _tuple_of(_number(lambda value: 0 < value <= 1, "above 0, up to 1"), 1),
    "feedback.optimizer": _one_of(OPTIMIZERS),
    "feedback.learning_rate": _tuple_of(_POSITIVE, 1),
    "feedback.momentum": _SHARE,
    "feedback.adam_betas": _BETAS,
    "feedback.adam_epsilon": _tuple_of(_POSITIVE),
    "feedback.weight_decay": _tuple_of(_NOT_NEGATIVE),
    "feedback.pretraining_epochs": _whole(0),
    "feedback.extra_epochs": _whole(0),
    "feedback.init": _one_of(("random", "symmetric")),
    "feedback.activation": _one_of(FEEDBACK_ACTIVATIONS),
    "feedback.squash": _one_of(SQUASHES),
    "feedback.shared_maxima": _one_of(SHARED_MAXIMA),
    "feedback.hidden_features": _whole(1),
    "target.iterations": _whole(1),
    "target.damping": _NOT_NEGATIVE,
    "target.tolerance": _SHARE,
    "target.scale_by_influence": _SWITCH,
    "alignment.every_epochs": _whole(0),
    "alignment.probes": _whole(2),
    "alignment.gauss_newton": _SWITCH,
}
"""By dotted key of `config.default_config()`."""

FOR_BLOCKS = {
    1: ("forward.rate_factors", "forward.adam_epsilon"),
    2: tuple(
        f"feedback.{name}"
        for name in (
            "iterations",
            "noise_scale",
            "noise_samples",
            "batch_share",
            "learning_rate",
            "adam_epsilon",
            "weight_decay",
        )
    ),
}
"""Keys with one value for all blocks or one for each, by the first block that they are for."""

FOR_LAYERS = ("feedback.iterations", "feedback.batch_share", "feedback.learning_rate")
"""Those with one value for all layers, where feedback weights are beside those of every layer."""

GROUPS = tuple({key.rpartition(".")[0]: None for key in RULES if "." in key})
"""Groups of keys."""
