"""A run goes on for longer, and its workdir knows its configuration."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import ROOT, TIMINGS, final_state, records, run
from filelock import FileLock

import jaxdtp
from jaxdtp import main
from jaxdtp.system.places import cache_home

SHORT = ("--config.steps_per_epoch=10",)


def summary(workdir):
    values = json.loads((workdir / "summary.json").read_text())
    return {name: value for name, value in values.items() if name not in TIMINGS}


def test_training_longer_is_a_straight_run(tmp_path, capsys):
    """From the workdir alone; the checkpoint of the second epoch isn't one of the straight run's."""
    straight, longer = tmp_path / "straight", tmp_path / "longer"
    often = ("--config.checkpoint_every_epochs=3", "--config.alignment.every_epochs=2")
    result = run("digits_mlp", *SHORT, *often, "--config.num_epochs=5", f"--workdir={straight}")
    assert result.returncode == 0, result.stderr
    result = run("digits_mlp", *SHORT, *often, "--config.num_epochs=2", f"--workdir={longer}")
    assert result.returncode == 0, result.stderr
    assert main.main(["jaxdtp", f"--workdir={longer}", "--config.num_epochs=5"]) == 0
    jax.tree.map(np.testing.assert_array_equal, final_state(longer), final_state(straight))
    assert records(longer, TIMINGS) == records(straight, TIMINGS)
    assert summary(longer) == summary(straight)
    assert (longer / "config.json").read_text() == (straight / "config.json").read_text()

    capsys.readouterr()
    assert main.main(["jaxdtp", f"--workdir={longer}", "--mode=eval"]) == 0
    assert f"test accuracy {summary(longer)['test_accuracy']:.2%}" in " ".join(capsys.readouterr().out.split())

    before = (longer / "config.json").read_text()
    assert main.main(["jaxdtp", f"--workdir={longer}", "--config.num_epochs=4"]) == 2
    assert "config.num_epochs: got 4; allowed: 5 or more, which the run in " in capsys.readouterr().err
    assert main.main(["jaxdtp", f"--workdir={longer}", "--config.beta=0.1"]) == 2
    assert "belongs to a run with another configuration: beta (there " in capsys.readouterr().err
    assert (longer / "config.json").read_text() == before


def test_measuring_and_saving_may_change(tmp_path):
    arguments = ("digits_mlp", *SHORT, f"--workdir={tmp_path}")
    assert run(*arguments, "--config.num_epochs=1").returncode == 0
    more = ("--config.num_epochs=2", "--config.alignment.every_epochs=1", "--config.checkpoint_every_epochs=5")
    result = run(*arguments, *more)
    assert result.returncode == 0, result.stderr
    first, second = records(tmp_path)
    assert not any(name.startswith("update_angle/") for name in first)
    assert any(name.startswith("update_angle/") for name in second)


def test_a_workdir_without_a_run_is_told(tmp_path, capsys):
    assert main.main(["jaxdtp", f"--workdir={tmp_path}"]) == 2
    assert f"--config: there is no run in {tmp_path} yet; allowed: a configuration file" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("[")
    assert main.main(["jaxdtp", f"--workdir={tmp_path}", "--mode=eval"]) == 2
    assert "config.json: can't be read" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"beta": 0.1}')
    assert main.main(["jaxdtp", f"--workdir={tmp_path}", f"--config={ROOT}/configs/digits_mlp.py"]) == 2
    assert "belongs to a run with another configuration" in capsys.readouterr().err


def test_rules_beside_each_other_are_one_command(tmp_path, capsys):
    """All go on for longer from the workdir alone; the summary stays that of the configuration's own rule."""
    config = f"--config={ROOT}/configs/digits_mlp.py"
    assert main.main(["jaxdtp", config, *SHORT, "--config.num_epochs=1", f"--workdir={tmp_path}"]) == 0
    assert main.main(["jaxdtp", f"--workdir={tmp_path}", "--config.num_epochs=2"]) == 0
    told = capsys.readouterr().out
    for rule, workdir in (("ldrl", tmp_path), *((rule, tmp_path / "beside" / rule) for rule in ("ldrl_fast", "bp"))):
        assert json.loads((workdir / "config.json").read_text())["algorithm"] == rule
        assert summary(workdir)["epochs"] == 2
        accuracy = f"{summary(workdir)['test_accuracy']:.2%}"
        assert f"{rule} test accuracy {accuracy}" in " ".join(told.split())
    assert (tmp_path / "plots" / "beside.png").read_bytes().startswith(b"\x89PNG")

    # Whoever asks for a rule gets that one.
    alone = tmp_path / "alone"
    assert (
        main.main(["jaxdtp", config, *SHORT, "--config.num_epochs=1", "--config.algorithm=fa", f"--workdir={alone}"])
        == 0
    )
    assert not (alone / "beside").exists()


def test_a_refused_command_changes_nothing(tmp_path):
    """Neither what a workdir knows of its run, nor which rules it will train beside it."""
    pixels = np.random.default_rng(0).integers(0, 255, (60, 8, 8), np.uint8)
    for name, classes in (("mine", 3), ("others", 4)):
        np.savez(tmp_path / f"{name}.npz", x_train=pixels, y_train=np.arange(60) % classes)
    (tmp_path / "config.py").write_text(
        "from jaxdtp import default_config\n"
        "def get_config():\n"
        "    config = default_config()\n"
        "    config.algorithm, config.beside, config.num_epochs, config.batch_size = 'bp', ('fa',), 1, 16\n"
        "    config.network.hidden, config.dataset.name = (8,), 'npz'\n"
        f"    config.dataset.data_dir = '{tmp_path}/mine.npz'\n"
        "    return config\n"
    )
    workdir = tmp_path / "run"

    def code(*arguments):
        return main.main(["jaxdtp", f"--workdir={workdir}", *arguments])

    mine = f"--config={tmp_path}/config.py"
    assert code(mine, "--config.algorithm=bp") == 0
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    assert code(mine, "--config.batch_size=20") == 2
    for mode in ("train", "eval"):
        assert code(f"--mode={mode}", f"--config.dataset.data_dir={tmp_path}/others.npz") == 2
    with FileLock(workdir / "lock"):
        assert code(mine) == 2
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before
    assert code() == 0


def test_a_model_that_has_changed_since_is_told(tmp_path, capsys):
    """Its checkpoints aren't damaged, and stay where they are."""
    model = tmp_path / "own.py"
    line = "import flax.linen as nn\ndef net():\n    return nn.Sequential([lambda x: x.reshape(len(x), -1), {}])\n"
    model.write_text(line.format("nn.Dense(8), nn.Dense(10)"))
    short = ["jaxdtp", f"--workdir={tmp_path}/run", *SHORT]
    config = [f"--config={ROOT}/configs/digits_mlp.py", f"--config.network.module={model}:net"]
    assert main.main([*short, *config, "--config.algorithm=bp", "--config.num_epochs=1"]) == 0
    for layers, words in (
        ("nn.Dense(16), nn.Dense(10)", "there float32[64, 8], here float32[64, 16]"),
        ("nn.Dense(8, param_dtype='float16'), nn.Dense(10)", "there float32[64, 8], here float16[64, 8]"),
        ("nn.Dense(8), nn.Dense(8), nn.Dense(10)", "layers_3/bias there missing, here float32[10]"),
    ):
        model.write_text(line.format(layers))
        for arguments in (["--config.num_epochs=2"], ["--mode=eval"]):
            capsys.readouterr()
            assert main.main([*short, *arguments]) == 2
            told = capsys.readouterr().err
            assert "the checkpoint of step 10 in " in told
            assert "is of another model (" in told
            assert words in told
    assert not (tmp_path / "run" / "damaged").exists()
    model.write_text(line.format("nn.Dense(8), nn.Dense(10)"))
    assert main.main([*short, "--config.num_epochs=2"]) == 0


def test_evaluation_before_the_first_epoch_has_ended(tmp_path):
    assert run("digits_mlp", *SHORT, "--config.num_epochs=1", f"--workdir={tmp_path}").returncode == 0
    (tmp_path / "metrics.jsonl").unlink()
    result = run("digits_mlp", *SHORT, "--config.num_epochs=1", f"--workdir={tmp_path}", "--mode=eval")
    assert result.returncode == 0, result.stderr


def test_the_home_directory_counts(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text((ROOT / "configs" / "digits_mlp.py").read_text())
    short = [*SHORT, "--config.num_epochs=1", "--config.beside=()"]
    assert main.main(["jaxdtp", "--config=~/mine.py", *short, "--workdir=~/run"]) == 0
    assert (tmp_path / "run" / "summary.json").exists()
    assert main.main(["jaxdtp", "--workdir=~/run", "--mode=eval"]) == 0
    assert jaxdtp.load("~/run").step == 10
    assert not (tmp_path / "~").exists()
    capsys.readouterr()
    for key, flag in (("--workdir", "--workdir=ftp://host/run"), ("--config", "--config=https://host/x.py")):
        assert main.main(["jaxdtp", "--config=~/mine.py", *short, flag]) == 2
        assert f"{key}: got " in (told := capsys.readouterr().err)
        assert "allowed: a local path, gs://BUCKET/..., s3://BUCKET/..., az://BUCKET/..." in told
    with pytest.raises(ValueError, match=r"workdir: got 'ftp:/host/run'; allowed: a local path"):
        jaxdtp.train_and_evaluate(jaxdtp.default_config(), Path("ftp://host/run"))
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(":")]


def test_a_run_of_an_earlier_version_goes_on(tmp_path):
    """Its config.json and data.json lack what is younger."""
    short = (*SHORT, "--config.num_epochs=1", f"--workdir={tmp_path}/run")
    assert run("digits_mlp", *short).returncode == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    for key in ("dataset.size", "dataset.train_split", "target.damping"):
        del config[key]
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    about = json.loads((tmp_path / "run" / "data.json").read_text())
    old = {key: about[key] for key in ("image_shape", "classes")}
    (tmp_path / "run" / "data.json").write_text(json.dumps(old))
    assert jaxdtp.load(tmp_path / "run").step == 10
    result = run("digits_mlp", *short, "--config.num_epochs=2")
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "run" / "data.json").read_text()) == about
    (tmp_path / "run" / "config.json").write_text(json.dumps(config | {"target.damping": 1.0}))
    result = run("digits_mlp", *short)
    assert result.returncode == 2
    assert "target.damping (there 1.0, here 0.0)" in result.stderr


def test_caches_go_where_the_system_says(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cache_home() == tmp_path / "cache" / "jaxdtp"
    for other in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", other)
        assert cache_home() == tmp_path / "home" / ".cache" / "jaxdtp"
