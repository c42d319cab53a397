"""What the compiler makes of the GPU engine's kernels, for three generations of NVIDIA's devices; no device is needed.

Expected sources stand in `golden`; with `SUREFOOT_UPDATE_GOLDEN=1` they are written anew.
"""

import io
import os
import re
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

import surefoot
from conformance import ELEMENTWISE
from surefoot.engines.gpu.source import Dialect, print_kernel
from surefoot.explain import rule_of
from surefoot.rule import bind, gradient_rule
from surefoot.storage import format_8_bits, format_16_bits, format_of

triton = pytest.importorskip("triton", reason="compiling kernels needs Triton, which is there on Linux")

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from surefoot.engines import gpu
from surefoot.engines.gpu import compile as compiling
from surefoot.engines.gpu import measured, plan
from surefoot.engines.gpu.plan import LAUNCH
from surefoot.state import check as checking

GOLDEN = Path(__file__).parent / "golden"
ARCHITECTURES = (80, 90, 100)
MOST_REGISTERS = 96 if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9) else 128
"""At 128 threads that leaves room for five blocks on a multiprocessor, 40 kB in flight for Adam in bfloat16.  Triton
3.9 takes up to 116 for MARS, AdEMAMix and AdamAtan2 with all of their flags: four blocks."""
MANY_ARRAYS = 6
"""With so many arrays four blocks have as much in flight."""
FLOAT8 = (format_8_bits(signed=True), format_8_bits(signed=False))
SHORT = {
    "float8": (format_16_bits(torch.bfloat16, stochastic=True), *FLOAT8),
    "24_bits": (format_16_bits(torch.float16, stochastic=True, correction=torch.int8), *FLOAT8),
}
"""For AdamW: formats of the parameter and its slots."""
rows = pytest.mark.parametrize("row", ELEMENTWISE, ids=lambda row: row.name)
each_architecture = pytest.mark.parametrize(
    "architecture", [pytest.param(80, marks=pytest.mark.long), 90, pytest.param(100, marks=pytest.mark.long)]
)
"""For tests that compile much: the default run compiles for one of them."""


@pytest.fixture(autouse=True)
def real_compiler(monkeypatch, tmp_path):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def source_of(cls, options, dtype, state_dtype=None, dialect=Dialect.PTX, *, measured=False):
    optimizer = cls([torch.zeros(2)], **options)
    rule = rule_of(optimizer, optimizer.param_groups[0])
    rule = bind(cls.spec, (("measured", True), *rule.flags)) if measured else rule
    stored = tuple(map(format_of, (dtype, dtype, *(state_dtype or dtype for _ in rule.slots))))
    return print_kernel(rule, torch.promote_types(dtype, torch.float32), stored, dialect), stored


def short_source(name, dialect=Dialect.PTX, *, measured=False):
    """Return the source of AdamW's kernel on short formats."""
    param, *slots = SHORT[name]
    flags = (*surefoot.AdamW.spec.settle_flags({"weight_decay": 0.1}), ("rounded", True), ("measured", measured))
    stored = (param, format_of(param.dtype), *slots)
    return print_kernel(bind(surefoot.AdamW.spec, flags), torch.float32, stored, dialect), stored


def gradients_source(dtype, dialect=Dialect.PTX):
    """Return the source of the kernel that reads gradients, in a bucket with two slots."""
    stored = (format_of(dtype),) * 4
    return print_kernel(gradient_rule(), torch.promote_types(dtype, torch.float32), stored, dialect), stored


def compiled(source, stored, architecture, *, found_inf=False):
    """Compile as a launch does; give the assembly and the use of registers, shared memory and stack."""
    kernel, launch = compiling.define(source, "kernel"), LAUNCH[max(kept.itemsize for kept in stored)]
    real = "*fp64" if "pointer_type(tl.float64)" in source else "*fp32"
    absent = dict.fromkeys(["found_inf"] * (not found_inf) + ["coefficients"] * ("row = " not in source))
    every = {"table": "*i64", "chunks": "*i64", "coefficients": real, "found_inf": "*fp32", "measured": "*fp64"}
    pointers = {name: type_ for name, type_ in every.items() if name in kernel.arg_names and name not in absent}
    constants = {"BLOCK": launch.block, "REPEAT": launch.repeat} | absent
    signature = {name: pointers.get(name, "constexpr" if name in constants else "i32") for name in kernel.arg_names}
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in pointers}
    source = ASTSource(kernel, signature, constants, aligned)
    return assembled(source, architecture, num_warps=launch.warps, enable_fp_fusion=True)


def assembled(source, architecture, **options):
    """Compile; give the assembly, and what the assembler says of registers and spills."""
    with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope(), redirect_stdout(io.StringIO()) as log:
        triton.knobs.nvidia.dump_ptxas_log = triton.knobs.compilation.always_compile = True
        unit = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    ptx, text = unit.asm["ptx"], log.getvalue()
    registers = int(re.search(r"Used (\d+) registers", text)[1])
    spills = sum(map(int, re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text).groups()))
    used = {"registers": registers, "spills": spills}
    return ptx, used | {"barriers": ptx.count("bar.sync"), "shared": unit.metadata.shared}


def accesses(ptx):
    """Count accesses of global memory by their kind, width and type."""
    return Counter(re.findall(r"\b(?:ld|st)\.global[\w.:]*", ptx))


def check(ptx, used, stored, written, read=None):
    """Check every kernel: two branches of wide accesses, one of single ones, IEEE arithmetic, no spills."""
    found = accesses(ptx)
    wide = {kind: 2 * count for kind, count in wide_accesses(stored, written, read).items()}
    assert {kind: count for kind, count in found.items() if ".v" in kind} == wide
    check_singles(ptx, found, stored)
    assert used["registers"] <= (MOST_REGISTERS if len(stored) < MANY_ARRAYS else 128)
    assert used["spills"] == 0


def wide_accesses(stored, written, read=None):
    """Count the wide accesses of a block; all arrays are read unless `read` tells."""
    wide, launch = Counter(), LAUNCH[max(kept.itemsize for kept in stored)]
    for kept, is_written, is_read in zip(stored, written, read or (True,) * len(stored), strict=True):
        size = launch.block // (32 * launch.warps) * kept.itemsize  # bytes of a thread
        vector = "v2.b64" if kept.dtype is torch.float64 else "v4.b32" if size >= 16 else "v2.b32"
        wide[f"ld.global.{vector}"] += max(1, size // 16) * is_read
        wide[f"st.global.{vector}"] += max(1, size // 16) * is_written
    return wide


def check_singles(ptx, found, stored):
    single = {f"ld.global.b{8 * kept.itemsize}" for kept in stored}
    assert single <= found.keys(), "an end that is not aligned must go by elements"
    assert "ftz" not in ptx
    assert ".approx" not in ptx
    assert "div.full" not in ptx


def read_by(cls, options):
    optimizer = cls([torch.zeros(2)], **options)
    return rule_of(optimizer, optimizer.param_groups[0]).read


def written_by(source, stored):
    names = re.search(r"def update\((.*?), lanes", source)[1].split(", ")
    assert len(names) == len(stored)
    return [f"tl.store({name} + lanes" in source for name in names]


@each_architecture
@rows
def test_float32(row, architecture, record_property):
    source, stored = source_of(row.ours, options := row.all_flags(), torch.float32)
    written, read = written_by(source, stored), read_by(row.ours, options)
    check(*compiled(source, stored, architecture), stored, written, read)
    record_property("compared", f"gpu, compiled for sm_{architecture}: 128 bits, no spills, IEEE arithmetic")


@pytest.mark.in_turn("row", every=6)
@pytest.mark.in_turn("dtype")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@rows
def test_other_dtypes(row, dtype, record_property):
    source, stored = source_of(row.ours, {}, dtype)
    check(*compiled(source, stored, 90), stored, written_by(source, stored), read_by(row.ours, {}))
    record_property("compared", "gpu, compiled for sm_90: 128 bits, no spills, IEEE arithmetic")


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrower_state(state_dtype):
    ptx, used = compiled(*source_of(surefoot.AdamW, {}, torch.float64, state_dtype), 90)
    assert "fma.rn.f64" in ptx
    assert used["spills"] == 0


@pytest.mark.in_turn("dtype")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_wider_state_and_skipped_steps(dtype, architecture):
    source, stored = source_of(surefoot.AdamW, {"amsgrad": True}, dtype, torch.float32)
    ptx, used = compiled(source, stored, architecture, found_inf=True)
    check(ptx, used, stored, written_by(source, stored))
    assert f"cvt.rn.{'bf16' if dtype is torch.bfloat16 else 'f16'}" in ptx


@pytest.mark.in_turn("architecture")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_gradients_are_read_in_wide_accesses(dtype, architecture):
    """Of whole chunks, with one reduction at their end; the parameter is not touched."""
    source, stored = gradients_source(dtype)
    ptx, used = compiled(source, stored, architecture)
    found, (wide, *_) = accesses(ptx), wide_accesses(stored[:1], [False])
    repeat = LAUNCH[dtype.itemsize].repeat
    per_block = wide_accesses(stored[:1], [False])[wide]
    assert found[wide] in (per_block, repeat * per_block)  # the loop may be unrolled
    check_singles(ptx, found, stored)
    assert "fma.rn.f64" in ptx
    assert {kind for kind in found if kind.startswith("st.")} == {"st.global.b64"}
    assert used["registers"] <= MOST_REGISTERS
    assert used["spills"] <= (4 if (dtype, architecture) == (torch.float16, 100) else 0)


@pytest.mark.parametrize("found_inf", [False, True])
@each_architecture
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_measuring_updates(dtype, architecture, found_inf):
    source, stored = source_of(surefoot.AdamW, {}, dtype, torch.float32, measured=True)
    ptx, used = compiled(source, stored, architecture, found_inf=found_inf)
    found, wide = accesses(ptx), wide_accesses(stored, written_by(source, stored))
    assert {kind: count for kind, count in found.items() if ".v" in kind} == wide
    check_singles(ptx, found, stored)
    assert used["registers"] <= MOST_REGISTERS
    assert used["spills"] == 0


@pytest.mark.in_turn("row", every=3)
@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float32, marks=pytest.mark.long), torch.float64], ids=["float32", "float64"]
)
@rows
def test_every_rule_measures(row, dtype):
    """In float64, which needs most registers, in every run."""
    source, stored = source_of(row.ours, row.all_flags(), dtype, measured=True)
    ptx, used = compiled(source, stored, 90, found_inf=True)
    check_singles(ptx, accesses(ptx), stored)
    assert used["spills"] == 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_parts_are_put_together(architecture):
    kernel = triton.jit(measured.combine, do_not_specialize=["chunks"])
    signature = {"parts": "*fp64", "firsts": "*i64", "results": "*fp64", "chunks": "i32"}
    constants = {"LARGEST": 2, "BLOCK": measured._BLOCK}
    source = ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constants)
    assert assembled(source, architecture, enable_fp_fusion=True)[1]["spills"] == 0


@pytest.mark.parametrize("name", SHORT)
def test_short_formats(name):
    """Codes and corrections are moved 8 bytes at a time, 16-bit numbers 16; a block's largest is found by shuffles."""
    source, stored = short_source(name)
    ptx, used = compiled(source, stored, 90)
    narrow = 2 + (stored[0].correction is not None)
    wide = {
        "ld.global.v4.b32": 4,
        "ld.global.v2.b32": 2 * narrow,
        "st.global.v4.b32": 2,
        "st.global.v2.b32": 2 * narrow,
    }
    assert {kind: count for kind, count in accesses(ptx).items() if ".v" in kind} == wide
    check_singles(ptx, accesses(ptx), stored)
    assert used["registers"] <= 2 * MOST_REGISTERS
    assert used["spills"] == 0


@pytest.mark.in_turn("name")
@pytest.mark.parametrize("name", SHORT)
def test_wide_accesses_of_short_formats_leave_values_where_they_are(name):
    source, stored = short_source(name)
    _, used = compiled(without_last_branch(source), stored, 90)
    assert used["registers"] <= 128
    assert used["shared"] == 32, "the scales of a block, on their way to memory, and no value"


def test_short_formats_are_measured():
    source, stored = short_source("float8", measured=True)
    _, used = compiled(source, stored, 90, found_inf=True)
    assert used["spills"] == 0


def without_last_branch(source):
    start = source.rindex("        else:\n")
    return source[:start] + source[source.index("False)\n", start) + 7 :]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_wide_accesses_need_no_barrier(dtype):
    """Values stay in the threads that have loaded them."""
    source, stored = source_of(surefoot.AdamW, {}, dtype)
    _, used = compiled(without_last_branch(source), stored, 90)
    assert (used["barriers"], used["shared"]) == (0, 0)


def test_products_are_fused_with_sums():
    """As the CPU engine's; a change of Triton's default must not change results."""
    ptx, _ = compiled(*source_of(surefoot.SGD, {"momentum": 0.9}, torch.float32), 90)
    assert "fma.rn.f32" in ptx


class Transcendental(surefoot.Optimizer):
    """A rule with what the device's library computes."""

    def __init__(self, params, lr=0.5):
        super().__init__(params, {"lr": lr})

    @staticmethod
    def update(param, grad, c, flags):
        param = torch.exp(param) + torch.log(grad) + torch.tanh(param) + torch.pow(grad, c.lr) + torch.rsqrt(param)
        return torch.atan2(grad, param)


@each_architecture
def test_functions_of_the_library_are_those_of_float64(architecture):
    """The float32 ones flush denormals, or are approximations."""
    ptx, used = compiled(*source_of(Transcendental, {}, torch.float32), architecture)
    assert not re.findall(r"\b(?:add|sub|mul|fma|div|sqrt)\.[\w.]*(?:ftz|approx)[\w.]*f32", ptx)
    assert "fma.rn.f64" in ptx
    assert used["spills"] == 0


# Launches


class Target:
    """Stands for the driver of a device that is not there."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


@pytest.fixture
def launched(monkeypatch):
    """Let steps on the CPU go all the way to Triton's launch, which compiles for a device and stops there."""
    found = []

    def run(self, *arguments, warmup, real=JITFunction.run, **options):
        found.append((self.fn.__name__, real(self, *arguments, warmup=True, **options)))

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(triton.runtime.driver, "_active", Target())
    monkeypatch.setattr(gpu, "DEVICES", ("cpu",))
    monkeypatch.setattr(checking, "CAPTURABLE_DEVICES", ("cpu",))
    monkeypatch.setattr(plan, "dialect_of", lambda device: Dialect.PTX)
    monkeypatch.setattr(gpu, "doubt", lambda bucket, rule: None)  # what is not run cannot be compared
    compiling.load.cache_clear()
    yield found
    compiling.load.cache_clear()


def step(count, **options):
    params = [torch.ones(1000).requires_grad_() for _ in range(count)]
    optimizer = surefoot.NAdam(params, fused=True, **options)
    for _ in range(3):
        for param in params:
            param.grad = torch.ones(1000)
        optimizer.step()
    return optimizer


def test_a_kernel_serves_any_number_of_tensors(launched):
    """Triton would make constants of numbers that are 1, and another kernel for multiples of 16."""
    for count in (1, 3, 16):
        step(count)
        step(count, capturable=True)
    assert [name for name, _ in launched[3:12]] == ["gather", "kernel", "scatter"] * 3
    assert {name: len({id(unit) for other, unit in launched if other == name}) for name, _ in launched} == {
        "kernel": 1,
        "gather": 1,
        "scatter": 1,
    }


def test_measuring_kernels_serve_any_number_of_tensors(launched):
    for count in (1, 3, 16):
        for capturable in (False, True):
            step(count, capturable=capturable, telemetry=True, max_grad_norm=1.0)
    names = [name for name, _ in launched if name not in ("gather", "scatter")]
    assert names == ["kernel", "combine"] * (len(names) // 2)
    units = {name: len({id(unit) for other, unit in launched if other == name}) for name in names}
    assert units == {"kernel": 2, "combine": 2}, "one to read, one to update"
    assert all(unit.metadata.enable_fp_fusion for _, unit in launched)  # as said, not by a default that will change


def test_a_launch_compiles_what_is_checked_here(launched):
    step(2)
    unit = launched[0][1]
    source, stored = source_of(surefoot.NAdam, {}, torch.float32)
    ptx, _ = compiled(source, stored, 90)
    assert accesses(unit.asm["ptx"]) == accesses(ptx)
    assert unit.metadata.enable_fp_fusion
    assert unit.metadata.num_warps == LAUNCH[4].warps


def test_a_scaled_step_reads_found_inf(launched):
    optimizer = step(2, capturable=True)
    optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.zeros(())
    optimizer.param_groups[0]["params"][0].grad = torch.ones(1000)
    optimizer.step()
    signatures = {name: unit.src.signature.get("found_inf") for name, unit in launched[-3:]}
    assert signatures == {"gather": None, "kernel": "*fp32", "scatter": "*fp32"}


# Sources


class Sign(surefoot.Optimizer):
    """A slot whose name is taken, and constants that have no literal."""

    slots = (surefoot.Slot("mask"),)

    def __init__(self, params, lr=0.5):
        super().__init__(params, {"lr": lr})

    @staticmethod
    def update(param, grad, mask, c, flags):
        return torch.where(mask > 0, param, -torch.inf) - c.lr * grad, torch.sqrt(mask * mask)


SOURCES = {
    **{f"{row.name.lower()}_float32": (row.ours, {}, torch.float32) for row in ELEMENTWISE},
    **{f"{row.name.lower()}_flags_float32": (row.ours, row.all_flags(), torch.float32) for row in ELEMENTWISE},
    "adamw_bfloat16": (surefoot.AdamW, {}, torch.bfloat16, torch.float32),
    "adamw_bfloat16_portable": (surefoot.AdamW, {}, torch.bfloat16, torch.float32, Dialect.PORTABLE),
    "nadam_float64": (surefoot.NAdam, {}, torch.float64),
    "names": (Sign, {}, torch.float32),
    "library": (Transcendental, {}, torch.float16),
}
OTHERS = {
    "adamw_float8": lambda: short_source("float8"),
    "adamw_24_bits_portable": lambda: short_source("24_bits", Dialect.PORTABLE),
    "adamw_measured_bfloat16": lambda: source_of(surefoot.AdamW, {}, torch.bfloat16, torch.float32, measured=True),
    "sgd_measured_float64": lambda: source_of(surefoot.SGD, {}, torch.float64, measured=True),
    "gradients_float32": lambda: gradients_source(torch.float32),
    "gradients_bfloat16_portable": lambda: gradients_source(torch.bfloat16, Dialect.PORTABLE),
}


@pytest.mark.parametrize("name", [*SOURCES, *OTHERS])
def test_sources_are_as_expected(name):
    source, _ = source_of(*SOURCES[name]) if name in SOURCES else OTHERS[name]()
    path = GOLDEN / f"{name}.py.txt"
    if os.environ.get("SUREFOOT_UPDATE_GOLDEN"):
        path.write_text(source)
    assert source == path.read_text()


def test_every_expected_source_is_printed():
    assert sorted(path.name for path in GOLDEN.iterdir()) == sorted(f"{name}.py.txt" for name in (*SOURCES, *OTHERS))


def test_names_that_are_taken_compile():
    ptx, _ = compiled(*source_of(Sign, {}, torch.float32), 90)
    assert "st.global.v4.b32" in ptx
