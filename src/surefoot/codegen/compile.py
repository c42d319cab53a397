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

from surefoot.locks import Lock

STATUS = 1
"""The word of what a kernel is handed that is set to something else than 0 when an error has stopped the kernel."""
_HELPERS = ("intrinsics.py", "conversions.py", "compile.py")
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
            code = _compile(source, path)
            _write(path, source.encode())
            _write(path.with_suffix(".o"), _DIGEST(code).digest() + code)
        return Kernel(path.stem, _link(code))


def _key(source: str) -> str:
    """Return a name of what machine code depends on: the source, what it imports, the compiler, the processor."""
    here = Path(__file__).parent
    parts = [source, version("numba"), version("llvmlite"), *_processor()]
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


def _compile(source: str, path: Path) -> bytes:
    """Return a source compiled to object code that holds `entry` and what it needs, without Numba's own run time."""
    import llvmlite.binding as llvm  # noqa: PLC0415

    with _own_settings():
        defined = _execute(source, path)
        text, name = defined.kernel.inspect_llvm(), defined.kernel.native_name
    module = llvm.parse_assembly(text + _ENTRY.format(native=name.removeprefix("cfunc."), status=8 * STATUS))
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
    """Load object code into the process and return the address of `entry`."""
    import llvmlite.binding as llvm  # noqa: PLC0415

    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _machine())
    engine.add_object_file(llvm.object_file.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    address: int = engine.get_function_address("entry")
    return address


# Numba's calling convention: a place for the result, a place for an exception, the argument; 0 where there is none.
_ENTRY = """
define void @entry(i64 %launch) {{
  %result = alloca ptr
  %exception = alloca ptr
  %status = call i32 @{native}(ptr %result, ptr %exception, i64 %launch)
  %stopped = icmp ne i32 %status, 0
  br i1 %stopped, label %report, label %end
report:
  %word = sext i32 %status to i64
  %address = add i64 %launch, {status}
  %place = inttoptr i64 %address to ptr
  store atomic i64 %word, ptr %place monotonic, align 8
  br label %end
end:
  ret void
}}
"""


# Numba's settings

_DEFAULTS = {"NUMBA_ENABLE_PROFILING": "0", "NUMBA_DEBUGINFO": "0"}  # else they depend on another variable
_OF_OTHERS = ("CUDA", "THREAD", "CACHE")
"""Parts of the names of settings that compilation does not read, but other threads may meanwhile."""


@contextmanager
def _own_settings() -> Iterator[None]:
    """Let Numba compile by its default settings, whatever environment or code have set, and nobody else meanwhile."""
    from numba.core import config, registry  # noqa: PLC0415
    from numba.core.compiler_lock import global_compiler_lock  # noqa: PLC0415

    with global_compiler_lock:
        target = registry.cpu_target.target_context  # made, if it is now, by the settings of others
        config.reload_config()  # else the compiler does so later
        settings = {name: value for name, value in vars(config).items() if name.isupper()}
        threads = {"NUMBA_NUM_THREADS": str(config.NUMBA_NUM_THREADS)}
        others = {name: settings[name] for name in settings if any(part in name for part in _OF_OTHERS)}
        generator = target._internal_codegen
        try:
            config._env_reloader.process_environ(_DEFAULTS | threads)
            vars(config).update(others)
            target._internal_codegen = _code_generator()
            yield
        finally:
            target._internal_codegen = generator
            vars(config).update(settings)


@functools.cache
def _code_generator() -> Any:
    """Return Numba's generator of code for this processor, which keeps what the settings were when it was made."""
    from numba.core.codegen import JITCPUCodegen  # noqa: PLC0415

    return JITCPUCodegen("surefoot")
