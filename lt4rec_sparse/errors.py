"""The one family of errors that the user can mend."""


class InputError(ValueError):
    """What was given cannot be used; the message is one line that names the thing, what was got and what was wanted."""
