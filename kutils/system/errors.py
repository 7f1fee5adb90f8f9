"""Writes error messages for the user."""


def first_line(error: Exception) -> str:
    """The first line of an error's message; the name of its class if it has none."""
    return (str(error).strip() or type(error).__name__).split("\n")[0]
