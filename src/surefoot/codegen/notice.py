"""A line for a user who waits: kernels are being compiled."""

import contextlib
import sys
import threading
from collections.abc import Iterator

from surefoot.environment import switch

VARIABLE = "SUREFOOT_QUIET"
AFTER = 1.0
"""Seconds after which a user wants to know."""
_TEXT = f"surefoot: compiling kernels for this machine; later runs find them on disk ({VARIABLE}=1 hides this line)"
_said = threading.Event()


@contextlib.contextmanager
def notice() -> Iterator[None]:
    """Say that kernels are compiled if that takes long: once in a process, on a terminal, unless it is to be quiet.

    Raises:
        ValueError: `$SUREFOOT_QUIET` is neither 1 nor 0.
    """
    if switch(VARIABLE, default=False) or _said.is_set() or not (sys.stderr and sys.stderr.isatty()):
        yield
        return
    timer = threading.Timer(AFTER, _say)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _say() -> None:
    _said.set()
    with contextlib.suppress(OSError, ValueError):  # the terminal may be gone
        print(_TEXT, file=sys.stderr, flush=True)  # noqa: T201 (to a person)
