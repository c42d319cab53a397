"""The processors that kernels are compiled for: this machine's, and those that LLVM knows by a name.

A kernel for this machine's may use all that this one has.  One for a name uses what every processor of that name has,
less what is hidden from virtual machines as a rule; whether this machine can run it, LLVM says.
"""

import difflib
import functools
import subprocess
import sys
from typing import Any, NamedTuple

_NOT_USED = (
    "pku sgx shstk pconfig wbnoinvd ptwrite cldemote enqcmd movdir64b movdiri serialize tsxldtrk uintr waitpkg "
    "rdpru mwaitx prefetchi"
)
"""What x86 processors may have, virtual machines mostly have not, and no compiler uses by itself."""
_TRIAL = """\
import sys
import llvmlite.binding as llvm
llvm.initialize_native_target()
llvm.initialize_native_asmprinter()
target = llvm.Target.from_default_triple()
target.create_target_machine(cpu="help")
module = llvm.parse_assembly("define void @nothing() { ret void }")
target.create_target_machine(cpu=sys.argv[1]).emit_object(module)
"""
_FITS = """\
define internal i64 @theirs(ptr %place) "target-cpu"="{named.name}" "target-features"="{named.features}" {{
  %value = load volatile i64, ptr %place
  ret i64 %value
}}
define i64 @ours(ptr %place) "target-cpu"="{host.name}" "target-features"="{host.features}" {{
  %value = call i64 @theirs(ptr %place)
  ret i64 %value
}}
"""


class Processor(NamedTuple):
    """A processor: LLVM's name of it, and which features it has or lacks beside what the name says."""

    name: str
    features: str


@functools.cache
def host() -> Processor:
    """Return this machine's processor."""
    import llvmlite.binding as llvm  # noqa: PLC0415 (on first use)

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return Processor(llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten())


@functools.cache
def named(name: str) -> Processor:
    """Return a processor that LLVM knows by a name."""
    x86 = "sse2" in host().features
    return Processor(name, ",".join(f"-{feature}" for feature in _NOT_USED.split()) if x86 else "")


def check_name(name: str) -> None:
    """Ask LLVM whether it knows a processor, in a process of its own, for it may abort.

    Raises:
        ValueError: it does not, or has no code for it.
    """
    done = subprocess.run(  # noqa: S603 (ourselves)
        [sys.executable, "-c", _TRIAL, name], capture_output=True, text=True, check=False, timeout=60
    )
    known = [line.split()[0] for line in done.stderr.partition("\n\n")[2].partition("\n\n")[0].splitlines()]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3) or known
        raise ValueError(f"must be a processor that LLVM knows, for instance {', '.join(near)}, but is {name!r}")
    if done.returncode:
        raise ValueError(f"must be a processor for the programs of this machine, but is {name!r}")


@functools.cache
def runs_here(processor: Processor) -> bool:
    """Return whether this machine has all that a processor has.

    LLVM puts a function into another one only if that one's processor can run it.
    """
    if processor == host():
        return True
    import llvmlite.binding as llvm  # noqa: PLC0415

    target = machine(host())
    module = llvm.parse_assembly(_FITS.format(named=processor, host=host()))
    module.triple, module.data_layout = target.triple, str(target.target_data)
    builder = llvm.create_pass_builder(target, llvm.create_pipeline_tuning_options(speed_level=1))
    builder.getModulePassManager().run(module, builder)
    return "call" not in str(module)


def machine(processor: Processor) -> Any:
    """Return what makes machine code for a processor."""
    import llvmlite.binding as llvm  # noqa: PLC0415

    target = llvm.Target.from_default_triple()
    return target.create_target_machine(cpu=processor.name, features=processor.features, opt=3, jit=True)
