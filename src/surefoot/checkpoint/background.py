"""One write at a time behind the training loop's back, whose error is raised at the next call."""

import atexit
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from surefoot.locks import in_forked_children


class Background:
    """Runs a write on a thread of its own.  The interpreter does not exit before it has ended."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._path: Path | None = None
        self._error: BaseException | None = None

    def start(self, path: Path, write: Callable[[], None]) -> None:
        """Begin a write; the one before must have been waited for."""
        self._path = path
        self._thread = threading.Thread(target=self._run, args=(write,), name=f"saving {path.name}", daemon=False)
        self._thread.start()

    def _run(self, write: Callable[[], None]) -> None:
        try:
            write()
        except BaseException as error:  # noqa: BLE001 (raised where it is waited for)
            self._error = error

    def wait(self) -> None:
        """Wait until nothing is being written.

        Raises:
            RuntimeError: the last write failed; its cause says why.  This is said once.
        """
        if self._thread is not None:
            self._thread.join()
        error, self._thread, self._error = self._error, None, None
        if error is not None:
            raise RuntimeError(f"{self._path} was not written in the background: {error}") from error

    def forget(self) -> None:
        """In a forked child: the write is the parent's."""
        self._thread = self._error = None

    def complain(self) -> None:
        """At exit: say what nobody waited for."""
        try:
            self.wait()
        except RuntimeError as error:
            print(f"surefoot: {error}", file=sys.stderr)  # noqa: T201 (there is no caller any more)


BACKGROUND = Background()
atexit.register(BACKGROUND.complain)
in_forked_children(BACKGROUND.forget)
