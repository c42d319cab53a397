"""Knowing cheaply whether tensors are what they were: their memory, dtype, sizes and strides."""

import ctypes
import functools
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from surefoot.engines.cpu.compile import load
from surefoot.engines.cpu.threads import run_on_threads

_GUARDED_RELEASES = ("2.13.",)
_RECORD, _MOST_DIMENSIONS = 19, 8
_COUNT_CHANGED, _READ, _WRITE = 1, 2, 3
_QUESTIONS = ("get_data_ptr", "get_dtype", "get_dim", "get_sizes", "get_strides")


@functools.cache
def _probe() -> int:
    return load(Path(__file__).with_name("probe.py").read_text(), "probe")


@functools.cache
def _interface() -> tuple[list[int], "ctypes._NamedFuncPointer"] | None:
    """Addresses of torch's functions that answer questions about a tensor, and the one that lets go of it."""
    if not hasattr(torch._C, "_aoti"):
        return None
    folder = Path(torch.__file__).parent / "lib"
    for path in (*folder.glob("libtorch_cpu.*"), *folder.glob("torch_cpu.dll")):
        try:
            library = ctypes.CDLL(str(path))
            functions = [getattr(library, f"aoti_torch_{question}") for question in _QUESTIONS]
            release = library.aoti_torch_delete_tensor_object
        except (OSError, AttributeError):
            continue
        release.argtypes = (ctypes.c_void_p,)
        return [ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions], release
    return None


class Metadata:
    """The types, dtypes, sizes and strides of gradients, to compare others with."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._guards = _guards(tensors)
        self._facts = _facts(tensors) if self._guards is None else []

    def same(self, tensors: Sequence[Tensor | None]) -> bool:
        """Whether these are alike, one by one."""
        if self._guards is not None:
            return bool(self._guards.check(*tensors))
        return self._facts == _facts(tensors)


def _facts(tensors: Sequence[Tensor | None]) -> list[object]:
    return [
        t
        if t is None
        else (
            type(t),
            t.layout,
            t.dtype,
            t.shape,
            t.layout is torch.strided and t.stride(),
            t.is_neg(),
            t.is_conj(),
            t._is_zerotensor(),
        )
        for t in tensors
    ]


def _guards(tensors: Sequence[Tensor]) -> Any:
    """Make torch's own comparison of many tensors in one call, in releases in which it is known to be safe."""
    if not torch.__version__.startswith(_GUARDED_RELEASES) or any(t.layout is not torch.strided for t in tensors):
        return None
    sizes, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
    guards: Any = torch._C._dynamo.guards
    return guards.TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)


class Watched:
    """Tells whether any of some tensors has other memory, dtype, sizes or strides than when the watch began.

    It sees `.data = ...`, `set_` and `resize_`, not whether a dict holds another tensor now.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        interface = _interface()
        self._job: np.ndarray | None = None
        if interface is None or any(tensor.dim() > _MOST_DIMENSIONS for tensor in tensors):
            return
        questions, release = interface
        capsules = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors(list(tensors))
        self._handles = np.array([_capsule_pointer(capsule) for capsule in capsules], dtype=np.int64)
        weakref.finalize(self, _release, release, self._handles).atexit = False
        self._records = np.zeros((len(tensors), _RECORD), dtype=np.int64)
        self._answer = np.zeros(1, dtype=np.int64)
        own = [array.ctypes.data for array in (self._handles, self._records, self._answer)]
        self._job = np.array([_COUNT_CHANGED, len(tensors), 0, *own, *questions], dtype=np.int64)
        self.changed()

    def changed(self) -> bool:
        """Whether something has changed, or cannot be known not to have."""
        if self._job is None:
            return True
        run_on_threads(_probe(), self._job.ctypes.data, 1)
        return bool(self._job[2])


class Numbers:
    """Reads and writes many 0-d tensors of float32 or float64 on the CPU at once."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._addresses = np.array([tensor.data_ptr() for tensor in tensors], dtype=np.int64)
        self._wide = np.array([tensor.dtype is torch.float64 for tensor in tensors], dtype=np.int64)
        self._values = np.zeros(len(tensors))
        parts = [array.ctypes.data for array in (self._addresses, self._wide, self._values)]
        self._job = np.array([_READ, len(tensors), 0, *parts, *[0] * 5], dtype=np.int64)

    @staticmethod
    def can_hold(tensors: Iterable[object]) -> bool:
        """Whether all of these are tensors of the kind."""
        return all(
            isinstance(t, Tensor) and t.dim() == 0 and t.dtype in (torch.float32, torch.float64) and t.is_cpu
            for t in tensors
        )

    def read(self) -> np.ndarray:
        """Give the values, in an array that the next call overwrites."""
        self._job[0] = _READ
        run_on_threads(_probe(), self._job.ctypes.data, 1)
        return self._values

    def write(self, values: np.ndarray) -> None:
        """Set the values, rounding to the dtype of each tensor."""
        self._values[:] = values
        self._job[0] = _WRITE
        run_on_threads(_probe(), self._job.ctypes.data, 1)


def _capsule_pointer(capsule: object) -> int:
    function = ctypes.pythonapi.PyCapsule_GetPointer
    function.restype, function.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    return function(capsule, None) or 0


def _release(function: "ctypes._NamedFuncPointer", handles: np.ndarray) -> None:
    for handle in handles:
        function(int(handle))
