"""How many instructions the loops of a kernel take for each element, counted in its assembly (x86-64, AT&T's syntax).

A loop is known by an instruction that it has.  Of its versions, for vectors of several widths and for single elements,
the widest counts: the others are for the ends of tensors.
"""

import heapq
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

_LANES = {"x": 4, "y": 8, "z": 16}
"""Numbers of 32 bits in a vector register."""


class _Block(NamedTuple):
    """Instructions that are executed one after the other, and the names of the blocks that may follow."""

    instructions: list[str]
    following: list[str]

    def elements(self, name: str) -> int:
        """Return on how many elements the instructions of a name work."""
        registers = (re.search(r"%([xyz])mm", text) for text in self.instructions if text.split()[0] == name)
        return sum(_LANES[found[1]] for found in registers if found)


def loops_with(assembly: str, name: str, without: str = "") -> list[float]:
    """Return the instructions for each element of the widest loops that have an instruction.

    Args:
        assembly: that of a kernel.
        name: the instruction, on vectors of 32 bits an element, for instance `"vsqrtps"`.
        without: an instruction that they do not have.
    """
    blocks = dict(_blocks(assembly))
    elements = {label: block.elements(name) for label, block in blocks.items() if not block.elements(without)}
    widest = max(elements.values())
    return [_around(blocks, label) / widest for label, count in elements.items() if count == widest > 0]


def _blocks(assembly: str) -> Iterator[tuple[str, _Block]]:
    """Yield the blocks of an assembly with their names."""
    code = [line for line in assembly.splitlines() if re.match(r"\t\w|[.\w]+:", line)]
    name, instructions = "", []
    for number, line in enumerate(code):
        if line.endswith(":"):
            yield name, _Block(instructions, [line[:-1]])
            name, instructions = line[:-1], []
            continue
        instructions.append(line.strip())
        operation, *operands = instructions[-1].split()
        if operation.startswith(("j", "ret")):
            after = f"after {number}"
            yield name, _Block(instructions, [*operands[-1:], *[after] * (operation not in ("jmp", "retq", "ret"))])
            name, instructions = after, []


def _around(blocks: Mapping[str, _Block], label: str) -> float:
    """Return the fewest instructions from the beginning of a block until it begins again, infinity if it never does."""
    queue, seen = [(0, label)], set()
    while queue:
        count, name = heapq.heappop(queue)
        if name == label and count:
            return count
        if name in seen or name not in blocks:
            continue
        seen.update({name} - {label})
        count += len(blocks[name].instructions)
        for following in blocks[name].following:
            heapq.heappush(queue, (count, following))
    return float("inf")
