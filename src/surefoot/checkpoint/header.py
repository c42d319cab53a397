"""The header of a file: what stands where, the manifest, and checksums, its own included.

A checkpoint is a safetensors file: eight bytes with the header's length, the header (JSON), then the tensors' bytes.
The header's metadata holds the manifest.  The header begins with its own checksum, computed with eight zeros in the
checksum's place, so that every byte of a file is covered by one.  Nothing here opens files.
"""

import json
import math
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from surefoot.checkpoint.dtypes import BY_CODE, BY_NAME, DTYPES, name, order_of
from surefoot.errors import CheckpointError

MOST = 64 << 20
"""Bytes that a header may have."""
CHUNK = 16 << 20
"""Bytes of a tensor that share a checksum."""
FORMAT = 1
"""Version of the format; `migrations` has a step from each earlier one."""
LENGTH = 8
"""Bytes in which the header's length stands."""
_ALIGN = 64
_DIGITS = 8
_PREFIX = b'{"__metadata__":{"crc32":"'
_CRC = slice(len(_PREFIX), len(_PREFIX) + _DIGITS)
_METADATA = "__metadata__"
_WIDEST_NORM = -1.2345678901234567e-300
_MOST_DIMENSIONS = 64
MOST_ELEMENTS = 1 << 62


class Summary(NamedTuple):
    """What is known of a tensor's values.

    Attributes:
        checksums: CRC-32 of each chunk of `CHUNK` bytes.
        norm: Euclidean norm of the finite values, None for whole numbers and booleans, and where it overflows.
        nonfinite: how many values are infinite or NaN.
    """

    checksums: tuple[int, ...]
    norm: float | None = None
    nonfinite: int = 0


_NOTHING_KNOWN = Summary(())


@dataclass(frozen=True)
class Place:
    """A tensor in a file.

    Attributes:
        dtype: its dtype.
        shape: its shape.
        begin: first byte, counted from the end of the header.
        order: dimensions from the outermost in memory to the innermost; None for row-major tensors.  The file has
            them row-major in either case.
        summary: of its values.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    order: tuple[int, ...] | None = None
    summary: Summary = _NOTHING_KNOWN

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return self.elements * DTYPES[self.dtype].itemsize

    @property
    def end(self) -> int:
        """The byte after the last."""
        return self.begin + self.nbytes


@dataclass(frozen=True)
class Header:
    """What a header says.

    Attributes:
        places: the tensors by name, in the order in which they stand in the file.
        manifest: everything that is not a tensor.
        size: bytes before the first tensor.
        crc32: its checksum; those of the tensors are part of it.
    """

    places: Mapping[str, Place]
    manifest: Mapping[str, Any]
    size: int
    crc32: str

    @property
    def file_size(self) -> int:
        """Bytes of the whole file."""
        return self.size + sum(place.nbytes for place in self.places.values())


# Writing


def arrange(tensors: Mapping[str, Tensor]) -> dict[str, Place]:
    """Return a place for every tensor.

    Wide elements come first, so that all are aligned to their own size; and single numbers before larger tensors, so
    that reading step counts touches few pages.
    """
    found, begin = {}, 0
    for key, tensor in sorted(tensors.items(), key=_rank):
        found[key] = Place(tensor.dtype, tuple(tensor.shape), begin, order_of(tensor))
        begin = found[key].end
    return found


def _rank(item: tuple[str, Tensor]) -> tuple[int, bool]:
    return -DTYPES[item[1].dtype].itemsize, item[1].numel() > 1


def compose(
    places: Mapping[str, Place], manifest: Mapping[str, Any], summaries: Mapping[str, Summary] | None = None
) -> bytes:
    """Write a header, its length included.

    Args:
        places: where the tensors stand.
        manifest: everything else, ready for JSON.
        summaries: of the tensors' values; by default as wide as any can be, to reserve room.

    Raises:
        ValueError: it would be larger than a reader accepts.
    """
    widest = _text(places, manifest, {key: _widest(place) for key, place in places.items()})
    size = _padded(len(widest))
    if size > MOST:
        raise ValueError(
            f"the checkpoint's names and plain data take {size:,} bytes, at most {MOST:,} are allowed; give large "
            f"lists as tensors"
        )
    text = (widest if summaries is None else _text(places, manifest, summaries)).ljust(size)
    crc = f"{zlib.crc32(text):08x}".encode()
    return size.to_bytes(LENGTH, "little") + text[: _CRC.start] + crc + text[_CRC.stop :]


def _padded(size: int) -> int:
    """Return the size at which tensors begin at a multiple of `_ALIGN`."""
    return math.ceil((LENGTH + size) / _ALIGN) * _ALIGN - LENGTH


def _widest(place: Place) -> Summary:
    chunks = math.ceil(place.nbytes / CHUNK)
    return Summary((0,) * chunks, _WIDEST_NORM, place.elements * 2)


def _text(places: Mapping[str, Place], manifest: Mapping[str, Any], summaries: Mapping[str, Summary]) -> bytes:
    notes = {key: _note(place, summaries[key]) for key, place in places.items()}
    whole = {"format": FORMAT, **manifest, "chunk": CHUNK, "tensors": notes}
    inner = json.dumps(whole, separators=(",", ":"), allow_nan=False)
    metadata = {"crc32": "0" * _DIGITS, "format": "pt", "surefoot": inner}
    entries = {key: _entry(place) for key, place in places.items()}
    return json.dumps({_METADATA: metadata, **entries}, separators=(",", ":")).encode()


def _entry(place: Place) -> dict[str, Any]:
    stored = DTYPES[place.dtype]
    shape = [*place.shape, 2] if stored.pairs else list(place.shape)
    return {"dtype": stored.code, "shape": shape, "data_offsets": [place.begin, place.end]}


def _note(place: Place, summary: Summary) -> dict[str, Any]:
    """Return what the manifest adds to safetensors' entry."""
    note: dict[str, Any] = {"crc32": "".join(f"{crc:08x}" for crc in summary.checksums)}
    if DTYPES[place.dtype].pairs:
        note["dtype"] = name(place.dtype)
    if place.order is not None:
        note["order"] = list(place.order)
    if summary.norm is not None:
        note["norm"] = summary.norm
    if summary.nonfinite:
        note["nonfinite"] = summary.nonfinite
    return note


# Reading


def length_of(start: bytes, file_size: int) -> int:
    """Return the length of the header that follows the first eight bytes of a file.

    Raises:
        CheckpointError: it is longer than the file or than any header.
    """
    if len(start) < LENGTH or file_size < LENGTH + len(_PREFIX):
        raise CheckpointError(f"truncated: it has {file_size} bytes, fewer than the shortest header")
    length = int.from_bytes(start, "little")
    if length > MOST:
        raise CheckpointError(
            f"not a checkpoint: it announces a header of {length:,} bytes, at most {MOST:,} are allowed"
        )
    if length > file_size - LENGTH:
        raise CheckpointError(f"truncated: its header should have {length} bytes, the whole file has {file_size}")
    return length


def parse(text: bytes, file_size: int) -> Header:
    """Read a header, believing nothing that it says.

    Args:
        text: the header without its length.
        file_size: bytes of the whole file.

    Raises:
        CheckpointError: a byte is wrong, the file is shorter or longer than the header says, or tensors do not fill
            it without gaps.
    """
    if not text.startswith(_PREFIX):
        raise CheckpointError(
            "not a checkpoint of surefoot, or one whose header was changed; `surefoot ckpt convert` reads torch's files"
        )
    crc = f"{zlib.crc32(text[: _CRC.start] + b'0' * _DIGITS + text[_CRC.stop :]):08x}".encode()
    if text[_CRC] != crc:
        raise CheckpointError(
            f"corrupted: its header has checksum {crc.decode()}, not {text[_CRC].decode(errors='replace')}"
        )
    try:
        return _parsed(text, file_size)
    except CheckpointError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"not readable: its header is malformed ({type(error).__name__}: {error})") from error


def _parsed(text: bytes, file_size: int) -> Header:
    entries = _json(text)
    manifest = dict(_dict(_json(_dict(entries.pop(_METADATA))["surefoot"])))
    if not 0 <= manifest["format"] <= FORMAT:
        raise CheckpointError(
            f"too new: its format is {manifest['format']}, this surefoot reads up to {FORMAT}; upgrade"
        )
    notes, chunk = _dict(manifest.pop("tensors")), manifest.pop("chunk")
    if chunk != CHUNK:
        raise CheckpointError(f"not readable: it has checksums of {chunk!r} bytes each, this reader knows {CHUNK}")
    if notes.keys() != entries.keys():
        raise CheckpointError("not readable: manifest and tensors do not have the same names")
    found = {key: _place(key, _dict(entry), _dict(notes[key])) for key, entry in entries.items()}
    places = dict(sorted(found.items(), key=lambda item: (item[1].begin, item[1].end)))
    header = Header(places, manifest, LENGTH + len(text), text[_CRC].decode())
    _check_extent(header, file_size)
    return header


def _check_extent(header: Header, file_size: int) -> None:
    """Raise unless the tensors fill the file without gaps."""
    ends = [0, *(place.end for place in header.places.values())]
    begins = [*(place.begin for place in header.places.values()), ends[-1]]
    if begins != ends:
        raise CheckpointError("not readable: its tensors overlap or leave gaps")
    if header.file_size > file_size:
        raise CheckpointError(
            f"truncated: it has {file_size} bytes of {header.file_size}; it was not copied as a whole"
        )
    if header.file_size < file_size:
        raise CheckpointError(
            f"corrupted: it has {file_size} bytes, {file_size - header.file_size} more than it should"
        )


def _json(text: Any) -> Any:
    return json.loads(text, parse_constant=_refuse_constant)


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _dict(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{type(value).__name__} instead of an object")
    return value


def _place(key: str, entry: dict[str, Any], note: dict[str, Any]) -> Place:
    shape = tuple(_whole(size, MOST_ELEMENTS) for size in _list(entry["shape"], _MOST_DIMENSIONS))
    begin, end = (_whole(offset, MOST_ELEMENTS) for offset in _list(entry["data_offsets"], 2))
    dtype = BY_CODE[entry["dtype"]]
    if "dtype" in note:
        dtype, shape = _paired(note["dtype"], entry["dtype"], shape)
    order = None if "order" not in note else tuple(_list(note["order"], len(shape)))
    if order is not None and sorted(order) != list(range(len(shape))):
        raise CheckpointError(f"not readable: `{key}` has an impossible order of dimensions, {order}")
    # Any partial product of sizes may become a stride.
    if math.prod(max(size, 1) for size in shape) > MOST_ELEMENTS:
        raise CheckpointError(f"not readable: `{key}` has an impossible shape, {shape}")
    place = Place(dtype, shape, begin, order, _summary(note))
    if place.end != end or begin % DTYPES[dtype].itemsize:
        raise CheckpointError(f"not readable: `{key}` is {shape} of {dtype} in bytes {begin} to {end}")
    if len(place.summary.checksums) != math.ceil(place.nbytes / CHUNK):
        raise CheckpointError(f"not readable: `{key}` has {len(place.summary.checksums)} checksums")
    return place


def _paired(dtype: str, code: str, shape: tuple[int, ...]) -> tuple[torch.dtype, tuple[int, ...]]:
    found = BY_NAME[dtype]
    if DTYPES[found].code != code or not DTYPES[found].pairs or shape[-1:] != (2,):
        raise ValueError(f"{dtype} is not stored as {code}")
    return found, shape[:-1]


def _summary(note: dict[str, Any]) -> Summary:
    text, norm = note["crc32"], note.get("norm")
    cuts = pairwise(range(0, len(text) + 1, _DIGITS))
    checksums = tuple(int(text[begin:end], 16) for begin, end in cuts)
    return Summary(checksums, None if norm is None else float(norm), _whole(note.get("nonfinite", 0), MOST_ELEMENTS))


def _whole(value: Any, most: int) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"{value!r} is not a whole number from 0 to {most}")
    return value


def _list(value: Any, most: int) -> list[Any]:
    if not isinstance(value, list) or len(value) > most:
        raise ValueError(f"{value!r:.99} is not a list of at most {most}")
    return value


def bytes_of(places: Iterable[Place]) -> int:
    """Return the bytes that tensors take."""
    return sum(place.nbytes for place in places)
