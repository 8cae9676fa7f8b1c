import os
from pathlib import Path

import pytest

# Tests need no accelerator, and must not fight over one.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most programs here run once: LLVM's optimisations cost a third of the tests' time and gain nothing. What is started as
# a user starts it (`commands.run_process`, several hosts, the notebook) is compiled as for a user.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import hypothesis
import jax
from jaxtyping import install_import_hook

# Shapes in signatures are checked wherever a module has them, and its other annotations with them.
PACKAGE = Path(__file__).parent.parent / "jaxdtp"
SHAPED = [
    ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)
    for file in PACKAGE.rglob("*.py")
    if "from jaxtyping import" in file.read_text()
]
install_import_hook(SHAPED, "beartype.beartype")

# How long an example takes is the machine's affair.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")

# So that its assertions tell what they compared, too.
pytest.register_assert_rewrite("commands")


@pytest.fixture
def _float64():
    with jax.enable_x64(True):
        yield
