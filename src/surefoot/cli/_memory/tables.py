"""What training takes of memory, as tables that people read."""

from collections.abc import Mapping, Sequence

from rich.table import Table
from rich.text import Text

from surefoot.cli._ckpt.tables import size, table
from surefoot.memory import KINDS, Memory
from surefoot.terminal import printable

_MOST_PARAMETERS = 20
"""Rows of the table of parameters unless all are asked for."""


def heading(text: str) -> Text:
    """Return a line above tables."""
    return Text(printable(text), style="bold")


def one_choice(memory: Memory) -> Table:
    """Show what one choice takes, for each element and in all."""
    result = table("", "kept as", "bytes each", "in all", right=("bytes each", "in all"))
    for item in memory.items:
        result.add_row(item.name, item.kept, _each(item.nbytes, memory.elements), size(item.nbytes))
    result.add_row("together", "", _each(memory.nbytes, memory.elements), size(memory.nbytes), style="bold")
    return result


def choices(found: Mapping[str, Memory]) -> Table:
    """Show choices side by side."""
    kinds = [kind for kind in KINDS if any(kind in memory.by_kind() for memory in found.values())]
    columns = (*kinds, "together", "bytes each")
    result = table("choice", *columns, right=columns)
    for choice, memory in found.items():
        taken = memory.by_kind()
        cells = (size(taken[kind]) if kind in taken else "" for kind in kinds)
        result.add_row(choice, *cells, size(memory.nbytes), _each(memory.nbytes, memory.elements))
    return result


def parameters(memory: Memory, *, everything: bool) -> Sequence[Table | str]:
    """Show the parameters that take most, or all of them, the largest first."""
    kinds = list(memory.by_kind())
    right = (*kinds, "together", "bytes each")
    result = table("parameter", "shape", *right, right=right)
    ordered = sorted(memory.parameters, key=lambda one: -one.nbytes)
    shown = ordered if everything else ordered[:_MOST_PARAMETERS]
    for one in shown:
        shape = " x ".join(map(str, one.shape)) or "-"
        cells = (size(nbytes) if (nbytes := one.of_kind(kind)) else "" for kind in kinds)
        result.add_row(printable(one.name), shape, *cells, size(one.nbytes), _each(one.nbytes, one.elements))
    more = len(ordered) - len(shown)
    return [result, *[f"... {more} more, shown by --all"] * bool(more)]


def _each(nbytes: int, elements: int) -> str:
    return f"{nbytes / elements:.2f}" if elements else "-"
