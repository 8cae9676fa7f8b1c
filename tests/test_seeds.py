"""Many seeds in one run: each ends as it would have ended alone, and the numbers over them are what they are called."""

import json
import math
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import ROOT, TIMINGS, run, run_process, short_config, start

import jaxdtp
from jaxdtp import main
from jaxdtp.configuration.config import resolve
from jaxdtp.data import load_for_seeds
from jaxdtp.learning.algorithms import ALGORITHMS, Algorithm
from jaxdtp.learning.targets import plain_target
from jaxdtp.results import statistics
from jaxdtp.running import rounds
from jaxdtp.running.groups import division
from jaxdtp.running.rounds import DivergedError
from jaxdtp.running.train import start as start_states
from jaxdtp.search.__main__ import main as search
from jaxdtp.system.signals import StoppedError


def test_programs_that_call_lapack_dont_wait_for_each_other(tmp_path):
    """Two at a time would wait forever for the two threads of two cores (jaxlib 0.10)."""
    module = f"--config.network.module={ROOT}/tests/models.py:Cholesky"
    options = ("--config.algorithm=bp", "--config.num_epochs=2", "--config.seeds=2", f"--workdir={tmp_path}")
    done = run_process("digits_mlp", module, *options)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("backend", "network", "groups"),
    [
        ("gpu", {}, ((0, 1, 2),)),
        ("gpu", {"network__name": "lenet", "network__channels": (4,), "network__hidden": (12,)}, ((0,), (1,), (2,))),
        ("gpu", {"network__module": "tests/models.py:DenseNet"}, ((0,), (1,), (2,))),
        ("tpu", {"network__name": "lenet", "network__channels": (4,), "network__hidden": (12,)}, ((0, 1, 2),)),
    ],
)
def test_seeds_of_convolutional_networks_take_turns_on_a_gpu(backend, network, groups, monkeypatch):
    config = resolve(short_config("bp", 1, seeds=3, **network))
    datasets = load_for_seeds(config.dataset, config.seeds)
    made, states = start_states(config, datasets[0], steps=2)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert division(config, datasets, made, states[0]) == groups


def without_timings(record):
    return {name: value for name, value in record.items() if name not in TIMINGS}


def records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


VARIANTS = {
    "ldrl": ("ldrl", {"dataset__crop_padding": 1, "float64": True}),
    "batch statistics": ("ldrl_fast", {"network__module": "tests/models.py:DenseNet"}),
    "a random layer of its own": (
        "ddtp_rhl",
        {"forward__optimizer": "adam", "feedback__optimizer": "adam", "float64": True},
    ),
    "random numbers in NNX": ("kp", {"network__module": "tests/models.py:InNNX", "float64": True}),
    "feedback epochs": ("dtp", {"feedback__pretraining_epochs": 1, "feedback__learning_rate": (1e-3,)}),
    "inverse": ("inverse", {"float64": True, "beta": 0.1, "feedback__learning_rate": (1e-3,)}),
    "convolutions": ("bp", {"network__name": "lenet", "network__channels": (4,), "network__hidden": (12,)}),
}
FAST = {("ldrl", "together"), ("a random layer of its own", "in_turn")}


@pytest.mark.parametrize(
    ("name", "way"),
    [
        pytest.param(name, way, marks=() if (name, way) in FAST else pytest.mark.slow)
        for name in VARIANTS
        for way in ("together", "in_turn")
    ],
)
def test_each_seed_ends_as_it_would_alone(name, way, tmp_path):
    """In turn bit for bit, together up to the order of summation; best epochs, evaluation and measuring included."""
    (rule, changes), seeds = VARIANTS[name], (3, 11, 4)
    summary = jaxdtp.train_and_evaluate(
        short_config(rule, 10, seeds=seeds, parallel__seeds=way, **changes), tmp_path / "all"
    )
    exact = 1e-12 if changes.get("float64") else 1e-5
    for seed in seeds:
        alone = jaxdtp.train_and_evaluate(short_config(rule, 10, seed=seed, **changes), tmp_path / str(seed))
        ours, theirs = (jaxdtp.load(tmp_path / name, seed=which) for name, which in (("all", seed), (str(seed), None)))
        for a, b in zip(*(jax.tree.leaves((model.params, model.model)) for model in (ours, theirs)), strict=True):
            # Biases before a normalisation are zero but for rounding.
            allowed = exact * (np.linalg.norm(b) + 1e-3) if way == "together" else 0
            assert np.linalg.norm(a - b) <= allowed
        pairs = [(summary["seeds"][str(seed)], {name: alone[name] for name in summary["seeds"][str(seed)]})]
        pairs += [
            (record["seeds"][str(seed)], {name: by_itself[name] for name in record["seeds"][str(seed)]})
            for record, by_itself in zip(records(tmp_path / "all"), records(tmp_path / str(seed)), strict=True)
        ]
        for found, expected in pairs:
            if way == "in_turn":
                assert found == expected
                continue
            # The angle between gradients that are zero but for rounding means nothing.
            names = [name for name in expected if not name.startswith("bias_update_angle")]
            assert {name: found[name] for name in names} == pytest.approx(
                {name: expected[name] for name in names}, rel=1e-3, abs=1e-5
            )


def test_the_command_tells_each_seed_and_the_spread(tmp_path):
    short = ("--config.num_epochs=2", "--config.steps_per_epoch=10", "--config.alignment.every_epochs=1")
    result = run("digits_mlp", *short, "--config.seeds=4", "--config.seed=5", f"--workdir={tmp_path}")
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    accuracies = [summary["seeds"][seed]["test_accuracy"] for seed in ("5", "6", "7", "8")]
    assert list(summary["seeds"]) == ["5", "6", "7", "8"]
    assert summary["test_accuracy"] == pytest.approx(np.mean(accuracies))
    assert summary["std"]["test_accuracy"] == pytest.approx(np.std(accuracies, ddof=1))
    # 3.182: Student's t at 0.975 with three degrees of freedom.
    half = 3.182 * np.std(accuracies, ddof=1) / math.sqrt(4)
    assert summary["ci95"]["test_accuracy"] == pytest.approx(half, rel=1e-3)
    told = " ".join(result.stdout.split())
    # As many groups as there are cores.
    assert "seeds 5, 6, 7, 8" in told.replace(" | ", ", ")
    assert f"test accuracy {np.mean(accuracies):.2%} ± {np.std(accuracies, ddof=1):.2%}" in told
    assert all(f"seed {seed} {accuracy:.2%}" in told for seed, accuracy in zip((5, 6, 7, 8), accuracies, strict=True))
    for record in records(tmp_path):
        angles = [of_seed["update_angle/fc1"] for of_seed in record["seeds"].values()]
        assert record["update_angle/fc1"] == pytest.approx(np.mean(angles))
        assert len(set(angles)) == 4
    assert (tmp_path / "plots" / "accuracy.png").stat().st_size > 5000
    # From its workdir alone.
    assert main.main(["jaxdtp", f"--workdir={tmp_path}", "--mode=eval"]) == 0
    result = run("digits_mlp", *short, "--config.seeds=(5, 6, 7, 8)", f"--workdir={tmp_path}")
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "summary.json").read_text()) == summary


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config.seeds=(1, 2, 1)"], "config.seeds: got (1, 2, 1); allowed: (), how many from config.seed on"),
        (["--config.seeds=(1, -2)"], "config.seeds: got (1, -2); allowed: "),
        (["--config.seeds=-3"], "config.seeds: got -3; allowed: "),
        (["--config.seeds=0"], "config.seeds: got 0; allowed: "),
        (["--config.seeds=two"], "config.seeds: got 'two'; allowed: "),
        (["--config.seeds=(1, 2.5)"], "config.seeds: got (1, 2.5); allowed: "),
        (["--config.seeds=True"], "config.seeds: got True; allowed: "),
        (["--config.seeds=3", "--config.seed=4294967294"], "config.seeds: got 3 from config.seed=4294967294 on; "),
        (["--config.seeds=(3, 4)", "--config.seed=1"], "config.seed: got 1, while config.seeds is (3, 4); allowed: "),
        (["--config.parallel.seeds=all"], "config.parallel.seeds: got 'all'; allowed: one of auto, together, in_turn"),
        (
            ["--config.seeds=2", "--config.parallel.seeds=together", "--config.dataset.device_megabytes=0"],
            "config.parallel.seeds: got 'together'; allowed: auto, in_turn, as the data don't fit into ",
        ),
        (
            ["--config.seeds=2", "--config.parallel.seeds=together", "--config.parallel.layer_groups=2"],
            "config.parallel.seeds: got 'together'; allowed: auto, in_turn, with config.parallel.layer_groups=2",
        ),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(arguments, words, tmp_path):
    result = run("digits_mlp", *arguments, f"--workdir={tmp_path / 'run'}")
    assert result.returncode == 2
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_workdir_belongs_to_its_seeds(tmp_path):
    short = ("--config.num_epochs=1", "--config.steps_per_epoch=2", f"--workdir={tmp_path}")
    assert run("digits_mlp", *short, "--config.seeds=2").returncode == 0
    before = (tmp_path / "summary.json").read_text()
    for other in ("--config.seeds=3", "--config.seeds=(1, 0)", "--config.seed=0"):
        result = run("digits_mlp", *short, other)
        assert result.returncode == 2
        assert "belongs to a run with another configuration: seed" in result.stderr
    assert (tmp_path / "summary.json").read_text() == before
    with pytest.raises(ValueError, match="seed: got None; allowed: one of 0, 1, of the run in "):
        jaxdtp.load(tmp_path)
    with pytest.raises(ValueError, match="seed: got 2; allowed: one of 0, 1, of the run in "):
        jaxdtp.load(tmp_path, seed=2)


DIVERGES = """
import jax, jax.numpy as jnp
import flax.linen as nn

class Net(nn.Module):
    limit: float = 9.0

    @nn.compact
    def __call__(self, x, train=True):
        steps = self.variable("batch_stats", "steps", lambda: jnp.zeros(()))
        if train and not self.is_initializing():
            steps.value += 1
        luck = jax.lax.stop_gradient(self.param("luck", nn.initializers.normal(1.0), (1,)))
        x = nn.tanh(nn.Dense(8)(x.reshape(len(x), -1)))
        return jnp.where((luck > self.limit) & (steps.value == 15), jnp.inf, nn.Dense(10)(x))
"""


@pytest.mark.parametrize("way", ["together", pytest.param("in_turn", marks=pytest.mark.slow)])
def test_a_seed_that_diverges_is_told_and_the_others_go_on(way, tmp_path, capsys):
    """As if they were without it; it stays as it was then, also when the run goes on later."""
    (tmp_path / "net.py").write_text(DIVERGES)
    seeds = (0, 1, 2)

    def changed(limit, **changes):
        options = {"network__module": f"{tmp_path}/net.py:Net", "network__options": {"limit": limit}}
        return short_config("bp", 10, parallel__seeds=way, forward__weight_decay=0.0, **options, **changes)

    luck = {}
    for seed in seeds:
        jaxdtp.train_and_evaluate(changed(9.0, seed=seed, num_epochs=3), tmp_path / str(seed))
        luck[seed] = float(jaxdtp.load(tmp_path / str(seed)).params["Net"]["luck"][0])
    *_, second, first = sorted(seeds, key=luck.get)
    limit = (luck[first] + luck[second]) / 2
    capsys.readouterr()
    for epochs in (2, 3):
        summary = jaxdtp.train_and_evaluate(changed(limit, seeds=seeds, num_epochs=epochs), tmp_path / "all")
        told = capsys.readouterr().out
        why = "epoch 2, step 15: the activations of block Net became inf"
        assert summary["diverged"] == {str(first): why}
        assert (f"seed {first} has diverged and stays as it is, the others go on: {why}" in told) == (epochs == 2)
        assert f"diverged: {first}" in told
        assert sorted(summary["seeds"]) == [str(seed) for seed in seeds if seed != first]
    for seed in seeds:
        alone, ours = records(tmp_path / str(seed)), records(tmp_path / "all")
        for by_itself, record in zip(alone, ours, strict=True):
            assert (str(seed) in record["seeds"]) == (seed != first or record["epoch"] == 1)
            assert record.get("diverged", {}) == ({str(first): why} if record["epoch"] > 1 else {})
            for name, value in record["seeds"].get(str(seed), {}).items():
                assert value == pytest.approx(by_itself[name], rel=1e-4)
    # All of them.
    with pytest.raises(DivergedError, match=r"seed 0: epoch 2, step 15: .*; seed 2: epoch 2, step 15: .* checkpoint"):
        jaxdtp.train_and_evaluate(changed(-9.0, seeds=seeds), tmp_path / "none")


@pytest.mark.parametrize(
    ("kind", "way", "times"),
    [
        ("SIGTERM", "in_turn", 1),
        pytest.param("SIGTERM", "together", 4, marks=pytest.mark.slow),
        pytest.param("SIGKILL", "together", 4, marks=pytest.mark.slow),
        pytest.param("SIGKILL", "in_turn", 4, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_stopped_goes_on_as_if_it_had_not_been(kind, way, times, tmp_path):
    """Within an epoch, where seeds that take turns have come differently far."""
    arguments = (
        "digits_mlp",
        *("--config.num_epochs=3", "--config.batch_size=4", "--config.seeds=3", "--config.feedback.iterations=3"),
        *(f"--config.parallel.seeds={way}", "--config.checkpoint_every_epochs=2"),
    )
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert run(*arguments, f"--workdir={whole}").returncode == 0
    for _ in range(times):
        process = start(*arguments, f"--workdir={stopped}")
        for line in process.stdout:
            if "compiled in" in line:
                break
        time.sleep(0.4)
        process.send_signal(getattr(signal, kind))
        rest = process.stdout.read()
        assert process.wait() in ((4, 0) if kind == "SIGTERM" else (-9, 0)), rest
        if kind == "SIGTERM" and process.returncode:
            assert "SIGTERM: stopped and saved after epoch " in rest
    result = run(*arguments, f"--workdir={stopped}")
    assert result.returncode == 0, result.stderr
    ends = [json.loads((directory / "summary.json").read_text()) for directory in (whole, stopped)]
    assert without_timings(ends[0]) == without_timings(ends[1])
    assert list(map(without_timings, records(whole))) == list(map(without_timings, records(stopped)))
    for seed in range(3):
        models = [jaxdtp.load(directory, seed=seed).params for directory in (whole, stopped)]
        jax.tree.map(np.testing.assert_array_equal, *models)


def test_a_seed_that_is_done_before_a_stop_waits_for_the_others(tmp_path, monkeypatch):
    """Of streamed data, of which it needs no more."""
    config = short_config("bp", 10, seeds=3, parallel__seeds="in_turn", dataset__device_megabytes=0)
    whole = jaxdtp.train_and_evaluate(config, tmp_path / "whole")
    advance = rounds.advance

    def advance_and_stop(run, count, going):
        going = advance(run, count, going)
        if going.done == run.steps and not run.stops:
            signal.raise_signal(signal.SIGTERM)
        return going

    monkeypatch.setattr(rounds, "at_a_time", lambda: 1)
    monkeypatch.setattr(rounds, "advance", advance_and_stop)
    with pytest.raises(StoppedError, match="epoch 1, step"):
        jaxdtp.train_and_evaluate(config, tmp_path / "stopped")
    monkeypatch.undo()
    assert without_timings(jaxdtp.train_and_evaluate(config, tmp_path / "stopped")) == without_timings(whole)


def test_the_best_epoch_is_chosen_among_those_with_checkpoints_and_the_last(tmp_path):
    """As in a run of its own, also where that ends elsewhere first."""
    changes = {"checkpoint_every_epochs": 3, "forward__learning_rate": 0.3, "parallel__seeds": "in_turn"}
    for epochs in (4, 8):
        summary = jaxdtp.train_and_evaluate(
            short_config("bp", 10, seeds=4, num_epochs=epochs, **changes), tmp_path / "all"
        )
    chosen = set()
    for seed in range(4):
        alone = jaxdtp.train_and_evaluate(
            short_config("bp", 10, seed=seed, num_epochs=8, **changes), tmp_path / str(seed)
        )
        chosen.add(alone["best_epoch"])
        assert summary["seeds"][str(seed)] == {name: alone[name] for name in summary["seeds"][str(seed)]}
    assert chosen <= {3, 6, 8}


@pytest.mark.parametrize(
    ("way", "more"),
    [
        pytest.param("together", (), marks=pytest.mark.slow),
        pytest.param("in_turn", ("--config.parallel.layer_groups=2",), marks=pytest.mark.slow, id="in groups"),
        pytest.param("in_turn", (), marks=pytest.mark.slow),
        pytest.param(
            "together",
            (f"--config.network.module={ROOT}/tests/models.py:DenseNet", "--config.algorithm=ldrl_fast"),
            marks=pytest.mark.slow,
            id="batch statistics",
        ),
    ],
)
def test_seeds_are_divided_among_devices(way, more, tmp_path):
    """4 seeds on 8 devices, 4 x 2 if they train together: as on one device."""
    arguments = (
        *("--config.num_epochs=1", "--config.steps_per_epoch=20", "--config.alignment.every_epochs=1"),
        *("--config.seeds=4", f"--config.parallel.seeds={way}", "--config.float64=True", *more),
        *("--config.feedback.iterations=2", "--config.feedback.learning_rate=0.02"),
    )
    one = [argument for argument in arguments if "layer_groups" not in argument]
    # Both compiled as for a user: as within this process, 1 / sqrt(x) has float32's precision in float64.
    for name, line, devices in (("one", one, 1), ("all", arguments, 8)):
        result = run_process("digits_mlp", *line, f"--workdir={tmp_path / name}", devices=devices)
        assert result.returncode == 0, result.stderr
        assert f"{devices} x cpu" in result.stdout
    for seed in range(4):
        ours, theirs = (jaxdtp.load(tmp_path / where, seed=seed).params for where in ("all", "one"))
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            assert np.linalg.norm(a - b) <= 1e-12 * (np.linalg.norm(b) + 1e-3)
    for ours, theirs in zip(records(tmp_path / "all"), records(tmp_path / "one"), strict=True):
        for seed, record in theirs["seeds"].items():
            assert ours["seeds"][seed] == pytest.approx(record, rel=1e-8, abs=1e-8)


def test_intervals_hold_what_they_say():
    """Of 4,000 samples of five normal numbers each, 95 % of the intervals hold the expected value: with 4,000 the share
    is off by more than 1.6 points with a probability of 4e-6."""
    samples = np.random.default_rng(0).normal(3.0, 2.0, (4000, 5))
    held = [abs(np.mean(sample) - 3.0) <= statistics.confidence_half_width(sample) for sample in samples]
    assert np.mean(held) == pytest.approx(0.95, abs=0.016)


def test_welch_is_small_where_means_differ_and_uniform_where_they_do_not():
    """Of 1,500 pairs of samples with different variances a twentieth has p < 0.05, off by more than 2.6 points with a
    probability of 4e-6 (the test is approximate, with an error far below that here)."""
    rng = np.random.default_rng(1)
    found = [statistics.welch(rng.normal(0, 1, 10), rng.normal(0, 3, 10)) for _ in range(1500)]
    assert np.mean(np.array(found) < 0.05) == pytest.approx(0.05, abs=0.026)
    assert statistics.welch([97.1, 97.3, 97.2], [95.0, 95.3, 95.1]) < 1e-3
    assert statistics.welch([97.1], [95.0, 95.3]) is None
    assert statistics.welch([97.0, 97.0], [97.0, 97.0]) is None
    assert statistics.welch([0.1] * 3, [0.2] * 3) is None


def test_numbers_that_some_seeds_lack_are_those_of_the_others():
    merged = statistics.over_seeds({3: {"a": 1.0, "b": 2.0}, 5: {"a": 3.0}, 8: {"a": math.nan}})
    assert (merged["a"], merged["b"]) == (2.0, 2.0)
    assert merged["std"] == {"a": pytest.approx(math.sqrt(2))}
    assert list(merged["seeds"]) == ["3", "5", "8"]


def test_a_search_takes_the_mean_over_seeds(tmp_path):
    (tmp_path / "space.py").write_text("def get_space(trial):\n    return {'beta': trial.suggest_float('b', 0.1, 1)}\n")
    line = [f"--config={ROOT}/configs/digits_mlp.py", f"--space={tmp_path}/space.py", f"--workdir={tmp_path}/s"]
    short = ["--config.num_epochs=1", "--config.steps_per_epoch=10", "--config.seeds=2", "--trials=1"]
    assert search(["search", *line, *short]) == 0
    (trial,) = json.loads((tmp_path / "s" / "trials.json").read_text())["trials"]
    (record,) = records(tmp_path / "s" / "trials" / "0")
    by_seed = [of_seed["validation_top1"] for of_seed in record["seeds"].values()]
    assert trial["validation_accuracy"] == pytest.approx(np.mean(by_seed))


@pytest.mark.parametrize("seeds", [(), 2])
def test_any_metric_that_isnt_finite_ends_a_run(tmp_path, monkeypatch, seeds):
    """Steps stop at whatever isn't finite: what no fault is found for would be tried again and again."""

    def rule(block, feedback_params, forward, clean, target):
        return plain_target(block, feedback_params, forward, clean, target)[0], {"oddity": jnp.full((), jnp.inf)}

    monkeypatch.setitem(ALGORITHMS, "odd", Algorithm(None, rule))
    with pytest.raises(DivergedError, match=r"epoch 1, step 1: oddity of block fc\d became inf"):
        jaxdtp.train_and_evaluate(short_config("odd", 3, seeds=seeds), tmp_path)
