"""Files: opening what a user has named, which may be anything, and writing so that a file is whole or stays as it was.

Nothing here knows what is in a file.
"""

import errno
import os
import shutil
import stat
import sys
import time
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

BINARY: int = getattr(os, "O_BINARY", 0)
"""Without it, Windows writes line feeds as two bytes."""
_NONBLOCK: int = getattr(os, "O_NONBLOCK", 0)
_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_PATIENCE = (0.01, 0.03, 0.1, 0.3, 0.6)
"""Seconds between attempts to replace a file that another process has open, on Windows."""


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Return a file, opened for reading; whatever else has that name is refused and never waited for.

    Raises:
        OSError: it cannot be opened, or is a folder, a named pipe, a device.
    """
    _refuse_special(path, os.stat(path).st_mode)  # noqa: PTH116 (opening a device may do something)
    descriptor = os.open(path, os.O_RDONLY | BINARY | _NONBLOCK)
    try:
        _refuse_special(path, os.fstat(descriptor).st_mode)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _refuse_special(path: str | os.PathLike[str], mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise OSError(errno.EINVAL, f"Not a file but {kind}", os.fspath(path))


def replace(source: Path, target: Path) -> None:
    """Rename a file over another; where the system refuses that while somebody reads the other, try for a second.

    Raises:
        OSError: it could not be renamed; both are as they were.
    """
    for seconds in _PATIENCE if sys.platform == "win32" else ():
        try:
            os.replace(source, target)  # noqa: PTH105 (one rename, of which tests see each)
        except PermissionError:
            time.sleep(seconds)
        else:
            return
    os.replace(source, target)  # noqa: PTH105


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file that appears when it is whole, in the place of what was there; a link goes on pointing to it.

    What is no file, a device or a pipe, is written to as it is.

    Raises:
        OSError: it could not be written; what was there stays.  The error names `path`.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            with path.open("wb") as special:
                special.write(content)
        else:
            _write_beside(Path(os.path.realpath(path)), content)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _write_beside(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{uuid4().hex[:12]}.surefoot-tmp")
    try:
        with partial.open("xb") as file:
            file.write(content)
        if path.exists():
            shutil.copymode(path, partial)
        replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
