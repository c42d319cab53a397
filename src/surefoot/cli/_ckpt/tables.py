"""Checkpoints as tables that people read."""

import os
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from surefoot.checkpoint import Checkpoint
from surefoot.checkpoint.diff import Difference
from surefoot.checkpoint.header import Place
from surefoot.checkpoint.inspection import ParameterInfo, groups_of, parameters_of, places_of, total
from surefoot.state.formats import CORRECTION
from surefoot.terminal import printable

_PREFIXES = ("B", "kB", "MB", "GB", "TB")
_THOUSAND = 1000
_WIDE = 160
_FEW = 40
"""Rows of a long table that are shown unless all are asked for: the first and the last."""


def size(nbytes: float) -> str:
    """Write a number of bytes with three digits."""
    for unit in _PREFIXES:
        if nbytes < _THOUSAND or unit == _PREFIXES[-1]:
            break
        nbytes /= _THOUSAND
    return f"{nbytes:.3g} {unit}"


def number(value: Any) -> str:
    """Write a hyperparameter or norm shortly."""
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)


def table(*columns: str, right: Iterable[str] = (), title: str | None = None) -> Table:
    """Make an empty table; the columns named in `right` are flushed right."""
    shown = None if title is None else _text(title)
    found = Table(box=None, header_style="bold", title=shown, title_style="bold", title_justify="left", pad_edge=False)
    for column in columns:
        found.add_column(_text(column), justify="right" if column in right else "left", overflow="fold")
    return found


def overview(checkpoint: Checkpoint) -> RenderableType:
    """Show what a checkpoint is, and its parts."""
    manifest = checkpoint.manifest
    versions = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
    step = "" if manifest["step"] is None else f"step {manifest['step']}, "
    parts = table("part", "class", "tensors", "elements", "size", "non-finite", right=("tensors", "elements", "size"))
    for label, part in manifest["parts"].items():
        found = total(places_of(checkpoint, part).values())
        row: list[RenderableType] = [
            f"{found.tensors}",
            f"{found.elements:,}",
            size(found.nbytes),
            _bad(found.nonfinite),
        ]
        parts.add_row(_text(label), _text(part.get("class")), *row)
    head = f"{step}{size(checkpoint.nbytes)}, saved {manifest['saved_at']}, format {manifest['format']}"
    path = Text(printable(str(checkpoint.path)), style="bold")
    return Group(path, _text(head), Text(printable(versions), style="dim"), "", parts)


def _text(value: str | None) -> Text:
    """Return what a file says, of which neither rich nor the terminal takes a part for a command."""
    return Text(printable(value or ""))


def _bad(count: int) -> Text:
    return Text(f"{count:,}", style="bold red") if count else Text("0", style="dim")


def groups(checkpoint: Checkpoint, label: str) -> Table:
    """Show the param groups of an optimizer; options that are None or false in all of them are left out."""
    found = groups_of(checkpoint, label)
    names = list(dict.fromkeys(name for group in found for name in group if name != "params"))
    names = [name for name in names if any(group.get(name) not in (None, False) for group in found)]
    title = f"{label}: {checkpoint.manifest['parts'][label]['class'] or 'optimizer'}"
    result = table("group", "parameters", *names, right=("parameters",), title=title)
    for index, group in enumerate(found):
        result.add_row(str(index), str(len(group["params"])), *(_text(_option(group.get(name))) for name in names))
    return result


def _option(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(number, value))
    return number(value)


def parameters(checkpoint: Checkpoint, label: str, *, everything: bool) -> Table:
    """Show parameters and buffers with norms, and the norms of their state."""
    found = parameters_of(checkpoint, label)
    held = dict.fromkeys(slot for one in found for slot in one.state)
    parts = {CORRECTION, *(f"{slot}_scale" for slot in held)}  # counted in what they belong to
    slots = [slot for slot in held if slot not in parts]
    result = table("parameter", "shape", "dtype", "norm", *slots, right=("norm", *slots), title=f"{label}: norms")
    few = not everything and len(found) > _FEW
    for one in found[: _FEW // 2] if few else found:
        result.add_row(*_row(one, slots))
    if few:
        result.add_row(_more(len(found)))
        for one in found[-(_FEW // 2) :]:
            result.add_row(*_row(one, slots))
    return result


def _row(one: ParameterInfo, slots: Iterable[str]) -> list[RenderableType]:
    shape = "" if one.shape is None else " x ".join(map(str, one.shape)) or "-"
    norm = Text(printable(f"= {one.tied_to}"), style="dim") if one.tied_to else _norm(one.values)
    return [_text(one.name), shape, _text(one.dtype), norm, *(_norm(one.state.get(slot)) for slot in slots)]


def _norm(value: Any) -> Text:
    """Show a tensor's norm, and how many of its elements are not finite; other state as it is."""
    if isinstance(value, Place):
        bad = value.summary.nonfinite
        note = (f"  {bad:,} not finite", "bold red") if bad else ""
        return Text.assemble(number(value.summary.norm), note)
    if isinstance(value, list):
        return Text(f"{len(value)} items")
    return _text("" if value is None else number(value))


def differences(found: Sequence[Difference], left: str, right: str, *, everything: bool) -> Table:
    """Show how two checkpoints differ."""
    result = table("what", left, right, "largest", "relative", right=("largest", "relative"))
    for one in found if everything else found[:_FEW]:
        distances = ("" if value is None else number(value) for value in (one.largest, one.relative))
        if one.elements is None:
            result.add_row(_text(one.name), _side(one.left), _side(one.right), *distances)
        else:
            result.add_row(_text(one.name), f"{one.left} differ", "", *distances)

    if not everything and len(found) > _FEW:
        result.add_row(_more(len(found)))
    return result


def _more(count: int) -> Text:
    return Text(f"... {count - _FEW} more, shown by --all", style="dim")


def _side(text: str | None) -> Text:
    return Text("not there", style="dim") if text is None else _text(text)


def show(*parts: RenderableType) -> None:
    """Print renderables with empty lines between them; wide, where no terminal and no user says how wide."""
    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _WIDE
    for index, part in enumerate(parts):
        if index:
            console.print()
        console.print(part)
