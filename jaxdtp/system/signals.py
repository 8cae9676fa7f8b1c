"""Signals as requests to stop at the next step, instead of an end in the middle of it."""

import contextlib
import signal
import threading
from collections.abc import Iterator

ENDS = ("SIGINT", "SIGTERM")
WARNINGS = ("SIGHUP", "SIGUSR1", "SIGUSR2")
"""A lost terminal, and what Slurm and others send before the end comes."""


class StoppedError(RuntimeError):
    """A signal ended the run; its state is saved, and the same command goes on from there."""


@contextlib.contextmanager
def stop_requests() -> Iterator[list[str]]:
    """The names of the signals received so far. A second one of `ENDS` acts as it would have without this.

    A hang-up that is ignored, as under nohup, stays ignored. In a thread other than the main one, where Python handles
    no signals, nothing is ever received.
    """
    received: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    # Windows hasn't got all of them.
    numbers = [getattr(signal, name) for name in ENDS + WARNINGS if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}

    def note(number, frame):
        del frame
        received.append(signal.Signals(number).name)
        restore([number for number in before if signal.Signals(number).name in ENDS])

    def restore(numbers):
        for number in numbers:
            # None: whoever handled it isn't Python's.
            signal.signal(number, signal.SIG_DFL if before[number] is None else before[number])

    for number, handler in before.items():
        if handler is not signal.SIG_IGN or signal.Signals(number).name in ENDS:
            signal.signal(number, note)
    try:
        yield received
    finally:
        restore(before)
