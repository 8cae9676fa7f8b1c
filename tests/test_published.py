"""The papers' tables: every row is a command that can run, and what is kept of it is read as it is."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from commands import ROOT

from benchmarks import published, tables
from jaxdtp import main
from jaxdtp.configuration.config import flatten

BESIDE_THE_SETTINGS = {"seed", "seeds", "dataset.data_dir", "matmul_precision", "alignment.probes"}


@pytest.mark.parametrize("row", tables.ROWS, ids=lambda row: f"{row.name}-{row.rule}")
def test_every_row_is_a_run(row, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = main.parse(["jaxdtp.main", *row.command]).config
    assert config.algorithm == row.rule
    assert len(config.seeds) == row.seeds
    if config.forward.schedule == "cosine":
        assert config.forward.schedule_epochs <= config.num_epochs


@pytest.mark.parametrize("row", tables.ROWS, ids=lambda row: f"{row.name}-{row.rule}")
def test_what_is_kept_has_the_settings_of_its_row(row, monkeypatch):
    monkeypatch.chdir(ROOT)
    settings = flatten(main.parse(["jaxdtp.main", *row.command]).config)
    name = f"{row.name}-{row.rule}"
    for path in [*published.KEPT.glob(f"{name}.json"), *published.KEPT.glob(f"{name}-*.json")]:
        of_run = json.loads(path.read_text())["config"]
        assert len(of_run) > 50
        for key in (settings.keys() & of_run.keys()) - BESIDE_THE_SETTINGS:
            assert json.loads(json.dumps(settings[key])) == of_run[key], f"{path.name}: {key}"


def test_rows_are_told_apart():
    names = [(row.name, row.rule) for row in tables.ROWS]
    assert len(set(names)) == len(names)


def test_results_of_one_seed_of_many_and_of_none_belong_to_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(published, "KEPT", tmp_path)
    row = tables.ROWS[0]._replace(metric="test_top5")
    angles = {"update_angle/a": 3.0, "update_angle/b": 0.0, "update_angle/c": 5.0}
    many = {
        "command": "many",
        "summary": {"test_top5": 0.55, "seeds": {"0": {"test_top5": 0.5}, "1": {"test_top5": 0.6}}},
        "epochs": [{"epoch": 7, "seeds": {"0": angles, "1": angles}}],
        "config": {"seed": 0, "seeds": [0, 1, 2]},
    }
    config = {"seed": 4, "seeds": []}
    one = {"command": "one", "summary": {"test_top5": 0.7}, "epochs": [{"epoch": 7}], "config": config}
    lost = {"command": "lost", "epochs": [{"epoch": 1, "seeds": {"5": {}}}], "config": {"seed": 5, "seeds": [5]}}
    for name, result in (("", many), ("-again", one), ("-seed5", lost)):
        (tmp_path / f"{row.name}-{row.rule}{name}.json").write_text(json.dumps(result))
    (tmp_path / f"{row.name}_other-{row.rule}.json").write_text("of another row")
    results, commands = published.kept(row)
    accuracies = {seed: result["accuracy"] for seed, result in results.items()}
    assert accuracies == {0: 0.5, 1: 0.6, 2: None, 4: 0.7, 5: None}
    assert sorted(commands) == ["lost", "many", "one"]
    monkeypatch.setattr(published, "ROWS", [row, row._replace(rule="bp")])
    line, missing = published.collect()
    assert line["angle"] == 4.0  # without the smallest, the output layer's
    assert line["epochs"] == 7
    assert missing["accuracies"] == {}
    assert line["diverged"] == {2: 0, 5: 1}
    assert "| 60.00 ± 10.00 (2 of 5 diverged) | 5 | 7 |" in published.table([line])
    assert published.table([missing]).endswith(f"Not run yet: {row.what}, by `bp`.")


ONE_ROW = """
short = "--config.num_epochs=1", "--config.beside=()"
ROWS = _rows(NONE, "MLP, digits", "mlp_digits", "digits_mlp", {"bp": 0.9}, *short, gpu=True)
wild = "--config.num_epochs=3", "--config.beside=()", "--config.forward.learning_rate=1e30"
ROWS += _rows(NONE, "MLP, wild", "mlp_wild", "digits_mlp", {"bp": 0.9}, *wild, gpu=True)
"""


def test_a_row_that_is_named_runs_again_by_other_seeds(tmp_path):
    without = shutil.ignore_patterns("results", "__pycache__")
    for folder in ("benchmarks", "configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=without)
    kept = tmp_path / "benchmarks" / "results" / "published"
    kept.mkdir(parents=True)
    with (tmp_path / "benchmarks" / "tables.py").open("a") as file:
        file.write(ONE_ROW)

    def run(*options):
        command = [sys.executable, "-m", "benchmarks.published", "--data_dir=none", *options]
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"PYTHONPATH": path}
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "Not run yet, and too long without a GPU: MLP, digits, by `bp`; MLP, wild, by `bp`." in run()
    assert not list(kept.iterdir())
    assert "| 1 | 1 |" in run("--rows=mlp_digits", "--seed=3")
    assert [path.name for path in kept.iterdir()] == ["mlp_digits-bp-seed3.json"]
    result = json.loads((kept / "mlp_digits-bp-seed3.json").read_text())
    assert result["config"]["seed"] == 3
    assert result["command"].endswith("--config.seeds=1 --config.seed=3 --config.dataset.data_dir=DIR")
    begun = (kept / "mlp_digits-bp-seed3.json").stat().st_mtime_ns
    assert "mlp_digits by bp: from seed 3 on it is kept" in run("--rows=mlp_digits", "--seed=3")
    assert (kept / "mlp_digits-bp-seed3.json").stat().st_mtime_ns == begun
    rows = json.loads((tmp_path / "benchmarks" / "results" / "published.json").read_text())
    assert list(rows[0]["accuracies"]) == ["3"]
    assert "| `bp` | 90.00 (-) | - (1 of 1 diverged) | 1 |" in run("--rows=mlp_wild")
    assert "summary" not in json.loads((kept / "mlp_wild-bp.json").read_text())
    assert "from seed 0 on it is kept" in run("--rows=mlp_wild")
