"""Runs that differ in nothing but numbers compile nothing again, and end as they would have ended alone."""

import gc
import subprocess
import sys

import pytest
import stand_in
from commands import TIMINGS, records, short_config
from jax import monitoring

import jaxdtp
from jaxdtp.configuration.config import flatten
from jaxdtp.learning.algorithms import ALGORITHMS, Algorithm
from jaxdtp.learning.feedback import descend, ldrl_loss, reconstruction_loss
from jaxdtp.learning.targets import difference_target
from jaxdtp.running.programs import KEPT, NUMBERS, _programs

COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture(scope="module")
def compilations():
    """The durations of all compilations of this process, as they come."""
    durations = []
    monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: durations.append(seconds) if event == COMPILED else None
    )
    return durations


def other_numbers(config, seed):
    """The same structure with every number another one."""
    values = flatten(config)
    for index, key in enumerate(NUMBERS):
        value = values[key]
        factor = 0.9 - 0.01 * index - 0.001 * seed
        if key == "seed":
            config.seed = 2**32 - 1 - seed
        elif key.endswith(("steps", "epochs")):
            config.update_from_flattened_dict({key: value + 1 + seed})
        elif key == "forward.schedule_milestones":
            config.forward.schedule_milestones = tuple(milestone + 1 for milestone in value)
        else:
            scaled = tuple(factor * item for item in value) if isinstance(value, tuple) else factor * value
            config.update_from_flattened_dict({key: scaled})
    return config


VARIANTS = [
    ("ldrl", {}),
    ("ldrl_fast", {"network__module": "tests/models.py:three_blocks", "dataset__flip": True}),
    ("ddtp_rhl", {"forward__optimizer": "adam", "feedback__optimizer": "adam"}),
    ("kp", {"network__module": "tests/models.py:InNNX"}),
    ("inverse", {"forward__rate_factors": (1.0, 0.5, 1.0), "feedback__weight_decay": (1e-4, 0.0)}),
    ("bp", {"forward__schedule": "step", "forward__schedule_milestones": (1, 2), "float64": True}),
]


@pytest.mark.parametrize(("rule", "changes"), VARIANTS, ids=[rule for rule, _ in VARIANTS])
def test_other_numbers_compile_nothing(rule, changes, tmp_path, compilations):
    jaxdtp.train_and_evaluate(short_config(rule, 3, **changes), tmp_path / "first")
    before = len(compilations)
    for seed in (1, 2):
        jaxdtp.train_and_evaluate(other_numbers(short_config(rule, 3, **changes), seed), tmp_path / str(seed))
    assert len(compilations) == before > 0
    assert records(tmp_path / "1", TIMINGS) != records(tmp_path / "2", TIMINGS)


def test_shared_programs_give_what_a_process_of_its_own_gives(tmp_path):
    """Bit for bit, after a run with other numbers."""
    own = ["jaxdtp", "--config=digits_mlp", "--config.beside=()", "--config.num_epochs=1", "--config.steps_per_epoch=5"]
    own += ["--config.alignment.every_epochs=1"]
    numbers = ["--config.seed=3", "--config.forward.learning_rate=0.03", "--config.feedback.noise_scale=(0.2,)"]
    for script in (
        f"main([*{own}, *{numbers}, '--workdir={tmp_path}/alone'])",
        f"main([*{own}, '--workdir={tmp_path}/first']) or main([*{own}, *{numbers}, '--workdir={tmp_path}/second'])",
    ):
        line = [sys.executable, "-c", f"import sys; from jaxdtp.main import main; sys.exit({script})"]
        subprocess.run(line, check=True, env=stand_in.environment(), timeout=300)
    assert records(tmp_path / "second", TIMINGS) == records(tmp_path / "alone", TIMINGS)


def test_a_rule_by_the_same_name_is_another_program(tmp_path, monkeypatch):
    """As a user writes one in a notebook, and then another."""
    results = []
    for number, feedback_rule in enumerate((descend(ldrl_loss), descend(reconstruction_loss))):
        monkeypatch.setitem(ALGORITHMS, "mine", Algorithm(feedback_rule, difference_target))
        jaxdtp.train_and_evaluate(short_config("mine", 3), tmp_path / str(number))
        results.append(records(tmp_path / str(number), TIMINGS))
    assert results[0] != results[1]


def test_memory_holds_the_programs_of_few_structures(tmp_path):
    _programs.cache_clear()
    for hidden in range(KEPT + 3):
        jaxdtp.train_and_evaluate(short_config("bp", 3, network__hidden=(8 + hidden,)), tmp_path / str(hidden))
    assert _programs.cache_info().currsize == KEPT


@pytest.mark.slow
def test_memory_is_level_over_fifty_runs(tmp_path):
    def run(seed):
        jaxdtp.train_and_evaluate(other_numbers(short_config("ldrl", 3), seed), tmp_path / str(seed))
        gc.collect()
        return stand_in.anonymous_bytes()

    sizes = [run(seed) for seed in range(50)]
    assert max(sizes[10:]) < sizes[5] + 50e6
