"""Running a kernel on several threads at once: on torch's own OpenMP pool where there is one, else on Python's threads.

A kernel is a C function of one job; its threads share the job and claim its items by an atomic counter, so that which
thread does what changes nothing in the result.
"""

import ctypes
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from surefoot.locks import in_forked_children

Kernel = Callable[[int], None]
_forked = False


def _note_fork() -> None:
    global _forked  # noqa: PLW0603 (a fact about the process)
    _forked = True


# In a forked child the threads of an OpenMP pool are gone, and waiting for them never ends.
in_forked_children(_note_fork)


def thread_count() -> int:
    """Threads that a kernel may use: those of torch, one in a forked child."""
    return 1 if _forked else torch.get_num_threads()


def run_on_threads(address: int, job: int, threads: int) -> None:
    """Call the kernel at `address` with a job from `threads` threads; return when all are done."""
    if threads == 1:
        _function(address)(job)
    elif (gomp := _gomp_parallel()) is not None:
        gomp(address, job, threads, 0)
    else:
        kernel = _function(address)
        for waiting in [_pool(threads).submit(kernel, job) for _ in range(threads)]:
            waiting.result()


@functools.cache
def _function(address: int) -> Any:
    return ctypes.CFUNCTYPE(None, ctypes.c_int64)(address)


@functools.cache
def _gomp_parallel() -> Callable[[int, int, int, int], None] | None:
    """Find `GOMP_parallel` in the OpenMP library that torch has loaded."""
    folder = Path(torch.__file__).parent
    candidates = [*folder.glob("lib/libgomp*"), *folder.parent.glob("torch.libs/libgomp*")]
    for path in candidates:
        try:
            # RTLD_NOLOAD: only a library that is in use already; a second pool would compete with torch's.
            function = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_LAZY).GOMP_parallel
        except (OSError, AttributeError):
            continue
        function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        function.restype = None
        return function
    return None


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="surefoot")
