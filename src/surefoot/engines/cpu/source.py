"""A rule's graph printed in the language of kernels: all tensors of a bucket in one call, one pass over memory.

`codegen/lower.py` describes the language; what is printed here is both what people read and what is compiled.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import fx

from surefoot.codegen.lower import TYPES
from surefoot.engines.cpu.checks import VIOLATION, print_checks
from surefoot.engines.cpu.passes import use_reciprocals
from surefoot.engines.draws import numbers_drawn, print_number, word_of, words_drawn
from surefoot.engines.expressions import COMMON
from surefoot.rule import ROUNDING_STEP, Reduction, Rule
from surefoot.rule.ops import BY_NAME
from surefoot.storage import BLOCK, Format, format_8_bits, format_16_bits, format_of

# Slots of the launch that a kernel is handed: addresses and counts, each an int64.
LAUNCH = ("next_work_item", "status", "work_items", "first_segment", "segment_tensor", "segment_start", "segment_size",
          "pointers", "coefficients", "coefficient_row", "tensors", "measured", "segments", "rows", "limits",
          "only_checks", "seed", "parameter", "first_element", *VIOLATION)  # fmt: skip

_AHEAD, _FETCHED = 2, 128
"""How many segments before it is computed one is fetched, and its bytes; then the processor does that itself."""


class _Stored(NamedTuple):
    """How kernels keep a format.

    Attributes:
        type: the type of an element.
        load: its value, given {at}, the element, and {part}, the element of a correction or the scale.
        store: the element of {value}, a float32, with {random}, 16 random bits; of a format in blocks what is stored in
            the end, of the value in units of its scale.
        part: the type of the second array, if there is one, and for a correction what is stored there.
    """

    type: str
    load: str
    store: str
    part: tuple[str, str] = ("", "")


_BITS_16 = {torch.bfloat16: "bfloat16", torch.float16: "half"}


def _storage() -> Iterator[tuple[Format, _Stored]]:
    """Yield each format with how kernels keep it."""
    yield format_of(torch.float32), _Stored("float32", "real({at})", "float32({value})")
    yield format_of(torch.float64), _Stored("float64", "real({at})", "float64({value})")
    for dtype, name in _BITS_16.items():
        load, word = f"real(from_{name}({{at}}))", f"{name}_word(float32({{value}}))"
        yield format_of(dtype), _Stored("uint16", load, f"to_{name}(float32({{value}}))")
        stochastic = format_16_bits(dtype, stochastic=True)
        yield stochastic, _Stored("uint16", load, f"stochastic_16({word}, {{random}})")
        for kept in (format_16_bits(dtype, stochastic=s, correction=torch.int8) for s in (False, True)):
            both = f"stochastic_24({word}, {{random}})" if kept.stochastic else f"nearest_24({word})"
            load = f"real(from_{name}_word(joined({{at}}, int32({{part}}) << 8)))"
            store = f"uint16(({both} + 0x80) >> 8)"
            yield kept, _Stored("uint16", load, store, ("int8", f"int8({both})"))
        exact = format_16_bits(dtype, stochastic=False, correction=torch.int16)
        load = f"real(from_{name}_word(joined({{at}}, int32({{part}}))))"
        yield exact, _Stored("uint16", load, f"uint16(({word} + 0x8000) >> 16)", ("int16", f"int16({word})"))
    for signed, code in ((True, "e4m3"), (False, "e5m3")):
        load, store = f"real(from_{code}({{at}}, {{part}}))", f"to_{code}({{value}}, {{random}})"
        yield format_8_bits(signed=signed), _Stored("uint8", load, store, ("float32", ""))


_STORAGE: dict[Format, _Stored] = dict(_storage())

_EXPRESSIONS: dict[str, str] = COMMON | {
    "div": "{0} / {1}",
    # As torch: the two powers that are roots are so at infinity and zero too.
    "pow": "math.sqrt({0}) if {1} == real(0.5) else real(1) / math.sqrt({0}) if {1} == real(-0.5) else {0} ** {1}",
    "neg": "-{0}",
    "abs": "abs({0})",
    "sign": "real({0} > 0) - real({0} < 0)",
    "sqrt": "math.sqrt({0})",
    "rsqrt": "real(1) / math.sqrt({0})",
    "reciprocal": "real(1) / {0}",
    "exp": "math.exp({0})",
    "log": "math.log({0})",
    "tanh": "math.tanh({0})",
    "atan2": "atan2_{real}({0}, {1})",
    "maximum": "{0} if ({0} > {1}) | ({0} != {0}) else {1}",
    "minimum": "{0} if ({0} < {1}) | ({0} != {0}) else {1}",
    "lerp": "{0} + {2} * ({1} - {0}) if abs({2}) < real(0.5) else {1} - ({1} - {0}) * (real(1) - {2})",
    "addcdiv": "{0} + {3} * {1} / {2}",
    "where": "{1} if {0} != 0 else {2}",
}


def stores(kept: Format) -> bool:
    """Return whether kernels can load and store a format."""
    return kept in _STORAGE


@dataclass(frozen=True)
class Layout:
    """What a kernel depends on beside the rule.

    Attributes:
        compute: dtype of the arithmetic, float32 or float64.
        stored: formats of param, grad and the slots, in this order.
    """

    compute: torch.dtype
    stored: tuple[Format, ...]


class _Array(NamedTuple):
    """A parameter, its gradient or a slot as a kernel sees it.

    Attributes:
        name: its name; the array is called so with an underscore.
        kept: its format.
        new: what its new value is called, None if it is not written.
        random: which of the numbers drawn for an element it is rounded by, None if by none.
    """

    name: str
    kept: Format
    new: str | None
    random: int | None

    @property
    def stored(self) -> _Stored:
        return _STORAGE[self.kept]

    @property
    def part(self) -> str:
        """What its second array is called, without the underscore."""
        return f"{self.name}_{self.kept.part}" if self.kept.part else ""

    @property
    def signed(self) -> bool:
        return self.kept.code != "e5m3"

    @property
    def in_blocks(self) -> bool:
        return self.kept.code is not None

    @property
    def word(self) -> int | None:
        """Which of the words drawn for an element it is rounded by, None if by none."""
        return None if self.random is None else word_of(self.random)

    def random_bits(self, words: str) -> str:
        """Print the bits that it is rounded by; `words` tells what words are called by their number."""
        return "" if self.random is None else print_number(self.random, words.format(self.word))

    def load(self, at: str) -> str:
        """Print the line that loads the element at an index."""
        part = "" if not self.part else self.part if self.in_blocks else f"{self.part}_[{at}]"
        return f"{self.name} = {self.stored.load.format(at=f'{self.name}_[{at}]', part=part)}"

    def stores(self, at: str) -> Iterator[str]:
        """Print the lines that store the element at an index; in blocks, put it by until the scale is known."""
        if self.new is None:
            return
        if self.in_blocks:
            yield f"{self.name}_new[i] = float32({self.new})"
            bits = f"as_uint32(float32({self.new}))"
            bits = f"{bits} & 0x7FFFFFFF" if self.signed else bits  # else what is negative comes after infinity
            yield f"{self.name}_largest = max({self.name}_largest, {bits})"
            return
        given = {"value": self.new, "random": self.random_bits("random{}")}
        yield f"{self.name}_[{at}] = {self.stored.store.format(**given)}"
        if self.part:
            yield f"{self.part}_[{at}] = {self.stored.part[1].format(**given)}"


def _arrays(rule: Rule, graph: fx.Graph, inputs: Sequence[fx.Node], stored: Sequence[Format]) -> list[_Array]:
    """Return what a kernel sees."""
    results = next(iter(reversed(graph.nodes))).args[0]
    new = [_identifier(node) if written else None for node, written in zip(results, rule.written, strict=False)]
    param, *slots = zip(new, numbers_drawn(rule, (stored[0], *stored[2:])), strict=True)
    updates = (param, (None, None), *slots)
    return [
        _Array(_identifier(node), kept, *update) for node, kept, update in zip(inputs, stored, updates, strict=True)
    ]


def print_kernel(rule: Rule, layout: Layout, *, checked: bool = False) -> str:
    """Print the source of a rule's kernel; one that is checked verifies every item before it computes it."""
    graph = use_reciprocals(rule.graph)
    inputs = [node for node in graph.nodes if node.op == "placeholder" and node.meta["tensor"]]
    arrays = _arrays(rule, graph, inputs, layout.stored)
    numbers = [f"c_{name}" for name in rule.coefficients]
    measured = _measured(graph, rule.reductions, len(inputs) - 1, layout)
    stored = ", ".join(f"{array.name} {array.kept.name}" for array in arrays)
    flags = ", ".join(name for name, value in rule.flags if value) or "none"
    slot = {name: index for index, name in enumerate(LAUNCH)}
    # Array by array: its name, its type, the bytes of an element, elements of the tensor for each of its own.
    held = [(array.name, array.stored.type, array.kept.itemsize, 1) for array in arrays]
    held += [
        (a.part, a.stored.part[0], TYPES[a.stored.part[0]].bits // 8, BLOCK if a.in_blocks else 1)
        for a in arrays
        if a.part
    ]
    random = any(array.random is not None for array in arrays)
    given = [*["measured", "segment"] * bool(rule.reductions), *["first", "key"] * random]
    places = {name: f"start * {size}" if per == 1 else f"start // {per} * {size}" for name, _, size, per in held}
    busy = random or len(held) > len(arrays) or any(node.target in _COSTLY for node in graph.nodes)
    real = str(layout.compute).removeprefix("torch.")
    return _TEMPLATE.format(
        title=f"{rule.name}, flags: {flags}; {stored}{', checked' * checked}",
        real=real,
        parameters=", ".join([*(f"{name}_" for name, *_ in held), "n", *given, *numbers]),
        vectors=_VECTORS[sum((busy, any(array.in_blocks for array in arrays)))],
        starts="".join(f"    {line}\n" for line in measured.starts),
        loop=_print_loop(graph, arrays, measured.body, real),
        keep="".join(
            f"    measured[segment * {len(rule.reductions)} + {index}] = {result}\n"
            for index, result in enumerate(measured.results)
        ),
        slot=slot,
        checks=print_checks(slot, [(size, per) for _, _, size, per in held]) if checked else "",
        check=_CHECK.format(slot=slot) if checked else "",
        views="\n".join(
            f"            {name} = array(pointers[{i} * tensors + tensor] + {places[name]}, {kind})"
            for i, (name, kind, *_) in enumerate(held)
        ),
        fetch="" if checked else _print_fetch(list(places.values())),
        row=f"row = coefficient_row[tensor] * {len(numbers)}" if numbers else "row = 0",
        random=_RANDOM.format(slot=slot, step=rule.coefficients.index(ROUNDING_STEP.name)) if random else "",
        arguments=", ".join(
            [
                *(name for name, *_ in held),
                "size",
                *["measured", "segment"] * bool(rule.reductions),
                *["uint32(first)", "key"] * random,
                *_numbers(graph, rule.coefficients),
            ]
        ),
    )


def _print_fetch(places: Sequence[str]) -> str:
    """Print the lines that begin to load a later segment."""
    fetches = "\n".join(
        f"                    prefetch(pointers[{i} * tensors + tensor] + {place} + line)"
        for i, place in enumerate(places)
    )
    return _FETCH.format(ahead=_AHEAD, fetched=_FETCHED, fetches=fetches)


def _print_loop(graph: fx.Graph, arrays: Sequence[_Array], measuring: Sequence[str], real: str) -> str:
    """Print the loop over elements; where arrays are in blocks one over blocks, whose codes are stored at their end.

    A block that is whole has loops of a constant length, which are compiled without ends of their own.
    """
    drawn = words_drawn([array.random for array in arrays])
    keys = [f"key{i} = {'key' if i == 0 else f'next_key(key{i - 1})'}" for i in range(drawn)]
    blocks = [array for array in arrays if array.in_blocks]
    at, element = ("block + i", "first + uint32(block) + uint32(i)") if blocks else ("i", "first + uint32(i)")
    body = [array.load(at) for array in arrays]
    for node in graph.nodes:
        if node.op == "call_function":
            expression = _EXPRESSIONS[node.target.name].format(*map(_argument, node.args), real=real)
            body.append(f"{_identifier(node)} = {expression}")
    body += [f"random{i} = random_32({element}, key{i})" for i in range(drawn)]
    body += [line for array in arrays for line in array.stores(at)]
    body += measuring
    if not blocks:
        lines = [*keys, "for i in range(n):", *(f"    {line}" for line in body or ["pass"])]
        return "\n".join(f"    {line}" for line in lines)
    kept = sorted({array.word for array in blocks if array.word is not None})
    body += [f"drawn{i}[i] = random{i}" for i in kept]
    buffers = [f"{array.name}_new = buffer(float32, {BLOCK})" for array in blocks if array.new is not None]
    buffers += [f"drawn{i} = buffer(uint32, {BLOCK})" for i in kept]
    lines = [*keys, *buffers, f"for block in range(0, n // {BLOCK} * {BLOCK}, {BLOCK}):"]
    lines += [f"    {line}" for line in _print_block(blocks, body, str(BLOCK))]
    lines += [f"if n % {BLOCK}:", f"    block, count = n // {BLOCK} * {BLOCK}, n % {BLOCK}"]
    lines += [f"    {line}" for line in _print_block(blocks, body, "count")]
    return "\n".join(f"    {line}" for line in lines)


def _print_block(arrays: Sequence[_Array], body: Sequence[str], count: str) -> Iterator[str]:
    """Print the lines that compute a block of so many elements: their new values, then scales and codes of these."""
    written = [array for array in arrays if array.new is not None]
    yield from (f"{array.part} = {array.part}_[block // {BLOCK}]" for array in arrays)
    yield from (f"{array.name}_largest = uint32(0)" for array in written)
    yield from (f"for i in range({count}):", *(f"    {line}" for line in body))
    for array in written:
        yield from _scale(array, count)
    if written:
        yield f"for i in range({count}):"
    for array in written:
        name = array.name
        given = {"value": f"{name}_new[i] * {name}_inverse", "random": array.random_bits("drawn{}[i]")}
        yield f"    {name}_[block + i] = {array.stored.store.format(**given)}"
    for array in written:
        name = array.name
        yield f"if not {name}_finite:"
        yield f"    special_codes_{array.kept.code}({name}_new, {name}_, block, {count})"


def _scale(array: _Array, count: str) -> Iterator[str]:
    """Print the lines that store the scale of a block."""
    name, mask = array.name, "0x7FFFFFFF" if array.signed else "0xFFFFFFFF"
    yield f"{name}_finite = {name}_largest < 0x7F800000"
    yield f"if not {name}_finite:"
    yield f"    {name}_largest = largest_finite({name}_new, uint32({mask}), {count})"
    yield f"{name}_exponent = block_exponent_{array.kept.code}({name}_largest)"
    yield f"{array.part}_[block // {BLOCK}] = as_float32({name}_exponent)"
    yield f"{name}_inverse = as_float32(0x7F000000 - {name}_exponent)"


class _Measured(NamedTuple):
    """Lines of a kernel that measure: before the loop, in it, and what they give."""

    starts: list[str]
    body: list[str]
    results: list[str]


_BITS = {
    torch.float32: ("uint32", 0x7FFFFFFF, 0x7F800000),
    torch.float64: ("uint64", 0x7FFFFFFFFFFFFFFF, 0x7FF0000000000000),
}
"""For each dtype of arithmetic: the type of its bit patterns, those of absolute values, infinity."""


def _measured(graph: fx.Graph, reductions: tuple[Reduction, ...], stored: int, layout: Layout) -> _Measured:
    """Print what is measured.  Absolute values are compared as bit patterns, among which NaN is the greatest."""
    bits, mask, infinity = _BITS[layout.compute]
    printed = _Measured([], [], [])
    values = next(iter(reversed(graph.nodes))).args[0][stored:]
    for index, (reduction, value) in enumerate(zip(reductions, map(_identifier, values), strict=True)):
        total, magnitude = f"measure{index}", f"{bits}(as_{bits}({value}) & {bits}({mask}))"
        if reduction.kind == "nonfinite":
            printed.starts.append(f"{total} = {bits}(0)")
            printed.body.append(f"{total} = {bits}({total} + {bits}({magnitude} >= {bits}({infinity})))")
            printed.results.append(f"float64({total})")
        elif reduction.kind == "largest":
            printed.starts.append(f"{total} = {bits}(0)")
            printed.body.append(f"{total} = max({total}, {magnitude})")
            printed.results.append(f"float64(as_{bits.replace('uint', 'float')}({total}))")
        else:
            real = "float64" if reduction.precise else "real"
            printed.starts.append(f"{total} = {real}(0)")
            added = "plus" if reduction.kind == "sum" else "plus_square"
            printed.body.append(f"{total} = {added}({total}, {real}({value}))")
            printed.results.append(f"float64({total})")
    return printed


def _numbers(graph: fx.Graph, coefficients: tuple[str, ...]) -> Iterator[str]:
    """Print the coefficients as a kernel reads them from its table."""
    inverted = {node.meta["coefficient"] for node in graph.nodes if node.meta.get("reciprocal")}
    for index, name in enumerate(coefficients):
        yield f"real({'1.0 / ' if name in inverted else ''}coefficients[row + {index}])"


def _identifier(node: fx.Node) -> str:
    return f"c_{node.meta['coefficient']}" if "coefficient" in node.meta else str(node.name)


def _argument(argument: object) -> str:
    return _identifier(argument) if isinstance(argument, fx.Node) else f"real({argument!r})"


_COSTLY = (BY_NAME["atan2"],)
"""Operations that take as long as moving an element to and from memory."""

_TEMPLATE = '''"""{title}.

Generated by surefoot; edits are lost.
"""

real = {real}


def update({parameters}):
{vectors}{starts}{loop}
{keep}

{checks}def kernel(launch):
    """Update the tensors of a launch; any number of threads may run it on the same launch at once."""
{vectors}    slots = array(launch, int64)
    items, tensors, segments = slots[{slot[work_items]}], slots[{slot[tensors]}], slots[{slot[segments]}]
    first_segment = array(slots[{slot[first_segment]}], int64)
    segment_tensor = array(slots[{slot[segment_tensor]}], int64)
    segment_start = array(slots[{slot[segment_start]}], int64)
    segment_size = array(slots[{slot[segment_size]}], int64)
    pointers = array(slots[{slot[pointers]}], int64)
    coefficient_row = array(slots[{slot[coefficient_row]}], int64)
    coefficients = array(slots[{slot[coefficients]}], float64)
    measured = array(slots[{slot[measured]}], float64)
    item = atomic_increment(launch)
    while item < items:
{check}        for segment in range(first_segment[item], first_segment[item + 1]):
{fetch}            tensor, start, size = segment_tensor[segment], segment_start[segment], segment_size[segment]
            {row}
{views}
{random}            update({arguments})
        item = atomic_increment(launch)
'''

# Plain kernels wait for memory.  What also packs numbers, or computes much, computes in the widest vectors; in blocks
# it is told that no arrays overlap, which it would look at again for each.
_VECTORS = ("    narrow_vectors()\n", "    wide_vectors()\n", "    wide_vectors()\n    separate_arrays()\n")

_RANDOM = """\
            first = array(slots[{slot[first_element]}], int64)[tensor] + start
            key = random_key(slots[{slot[seed]}], array(slots[{slot[parameter]}], int64)[tensor],
                             coefficients[row + {step}], first)
"""

_FETCH = """\
            if segment + {ahead} < segments:
                tensor, start = segment_tensor[segment + {ahead}], segment_start[segment + {ahead}]
                for line in range(0, {fetched}, 64):
{fetches}
"""

_CHECK = """\
        if not fits(launch, item):
            return
        if slots[{slot[only_checks]}]:
            item = atomic_increment(launch)
            continue
"""
