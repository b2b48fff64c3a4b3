"""The base class of errors that the user can correct, and how they show a value."""

from typing import Any


class InputError(ValueError):
    """An input cannot be used; the message is one line that names it, what was found and what was wanted."""


def shown(value: Any) -> str:
    """Return `repr(value)` for an error message, as one line, cut at 60 characters."""
    text = " ".join(line.strip() for line in repr(value).splitlines())
    return text if len(text) <= 60 else f"{text[:57]}..."


def told(error: Exception) -> str:
    """Return an error's message for another's, as one line, cut at 500 characters: names in files have any length."""
    text = " ".join(str(error).split())
    return text if len(text) <= 500 else f"{text[:497]}..."
