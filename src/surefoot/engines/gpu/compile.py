"""From a kernel's source to a function that Triton launches.  Imported when a bucket is first served."""

import functools
import hashlib
import linecache
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import triton

from surefoot.engines.gpu.source import Dialect, print_kernel
from surefoot.rule import Rule
from surefoot.storage import Format


def dialect_of(device: torch.device) -> Dialect:
    """Return the dialect that a device is spoken to in."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    return Dialect.PTX if nvidia and not triton.knobs.runtime.interpret else Dialect.PORTABLE


@functools.cache
def load(rule: Rule, compute: torch.dtype, stored: tuple[Format, ...], dialect: Dialect) -> Any:
    """Make the kernel of a rule, once in this process; Triton compiles it when it is first launched."""
    return define(print_kernel(rule, compute, stored, dialect), rule.name.lower())


def jitted(function: Callable[..., None], *counts: str) -> Any:
    """Make a kernel of a plain function, not another one for each value of its arguments `counts`."""
    return _jitted(function, counts, interpreted=triton.knobs.runtime.interpret)


@functools.cache
def _jitted(function: Callable[..., None], counts: tuple[str, ...], *, interpreted: bool) -> Any:  # noqa: ARG001 (another kernel then)
    return triton.jit(function, do_not_specialize=list(counts))


def define(source: str, name: str) -> Any:
    """Execute a kernel's source and give the function `kernel`.

    Triton reads the text of what it compiles; it finds it among Python's cached lines, where there is no file.
    """
    file = f"<surefoot {name} {hashlib.sha256(source.encode()).hexdigest()[:16]}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    module = ModuleType(f"surefoot_kernels.{name}")
    exec(compile(source, file, "exec"), vars(module))  # noqa: S102 (our own source)
    return module.kernel
