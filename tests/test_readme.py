"""What the README shows runs."""

import re
from pathlib import Path

import jax.numpy as jnp
import pytest

from jaxdtp.configuration.config import default_config, flatten
from jaxdtp.learning.algorithms import ALGORITHMS

README = (Path(__file__).parents[1] / "README.md").read_text()
EXAMPLES = [
    code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "download_and_prepare" not in code
]


@pytest.fixture
def _algorithms_restored():
    before = dict(ALGORITHMS)
    yield
    ALGORITHMS.clear()
    ALGORITHMS.update(before)


@pytest.mark.usefixtures("_algorithms_restored")
@pytest.mark.parametrize("code", EXAMPLES, ids=range(len(EXAMPLES)))
def test_example(code):
    names = {}
    exec(code, names)
    if "metrics" in names:
        assert jnp.isfinite(names["metrics"]["loss"])
    for name, value in names.items():
        if name.startswith("test_"):
            value()


def test_the_config_reference_lists_every_key_and_default():
    config = default_config()
    del config.when
    section = README.partition("## Configuration")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| `([\w.]+)` \| `([^`]*)` \|", section, re.MULTILINE))
    assert rows == {key: repr(value) for key, value in flatten(config).items()}
