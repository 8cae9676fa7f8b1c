import os

# Tests need no accelerator, and must not fight over one.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
