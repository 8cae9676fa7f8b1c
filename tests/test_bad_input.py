"""Bad input: whatever a configuration and a command line hold, they end in a run or in one clear line."""

import functools
import json
import random
import re
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict, FieldReference, config_dict

from jaxdtp import main
from jaxdtp.configuration.allowed import GROUPS, RULES
from jaxdtp.configuration.config import default_config, flatten, resolve
from jaxdtp.configuration.optimizers import OPTIMIZERS, SCHEDULES
from jaxdtp.data import Examples
from jaxdtp.learning.algorithms import ALGORITHMS
from jaxdtp.learning.state import init_state
from jaxdtp.learning.step import feedback_step, train_step
from jaxdtp.models.blocks import ACTIVATIONS, FEEDBACK_ACTIVATIONS, INITIALIZERS, SQUASHES
from jaxdtp.models.networks import NETWORKS
from jaxdtp.models.pooling import SHARED_MAXIMA
from jaxdtp.running.build import build_network, build_preprocessing, build_settings, check_memory
from jaxdtp.running.epoch import Fixed, measure_alignment, train_steps, zero_metrics
from jaxdtp.system.errors import ConfigError

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))
DIGITS = f"--config={CONFIGS[0].with_name('digits_mlp.py')}"
DEFAULTS = flatten(default_config())
NAMES = {
    "algorithm": ALGORITHMS,
    "matmul_precision": ("float32", "tensorfloat32", "bfloat16"),
    "network.name": NETWORKS,
    "network.activation": ACTIVATIONS,
    "network.init": INITIALIZERS,
    "forward.optimizer": OPTIMIZERS,
    "forward.schedule": SCHEDULES,
    "feedback.optimizer": OPTIMIZERS,
    "feedback.init": ("random", "symmetric"),
    "feedback.activation": FEEDBACK_ACTIVATIONS,
    "feedback.squash": SQUASHES,
    "feedback.shared_maxima": SHARED_MAXIMA,
}
# Every example is a fresh network to trace; the same examples each time, so that the suite takes the same time.
FUZZ = settings(
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


class Unshowable:
    def __repr__(self):
        raise RuntimeError("no\nrepr")


class ManyLines:
    def __repr__(self):
        return "first\nsecond\rthird\u2028fourth\x1b[31m" + "x" * 1000


WHOLE = st.integers(0, 20) | st.sampled_from((10**6, 10**6 + 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**70, 10**5000))
NUMBERS = st.floats(1e-9, 0.9) | st.floats(1e-9, 0.9) | st.floats() | st.sampled_from((0, 1, 1e-30, 10**30, 10**400))
ODD = st.one_of(
    st.none() | st.booleans() | st.integers() | st.floats() | st.complex_numbers(),
    st.text(max_size=5) | st.binary(max_size=5),
    st.sampled_from((10**5000, -(10**5000), "x" * 10**5, "two\nlines", "\0", "\ud800", (1,) * 1000, 1e-300, ...)),
    st.lists(st.integers() | st.text(max_size=3) | st.none(), max_size=3),
    st.lists(st.floats() | st.booleans(), max_size=3).map(tuple),
    st.dictionaries(st.sampled_from(("name", "hidden", "a", "a b", "\n")), st.integers() | st.none(), max_size=2),
    st.sampled_from((np.int64(3), np.float32(0.5), np.bool_(True), np.str_("mlp"), np.array([1, 2]), np.zeros(()))),
    st.sampled_from((len, Unshowable(), ManyLines(), object, {1, 2}, range(3), jnp.float32)),
    st.builds(config_dict.placeholder, st.sampled_from((int, str, tuple)), required=st.booleans()),
    st.builds(FieldReference, st.integers(0, 3) | st.text(max_size=3)),
)


def plausible(key):
    """Values of the type of a key's default, many of them allowed."""
    default = DEFAULTS[key]
    if key in NAMES:
        return st.sampled_from(sorted(NAMES[key]))
    if isinstance(default, str):
        return st.text(st.characters(exclude_categories=("C", "Z")), max_size=5)
    if isinstance(default, bool):
        return st.booleans()
    if isinstance(default, tuple):
        numbers = NUMBERS if default and isinstance(default[0], float) else WHOLE
        sizes = {"min_size": len(default), "max_size": len(default) or 3}
        return st.lists(numbers, **sizes).map(tuple)
    return NUMBERS if isinstance(default, float) else WHOLE


@st.composite
def changes(draw):
    """A dotted key, and in a list the value that it gets; an empty list deletes it."""
    key = draw(st.sampled_from(sorted(RULES)))
    kind = draw(st.sampled_from(("plausible",) * 9 + ("odd", "delete", "group", "when", "whole when", "unknown")))
    if kind == "delete":
        return key, []
    value = draw(plausible(key) if kind in ("plausible", "when") else ODD)
    rule = draw(st.sampled_from((*ALGORITHMS, "nonsense")))
    keys = {
        "group": draw(st.sampled_from((*GROUPS, "when"))),
        "when": f"when.{rule}.{key}",
        "whole when": f"when.{rule}",
        "unknown": draw(st.sampled_from(("speed", "network.speed", "\n", "feedback.two\nlines", "when.bp.speed"))),
    }
    return keys.get(kind, key), [value]


def changed_config(path, changed):
    """A config file's configuration, or the default one, changed."""
    config = (main.load_config(str(path), {}) if path else default_config()).to_dict()
    for key, value in changed:
        *groups, name = key.split(".")
        group = config
        for inner in groups:
            group = group.setdefault(inner, {}) if isinstance(group, dict) else None
        if isinstance(group, dict):
            group.pop(name, None)
            if value:
                group[name] = value[0]
    return ConfigDict(config)


def assert_one_clear_line(error, changed=()):
    message = str(error)
    assert len(message.splitlines()) == 1
    assert message.isprintable()
    assert len(message) < 2500
    assert re.search(r"; allowed: \S", message), message
    if changed:
        name = message.partition(": ")[0].removeprefix("config.")
        known = (*RULES, *GROUPS, "when", *(" ".join(key.split()) for key in changed))
        assert any(name == key or name.startswith(f"{key}.") for key in known), message


def trace(config, image_shape, num_classes):
    """What a run does before its first step, up to the program of its steps."""
    with jax.enable_x64(config.float64):
        network = build_network(config, image_shape, num_classes)
        check_memory(config, network, 10**11)
        setting = build_settings(config, network, steps_per_epoch=2)
        # Loading the data checks how many there are.
        of_channels = {name: image_shape[-1] * (config.dataset[name] or (1.0,))[:1] for name in ("mean", "std")}
        preprocessing = build_preprocessing(config)._replace(**of_channels)
        key = jax.random.key(config.seed)
        state = jax.eval_shape(functools.partial(init_state, network, setting), key)
        images = jax.ShapeDtypeStruct((config.batch_size, *image_shape), jnp.uint8)
        order = jax.ShapeDtypeStruct((config.batch_size,), jnp.int32)
        batch = Examples(images, order)
        constants = network, setting, preprocessing
        for step in (train_step, feedback_step) if config.feedback.pretraining_epochs else (train_step,):
            fixed = Fixed(step, *constants, config.batch_size)
            program = jax.jit(functools.partial(train_steps, fixed))
            totals = zero_metrics(fixed)
            lowered = program.lower(batch, order, key, state, totals, 0, 1)
            after, summed, _ = lowered.out_info
            assert jax.tree.structure((after, summed)) == jax.tree.structure((state, totals))
        if config.alignment.every_epochs and setting.algorithm.paths != "none":
            options = config.alignment.probes, config.alignment.gauss_newton
            jax.jit(functools.partial(measure_alignment, *constants, *options)).lower(state, batch, key)


def outcome(path, changed, image_shape=None, num_classes=10):
    """'runs', or 'refused' with one clear line."""
    config = changed_config(path, changed)
    try:
        resolved = resolve(config)
        if image_shape:
            trace(resolved, image_shape, num_classes)
    except ConfigError as error:
        assert_one_clear_line(error, [key for key, _ in changed])
        return "refused"
    values = flatten(resolved)
    assert flatten(resolve(ConfigDict(json.loads(resolved.to_json())))) == values
    return "runs"


STARTS = st.sampled_from((None, *CONFIGS))


def test_configurations_resolve_or_are_refused():
    seen = Counter()

    @settings(FUZZ, max_examples=400)
    @given(STARTS, st.lists(changes(), min_size=1, max_size=5))
    def check(path, changed):
        seen[outcome(path, changed)] += 1

    check()
    assert min(seen["runs"], seen["refused"]) > 0.1 * seen.total()


def test_what_resolves_can_be_traced():
    seen = Counter()
    shapes = st.sampled_from(((1, 1, 1), (8, 8, 1), (5, 9, 3), (32, 32, 3), (64, 33, 2)))

    @settings(FUZZ, max_examples=30)
    @given(STARTS, st.lists(changes(), min_size=1, max_size=3), shapes, st.sampled_from((2, 10, 11)))
    def check(path, changed, image_shape, num_classes):
        seen[outcome(path, changed, image_shape, num_classes)] += 1

    check()
    assert min(seen["runs"], seen["refused"]) > 0.1 * seen.total()


def parsed(argv):
    """'runs', 'refused' with one clear line, or the exit code."""
    try:
        arguments = main.parse(["jaxdtp", *argv])
    except ConfigError as error:
        assert_one_clear_line(error)
        return "refused"
    except SystemExit as stop:
        return f"exit {stop.code}"
    assert arguments.mode in ("train", "eval")
    assert Path(arguments.config_file) in CONFIGS
    assert set(flatten(arguments.config)) == set(RULES)
    return "runs"


COMMANDS = (
    [DIGITS],
    ["--config", DIGITS.partition("=")[2], "--workdir", "runs/x", "--mode", "eval"],
    [DIGITS, "--config.seed", "3", "--config.network.hidden=(8, 8)", "--noconfig.float64", "--mode=train"],
    ["--config.feedback.iterations=1", "--config.feedback.iterations=2", DIGITS, "--config.dataset.flip"],
)
TEXTS = st.text(max_size=8) | st.sampled_from(
    (
        "",
        " ",
        "1,2",
        "(1,2",
        "[",
        "[]",
        "()",
        "{[]: 1}",
        "((" * 300,
        "9" * 5000,
        "-1",
        "0x10",
        "1e400",
        "nan",
        "é",
        "\udc80",
    )
)
TOKENS = st.one_of(
    st.sampled_from([f"--config.{key}={value}" for key, value in DEFAULTS.items() if key in RULES]),
    st.builds("--config.{}={}".format, st.sampled_from(sorted(RULES)), TEXTS),
    st.builds(
        "--config.{}".format, st.sampled_from((*sorted(RULES), *GROUPS, "when.bp.beta", "seed.x", "", "é", "\n"))
    ),
    st.builds(
        "--{}={}".format, st.sampled_from(("config", "workdir", "mode", "help", "flagfile", "undefok", "")), TEXTS
    ),
    st.sampled_from(
        ("--help", "--workdir", "--mode=fly", "--noconfig", "--noconfig.seed", "-config.seed=1", "-h", "-", "--")
    ),
    st.sampled_from((f"{DIGITS}:variant", f"{DIGITS}:", "--config=/", "--config=/dev/zero", "--config=" + "x" * 5000)),
    TEXTS,
)


@st.composite
def command_lines(draw):
    argv = list(draw(st.sampled_from(COMMANDS)))
    for token in draw(st.lists(TOKENS, min_size=1, max_size=4)):
        place = draw(st.integers(0, len(argv)))
        argv[place : place + draw(st.sampled_from((0, 0, 0, 1)))] = [token] * draw(st.sampled_from((0, 1, 1, 1, 1, 2)))
    return argv


def test_command_lines_are_understood_or_refused():
    seen = Counter()

    @settings(FUZZ, max_examples=300)
    @given(command_lines())
    def check(argv):
        result = parsed(argv)
        seen[result] += 1
        assert result != "exit 0" or any("help" in argument for argument in argv)

    check()
    assert set(seen) <= {"runs", "refused", "exit 0"}
    assert min(seen["runs"], seen["refused"]) > 0.05 * seen.total()


@pytest.mark.parametrize("argv", [["--help"], [DIGITS, "--config.seed=3", "--help", "--mode=eval"]])
def test_help(argv, capsys):
    assert parsed(argv) == "exit 0"
    printed = capsys.readouterr().out
    assert all(f"--{flag}: " in printed for flag in ("config", "workdir", "mode"))


DEFAULT = "from jaxdtp.configuration.config import default_config\nfrom ml_collections.config_dict import *\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def get_config(:", "SyntaxError: "),
        ("import nothing_of_that_name", "ModuleNotFoundError: "),
        ("", "KeyError: 'get_config'; allowed: a Python file with a function get_config"),
        ("get_config = 3", "TypeError: 'int' object is not callable"),
        ("def get_config(): return get_config()", "RecursionError: "),
        ("def get_config(): raise ValueError('two\\nlines')", "ValueError: two lines; allowed: "),
        ("raise SystemExit(3)", "SystemExit: 3; allowed: "),
        ("class Stop(BaseException):\n  def __str__(self): raise ValueError\nraise Stop", "Stop; allowed: "),
        ("# coding: nonsense", "SyntaxError: "),
        (b"\xff\xfe", "SyntaxError: "),
        ("def get_config(): return {'seed': 3}", "returns {'seed': 3}; allowed: a ConfigDict"),
        ("def get_config(): pass", "returns None; allowed: a ConfigDict"),
        (
            "from ml_collections import *\ndef get_config(): return ConfigDict()",
            "config.seeds: missing; allowed: ",
        ),
        (
            DEFAULT + "def get_config(): return FrozenConfigDict(default_config())",
            "can't set seed in what get_config of ",
        ),
        (
            DEFAULT + "def get_config():\n c = default_config()\n with c.ignore_type(): c.network = 3\n return c",
            "config.network: got 3; allowed: a group of keys",
        ),
        (
            DEFAULT + "def get_config():\n c = default_config()\n a = FieldReference(1)\n c.num_epochs = 6 // a\n"
            " a.set(0)\n return c",
            "config.num_epochs: got ZeroDivisionError: ",
        ),
        (
            DEFAULT + "def get_config(): return ConfigDict({'when': required_placeholder(int)})",
            "config.when: got ",
        ),
    ],
)
def test_config_files_that_fail(text, words, tmp_path):
    path = tmp_path / "config.py"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as error:
        main.parse(["jaxdtp", f"--config={path}", "--config.seed=3"])
    assert_one_clear_line(error.value)
    assert words in str(error.value)
    assert not list(tmp_path.glob("__pycache__"))


def test_config_files_of_the_unusual_kind(tmp_path):
    """References follow what the command line sets, a frozen configuration runs, and each file is its own."""
    texts = (
        "def get_config():\n c = default_config()\n c.forward.schedule_epochs = c.get_ref('num_epochs')\n return c",
        "def get_config(epochs): return FrozenConfigDict({**default_config(), 'num_epochs': int(epochs)})",
        "",
    )
    paths = [tmp_path / f"config{index}.txt" for index in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(DEFAULT + text)
    referring = main.parse(["jaxdtp", f"--config={paths[0]}", "--config.num_epochs=7"]).config
    assert (referring.num_epochs, referring.forward.schedule_epochs) == (7, 7)
    assert main.parse(["jaxdtp", f"--config={paths[1]}:5"]).config.num_epochs == 5
    with pytest.raises(ConfigError, match="KeyError: 'get_config'"):
        main.parse(["jaxdtp", f"--config={paths[2]}"])


def test_interrupted_while_the_config_file_is_loaded(tmp_path, capsys):
    (tmp_path / "config.py").write_text("raise KeyboardInterrupt")
    assert main.main(["jaxdtp", f"--config={tmp_path}/config.py"]) == 130
    assert len(capsys.readouterr().err.splitlines()) == 1


SMALL_NETWORKS = (
    {"network.name": "mlp", "network.hidden": ()},
    {"network.name": "mlp", "network.hidden": (1, 300)},
    {"network.name": "lenet", "network.channels": (3,), "network.hidden": (5,)},
    {"network.name": "vgg", "network.channels": (2, 4, 3), "network.hidden": ()},
)
FOR_RUNS = {key: tuple(names) for key, names in NAMES.items() if key != "network.name"} | {
    "beta": (1e-30, 0.5, 1e30),
    "seed": (0, 2**32 - 1),
    "float64": (False, True),
    "batch_size": (1, 7, 1438, 1439),
    "dataset.validation_fraction": (0.0, 0.5, 0.9999),
    "dataset.std": ((1e-30,), (0.3,)),
    "dataset.flip": (True,),
    "dataset.crop_padding": (3, 10**6),
    "forward.learning_rate": (1e-30, 0.1, 1e30),
    "forward.warmup_steps": (2**31 - 1,),
    "forward.schedule_milestones": ((), (1, 1), (10**6, 2)),
    "forward.adam_epsilon": ((1e-30,), (0.1,)),
    "feedback.noise_samples": ((1,), (3,)),
    "feedback.noise_scale": ((1e-30,), (0.1,), (1e30,)),
    "feedback.batch_share": ((1e-9,), (0.5,)),
    "feedback.pretraining_epochs": (0, 1),
    "feedback.hidden_features": (1, 30),
    "target.iterations": (1, 20),
    "target.scale_by_influence": (False, True),
    "alignment.every_epochs": (0, 1),
    "alignment.gauss_newton": (False, True),
}


def random_run(seed, directory):
    """The command line of a short run with random settings."""
    choose = random.Random(seed)
    values = dict(choose.choice(SMALL_NETWORKS))
    values |= {key: choose.choice(FOR_RUNS[key]) for key in ("algorithm", *choose.sample(sorted(FOR_RUNS), 8))}
    values |= {"feedback.iterations": (2,), "num_epochs": 1, "steps_per_epoch": 2}
    (directory / "config.py").write_text("from jaxdtp.configuration.config import default_config as get_config")
    flags = [f"--config.{key}={value}" for key, value in values.items()]
    return ["jaxdtp", f"--config={directory / 'config.py'}", *flags, f"--workdir={directory / 'run'}"]


@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=pytest.mark.slow if seed not in (0, 2, 10) else ()) for seed in range(20)]
)
def test_random_runs_end_well(seed, tmp_path, capsys):
    code = main.main(random_run(seed, tmp_path))
    errors = capsys.readouterr().err
    assert code in (0, 2, 3)
    assert "Traceback" not in errors
    assert len([line for line in errors.splitlines() if line.startswith("jaxdtp: ")]) == (code > 0), errors
