"""Several hosts, here processes of this machine: the result of one, errors that all of them tell, and no waiting."""

import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from commands import ROOT, assert_close, command, run

import jaxdtp
from jaxdtp.devices import hosts
from jaxdtp.system.errors import ConfigError

SHORT = ("--config.num_epochs=2", "--config.steps_per_epoch=3", "--config.feedback.iterations=2")


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start_hosts(count, workdir, *arguments, only=None):
    """The command on `count` hosts, each of one CPU device, that know each other by flags."""
    address = f"--coordinator=127.0.0.1:{free_port()}"
    return [
        subprocess.Popen(
            command(
                "digits_mlp",
                *SHORT,
                address,
                f"--num_processes={count}",
                f"--process_id={index}",
                f"--workdir={workdir}",
                *arguments,
            ),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"XLA_FLAGS": ""},
        )
        for index in (range(count) if only is None else only)
    ]


def finish(processes, timeout=300):
    """Exit codes, and what was printed to stdout and to stderr."""
    outputs = [process.communicate(timeout=timeout) for process in processes]
    return [process.returncode for process in processes], *zip(*outputs, strict=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The workdir of the same run on one host."""
    workdir = tmp_path_factory.mktemp("alone")
    result = run("digits_mlp", *SHORT, f"--workdir={workdir}")
    assert result.returncode == 0, result.stderr
    return workdir


@pytest.mark.parametrize(
    ("count", "arguments"),
    [
        (2, ["--config.parallel.layer_groups=2"]),
        pytest.param(2, [], marks=pytest.mark.slow),
        # Every host reads and sends its part of each batch.
        pytest.param(2, ["--config.dataset.device_megabytes=0"], marks=pytest.mark.slow),
        pytest.param(4, [], marks=pytest.mark.slow),
        pytest.param(4, ["--config.parallel.layer_groups=2"], marks=pytest.mark.slow),
    ],
)
def test_hosts_together_do_what_one_does(alone, tmp_path, count, arguments):
    codes, printed, errors = finish(start_hosts(count, tmp_path, *arguments))
    assert codes == [0] * count, errors
    assert f"{count} x cpu, {count} host(s)" in printed[0]
    assert "test accuracy" in printed[0]
    for others in printed[1:]:
        assert "epoch" not in others
    assert_close(tmp_path, alone)


@pytest.mark.slow
def test_seeds_are_divided_among_hosts(tmp_path):
    """Each host has one; they are stopped by a signal to one of them, and go on."""
    arguments = ("--config.seeds=2", "--config.feedback.learning_rate=0.02", "--config.alignment.every_epochs=1")
    assert run("digits_mlp", *SHORT, *arguments, f"--workdir={tmp_path / 'one'}").returncode == 0
    codes, printed, errors = finish(start_hosts(2, tmp_path / "two", *arguments))
    assert codes == [0, 0], errors
    assert "seeds 0, 1" in printed[0]
    processes = start_hosts(2, tmp_path / "stopped", *arguments, "--config.steps_per_epoch=0")
    for line in processes[0].stdout:
        if "compiled in" in line:
            break
    processes[1].send_signal(signal.SIGTERM)
    codes, _, errors = finish(processes)
    assert codes == [4, 4], errors
    codes, printed, errors = finish(start_hosts(2, tmp_path / "stopped", *arguments, "--config.steps_per_epoch=0"))
    assert codes == [0, 0], errors
    assert "test accuracy" in printed[0]
    for seed in (0, 1):
        ours, theirs = (jaxdtp.load(tmp_path / name, seed=seed).params for name in ("two", "one"))
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            assert np.linalg.norm(a - b) <= 1e-5 * (np.linalg.norm(b) + 1e-3)


@pytest.mark.slow
def test_a_signal_to_one_host_stops_and_saves_all(alone, tmp_path):
    processes = start_hosts(2, tmp_path, "--config.dataset.device_megabytes=0")
    for line in processes[0].stdout:
        if "compiled in" in line:
            break
    processes[1].send_signal(signal.SIGTERM)
    codes, _, errors = finish(processes)
    assert codes == [4, 4]
    assert "SIGTERM: stopped and saved" in errors[1]
    assert "a signal to another host: stopped and saved" in errors[0]
    # It goes on with another number of hosts.
    result = run("digits_mlp", *SHORT, f"--workdir={tmp_path}")
    assert result.returncode == 0, result.stderr
    assert_close(tmp_path, alone)


@pytest.mark.slow
def test_a_host_that_dies_ends_the_others_in_bounded_time(tmp_path):
    processes = start_hosts(2, tmp_path, "--config.num_epochs=1000")
    for line in processes[0].stdout:
        if "compiled in" in line:
            break
    processes[1].kill()
    began = time.monotonic()
    codes, _, errors = finish(processes)
    assert time.monotonic() - began < 200
    # Either a collective fails, or nobody notices until JAX's heartbeats end the process after 100 s.
    assert codes[0] in (hosts.LOST, -signal.SIGABRT)
    if codes[0] == hosts.LOST:
        assert "jaxdtp: lost the other hosts, or one of them failed: " in errors[0]
        assert "Traceback" not in errors[0]


@pytest.mark.slow
def test_what_one_host_cannot_do_is_told_by_all(alone, tmp_path):
    """The workdir belongs to another configuration: only the first host looks, and all end."""
    codes, _, errors = finish(start_hosts(2, alone, "--config.beta=0.25"))
    assert codes == [2, 2]
    for error in errors:
        assert "beta (there 0.5, here 0.25)" in error
        assert "Traceback" not in error
    assert "host 0: --workdir: " in errors[1]


@pytest.mark.parametrize("process", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_hosts_that_are_not_found_end_in_one_line_and_bounded_time(tmp_path, process):
    """Alone as the coordinator, or without one."""
    codes, _, (error,) = finish(start_hosts(2, tmp_path, "--connect_timeout=3", only=[process]), timeout=60)
    assert codes == [hosts.LOST]
    assert error.startswith("jaxdtp: --coordinator: can't get together with 2 hosts at 127.0.0.1:")
    assert "within 3 s (--connect_timeout); allowed: " in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("a:1", None, 0), "--num_processes: missing; allowed: --coordinator, --num_processes, --process_id together"),
        ((None, 2, 0), "--coordinator: missing"),
        (("nowhere", 2, 0), "--coordinator: got 'nowhere'; allowed: HOST:PORT"),
        (("a:99999", 2, 0), "--coordinator: got 'a:99999'"),
        (("a:80", 2, 2), "--process_id: got 2; allowed: 0 to 1"),
    ],
)
def test_contradicting_flags_are_refused(flags, words):
    with pytest.raises(ConfigError) as error:
        hosts.connect(*flags, timeout=1)
    assert words in str(error.value)


def test_slurm_tells_who_is_who(monkeypatch):
    """What Slurm sets within `srun` is all that is needed; in a batch script alone the host stays alone."""
    asked = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *arguments, **options: asked.append(arguments))
    monkeypatch.setitem(sys.modules, "libtpu", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS", raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "4")
    hosts.connect(None, None, None, timeout=5)
    assert asked == []
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    hosts.connect(None, None, None, timeout=5)
    assert asked == [(None, None, None)]
