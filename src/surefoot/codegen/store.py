"""Kernels on disk: a folder of readable sources and their object code, which many processes may share.

The folder is `$SUREFOOT_CACHE_DIR`, else `surefoot` in the user's cache folder.  It is used only if nobody but its
owner, this user or root, can write to it, and a file only if the same is true of it and its digest fits its name and
content.  A file appears whole or not at all.  Where something cannot be done, kernels are compiled and not kept.
"""

import contextlib
import hashlib
import os
import secrets
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LIMIT = 64 << 20
"""Bytes that the files of the folder may take together; beyond, those that were not used for longest go."""
PATIENCE = 60.0
"""Seconds for which a process waits for another one that compiles the same kernel."""
_DAY, _HOUR = 86400.0, 3600.0
_TEMPORARY, _LOCKS = ".tmp", ".locks"
_NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
_DIGEST = hashlib.sha256


class Entry(NamedTuple):
    """A file in the folder: its name, its bytes, and when it was last used, to a day, in seconds since 1970."""

    name: str
    size: int
    used: float


def cache_dir() -> Path:
    """Return the folder.

    Raises:
        FileNotFoundError: it is in a home directory that cannot be found.
    """
    try:
        if chosen := os.environ.get("SUREFOOT_CACHE_DIR"):
            return Path(chosen).expanduser()
        home = os.environ.get("LOCALAPPDATA") if sys.platform == "win32" else os.environ.get("XDG_CACHE_HOME")
        return Path(home or Path.home() / ".cache") / "surefoot"
    except RuntimeError as error:
        raise FileNotFoundError(f"{error}; SUREFOOT_CACHE_DIR can name a folder") from error


def unusable_reason() -> str | None:
    """Return why the folder is not used, None if it is; one that is not there yet is made when a kernel is kept."""
    try:
        if os.path.lexists(cache_dir()):
            _folder()
    except OSError as reason:
        return str(reason)
    return None


def read(name: str) -> bytes | None:
    """Return object code; None where there is none, or none that can be trusted."""
    try:
        content = _content(_folder() / name)
    except OSError:
        return None
    digest, code = content[:32], content[32:]
    return code if code and _digest(name, code) == digest else None


def sources(folder: Path) -> dict[str, str]:
    """Return the sources of the kernels in a folder, which nobody else can write to, by their names.

    Raises:
        OSError: there are none, or the folder or one of them cannot be used; the message says why.
    """
    _check_folder(folder)
    if not (kernels := sorted(folder.glob("*.o"))):
        raise FileNotFoundError(f"{folder} has no kernels in it")
    return {path.stem: _content(path.with_suffix(".py")).decode() for path in kernels}


def write(name: str, source: str, code: bytes) -> None:
    """Keep object code under a name, and its source beside it; or leave it."""
    with contextlib.suppress(OSError):
        folder = _folder(make=True)
        _publish(folder / f"{Path(name).stem}.py", source.encode())
        _publish(folder / name, _digest(name, code) + code)
        _shrink(folder, LIMIT)


@contextlib.contextmanager
def alone(name: str) -> Iterator[None]:
    """Let no other process that shares the folder do the same for a name meanwhile, where that can be had."""
    with contextlib.ExitStack() as opened:
        if fcntl is not None:
            with contextlib.suppress(OSError):
                file = os.open(_folder(make=True) / _LOCKS, os.O_RDWR | os.O_CREAT | _NO_LINK, 0o600)
                opened.callback(os.close, file)  # which opens the lock, as the end of a process does
                _wait(file, int.from_bytes(_DIGEST(name.encode()).digest()[:7], "big"))
        yield


def entries() -> list[Entry]:
    """Return the files of the folder, first what was not used for longest.

    Raises:
        OSError: the folder cannot be used.
    """
    with os.scandir(_folder()) as found:
        files = [(file.name, file.stat(follow_symlinks=False)) for file in found if file.is_file(follow_symlinks=False)]
    kept = (Entry(name, status.st_size, status.st_mtime) for name, status in files if name != _LOCKS)
    return sorted(kept, key=lambda entry: entry.used)


def clear() -> None:
    """Remove the files of the folder.

    Raises:
        OSError: the folder cannot be used.
    """
    _shrink(_folder(), -1)


def _folder(*, make: bool = False) -> Path:
    """Return the folder, which nobody else can write to.

    Raises:
        OSError: there is none, or others can write to it; the message says who.
    """
    folder = cache_dir()
    if make:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o755)
    _check_folder(folder)
    return folder


def _check_folder(folder: Path) -> None:
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(f"{folder} is not a folder" + " but a link" * stat.S_ISLNK(found.st_mode))
    _check(folder, found)


def _check(path: Path, found: os.stat_result) -> None:
    if sys.platform == "win32":
        return
    if found.st_uid not in (0, os.geteuid()):
        raise PermissionError(f"{path} belongs to another user, of uid {found.st_uid}")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"others can write to {path}; to use it, chmod go-w {path}")


def _content(path: Path) -> bytes:
    with os.fdopen(os.open(path, os.O_RDONLY | _NO_LINK), "rb") as file:
        found = os.fstat(file.fileno())
        _check(path, found)
        content = file.read()
    if time.time() - found.st_mtime > _DAY:
        with contextlib.suppress(OSError):
            os.utime(path)
    return content


def _digest(name: str, code: bytes) -> bytes:
    return _DIGEST(name.encode() + b"\n" + code).digest()


def _publish(path: Path, content: bytes) -> None:
    """Put a file into the folder, whole."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{_TEMPORARY}")
    file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_LINK, 0o644)
    try:
        with os.fdopen(file, "wb") as opened:
            opened.write(content)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _shrink(folder: Path, limit: int) -> None:
    """Remove what killed writers have left, and what was not used for longest until the rest fits."""
    found = entries()
    excess = sum(entry.size for entry in found) - limit
    for entry in found:
        abandoned = entry.name.endswith(_TEMPORARY) and time.time() - entry.used > _HOUR
        if excess > 0 or abandoned:
            with contextlib.suppress(OSError):
                (folder / entry.name).unlink()
            excess -= entry.size


def _wait(file: int, place: int) -> None:
    """Wait for the lock of a byte of a file; after a while go on without it."""
    give_up = time.monotonic() + PATIENCE
    while time.monotonic() < give_up:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
        except (BlockingIOError, PermissionError):  # another process has it
            time.sleep(0.01)
        else:
            return
