"""Who is using a directory on object storage, which has no locks.

Every run keeps an object of its own in DIR/claims, a lease, and writes it anew every `BEAT_SECONDS` while it lives. To
take a directory a run writes its lease first and looks for others then; since stores show at once what has been
written (S3, GCS and Azure do), of two that begin together at least one sees the other. A lease that isn't renewed for
`PATIENCE_SECONDS` is that of a run that has died; so is one of a process of this machine that isn't there. Clocks are
never compared.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from etils import epath

from jaxdtp.system import storage
from jaxdtp.system.console import say

BEAT_SECONDS = 10.0
PATIENCE_SECONDS = 35.0


class InUseError(Exception):
    """Another run has the directory."""


@contextlib.contextmanager
def hold(directory: epath.Path) -> Iterator[Callable[[], bool]]:
    """Hold a lease on a directory, and let go of it at the end.

    Yields:
        Whether the lease is still held; it isn't where another run found it not renewed, for example after a long
        failure of the network.

    Raises:
        InUseError: another run holds one.
    """
    claims = directory / "claims"
    own, ended = claims / f"{uuid.uuid4().hex}.json", threading.Event()
    own.write_text(json.dumps({"beat": 0} | this_process()))
    renewing = threading.Thread(target=_renew, args=(own, ended), daemon=True)
    renewing.start()
    try:
        for other in [path for path in storage.inside(claims) if path.name != own.name]:
            _wait_for_end(other)
        yield own.exists
    finally:
        ended.set()
        renewing.join()
        with contextlib.suppress(Exception):  # the store may be what has failed
            own.unlink(missing_ok=True)


def _renew(own: epath.Path, ended: threading.Event) -> None:
    beat = 0
    while not ended.wait(BEAT_SECONDS):
        beat += 1
        # A failure of the network may pass. A lease that is gone was taken away, and stays so.
        with contextlib.suppress(Exception):
            if own.exists():
                own.write_text(json.dumps({"beat": beat} | this_process()))


def _wait_for_end(other: epath.Path) -> None:
    """Remove another run's lease once that run is known to have died.

    Raises:
        InUseError: it lives.
    """
    found = _read(other)
    if found is None:
        return
    words = f"process {found.get('process')} on {found.get('host')}"
    if is_here(found) and still_runs(found):
        raise InUseError(words)
    if not is_here(found):
        say(f"waiting up to {PATIENCE_SECONDS:.0f} s for a sign of life of {words}, which has been using this workdir")
        until = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < until:
            time.sleep(min(1.0, PATIENCE_SECONDS / 10))
            now = _read(other)
            if now is None:
                return
            if now != found:
                raise InUseError(words)
    other.unlink(missing_ok=True)


def _read(path: epath.Path, attempts: int = 3) -> dict[str, Any] | None:
    """A lease's content; None where it has ended."""
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        return {}  # of no run of ours; it will not be renewed
    except OSError:
        # It may have been renewed while it was read.
        if attempts == 1:
            raise
        return _read(path, attempts - 1)


def this_process() -> dict[str, Any]:
    """What identifies this process among those of all machines, at all times."""
    process = os.getpid()
    return {"host": socket.gethostname(), "boot": _boot(), "process": process, "start": _start_of(process)}


def is_here(identity: dict[str, Any]) -> bool:
    """Whether a process, as from `this_process`, is or was one of this machine since it was started."""
    return (identity.get("host"), identity.get("boot")) == (socket.gethostname(), _boot())


def still_runs(identity: dict[str, Any]) -> bool:
    """Whether a process of this machine, as from `this_process`, may be running."""
    process, start = identity.get("process"), identity.get("start")
    return _exists(process) if start is None else _start_of(process) == start


def _boot() -> str:
    """What differs whenever a machine has been started; '' where the system doesn't tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _exists(process: Any) -> bool:
    """Whether there may be such a process on this machine, for systems that don't tell when it began (macOS)."""
    if os.name != "posix":
        return True
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (OSError, ValueError, TypeError):  # another user's, for one
        return True
    return True


def _start_of(process: Any) -> str | None:
    """When a process of this machine began, in the system's own units; None where there is no such process, or the
    system doesn't tell."""
    try:
        return Path(f"/proc/{int(process)}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, ValueError, TypeError):
        return None
