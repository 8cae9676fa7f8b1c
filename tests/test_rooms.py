"""Rooms: each imports from those before it, and a module is small enough to be read at once."""

import ast
from pathlib import Path

import pytest

import jaxdtp

PACKAGE = Path(jaxdtp.__file__).parent
ROOMS = (
    "models",
    "system",
    "devices",
    "learning",
    "alignment",
    "configuration",
    "data",
    "results",
    "running",
    "testing",
    "__init__",
    "main",
    "search",
)
MODULES = sorted(PACKAGE.rglob("*.py"))


def room(parts):
    """Of a module, by its name within the package."""
    return ROOMS.index(parts[0] if parts[0] in ROOMS else "__init__")


def imported(path):
    """Names within the package of what a module imports, lazily or not."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "jaxdtp":
            names = [f"jaxdtp.{alias.name}" for alias in node.names]
        else:
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
        yield from (name.split(".")[1:] or ["__init__"] for name in names if name.split(".")[0] == "jaxdtp")


def test_every_room_is_known():
    names = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in MODULES}
    assert names == set(ROOMS)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_lead_one_way(path):
    own = room(path.relative_to(PACKAGE).with_suffix("").parts)
    later = [".".join(parts) for parts in imported(path) if room(parts) > own]
    assert not later, f"a module of {ROOMS[own]} imports {', '.join(later)}"
    assert len(path.read_text().splitlines()) <= 400


def test_all_public_names_are_said_to_be():
    public = {name for name in vars(jaxdtp) if not name.startswith("_")} - set(ROOMS)
    assert public == set(jaxdtp.__all__)
    assert jaxdtp.__all__ == sorted(jaxdtp.__all__)
    assert all(getattr(jaxdtp, name).__doc__ for name in jaxdtp.__all__ if callable(getattr(jaxdtp, name)))
