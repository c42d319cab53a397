"""How far the trainings are, while they run: bars on a terminal, a few lines in a file or a log."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from time import perf_counter

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from surefoot.cli._demo.training import Training, TrainingSetup, Watch

RECENT_STEPS = 20
REFRESH_SECONDS = 0.2
PLAIN_LINES = 10


def _loss(training: Training) -> str:
    recent = training.losses[-RECENT_STEPS:]
    return f"{sum(recent) / len(recent):.3f}"


def _rate(training: Training) -> str:
    return f"{training.clock.steps_per_second:.1f}"


@contextmanager
def _bars(console: Console, setup: TrainingSetup) -> Iterator[Watch]:
    """Show a bar for each training, redrawn between steps only, when no clock runs."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TextColumn("{task.fields[rate]} steps/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, auto_refresh=False, expand=True) as bars:
        tasks = [bars.add_task(label, total=setup.steps, loss="-", rate="-") for label in setup.labels]
        bars.refresh()
        drawn = perf_counter()

        def watch(trainings: Sequence[Training]) -> None:
            nonlocal drawn
            done = len(trainings[0].losses)
            if perf_counter() - drawn < REFRESH_SECONDS and done < setup.steps:
                return
            for task, training in zip(tasks, trainings, strict=True):
                bars.update(task, completed=done, loss=_loss(training), rate=_rate(training))
            bars.refresh()
            drawn = perf_counter()

        yield watch


@contextmanager
def _lines(console: Console, setup: TrainingSetup) -> Iterator[Watch]:
    """Print a line for each tenth of the training."""
    every = max(1, setup.steps // PLAIN_LINES)

    def watch(trainings: Sequence[Training]) -> None:
        done = len(trainings[0].losses)
        if done % every and done < setup.steps:
            return
        parts = (
            f"{label} loss {_loss(training)}, {_rate(training)} steps/s"
            for label, training in zip(setup.labels, trainings, strict=True)
        )
        console.print(f"step {done}/{setup.steps}: {'; '.join(parts)}", highlight=False, soft_wrap=True)

    yield watch


def progress(console: Console, setup: TrainingSetup) -> AbstractContextManager[Watch]:
    """Show how far the trainings of a setup are.

    Args:
        console: where to show it.
        setup: what is trained.

    Returns:
        A context whose value is to be called with all trainings after every step.
    """
    terminal = console.file.isatty() and not console.is_dumb_terminal
    return (_bars if terminal else _lines)(console, setup)
