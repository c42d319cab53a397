"""The checked mode: what reads and writes raw memory verifies every access first, slowly and exactly."""

from surefoot.environment import switch

VARIABLE = "SUREFOOT_CHECKED"


def checked() -> bool:
    """Return whether kernels are to be checked: `$SUREFOOT_CHECKED` is 1, not 0 or empty.

    Raises:
        ValueError: it is something else.
    """
    return switch(VARIABLE, default=False)
