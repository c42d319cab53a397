"""From a kernel's source to machine code, by way of a folder on disk in which both are kept.

Numba compiles a source once; what is kept is the object code of the one function in it, so that a later process needs
neither Numba nor a second compilation.  The folder is `$SUREFOOT_CACHE_DIR`, else `surefoot` in the user's cache
folder; where it cannot be written, every process compiles for itself.  Whatever Numba's own settings are, kernels are
compiled under its defaults.
"""

import functools
import hashlib
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from surefoot.codegen.lower import lower
from surefoot.locks import Lock

STATUS = 1
"""The word of what a kernel is handed that is set to something else than 0 when an error has stopped the kernel."""
_HELPERS = ("intrinsics.py", "conversions.py", "compile.py", "lower.py")
_DIGEST = hashlib.sha256
_lock = Lock()
_engines: list[Any] = []  # machine code lives as long as what holds it


def cache_dir() -> Path:
    """Return the folder in which generated sources and their machine code are kept."""
    if chosen := os.environ.get("SUREFOOT_CACHE_DIR"):
        return Path(chosen).expanduser()
    home = os.environ.get("LOCALAPPDATA") if sys.platform == "win32" else os.environ.get("XDG_CACHE_HOME")
    return Path(home or Path.home() / ".cache") / "surefoot"


class Kernel(NamedTuple):
    """A compiled kernel.

    Attributes:
        name: the name of its files in the folder.
        address: where its machine code begins.
        arrays: names of the arrays that it takes of each tensor, in the order of its layout.
        checked: whether it verifies every work item of a launch before it computes it.
    """

    name: str
    address: int
    arrays: tuple[str, ...] = ()
    checked: bool = False


def build_kernel(source: str, name: str) -> Kernel:
    """Return the function `kernel` of a source, from the folder or newly compiled.

    Args:
        source: Python source that defines `kernel`, a Numba cfunc of the address of what it is handed, without result.
        name: first part of the names of the files.
    """
    with _lock:
        path = cache_dir() / f"{name}_{_key(source)}.py"
        code = _read(path.with_suffix(".o"))
        if code is None:
            code = _compile(source)
            _write(path, source.encode())
            _write(path.with_suffix(".o"), _DIGEST(code).digest() + code)
        return Kernel(path.stem, _link(code))


def _key(source: str) -> str:
    """Return a name of what machine code depends on: the source, what it imports, the compiler, the processor."""
    here = Path(__file__).parent
    parts = [source, version("llvmlite"), *_processor()]
    parts += [here.joinpath(helper).read_text() for helper in _HELPERS]
    return _DIGEST("\n".join(parts).encode()).hexdigest()[:16]


def _read(path: Path) -> bytes | None:
    """Return object code; None where there is none or where its digest tells that it is damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, code = content[:32], content[32:]
    return code if code and _DIGEST(code).digest() == digest else None


def _write(path: Path, content: bytes) -> None:
    """Put a file into the folder, whole, even if several processes do so at once; or leave it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as temporary:
            temporary.write(content)
        Path(temporary.name).replace(path)
    except OSError:
        return


# Machine code


@functools.cache
def _processor() -> tuple[str, str]:
    import llvmlite.binding as llvm  # noqa: PLC0415 (on first use)

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()


def _machine() -> Any:
    import llvmlite.binding as llvm  # noqa: PLC0415

    cpu, features = _processor()
    return llvm.Target.from_default_triple().create_target_machine(cpu=cpu, features=features, opt=3, jit=True)


def _compile(source: str) -> bytes:
    """Return a source compiled to object code that holds `entry`."""
    import llvmlite.binding as llvm  # noqa: PLC0415

    machine = _machine()
    module = llvm.parse_assembly(lower(source))
    module.verify()
    module.triple, module.data_layout = machine.triple, str(machine.target_data)
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(module, passes)
    code: bytes = machine.emit_object(module)
    return code


def _link(code: bytes) -> int:
    """Load object code into the process and return the address of `entry`."""
    import llvmlite.binding as llvm  # noqa: PLC0415

    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _machine())
    engine.add_object_file(llvm.object_file.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    address: int = engine.get_function_address("entry")
    return address
