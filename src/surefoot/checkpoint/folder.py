"""A folder of checkpoints: names, order, what to keep, and the newest one that is whole.

Order is that of saving, which every checkpoint carries as its sequence number: whoever goes back to step 1000 and
trains on has newer checkpoints of smaller steps.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from surefoot.checkpoint.reader import Checkpoint
from surefoot.checkpoint.writer import sync_folder
from surefoot.errors import CheckpointError

SUFFIX = ".safetensors"
_NAME = re.compile(r"step-(\d+)\.safetensors")


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


def open_headers(folder: Path) -> tuple[list[Checkpoint], list[Skipped]]:
    """Open the headers of all checkpoints; return them from the newest on, and those that cannot be opened."""
    found, skipped = [], []
    for path in sorted(folder.glob(f"step-*{SUFFIX}")):
        if step_of(path) is None:
            continue
        try:
            found.append(Checkpoint(path))
        except CheckpointError as error:
            skipped.append(Skipped(path, str(error)))
        except FileNotFoundError:  # rotated away meanwhile
            continue
    return sorted(found, key=lambda checkpoint: -checkpoint.manifest["sequence"]), skipped


def open_newest_whole(path: str | os.PathLike[str]) -> tuple[Checkpoint, list[Skipped]]:
    """Return the newest whole checkpoint of a folder, or the one in a file; every byte of it has been checked.

    Returns:
        The checkpoint, and those that would have been preferred but are damaged.

    Raises:
        FileNotFoundError: there is none.
        CheckpointError: there are some, but none is whole.
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
        except CheckpointError as error:
            skipped.append(Skipped(checkpoint.path, str(error)))
        else:
            return checkpoint, skipped
    if not skipped:
        raise FileNotFoundError(f"there is no checkpoint in {path}: no file is called step-<number>{SUFFIX}")
    raise CheckpointError(f"no checkpoint in {path} is whole:\n  " + "\n  ".join(_reasons(skipped)))


def _reasons(skipped: list[Skipped]) -> Iterator[str]:
    return (reason for _, reason in skipped)


def rotate(folder: Path, keep: int) -> None:
    """Remove all but the newest checkpoints; damaged ones are neither counted nor removed."""
    for checkpoint in open_headers(folder)[0][keep:]:
        with contextlib.suppress(FileNotFoundError):
            checkpoint.path.unlink()
    sync_folder(folder)
