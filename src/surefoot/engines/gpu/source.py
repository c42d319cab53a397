"""A rule's graph printed as a Triton kernel: all tensors of a bucket in one launch, one pass over memory.

A program of the kernel updates a chunk of one tensor, a few blocks one after the other.  It reads from a table where
the tensor's arrays stand, so that one kernel serves any number of tensors of any sizes.  Blocks that are full and
aligned are moved in accesses of 128 bits without masks; so are, under a mask, ends that have a multiple of eight
elements; only what is left goes by elements.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import fx

from surefoot.engines.expressions import COMMON
from surefoot.rule import Reduction, Rule
from surefoot.storage import Format, format_of


class Dialect(Enum):
    """How a kernel writes what Triton does not offer, or does not round as IEEE 754 asks."""

    PTX = "NVIDIA's; Triton's own float32 roots and quotients would flush denormals"
    PORTABLE = "any device's, and that of Triton's interpreter, which does not round when it converts to bfloat16"


ALIGNMENT = 16
"""Bytes of the widest access; a block uses it where every address is a multiple of this."""
LANES = 8
"""Elements of which an end must have a multiple to be moved in such accesses: 16 bytes of the smallest dtype."""

# For each format: Triton's name, and how values are loaded from it and stored into it, by dialect.
_PLAIN = ("{0}.to({real})", "{0}.to({stored})")
_HALF = ("{0}.to({real})", "{0}.to(tl.float32).to({stored})")
_STORAGE: dict[Format, tuple[str, dict[Dialect, tuple[str, str]]]] = {
    format_of(torch.float32): ("tl.float32", dict.fromkeys(Dialect, _PLAIN)),
    format_of(torch.float64): ("tl.float64", dict.fromkeys(Dialect, _PLAIN)),
    format_of(torch.float16): ("tl.float16", dict.fromkeys(Dialect, _HALF)),
    format_of(torch.bfloat16): (
        "tl.bfloat16",
        {Dialect.PTX: _HALF, Dialect.PORTABLE: ("from_bfloat16({0}).to({real})", "to_bfloat16({0}.to(tl.float32))")},
    ),
}

_EXPRESSIONS: dict[str, str] = COMMON | {
    "div": "quotient({0}, {1})",
    # As torch: the two powers that are roots are so at infinity and zero too.
    "pow": "tl.where({1} == 0.5, root({0}), tl.where({1} == -0.5, quotient({one}, root({0})), power({0}, {1})))",
    "neg": "{0} * -1.0",  # Triton's minus subtracts from zero, which loses the sign of a zero
    "abs": "tl.abs({0})",
    "sign": "({0} > 0).to({real}) - ({0} < 0).to({real})",
    "sqrt": "root({0})",
    "rsqrt": "quotient({one}, root({0}))",
    "reciprocal": "quotient({one}, {0})",
    "exp": "exponential({0})",
    "log": "logarithm({0})",
    "tanh": "hyperbolic_tangent({0})",
    "maximum": "tl.where(({0} > {1}) | ({0} != {0}), {0}, {1})",
    "minimum": "tl.where(({0} < {1}) | ({0} != {0}), {0}, {1})",
    "lerp": "tl.where(tl.abs({2}) < 0.5, {0} + {2} * ({1} - {0}), {1} - ({1} - {0}) * (1.0 - {2}))",
    "addcdiv": "{0} + quotient({3} * {1}, {2})",
    "where": "tl.where({0} != 0, {1}, {2})",
}


def _assembly(instruction: str, operands: str, arguments: str) -> str:
    places = ", ".join(f"${position}" for position in range(len(operands)))
    constraints = ",".join(f"={operand}" if position == 0 else operand for position, operand in enumerate(operands))
    return (
        f'tl.inline_asm_elementwise("{instruction} {places};", "{constraints}", [{arguments}], '
        f"dtype=tl.float32, is_pure=True, pack=1)"
    )


def _in_float64(function: str, *arguments: str) -> tuple[str, str]:
    """Call a function of the device's library in float64: its float32 functions flush denormals."""
    wide = ", ".join(f"{argument}.to(tl.float64)" for argument in arguments)
    return ", ".join(arguments), f"libdevice.{function}({wide}).to({{real}})"


# Functions that expressions call: parameters and result; for float32, and then in PTX, where these differ.
_FUNCTIONS: dict[str, tuple[str, ...]] = {
    "root": ("x", "tl.sqrt(x)", "tl.sqrt_rn(x)", _assembly("sqrt.rn.f32", "ff", "x")),
    "quotient": ("x, y", "x / y", "tl.div_rn(x, y)", _assembly("div.rn.f32", "fff", "x, y")),
    "power": _in_float64("pow", "x", "y"),
    "exponential": _in_float64("exp", "x"),
    "logarithm": _in_float64("log", "x"),
    "hyperbolic_tangent": _in_float64("tanh", "x"),
    "from_bfloat16": ("x", "(x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)"),
    "nearest": ("bits", "(bits + 0x7FFF + ((bits >> 16) & 1)) >> 16"),
    "to_bfloat16": (
        "x",
        "tl.where(x == x, nearest(x.to(tl.uint32, bitcast=True)), 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)",
    ),
    "within": ("x, mask", "x if mask is None else tl.where(mask, x, 0)"),
    # Among the bit patterns of absolute values NaN is the greatest.
    "bits": (
        "x",
        "x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF",
        "x.to(tl.int32, bitcast=True) & 0x7FFFFFFF",
    ),
    "sum_of_squares": ("x, mask", "within(x * x, mask)"),
    "largest": ("x, mask", "within(bits(x), mask)"),
    "nonfinite": (
        "x, mask",
        "within((bits(x) >= 0x7FF0000000000000).to(tl.int32), mask)",
        "within((bits(x) >= 0x7F800000).to(tl.int32), mask)",
    ),
    "sum_of": ("x", "tl.sum(x, axis=0).to(tl.float64)"),
    "greatest_of": ("x", "tl.max(x, axis=0)"),
}
_RESERVED = {*_FUNCTIONS, "inf", "lanes", "libdevice", "mask", "nan", "skipped", "tl", "triton"}


def stores(kept: Format) -> bool:
    """Return whether kernels can load and store a format."""
    return kept in _STORAGE


@dataclass(frozen=True)
class _Array:
    """A parameter, its gradient or a slot as a kernel sees it: a name, a format, and its new value if it is written."""

    name: str
    kept: Format
    new: str | None

    @property
    def type(self) -> str:
        return _STORAGE[self.kept][0]

    def load(self, real: str, dialect: Dialect) -> str:
        value = f"tl.load({self.name}_ + lanes, mask)"
        return f"{self.name} = " + (value if self.type == real else self._converted(0, value, real, dialect))

    def store(self, real: str, dialect: Dialect) -> str:
        value = str(self.new) if self.type == real else self._converted(1, str(self.new), real, dialect)
        return f"tl.store({self.name}_ + lanes, {value}, mask)"

    def _converted(self, direction: int, value: str, real: str, dialect: Dialect) -> str:
        return _STORAGE[self.kept][1][dialect][direction].format(value, real=real, stored=self.type)


def print_kernel(rule: Rule, compute: torch.dtype, stored: Sequence[Format], dialect: Dialect) -> str:
    """Print the source of a rule's kernel.

    Args:
        rule: the rule.
        compute: dtype of the arithmetic, float32 or float64.
        stored: formats of param, grad and the slots, in this order; a rule of fewer slots leaves the last alone.
        dialect: how the device is spoken to.
    """
    arrays, real = _arrays(rule.graph, stored), _STORAGE[format_of(compute)][0]
    places = [f"{array.name}_" for array in arrays]
    numbers = [f"c_{name}" for name in rule.coefficients]
    flags = ", ".join(name for name, value in rule.flags if value) or "none"
    stores = [array.store(real, dialect) for array in arrays if array.new]
    skipped = ("skipped",) if rule.reductions and stores else ()
    call = "update(" + ", ".join([*places, "lanes", "{}", *numbers, *skipped, "{}"]) + ")"
    calls = {
        "whole": call.format("None", True),
        "end": call.format(f"lanes < rest // {LANES} * {LANES}", True),
        "elements": call.format("lanes < rest", False),
    }
    steps = [f"{array.name}_ += BLOCK * {array.kept.itemsize}" for array in arrays]
    measured = _measured(rule, real, calls, steps) if rule.reductions else _Measured()
    body = [
        *(array.load(real, dialect) for array in arrays),
        *_operations(rule.graph, real, skipped),
        *(["if not skipped:", *(f"    {store}" for store in stores)] if skipped else stores),
        *measured.results,
    ]
    kernel = _TEMPLATE.format(
        parameters=", ".join([*places, "lanes", "mask", *numbers, *skipped]),
        pointers=_lines(f"{array.name}_ = {array.name}_.to(tl.pointer_type({array.type}))" for array in arrays),
        hints=_lines(f"    {place} = tl.multiple_of({place}, {ALIGNMENT})" for place in places),
        body=_lines(body),
        argument="measured, " if rule.reductions else "",
        count=len(stored),
        skip=_SKIP_STORES if skipped else "" if rule.reductions else _SKIP,
        reads=_lines(_reads(arrays, numbers, len(stored))),
        together=" | ".join(places),
        below=ALIGNMENT - 1,
        starts=measured.starts,
        block=measured.block or _BLOCK.format(**calls, lanes=LANES),
        steps=_lines(f"    {step}" for step in steps),
        keep=measured.keep,
    )
    title = f"{rule.name}, flags: {flags}; " + ", ".join(f"{array.name} {array.kept.name}" for array in arrays)
    return _HEAD.format(title=title) + _preamble(kernel, real, dialect) + kernel


def _arrays(graph: fx.Graph, stored: Sequence[Format]) -> list[_Array]:
    inputs = [node for node in graph.nodes if node.op == "placeholder" and node.meta["tensor"]]
    results = next(iter(reversed(graph.nodes))).args[0]
    new = dict(zip([inputs[0], *inputs[2:]], results, strict=False))
    return [
        _Array(_identifier(node), kept, _argument(new[node]) if new.get(node, node) is not node else None)
        for node, kept in zip(inputs, stored, strict=False)
    ]


@dataclass(frozen=True)
class _Measured:
    """Lines of a kernel that measures.

    Attributes:
        results: what `update` gives of each element.
        starts: those before the loop, which update a chunk that is whole.
        block: those that update a block in the loop.
        keep: those behind it.
    """

    results: tuple[str, ...] = ()
    starts: str = ""
    block: str = ""
    keep: str = ""


def _measured(rule: Rule, real: str, calls: Mapping[str, str], steps: Sequence[str]) -> _Measured:
    """Print what is measured; `calls` update a block, after `steps` the next one.

    Chunks that are whole are reduced once, at their end; what is left goes by elements, which takes few registers.
    """
    values = next(iter(reversed(rule.graph.nodes))).args[0][-len(rule.reductions) :]
    numbers = [_Number(index, reduction, real) for index, reduction in enumerate(rule.reductions)]
    parts, totals = (", ".join(f"{name}{number.index}" for number in numbers) for name in ("part", "total"))
    reduced = ", ".join(number.reduced for number in numbers)
    starts = [
        f"{totals} = {', '.join(number.nothing for number in numbers)}",
        "if aligned & (rest >= BLOCK * REPEAT):",
        f"    {totals} = {', '.join(number.nothings for number in numbers)}",
        "    for _ in range(REPEAT):",
        f"        {parts} = {calls['whole']}",
        *(f"        {number.added}" for number in numbers),
        *(f"        {step}" for step in steps),
        f"    {totals} = {reduced.replace('part', 'total')}",
        "    rest = end",
    ]
    block = [f"{parts} = {calls['elements']}", f"{parts} = {reduced}", *(number.added for number in numbers)]
    results = ", ".join(number.of_elements(_identifier(value)) for number, value in zip(numbers, values, strict=True))
    return _Measured(
        (f"return {results}",),
        _lines(starts) + "\n",
        _lines(f"    {line}" for line in block),
        _lines(number.kept for number in numbers) + "\n",
    )


@dataclass(frozen=True)
class _Number:
    """A number that a kernel measures, and how it is written."""

    index: int
    reduction: Reduction
    real: str

    @property
    def _is_largest(self) -> bool:
        return self.reduction.kind == "largest"

    @property
    def _bits(self) -> str:
        return "tl.int64" if self.real == "tl.float64" else "tl.int32"

    def of_elements(self, value: str) -> str:
        """Of each element of a block."""
        return f"{self.reduction.kind}({value}{'.to(tl.float64)' if self.reduction.precise else ''}, mask)"

    @property
    def nothing(self) -> str:
        """Of nothing."""
        return f"tl.full((), 0, {self._bits if self._is_largest else 'tl.float64'})"

    @property
    def nothings(self) -> str:
        """Of nothing, for each element of a block."""
        kinds = {"sum_of_squares": self.real, "largest": self._bits, "nonfinite": "tl.int32"}
        return f"tl.full((BLOCK,), 0, {'tl.float64' if self.reduction.precise else kinds[self.reduction.kind]})"

    @property
    def added(self) -> str:
        """Added to the total."""
        total, part = f"total{self.index}", f"part{self.index}"
        return f"{total} = tl.maximum({total}, {part})" if self._is_largest else f"{total} += {part}"

    @property
    def reduced(self) -> str:
        """Of a block as a whole."""
        return f"{'greatest_of' if self._is_largest else 'sum_of'}(part{self.index})"

    @property
    def kept(self) -> str:
        """Put where it is kept for this chunk."""
        total = f"total{self.index}"
        value = f"{total}.to({self.real}, bitcast=True).to(tl.float64)" if self._is_largest else total
        return f"tl.store(measured + {self.index} * tl.num_programs(0) + tl.program_id(0), {value})"


def _reads(arrays: Sequence[_Array], numbers: Sequence[str], stored: int) -> Iterator[str]:
    """Read from the table where a block's arrays begin, and its numbers."""
    for position, array in enumerate(arrays):
        yield f"{array.name}_ = tl.load(entry + {position} * tensors) + first * {array.kept.itemsize}"
    if numbers:
        yield f"row = coefficients + tl.load(entry + {stored + 1} * tensors)"
    for position, number in enumerate(numbers):
        yield f"{number} = tl.load(row + {position} * rows)"


def _operations(graph: fx.Graph, real: str, skipped: Sequence[str]) -> Iterator[str]:
    """Print the operations; in a step that is skipped, the new parameter that is measured is the old one."""
    one, (param, *_) = f"tl.full((), 1.0, {real})", graph.nodes
    new = next(iter(reversed(graph.nodes))).args[0][0]
    for node in graph.nodes:
        if node.op == "call_function":
            arguments = [_argument(argument, real) for argument in node.args]
            yield f"{_identifier(node)} = {_EXPRESSIONS[node.target.name].format(*arguments, real=real, one=one)}"
            for flag in skipped if node is new else ():
                yield f"{_identifier(node)} = tl.where({flag}, {_identifier(param)}, {_identifier(node)})"


def _argument(argument: object, real: str = "") -> str:
    if isinstance(argument, fx.Node):
        return _identifier(argument)
    return f"tl.full((), {float(argument)!r}, {real})"  # type: ignore[arg-type]


def _identifier(node: fx.Node) -> str:
    if "coefficient" in node.meta:
        return f"c_{node.meta['coefficient']}"
    return f"{node.name}_0" if node.name in _RESERVED else str(node.name)


def _preamble(kernel: str, real: str, dialect: Dialect) -> str:
    """Print what a kernel refers to: the functions that it calls, directly or not, the device's library, constants."""
    functions: list[str] = []
    for name in reversed(_FUNCTIONS):
        if f"{name}(" in kernel + "".join(functions):
            functions.insert(0, _function(name, real, dialect))
    text = "".join(functions)
    library = "from triton.language.extra import libdevice\n" if "libdevice." in text else ""
    constants = [
        f'{name} = tl.constexpr(float("{name}"))\n' for name in ("inf", "nan") if re.search(rf"\b{name}\b", kernel)
    ]
    return library + "".join(("\n", *constants) if constants else ()) + text


def _function(name: str, real: str, dialect: Dialect) -> str:
    parameters, *results = _FUNCTIONS[name]
    narrow = results[1:] if real == "tl.float32" else []
    result = results[0] if not narrow else narrow[0] if dialect is Dialect.PORTABLE else narrow[-1]
    return f"\n\n@triton.jit\ndef {name}({parameters}):\n    return {result.format(real=real)}\n"


def _lines(lines: Iterable[str]) -> str:
    return "\n".join(f"    {line}" for line in lines)


_HEAD = '''"""{title}.

Generated by surefoot; edits are lost.
"""

import triton
import triton.language as tl
'''

_TEMPLATE = '''

@triton.jit
def update({parameters}, ALIGNED: tl.constexpr):
{pointers}
    # The hint is given here, to a pointer of this branch: the others must not believe it.
    if ALIGNED:
{hints}
{body}


@triton.jit(do_not_specialize=("tensors", "rows"))
def kernel(table, chunks, coefficients, found_inf, {argument}tensors, rows, BLOCK: tl.constexpr, REPEAT: tl.constexpr):
    """Update a chunk: table[i, t] is the address of array i of tensor t, then come its size and its row of numbers."""
    chunk = tl.load(chunks + tl.program_id(0))
    entry = table + (chunk & 0xFFFFFFFF)
    first = (chunk >> 32) * (BLOCK * REPEAT)
    rest = tl.load(entry + {count} * tensors) - first
{skip}{reads}
    aligned = (({together}) & {below}) == 0
    lanes = tl.arange(0, BLOCK)
    end = tl.maximum(rest - BLOCK * REPEAT, 0)
{starts}    while rest > end:
{block}
{steps}
        rest -= BLOCK
{keep}'''

_BLOCK = """        if aligned & (rest >= BLOCK):
            {whole}
        elif aligned & (rest % {lanes} == 0):
            {end}
        else:
            {elements}"""

_SKIP = """    if found_inf is not None:
        rest = tl.where(tl.load(found_inf) != 0, 0, rest)
"""
_SKIP_STORES = """    skipped = False
    if found_inf is not None:
        skipped = tl.load(found_inf) != 0
"""
