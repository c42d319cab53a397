"""What a forked child must not take over: its parent's threads, and the locks that they held, are not there."""

import os
import threading
import weakref
from collections.abc import Callable


def in_forked_children(call: Callable[[], object]) -> None:
    """Let `call` be called in every child that is forked from now on, on systems that fork."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=call)


class Lock:
    """A lock that its own thread may take several times, and that a forked child finds open.

    Attributes:
        now: what is taken, until a child is forked: a `with` block around it costs no call of Python's.
    """

    def __init__(self) -> None:
        self.now, self._renewed = threading.RLock(), False
        _all.add(self)

    def acquire(self) -> None:
        """Wait for the lock and take it."""
        self.now.acquire()

    __enter__ = acquire

    def release(self, *_: object) -> None:
        """Open the lock as often as it was taken, except in a child that was forked meanwhile, where it is open."""
        try:
            self.now.release()
        except RuntimeError:
            if not self._renewed:
                raise

    __exit__ = release

    def renew(self) -> None:
        """Open the lock, whoever holds it."""
        self.now, self._renewed = threading.RLock(), True


_all: "weakref.WeakSet[Lock]" = weakref.WeakSet()


def _renew() -> None:
    for lock in _all:
        lock.renew()


in_forked_children(_renew)
