"""From a kernel's source to machine code, by way of a folder on disk in which both are kept.

Numba compiles a source once; what is kept is the object code of the one function in it, so that a later process needs
neither Numba nor a second compilation.  The folder is `$SUREFOOT_CACHE_DIR`, else `surefoot` in the user's cache
folder; where it cannot be written, every process compiles for itself.
"""

import functools
import hashlib
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

from surefoot.engines.cpu.source import Layout, print_kernel
from surefoot.locks import Lock
from surefoot.rule import Rule

_HELPERS = ("intrinsics.py", "formats.py", "compile.py")
_DIGEST = hashlib.sha256
_lock = Lock()
_engines: list[Any] = []  # machine code lives as long as what holds it


def cache_dir() -> Path:
    """Folder in which generated sources and their machine code are kept."""
    if chosen := os.environ.get("SUREFOOT_CACHE_DIR"):
        return Path(chosen).expanduser()
    home = os.environ.get("LOCALAPPDATA") if sys.platform == "win32" else os.environ.get("XDG_CACHE_HOME")
    return Path(home or Path.home() / ".cache") / "surefoot"


@functools.cache
def compiled_kernel(rule: Rule, layout: Layout) -> int:
    """Compile a rule for a layout, once in this process, and give the kernel's address."""
    return load(print_kernel(rule, layout), rule.name.lower())


def load(source: str, name: str) -> int:
    """Give the address of the function `kernel` of a source, from the folder or newly compiled.

    Args:
        source: Python source that defines `kernel`, a Numba cfunc of one int64 without result.
        name: first part of the names of the files.
    """
    with _lock:
        path = cache_dir() / f"{name}_{_key(source)}.py"
        code = _read(path.with_suffix(".o"))
        if code is None:
            code = _compile(source, path)
            _write(path, source.encode())
            _write(path.with_suffix(".o"), _DIGEST(code).digest() + code)
        return _link(code)


def _key(source: str) -> str:
    """Name what machine code depends on: the source, what it imports, the compiler, the processor."""
    here = Path(__file__).parent
    parts = [source, version("numba"), version("llvmlite"), *_processor()]
    parts += [here.joinpath(helper).read_text() for helper in _HELPERS]
    return _DIGEST("\n".join(parts).encode()).hexdigest()[:16]


def _read(path: Path) -> bytes | None:
    """Read object code; None where there is none or where its digest tells that it is damaged."""
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


def _compile(source: str, path: Path) -> bytes:
    """Compile a source to object code that holds `entry` and what it needs, without Numba's own run time."""
    import llvmlite.binding as llvm  # noqa: PLC0415

    kernel = _execute(source, path).kernel
    text = kernel.inspect_llvm()
    module = llvm.parse_assembly(text + _ENTRY.format(native=kernel.native_name.removeprefix("cfunc.")))
    for function in module.functions:
        if not function.is_declaration and function.name != "entry":
            function.linkage = "internal"
    machine = _machine()
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(module, passes)
    code: bytes = machine.emit_object(module)
    return code


def _execute(source: str, path: Path) -> ModuleType:
    module = ModuleType(f"surefoot_kernels.{path.stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # Numba looks up the module of what it compiles
    exec(compile(source, str(path), "exec"), vars(module))  # noqa: S102 (our own source)
    return module


def _link(code: bytes) -> int:
    """Load object code into the process and give the address of `entry`."""
    import llvmlite.binding as llvm  # noqa: PLC0415

    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _machine())
    engine.add_object_file(llvm.object_file.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    address: int = engine.get_function_address("entry")
    return address


# Numba's calling convention: a place for the result, a place for an exception (there is none), the argument.
_ENTRY = """
define void @entry(i64 %job) {{
  %result = alloca ptr
  %exception = alloca ptr
  %status = call i32 @{native}(ptr %result, ptr %exception, i64 %job)
  ret void
}}
"""
