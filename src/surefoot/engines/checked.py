"""The checked mode: what reads and writes raw memory verifies every access first, slowly and exactly."""

import os

VARIABLE = "SUREFOOT_CHECKED"


def checked() -> bool:
    """Return whether kernels are to be checked: `$SUREFOOT_CHECKED` is 1, not 0 or empty.

    Raises:
        ValueError: it is something else.
    """
    value = os.environ.get(VARIABLE, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{VARIABLE} must be 1 or 0, but is {value!r}")
    return value == "1"
