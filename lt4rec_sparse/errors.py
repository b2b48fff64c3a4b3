"""The base class of errors that the user can correct, and how they show a value."""

from typing import Any


class InputError(ValueError):
    """An input cannot be used; the message is one line that names it, what was found and what was wanted."""


def shown(value: Any) -> str:
    """Return `repr(value)` for an error message, as one line, cut at 60 characters."""
    text = " ".join(line.strip() for line in repr(value).splitlines())
    return text if len(text) <= 60 else f"{text[:57]}..."
