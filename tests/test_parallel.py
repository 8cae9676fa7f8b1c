"""Any number of devices, along either axis of the mesh, gives the result of one device."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import stand_in
from commands import assert_close, run, run_process
from hypothesis import given
from hypothesis import strategies as st

from jaxdtp.configuration.config import default_config, resolve
from jaxdtp.learning.state import init_state
from jaxdtp.running import build
from jaxdtp.running.balance import balance
from jaxdtp.system.errors import ConfigError

TRAIN = """
import functools, json, sys
import jax, numpy as np
from jax.sharding import AxisType, Mesh
from jaxdtp import data
from jaxdtp.running import build, epoch
from jaxdtp.configuration.config import default_config, resolve
from jaxdtp.devices.parallel import AXES, Parallel, divide_rows, replicate
from jaxdtp.learning.state import init_state
from jaxdtp.learning.step import train_step

algorithm, model, precision, meshes = json.loads(sys.argv[1])
own, channels = (model, ()) if isinstance(model, str) else ("", model)
config = default_config()
config.network.module = own
config.algorithm, config.batch_size, config.float64 = algorithm, 32, precision == "float64"
config.network.name, config.network.channels = "lenet" if channels else "mlp", tuple(channels)
config.network.hidden = (16,) if channels else (32, 16)
config.dataset.crop_padding = 1
config.forward.warmup_steps = 5
config.feedback.iterations, config.feedback.learning_rate = (2,), (0.02,)
config.feedback.batch_share = (0.3,)
if algorithm != "ldrl_fast":
    config.feedback.batch_share = (0.3, 1.0, 0.5) if channels else (0.3, 1.0)
config.target.scale_by_influence = algorithm == "inverse"
config = resolve(config)
with jax.enable_x64(config.float64):
    split = data.load(config.dataset, 0).train
    network = build.build_network(config, (8, 8, 1), 10)
    settings = build.build_settings(config, network, 20)
    preprocessing = build.build_preprocessing(config)
    start = init_state(network, settings, jax.random.key(0))
    order = np.random.default_rng(0).permutation(len(split.rows))[: 20 * 32].astype(np.int32)
    results = []
    for sizes, owners in meshes:
        devices = np.array(jax.devices()[: sizes[0] * sizes[1]]).reshape(sizes)
        mesh = Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 2)
        # With layers the first block is trained, too.
        owners = [0] * (bool(owners) and settings.algorithm.paths == "layers") + owners
        here = settings._replace(parallel=Parallel(mesh, tuple(owners)))
        fixed = epoch.Fixed(train_step, network, here, preprocessing, 32)
        examples = data.Examples(*(divide_rows(mesh, array, split.rows) for array in split[:2]))
        totals = epoch.zero_metrics(fixed)
        placed = replicate(mesh, (order, jax.random.key(1), start, totals))
        program = jax.jit(functools.partial(epoch.train_steps, fixed))
        state, totals, done = program(examples, *placed, 0, 20)
        assert int(done) == 20
        results.append([np.asarray(leaf) for leaf in jax.tree.leaves((state.forward, state.feedback, state.model))])
distances = [
    max(float(np.linalg.norm(a - b) / np.linalg.norm(a)) for a, b in zip(results[0], other, strict=True) if a.any())
    for other in results
]
initial = jax.tree.leaves((start.forward, start.feedback, start.model))
moved = [float(np.linalg.norm(a - np.asarray(b))) for a, b in zip(results[0], initial, strict=True)]
print(json.dumps([distances, moved]))
"""

ALONE = [(1, 1), ()]
MESHES = [ALONE, [(8, 1), ()], [(3, 1), ()], [(1, 2), (0, 1, 0)], [(2, 3), (2, 0, 1)]]


def distances(algorithm, model, precision, meshes):
    """The largest relative distance of any parameter, after 20 steps on each mesh, to those of the first mesh."""
    environment = stand_in.environment() | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    script = [sys.executable, "-c", TRAIN, json.dumps([algorithm, model, precision, meshes])]
    result = subprocess.run(script, capture_output=True, text=True, env=environment, timeout=600)
    assert result.returncode == 0, result.stderr
    found, moved = json.loads(result.stdout)
    assert max(moved) > 1e-2
    return found


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("algorithm", "channels", "precision", "limit"),
    [
        ("ldrl", (), "float32", 1e-5),
        pytest.param("ldrl", (8, 8), "float32", 1e-5, marks=slow),
        pytest.param("ldrl", (8, 8), "float64", 1e-12, marks=slow),
        pytest.param("ldrl_fast", (8, 8), "float32", 1e-5, marks=slow),
        pytest.param("ldrl_fast", (8, 8), "float64", 1e-12, marks=slow),
        pytest.param("dtpdrl", (8, 8), "float32", 1e-5, marks=slow),
        pytest.param("ddtp_rhl", (8, 8), "float32", 1e-5, marks=slow),
        pytest.param("inverse", (8, 8), "float64", 1e-12, marks=slow),
    ],
)
def test_parameters_are_the_same_on_any_mesh(algorithm, channels, precision, limit):
    meshes = MESHES if channels else [ALONE, [(8, 1), ()], [(3, 2), (0, 1)]]
    assert max(distances(algorithm, channels, precision, meshes)) < limit


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "precision", "limit"),
    [("ldrl_fast", "float64", 1e-12), ("bp", "float32", 1e-5)],
)
def test_batch_statistics_are_those_of_the_whole_batch(algorithm, precision, limit):
    """Of a Flax model with BatchNorm."""
    model = f"{Path(__file__).parent}/models.py:DenseNet"
    assert max(distances(algorithm, model, precision, [ALONE, [(8, 1), ()]])) < limit


@pytest.mark.slow
def test_parameters_are_the_same_on_any_number_of_devices():
    meshes = [ALONE, *([(count, 1), ()] for count in range(2, 9))]
    assert max(distances("ldrl", (8, 8), "float32", meshes)) < 1e-5


@pytest.mark.slow
def test_backprop_is_the_same_on_any_number_of_devices():
    assert max(distances("bp", (8, 8), "float32", [ALONE, [(8, 1), ()], [(5, 1), ()]])) < 1e-5


@pytest.mark.slow
def test_the_command_on_many_devices_with_layers_in_groups(tmp_path):
    """By the command, and continued on another machine: 4 devices, then 3, then 1."""
    short = ("--config.steps_per_epoch=5", "--config.batch_size=32")
    alone = run("digits_mlp", *short, "--config.num_epochs=3", f"--workdir={tmp_path / 'alone'}")
    assert alone.returncode == 0, alone.stderr
    many = run_process(
        "digits_mlp",
        *short,
        "--config.num_epochs=3",
        "--config.parallel.layer_groups=2",
        f"--workdir={tmp_path / 'many'}",
        devices=4,
    )
    assert many.returncode == 0, many.stderr
    assert "4 x cpu" in many.stdout
    assert "feedback by groups: fc" in many.stdout
    assert_close(tmp_path / "many", tmp_path / "alone")
    # It may go on elsewhere.
    again = run("digits_mlp", *short, "--config.num_epochs=3", f"--workdir={tmp_path / 'many'}")
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize(
    ("algorithm", "groups", "words"),
    [
        ("ldrl", 3, "config.parallel.layer_groups: got 3; allowed: up to 2, the blocks whose feedback ldrl trains"),
        ("bp", 2, "config.parallel.layer_groups: got 2; allowed: up to 1, the blocks whose feedback bp trains"),
        ("ldrl", 2, "config.parallel.layer_groups: got 2; allowed: 1, which divide the 1 devices"),
    ],
)
def test_impossible_groups_are_refused(algorithm, groups, words):
    config = default_config()
    config.algorithm, config.parallel.layer_groups = algorithm, groups
    config = resolve(config)
    network = build.build_network(config, (8, 8, 1), 10)
    settings = build.build_settings(config, network, steps_per_epoch=1)
    with pytest.raises(ConfigError) as error:
        build.build_parallel(config, network, settings, init_state(network, settings, jax.random.key(0)))
    assert str(error.value) == words


@given(st.lists(st.floats(0, 100), min_size=1, max_size=7), st.integers(1, 4))
def test_groups_are_balanced(costs, groups):
    """Every job has a group, and the most loaded one has at most 4/3 of the best possible (Graham 1969)."""
    owners = balance(costs, groups)
    assert len(owners) == len(costs)

    def largest(owners):
        return max(
            sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == group) for group in range(groups)
        )

    best = min(largest(choice) for choice in itertools.product(range(groups), repeat=len(costs)))
    assert largest(owners) <= 4 / 3 * best * (1 + 1e-9)
