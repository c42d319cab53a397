"""Reading a file: its header, its tensors as views of mapped memory, and whether every byte is the one written."""

import math
import mmap
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from surefoot.checkpoint import migrations
from surefoot.checkpoint.header import CHUNK, LENGTH, Header, Place, length_of, parse
from surefoot.errors import CheckpointError
from surefoot.files import open_regular

_BLOCK = 1 << 20
"""Bytes that are read at a time, to stay in the processor's cache until their checksum is computed."""


class Checkpoint:
    """A checkpoint on disk.  Opening it reads the header only.

    Args:
        path: the file.

    Attributes:
        path: the file.
        header: what it contains; see `Header`.
        manifest: everything that is not a tensor, in the present version of the format.

    Raises:
        OSError: it cannot be read, or is no file; a named pipe, for instance, is not waited for.
        CheckpointError: it is not a checkpoint, its header is damaged, or its length is wrong.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            with _opened(self.path) as file:
                self._identity = _identity(file)
                self.header = _read_header(file)
            self.manifest: Mapping[str, Any] = migrations.migrated(self.header.manifest)
        except CheckpointError as error:
            raise CheckpointError(f"{self.path} is {error}") from None

    @property
    def places(self) -> Mapping[str, Place]:
        """The tensors' places in the file, by name."""
        return self.header.places

    @cached_property
    def _data(self) -> Tensor:
        """The tensors' bytes, mapped; private, so that writing to them would not change the file."""
        size = self.header.file_size - self.header.size
        if not size:
            return torch.empty(0, dtype=torch.uint8)
        with self._opened_again() as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return torch.frombuffer(mapped, dtype=torch.uint8, offset=self.header.size)

    @contextmanager
    def _opened_again(self) -> Iterator[BinaryIO]:
        """Yield the file whose header was read; another may have taken its name since."""
        with _opened(self.path) as file:
            if _identity(file) != self._identity:
                raise CheckpointError(f"{self.path} was changed while it was read; load it again")
            yield file

    def release(self) -> None:
        """Let go of the file.  Some systems replace no file that is mapped, so tensors of it must be gone too."""
        self.__dict__.pop("_data", None)

    def tensor(self, name: str) -> Tensor:
        """Return a tensor, as it is on disk: read-only by convention, a view of mapped memory unless it is permuted.

        `verify` tells whether its bytes are right.

        Raises:
            CheckpointError: there is none of this name.
        """
        place = self.places.get(name)
        if place is None:
            raise CheckpointError(f"{self.path} refers to a tensor `{name}`, which it does not have")
        view = self._data[place.begin : place.end].view(place.dtype).view(place.shape)
        if place.order is None:
            return view
        permuted = view.permute(place.order).contiguous()
        return permuted.permute(sorted(range(view.dim()), key=place.order.__getitem__))

    def copy(self, name: str) -> Tensor:
        """Return a copy of a tensor in memory, in its memory format; see `tensor`."""
        return self.tensor(name).clone()

    def verify(self, names: Iterable[str] | None = None) -> None:
        """Compare the checksums of tensors, all by default, with their bytes, on as many threads as torch has.

        Raises:
            CheckpointError: some are wrong; it says which.
            OSError: they cannot be read.
        """
        if wrong := self.corrupted(names):
            shown = ", ".join(f"`{name}`" for name in wrong[:5]) + (f" and {len(wrong) - 5} more" if wrong[5:] else "")
            raise CheckpointError(f"{self.path} is corrupted: bytes of {shown} are not those written")

    def corrupted(self, names: Iterable[str] | None = None) -> list[str]:
        """Return the names of the tensors whose bytes are not those written."""
        chosen = self.places if names is None else names
        chunks = [(name, index) for name in chosen for index in range(_chunks(self.places[name]))]
        with self._checksums() as checksum, ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
            # Handing out many small chunks takes longer than their checksums.
            apply = pool.map if self.header.file_size > CHUNK else map
            right = apply(lambda chunk: _is_right(checksum, self.places[chunk[0]], chunk[1]), chunks)
            return list(dict.fromkeys(name for (name, _), fine in zip(chunks, right, strict=True) if not fine))

    @contextmanager
    def _checksums(self) -> Iterator[Callable[[int, int], int]]:
        """Yield a function from begin and end to the checksum of these bytes among the tensors'.

        They are read, not mapped, where that is possible on many threads: of a disk that fails, or a file that is cut
        off meanwhile, a read says so, while touching mapped memory ends the process.
        """
        if sys.platform == "win32":
            data = self._data.numpy().data
            yield lambda begin, end: zlib.crc32(data[begin:end])
            return
        with self._opened_again() as file:
            descriptor, start = file.fileno(), self.header.size
            yield lambda begin, end: _checksum(descriptor, start + begin, start + end)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Yield an open file; errors of reading it name it, as those of opening it do."""
    try:
        with open_regular(path) as file:
            yield file
    except OSError as error:
        if error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _identity(file: BinaryIO) -> tuple[int, ...]:
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_size


def _read_header(file: BinaryIO) -> Header:
    size = os.fstat(file.fileno()).st_size
    length = length_of(file.read(LENGTH), size)
    text = file.read(length)
    if len(text) < length:
        raise CheckpointError("truncated: it became shorter while it was read")
    return parse(text, size)


def _checksum(file: int, begin: int, end: int) -> int:
    crc = 0
    while begin < end and (block := os.pread(file, min(_BLOCK, end - begin), begin)):
        crc = zlib.crc32(block, crc)
        begin += len(block)
    return crc if begin == end else -1


def _chunks(place: Place) -> int:
    return math.ceil(place.nbytes / CHUNK)


def _is_right(checksum: Callable[[int, int], int], place: Place, index: int) -> bool:
    begin = place.begin + index * CHUNK
    return checksum(begin, min(begin + CHUNK, place.end)) == place.summary.checksums[index]
