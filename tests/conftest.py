import os

import pytest

# Tests need no accelerator, and must not fight over one.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax


@pytest.fixture
def _float64():
    with jax.enable_x64(True):
        yield
