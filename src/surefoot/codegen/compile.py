"""From a kernel's source to machine code, by way of a folder on disk in which both are kept.

LLVM compiles a source once; what is kept is its object code, so that a later process needs no second compilation.
Without a folder that can be used every process compiles for itself; `store.py` knows which folder, and who may use it.
"""

import functools
import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from surefoot.codegen import store
from surefoot.codegen.lower import lower
from surefoot.codegen.notice import notice
from surefoot.locks import Lock

STATUS = 1
"""The word of what a kernel is handed that is set to something else than 0 when an error has stopped the kernel."""
_COMPILER = ("lower.py", "intrinsics.py", "conversions.py", "compile.py")
_lock = Lock()
_engines: list[Any] = []  # machine code lives as long as what holds it


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
        source: source that defines `kernel`, a function of the address of what it is handed; see `lower.py`.
        name: first part of the names of the files.

    Raises:
        ImportError: llvmlite is not installed, or cannot be used.
    """
    with _lock:
        name = f"{name}_{_key(source)}"
        file = f"{name}.o"
        if (code := store.read(file)) is None:
            with notice(), store.alone(name):
                code = store.read(file)  # another process may have compiled it meanwhile
                if code is None:
                    code = _compile(source)
                    store.write(file, source, code)
        return Kernel(name, _link(code))


def _key(source: str) -> str:
    """Return a name of what machine code depends on: the source, the compiler, the processor."""
    return hashlib.sha256("\n".join([source, *_circumstances()]).encode()).hexdigest()[:16]


@functools.cache
def _circumstances() -> tuple[str, ...]:
    here = Path(__file__).parent
    return (version("llvmlite"), *_processor(), *(here.joinpath(part).read_text() for part in _COMPILER))


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
    machine, module = _optimized(source)
    code: bytes = machine.emit_object(module)
    return code


def assembly(source: str) -> str:
    """Return a source compiled to what a processor's manual calls its instructions."""
    machine, module = _optimized(source)
    text: str = machine.emit_assembly(module)
    return text


def _optimized(source: str) -> tuple[Any, Any]:
    """Return the machine that this process runs on, and a source as LLVM's passes leave it."""
    import llvmlite.binding as llvm  # noqa: PLC0415

    machine = _machine()
    module = llvm.parse_assembly(lower(source))
    module.verify()
    module.triple, module.data_layout = machine.triple, str(machine.target_data)
    builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    # A sum of two products is rounded once with one of them.  Which one is settled here, by the order of loads, and not
    # by what else stands around it once functions are put into each other: the bits of kernels depend on it.
    order = llvm.create_new_function_pass_manager()
    order.add_sroa_pass()
    order.add_reassociate_pass()
    for function in module.functions:
        if not function.is_declaration:
            order.run(function, builder)
    builder.getModulePassManager().run(module, builder)
    return machine, module


def _link(code: bytes) -> int:
    """Load object code into the process and return the address of `entry`."""
    import llvmlite.binding as llvm  # noqa: PLC0415

    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _machine())
    engine.add_object_file(llvm.object_file.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    address: int = engine.get_function_address("entry")
    return address
