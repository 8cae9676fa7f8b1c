"""What is compiled is kept for the next process, within bounds, and where JAX's own settings say."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import stand_in

import jaxdtp
from jaxdtp.system import compiled
from jaxdtp.system.errors import ConfigError
from jaxdtp.system.places import cache_home

SCRIPT = """
import sys
from jax import monitoring
from jaxdtp.main import main

hits = []
monitoring.register_event_listener(
    lambda event, **_: hits.append(event) if event == "/jax/compilation_cache/cache_hits" else None
)
code = main(["jaxdtp", "--config=digits_mlp", "--config.beside=()", "--config.num_epochs=1", *sys.argv[1:]])
print("hits", len(hits))
sys.exit(code)
"""


def start(workdir, cache, *arguments, **environment):
    """Cache hits of a run in a process of its own, and the files that are kept afterwards."""
    environment = stand_in.environment() | {"XDG_CACHE_HOME": str(cache)} | environment
    line = [sys.executable, "-c", SCRIPT, f"--workdir={workdir}", "--config.steps_per_epoch=3", *arguments]
    result = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr
    return int(result.stdout.split()[-1]), [path for path in (cache / "jaxdtp").rglob("*") if path.is_file()]


def test_a_second_start_finds_what_the_first_one_compiled(tmp_path):
    hits, kept = start(tmp_path / "first", tmp_path / "cache")
    # A small program that a start makes twice is found there too, where compiling it takes long enough to be kept.
    assert hits < len(kept)
    assert len(kept) > 5
    assert {path.parents[1] for path in kept} == {tmp_path / "cache" / "jaxdtp" / "compiled"}
    # Other numbers are no other programs.
    hits, _ = start(tmp_path / "second", tmp_path / "cache", "--config.seed=1", "--config.beta=0.5")
    assert hits >= len(kept)


@pytest.mark.slow
def test_jaxs_own_settings_come_first(tmp_path):
    elsewhere = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "own"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    assert start(tmp_path / "first", tmp_path / "untouched", **elsewhere)[1] == []
    assert any((tmp_path / "own").iterdir())
    assert start(tmp_path / "second", tmp_path / "untouched", JAX_ENABLE_COMPILATION_CACHE="0")[1] == []


def test_what_was_used_longest_ago_makes_room(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiled, "MOST_BYTES", 250)
    other_version = tmp_path / "jaxdtp" / "compiled" / "jax0.1"
    other_version.mkdir(parents=True)
    for age, name in ((3, "old"), (1, "new"), (2, "between")):
        (other_version / name).write_bytes(bytes(100))
        os.utime(other_version / name, (1e9 - age, 1e9 - age))
    with compiled.kept_programs():
        assert jax.config.jax_compilation_cache_dir.startswith(str(tmp_path))
    assert jax.config.jax_compilation_cache_dir is None
    assert sorted(path.name for path in other_version.iterdir()) == ["between", "new"]


def test_a_cache_that_cannot_be_written_is_none(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with compiled.kept_programs():
        assert jax.config.jax_compilation_cache_dir is None


def test_without_a_home_there_is_no_cache(monkeypatch):
    def unknown(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", unknown)
    with compiled.kept_programs():
        assert jax.config.jax_compilation_cache_dir is None
    with pytest.raises(ConfigError, match=r"config.dataset.cache_dir: Could not determine home directory"):
        cache_home()


def test_settings_are_as_before_after_a_run_that_fails(tmp_path):
    config = jaxdtp.default_config()
    config.batch_size = 10_000
    with pytest.raises(ValueError, match="batch_size"):
        jaxdtp.train_and_evaluate(config, tmp_path)
    assert jax.config.jax_compilation_cache_dir is None
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 1.0
