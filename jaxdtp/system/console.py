"""What is printed, which is never worth a run: a closed pipe, a full disk or an encoding without '°' stop nothing."""

import contextlib
import os
import sys
from typing import Any, TextIO


class Unfailing:
    """A text stream whose errors are kept from who writes to it.

    Attributes:
        stream: the stream; None where the process has none.
        encoding: its encoding.
    """

    def __init__(self, stream: TextIO | None):
        self.stream = stream
        self.encoding = getattr(stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        """Write what the stream's encoding has, and '?' for the rest."""
        if self.stream is not None:
            # A closed stream raises ValueError, of which UnicodeEncodeError is one.
            with contextlib.suppress(OSError, ValueError):
                self.stream.write(text.encode(self.encoding, "replace").decode(self.encoding))
        return len(text)

    def flush(self) -> None:
        """Flush it."""
        if self.stream is not None:
            with contextlib.suppress(OSError, ValueError):
                self.stream.flush()

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        with contextlib.suppress(OSError, ValueError):
            return self.stream is not None and self.stream.isatty()
        return False


def say(*lines: Any, to_errors: bool = False) -> None:
    """Print lines on standard output, or standard error, as far as that can be written."""
    stream = Unfailing(sys.stderr if to_errors else sys.stdout)
    print(*lines, sep="\n", file=stream, flush=True)


def leave_nothing_to_write() -> None:
    """Throw away what standard output and error can't write: Python would try once more when it ends, and end with an
    error."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
