"""Reading a checkpoint: its header, its tensors as views of mapped memory, and whether every byte is the one written.

One of sharded tensors has files of shards beside its own, one from each rank; the same class reads them.
"""

import math
import mmap
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from surefoot.checkpoint import migrations
from surefoot.checkpoint.dtypes import BY_NAME
from surefoot.checkpoint.header import CHUNK, LENGTH, MOST_ELEMENTS, Header, Place, Summary, length_of, parse
from surefoot.errors import CheckpointError
from surefoot.files import open_regular

_BLOCK = 1 << 20
"""Bytes that are read at a time, to stay in the processor's cache until their checksum is computed."""


class Shard(NamedTuple):
    """A block of a sharded tensor in the file of a rank.

    Attributes:
        file: the file.
        stored: the block's name there.
        offsets: where it begins in the tensor.
    """

    file: "Checkpoint"
    stored: str
    offsets: tuple[int, ...]

    @property
    def place(self) -> Place:
        """Its place in the file."""
        return self.file.places[self.stored]


class Checkpoint:
    """A checkpoint on disk.  Opening it reads headers only: its own, and those of its files of shards.

    Args:
        path: the file.

    Attributes:
        path: the file.
        header: what it contains; see `Header`.
        manifest: everything that is not a tensor, in the present version of the format.
        files: the files of shards, one from each rank that saved; none if nothing was sharded.
        shards: the blocks of each sharded tensor.
        places: of the tensors by name; one of a sharded tensor says what it is as a whole, not where.

    Raises:
        OSError: it cannot be read, or is no file; a named pipe, for instance, is not waited for.
        CheckpointError: it is not a checkpoint, its header is damaged, its length is wrong, or shards are missing.
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
        self.files: list[Checkpoint] = []
        self.shards: Mapping[str, list[Shard]] = {}
        self.places: Mapping[str, Place] = self.header.places
        if "shards" in self.manifest:
            self._open_shards(self.manifest["shards"])

    def _open_shards(self, facts: Mapping[str, Any]) -> None:
        """Open the files of shards, and see that together they are what the manifest says."""
        try:
            self.files = [_shard_file(self.path.parent / facts["folder"], one) for one in facts["files"]]
            self.shards = found_shards(self.files)
            self.places = {**self.header.places, **whole_places(facts["tensors"], self.shards)}
        except CheckpointError as error:
            raise CheckpointError(f"{self.path} is incomplete: {error}") from None
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            raise CheckpointError(f"{self.path} is not readable: its shards are malformed ({error!r})") from error

    @property
    def nbytes(self) -> int:
        """Bytes of the file, and of the files of shards."""
        return self.header.file_size + sum(file.header.file_size for file in self.files)

    def part(self, label: str, rank: int, world: int) -> tuple[Mapping[str, Any], "Checkpoint"]:
        """Return a part and where its tensors are: a rank's own, such as its generators, if as many ranks saved."""
        own = self.files[rank] if len(self.files) == world > 1 else self
        source = own if label in own.manifest["parts"] else self
        return source.manifest["parts"][label], source

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
        for file in self.files:
            file.release()

    def tensor(self, name: str) -> Tensor:
        """Return a tensor, as it is on disk: read-only by convention, a view of mapped memory unless it is permuted.

        A sharded one is put together, in memory of its own.  `verify` tells whether its bytes are right.

        Raises:
            CheckpointError: there is none of this name.
        """
        place = self.places.get(name)
        if place is None:
            raise CheckpointError(f"{self.path} refers to a tensor `{name}`, which it does not have")
        if name in self.shards:
            return self.block(name, place.shape, (0,) * len(place.shape))
        view = self._data[place.begin : place.end].view(place.dtype).view(place.shape)
        if place.order is None:
            return view
        permuted = view.permute(place.order).contiguous()
        return permuted.permute(sorted(range(view.dim()), key=place.order.__getitem__))

    def copy(self, name: str) -> Tensor:
        """Return a copy of a tensor in memory, in its memory format; see `tensor`."""
        return self.tensor(name).clone()

    def block(self, name: str, shape: Sequence[int], offsets: Sequence[int]) -> Tensor:
        """Return a block of a tensor, of which no more than that is read.

        Args:
            name: of the tensor.
            shape: of the block, which must lie within the tensor.
            offsets: where it begins.
        """
        if name not in self.shards:
            return self.tensor(name)[tuple(slice(o, o + size) for o, size in zip(offsets, shape, strict=True))]
        made = torch.zeros(tuple(shape), dtype=self.places[name].dtype)
        for shard in self.shards[name] if made.numel() else ():
            _copy_overlap(made, offsets, shard)
        return made

    def verify(self, names: Iterable[str] | None = None) -> None:
        """Compare the checksums of tensors, all by default, with their bytes, on as many threads as torch has.

        Raises:
            CheckpointError: some are wrong; it says which.
            OSError: they cannot be read.
        """
        self._refuse(self.corrupted(names))

    def verify_share(self, rank: int, world: int) -> None:
        """Check this rank's share of all tensors, for ranks that divide the reading among them; see `verify`."""
        self._refuse(self._corrupted(lambda found: [name for name, _ in found][rank::world]))

    def _refuse(self, wrong: Sequence[str]) -> None:
        if wrong:
            shown = ", ".join(f"`{name}`" for name in wrong[:5]) + (f" and {len(wrong) - 5} more" if wrong[5:] else "")
            raise CheckpointError(f"{self.path} is corrupted: bytes of {shown} are not those written")

    def corrupted(self, names: Iterable[str] | None = None) -> list[str]:
        """Return the names of the tensors whose bytes are not those written."""
        wanted = None if names is None else set(names)
        return self._corrupted(lambda found: [n for n, of in found if wanted is None or of in wanted])

    def _corrupted(self, choose: Callable[[list[tuple[str, str]]], list[str]]) -> list[str]:
        """Check what `choose` picks from each file, which gets names there beside those of whole tensors."""
        found = self._wrong_here(choose([(name, name) for name in self.header.places]))
        for file in self.files:
            chunks = file.manifest["chunks"]
            of = {name: chunks[name][0] if name in chunks else name for name in file.header.places}
            found += [of[name] for name in file._wrong_here(choose([*of.items()]))]
        return list(dict.fromkeys(found))

    def _wrong_here(self, names: list[str]) -> list[str]:
        """Return which tensors of this file have bytes that are not those written."""
        places = self.header.places
        chunks = [(name, index) for name in names for index in range(_chunks(places[name]))]
        with self._checksums() as checksum, ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
            # Handing out many small chunks takes longer than their checksums.
            apply = pool.map if self.header.file_size > CHUNK else map
            right = apply(lambda chunk: _is_right(checksum, places[chunk[0]], chunk[1]), chunks)
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


def read_manifest(path: Path) -> Mapping[str, Any]:
    """Return the manifest of a file, as it stands there; of files of shards none is opened.

    Raises:
        OSError: it cannot be read.
        CheckpointError: its header is damaged.
    """
    with _opened(path) as file:
        return _read_header(file).manifest


# Shards


def _shard_file(folder: Path, facts: Sequence[Any]) -> Checkpoint:
    """Open a file of shards; the checksum of its header must be that of the file that the checkpoint was made with."""
    name, size, crc32 = facts
    try:
        file = Checkpoint(folder / name)
    except FileNotFoundError:
        raise CheckpointError(f"there is no {folder / name}; files of shards belong beside their checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{folder / name} cannot be read: {error.strerror or error}") from error
    if (file.header.file_size, file.header.crc32) != (size, crc32) or "chunks" not in file.manifest:
        raise CheckpointError(f"{file.path} was written by another save")
    return file


def found_shards(files: Sequence[Checkpoint]) -> dict[str, list[Shard]]:
    """Return the blocks of each tensor in files of shards.

    Raises:
        ValueError, TypeError, KeyError: a file is malformed.
    """
    found: dict[str, list[Shard]] = {}
    for file in files:
        for stored, (name, offsets) in file.manifest["chunks"].items():
            place = file.header.places[stored]
            if len(offsets) != len(place.shape) or not all(type(offset) is int and offset >= 0 for offset in offsets):
                raise ValueError(f"{file.path} has a block at {offsets}")
            found.setdefault(name, []).append(Shard(file, stored, tuple(offsets)))
    return found


def whole_places(tensors: Mapping[str, Any], shards: Mapping[str, list[Shard]]) -> dict[str, Place]:
    """Return what sharded tensors are as a whole.

    Args:
        tensors: dtype and shape of each.
        shards: their blocks.

    Raises:
        CheckpointError: blocks are missing, or are not of their tensor.
    """
    if extra := shards.keys() - tensors.keys():
        raise CheckpointError(f"there are shards of `{min(extra)}`, which it does not have")
    return {name: _whole_place(name, dtype, shape, shards.get(name, [])) for name, (dtype, shape) in tensors.items()}


def _whole_place(name: str, dtype: str, shape: Sequence[int], shards: Sequence[Shard]) -> Place:
    if math.prod(max(size, 1) for size in shape) > MOST_ELEMENTS:
        raise ValueError(f"`{name}` has an impossible shape, {shape}")
    whole = Place(BY_NAME[dtype], tuple(shape), 0)
    places = [shard.place for shard in shards]
    fit = all(
        place.dtype is whole.dtype
        and len(place.shape) == len(whole.shape)
        and all(o + size <= most for o, size, most in zip(shard.offsets, place.shape, whole.shape, strict=True))
        for shard, place in zip(shards, places, strict=True)
    )
    if not fit or sum(place.elements for place in places) != whole.elements:
        raise CheckpointError(f"the shards of `{name}` are not all of {tuple(shape)} of {dtype}")
    norms = [place.summary.norm for place in places]
    norm = None if None in norms else math.hypot(*(norm for norm in norms if norm is not None))
    checksums = tuple(crc for place in places for crc in place.summary.checksums)
    known = norm if places and norm is not None and math.isfinite(norm) else None
    return replace(whole, summary=Summary(checksums, known, sum(place.summary.nonfinite for place in places)))


def _copy_overlap(made: Tensor, offsets: Sequence[int], shard: Shard) -> None:
    """Copy what a block of a tensor, which begins at `offsets`, has in common with another one."""
    begins = [max(o, b) for o, b in zip(offsets, shard.offsets, strict=True)]
    ends = [
        min(o + size, b + other)
        for o, size, b, other in zip(offsets, made.shape, shard.offsets, shard.place.shape, strict=True)
    ]
    if any(begin >= end for begin, end in zip(begins, ends, strict=True)):
        return
    theirs = tuple(slice(begin - b, end - b) for begin, end, b in zip(begins, ends, shard.offsets, strict=True))
    ours = tuple(slice(begin - o, end - o) for begin, end, o in zip(begins, ends, offsets, strict=True))
    made[ours] = shard.file.tensor(shard.stored)[theirs]
