"""A page about a run: read once, condensed so that its size is bounded, judged in words, drawn by the browser."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from surefoot.files import write_whole
from surefoot.telemetry.reading import read
from surefoot.telemetry.report.condense import Curves, Heat
from surefoot.telemetry.report.findings import Finding, Findings
from surefoot.telemetry.report.page import render_page

__all__ = ["Finding", "write_report"]


def write_report(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    watch: Callable[[int, int], object] = lambda *_: None,
) -> list[Finding]:
    """Write one self-contained HTML page about a file that `JsonLines` has written, as a whole or not at all.

    A run that went back to an earlier step, from a checkpoint, counts as it went on; what it had done after that
    checkpoint before is left out.

    Args:
        source: the file of JSON Lines.
        out: the page.
        watch: called with the bytes read so far and the file's size, now and then.

    Returns:
        What the page says in words.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: `source` is not a file of telemetry, or has no step.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # what numbers a file holds is not ours to choose
        words, page = _condensed(source, watch)
    # A name may hold what UTF-8 cannot, half of a pair of surrogates; a browser shows it as a question mark.
    write_whole(out, page.encode(errors="xmlcharrefreplace"))
    return words


def _condensed(source: str | os.PathLike[str], watch: Callable[[int, int], object]) -> tuple[list[Finding], str]:
    curves, heat, findings = Curves(), Heat(), Findings()
    for line in read(source, watch):
        for part in (findings, curves, heat):
            part.add(line)
    if not curves.steps:
        raise ValueError(f"{source} has no step yet: it was written by a run that ended before its first flush")
    words = findings.words(curves)
    return words, render_page(Path(source).name, words, curves, heat)
