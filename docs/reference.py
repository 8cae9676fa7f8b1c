"""What the documentation says of the configuration and of the rooms, from the code itself."""

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

from matplotlib.figure import Figure

import jaxdtp
from jaxdtp.configuration import config
from jaxdtp.configuration.allowed import RULES


def meanings() -> dict[str, str]:
    """What the comments of `default_config` say of each key."""
    found, above = {}, []
    for line in inspect.getsource(config.default_config).splitlines():
        if comment := re.fullmatch(r"\s*# (.*)", line):
            above.append(comment[1])
            continue
        if key := re.match(r"\s*config\.([\w.]+) = [^#]*(?:# (.*))?$", line):
            found[key[1]] = " ".join([*above, *filter(None, [key[2]])])
        above = []
    return found


def configuration() -> str:
    """A table in Markdown: a row for each key."""
    defaults = config.default_config()
    del defaults.when
    of_keys = meanings()
    lines = ["| key | default | meaning | allowed |", "|---|---|---|---|"]
    for key, value in sorted(config.flatten(defaults).items()):
        allowed = RULES[key].allowed.replace("|", r"\|")
        lines.append(f"| `{key}` | `{value!r}` | {of_keys[key]} | {allowed} |")
    return "\n".join(lines) + "\n"


STOREYS = (
    ("models", "system"),
    ("devices",),
    ("learning",),
    ("data", "configuration", "alignment"),
    ("results",),
    ("running", "testing"),
    ("main",),
    ("search",),
)
"""Rooms from the ground up: each imports from lower storeys alone."""


ROOMS = [room for storey in STOREYS for room in storey]
PACKAGE = Path(jaxdtp.__file__).parent


def imported(path: Path) -> Iterator[str]:
    """Names within the package of what a module imports, lazily or not; of the package itself '__init__'."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "jaxdtp":
            names = [f"jaxdtp.{alias.name}" for alias in node.names]
        else:
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
        ours = [name.partition(".")[2] for name in names if name.split(".")[0] == "jaxdtp"]
        yield from (name or "__init__" for name in ours)


def imports() -> set[tuple[str, str]]:
    """Pairs of rooms of which the first imports from the second."""
    found = {
        (path.relative_to(PACKAGE).parts[0].removesuffix(".py"), name.split(".")[0])
        for path in PACKAGE.rglob("*.py")
        for name in imported(path)
    }
    return {(above, below) for above, below in found if above != below and {above, below} <= set(ROOMS)}


def direct(pairs: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The pairs that don't follow from the others."""
    reached = {}
    for room in ROOMS:
        below = {second for first, second in pairs if first == room}
        reached[room] = below.union(*(reached.get(second, set()) for second in below))
    return {
        (above, below)
        for above, below in pairs
        if not any((above, between) in pairs and below in reached.get(between, ()) for between in ROOMS)
    }


def rooms() -> Figure:
    """The rooms, and an arrow from each to those that it imports from, but for those below that lead there, too."""
    figure = Figure(figsize=(6, 5.5), layout="constrained")
    axes, places = figure.subplots(), {}
    for height, storey in enumerate(STOREYS):
        for number, room in enumerate(storey):
            places[room] = ((number + 1) / (len(storey) + 1) + (0.04 if height % 2 else -0.04), height)
    for above, below in sorted(direct(imports())):
        arrow = {"arrowstyle": "->", "color": "0.6", "shrinkA": 16, "shrinkB": 16}
        axes.annotate("", places[below], places[above], arrowprops=arrow)
    for room, (x, y) in places.items():
        box = {"boxstyle": "round,pad=0.5", "facecolor": "white", "edgecolor": "C0"}
        axes.text(x, y, room, ha="center", va="center", bbox=box)
    axes.set(xlim=(0, 1), ylim=(-0.6, len(STOREYS) - 0.4))
    axes.axis("off")
    return figure


def restructure(lines: list[str]) -> None:
    """A docstring's text, in place: formulas that stand alone are literal, no sign is markup, and names that share a
    description have one each."""
    found, in_section, literal, shared = [], False, False, []
    for line in [*lines, ""]:
        if shared and not line.startswith(8 * " "):
            (first, *rest), names = shared, re.match(r"    ([\w, ]+): ", shared[0])[1]
            for name in names.split(", "):
                found += [first.replace(names, name, 1), *rest]
            shared = []
        indented = line.startswith(" ")
        if line and not indented:
            in_section, literal = bool(re.fullmatch(r"(Args|Attributes|Returns|Raises|Yields):", line)), False
        elif indented and not in_section and not literal and found and not found[-1]:
            found += ["::", ""]
            literal = True
        text = line if literal else re.sub(r"([*|]|(?<=\w)_(?!\w))", r"\\\1", line)
        if shared or (in_section and re.match(r"    \w+(, \w+)+: ", line)):
            shared.append(text)
        else:
            found.append(text)
    lines[:] = found


def is_field(member: object) -> bool:
    """Whether it is a field of a NamedTuple, which its class describes."""
    return (getattr(member, "__doc__", None) or "").startswith("Alias for field number")
