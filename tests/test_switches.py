"""JAX's own switches: those that debug, check, and change promotion, precision and random numbers."""

import os
import subprocess

import pytest
from commands import ROOT, command, records, run

SHORT = ("--config.num_epochs=1", "--config.steps_per_epoch=3", "--config.alignment.every_epochs=1")
SAME = [
    "JAX_DEBUG_KEY_REUSE=1",
]
SAME_SLOW = [
    "JAX_NUMPY_DTYPE_PROMOTION=strict",
    "JAX_NUMPY_RANK_PROMOTION=raise",
    "JAX_DISABLE_JIT=1",
    "JAX_DEBUG_NANS=1",
    "JAX_ENABLE_X64=1",
    "JAX_DEBUG_INFS=1",
    "JAX_ENABLE_CHECKS=1",
    "JAX_CHECK_TRACER_LEAKS=1",
    "JAX_DEFAULT_MATMUL_PRECISION=bfloat16",
    "JAX_LEGACY_PRNG_KEY=error",
    "JAX_LOG_COMPILES=1",
    "JAX_EXPLAIN_CACHE_MISSES=1",
    "JAX_TRANSFER_GUARD=log",
    "JAX_SOFTMAX_CUSTOM_JVP=0",
]
OTHER_NUMBERS = ["JAX_DEFAULT_PRNG_IMPL=unsafe_rbg", "JAX_DEFAULT_PRNG_IMPL=rbg", "JAX_THREEFRY_PARTITIONABLE=0"]


def trained(switch, workdir, *arguments):
    return subprocess.run(
        command("digits_mlp", *SHORT, *arguments, f"--workdir={workdir}"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | dict([switch.split("=")]),
    )


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """The metrics of an epoch without any switch, by rule."""
    found = {}
    for rule in ("ldrl", "ldrl_fast"):
        workdir = tmp_path_factory.mktemp(rule)
        assert run("digits_mlp", *SHORT, f"--config.algorithm={rule}", f"--workdir={workdir}").returncode == 0
        found[rule] = records(workdir, ("seconds", "images_per_second"))
    return found


@pytest.mark.parametrize("rule", ["ldrl_fast", pytest.param("ldrl", marks=pytest.mark.slow)])
@pytest.mark.parametrize("switch", SAME + [pytest.param(switch, marks=pytest.mark.slow) for switch in SAME_SLOW])
def test_a_switch_leaves_the_numbers_as_they_are(usual, tmp_path, switch, rule):
    result = trained(switch, tmp_path, f"--config.algorithm={rule}")
    assert result.returncode == 0, result.stderr
    for found, expected in zip(records(tmp_path, ("seconds", "images_per_second")), usual[rule], strict=True):
        # Compiled otherwise, sums are rounded otherwise; angles near 0 are nothing but rounding.
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("switch", OTHER_NUMBERS)
def test_a_switch_that_changes_random_numbers_trains(tmp_path, switch):
    result = trained(switch, tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("platform", ["cuda", pytest.param("nonsense", marks=pytest.mark.slow)])
def test_a_platform_that_is_not_there_is_told_in_one_line(tmp_path, platform):
    result = trained(f"JAX_PLATFORMS={platform}", tmp_path)
    if result.returncode == 0:
        pytest.skip(f"{platform} is there")
    assert result.returncode == 2
    assert result.stderr.startswith(f"jaxdtp: JAX_PLATFORMS: got '{platform}' (")
    assert result.stderr.count("\n") == 1
