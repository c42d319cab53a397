"""Locks that a forked child finds open: the threads that held them are not there to open them."""

import os
import threading
import weakref


class Lock:
    """A lock that its own thread may take several times."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        _all.add(self)

    def acquire(self) -> None:
        """Wait for the lock and take it."""
        self._lock.acquire()

    def release(self) -> None:
        """Open the lock as often as it was taken, except in a child that was forked meanwhile, where it is open."""
        try:
            self._lock.release()
        except RuntimeError:
            if not _in_child:
                raise

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def renew(self) -> None:
        """Open the lock, whoever holds it."""
        self._lock = threading.RLock()


_all: "weakref.WeakSet[Lock]" = weakref.WeakSet()
_in_child: list[int] = []


def _renew() -> None:
    _in_child.append(os.getpid())
    for lock in _all:
        lock.renew()


os.register_at_fork(after_in_child=_renew)
