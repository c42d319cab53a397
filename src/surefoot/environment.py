"""Environment variables: which there are, and switches, where `$NAME` is 1 or 0."""

import os
from collections.abc import Mapping

VARIABLES: Mapping[str, str] = {
    "SUREFOOT_CACHE_DIR": "the folder of compiled kernels",
    "SUREFOOT_CHECKED": "1 lets kernels verify every access first",
    "SUREFOOT_ENGINE": "the engine of every step: eager, foreach or fused",
    "SUREFOOT_NATIVE_GUARD": "0 leaves it to Python to see what has changed between steps",
    "SUREFOOT_QUIET": "1 hides the line for those who wait for kernels",
    "SUREFOOT_RUN": "what `surefoot run` tells its script",
    "SUREFOOT_RUN_PREFIX": "the same: which environment it is for",
}
"""Every environment variable that is read, and what it is for."""
SWITCHES = ("SUREFOOT_CHECKED", "SUREFOOT_NATIVE_GUARD", "SUREFOOT_QUIET")


def switch(name: str, *, default: bool) -> bool:
    """Return whether a switch is on; it is as `default` says where the variable is missing or empty.

    Raises:
        ValueError: it is something else than 1 or 0.
    """
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{name} must be 1 or 0, but is {value!r}")
    return value == "1" if value else default
