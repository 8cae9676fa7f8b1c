"""The command trains a user's own model, by name or from a file, and continues it bit for bit."""

import subprocess
import sys

import jax
import numpy as np
import pytest
from commands import ROOT, TIMINGS, final_state, records, run, start

from jaxdtp.models import own
from jaxdtp.running import checkpoints

OWN = f"--config.network.module={ROOT}/tests/models.py"
SINGLE = [
    f"--config.feedback.{key}=({value},)"
    for key, value in (("iterations", 2), ("noise_scale", 0.1), ("learning_rate", 0.01))
]
SHORT = ("--config.num_epochs=3", "--config.steps_per_epoch=20", "--config.dataset.device_megabytes=0")


def test_batch_statistics_continue_bit_for_bit_after_a_kill(tmp_path):
    arguments = ("digits_mlp", f"{OWN}:DenseNet", "--config.algorithm=ldrl_fast", *SHORT)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    result = run(*arguments, f"--workdir={whole}")
    assert result.returncode == 0, result.stderr
    process = start(*arguments, f"--workdir={killed}")
    while process.poll() is None and not checkpoints.saved_steps(killed):
        pass
    process.kill()
    process.wait()
    assert checkpoints.saved_steps(killed)
    result = run(*arguments, f"--workdir={killed}")
    assert result.returncode == 0, result.stderr
    assert jax.tree.leaves(final_state(whole).model)
    jax.tree.map(np.testing.assert_array_equal, final_state(killed), final_state(whole))
    assert records(killed, TIMINGS) == records(whole, TIMINGS)
    result = run(*arguments, f"--workdir={whole}", "--mode=eval")
    assert result.returncode == 0
    assert "test accuracy" in result.stdout


@pytest.mark.parametrize(
    ("model", "algorithm"),
    [("three_blocks", "ldrl"), ("three_blocks", "ddtp_linear"), ("Mixer", "weight_mirror"), ("InNNX", "bp")],
)
def test_models_from_a_file(tmp_path, model, algorithm):
    lr = "--config.forward.learning_rate=0.01"
    blocks = (
        "--config.feedback.iterations=(2,)",
        "--config.feedback.noise_scale=(0.1,)",
        "--config.feedback.learning_rate=(0.01,)",
    )
    measured = "--config.alignment.every_epochs=3"
    arguments = (f"{OWN}:{model}", f"--config.algorithm={algorithm}", lr, *blocks, measured, *SHORT)
    result = run("digits_mlp", *arguments, f"--workdir={tmp_path}")
    assert result.returncode == 0, result.stderr
    last = records(tmp_path)[-1]
    assert np.isfinite(last["train_loss"])
    assert algorithm == "bp" or any(name.startswith("update_angle/") for name in last)


@pytest.mark.slow
def test_options_of_a_module(tmp_path):
    options = (
        "--config.network.options.patch=4",
        "--config.network.options.features=16",
        "--config.network.options.dropout=0.1",
    )
    result = run("digits_vit_fast", *options, *SHORT, f"--workdir={tmp_path}")
    assert result.returncode == 0, result.stderr
    assert final_state(tmp_path).forward["ViT"]["Conv_0"]["kernel"].shape == (4, 4, 1, 16)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([f"{OWN}:Nothing"], "config.network.module: got 'Nothing', which "),
        (["--config.network.module=nowhere.py:Net"], "config.network.module: can't load nowhere.py (FileNotFoundError"),
        ([f"{OWN}:UNet"], "got outputs of shape [batch, 8, 8, 1]; allowed: [batch, 10], the classes of digits"),
        (
            [f"{OWN}:Mixer", "--config.algorithm=ldrl"],
            "config.algorithm: got 'ldrl', which feeds targets from block to",
        ),
        ([f"{OWN}:Mixer", "--config.network.options.width=3"], "config.network.options: got {'width': 3} ("),
        ([f"{OWN}:Encoder"], "Encoder: can't be called with an input of shape (2, 8, 8, 1)"),
        (
            [f"{OWN}:three_blocks", "--config.algorithm=ldrl", "--config.feedback.iterations=(1,2,3)"],
            "allowed: one value, or 2",
        ),
    ],
)
def test_bad_models_are_one_line(tmp_path, arguments, words):
    single = (
        "--config.feedback.iterations=(1,)",
        "--config.feedback.noise_scale=(0.1,)",
        "--config.feedback.learning_rate=(0.1,)",
    )
    fast = "--config.algorithm=ldrl_fast"
    result = run("digits_mlp", fast, *single, *arguments, f"--workdir={tmp_path / 'run'}")
    assert result.returncode == 2
    assert result.stderr.startswith("jaxdtp: config.")
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_model_finds_the_modules_beside_it(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "widths.py").write_text("WIDTH = 12")
    lines = ("import flax.linen as nn", "from widths import WIDTH", "make = lambda: nn.Sequential([nn.Dense(WIDTH)])")
    (tmp_path / "sub" / "net.py").write_text("\n".join(lines))
    make = own.load(f"{tmp_path}/sub/net.py:make")
    make()
    assert own.load(f"{tmp_path}/sub/net.py:make") is make
    assert "widths" not in sys.modules


def test_the_installed_command_finds_what_the_module_finds(tmp_path):
    (tmp_path / "here.py").write_text("def get():\n    raise OSError('found')")
    script = "import sys; from jaxdtp.main import command; command()"
    arguments = ("--config=digits_mlp", "--config.dataset.name=here:get", f"--workdir={tmp_path}/run")
    done = subprocess.run(
        [sys.executable, "-P", "-c", script, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert "OSError: found" in done.stderr
