"""Searches: what they leave, what interrupts them, and mistakes in spaces."""

import contextlib
import functools
import io
import json
import random
import runpy
import subprocess
import sys
import time

import optuna
import pytest
import stand_in
from commands import ROOT, run
from etils import epath

from jaxdtp.configuration.config import resolve
from jaxdtp.main import load_config
from jaxdtp.running import train
from jaxdtp.search.__main__ import load_space, main
from jaxdtp.search.results import completed, trials_needed
from jaxdtp.search.study import configured, next_trial, open_study

SPACE = """
def get_space(trial):
    rate = trial.suggest_float("forward.learning_rate", 1e-3, 0.3, log=True)
    rule = trial.suggest_categorical("network.activation", ("elu", "tanh"))
    values = {"forward.learning_rate": rate, "network.activation": rule}
    if rule == "elu":
        values["beta"] = trial.suggest_float("beta", 0.1, 1.0)
    values["feedback.learning_rate"] = tuple(
        trial.suggest_float(f"feedback.learning_rate/{block}", 1e-3, 0.3, log=True) for block in (2, 3)
    )
    return values
"""
SHORT = ("--config.num_epochs=3", "--config.steps_per_epoch=10", "--config.network.hidden=(16, 12)")


@pytest.fixture
def space(tmp_path):
    path = tmp_path / "space.py"
    path.write_text(SPACE)
    return path


def line(space, directory, trials, *arguments):
    config = f"--config={ROOT}/configs/digits_mlp.py"
    return [config, *SHORT, f"--space={space}", f"--workdir={directory}", f"--trials={trials}", *arguments]


def search(*arguments):
    """The command within this process: its exit code, and what it prints."""
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        code = main(["search", *line(*arguments)])
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), errors.getvalue())


def rows(directory):
    return json.loads((directory / "trials.json").read_text())["trials"]


def test_a_search_leaves_a_configuration_that_does_what_it_says(space, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        # Test data are never evaluated.
        patch.setattr(train, "summarise", None)
        result = search(space, tmp_path / "s", 6)
    assert result.returncode == 0, result.stderr
    found = rows(tmp_path / "s")
    assert [row["number"] for row in found] == list(range(6))
    assert {row["state"] for row in found} <= {"complete", "pruned"}
    best = max(row["validation_accuracy"] for row in found if row["state"] == "complete")
    assert "6 trials: " in result.stdout
    assert f"{100 * best:.2f}" in result.stdout.split("settings\n")[1].splitlines()[0]
    for name in ("history", "slices", "parallel"):
        assert (tmp_path / "s" / "plots" / f"{name}.png").stat().st_size > 5000
    result = run("digits_mlp", f"--config={tmp_path}/s/best.py", f"--workdir={tmp_path}/run")
    assert result.returncode == 0, result.stderr
    metrics = [json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(record["validation_top1"] for record in metrics) == best
    # More trials in the same directory.
    assert search(space, tmp_path / "s", 7).returncode == 0
    assert [row["number"] for row in rows(tmp_path / "s")] == list(range(7))
    assert search(space, tmp_path / "s", 7).returncode == 0
    assert len(rows(tmp_path / "s")) == 7


def test_the_same_search_suggests_the_same(space, tmp_path):
    for name in ("a", "b"):
        assert search(space, tmp_path / name, 3).returncode == 0
    settings = [[row["settings"] for row in rows(tmp_path / name)] for name in ("a", "b")]
    assert settings[0] == settings[1]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("def get_space(trial):\n    return {'forward.rate': 1.0}", "space.forward.rate: unknown key; allowed: "),
        ("def get_space(trial):\n    return {'beta': trial.suggest_float('b', -1, 1)}", "config.beta: got -0."),
        ("def get_space(trial):\n    return {'beta': trial.suggest_float('b', 2, 1)}", "get_space fails (ValueError: "),
        ("def get_space(trial):\n    return 3", "get_space fails (TypeError: "),
        ("def get_spaces(trial):\n    return {}", "KeyError: 'get_space'"),
        ("def get_space(trial)\n    return {}", "SyntaxError: "),
        ("def get_space(trial):\n    return {'network.hidden': (8,)}", "space.network.hidden: set by the command line"),
    ],
)
def test_mistakes_in_spaces_are_told_before_anything_is_written(tmp_path, content, words):
    (tmp_path / "space.py").write_text(content)
    result = search(tmp_path / "space.py", tmp_path / "s", 3)
    assert result.returncode == 2
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "s").exists()


def test_other_searches_and_runs_are_left_alone(space, tmp_path):
    assert search(space, tmp_path / "s", 1).returncode == 0
    before = (tmp_path / "s" / "best.py").read_text()
    result = search(space, tmp_path / "s", 2, "--config.seed=1")
    assert result.returncode == 2
    assert "belongs to another search: seed (there 0, here 1)" in result.stderr
    space.write_text(SPACE + "\n# another one\n")
    result = search(space, tmp_path / "s", 2)
    assert result.returncode == 2
    assert "belongs to another search: the space" in result.stderr
    assert (tmp_path / "s" / "best.py").read_text() == before
    # Keys that are younger than a search had their defaults.
    space.write_text(SPACE)
    identity = json.loads((tmp_path / "s" / "search.json").read_text())
    del identity["config"]["seeds"]
    (tmp_path / "s" / "search.json").write_text(json.dumps(identity))
    assert search(space, tmp_path / "s", 1).returncode == 0
    assert run("digits_mlp", *SHORT, f"--workdir={tmp_path}/run").returncode == 0
    result = search(space, tmp_path / "run", 2)
    assert result.returncode == 2
    assert "belongs to something else" in result.stderr
    result = search(space, tmp_path / "t", 2, "--config.dataset.validation_fraction=0.0")
    assert result.returncode == 2
    assert "config.dataset.validation_fraction: got 0.0" in result.stderr
    for name, words in (("a?b", "with ?; allowed: without"), ("best.py/s", "can't use ")):
        result = search(space, tmp_path / "s" / name, 2)
        assert result.returncode in (2, 5)
        assert words in result.stderr
        assert result.stderr.count("\n") == 1
    result = search(tmp_path / "none.py", tmp_path / "t", 2)
    assert result.returncode == 2
    assert "allowed: a file that defines get_space(trial), or one of drl, feedback, inverse, lenet, tp" in result.stderr


DEPENDING = """
import optuna

def get_space(trial):
    rate = trial.suggest_float("rate", 1e-3, 0.1, log=True)
    if rate > 0.05:
        raise optuna.TrialPruned
    last = trial.suggest_float("last", 1e-5, rate, log=True)
    return {"forward.learning_rate": rate, "forward.final_learning_rate": last}
"""


def test_ranges_that_depend_on_each_other_and_combinations_that_are_left_out(tmp_path):
    (tmp_path / "space.py").write_text(DEPENDING)
    bp = ("--config.algorithm=bp", "--config.num_epochs=1")
    directory = tmp_path / "of mine\\x"
    result = search(tmp_path / "space.py", directory, 6, *bp)
    assert result.returncode == 0, result.stderr
    assert {path.stem for path in (directory / "plots").iterdir()} >= {"history", "slices", "parallel"}
    assert runpy.run_path(str(directory / "best.py"))["get_config"]().num_epochs == 1


def test_a_trial_without_validation_examples_fails_with_its_reason(tmp_path):
    (tmp_path / "space.py").write_text('get_space = lambda trial: {"dataset.validation_fraction": 0.0}')
    search(tmp_path / "space.py", tmp_path / "search", 1, "--config.algorithm=bp", "--config.num_epochs=1")
    assert "leaves no validation examples" in rows(tmp_path / "search")[0]["reason"]


def test_a_trial_belongs_to_its_process_until_that_ends(space, tmp_path):
    """Wherever it ran: what it held is free."""
    config = resolve(load_config("digits_mlp", {}))
    study = open_study(epath.Path(tmp_path / "s"), config, SPACE)
    ask = functools.partial(next_trial, study, epath.Path(tmp_path / "s"), 0, 1)
    trial, ours = ask()
    assert ask() is None
    ours.release()
    again, _ = ask()
    assert again.user_attrs["directory"] == trial.user_attrs["directory"]


def test_a_space_in_which_nothing_varies(tmp_path):
    (tmp_path / "space.py").write_text("def get_space(trial):\n    return {'beta': 0.5}\n")
    result = search(tmp_path / "space.py", tmp_path / "s", 2)
    assert result.returncode == 0, result.stderr
    assert [path.name for path in (tmp_path / "s" / "plots").iterdir()] == ["history.png"]


def test_what_fails_counts_with_its_reason(tmp_path):
    (tmp_path / "space.py").write_text(
        "def get_space(trial):\n"
        "    kind = trial.suggest_categorical('kind', ('good', 'diverges', 'large'))\n"
        "    rate = {'good': 0.02, 'diverges': 1e30, 'large': 0.02}[kind]\n"
        "    return {'forward.learning_rate': rate, 'forward.warmup_steps': 0,\n"
        "            'batch_size': 100_000 if kind == 'large' else 32}\n"
    )
    result = search(tmp_path / "space.py", tmp_path / "s", 8)
    assert result.returncode == 0, result.stderr
    by_kind = {row["settings"]["kind"]: row for row in rows(tmp_path / "s")}
    assert set(by_kind) == {"good", "diverges", "large"}
    assert by_kind["good"]["reason"] == ""
    assert by_kind["diverges"]["state"] == by_kind["large"]["state"] == "fail"
    assert by_kind["diverges"]["reason"].startswith("diverged: epoch 1")
    assert "config.batch_size: got 100000" in by_kind["large"]["reason"]
    assert " failed: diverged: epoch 1" in result.stdout


@pytest.mark.parametrize("kills", [1, pytest.param(6, marks=pytest.mark.slow)])
def test_a_search_that_is_killed_and_goes_on_in_two_processes(space, tmp_path, kills):
    rng, trials = random.Random(kills), 6 + kills

    def start():
        script = "import sys; from jaxdtp.search.__main__ import main; sys.exit(main(['search', *sys.argv[1:]]))"
        command = [sys.executable, "-c", script, *line(space, tmp_path / "s", trials)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=stand_in.environment())

    for _ in range(kills):
        process = start()
        while process.poll() is None and not list((tmp_path / "s").glob("trials/*/metrics.jsonl")):
            time.sleep(0.05)
        time.sleep(3 * rng.random())
        process.kill()
        process.communicate()
    both = [start(), start()]
    assert [process.wait() for process in both] == [0, 0], [process.communicate() for process in both]
    for process in both:
        process.stdout.close()
    # The last one to end may have written before the other one's last trial had ended.
    assert search(space, tmp_path / "s", trials).returncode == 0
    found = rows(tmp_path / "s")
    assert len(found) == trials
    assert {row["state"] for row in found} <= {"complete", "pruned"}
    settings = [json.dumps(row["settings"]) for row in found]
    assert len(set(settings)) == trials
    assert not list((tmp_path / "s").glob("trials/*/checkpoints"))


def test_shipped_spaces_fit_their_configurations():
    for name, config in (
        ("lenet", "cifar10_lenet"),
        ("feedback", "digits_mlp"),
        ("drl", "mnist_mlp"),
        ("inverse", "mnist_mlp"),
        ("tp", "mnist_mlp"),
    ):
        space, _ = load_space(name)
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
        base = runpy.run_path(f"{ROOT}/configs/{config}.py")["get_config"]()
        for _ in range(20):
            configured(base, space, study.ask(), {})


def test_how_many_trials_it_took():
    study = optuna.create_study(direction="maximize")
    for value in (0.5, 0.9, 0.8985, None, 0.9005):
        trial = study.ask()
        if value is None:
            trial.set_user_attr("reason", "diverged")
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            study.tell(trial, value)
    assert [trial.value for trial in completed(study)] == [0.9005, 0.9, 0.8985, 0.5]
    assert trials_needed(study) == 2
