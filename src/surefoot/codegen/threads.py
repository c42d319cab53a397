"""Running a kernel on several threads at once: on torch's own OpenMP pool where there is one, else on Python's threads.

A kernel is a C function of the address of its launch; threads share the launch and take its work items by an atomic
counter, so that which thread does what changes nothing in the result.
"""

import ctypes
import functools
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from surefoot.locks import in_forked_children

ONE_THREAD = 65536
"""Elements up to which one thread is faster."""
_forked = False


def _note_fork() -> None:
    global _forked  # noqa: PLW0603 (a fact about the process)
    _forked = True


# In a forked child the threads of an OpenMP pool are gone, and waiting for them never ends.
in_forked_children(_note_fork)


def thread_count() -> int:
    """Return how many threads a kernel may use: those of torch, one in a forked child."""
    return 1 if _forked else torch.get_num_threads()


def needs_threads(tensors: Iterable[Tensor]) -> bool:
    """Return whether tensors have so many elements that a kernel is to run on several threads."""
    return sum(map(Tensor.numel, tensors)) >= ONE_THREAD


def run_on_threads(address: int, launch: int, threads: int) -> None:
    """Call the kernel at `address` with a launch from `threads` threads; return when all are done."""
    if threads == 1:
        _function(address)(launch)
    elif (openmp := _openmp()) is not None:
        openmp.parallel(address, launch, threads, 0)
    else:
        kernel = _function(address)
        running = [_pool(threads).submit(kernel, launch) for _ in range(threads)]
        try:
            for thread in running:
                thread.result()
        finally:
            wait(running)  # an interrupted caller must not free what they work on


def run_locked(address: int, launch: int, threads: int) -> None:
    """Call the kernel with the interpreter locked meanwhile; on one thread where there is no OpenMP pool."""
    if threads == 1 or (openmp := _openmp()) is None:
        locked_function(address)(launch)
    else:
        openmp.locked_parallel(address, launch, threads, 0)


def thread_number() -> int:
    """Return the address of the function that numbers the threads of a call, its caller 0; 0 without an OpenMP pool."""
    return 0 if (openmp := _openmp()) is None else openmp.thread_number


def openmp_path() -> str | None:
    """Return the OpenMP library whose threads kernels run on; None where they run on threads of Python."""
    return None if (openmp := _openmp()) is None else openmp.path


@functools.cache
def _function(address: int) -> Any:
    return ctypes.CFUNCTYPE(None, ctypes.c_int64)(address)


@functools.cache
def locked_function(address: int) -> Any:
    """Return the function at an address, called with the interpreter locked: it takes the address of its launch."""
    return ctypes.PYFUNCTYPE(None, ctypes.c_int64)(address)


class _OpenMP(NamedTuple):
    """`GOMP_parallel`, the same called with the interpreter locked, the address of `omp_get_thread_num`, the file."""

    parallel: Any
    locked_parallel: Any
    thread_number: int
    path: str


@functools.cache
def _openmp() -> _OpenMP | None:
    """Return the OpenMP library that torch has loaded."""
    folder = Path(torch.__file__).parent
    candidates = [*folder.glob("lib/libgomp*"), *folder.parent.glob("torch.libs/libgomp*")]
    for path in candidates:
        try:
            # RTLD_NOLOAD: only a library that is in use already; a second pool would compete with torch's.
            libraries = [kind(str(path), mode=os.RTLD_NOLOAD | os.RTLD_LAZY) for kind in (ctypes.CDLL, ctypes.PyDLL)]
            parallel, locked_parallel = (library.GOMP_parallel for library in libraries)
            number = ctypes.cast(libraries[0].omp_get_thread_num, ctypes.c_void_p).value or 0
        except (OSError, AttributeError):
            continue
        for function in (parallel, locked_parallel):
            function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
            function.restype = None
        return _OpenMP(parallel, locked_parallel, number, str(path))
    return None


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="surefoot")
