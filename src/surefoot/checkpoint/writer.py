"""Writing a file: tensors go from memory to disk chunk by chunk, checksummed on the way, and appear all at once.

The file is written under a hidden name beside its own, synced, and renamed.  Whatever happens before the rename, what
was there stays; a hidden file that a killed process leaves is unlocked, and the next save removes it.
"""

import contextlib
import errno
import math
import os
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from surefoot.checkpoint.dtypes import as_bytes, as_real, flat, is_numeric
from surefoot.checkpoint.header import CHUNK, Summary, arrange, bytes_of, compose
from surefoot.files import BINARY, open_regular, replace

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PARTIAL = ".surefoot-partial"
_AT_ONCE = 1 << 16
"""Bytes up to which handing a chunk to another thread takes longer than its checksum."""
_BLOCK = 1 << 14
"""Elements of which torch takes the norm on one thread."""
_TRUSTED_NORMS = (1e-10, 1e15)
"""Norms in float32 to which squares that underflow or overflow cannot have contributed."""
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EACCES)
"""How network file systems, and folders that may be written but not read, refuse to sync a folder."""
_LONG = 200
"""Bytes of a name from which a hidden file, whose name may be at most 255 bytes, does without it."""


def write(path: Path, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> None:
    """Write a checkpoint; it appears under its name when it is whole and on the disk, replacing what was there.

    Args:
        path: the file.
        tensors: by name; on any device, of any strides.
        manifest: everything else, ready for JSON.

    Raises:
        OSError: it could not be written; what was at `path` is as it was.
        ValueError: names and plain data are too large.
    """
    places = arrange(tensors)
    reserved = compose(places, manifest)
    with replacing(path, len(reserved) + bytes_of(places.values())) as file:
        write_into(file, tensors, manifest)


def write_into(file: int, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> None:
    """Write a checkpoint to a descriptor; see `write`."""
    places = arrange(tensors)
    with ThreadPoolExecutor(1) as pool:
        _write_all(file, memoryview(compose(places, manifest)))
        found = {key: _stream(file, tensors[key], pool) for key in places}
        summaries = {key: _joined([part.result() for part in parts]) for key, parts in found.items()}
    os.lseek(file, 0, os.SEEK_SET)
    _write_all(file, memoryview(compose(places, manifest, summaries)))


# Appearing at once


@contextlib.contextmanager
def replacing(path: Path, size: int) -> Iterator[int]:
    """Yield a descriptor to write to; what was written replaces `path` at the end, unless something is raised.

    Args:
        path: the file.
        size: how many bytes it will have, for the message if they do not fit.

    Raises:
        OSError: it could not be written.
    """
    try:
        partial, file = _open_partial(path)
        closing = contextlib.ExitStack()
        closing.callback(os.close, file)
        try:
            yield file
            os.fsync(file)
            if fcntl is None:  # Windows renames no open file; elsewhere it stays locked until it has its name
                closing.close()
            replace(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):  # what was raised matters more
                closing.close()
                partial.unlink()
            raise
        closing.close()
        sync_folder(path.parent)
    except OSError as error:
        if explained := _explained(error, path, size):
            raise explained from error
        raise


def _explained(error: OSError, path: Path, size: int) -> OSError | None:
    """Return an error that says what to do about another, where there is something to say."""
    if error.errno in _NO_SPACE:
        needs = f"the checkpoint needs {size:,} bytes, so make room, or keep fewer with keep="
        return OSError(error.errno, f"{error.strerror}: {needs}; nothing was replaced", str(path))
    if isinstance(error, FileNotFoundError) and not path.parent.is_dir():
        return FileNotFoundError(error.errno, "the folder was removed while a checkpoint was written to it", str(path))
    return None


def _open_partial(path: Path) -> tuple[Path, int]:
    """Make and lock a hidden file; it may be taken for a leftover until it is locked, so look whether it is there."""
    while True:
        name = f".{path.name}" if len(os.fsencode(path.name)) < _LONG else ""
        partial = path.with_name(f"{name}.{uuid4().hex[:12]}{PARTIAL}")
        file = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | BINARY, 0o666)
        if _lock(file) and partial.exists():
            return partial, file
        os.close(file)


def _lock(file: int) -> bool:
    """Take a file's lock if no one has it; the system frees it when the process ends, however it ends."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a filesystem without locks
        return True
    return True


@contextlib.contextmanager
def lock_file(path: Path) -> Iterator[None]:
    """Make a file and hold its lock inside of the `with` block; the file stays."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | BINARY, 0o666)
    try:
        _lock(file)
        yield
    finally:
        os.close(file)


def is_unlocked(path: Path) -> bool:
    """Return whether a file is there whose lock nobody holds; False where locks cannot tell."""
    if fcntl is None:
        return False
    try:
        with open_regular(path) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def remove_leftovers(folder: Path) -> None:
    """Remove the hidden files of writes that never ended."""
    if fcntl is None:
        return
    for partial in folder.glob(f".*{PARTIAL}"):
        with contextlib.suppress(OSError), open_regular(partial) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            partial.unlink()


def sync_folder(folder: Path) -> None:
    """Bring a folder's names to the disk."""
    if os.name != "posix":
        return
    try:
        file = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise


# Bytes


def _write_all(file: int, data: memoryview) -> None:
    """Write all of `data`; the system may take less at a time."""
    while data:
        data = data[os.write(file, data) :]


def _stream(file: int, tensor: Tensor, pool: Executor) -> list[Future[Summary]]:
    """Write a tensor's bytes, and have its chunks summarized meanwhile."""
    vector = flat(tensor)
    parts = []
    for chunk in torch.split(vector, CHUNK // vector.element_size()) if vector.numel() else ():
        parts.append(_begun(pool, chunk))
        _write_all(file, as_bytes(chunk))
    return parts


def _begun(pool: Executor, chunk: Tensor) -> Future[Summary]:
    if chunk.nbytes > _AT_ONCE:
        return pool.submit(summarize, chunk)
    done: Future[Summary] = Future()
    done.set_result(summarize(chunk))
    return done


def summarize(chunk: Tensor) -> Summary:
    """Return the checksum, the norm and the number of non-finite values of a vector on the CPU."""
    crc = zlib.crc32(as_bytes(chunk))
    if not is_numeric(chunk.dtype):
        return Summary((crc,))
    with torch.no_grad():
        values = as_real(chunk).view(-1)
        # Blocks too small for torch to wake threads, which would take the cores from the writing one.
        norm = math.hypot(*torch.stack(torch._foreach_norm(torch.split(values, _BLOCK))).tolist())
        if _TRUSTED_NORMS[0] < norm < _TRUSTED_NORMS[1]:
            return Summary((crc,), norm)
        finite = values.isfinite()
        wide = torch.where(finite, values, 0).double()
        whole = finite.view(-1, 2).all(1) if chunk.is_complex() else finite
        return Summary((crc,), float(torch.linalg.vector_norm(wide)), chunk.numel() - int(whole.sum()))


def _joined(parts: list[Summary]) -> Summary:
    """Join the summaries of a tensor's chunks."""
    norms = [part.norm for part in parts if part.norm is not None]
    norm = math.hypot(*norms)
    known = bool(norms) and math.isfinite(norm)
    checksums = tuple(crc for part in parts for crc in part.checksums)
    return Summary(checksums, norm if known else None, sum(part.nonfinite for part in parts))
