"""Many seeds in one run: each ends as it would have ended alone, and the numbers over them are what they are called."""

import json
import math

import jax
import numpy as np
import pytest
from commands import ROOT, TIMINGS, run

import jaxdtp
from jaxdtp import checkpoints
from jaxdtp.config import default_config, resolve
from jaxdtp.rounds import DivergedError


def config(rule, **changes):
    config = default_config()
    config.algorithm, config.num_epochs, config.steps_per_epoch, config.batch_size = rule, 2, 10, 32
    config.network.hidden, config.trackers, config.alignment.every_epochs = (16, 12), (), 1
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return config


def without_timings(record):
    return {name: value for name, value in record.items() if name not in TIMINGS}


def records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


VARIANTS = [
    pytest.param("ldrl", {"dataset__crop_padding": 1, "float64": True}, id="ldrl"),
    pytest.param("ldrl_fast", {"network__module": "tests/models.py:DenseNet"}, id="batch statistics"),
    pytest.param(
        "ddtp_rhl",
        {"forward__optimizer": "adam", "feedback__optimizer": "adam", "float64": True},
        id="a random layer of its own",
    ),
    *(
        pytest.param(rule, changes, id=rule, marks=pytest.mark.slow)
        for rule, changes in (
            ("kp", {"network__module": "tests/models.py:InNNX", "float64": True}),
            ("dtp", {"feedback__pretraining_epochs": 1, "feedback__learning_rate": (1e-3,)}),
            ("inverse", {"float64": True, "beta": 0.1, "feedback__learning_rate": (1e-3,)}),
            ("bp", {"network__name": "lenet", "network__channels": (4,), "network__hidden": (12,)}),
        )
    ),
]


@pytest.mark.parametrize("way", ["together", "in_turn"])
@pytest.mark.parametrize(("rule", "changes"), VARIANTS)
def test_each_seed_ends_as_it_would_alone(rule, changes, way, tmp_path):
    """In turn bit for bit, together up to the order of summation; best epochs, evaluation and measuring included."""
    seeds = (3, 11)
    summary = jaxdtp.train_and_evaluate(config(rule, seeds=seeds, parallel__seeds=way, **changes), tmp_path / "all")
    exact = 1e-12 if changes.get("float64") else 1e-5
    for seed in seeds:
        alone = jaxdtp.train_and_evaluate(config(rule, seed=seed, **changes), tmp_path / str(seed))
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
            assert found == (pytest.approx(expected, rel=1e-3, abs=1e-6) if way == "together" else expected)
