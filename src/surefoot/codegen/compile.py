"""From a kernel's source to machine code, by way of a folder on disk in which both are kept.

LLVM compiles a source once; what is kept is its object code, so that a later process needs no second compilation.
Without a folder that can be used every process compiles for itself; `store.py` knows which folder, and who may use it.
"""

import functools
import hashlib
from pathlib import Path
from typing import Any, NamedTuple

from surefoot.codegen import store
from surefoot.codegen.notice import notice
from surefoot.codegen.processor import Processor, host, machine, named, runs_here
from surefoot.locks import Lock

STATUS = 1
"""The word of what a kernel is handed that is set to something else than 0 when an error has stopped the kernel."""
_COMPILER = ("lower.py", "intrinsics.py", "conversions.py", "arctangent.py", "compile.py", "processor.py")
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
        for processor in (host(), named(host().name)):
            file = f"{name}_{_key(source, processor)}"
            if (code := store.read(f"{file}.o")) is not None and runs_here(processor):
                return Kernel(file, _link(code))
        file = f"{name}_{_key(source, host())}"
        return Kernel(file, _link(_compile_once(source, file, host())))


def prebuild_kernel(source: str, name: str, processor: Processor) -> None:
    """Compile a source for a processor into the folder, unless it is there."""
    with _lock:
        name = f"{name}_{_key(source, processor)}"
        if store.read(f"{name}.o") is None:
            _compile_once(source, name, processor)


def _compile_once(source: str, name: str, processor: Processor) -> bytes:
    """Return the machine code of a source, newly compiled, by one process for all that wait for it."""
    with notice(), store.alone(name):
        code = store.read(f"{name}.o")  # another process may have compiled it meanwhile
        if code is None:
            code = _compile(source, processor)
            store.write(f"{name}.o", source, code)
    return code


def _key(source: str, processor: Processor) -> str:
    """Return a name of what machine code depends on: the source, the processor, the compiler."""
    return hashlib.sha256("\n".join([source, *processor, *_compiler()]).encode()).hexdigest()[:16]


@functools.cache
def _compiler() -> tuple[str, ...]:
    import llvmlite.binding  # noqa: PLC0415 (on first use)

    here = Path(__file__).parent
    llvm_version = ".".join(map(str, llvmlite.binding.llvm_version_info))
    return (llvmlite.__version__, llvm_version, *(here.joinpath(part).read_text() for part in _COMPILER))


# Machine code


def _compile(source: str, processor: Processor) -> bytes:
    """Return a source compiled to object code that holds `entry`."""
    target, module = _optimized(source, processor)
    code: bytes = target.emit_object(module)
    return code


def assembly(source: str) -> str:
    """Return a source compiled to what a processor's manual calls its instructions."""
    target, module = _optimized(source, host())
    text: str = target.emit_assembly(module)
    return text


def _optimized(source: str, processor: Processor) -> tuple[Any, Any]:
    """Return the machine of a processor, and a source as LLVM's passes leave it for that."""
    import llvmlite.binding as llvm  # noqa: PLC0415

    from surefoot.codegen.lower import lower  # noqa: PLC0415 (where nothing is compiled it is not needed)

    lowered, target = lower(source), machine(processor)
    module = llvm.parse_assembly(lowered.text)
    module.verify()
    module.triple, module.data_layout = target.triple, str(target.target_data)
    builder = llvm.create_pass_builder(target, llvm.create_pipeline_tuning_options(speed_level=3))
    # A sum of two products is rounded once with one of them.  Which one is settled here, by the order of loads, and not
    # by what else stands around it once functions are put into each other: the bits of kernels depend on it.
    first = llvm.create_new_function_pass_manager()
    first.add_sroa_pass()
    first.add_instruction_combine_pass()
    first.add_simplify_cfg_pass()
    first.add_reassociate_pass()
    for function in module.functions:
        if not function.is_declaration:
            first.run(function, builder)
    if not lowered.few_passes:
        builder.getModulePassManager().run(module, builder)
    return target, module


def _link(code: bytes) -> int:
    """Load object code into the process and return the address of `entry`."""
    import llvmlite.binding as llvm  # noqa: PLC0415

    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine(host()))
    engine.add_object_file(llvm.object_file.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    address: int = engine.get_function_address("entry")
    return address
