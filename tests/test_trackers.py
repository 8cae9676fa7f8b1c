"""Metrics also go where the configuration says, and nothing that happens there is worth a run."""

import json

import pytest
from commands import run

SHORT = ("--config.num_epochs=2", "--config.steps_per_epoch=3")
OWN = """
import json
from jaxdtp.results.trackers import Tracker

def to_file(config, workdir, records):
    path = workdir / "own.jsonl"
    def write(values):
        with open(path, "a") as file:
            file.write(json.dumps(values) + "\\n")
    write({"algorithm": config.algorithm, "before": len(records)})
    return Tracker(write, write)

def failing(config, workdir, records):
    def log(record):
        raise ConnectionError("the server is gone")
    return Tracker(log, log)

def closed(config, workdir, records):
    raise PermissionError("no key")
"""


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return path


def train(workdir, tracker, *arguments):
    return run("digits_mlp", *SHORT, f"--config.trackers=('{tracker}',)", *arguments, f"--workdir={workdir}")


def test_a_tracker_of_ones_own_gets_every_epoch_and_the_summary(own, tmp_path):
    workdir = tmp_path / "run"
    result = train(workdir, f"{own}:to_file")
    assert result.returncode == 0, result.stderr
    first, *epochs, summary = map(json.loads, (workdir / "own.jsonl").read_text().splitlines())
    assert first == {"algorithm": "ldrl", "before": 0}
    assert epochs == [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert summary == json.loads((workdir / "summary.json").read_text())
    assert not (workdir / "tensorboard").exists()


def test_a_tracker_that_fails_stops_nothing(own, tmp_path):
    result = train(tmp_path / "run", f"{own}:failing")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("failed, training goes on without it: ConnectionError: the server is gone") == 1


@pytest.mark.parametrize(
    ("tracker", "words"),
    [
        ("{own}:closed", "can't open '{own}:closed' (PermissionError: no key); allowed: tensorboard, wandb, mlflow"),
        ("{own}:nothing", "can't open '{own}:nothing' (ValueError: got 'nothing', which "),
        ("nothing", "can't open 'nothing' (ValueError: "),
    ],
)
def test_a_tracker_that_is_not_there_is_told_before_training(own, tmp_path, tracker, words):
    result = train(tmp_path / "run", tracker.format(own=own))
    assert result.returncode == 2
    assert f"config.trackers: {words.format(own=own)}" in result.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").read_text()


def test_weights_and_biases_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    result = train(tmp_path, "wandb")
    assert result.returncode == 0, result.stderr
    (written,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    assert (tmp_path / "wandb.id").read_text() in written.name


def test_mlflow_in_a_local_store(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    workdir = tmp_path / "run"
    for longer in ((), ("--config.num_epochs=3",)):
        result = train(workdir, "mlflow", *longer)
        assert result.returncode == 0, result.stderr
    client = mlflow.MlflowClient(f"file://{tmp_path}/mlruns")
    found = client.get_run((workdir / "mlflow.id").read_text())
    assert found.data.params["algorithm"] == "ldrl"
    assert found.data.metrics["test_accuracy"] == json.loads((workdir / "summary.json").read_text())["test_accuracy"]
    assert len(client.get_metric_history(found.info.run_id, "train_loss")) == 3
