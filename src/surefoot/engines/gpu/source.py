"""A rule's graph printed as a Triton kernel: all tensors of a bucket in one launch, one pass over memory.

A program of the kernel updates a chunk of one tensor, a few blocks one after the other.  It reads from a table where
the tensor's arrays stand, so that one kernel serves any number of tensors of any sizes.  Blocks that are full and
aligned are moved in accesses of 128 bits without masks; so are, under a mask, ends that have a multiple of eight
elements; only what is left goes by elements.

Short formats are converted by functions that `conversions.py` prints.  A format in blocks is stored when all of a block
has its new value: the block's largest gives the scale, which a reduction within a few threads finds.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import torch
from torch import fx

from surefoot.engines.draws import numbers_drawn, print_number, word_of, words_drawn
from surefoot.engines.expressions import COMMON
from surefoot.engines.gpu.conversions import definitions, print_called
from surefoot.rule import ROUNDING_STEP, Reduction, Rule
from surefoot.storage import BLOCK, Format, format_8_bits, format_16_bits, format_of


class Dialect(Enum):
    """How a kernel writes what Triton does not offer, or does not round as IEEE 754 asks."""

    PTX = "NVIDIA's; Triton's own float32 roots and quotients would flush denormals"
    PORTABLE = "any device's, and that of Triton's interpreter, which does not round when it converts to bfloat16"


ALIGNMENT = 16
"""Bytes of the widest access; a block uses it where every address is a multiple of this."""
LANES = 8
"""Elements of which an end must have a multiple to be moved in wide accesses: 16 bytes of 16-bit numbers."""


class _Stored(NamedTuple):
    """How kernels keep a format.

    Attributes:
        type: the type of an element.
        load: its value, given {at}, the element, and {part}, the element of a correction or the scale.
        store: the element of {value}, with {random}, 16 random bits; of a format in blocks that in units of the scale.
        loaded: the type of what is loaded.
        value: the type of what is stored.
        part: the type of the second array, if there is one, and what is stored there, a scale of an {exponent}.
    """

    type: str
    load: str
    store: str
    loaded: str = "tl.float32"
    value: str = "tl.float32"
    part: tuple[str, str] = ("", "")


def _storage(dialect: Dialect) -> Iterator[tuple[Format, _Stored]]:
    """Yield each format with how kernels keep it."""
    for kind in ("float32", "float64"):
        yield format_of(getattr(torch, kind)), _Stored(f"tl.{kind}", "{at}", "{value}", f"tl.{kind}", f"tl.{kind}")
    for kind, word in (("bfloat16", "bfloat16"), ("float16", "half")):
        dtype = getattr(torch, kind)
        plain = _Stored(f"tl.{kind}", "{at}", f"{{value}}.to(tl.{kind})", f"tl.{kind}")
        if kind == "bfloat16" and dialect is Dialect.PORTABLE:
            plain = _Stored("tl.uint16", "from_bfloat16({at})", "to_bfloat16({value})")
        yield format_of(dtype), plain
        bits = f"{word}_word({{value}})"
        rounded = f"stochastic_16({bits}, {{random}}).to({plain.type}, bitcast=True)"
        yield format_16_bits(dtype, stochastic=True), plain._replace(store=rounded)
        for stochastic in (False, True):
            both = f"stochastic_24({bits}, {{random}})" if stochastic else f"nearest_24({bits})"
            load = f"from_{word}_word(joined({{at}}, {{part}}.to(tl.int32) << 8))"
            stored = _Stored(
                "tl.uint16", load, f"(({both} + 0x80) >> 8).to(tl.uint16)", part=("tl.int8", f"{both}.to(tl.int8)")
            )
            yield format_16_bits(dtype, stochastic=stochastic, correction=torch.int8), stored
        load, store = f"from_{word}_word(joined({{at}}, {{part}}))", f"(({bits} + 0x8000) >> 16).to(tl.uint16)"
        exact = _Stored("tl.uint16", load, store, part=("tl.int16", f"{bits}.to(tl.int16)"))
        yield format_16_bits(dtype, stochastic=False, correction=torch.int16), exact
    for signed, code in ((True, "e4m3"), (False, "e5m3")):
        load = f"from_{code}({{at}}, of_each({{part}}))"
        store = f"special_{code}({{value}}, to_{code}({{value}}, {{random}}))"
        stored = _Stored("tl.uint8", load, store, part=("tl.float32", "scale({exponent})"))
        yield format_8_bits(signed=signed), stored


_STORAGE: dict[Dialect, dict[Format, _Stored]] = {dialect: dict(_storage(dialect)) for dialect in Dialect}

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
    "atan2": "angle({0}, {1})",
    "maximum": "tl.where(({0} > {1}) | ({0} != {0}), {0}, {1})",
    "minimum": "tl.where(({0} < {1}) | ({0} != {0}), {0}, {1})",
    "lerp": "tl.where(tl.abs({2}) < 0.5, {0} + {2} * ({1} - {0}), {1} - ({1} - {0}) * (1.0 - {2}))",
    "addcdiv": "{0} + quotient({3} * {1}, {2})",
    "where": "tl.where({0} != 0, {1}, {2})",
    "fill": "tl.broadcast_to({1}, {0}.shape)",
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
    "angle": _in_float64("atan2", "y", "x"),
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
    # Of formats in blocks: the scale, and what stands once for each block, for its elements.
    "scale": ("exponent", "exponent.to(tl.float32, bitcast=True)"),
    "of_each": (
        "x",
        f"tl.reshape(tl.broadcast_to(tl.expand_dims(x, 1), (x.shape[0], {BLOCK})), (x.shape[0] * {BLOCK},))",
    ),
    "greatest_of_blocks": (
        "x, mask",
        f"tl.max(tl.reshape(within(tl.where(x < 0x7F800000, x, 0), mask), (x.shape[0] // {BLOCK}, {BLOCK})), axis=1)",
    ),
    "exponent_e4m3": (
        "x, mask",
        "block_exponent_e4m3(greatest_of_blocks(x.to(tl.uint32, bitcast=True) & 0x7FFFFFFF, mask))",
    ),
    # Among the patterns themselves all that is negative comes after infinity.
    "exponent_e5m3": ("x, mask", "block_exponent_e5m3(greatest_of_blocks(x.to(tl.uint32, bitcast=True), mask))"),
}
_RESERVED = {*_FUNCTIONS, "inf", "libdevice", "nan", "tl", "triton"}
_RESERVED |= {"block_mask", "blocks", "element", "key", "lanes", "mask", "skipped"}
_RESERVED |= {f"random{number}" for number in range(16)}


def stores(kept: Format) -> bool:
    """Return whether kernels can load and store a format."""
    return kept in _STORAGE[Dialect.PTX]


class _Address(NamedTuple):
    """Where an array stands: what the address is called, the type there, the elements of the tensor for each, bytes."""

    name: str
    type: str
    per: int
    itemsize: int

    def after(self, elements: str) -> str:
        """Print the bytes that some elements of the tensor take."""
        return f"{elements} * {self.itemsize}" if self.per == 1 else f"{elements} // {self.per} * {self.itemsize}"


@dataclass(frozen=True)
class _Array:
    """A parameter, its gradient or a slot as a kernel sees it.

    Attributes:
        name: its name.
        kept: its format.
        stored: how kernels keep that.
        new: its new value, None if it is not written.
        random: which of the numbers drawn for an element it is rounded by, None if by none.
    """

    name: str
    kept: Format
    stored: _Stored
    new: str | None
    random: int | None

    @property
    def address(self) -> _Address:
        return _Address(f"{self.name}_", self.stored.type, 1, self.kept.itemsize)

    @property
    def part(self) -> _Address | None:
        """Where its second array stands, if it has one."""
        if self.kept.correction is not None:
            return _Address(f"{self.name}_correction_", self.stored.part[0], 1, self.kept.correction.itemsize)
        return _Address(f"{self.name}_scale_", self.stored.part[0], BLOCK, 4) if self.in_blocks else None

    @property
    def in_blocks(self) -> bool:
        return self.kept.code is not None

    @property
    def _part_lanes(self) -> tuple[str, str]:
        return ("blocks", "block_mask") if self.in_blocks else ("lanes", "mask")

    def load(self, real: str) -> str:
        """Print the line that loads it."""
        given = {"at": f"tl.load({self.address.name} + lanes, mask)"}
        if self.part is not None:
            given["part"] = f"tl.load({self.part.name} + {', '.join(self._part_lanes)})"
        return f"{self.name} = {_converted(self.stored.load.format(**given), self.stored.loaded, real)}"

    def store(self, real: str) -> Iterator[str]:
        """Print the lines that store its new value."""
        if self.new is None:
            return
        given = {"value": _converted(self.new, real, self.stored.value), "exponent": f"{self.name}_exponent"}
        if self.random is not None:
            given["random"] = print_number(self.random, f"random{word_of(self.random)}")
        if self.in_blocks:
            yield f"{given['exponent']} = exponent_{self.kept.code}({given['value']}, mask)"
            yield f"{self.name}_scaled = {given['value']} * of_each(scale(0x7F000000 - {given['exponent']}))"
            given["value"] = f"{self.name}_scaled"
        yield f"tl.store({self.address.name} + lanes, {self.stored.store.format(**given)}, mask)"
        if self.part is not None:
            places, mask = self._part_lanes
            yield f"tl.store({self.part.name} + {places}, {self.stored.part[1].format(**given)}, {mask})"


def _converted(value: str, given: str, wanted: str) -> str:
    return value if given == wanted else f"{value}.to({wanted})"


def print_kernel(rule: Rule, compute: torch.dtype, stored: Sequence[Format], dialect: Dialect) -> str:
    """Print the source of a rule's kernel.

    Args:
        rule: the rule.
        compute: dtype of the arithmetic, float32 or float64.
        stored: formats of param, grad and the slots, in this order; a rule of fewer slots leaves the last alone.
        dialect: how the device is spoken to.
    """
    arrays, real = _arrays(rule, stored, dialect), f"tl.{str(compute).removeprefix('torch.')}"
    parts = [array.part for array in arrays if array.part is not None]
    addresses = [*(array.address for array in arrays), *parts]
    names, wide = [address.name for address in addresses], [address.name for address in addresses if address.per == 1]
    numbers = [f"c_{name}" for name in rule.coefficients]
    flags = ", ".join(name for name, value in rule.flags if value) or "none"
    in_blocks, drawn = any(array.in_blocks for array in arrays), words_drawn([array.random for array in arrays])
    stores = [*_random(drawn), *(line for array in arrays for line in array.store(real))]
    skipped = ("skipped",) if rule.reductions and stores else ()
    given = ["element", "key"] * bool(drawn)

    def call(mask: str, block_mask: str, *, aligned: bool) -> str:
        masks = ["lanes", mask, *["blocks", block_mask] * in_blocks]
        return f"update({', '.join([*names, *masks, *given, *numbers, *skipped, str(aligned)])})"

    blocks = f"blocks * {BLOCK} < rest"
    calls = {
        "whole": call("None", "None", aligned=True),
        "end": call(f"lanes < rest // {LANES} * {LANES}", blocks, aligned=True),
        "elements": call("lanes < rest", blocks, aligned=False),
    }
    steps = [f"{address.name} += {address.after('BLOCK')}" for address in addresses] + ["element += BLOCK"] * bool(
        drawn
    )
    measured = _measured(rule, real, calls, steps) if rule.reductions else _Measured()
    body = [
        *(array.load(real) for array in arrays),
        *_operations(rule.graph, real, skipped),
        *(["if not skipped:", *(f"    {store}" for store in stores)] if skipped else stores),
        *measured.results,
    ]
    kernel = _TEMPLATE.format(
        parameters=", ".join(
            [*names, "lanes", "mask", *["blocks", "block_mask"] * in_blocks, *given, *numbers, *skipped]
        ),
        pointers=_lines(f"{name} = {name}.to(tl.pointer_type({kind}))" for name, kind, *_ in addresses),
        hints=_lines(f"    {name} = tl.multiple_of({name}, {ALIGNMENT})" for name in wide),
        body=_lines(body),
        argument="measured, " if rule.reductions else "",
        size=_size_row(stored),
        skip=_SKIP_STORES if skipped else "" if rule.reductions else _SKIP,
        reads=_lines(_reads(arrays, stored, numbers)),
        together=" | ".join(wide),
        below=ALIGNMENT - 1,
        blocks=f"    blocks = tl.arange(0, BLOCK // {BLOCK})\n" * in_blocks,
        starts=measured.starts,
        block=measured.block or _BLOCK.format(**calls, lanes=LANES),
        steps=_lines(f"    {step}" for step in steps),
        keep=measured.keep,
    )
    title = f"{rule.name}, flags: {flags}; " + ", ".join(f"{array.name} {array.kept.name}" for array in arrays)
    return _HEAD.format(title=title) + _preamble(kernel, real, dialect) + kernel


def _arrays(rule: Rule, stored: Sequence[Format], dialect: Dialect) -> list[_Array]:
    """Return what a kernel sees."""
    inputs = [node for node in rule.graph.nodes if node.op == "placeholder" and node.meta["tensor"]]
    results = next(iter(reversed(rule.graph.nodes))).args[0]
    new = [_argument(node) if written else None for node, written in zip(results, rule.written, strict=False)]
    param, *slots = zip(new, numbers_drawn(rule, (stored[0], *stored[2:])), strict=False)
    updates = (param, (None, None), *slots)
    return [
        _Array(_identifier(node), kept, _STORAGE[dialect][kept], *update)
        for node, kept, update in zip(inputs, stored, updates, strict=False)
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
        if self.reduction.kind == "sum":
            return f"within({value}{'.to(tl.float64)' if self.reduction.precise else ''}, mask)"
        return f"{self.reduction.kind}({value}{'.to(tl.float64)' if self.reduction.precise else ''}, mask)"

    @property
    def nothing(self) -> str:
        """Of nothing."""
        return f"tl.full((), 0, {self._bits if self._is_largest else 'tl.float64'})"

    @property
    def nothings(self) -> str:
        """Of nothing, for each element of a block."""
        kinds = {"sum": self.real, "sum_of_squares": self.real, "largest": self._bits, "nonfinite": "tl.int32"}
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


def _reads(arrays: Sequence[_Array], stored: Sequence[Format], numbers: Sequence[str]) -> Iterator[str]:
    """Read from the table where a chunk's arrays begin, its numbers, and what its random bits begin from.

    The rows of the table are: the arrays; what stands beside them; seed, parameter and first element, if random bits
    are drawn; the size; the row of numbers.
    """
    parts = [array.part for array in arrays if array.part is not None]
    for position, address in (*enumerate(array.address for array in arrays), *enumerate(parts, len(stored))):
        yield f"{address.name} = tl.load(entry + {position} * tensors) + {address.after('first')}"
    if numbers:
        yield f"row = coefficients + tl.load(entry + {_size_row(stored) + 1} * tensors)"
    for position, number in enumerate(numbers):
        yield f"{number} = tl.load(row + {position} * rows)"
    if any(array.random is not None for array in arrays):
        seed, parameter, first = (f"tl.load(entry + {_size_row(stored) - back} * tensors)" for back in (3, 2, 1))
        yield f"element = {first} + first"
        yield f"key = random_key({seed}, {parameter}, c_{ROUNDING_STEP.name}.to(tl.float64), element)"
        yield "element = element.to(tl.uint32)"


def _size_row(stored: Sequence[Format]) -> int:
    """Return the row of the table in which sizes stand."""
    return sum(1 + (kept.part is not None) for kept in stored) + 3 * any(kept.stochastic for kept in stored)


def _random(drawn: int) -> Iterator[str]:
    """Print the lines that draw the random bits of each element."""
    for index in range(drawn):
        if index:
            yield "key = next_key(key)"
        yield f"random{index} = random_32(element + lanes, key)"


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
    return f"{node.name}_0" if node.name in _RESERVED or node.name in definitions() else str(node.name)


def _preamble(kernel: str, real: str, dialect: Dialect) -> str:
    """Print what a kernel refers to: the functions that it calls, directly or not, the device's library, constants."""
    functions: list[str] = []
    for name in reversed(_FUNCTIONS):
        if f"{name}(" in kernel + "".join(functions):
            functions.insert(0, _function(name, real, dialect))
    text = "".join(functions)
    text = print_called(kernel + text) + text
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
    rest = tl.load(entry + {size} * tensors) - first
{skip}{reads}
    aligned = (({together}) & {below}) == 0
    lanes = tl.arange(0, BLOCK)
{blocks}    end = tl.maximum(rest - BLOCK * REPEAT, 0)
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
