"""The picture of choices side by side: a bar for each, made of what memory is taken for."""

from collections.abc import Mapping
from pathlib import Path

from surefoot.lr_scheduler.plot import load_pyplot, save_figure, style
from surefoot.memory import KINDS, Memory

_COLORS = dict(zip(KINDS, ("#1c4f9c", "#9db9dc", "#f08c00", "#fbd38d", "#2f9e44", "#868e96"), strict=True))
_INK = dict.fromkeys(("gradients", "state", "scales"), "black")
_UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
_LEAST = 0.05
"""Share of the longest bar from which on a part of a bar has its number written into it."""


def draw(title: str, found: Mapping[str, Memory], path: Path) -> None:
    """Draw choices and write the picture, of the type that the name ends in.

    Raises:
        ImportError: matplotlib is missing.
        OSError, ValueError: it could not be written.
    """
    pyplot = load_pyplot()
    most = max(memory.nbytes for memory in found.values())
    unit, size = next((one for one in _UNITS if most >= one[1]), _UNITS[-1])
    figure, axes = pyplot.subplots(figsize=(10, 1.7 + 0.52 * len(found)), layout="constrained")
    ends = [0.0] * len(found)
    for kind in KINDS:
        widths = [memory.by_kind().get(kind, 0) / size for memory in found.values()]
        if any(widths):
            bars = axes.barh(range(len(found)), widths, left=ends, height=0.7, color=_COLORS[kind], label=kind)
            labels = [f"{width:.3g}" if width > _LEAST * most / size else "" for width in widths]
            axes.bar_label(bars, labels, label_type="center", fontsize=8, color=_INK.get(kind, "white"))
            ends = [end + width for end, width in zip(ends, widths, strict=True)]
    for place, memory in enumerate(found.values()):
        text = f"{ends[place]:.3g} {unit}, {memory.nbytes / memory.elements:.3g} bytes a parameter"
        axes.annotate(text, (ends[place], place), xytext=(6, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(found)), list(found))
    axes.invert_yaxis()
    style(axes, unit, "")
    axes.grid(visible=False, axis="y")
    axes.set_xlim(0, 1.42 * most / size)
    figure.suptitle(title, fontweight="bold")
    figure.legend(loc="outside lower center", ncols=len(KINDS), frameon=False)
    pyplot.close(figure)
    save_figure(figure, path)
