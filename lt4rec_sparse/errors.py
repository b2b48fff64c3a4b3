"""The base class of errors that the user can correct."""


class InputError(ValueError):
    """An input cannot be used; the message is one line that names it, what was found and what was wanted."""
