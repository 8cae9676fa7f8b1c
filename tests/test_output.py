"""What can't be printed stops nothing."""

import json
import os
import subprocess

import pytest
from commands import ROOT, command

SHORT = ("--config.num_epochs=2", "--config.steps_per_epoch=5", "--config.alignment.every_epochs=1")


def line(workdir):
    return " ".join(f"'{word}'" for word in command("digits_mlp", *SHORT, f"--workdir={workdir}"))


@pytest.mark.parametrize(
    "output",
    [
        "| head -n 1",
        pytest.param("> /dev/full", marks=pytest.mark.slow),
        pytest.param("> /dev/full 2>&1", marks=pytest.mark.slow),
        ">&- 2>&-",
        pytest.param("2> /dev/full", marks=pytest.mark.slow),
    ],
)
def test_output_that_cannot_be_written(tmp_path, output):
    shell = ["bash", "-o", "pipefail", "-c", f"{line(tmp_path)} {output}"]
    result = subprocess.run(shell, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert json.loads((tmp_path / "summary.json").read_text())["epochs"] == 2


def test_a_terminal_without_the_degree_sign(tmp_path):
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    result = subprocess.run(
        command("digits_mlp", *SHORT, f"--workdir={tmp_path}"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert any(line.endswith("?") for line in result.stdout.splitlines())


def test_errors_that_cannot_be_written_keep_their_exit_code():
    words = " ".join(f"'{word}'" for word in command("digits_mlp", "--config.beta=-1"))
    result = subprocess.run(["bash", "-c", f"{words} 2> /dev/full"], cwd=ROOT, capture_output=True, timeout=300)
    assert result.returncode == 2
