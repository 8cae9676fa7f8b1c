"""Bad input, and how it is told: in one line."""

from typing import Any


class ConfigError(ValueError):
    """Bad input: one line that names the key or file, what was found and what is allowed."""


def shown(value: Any) -> str:
    """A value for an error message: its repr, on one line."""
    try:
        return one_line(repr(value))
    except Exception:  # a config file's own class, or a number of too many digits
        return f"a {type(value).__name__} that can't be shown"


def described(error: BaseException) -> str:
    """An exception for an error message: its type and message, on one line."""
    try:
        return one_line(f"{type(error).__name__}: {error}")
    except Exception:  # a config file's own class
        return type(error).__name__


def one_line(text: str) -> str:
    """Text for an error message: without line breaks and control characters, its middle left out if it is long."""
    words = " ".join("".join(character if character.isprintable() else " " for character in text).split())
    return words if len(words) <= 300 else f"{words[:150]} ... {words[-100:]}"
