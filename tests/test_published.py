"""The papers' tables: every row is a command that can run, and what is kept of it is read as it is."""

import json

import pytest
from commands import ROOT

from benchmarks import published, tables
from jaxdtp import main


@pytest.mark.parametrize("row", tables.ROWS, ids=lambda row: f"{row.name}-{row.rule}")
def test_every_row_is_a_run(row, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = main.parse(["jaxdtp.main", *row.command]).config
    assert config.algorithm == row.rule
    assert len(config.seeds) == row.seeds
    if config.forward.schedule == "cosine":
        assert config.forward.schedule_epochs <= config.num_epochs


def test_rows_are_told_apart():
    names = [(row.name, row.rule) for row in tables.ROWS]
    assert len(set(names)) == len(names)


def test_results_of_one_seed_and_of_many_belong_to_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(published, "KEPT", tmp_path)
    row = tables.ROWS[0]._replace(metric="test_top5")
    angles = {"update_angle/a": 3.0, "update_angle/b": 0.0, "update_angle/c": 5.0}
    many = {
        "command": "many",
        "summary": {"test_top5": 0.55, "seeds": {"0": {"test_top5": 0.5}, "1": {"test_top5": 0.6}}},
        "epochs": [{"epoch": 7, "seeds": {"0": angles, "1": angles}}],
        "config": {"seed": 0},
    }
    one = {"command": "one", "summary": {"test_top5": 0.7}, "epochs": [{"epoch": 7}], "config": {"seed": 4}}
    for name, result in (("", many), ("-again", one)):
        (tmp_path / f"{row.name}-{row.rule}{name}.json").write_text(json.dumps(result))
    (tmp_path / f"{row.name}_other-{row.rule}.json").write_text("of another row")
    results, commands = published.kept(row)
    assert {seed: result["accuracy"] for seed, result in results.items()} == {0: 0.5, 1: 0.6, 4: 0.7}
    assert sorted(commands) == ["many", "one"]
    monkeypatch.setattr(published, "ROWS", [row, row._replace(rule="bp")])
    line, missing = published.collect()
    assert line["angle"] == 4.0  # without the smallest, the output layer's
    assert line["epochs"] == 7
    assert missing["accuracies"] == {}
    assert "| 60.00 ± 10.00 | 3 | 7 |" in published.table([line])
    assert published.table([missing]).endswith(f"Not run yet: {row.what}, by `bp`.")
