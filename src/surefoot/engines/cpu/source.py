"""A rule's graph printed in the language of kernels: all tensors of a bucket in one call, one pass over memory.

`codegen/lower.py` describes the language; what is printed here is both what people read and what is compiled.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import fx

from surefoot.engines.cpu.checks import VIOLATION, print_checks
from surefoot.engines.cpu.passes import use_reciprocals
from surefoot.engines.expressions import COMMON
from surefoot.rule import Reduction, Rule
from surefoot.storage import Format, format_of

# Slots of the launch that a kernel is handed: addresses and counts, each an int64.
LAUNCH = ("next_work_item", "status", "work_items", "first_segment", "segment_tensor", "segment_start", "segment_size",
          "pointers", "coefficients", "coefficient_row", "tensors", "measured", "segments", "rows", "limits",
          "only_checks", *VIOLATION)  # fmt: skip

_AHEAD, _FETCHED = 2, 128
"""How many segments before it is computed one is fetched, and its bytes; from there on the processor does so itself."""

# For each format: the type of an element, and how to load it into and store it from arithmetic.
_STORAGE: dict[Format, tuple[str, str, str]] = {
    format_of(torch.float32): ("float32", "real({0})", "float32({0})"),
    format_of(torch.float64): ("float64", "real({0})", "float64({0})"),
    format_of(torch.bfloat16): ("uint16", "real(from_bfloat16({0}))", "to_bfloat16(float32({0}))"),
    format_of(torch.float16): ("uint16", "real(from_half({0}))", "to_half(float32({0}))"),
}

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


def print_kernel(rule: Rule, layout: Layout, *, checked: bool = False) -> str:
    """Print the source of a rule's kernel; one that is checked verifies every item before it computes it."""
    graph = use_reciprocals(rule.graph)
    inputs = [node for node in graph.nodes if node.op == "placeholder" and node.meta["tensor"]]
    arrays = [_identifier(node) for node in inputs]
    numbers = [f"c_{name}" for name in rule.coefficients]
    measured = _measured(graph, rule.reductions, len(inputs) - 1, layout)
    body = "\n".join(f"        {line}" for line in [*_body(graph, inputs, layout.stored), *measured.body])
    stored = ", ".join(f"{array} {kept.name}" for array, kept in zip(arrays, layout.stored, strict=True))
    flags = ", ".join(name for name, value in rule.flags if value) or "none"
    slot = {name: index for index, name in enumerate(LAUNCH)}
    return _TEMPLATE.format(
        title=f"{rule.name}, flags: {flags}; {stored}{', checked' * checked}",
        real=str(layout.compute).removeprefix("torch."),
        parameters=", ".join(
            [*(f"{a}_" for a in arrays), "n", *(["measured", "segment"] * bool(rule.reductions)), *numbers]
        ),
        starts="".join(f"    {line}\n" for line in measured.starts),
        body=body or "        pass",
        keep="".join(
            f"    measured[segment * {len(rule.reductions)} + {index}] = {result}\n"
            for index, result in enumerate(measured.results)
        ),
        slot=slot,
        checks=print_checks(slot, [kept.itemsize for kept in layout.stored]) if checked else "",
        check=_CHECK.format(slot=slot) if checked else "",
        views="\n".join(
            f"            {a} = array(pointers[{i} * tensors + tensor] + start * {d.itemsize}, {_STORAGE[d][0]})"
            for i, (a, d) in enumerate(zip(arrays, layout.stored, strict=True))
        ),
        fetch="" if checked else _print_fetch(layout.stored),
        row=f"row = coefficient_row[tensor] * {len(numbers)}" if numbers else "row = 0",
        arguments=", ".join(
            [*arrays, "size", *(["measured", "segment"] * bool(rule.reductions)), *_numbers(graph, rule.coefficients)]
        ),
    )


def _print_fetch(stored: tuple[Format, ...]) -> str:
    """Print the lines that begin to load a later segment."""
    fetches = "\n".join(
        f"                    prefetch(pointers[{i} * tensors + tensor] + start * {kept.itemsize} + line)"
        for i, kept in enumerate(stored)
    )
    return _FETCH.format(ahead=_AHEAD, fetched=_FETCHED, fetches=fetches)


def _body(graph: fx.Graph, inputs: list[fx.Node], stored: tuple[Format, ...]) -> list[str]:
    """Print the loop's body: loads, operations, stores."""
    lines = []
    for node, kept in zip(inputs, stored, strict=True):
        name = _identifier(node)
        lines.append(f"{name} = {_STORAGE[kept][1].format(f'{name}_[i]')}")
    for node in graph.nodes:
        if node.op == "call_function":
            expression = _EXPRESSIONS[node.target.name].format(*map(_argument, node.args))
            lines.append(f"{_identifier(node)} = {expression}")
    results = next(iter(reversed(graph.nodes))).args[0]
    own = [(inputs[0], stored[0]), *zip(inputs[2:], stored[2:], strict=True)]
    for (target, kept), result in zip(own, results, strict=False):
        if result is not target:
            lines.append(f"{_identifier(target)}_[i] = {_STORAGE[kept][2].format(_identifier(result))}")
    return lines


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
            printed.body.append(f"{total} = plus_square({total}, {real}({value}))")
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


_TEMPLATE = '''"""{title}.

Generated by surefoot; edits are lost.
"""

real = {real}


def update({parameters}):
    narrow_vectors()
{starts}    for i in range(n):
{body}
{keep}

{checks}def kernel(launch):
    """Update the tensors of a launch; any number of threads may run it on the same launch at once."""
    narrow_vectors()
    slots = array(launch, int64)
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
            update({arguments})
        item = atomic_increment(launch)
'''

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
