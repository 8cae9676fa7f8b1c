"""Rooms: each imports from those before it, and a module is small enough to be read at once."""

import sys
from pathlib import Path

import pytest

import jaxdtp

sys.path.append(str(Path(__file__).parents[1] / "docs"))
from reference import PACKAGE, STOREYS, imported

# What the package itself exports is from all rooms but the command's.
HEIGHTS = {room: height for height, storey in enumerate(STOREYS) for room in storey} | {"__init__": 5.5}
MODULES = sorted(PACKAGE.rglob("*.py"))


def room(name):
    """Of a module, by its name within the package."""
    first = name.split(".")[0]
    return first if first in HEIGHTS else "__init__"


def test_every_room_is_known():
    names = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in MODULES}
    assert names == set(HEIGHTS)
    assert STOREYS[5] == ("running", "testing")  # below the package's own names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_lead_one_way(path):
    own = room(path.relative_to(PACKAGE).parts[0].removesuffix(".py"))
    later = [name for name in imported(path) if room(name) != own and HEIGHTS[room(name)] >= HEIGHTS[own]]
    assert not later, f"a module of {own} imports {', '.join(later)}"
    assert len(path.read_text().splitlines()) <= 400


def test_all_public_names_are_said_to_be():
    public = {name for name in vars(jaxdtp) if not name.startswith("_")} - set(HEIGHTS)
    assert public == set(jaxdtp.__all__)
    assert jaxdtp.__all__ == sorted(jaxdtp.__all__)
    assert all(getattr(jaxdtp, name).__doc__ for name in jaxdtp.__all__ if callable(getattr(jaxdtp, name)))
