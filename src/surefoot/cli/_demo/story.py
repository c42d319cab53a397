"""The demo from its first line to its picture, with options that are already checked."""

from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

from surefoot.cli._demo import report
from surefoot.cli._demo.errors import DemoError
from surefoot.cli._demo.model import continue_text
from surefoot.cli._demo.progress import progress
from surefoot.cli._demo.text import Corpus, help_topics
from surefoot.cli._demo.training import Comparison, TrainingSetup, compare
from surefoot.codegen import store

PROMPT = "The "
SAMPLE_LENGTH = 400

Save = Callable[[Comparison, Path], None]


def _picture_saver(console: Console) -> Save | None:
    """Return the function that draws and saves, or say before the training why there will be no picture."""
    try:
        from surefoot.cli._demo.picture import save_picture  # noqa: PLC0415 - matplotlib is an extra
    except ImportError as error:
        if (error.name or "").split(".")[0] != "matplotlib":
            raise
        console.print(
            "There will be no picture: matplotlib is missing. Install it with: pip install 'surefoot[plot]'",
            style="yellow",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        return None
    return save_picture


def _save(save: Save, comparison: Comparison, out: Path) -> None:
    try:
        save(comparison, out)
    except OSError as error:
        raise DemoError(f"--out: '{out}' could not be written ({error}); name a file elsewhere") from error


def _write_sample(console: Console, comparison: Comparison, corpus: Corpus) -> None:
    written = continue_text(comparison.model, corpus.encode(PROMPT), SAMPLE_LENGTH, comparison.setup.seed)
    report.print_sample(console, PROMPT, corpus.decode(written), comparison.setup.labels[-1])


def _kernels() -> set[str]:
    """Return the names of the kernels on disk."""
    try:
        return {entry.name for entry in store.entries() if entry.name.endswith(".o")}
    except OSError:
        return set()


def tell(setup: TrainingSetup, out: Path, console: Console) -> Comparison:
    """Train, report, let the model write, and draw.

    Args:
        setup: what to train.
        out: where the picture goes; known to be writable.
        console: where the rest goes.

    Returns:
        What was reported.

    Raises:
        DemoError: if it cannot go on; the text says why and what to do.
    """
    save = _picture_saver(console)
    corpus = Corpus.of(help_topics())
    report.introduce(console, setup, len(corpus.train), torch.get_num_threads())
    before = _kernels()
    with progress(console, setup) as watch:
        comparison = compare(setup, corpus, watch)
    report.print_table(console, comparison)
    first_step = comparison.outcomes[-1].clock.optimizer_ms[0]
    report.tell_of_kernels(console, first_step, len(_kernels() - before))
    _write_sample(console, comparison, corpus)
    if save is not None:
        _save(save, comparison, out)
        console.print(f"\nPicture: {out}", markup=False, highlight=False, soft_wrap=True)
    return comparison
