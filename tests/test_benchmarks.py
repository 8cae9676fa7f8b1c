"""The benchmarks' own arithmetic, and the format of what they write."""

import json
import math
import sys
import time

import jax
import pytest

from benchmarks import compare, published, record, scaling, step_time, steps, timing
from configs import cifar10_lenet, cifar10_lenet_fast, cifar10_resnet20_fast, digits_mlp
from jaxdtp.learning.layers import RARELY
from jaxdtp.learning.step import backprop_gradients
from jaxdtp.models import networks
from jaxdtp.running.build import build_network

SIZES = {"channels": (2, 3), "hidden": (4,)}


class Small:
    """A config module with a network that is quick to compile."""

    def __init__(self, module, sizes):
        self.module, self.sizes = module, sizes

    def get_config(self):
        config = self.module.get_config()
        config.network.update(self.sizes)
        return config


def test_a_command_is_stopped_at_its_deadline_as_by_a_user(tmp_path):
    script, log = tmp_path / "script.py", tmp_path / "log"
    script.write_text(
        "import signal, sys, time\n"
        "def stop(*_):\n    print('saved', flush=True)\n    sys.exit(130)\n"
        "signal.signal(signal.SIGTERM, stop)\nprint('begun', flush=True)\ntime.sleep(60 if sys.argv[1:] else 0)\n"
    )
    begun = time.monotonic()
    assert published.run_until(begun + 5, [str(script), "long"], log) is None
    assert time.monotonic() - begun < 30
    assert log.read_text().split() == ["begun", "saved"]
    assert published.run_until(math.inf, [str(script)], log) == 0
    assert published.run_until(time.monotonic() - 1, [str(script)], log) is None
    assert log.read_text().split() == ["begun", "saved", "begun"]


def test_a_kept_run_is_json_with_a_line_for_each_epoch():
    epochs = [{"epoch": n, "seeds": {"0": {"loss": 1 / 3 + n}}, "diverged": None} for n in (1, 2)]
    result = {"command": "python", "epochs": [record.rounded(epoch) for epoch in epochs]}
    text = record.in_lines(result)
    assert json.loads(text) == result
    assert [line for line in text.splitlines() if '"loss": 1.33333}' in line] == [text.splitlines()[3]]


@pytest.mark.slow
def test_step_time_writes_one_object_per_step(tmp_path, monkeypatch, capsys):
    configs = Small(cifar10_lenet, SIZES), Small(cifar10_lenet_fast, SIZES)
    monkeypatch.setattr(step_time, "CONFIGS", {"lenet": configs})
    monkeypatch.setattr(step_time, "torch_runs_on", lambda device: False)
    path = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", f"step_time --network=lenet --batch=4 --repeats=2 --json={path}".split())
    step_time.main()

    rows = json.loads(path.read_text())
    printed = capsys.readouterr().out
    names = ["flax_bp", "jaxdtp_bp", "jaxdtp_dtp_fast", "jaxdtp_dtp_fast_later", "jaxdtp_dtp"]
    assert [row["name"] for row in rows] == names
    for row in rows:
        assert row["name"] in printed
        assert 0 < row["seconds_min"] <= row["seconds_median"] <= row["seconds_max"]
        assert row["images_per_second"] == pytest.approx(4 / row["seconds_median"])
        assert row["compile_seconds"] > 0
        assert row["peak_memory_bytes"] is None or row["peak_memory_bytes"] > 0
    operations = {row["name"]: row["operations"] for row in rows}
    # 16x16 and 32x32 pixels, 5x5 kernels, dense 192-4-10, batch 4; conv_0's input gradient isn't needed.
    conv_0, conv_1, fc1, fc2 = (8.0 * n for n in (1024 * 25 * 3 * 2, 256 * 25 * 2 * 3, 192 * 4, 4 * 10))
    backprop = 2 * conv_0 + 3 * (conv_1 + fc1 + fc2)
    assert operations["jaxdtp_bp"] == backprop
    assert operations["jaxdtp_dtp"] == backprop + 4 * (41 * conv_1 + 51 * fc1 + 24 * fc2)
    # One example has equations enough for a convolution; the dense layers are probed with all four.
    probes = 3 * (conv_0 / 4 + conv_1 / 4 + fc1 + fc2)
    assert operations["jaxdtp_dtp_fast"] == backprop + probes
    assert operations["jaxdtp_dtp_fast_later"] == backprop + probes / RARELY


def test_a_step_late_in_a_run_is_one_of_which_few_have_probes(monkeypatch):
    """Whatever number of steps a call has: `RARELY` of them would take minutes where each takes seconds."""
    measured = {("a", False): [1.0, 2.0], ("a", True): [1.0 + RARELY, 2.0], ("b", False): [3.0, 4.0]}
    monkeypatch.setattr(steps, "interleaved", lambda runs, *_: {name: measured[name] for name in runs})
    probing = steps.Step(lambda count: None, None, 0, 0.0, None)
    later, with_probes = steps.timed({"a": probing._replace(probing=probing), "b": probing}, repeats=2)
    assert later == {"a": [2.0, 2.0], "b": [3.0, 4.0]}
    assert with_probes == {"a": [1.0 + RARELY, 2.0]}
    assert steps.PROBING % RARELY == 0 != steps.PLAIN % RARELY


@pytest.mark.slow
def test_a_torch_step_is_measured_like_ours():
    pytest.importorskip("torch")
    config = Small(cifar10_lenet, SIZES).get_config()
    config.batch_size = 4
    for algorithm in ("bp", "ldrl"):
        step = steps.torch_step(config, algorithm, "cpu", "float32")
        times = timing.interleaved({algorithm: step.run}, repeats=2, seconds=0.0)
        assert len(times[algorithm]) == 2
        ours = steps.jaxdtp_step(config, algorithm)
        # Three feedback passes with weight gradients in an iteration, where ours has one and two.
        assert (step.operations > 1.5 * ours.operations) if algorithm == "ldrl" else step.operations == ours.operations
        assert step.kept_bytes > 0
    config = cifar10_resnet20_fast.get_config()
    config.batch_size = 4
    step, ours = steps.torch_step(config, "bp", "cpu", "float32"), steps.jaxdtp_step(config, "bp")
    assert step.operations is ours.operations is None
    # PyTorch keeps the gradients, too.
    assert ours.kept_bytes < step.kept_bytes < 2 * ours.kept_bytes


def test_operations_are_those_that_xla_counts():
    config = steps.configure(digits_mlp.get_config(), "bp")
    network = build_network(config, steps.IMAGE, steps.CLASSES)
    params, _ = networks.init(network, jax.random.key(0))
    gradients = jax.jit(lambda params, x, labels: backprop_gradients(network, params, x, labels))
    counted = gradients.lower(params, *steps.random_batch(config.batch_size)).compile().cost_analysis()["flops"]
    # XLA counts activations and biases too.
    assert counted == pytest.approx(steps.operations(network, config), rel=0.05)


def test_memory_that_a_function_needs_is_seen():
    def function():
        held = bytearray(10**8)
        held[:: 2**12] = bytes(len(held[:: 2**12]))

    added = timing.resident_bytes_added(function)
    assert added is None or added == pytest.approx(10**8, rel=0.2)


def test_scaling_describes_steps_of_every_size():
    for what, sizes in scaling.GROWTH.items():
        for size in sizes:
            for rule, module in scaling.RULES.items():
                config = steps.configure(module.get_config(), rule)
                resized = scaling.resize(config, scaling.BASE._replace(**{what: size}), 0.25)
                steps.configure(resized, rule)


@pytest.mark.slow
def test_compare_writes_a_table_and_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "RESULTS", tmp_path)
    rules = "--rules=bp,dfa"
    command = ["compare", rules, "--seeds=2", "--epochs=1", f"--workdir={tmp_path / 'runs'}"]
    monkeypatch.setattr("sys.argv", command)
    compare.main()
    result = json.loads((tmp_path / "compare_digits_mlp.json").read_text())
    assert [row["rule"] for row in result["rows"]] == ["dfa", "bp"]
    assert all(len(row["test_accuracies"]) == 2 and row["diverged"] == 0 for row in result["rows"])
    assert result["rows"][1]["times_bp"] == 1.0
    assert 0 < result["rows"][0]["gauss_newton_angle"] < 180
    table = (tmp_path / "compare_digits_mlp.md").read_text()
    assert "| `dfa` | " in table
    assert (tmp_path / "compare_digits_mlp.png").read_bytes().startswith(b"\x89PNG")

    # Finished runs are not trained again, and a run that diverged is counted.
    (tmp_path / "runs" / "digits_mlp-1" / "dfa-2" / compare.DIVERGED).write_text("the weights became nan")
    monkeypatch.setattr(compare, "train_and_evaluate", None)
    compare.main()
    assert "(2 of 2 diverged)" in capsys.readouterr().out

    # Rows of other rules stay.
    monkeypatch.setattr("sys.argv", ["compare", "--rules=bp", *command[2:]])
    compare.main()
    result = json.loads((tmp_path / "compare_digits_mlp.json").read_text())
    assert [(row["rule"], row["diverged"]) for row in result["rows"]] == [("dfa", 2), ("bp", 0)]


def test_compare_names_a_rule_that_is_not_there(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["compare", "--rules=bp,hebb"])
    with pytest.raises(SystemExit) as error:
        compare.main()
    assert error.value.code == 2
    assert "got 'hebb'; allowed: ldrl, " in capsys.readouterr().err
