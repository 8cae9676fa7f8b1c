"""Timing several functions in one run, so that their ratios hold on a machine whose speed changes meanwhile."""

import ctypes
import platform
import time
from collections.abc import Callable, Hashable

import jax
import jax.numpy as jnp
import numpy as np


def interleaved(
    functions: dict[Hashable, Callable[[], None]], repeats: int, seconds: float = 0.5
) -> dict[Hashable, list[float]]:
    """Seconds of each call, by name.

    Every function is called once to warm up; then, `repeats` times, one after the other, each as often as fits into
    `seconds`, at least once.
    """
    calls = {}
    for name, function in functions.items():
        function()
        calls[name] = max(1, int(seconds / _seconds(function)))
    times = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            times[name] += [_seconds(function) for _ in range(calls[name])]
    return times


def resident_bytes_added(function: Callable[[], None]) -> int | None:
    """How far the process's resident memory rises while `function` runs; None where Linux doesn't say."""
    if platform.system() != "Linux":
        return None
    # Freed memory that the allocator keeps would hide what the function needs.
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = _status("VmRSS")
    function()
    return max(0, _status("VmHWM") - before)


def matmul_peak(size: int = 2048, repeats: int = 15) -> float:
    """Operations per second of the best of `repeats` float32 products of square matrices."""
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
