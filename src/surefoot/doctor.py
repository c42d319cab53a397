"""What runs where on this machine and why, as plain facts: what `surefoot doctor` prints.

Each fact is looked up by itself, so that one that cannot be found out leaves the others: it is then a problem.
"""

import difflib
import importlib.util
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from surefoot import explain, optimizers
from surefoot.codegen import store
from surefoot.codegen.threads import openmp_path
from surefoot.engines import gpu
from surefoot.environment import SWITCHES, VARIABLES, switch
from surefoot.tensors import guards
from surefoot.tensors.native import guards as native
from surefoot.tensors.private import PRIVATE_NAMES, missing_names

Facts = dict[str, Any]
_PACKAGES = ("surefoot", "torch", "numpy", "llvmlite", "triton")
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64)
_KERNELS = {"cpu": "cpu", **dict.fromkeys(gpu.DEVICES, "gpu")}
"""The engine that is the fast one, for each type of device that has one."""


@dataclass(frozen=True)
class Diagnosis:
    """What was found.

    Attributes:
        facts: by section.
        problems: why something is slower than it could be, or cannot be told, without anybody having asked for that.
        warnings: what is worth knowing besides.
    """

    facts: dict[str, Facts] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def examine() -> Diagnosis:
    """Return what runs where and why; whatever is broken is a problem in it, and nothing is raised."""
    found = Diagnosis()
    for section, look in _SECTIONS.items():
        try:
            found.facts[section] = look(found)
        except Exception as error:  # noqa: BLE001 (what is broken is what this is for)
            found.facts[section] = {"error": str(error)}
            if str(error) not in found.problems:
                found.problems.append(f"{section}: {type(error).__name__}: {error}")
    return found


def _versions(_: Diagnosis) -> Facts:
    packages = {package: _version(package) for package in _PACKAGES}
    return {"python": platform.python_version(), **packages, "torch": torch.__version__}  # which names its build


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _variables(found: Diagnosis) -> Facts:
    given = {name: value for name, value in sorted(os.environ.items()) if name.startswith("SUREFOOT_")}
    for name in given.keys() - VARIABLES:
        near = difflib.get_close_matches(name, VARIABLES, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(VARIABLES)}"
        found.warnings.append(f"{name} is set, but means nothing{hint}")
    for name in SWITCHES:
        try:
            switch(name, default=False)
        except ValueError as error:
            found.problems.append(str(error))
    return given


def _guard(found: Diagnosis) -> Facts:
    reason = native.unavailable()
    if reason is None and type(guards.make_guard([[torch.zeros(3)]])) is not native.TensorGuard:
        reason = "what they see in tensors of this release of torch is not what Python sees"
    told = not switch(native.VARIABLE, default=True)
    if reason is not None and not told:
        found.problems.append(f"plain guards serve, which cost more at each step: {reason}")
    return {"kind": "native" if reason is None else "plain", "reason": reason, "told": told}


def _engines(found: Diagnosis) -> Facts:
    told = bool(os.environ.get("SUREFOOT_ENGINE"))
    rows = [_engine(device, dtype) for device in _devices() for dtype in _DTYPES]
    slow: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["engine"] != _KERNELS.get(row["device"].partition(":")[0], row["engine"]) and not told:
            slow.setdefault((row["device"], "; ".join(row["refusals"])), []).append(row["dtype"])
    for (device, reason), dtypes in slow.items():
        found.problems.append(f"no kernels serve {', '.join(dtypes)} on {device}: {reason}")
    if not told and not slow:
        for served in (each for each in _devices() if each.type in _KERNELS):
            _try_kernel(found, served)
    return {"told": told, "choices": rows}


def _devices() -> Iterator[torch.device]:
    yield torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None:
        for index in range(torch.accelerator.device_count()):
            yield torch.device(accelerator.type, index)


def _engine(device: torch.device, dtype: torch.dtype) -> Facts:
    """Return which engine serves a device and a dtype, and why not those before it."""
    row = {"device": str(device), "dtype": str(dtype).removeprefix("torch.")}
    try:
        param = torch.zeros(4, device=device, dtype=dtype)
        choice = explain.choices(optimizers.Adam([param]))[0]
    except (RuntimeError, NotImplementedError) as error:  # a device that has no such numbers
        return {**row, "engine": None, "refusals": [str(error)]}
    return {**row, "engine": choice.engine, "refusals": list(choice.refusals)}


def _try_kernel(found: Diagnosis, device: torch.device) -> None:
    """Take a step by a kernel, which shows that the compiler works and, on a GPU, that the kernel has proved itself."""
    param = torch.ones(4, device=device)
    param.grad = torch.ones_like(param)
    try:
        optimizers.SGD([param], lr=0.5, fused=True).step()
        if param.tolist() != [0.5] * 4:
            found.problems.append(f"a kernel on {device} gives {param.tolist()}, must give {[0.5] * 4}")
    except Exception as error:  # noqa: BLE001 (whatever the compiler raises)
        found.problems.append(f"a kernel on {device} cannot be made: {type(error).__name__}: {error}")


def _threads(_: Diagnosis) -> Facts:
    given = {name: os.environ[name] for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY") if name in os.environ}
    return {"torch": torch.get_num_threads(), "cores": os.cpu_count(), "openmp": openmp_path(), "variables": given}


def _cache(found: Diagnosis) -> Facts:
    reason = store.unusable_reason()
    try:
        folder = store.cache_dir()
    except OSError:  # which is the reason
        folder = None
    writable = folder is not None and reason is None and os.access(_nearest(folder), os.W_OK)
    kernels = [e for e in store.entries() if e.name.endswith(".o")] if folder and folder.exists() and not reason else []
    if not writable:
        why = reason or f"{folder and _nearest(folder)} cannot be written"
        found.warnings.append(f"new kernels are not kept, so that every process compiles for itself: {why}")
    shown = None if folder is None else str(folder)
    return {"folder": shown, "reason": reason, "writable": writable, "kernels": len(kernels)}


def _nearest(folder: Path) -> Path:
    """Return the folder, or the nearest above it that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _triton(_: Diagnosis) -> Facts:
    there = importlib.util.find_spec("triton") is not None
    missing = gpu.missing_tool() if there else None
    return {"installed": there, "needed": torch.accelerator.is_available(), "missing": missing}


def _private(found: Diagnosis) -> Facts:
    missing = missing_names()
    found.warnings.extend(f"this torch has no `{row.name}` ({row.used_for}): {row.without}" for row in missing)
    return {"names": len(PRIVATE_NAMES), "missing": [row.name for row in missing]}


_SECTIONS: dict[str, Callable[[Diagnosis], Facts]] = {
    "versions": _versions,
    "variables": _variables,
    "guard": _guard,
    "engines": _engines,
    "threads": _threads,
    "cache": _cache,
    "triton": _triton,
    "private": _private,
}
