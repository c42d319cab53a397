"""A folder of checkpoints: names, order, what to keep, and the newest one that is whole.

Order is that of saving, which every checkpoint carries as its sequence number: whoever goes back to step 1000 and
trains on has newer checkpoints of smaller steps.
"""

import contextlib
import errno
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from surefoot.checkpoint.reader import Checkpoint
from surefoot.checkpoint.writer import sync_folder
from surefoot.errors import CheckpointError

SUFFIX = ".safetensors"
_NAME = re.compile(r"step-(\d+)\.safetensors")
_NOT_THE_FILES_FAULT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Errors of a process that has too much open: to pass over a file because of them would put an older one first."""


class Skipped(NamedTuple):
    """A checkpoint that was passed over.

    Attributes:
        path: the file.
        reason: why.
    """

    path: Path
    reason: str


def is_file_name(path: Path) -> bool:
    """Whether a path names one checkpoint rather than a folder of them."""
    return path.suffix == SUFFIX or path.is_file()


def path_of(folder: Path, step: int) -> Path:
    """Return the file of a step."""
    return folder / f"step-{step:08}{SUFFIX}"


def step_of(path: Path) -> int | None:
    """Return the step in a file's name, None if it has none."""
    found = _NAME.fullmatch(path.name)
    return int(found[1]) if found else None


def entries(folder: Path) -> list[Path]:
    """Return all that a folder has under a checkpoint's suffix, sorted.

    Raises:
        OSError: the folder cannot be read.
    """
    return sorted(path for path in folder.iterdir() if path.name.endswith(SUFFIX))


def why_not(path: Path, error: CheckpointError | OSError) -> str | None:
    """Say why a file was passed over; None if there is nothing to say, since it has been removed meanwhile.

    Raises:
        OSError: the error is not the file's, but that of a process without memory or with too many open files.
    """
    if isinstance(error, CheckpointError):
        return str(error)
    if error.errno in _NOT_THE_FILES_FAULT:
        raise error
    if isinstance(error, FileNotFoundError):
        return f"{path} is a link to nothing" if path.is_symlink() else None
    return f"{path} cannot be read: {error.strerror or error}"


def open_headers(folder: Path) -> tuple[list[Checkpoint], list[Skipped]]:
    """Open the headers of all checkpoints; return them from the newest on, and those that cannot be opened."""
    found, skipped = [], []
    for path in (path for path in entries(folder) if step_of(path) is not None):
        try:
            found.append(Checkpoint(path))
        except (CheckpointError, OSError) as error:
            if reason := why_not(path, error):
                skipped.append(Skipped(path, reason))
    return sorted(found, key=lambda checkpoint: -checkpoint.manifest["sequence"]), skipped


def open_newest_whole(path: str | os.PathLike[str]) -> tuple[Checkpoint, list[Skipped]]:
    """Return the newest whole checkpoint of a folder, or the one in a file; every byte of it has been checked.

    Returns:
        The checkpoint, and those that would have been preferred but are damaged or cannot be read.

    Raises:
        FileNotFoundError: there is none.
        CheckpointError: there are some, but none is whole.
        OSError: the folder, or the file, cannot be read.
    """
    path = Path(path)
    if is_file_name(path):
        checkpoint = Checkpoint(path)
        checkpoint.verify()
        return checkpoint, []
    if not path.is_dir():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    candidates, skipped = open_headers(path)
    for checkpoint in candidates:
        try:
            checkpoint.verify()
        except (CheckpointError, OSError) as error:
            checkpoint.release()
            if reason := why_not(checkpoint.path, error):
                skipped.append(Skipped(checkpoint.path, reason))
        else:
            return checkpoint, skipped
    if not skipped:
        raise FileNotFoundError(f"there is no checkpoint in {path}: no file is called step-<number>{SUFFIX}")
    raise CheckpointError(f"no checkpoint in {path} is whole:\n  " + "\n  ".join(_reasons(skipped)))


def _reasons(skipped: list[Skipped]) -> Iterator[str]:
    return (reason for _, reason in skipped)


def rotate(folder: Path, keep: int) -> None:
    """Remove all but the newest checkpoints; damaged and unreadable ones are neither counted nor removed."""
    for checkpoint in open_headers(folder)[0][keep:]:
        try:
            with contextlib.suppress(FileNotFoundError):
                checkpoint.path.unlink()
        except OSError as error:  # somebody reads it, on Windows; the new one is whole all the same
            warnings.warn(f"{checkpoint.path} was not removed: {error.strerror}; remove it yourself", stacklevel=3)
    sync_folder(folder)
