"""Timing several functions in one run, so that their ratios hold on a machine whose speed changes meanwhile."""

import ctypes
import time
from collections.abc import Callable, Hashable

import jax
import jax.numpy as jnp
import numpy as np


def interleaved(
    steps: dict[Hashable, Callable[[int], None]], repeats: int, seconds: float = 0.5
) -> dict[Hashable, list[float]]:
    """Seconds per step, by name, one value for each repeat.

    `step(count)` does so many steps. Each does one to warm up; then, `repeats` times, one after the other, each does as
    many as fit into `seconds`, at least one.
    """
    counts = {}
    for name, step in steps.items():
        step(1)
        counts[name] = max(1, int(seconds / _seconds(lambda step=step: step(1))))
    times = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            times[name].append(_seconds(lambda step=step, count=counts[name]: step(count)) / counts[name])
    return times


def resident_bytes_added(function: Callable[[], None]) -> int | None:
    """How far the process's resident memory rises while `function` runs; None where the system doesn't say."""
    try:
        # Freed memory that the allocator keeps would hide what the function needs.
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        before = _status("VmRSS")
        function()
        return max(0, _status("VmHWM") - before)
    except (OSError, AttributeError, ValueError):  # not Linux, another C library, or a container that hides it
        return None


def matmul_peak(repeats: int = 15) -> float:
    """Operations per second of the best of `repeats` products of square matrices, in JAX's current precision."""
    size = 2048 if jax.default_backend() == "cpu" else 16384
    a = jax.random.normal(jax.random.key(0), (size, size))
    product = jax.jit(jnp.matmul)
    product(a, a).block_until_ready()
    return 2 * size**3 / min(_seconds(lambda: product(a, a).block_until_ready()) for _ in range(repeats))


def summary(times: list[float]) -> dict[str, float]:
    """Median, minimum and maximum, seconds."""
    return {
        "seconds_median": float(np.median(times)),
        "seconds_min": float(np.min(times)),
        "seconds_max": float(np.max(times)),
    }


def _seconds(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _status(field: str) -> int:
    """A field of /proc/self/status, bytes."""
    with open("/proc/self/status") as file:
        (line,) = [line for line in file if line.startswith(field + ":")]
    return int(line.split()[1]) * 1024
