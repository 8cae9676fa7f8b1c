"""What README and documentation show runs, and what they point to is there."""

import re
import shlex
from pathlib import Path

import pytest

from benchmarks import readme
from jaxdtp import main
from jaxdtp.configuration.allowed import RULES
from jaxdtp.learning.algorithms import ALGORITHMS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = sorted(
    {
        line.partition("  #")[0].strip()
        for page in PAGES
        for code in re.findall(r"```\n(.*?)```", page.read_text(), re.DOTALL)
        for line in code.splitlines()
        if "jaxdtp.main" in line and "--config=" in line
    }
)


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
        assert names["metrics"]["top1"] > 0.95


def test_the_readme_is_short():
    assert len(README) <= 8000


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = shlex.split(command.partition("python -m jaxdtp.main ")[2])
    # Of a model that only the reader has.
    assert main.parse(["jaxdtp.main", *(a for a in arguments if "MyNet" not in a and "options" not in a)])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    targets = [target for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if "://" not in target]
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("page", readme.PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_kept_results(page):
    assert readme.with_tables(page) == page.read_text()


def test_every_rule_and_key_is_explained(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    import reference

    meanings = reference.meanings()
    assert all(meanings[key] for key in RULES if not key.startswith("network.options."))
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "rules.md").read_text(), re.MULTILINE)
    assert sorted(row for row in rows if row in ALGORITHMS) == sorted(ALGORITHMS)
