"""Signals, kills at any moment, damaged checkpoints, full disks, two runs in one workdir: nothing is lost."""

import contextlib
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from commands import ROOT, TIMINGS, command, final_state, records, run, short_config, start
from etils import epath
from filelock import FileLock

from jaxdtp.devices.hosts import StorageError
from jaxdtp.learning.state import TrainState
from jaxdtp.running import checkpoints, rounds, train
from jaxdtp.running.checkpoints import Checkpoint
from jaxdtp.system import lease, storage
from jaxdtp.system.errors import ConfigError
from jaxdtp.system.signals import StoppedError

# Streamed batch by batch, so that a step is a call of its own, and signals stop a run within an epoch.
SHORT = ("--config.num_epochs=2", "--config.batch_size=8", "--config.dataset.device_megabytes=0")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The workdir of a run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("whole")
    result = run("digits_mlp", *SHORT, f"--workdir={workdir}")
    assert result.returncode == 0, result.stderr
    return workdir


def assert_same_end(workdir, whole):
    jax.tree.map(np.testing.assert_array_equal, final_state(workdir), final_state(whole))
    assert records(workdir, TIMINGS) == records(whole, TIMINGS)


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR2, marks=pytest.mark.slow),
    ],
)
def test_a_signal_stops_saves_and_exits_4_and_the_run_goes_on(whole, tmp_path, number):
    process = start("digits_mlp", *SHORT, f"--workdir={tmp_path}")
    for line in process.stdout:
        if "compiled in" in line:
            break
    time.sleep(0.05)
    process.send_signal(number)
    rest = process.stdout.read()
    assert process.wait() == 4, rest
    assert f"jaxdtp: {signal.Signals(number).name}: stopped and saved after epoch " in rest
    assert "Traceback" not in rest
    assert final_state(tmp_path).step % records(whole)[0]["step"]
    result = run("digits_mlp", *SHORT, f"--workdir={tmp_path}")
    assert result.returncode == 0, result.stderr
    assert_same_end(tmp_path, whole)


@pytest.mark.parametrize("moment", ["evaluate", "write_summary"])
def test_a_signal_at_the_end_of_a_run_stops_what_would_follow(tmp_path, monkeypatch, moment):
    """After the last step, where nothing looks at signals any more; and the same command goes on from there."""
    undisturbed = getattr(train, moment)

    def disturbed(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return undisturbed(*arguments)

    config = short_config("bp", 2, num_epochs=1)
    with monkeypatch.context() as patch:
        patch.setattr(train, moment, disturbed)
        with pytest.raises(StoppedError, match="SIGTERM: stopped and saved after "):
            train.train_and_evaluate(config, tmp_path)
    assert train.train_and_evaluate(config, tmp_path)["epochs"] == 1


def test_many_may_write_one_file_at_once(tmp_path):
    path = epath.Path(tmp_path / "file")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda index: storage.write(path, str(index % 10) * 10_000), range(400)))
    assert len(path.read_text()) == 10_000
    assert len(set(path.read_text())) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_processes_where_the_system_does_not_say_when_they_began(monkeypatch):
    """As macOS, which has no /proc."""
    monkeypatch.setattr(lease, "_start_of", lambda process: None)
    ours = lease.this_process()
    assert lease.still_runs(ours)
    assert not lease.still_runs(ours | {"process": 2**22 + 1})


def test_a_call_returns_when_its_steps_are_done(tmp_path, monkeypatch):
    """How long it took says how many steps the next one has: all that are left, if it seems to have taken no time, and
    until they are done no signal is seen."""
    ready = []

    def advance(*arguments, original=rounds.advance):
        going = original(*arguments)
        ready.append(all(total.is_ready() for total in jax.tree.leaves(going.totals)))
        return going

    monkeypatch.setattr(rounds, "advance", advance)
    own = f"--config.network.module={ROOT}/tests/models.py:Slow"
    short = ("--config.algorithm=bp", "--config.num_epochs=1", "--config.steps_per_epoch=3", "--config.batch_size=128")
    result = run("digits_mlp", own, *short, f"--workdir={tmp_path}")
    assert result.returncode == 0, result.stderr
    assert ready
    assert all(ready)


@pytest.mark.slow
def test_under_nohup_a_lost_terminal_changes_nothing(whole, tmp_path):
    process = start("digits_mlp", *SHORT, f"--workdir={tmp_path}", by=["nohup"])
    for line in process.stdout:
        if "compiled in" in line:
            break
    process.send_signal(signal.SIGHUP)
    rest = process.stdout.read()
    assert process.wait() == 0, rest
    assert_same_end(tmp_path, whole)


def test_a_damaged_checkpoint_is_told_and_the_one_before_is_used(whole, tmp_path):
    workdir = tmp_path / "copy"
    shutil.copytree(whole, workdir)
    newest = max((workdir / "checkpoints").iterdir(), key=lambda path: int(path.name))
    largest = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    flip_a_bit(largest)
    result = run("digits_mlp", *SHORT, f"--workdir={workdir}")
    assert result.returncode == 0, result.stderr
    assert f"the checkpoint of step {newest.name} in " in result.stdout
    assert "is damaged, so another one is used" in result.stdout
    assert list((workdir / "damaged").glob(f"{newest.name}-*"))
    assert_same_end(workdir, whole)


def test_a_second_run_in_a_workdir_is_refused(whole):
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    with FileLock(whole / "lock"):
        result = run("digits_mlp", *SHORT, f"--workdir={whole}")
    assert result.returncode == 2
    assert result.stderr == f"jaxdtp: --workdir: {whole} is in use by another run; allowed: one run at a time\n"
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before


@contextlib.contextmanager
def room_for_files_of(size):
    """The system fails at this size of a file, in bytes, as at the end of a disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_ends_in_one_line_and_exit_5(tmp_path):
    with room_for_files_of(100_000):
        result = run("digits_mlp", *SHORT, f"--workdir={tmp_path}")
    assert result.returncode == 5, result.stderr
    assert "jaxdtp: --workdir: can't save step " in result.stderr
    assert "Traceback" not in result.stderr
    assert checkpoints.saved_steps(tmp_path) == []


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1 << random.Random(str(path)).randrange(8)
    path.write_bytes(content)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def checkpoint(step, score=0.0):
    """As small as a state can be."""
    rng = np.random.default_rng(step)
    weights = {"fc": {"kernel": rng.normal(size=(50, 30)).astype(np.float32), "bias": np.zeros(3, np.float32)}}
    return Checkpoint(
        TrainState(np.array(step, np.int32), weights, weights, {}, (), {}), score, {"seconds": float(step)}
    )


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, os.unlink])
def test_any_damage_to_any_file_is_harmless_or_found(tmp_path, capsys, damage):
    """What is restored is either what was saved, or the checkpoint before it: never anything else."""
    older, newer = checkpoint(1), checkpoint(2)
    found = 0
    whole = tmp_path / "whole"
    checkpoints.tidy(whole)
    for one in (older, newer):
        checkpoints.save(whole, one)
    files = sorted(path.relative_to(whole) for path in (whole / "checkpoints" / "2").rglob("*") if path.is_file())
    assert len(files) > 5
    for index, file in enumerate(files):
        damaged = tmp_path / f"damaged-{index}"
        shutil.copytree(whole, damaged)
        damage(damaged / file)
        restored = checkpoints.restore_newest(damaged, newer.state)
        expected = older if restored.state.step == 1 else newer
        jax.tree.map(np.testing.assert_array_equal, restored.state, expected.state)
        assert restored[1:] == expected[1:]
        fell_back = expected is older
        assert ("the checkpoint of step 2" in capsys.readouterr().out) == fell_back
        assert checkpoints.saved_steps(damaged) == ([1] if fell_back else [1, 2])
        found += fell_back
    assert found == len(files)


def test_without_an_intact_checkpoint_nothing_begins_anew(tmp_path):
    checkpoints.tidy(tmp_path)
    for step in (1, 2):
        checkpoints.save(tmp_path, checkpoint(step))
        shutil.rmtree(tmp_path / "checkpoints" / str(step) / "state")
    with pytest.raises(ConfigError, match=r"all checkpoints in .* are damaged \(steps 2, 1\); allowed: "):
        checkpoints.restore_newest(tmp_path, checkpoint(0).state)
    assert checkpoints.saved_steps(tmp_path) == [1, 2]


def test_the_newest_two_and_the_best_stay(tmp_path):
    tmp_path = epath.Path(tmp_path)
    checkpoints.tidy(tmp_path)
    for step, score in enumerate((0.5, 0.9, 0.7, -np.inf, 0.9, 0.8, 0.8), start=1):
        checkpoints.save(tmp_path, checkpoint(step, score))
    assert checkpoints.saved_steps(tmp_path) == [5, 6, 7]
    assert checkpoints.restore_best(tmp_path, checkpoint(0).state).state.step == 5
    assert checkpoints.restore_newest(tmp_path, checkpoint(0).state).state.step == 7
    # What a killed run leaves is neither counted nor kept.
    for name in ("8.orbax-checkpoint-tmp", "4.deleted"):
        (tmp_path / "checkpoints" / name).mkdir()
    assert checkpoints.saved_steps(tmp_path) == [5, 6, 7]
    checkpoints.tidy(tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["5", "6", "7"]
    with pytest.raises(ConfigError, match="holds no checkpoints"):
        checkpoints.restore_best(tmp_path / "none", checkpoint(0).state)


def test_what_cannot_be_saved_disturbs_nothing(tmp_path):
    checkpoints.tidy(tmp_path)
    checkpoints.save(tmp_path, checkpoint(1))
    refused = pytest.raises(StorageError, match=r"can't save step 2 in .*; allowed: a writable directory with room")
    with room_for_files_of(1000), refused:
        checkpoints.save(tmp_path, checkpoint(2))
    assert checkpoints.saved_steps(tmp_path) == [1]
    checkpoints.save(tmp_path, checkpoint(2))
    assert checkpoints.restore_newest(tmp_path, checkpoint(0).state).state.step == 2


KILLS = 50


def run_in_fork(arguments):
    """The command, in a process that has everything imported already."""
    from jaxdtp import main

    os.setsid()
    os.close(1)
    os.open(os.devnull, os.O_WRONLY)
    os._exit(main.main(arguments))


@pytest.mark.slow
def test_50_kills_at_random_moments(tmp_path):
    """Half of them at any moment, half as soon as a save is seen to have begun."""
    options = ("--config.num_epochs=120", "--config.steps_per_epoch=3", "--config.dataset.device_megabytes=0")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    result = run("digits_mlp", *options, f"--workdir={whole}")
    assert result.returncode == 0, result.stderr

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["jaxdtp.main"])
    arguments = ["jaxdtp", *command("digits_mlp", *options, f"--workdir={killed}")[3:]]
    seed = int(time.time())
    print(f"seed {seed}")
    generator = random.Random(seed)
    kills, inside_a_save, finished = 0, 0, False
    while kills < KILLS:
        assert not finished, f"finished after {kills} kills: too short"
        process = context.Process(target=run_in_fork, args=(arguments,))
        process.start()
        before = set(unfinished(killed))
        if kills % 2:
            deadline = time.monotonic() + 60
            while not set(unfinished(killed)) - before and process.is_alive():
                assert time.monotonic() < deadline
        else:
            process.join(generator.uniform(0, 6))
        finished = not process.is_alive() and process.exitcode == 0
        process.kill()
        process.join()
        kills += 1
        inside_a_save += bool(set(unfinished(killed)) - before)
    assert inside_a_save >= KILLS / 5
    result = run("digits_mlp", *options, f"--workdir={killed}")
    assert result.returncode == 0, result.stderr
    assert "damaged" not in result.stdout
    assert not (killed / "damaged").exists()
    assert_same_end(killed, whole)


def unfinished(workdir):
    """Directories of saves that have begun."""
    directory = workdir / "checkpoints"
    return [path.name for path in directory.iterdir() if not path.name.isdecimal()] if directory.is_dir() else []
