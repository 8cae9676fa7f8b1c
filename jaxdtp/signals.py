"""SIGINT and SIGTERM as a request to stop at the next step, instead of an end in the middle of it."""

import contextlib
import signal
import threading
from collections.abc import Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StoppedError(RuntimeError):
    """A signal ended the run; its state is saved, and the same command goes on from there."""


@contextlib.contextmanager
def stop_requests() -> Iterator[list[str]]:
    """The names of the signals received so far. A second signal acts as it would have without this.

    In a thread other than the main one, where Python handles no signals, nothing is ever received.
    """
    received = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(number, frame):
        del frame
        received.append(signal.Signals(number).name)
        restore()

    before = {number: signal.signal(number, note) for number in SIGNALS}

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    try:
        yield received
    finally:
        restore()
