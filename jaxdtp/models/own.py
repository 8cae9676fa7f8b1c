"""Models by name: Flax modules that come with jaxdtp, and a user's own, from a file or a package."""

import contextlib
import functools
import importlib
import inspect
import os
import runpy
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flax import nnx

from jaxdtp.models import residual, resnet, vit

MODULES = {
    "resnet20": resnet.resnet20,
    "resnet32": resnet.resnet32,
    "resnet56": resnet.resnet56,
    "resnet18": resnet.resnet18,
    "resnet34": resnet.resnet34,
    "vit": vit.ViT,
    "residual18": residual.residual,
    "residual34": functools.partial(residual.residual, blocks=(3, 4, 6, 3)),
}
"""What makes a model, by name: Flax modules, and the published residual networks, whose stages are blocks."""


@contextlib.contextmanager
def importing_from(directory: Path) -> Iterator[None]:
    """Meanwhile modules can be imported from a directory, and from the working one, as by `python -m`; afterwards those
    of that directory are forgotten, as other ones may have their names."""
    path, modules = sys.path[:], set(sys.modules)
    sys.path[:0] = [str(directory), os.getcwd()]
    try:
        yield
    finally:
        sys.path[:] = path
        for name in set(sys.modules) - modules:
            if str(getattr(sys.modules[name], "__file__", None) or "").startswith(f"{directory}{os.sep}"):
                del sys.modules[name]


class OptionsError(ValueError):
    """A model doesn't take the options that it is given."""


def load(source: str) -> Any:
    """What `source`, FILE.py:NAME or PACKAGE.MODULE:NAME, names: a class of Flax modules, or a function. A file finds
    modules beside it.

    Raises:
        ValueError: it can't be loaded.
    """
    where, _, name = source.rpartition(":")
    where = os.path.expanduser(where)
    try:
        names = _run(where, Path(where).read_text()) if where.endswith(".py") else vars(importlib.import_module(where))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever the user's file raises, SystemExit too
        raise ValueError(
            f"can't load {where or source} ({type(error).__name__}: {error}); allowed: FILE.py:NAME or "
            "PACKAGE.MODULE:NAME"
        ) from error
    if not callable(names.get(name)):
        raise ValueError(f"got {name!r}, which {where} doesn't define; allowed: a Flax module's class, or a function")
    return names[name]


# The same file is the same model, for which programs have been compiled.
@functools.lru_cache(maxsize=16)
def _run(file: str, content: str) -> dict[str, Any]:
    del content
    with importing_from(Path(file).resolve().parent):
        return runpy.run_path(file)


def make(maker: Any, input_shape: tuple[int, ...], num_classes: int, options: dict[str, Any], seed: int) -> Any:
    """A model from its class or function: with its options and, if it takes them, input_shape (of one image),
    num_classes and (NNX) rngs.

    Raises:
        OptionsError: it doesn't take these options.
    """
    taken = _parameters(maker)
    given = dict(options)
    for name, value in (("input_shape", input_shape), ("num_classes", num_classes)):
        if name in taken:
            given.setdefault(name, value)
    if "rngs" in taken:
        given["rngs"] = nnx.Rngs(seed)
    try:
        return maker(**given)
    except TypeError as error:
        allowed = ", ".join(name for name in taken if name not in ("self", "parent", "name", "rngs"))
        raise OptionsError(f"got {options} ({error}); allowed: {allowed}") from error


def takes(maker: Any, name: str) -> bool:
    """Whether a model's class or function has a parameter of this name."""
    return name in _parameters(maker)


def _parameters(maker: Any) -> Mapping[str, inspect.Parameter]:
    # The class of an NNX module hides what it takes.
    of_nnx = isinstance(maker, type) and issubclass(maker, nnx.Module)
    return inspect.signature(maker.__init__ if of_nnx else maker).parameters
