"""Running the command as a user does, and reading what it leaves behind."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxdtp import data, main
from jaxdtp.configuration.config import default_config, resolve
from jaxdtp.learning.state import init_state
from jaxdtp.running import checkpoints
from jaxdtp.running.build import build_network, build_settings, steps_in_epoch

ROOT = Path(__file__).parents[1]
TIMINGS = ("seconds", "images_per_second")


def command(config, *arguments):
    """By the configuration's own rule alone, unless told otherwise."""
    return [
        *(sys.executable, "-m", "jaxdtp.main", f"--config={ROOT}/configs/{config}.py", "--config.beside=()"),
        *arguments,
    ]


def run(config, *arguments, cwd=ROOT):
    """The command within this process, which has everything imported: its exit code, and what it prints."""
    line, out, errors = command(config, *arguments)[2:], io.StringIO(), io.StringIO()
    with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        code = main.main(line)
    return subprocess.CompletedProcess(line, code, out.getvalue(), errors.getvalue())


def run_process(config, *arguments, cwd=ROOT, devices=1):
    """The command as a user starts it."""
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    return subprocess.run(
        command(config, *arguments), cwd=cwd, capture_output=True, text=True, timeout=300, env=environment
    )


def start(config, *arguments, by=()):
    """The command, running, compiled as within this process; its output is read from `process.stdout`."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*by, *command(config, *arguments)], cwd=ROOT, **pipes)


def short_config(rule, steps, **changes):
    """Two epochs of a small network on the digits, measured after each; `changes` by key, with __ for the point."""
    config = default_config()
    config.algorithm, config.num_epochs, config.steps_per_epoch, config.batch_size = rule, 2, steps, 32
    config.network.hidden, config.trackers, config.alignment.every_epochs = (16, 12), (), 1
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return config


def records(workdir, without=()):
    """The epochs of metrics.jsonl, without some of their keys."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in without} for line in lines]


def final_state(workdir):
    """The arrays of the latest checkpoint."""
    config = default_config()
    with config.ignore_type():
        config.update_from_flattened_dict(json.loads((workdir / "config.json").read_text()))
    config = resolve(config)
    dataset = data.load(config.dataset, config.seed)
    network = build_network(config, dataset.train.images.shape[1:], len(dataset.classes))
    like = init_state(network, build_settings(config, network, steps_in_epoch(config, dataset)), jax.random.key(0))
    return checkpoints.restore_newest(workdir, like).state


def assert_close(workdir, reference):
    """Parameters agree to a relative distance of 1e-5, and metrics nearly so."""
    states = [final_state(directory) for directory in (workdir, reference)]
    ours, theirs = (jax.tree.leaves((state.forward, state.feedback)) for state in states)
    for a, b in zip(ours, theirs, strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)
    for a, b in zip(records(workdir, TIMINGS), records(reference, TIMINGS), strict=True):
        assert a == pytest.approx(b, rel=1e-3)
