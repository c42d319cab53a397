"""Plain data as JSON and back, of exactly the same types; tensors in it are kept elsewhere and referred to by name.

What JSON has is itself.  Anything else is an object with a key "$", its tag, so that a reader needs no more than the
table below and nothing is ever looked up, imported or called by a name from a file.
"""

import base64
import itertools
import math
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from surefoot.checkpoint.dtypes import BY_NAME, DTYPES, name
from surefoot.errors import CheckpointError
from surefoot.tensors.shards import is_sharded

TAG = "$"
Keep = Callable[[Tensor, tuple[Any, ...]], str]
Fetch = Callable[[str], Tensor]
_DEEPEST = 64
_SMALL = 64
_NUMPY = (
    *("bool", "float16", "float32", "float64", "complex64", "complex128"),
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
)
_FACTORIES = {"none": None, "dict": dict, "list": list, "int": int, "float": float, "set": set}


# Writing


def encode(value: Any, path: tuple[Any, ...], keep: Keep) -> Any:
    """Return plain data in the types of JSON.

    Args:
        value: None, booleans, numbers, strings, bytes, tensors, arrays, dtypes, devices, and dicts, lists, tuples,
            sets, deques, counters of these.
        path: where it stands: a name, then keys and indices.
        keep: takes a tensor and its path, and returns the name under which it will be found.

    Raises:
        TypeError: there is something else; the message names its place.
        ValueError: it is nested too deeply, or in itself.
    """
    if len(path) > _DEEPEST:
        raise ValueError(f"{spell(path[:4])}... is nested more than {_DEEPEST} deep, or contains itself")
    if type(value) in (Tensor, torch.nn.Parameter, torch.nn.Buffer) or is_sharded(value):
        return _tagged("tensor", _kept(value, path, keep))
    if isinstance(value, np.generic):
        return _numpy_number(value, path)
    writer = _WRITERS.get(type(value))
    if writer is None:
        raise TypeError(
            f"{spell(path)} is {_described(value)}, which is not plain data and cannot be saved without pickle; save "
            f"what it is made of: numbers, strings, tensors, and dicts and lists of them"
        )
    return writer(value, path, keep)


def spell(path: tuple[Any, ...]) -> str:
    """Write a path as Python would: `extra['a'][0]`."""
    return str(path[0]) + "".join(f"[{key!r:.99}]" for key in path[1:])


def _described(value: Any) -> str:
    kind = type(value)
    return f"a {kind.__name__}" if kind.__module__ == "builtins" else f"a {kind.__module__}.{kind.__qualname__}"


def _tagged(tag: str, of: Any, **more: Any) -> dict[str, Any]:
    return {TAG: tag, "of": of, **more}


def _kept(tensor: Tensor, path: tuple[Any, ...], keep: Keep) -> str:
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested or tensor.is_meta:
        kind = "quantized" if tensor.is_quantized else "on the meta device" if tensor.is_meta else f"{tensor.layout}"
        raise TypeError(f"{spell(path)} is a tensor that is {kind}; only dense tensors with values can be saved")
    if tensor.dtype not in DTYPES:
        raise TypeError(
            f"{spell(path)} is a tensor of {tensor.dtype}, which safetensors cannot store; save it as bytes"
        )
    return keep(tensor.detach(), path)


def _float(value: float, _path: tuple[Any, ...], _keep: Keep) -> Any:
    return value if math.isfinite(value) else _tagged("float", repr(value))


def _int(value: int, _path: tuple[Any, ...], _keep: Keep) -> Any:
    return value if value.bit_length() < _SMALL else _tagged("int", hex(value))


def _items(values: Iterable[Any], path: tuple[Any, ...], keep: Keep) -> list[Any]:
    return [encode(item, (*path, index), keep) for index, item in enumerate(values)]


def _sequence(tag: str) -> Callable[[Any, tuple[Any, ...], Keep], Any]:
    return lambda value, path, keep: _tagged(tag, _items(value, path, keep))


def _pairs(value: Any, path: tuple[Any, ...], keep: Keep) -> list[Any]:
    return [[encode(key, path, keep), encode(item, (*path, key), keep)] for key, item in value.items()]


def _mapping(tag: str) -> Callable[[Any, tuple[Any, ...], Keep], Any]:
    return lambda value, path, keep: _tagged(tag, _pairs(value, path, keep))


def _dict(value: Any, path: tuple[Any, ...], keep: Keep) -> Any:
    if all(type(key) is str for key in value) and TAG not in value:
        return {key: encode(item, (*path, key), keep) for key, item in value.items()}
    return _tagged("dict", _pairs(value, path, keep))


def _defaultdict(value: Any, path: tuple[Any, ...], keep: Keep) -> Any:
    factory = next((key for key, made in _FACTORIES.items() if made is value.default_factory), None)
    if factory is None:
        raise TypeError(
            f"{spell(path)} is a defaultdict whose factory is {value.default_factory!r}; save dict(...) of it"
        )
    return _tagged("defaultdict", _pairs(value, path, keep), factory=factory)


def _array(value: Any, path: tuple[Any, ...], keep: Keep) -> Any:
    if value.dtype.name not in _NUMPY:
        raise TypeError(f"{spell(path)} is an array of {value.dtype}; only numbers and booleans can be saved")
    native = np.ascontiguousarray(value, dtype=value.dtype.newbyteorder("=")).reshape(value.shape)
    return _tagged("array", _kept(torch.from_numpy(native.copy()), path, keep))


def _numpy_number(value: Any, path: tuple[Any, ...]) -> Any:
    if value.dtype.name not in _NUMPY:
        raise TypeError(f"{spell(path)} is a numpy {value.dtype}; only numbers and booleans can be saved")
    little_endian = np.asarray(value, value.dtype.newbyteorder("<"))
    return _tagged("numpy", little_endian.tobytes().hex(), dtype=value.dtype.name)


def _dtype(value: Any, path: tuple[Any, ...], _keep: Keep) -> Any:
    if value not in DTYPES:
        raise TypeError(f"{spell(path)} is {value}, a dtype that cannot be saved; save its name")
    return _tagged("dtype", name(value))


def _same(value: Any, _path: tuple[Any, ...], _keep: Keep) -> Any:
    return value


_WRITERS: dict[type, Callable[[Any, tuple[Any, ...], Keep], Any]] = {
    type(None): _same,
    bool: _same,
    str: _same,
    int: _int,
    float: _float,
    complex: lambda value, path, keep: _tagged("complex", _items((value.real, value.imag), path, keep)),
    bytes: lambda value, *_: _tagged("bytes", base64.b64encode(value).decode()),
    list: _items,
    tuple: _sequence("tuple"),
    set: _sequence("set"),
    frozenset: _sequence("frozenset"),
    deque: lambda value, path, keep: _tagged("deque", _items(value, path, keep), maxlen=value.maxlen),
    dict: _dict,
    OrderedDict: _mapping("ordered"),
    Counter: _mapping("counter"),
    defaultdict: _defaultdict,
    np.ndarray: _array,
    torch.Size: lambda value, *_: _tagged("size", list(value)),
    torch.dtype: _dtype,
    torch.device: lambda value, *_: _tagged("device", str(value)),
}


# Reading


def decode(data: Any, fetch: Fetch) -> Any:
    """Return what `encode` was given.

    Args:
        data: what it returned.
        fetch: returns a tensor by its name.

    Raises:
        CheckpointError: the data is malformed.
    """
    try:
        return _decoded(data, fetch)
    except CheckpointError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError, RuntimeError) as error:
        raise CheckpointError(f"malformed plain data ({type(error).__name__}: {error})") from error


def _decoded(data: Any, fetch: Fetch) -> Any:
    if isinstance(data, list):
        return [_decoded(item, fetch) for item in data]
    if not isinstance(data, dict):
        return data
    if TAG not in data:
        return {key: _decoded(item, fetch) for key, item in data.items()}
    return _READERS[data[TAG]](data["of"], data, fetch)


def _read_pairs(of: Any, fetch: Fetch) -> list[tuple[Any, Any]]:
    return [(_decoded(key, fetch), _decoded(value, fetch)) for key, value in of]


def _read_with(make: Callable[[Any], Any]) -> Callable[[Any, Any, Fetch], Any]:
    """Make a reader of a sequence."""
    return lambda of, _, fetch: make([_decoded(item, fetch) for item in of])


def _read_counter(of: Any, _: Any, fetch: Fetch) -> Any:
    # A list of pairs would be counted, not taken.
    return Counter(dict(_read_pairs(of, fetch)))


def _read_numpy(of: Any, data: Any, _: Fetch) -> Any:
    dtype = np.dtype(_NUMPY[_NUMPY.index(data["dtype"])]).newbyteorder("<")
    value = np.frombuffer(bytes.fromhex(of), dtype)
    return value.astype(dtype.newbyteorder("=")).reshape(())[()]


def _read_int(of: Any, *_: Any) -> int:
    return int(of, 16)


_READERS: dict[str, Callable[[Any, Any, Fetch], Any]] = {
    "tensor": lambda of, _, fetch: fetch(of),
    "array": lambda of, _, fetch: fetch(of).numpy(),
    "numpy": _read_numpy,
    "int": _read_int,
    "float": lambda of, *_: {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}[of],
    "complex": lambda of, _, fetch: complex(*(_decoded(part, fetch) for part in of)),
    "bytes": lambda of, *_: base64.b64decode(of, validate=True),
    "tuple": _read_with(tuple),
    "set": _read_with(set),
    "frozenset": _read_with(frozenset),
    "deque": lambda of, data, fetch: deque((_decoded(item, fetch) for item in of), data["maxlen"]),
    "dict": lambda of, _, fetch: dict(_read_pairs(of, fetch)),
    "ordered": lambda of, _, fetch: OrderedDict(_read_pairs(of, fetch)),
    "counter": _read_counter,
    "defaultdict": lambda of, data, fetch: defaultdict(_FACTORIES[data["factory"]], _read_pairs(of, fetch)),
    "size": lambda of, *_: torch.Size(of),
    "dtype": lambda of, *_: BY_NAME[of],
    "device": lambda of, *_: torch.device(of),
}


def tensors_in(data: Any) -> Iterable[str]:
    """Return the names of the tensors that encoded data refers to."""
    if isinstance(data, dict) and data.get(TAG) in ("tensor", "array"):
        return [data["of"]] if isinstance(data.get("of"), str) else []
    parts = data.values() if isinstance(data, dict) else data if isinstance(data, list) else ()
    return itertools.chain.from_iterable(map(tensors_in, parts))
