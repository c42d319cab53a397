"""Where torch and Python keep things in memory that would otherwise have to be asked for tensor by tensor.

Nothing is taken for granted: each place is found by looking for a known value in tensors made for the purpose.  Where
that fails, in a release that keeps things elsewhere, plain guards serve.
"""

import ctypes
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

WORD = 8
DESCRIBED = range(8, 16)
"""How many words may describe a tensor in an implementation: from sizes and strides to the kind."""
_IMPLEMENTATION_WORDS, _METADATA_WORDS, _STORAGE_WORDS = 24, 12, 8
Place = TypeVar("Place")
_FUNCTIONS = ("get_data_ptr", "get_dtype", "get_dim", "get_sizes", "get_strides", "assign_tensors")


@dataclass(frozen=True)
class TensorLayout:
    """Places in bytes from the beginning of what holds them, and addresses of functions.

    Attributes:
        tensor: in a Python tensor, its C++ tensor, which is the address of an implementation.
        storage: in an implementation, the address of its storage.
        data: in a storage, the address of its memory; what owns it is told by the next two words.
        size: where behind that address, in words, the size of its memory is, in bytes.
        deleter: where among these three what frees memory is, which is the same for all of an allocator's.
        description: in an implementation, the words that hold sizes and strides of up to 5 dimensions, dtype and kind.
        key_set: in an implementation, what tells its kind: layout, device, and whether negated or without memory.
        autograd: in an implementation, the address of its autograd metadata, 0 if it has none.
        version: in an implementation, the address of its version counter, 0 if it has none.
        count: in a version counter, the count, of 32 bits.
        grad: in autograd metadata, the C++ tensor of the gradient.
        described: how many words describe a tensor.
        undefined: the implementation of a gradient that is None.
        getters: functions of torch's stable C interface: data_ptr, dtype, dim, sizes, strides.
        assign: torch's function that lets one C++ tensor refer to what another does.
        dict_lookup: `PyDict_GetItemWithError`.
        dict_next: `PyDict_Next`.
        list_size: `PyList_Size`.
        list_item: `PyList_GetItem`.
    """

    tensor: int
    storage: int
    data: int
    size: int
    deleter: int
    description: int
    key_set: int
    autograd: int
    version: int
    count: int
    grad: int
    described: int
    undefined: int
    getters: tuple[int, ...]
    assign: int
    dict_lookup: int
    dict_next: int
    list_size: int
    list_item: int


@functools.cache
def tensor_layout() -> TensorLayout | None:
    """Find all places and functions; None where one of them cannot be found."""
    try:
        with torch.inference_mode(mode=False):
            return _find()
    except (LookupError, AttributeError, RuntimeError):
        return None


def _find() -> TensorLayout:
    params, plain = [Parameter(torch.ones(3, 4)) for _ in range(4)], [torch.ones(3, 4) for _ in range(4)]
    for param in params[:2]:
        param.grad = torch.zeros(3, 4)
    unusual = (torch._neg_view(plain[0]), torch.ones(2, dtype=torch.complex64).conj(), torch._efficientzerotensor(3))
    tensors = [*params, *plain, *unusual]
    tensor = _place(
        range(2, torch.Tensor.__basicsize__ // WORD), lambda i: all(_word(id(t), i) == _cdata(t) for t in tensors)
    )
    key_set = _place(
        range(_IMPLEMENTATION_WORDS),
        lambda i: all(_word(_cdata(t), i) == torch._C._dispatch_keys(t).raw_repr() for t in tensors),
    )
    autograd = _place(
        range(key_set),
        lambda i: all(_word(_cdata(t), i) for t in params) and not any(_word(_cdata(t), i) for t in plain),
    )
    storage, data, size, deleter = _storage(key_set)
    metadata = [_word(_cdata(param), autograd) for param in params]
    grads = [_cdata(param.grad) for param in params[:2]]  # type: ignore[arg-type]
    grad = _place(range(1, _METADATA_WORDS), lambda i: [_word(m, i) for m in metadata[:2]] == grads)
    undefined = {_word(m, grad) for m in metadata[2:]}
    if len(undefined) != 1:
        raise LookupError
    geometry, (version, count) = _geometry(key_set), _version(key_set)
    if (described := key_set + 1 - geometry.start) not in DESCRIBED:
        raise LookupError
    *getters, assign = stable_functions()
    api = ctypes.pythonapi
    of_python = (api.PyDict_GetItemWithError, api.PyDict_Next, api.PyList_Size, api.PyList_GetItem)
    dict_lookup, dict_next, list_size, list_item = map(_address, of_python)
    return TensorLayout(
        tensor=WORD * tensor,
        storage=WORD * storage,
        data=WORD * data,
        size=WORD * size,
        deleter=WORD * deleter,
        description=WORD * geometry.start,
        key_set=WORD * key_set,
        autograd=WORD * autograd,
        version=WORD * version,
        count=WORD * count,
        grad=WORD * grad,
        described=described,
        undefined=undefined.pop(),
        getters=tuple(getters),
        assign=assign,
        dict_lookup=dict_lookup,
        dict_next=dict_next,
        list_size=list_size,
        list_item=list_item,
    )


def _storage(key_set: int) -> tuple[int, int, int, int]:
    """Find the word that leads to the storage; in it its memory's address; and behind that its size and the deleter."""
    tensors = [torch.ones(7), torch.ones(5)[1:], torch.from_numpy(np.ones(3)), torch.from_numpy(np.ones(3))]
    storages = [tensor.untyped_storage() for tensor in tensors]
    word = _place(
        range(key_set), lambda i: all(_word(_cdata(t), i) == s._cdata for t, s in zip(tensors, storages, strict=True))
    )
    data = _place(range(_STORAGE_WORDS), lambda i: all(_word(s._cdata, i) == s.data_ptr() for s in storages))
    ours, lazy = [torch.ones(3).untyped_storage() for _ in range(3)], [torch.ones(3)._lazy_clone() for _ in range(3)]

    def deletes(place: int) -> bool:
        found = {_word(storage._cdata, data + place) for storage in ours}
        return len(found) == 1 and found.isdisjoint(_word(t.untyped_storage()._cdata, data + place) for t in lazy)

    sized = _place(range(data, _STORAGE_WORDS), lambda i: all(_word(s._cdata, i) == s.nbytes() for s in storages))
    return word, data, sized - data, _place(range(1, 3), deletes)


def _version(key_set: int) -> tuple[int, int]:
    """Find the word that leads to the version counter, and the count's place in it."""
    tensors = [torch.ones(3) for _ in range(4)]
    for times, tensor in zip((3, 77, 1001, 30003), tensors, strict=True):
        torch.autograd.graph.increment_version([tensor] * times)

    def leads(word: int) -> bool:
        targets = [_word(_cdata(tensor), word) for tensor in tensors]
        return len(set(targets)) == len(tensors) and all(map(_is_pointer, targets))

    def counts(place: tuple[int, int]) -> bool:
        word, count = place
        found = [_word(_word(_cdata(tensor), word), count) & 0xFFFFFFFF for tensor in tensors]
        return found == [tensor._version for tensor in tensors]

    return _place([(word, count) for word in range(key_set) if leads(word) for count in range(3)], counts)


def _geometry(key_set: int) -> range:
    """Find the words in which tensors of one geometry agree, whatever their dtype, and those of others do not."""
    alike = [torch.ones(3, 4, dtype=dtype) for dtype in (torch.float32, torch.float64, torch.int32) for _ in range(4)]
    agreeing = [len({_word(_cdata(t), i) for t in alike}) == 1 for i in range(key_set)]
    runs = [
        range(start, end) for start in range(key_set) for end in range(start, key_set + 1) if all(agreeing[start:end])
    ]
    longest = max(runs, key=len)
    cube = torch.ones(4, 4, 4)
    others = [
        torch.ones(4, 3),
        torch.ones(4, 3).t(),
        torch.ones(3, 4, 1),
        torch.ones(12),
        cube[:3, :, 0],
        cube[:3, 0],
        torch.ones(()),
        torch.ones(1, 1, 1, 3, 4),
        torch.ones(1, 1, 1, 4, 3).transpose(3, 4),
    ]
    different = [alike[0], *others]
    if len({tuple(_word(_cdata(t), i) for i in longest) for t in different}) < len(different):
        raise LookupError
    return longest


def _is_pointer(word: int) -> bool:
    """Return whether a word can be the address of an object on the heap."""
    return word % WORD == 0 and 1 << 16 <= word < 1 << 47


def _place(places: Iterable[Place], fits: Callable[[Place], bool]) -> Place:
    """Return the only place that fits."""
    found = [place for place in places if fits(place)]
    if len(found) != 1:
        raise LookupError
    return found[0]


def _cdata(tensor: Tensor) -> int:
    return int(tensor._cdata)


def _word(address: int, index: int) -> int:
    return ctypes.c_uint64.from_address(address + WORD * index).value


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def stable_functions() -> tuple[int, ...]:
    """Find torch's functions that answer questions about a tensor, and the one that assigns.

    Raises:
        LookupError: this release has not all of them.
    """
    folder = Path(torch.__file__).parent / "lib"
    for path in (*folder.glob("libtorch_cpu.*"), *folder.glob("torch_cpu.dll")):
        try:
            library = ctypes.CDLL(str(path))
            functions = [getattr(library, f"aoti_torch_{function}") for function in _FUNCTIONS]
        except (OSError, AttributeError):
            continue
        return tuple(map(_address, functions))
    raise LookupError
