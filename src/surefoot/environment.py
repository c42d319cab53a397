"""Switches that are environment variables: `$NAME` is 1 or 0."""

import os


def switch(name: str, *, default: bool) -> bool:
    """Return whether a switch is on; it is as `default` says where the variable is missing or empty.

    Raises:
        ValueError: it is something else than 1 or 0.
    """
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{name} must be 1 or 0, but is {value!r}")
    return value == "1" if value else default
