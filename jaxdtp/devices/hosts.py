"""Several hosts: how they find each other, agree, and fail together."""

import importlib.util
import json
import os
import threading
from collections.abc import Callable
from typing import Any, Literal, TypeVar, overload

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxdtp.system.console import say
from jaxdtp.system.errors import ConfigError, one_line
from jaxdtp.system.places import of_storage

Result = TypeVar("Result")

LOST = 6
"""Exit code where other hosts can't be reached."""

_MESSAGE_BYTES = 2000


class StorageError(OSError):
    """The workdir can't be written, for example because the disk is full."""


_FAILURES = {error.__name__: error for error in (ConfigError, StorageError)}


def connect(coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: int) -> None:
    """Join the other hosts: those that the flags name, or on a TPU pod or in a Slurm step those of the cluster.

    JAX itself ends the process with a stack trace where that fails. So where it takes longer than `timeout` seconds,
    this ends the process with one line and the exit code `LOST`.

    Args:
        coordinator: host:port of the first host, reachable from all; None: as the cluster says, if there is one.
        num_processes, process_id: how many hosts, and which of them (0, 1, ...) this one is.
        timeout: seconds.

    Raises:
        ConfigError: some but not all of the three are given, or they contradict each other.
    """
    flags = {"--coordinator": coordinator, "--num_processes": num_processes, "--process_id": process_id}
    missing = [name for name, value in flags.items() if value is None]
    if 0 < len(missing) < len(flags):
        raise ConfigError(f"{missing[0]}: missing; allowed: {', '.join(flags)} together, or none of them")
    if coordinator is None or num_processes is None or process_id is None:
        if not _in_cluster():
            return
        where = "the hosts of this cluster"
    else:
        host, _, port = coordinator.rpartition(":")
        if not (host and port.isdecimal() and 0 < int(port) < 2**16):
            raise ConfigError(f"--coordinator: got {coordinator!r}; allowed: HOST:PORT of the host with --process_id=0")
        if not 0 <= process_id < num_processes:
            raise ConfigError(f"--process_id: got {process_id}; allowed: 0 to {num_processes - 1} for --num_processes")
        where = f"{num_processes} hosts at {coordinator}"
    message = (
        f"--coordinator: can't get together with {where} within {timeout} s (--connect_timeout); allowed: an address "
        "that all hosts reach, and every --process_id started once"
    )
    watch = threading.Timer(timeout, leave, [message])
    watch.daemon = True
    watch.start()
    try:
        # JAX's own limit comes later, so that it is ours that speaks.
        jax.distributed.initialize(coordinator, num_processes, process_id, initialization_timeout=timeout + 60)
    except ValueError:
        # Libtpu is there, but no pod is.
        if not missing:
            raise
    finally:
        watch.cancel()


def check_devices() -> None:
    """Raise ConfigError where JAX has been told to use a platform that isn't there."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"JAX_PLATFORMS: got {jax.config.values['jax_platforms']!r} ({one_line(str(error)) or 'no such devices'}); "
            "allowed: platforms that JAX is installed for and this machine has, for example cpu; or nothing, to take "
            "the best"
        ) from error


def leave(message: str) -> None:
    """End this process at once, with a line and the exit code `LOST`: Python's own end would wait for the others."""
    say(f"jaxdtp: {message}", to_errors=True)
    os._exit(LOST)


def _in_cluster() -> bool:
    # A batch script outside of `srun` is one process, though Slurm's other variables are set.
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1 or importlib.util.find_spec("libtpu") is not None


def is_first() -> bool:
    """Whether this is the host that prints and writes."""
    return jax.process_index() == 0


@overload
def together(function: Callable[[], Result]) -> Result: ...
@overload
def together(function: Callable[[], Result], *, first_alone: Literal[True]) -> Result | None: ...
def together(function: Callable[[], Result], *, first_alone: bool = False) -> Result | None:
    """`function()` on every host; where it fails on one of them, it fails on all.

    Args:
        function: what to do.
        first_alone: whether only the first host does it; the others get None.

    Raises:
        ConfigError, StorageError: as `function` does, on any of the hosts; other errors of storage become
            StorageError.
    """
    failure, result = None, None
    if is_first() or not first_alone:
        try:
            result = function()
        except (ConfigError, StorageError) as error:
            failure = error
        except Exception as error:
            if not of_storage(error):
                raise
            reason = one_line(str(error) or type(error).__name__)
            failure = StorageError(f"--workdir: can't write there ({reason}); allowed: a writable directory with room")
    if jax.process_count() > 1:
        content = json.dumps([type(failure).__name__, str(failure)]).encode() if failure else b""
        # JSON ends where it ends, so a message that is cut off would not be one.
        message = content if len(content) <= _MESSAGE_BYTES else json.dumps([type(failure).__name__, "?"]).encode()
        buffer = np.zeros(_MESSAGE_BYTES, np.uint8)
        buffer[: len(message)] = np.frombuffer(message, np.uint8)
        for host, of_host in enumerate(multihost_utils.process_allgather(buffer)):
            if failure is None and of_host.any():
                name, text = json.loads(of_host.tobytes().rstrip(b"\0"))
                failure = _FAILURES[name](f"host {host}: {text}")
    if failure:
        raise failure
    return result


def agree(stop: bool, count: int) -> tuple[bool, int]:
    """Whether any host wants to stop, and the first host's `count`."""
    if jax.process_count() == 1:
        return stop, count
    values = multihost_utils.process_allgather(np.array([stop, count]))
    return bool(values[:, 0].any()), int(values[0, 1])


def of_first(tree: Any) -> Any:
    """The first host's arrays, on every host; all give the same shapes."""
    return tree if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(tree)


def json_of_first(value: Any) -> Any:
    """The first host's value, on every host; what JSON can hold."""
    if jax.process_count() == 1:
        return value
    content = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(of_first(np.array(len(content))))
    return json.loads(of_first(np.resize(content, size)).tobytes())
