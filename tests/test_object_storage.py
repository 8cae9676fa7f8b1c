"""Runs and data on object storage: S3 and GCS as served on the loopback address by `stores.py`."""

import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import stand_in
import stores
from commands import ROOT, TIMINGS, command, final_state, records, run, start
from etils import epath

import jaxdtp
from jaxdtp import data
from jaxdtp.configuration.config import default_config, resolve
from jaxdtp.running import checkpoints
from jaxdtp.system import lease, storage
from jaxdtp.system.errors import ConfigError
from jaxdtp.system.places import place

SHORT = ("--config.num_epochs=3", "--config.steps_per_epoch=5", "--config.network.hidden=(16, 12)")


@pytest.fixture(scope="module")
def environments():
    """Two servers, and what their clients need, which this process has, too."""
    servers, environment = zip(*(stores.start(kind) for kind in ("s3", "gs")), strict=True)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (environment[0] | environment[1]).items():
            patch.setenv(name, value)
        yield environment
    for server in servers:
        server.kill()


@pytest.fixture(params=["s3", "gs"])
def bucket(request, environments, tmp_path):
    """A directory of its own on each kind of storage."""
    return place(f"{request.param}://{stores.BUCKET}/{tmp_path.name}", "here")


def kill_and_continue(workdir, moments, *arguments):
    """SIGKILL so many seconds after the first record, or the start, each time, then to the end."""
    for moment in moments:
        process = start("digits_mlp", *arguments, f"--workdir={workdir}")
        if moment is None:
            while process.poll() is None and not (workdir / "metrics.jsonl").exists():
                time.sleep(0.05)
        else:
            time.sleep(moment)
        process.kill()
        process.wait()
        process.stdout.close()
    return run("digits_mlp", *arguments, f"--workdir={workdir}")


def assert_same(workdir, reference):
    assert records(workdir, TIMINGS) == records(reference, TIMINGS)
    jax.tree.map(np.testing.assert_array_equal, final_state(workdir), final_state(reference))


def test_a_killed_run_goes_on_as_on_a_disk(bucket, tmp_path, monkeypatch):
    assert run("digits_mlp", *SHORT, f"--workdir={tmp_path}/disk").returncode == 0
    monkeypatch.chdir(tmp_path)
    result = kill_and_continue(bucket / "run", [None], *SHORT)
    assert result.returncode == 0, result.stderr
    assert_same(bucket / "run", tmp_path / "disk")
    files = {str(path.relative_to(bucket / "run")) for path in storage.files(bucket / "run")}
    names = {"config.json", "data.json", "metrics.jsonl", "summary.json", "plots/accuracy.png", "plots/loss.png"}
    assert names | {"checkpoints/15/about.json"} <= files
    assert any(name.startswith("tensorboard/events.out.tfevents") for name in files)
    assert not any(name.startswith("claims/") for name in files)
    assert os.listdir(tmp_path) == ["disk"]

    assert run("digits_mlp", *SHORT, "--mode=eval", f"--workdir={bucket}/run").returncode == 0
    # As a Path writes it.
    trained = jaxdtp.load(Path(str(bucket / "run")))
    assert trained.step in (5, 10, 15)
    exported = jaxdtp.export(trained, str(bucket / "net.msgpack"))
    local = jaxdtp.export(jaxdtp.load(tmp_path / "disk"), tmp_path / "net.msgpack")
    assert exported.read_bytes() == local.read_bytes()


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again(bucket, tmp_path):
    """Before, during and after saves: 12 kills within the first 6 seconds, from a fixed seed."""
    longer = ("--config.num_epochs=12", *SHORT[1:])
    assert run("digits_mlp", *longer, f"--workdir={tmp_path}/disk").returncode == 0
    rng = random.Random(0)
    result = kill_and_continue(bucket / "run", [2 + 4 * rng.random() for _ in range(12)], *longer)
    assert result.returncode == 0, result.stderr
    assert_same(bucket / "run", tmp_path / "disk")


def test_a_configuration_on_object_storage(bucket):
    text = (ROOT / "configs" / "digits_mlp.py").read_text()
    (bucket / "mine.py").write_text(text)
    line = [*command("digits_mlp", *SHORT)[2:], f"--config={bucket}/mine.py", f"--workdir={bucket}/run"]
    assert jaxdtp.main.main(line) == 0
    with pytest.raises(ConfigError, match=r"--config: got '.*/none.py'; allowed: a configuration file"):
        jaxdtp.main.load_config(f"{bucket}/none.py", {})


def other_lease(bucket, **others):
    """A lease of a process that is not this one."""
    path = bucket / "claims" / "other.json"
    path.write_text(json.dumps(lease.this_process() | {"beat": 0} | others))
    return path


def test_only_one_run_has_a_directory(bucket, monkeypatch, capsys):
    monkeypatch.setattr(lease, "PATIENCE_SECONDS", 1.5)
    with lease.hold(bucket) as ours:
        assert ours()
        # This very process, which lives.
        with pytest.raises(lease.InUseError, match=f"process {os.getpid()} on "), lease.hold(bucket):
            pass
        assert ours()
    assert storage.inside(bucket / "claims") == []
    # A process of this machine that has died: at once.
    other = other_lease(bucket, process=2**22 + 1, start="1")
    with lease.hold(bucket):
        assert not other.exists()
    other = other_lease(bucket, start="1")  # of another process with this one's number
    with lease.hold(bucket):
        assert not other.exists()
    assert "waiting" not in capsys.readouterr().out
    # Of another machine: once it hasn't been renewed for a while.
    other = other_lease(bucket, host="elsewhere")
    with lease.hold(bucket):
        assert not other.exists()
    assert "waiting up to 2 s for a sign of life of process" in capsys.readouterr().out
    other = other_lease(bucket, host="elsewhere")
    renewal = threading.Timer(
        0.5, other.write_text, [json.dumps(lease.this_process() | {"beat": 1, "host": "elsewhere"})]
    )
    renewal.start()
    with pytest.raises(lease.InUseError, match="on elsewhere"), lease.hold(bucket):
        pass
    renewal.join()
    assert [path.name for path in storage.inside(bucket / "claims")] == ["other.json"]


def test_a_lease_that_is_renewed_while_it_is_read():
    """As s3fs tells it."""
    answers = [OSError(16, "expired"), OSError(16, "expired"), '{"beat": 3}']

    def read_text():
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    assert lease._read(SimpleNamespace(read_text=read_text)) == {"beat": 3}


def test_leases_are_renewed_until_they_are_taken_away(bucket, monkeypatch):
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.1)
    with lease.hold(bucket) as ours:
        (own,) = storage.inside(bucket / "claims")
        first = lease._read(own)
        while lease._read(own) == first:
            time.sleep(0.05)
        own.unlink()
        time.sleep(0.5)
        assert not ours()


def test_a_run_in_use_and_one_that_was_taken_over_are_told(bucket, tmp_path):
    (tmp_path / "thief.py").write_text(
        "from jaxdtp.results.trackers import Tracker\n\n\n"
        "def steal(config, workdir, records):\n"
        "    return Tracker(lambda record: (workdir / 'claims').rmtree(), lambda summary: None)\n"
    )
    thief = f"--config.trackers=('{tmp_path}/thief.py:steal',)"
    result = run("digits_mlp", *SHORT, thief, f"--workdir={bucket}/run")
    assert result.returncode == 5
    assert f"another run has taken over {bucket}/run" in result.stderr
    assert result.stderr.count("\n") == 1
    assert checkpoints.saved_steps(bucket / "run") == [5]
    with lease.hold(bucket / "run"):
        result = run("digits_mlp", *SHORT, f"--workdir={bucket}/run")
    assert result.returncode == 2
    assert "is in use by another run (process " in result.stderr
    assert run("digits_mlp", *SHORT, f"--workdir={bucket}/run").returncode == 0


def test_half_of_a_checkpoint_is_none(bucket):
    assert run("digits_mlp", *SHORT, f"--workdir={bucket}/run").returncode == 0
    workdir, steps = bucket / "run", checkpoints.saved_steps(bucket / "run")
    newest = workdir / "checkpoints" / "15"
    for path in storage.files(newest):
        if path.name != checkpoints.ABOUT:
            target = workdir / "checkpoints" / "20" / path.relative_to(newest)
            target.write_bytes(path.read_bytes())
    assert checkpoints.saved_steps(workdir) == steps
    checkpoints.tidy(workdir)
    assert not storage.files(workdir / "checkpoints" / "20")
    # A whole one that is damaged is moved aside.
    damaged = next(path for path in storage.files(newest) if path.name == "manifest.ocdbt")
    damaged.write_bytes(damaged.read_bytes()[:-1])
    result = run("digits_mlp", *SHORT, f"--workdir={workdir}")
    assert result.returncode == 0
    assert "the checkpoint of step 15" in result.stdout
    (aside,) = storage.inside(workdir / "damaged")
    assert aside.name.startswith("15-")
    assert checkpoints.saved_steps(workdir)[-1] == 15


def test_data_that_cannot_be_reached_are_told(environments, tmp_path):
    for name in ("folder", "npz", "mnist"):
        for scheme in ("s3", "gs"):
            config = default_config()
            config.dataset.name, config.dataset.data_dir = name, f"{scheme}://no-such-bucket/data"
            with pytest.raises(ConfigError, match=r"config.dataset.(data_dir|name): .*no-such-bucket"):
                data.load(resolve(config).dataset, seed=0)


def process(environment, *arguments):
    """The command in a process of its own with another environment."""
    line = command("digits_mlp", *SHORT, *arguments)
    return subprocess.run(line, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("environment", "workdir", "words"),
    [
        ({}, "s3://no-such-bucket/run", "can't write to s3://no-such-bucket/run (The specified bucket does not exist"),
        ({}, "gs://no-such-bucket/run", "can't write to gs://no-such-bucket/run ("),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "s3://bucket/run", "can't write to s3://bucket/run (Could not"),
        (
            {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_EC2_METADATA_DISABLED": "true"},
            "s3://bucket/run",
            "can't write to s3://bucket/run (Unable to locate credentials",
        ),
        pytest.param(
            {"STORAGE_EMULATOR_HOST": "http://127.0.0.1:9"},
            "gs://bucket/run",
            "can't write to gs://bucket/run (Cannot connect",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_storage_that_cannot_be_used_is_told_in_one_line(environments, environment, workdir, words):
    result = process(environment, f"--workdir={workdir}")
    assert result.returncode == 2, result.stderr
    assert words in result.stderr
    assert result.stderr.count("\n") == 1, result.stderr


@pytest.mark.parametrize("kind", ["s3", pytest.param("gs", marks=pytest.mark.slow)])
def test_a_server_that_dies_ends_the_run_with_one_line(kind, tmp_path):
    server, environment = stores.start(kind)
    (tmp_path / "killer.py").write_text(
        "import os\n\nfrom jaxdtp.results.trackers import Tracker\n\n\n"
        "def kill(config, workdir, records):\n"
        f"    return Tracker(lambda record: os.kill({server.pid}, 9), lambda summary: None)\n"
    )
    result = process(environment, f"--config.trackers=('{tmp_path}/killer.py:kill',)", f"--workdir={kind}://bucket/run")
    server.wait()
    assert result.returncode == 5, result.stderr
    assert "allowed: a writable directory with room" in result.stderr
    assert result.stderr.count("\n") == 1, result.stderr


def test_data_and_their_cache(bucket, tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    examples = [(rng.integers(0, 256, (6, 5, 3), np.uint8), index % 7) for index in range(20)]
    encoded = [(stand_in.png(image), label) for image, label in examples]
    stand_in.write_tfds(tmp_path / "tfds", "tiny", {"train": encoded, "test": encoded[:10]}, (6, 5, 3), 7)
    for path in storage.files(epath.Path(tmp_path / "tfds")):
        (bucket / "tfds" / path.relative_to(tmp_path / "tfds")).write_bytes(path.read_bytes())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "here"))

    def load():
        config = default_config()
        config.dataset.name, config.dataset.data_dir = "tiny", str(bucket / "tfds")
        config.dataset.cache_dir = str(bucket / "cache")
        test = data.load(resolve(config).dataset, seed=0).test
        np.testing.assert_array_equal(test.images, [image for image, _ in examples[:10]])
        np.testing.assert_array_equal(test.labels, [label for _, label in examples[:10]])

    load()
    cached = storage.files(bucket / "cache")
    assert {path.name for path in cached} == {"images.npy", "labels.npy", "index.json"}
    # Another machine copies what has been decoded.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "there"))
    monkeypatch.setattr(data.stored, "_decode", None)
    load()
    monkeypatch.undo()
    # Unless it is damaged, or half of it is there.
    for spoil in (lambda path: path.write_bytes(path.read_bytes()[:-1]), lambda path: path.unlink()):
        for path in cached:
            spoil(path)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"elsewhere{spoil.__code__.co_firstlineno}"))
        load()


def test_a_folder_of_pictures_and_a_file_of_numpy(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    images = np.random.default_rng(0).integers(0, 256, (12, 6, 5, 3), np.uint8)
    for index, image in enumerate(images):
        (bucket / "pictures" / "ab"[index % 2] / f"{index:02}.png").write_bytes(stand_in.png(image))
    np.savez(tmp_path / "mine.npz", x=images, y=np.arange(12) % 2)
    (bucket / "mine.npz").write_bytes((tmp_path / "mine.npz").read_bytes())
    by_class = [*range(0, 12, 2), *range(1, 12, 2)]
    for name, place_of, order in (("folder", "pictures", by_class), ("npz", "mine.npz", range(12))):
        config = default_config()
        config.dataset.name, config.dataset.data_dir, config.dataset.test_split = name, f"{bucket}/{place_of}", "train"
        test = data.load(resolve(config).dataset, seed=0).test
        np.testing.assert_array_equal(test.images, images[list(order)])
        np.testing.assert_array_equal(test.labels, np.array(order) % 2)


def test_names_of_places(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert place("~/run", "--workdir") == epath.Path(tmp_path / "run")
    assert place("file:///tmp/run", "--workdir") == epath.Path("/tmp/run")
    assert str(place("S3://bucket/run", "--workdir")) == "s3://bucket/run"
    for name in ("ftp://host/run", "s3://", "gs:///", "hdfs://host/run", "http:/host"):
        with pytest.raises(ConfigError, match=r"--workdir: got '.*'; allowed: a local path, gs://BUCKET/..., s3://"):
            place(name, "--workdir")
    place_it = "from jaxdtp.system.places import place; place('s3://b/run', '--workdir')"
    hidden = f"import sys; sys.modules['s3fs'] = None; {place_it}"
    result = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True, timeout=60)
    assert "the package s3fs is missing; allowed: a local path, or pip install s3fs" in result.stderr
