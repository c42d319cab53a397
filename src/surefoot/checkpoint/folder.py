"""A folder of checkpoints: names, order, what to keep, and the newest one that is whole.

Order is that of saving, which every checkpoint carries as its sequence number: whoever goes back to step 1000 and
trains on has newer checkpoints of smaller steps.
"""

import contextlib
import errno
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

from surefoot.checkpoint.ranks import ALONE, Ranks
from surefoot.checkpoint.reader import Checkpoint, read_manifest
from surefoot.checkpoint.writer import is_unlocked, lock_file, remove_leftovers, sync_folder
from surefoot.errors import CheckpointError

SUFFIX = ".safetensors"
SHARDS = ".shards"
"""How folders end that hold the shards of a checkpoint: `<its name>.<12 digits>.shards` beside it."""
LOCK = ".lock"
_UNIQUE = len(".012345678901")
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


def open_newest_whole(path: str | os.PathLike[str], ranks: Ranks = ALONE) -> tuple[Checkpoint, list[Skipped]]:
    """Return the newest whole checkpoint of a folder, or the one in a file; every byte of it has been checked.

    Ranks take the same one, and divide the checking among them.

    Returns:
        The checkpoint, and those that would have been preferred but are damaged or cannot be read.

    Raises:
        FileNotFoundError: there is none.
        CheckpointError: there are some, but none is whole.
        OSError: the folder, or the file, cannot be read.
    """
    path = Path(path)
    if is_file_name(path):
        found: list[Checkpoint] = []
        ranks.do(lambda: found.append(_checked(Checkpoint(path), ranks)), "checking")
        return found[0], []
    if not ranks.alone:
        return _open_together(path, ranks)
    candidates, skipped = _candidates(path)
    for checkpoint in candidates:
        try:
            return _checked(checkpoint, ranks), skipped
        except (CheckpointError, OSError) as error:
            checkpoint.release()
            if reason := why_not(checkpoint.path, error):
                skipped.append(Skipped(checkpoint.path, reason))
    raise _none_whole(path, skipped)


def _candidates(path: Path) -> tuple[list[Checkpoint], list[Skipped]]:
    if not path.is_dir():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    return open_headers(path)


def _checked(checkpoint: Checkpoint, ranks: Ranks) -> Checkpoint:
    """Return a checkpoint of which this rank has checked its share."""
    checkpoint.verify_share(ranks.rank, ranks.world)
    return checkpoint


def _open_together(path: Path, ranks: Ranks) -> tuple[Checkpoint, list[Skipped]]:
    """Return the newest checkpoint that all ranks find whole."""

    def listed() -> tuple[list[Path], list[Skipped]]:
        found, skipped = _candidates(path)
        return [checkpoint.path for checkpoint in found], skipped

    candidates, skipped = ranks.first(listed, "looking for checkpoints")
    for candidate in candidates:
        found, reason = None, None
        try:
            found = _checked(Checkpoint(candidate), ranks)
        except (CheckpointError, OSError) as error:
            reason = str(error)
        reasons = [one for one in ranks.gather(reason) if one is not None]
        if found is not None and not reasons:
            return found, skipped
        skipped.append(Skipped(candidate, reasons[0]))
    raise _none_whole(path, skipped)


def _none_whole(path: Path, skipped: list[Skipped]) -> Exception:
    """Return the error that says that there is nothing to load."""
    if not skipped:
        return FileNotFoundError(f"there is no checkpoint in {path}: no file is called step-<number>{SUFFIX}")
    return CheckpointError(f"no checkpoint in {path} is whole:\n  " + "\n  ".join(_reasons(skipped)))


def _reasons(skipped: list[Skipped]) -> Iterator[str]:
    return (reason for _, reason in skipped)


# Where the next one goes


def next_target(path: Path, step: int | None) -> tuple[Path, int | None, int]:
    """Return the file to write, its step and its sequence number; make the folder, and remove what killed saves left.

    Args:
        path: as `save` takes it.
        step: the same.

    Raises:
        OSError: the folder cannot be made or read, or the file is a folder.
    """
    place = path.parent if is_file_name(path) else path
    _make_folder(place)
    remove_leftovers(place)
    remove_unreferenced(place)
    if is_file_name(path):
        _refuse_folder(path, f"`path` ends in {SUFFIX} and so names a file, but it is a folder; name another")
        return path, step, 0
    found, skipped = open_headers(place)
    newest = found[0].manifest if found else {"step": -1, "sequence": -1}
    # One that cannot be read now may be readable again: it is not overwritten, nor taken for newer than this one.
    hidden = max((step_of(skip.path) or 0 for skip in skipped), default=-1)
    number = max(newest["step"] or 0, hidden) + 1 if step is None else step
    target = path_of(place, number)
    _refuse_folder(target, f"`step` {number} cannot be saved: a folder has its name; move it away")
    return target, number, max(newest["sequence"], hidden) + 1


def _refuse_folder(target: Path, words: str) -> None:
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, words, str(target))


def _make_folder(place: Path) -> None:
    if not place.is_dir():
        place.mkdir(parents=True)
        sync_folder(place.parent)


def rotate(folder: Path, keep: int) -> None:
    """Remove all but the newest checkpoints; damaged and unreadable ones are neither counted nor removed."""
    for checkpoint in open_headers(folder)[0][keep:]:
        try:
            with contextlib.suppress(FileNotFoundError):
                checkpoint.path.unlink()
        except OSError as error:  # somebody reads it, on Windows; the new one is whole all the same
            warnings.warn(f"{checkpoint.path} was not removed: {error.strerror}; remove it yourself", stacklevel=3)
    sync_folder(folder)
    remove_unreferenced(folder)


# Folders of shards


def shards_of(target: Path) -> Path:
    """Return a new name for the folder in which ranks write the shards of a checkpoint."""
    return target.with_name(f"{target.name.removesuffix(SUFFIX)}.{uuid4().hex[:12]}{SHARDS}")


@contextlib.contextmanager
def writing_shards(folder: Path) -> Iterator[None]:
    """Make a folder of shards and hold it, so that no other save takes it for one that nobody needs.

    What is raised removes it, unless a checkpoint refers to it by then.
    """
    folder.mkdir()
    with lock_file(folder / LOCK):
        try:
            yield
        except BaseException:
            if not _is_needed(folder):
                shutil.rmtree(folder, ignore_errors=True)
            raise


def remove_unreferenced(place: Path) -> None:
    """Remove folders of shards that belong to no checkpoint, and are not being written to."""
    for folder in place.glob(f"*{SHARDS}"):
        if not _is_needed(folder) and is_unlocked(folder / LOCK):
            shutil.rmtree(folder, ignore_errors=True)


def _is_needed(folder: Path) -> bool:
    """Return whether the checkpoint of its name refers to a folder of shards, or cannot be asked."""
    target = folder.with_name(folder.name.removesuffix(SHARDS)[:-_UNIQUE] + SUFFIX)
    try:
        shards = read_manifest(target).get("shards")
    except FileNotFoundError:
        return target.is_symlink()
    except (CheckpointError, OSError):
        return True
    return isinstance(shards, dict) and shards.get("folder") == folder.name
