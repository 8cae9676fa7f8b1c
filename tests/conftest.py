import os

import pytest

# Tests need no accelerator, and must not fight over one.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most programs here run once: LLVM's optimisations cost a third of the tests' time and gain nothing. What is started as
# a user starts it (`commands.run_process`, several hosts, the notebook) is compiled as for a user.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax

# So that its assertions tell what they compared, too.
pytest.register_assert_rewrite("commands")


@pytest.fixture
def _float64():
    with jax.enable_x64(True):
        yield
