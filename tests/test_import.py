"""Importing the library, and drawing with it, leaves the process as it was."""

import subprocess
import sys

IMPORT = """
import logging, os, signal, sys, threading, warnings
import jax, flax, optax, flax.nnx
import numpy as np
{before}

def world():
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    loggers = [logging.getLogger(name) for name in (None, "jax", "absl", "flax", "orbax")]
    logs = [(logger.level, list(logger.handlers), logger.propagate) for logger in loggers]
    flags = {{name: jax.config.values[name] for name in jax.config.values}}
    streams = (sys.stdout, sys.stderr, sys.excepthook, sys.path[:], threading.active_count())
    return handlers, logs, list(warnings.filters), flags, dict(os.environ), streams, np.geterr(), logging.root.disabled

before = world()
import jaxdtp
assert world() == before
{after}
"""


def run(before="", after=""):
    result = subprocess.run(
        [sys.executable, "-c", IMPORT.format(before=before, after=after)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_importing_changes_nothing_and_imports_nothing_that_is_not_needed():
    heavy = ("sklearn", "matplotlib", "tensorflow_datasets", "torch", "orbax.checkpoint", "tensorboardX", "tensorflow")
    run(after=f"assert not [name for name in {heavy} if name in sys.modules], sys.modules.keys()")


def test_a_notebooks_plots_are_its_own():
    """The backend, the open figures and their look, after a run's figures were drawn."""
    before = "import matplotlib; matplotlib.use('svg')\nimport matplotlib.pyplot as plt\nfigure = plt.figure()"
    after = """
import tempfile
from pathlib import Path
from jaxdtp.results.plots import plot_run
looks = dict(matplotlib.rcParams)
with tempfile.TemporaryDirectory() as directory:
    records = [{"epoch": 1, "train_top1": 0.5, "train_loss": 1.0, "activation/a": 1.0, "weight_angle/a": 3.0}]
    assert plot_run(Path(directory), records, "title")
assert (matplotlib.get_backend().lower(), plt.get_fignums(), plt.gcf()) == ("svg", [1], figure)
assert dict(matplotlib.rcParams) == looks
"""
    run(before, after)
