"""What the demo prints before and after the trainings: what they are, and what came out."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from surefoot.cli._demo.training import Comparison, Gap, TrainingSetup
from surefoot.codegen import store


class ComparisonLine(NamedTuple):
    """A line of the table: a quantity, and its value for each contender."""

    name: str
    values: tuple[str, ...]


TIMES = ("once", "twice", "three times")


def introduce(console: Console, setup: TrainingSetup, characters: int, threads: int) -> None:
    """Say what will be trained on what, and how."""
    recipe = setup.recipe
    first, *others, ours = setup.labels
    console.print(Text(f"{first} against {ours}", style="bold"))
    console.print(
        f"One small transformer learns {characters:,} characters of Python's help texts\n"
        f"{TIMES[len(others) + 1]}, from the same weights and the same batches, a step of each in turn.\n"
        f"{setup.steps} steps of {recipe.batch} x {setup.shape.context} characters, lr {setup.lr:g}, "
        f"seed {setup.seed}, {threads} thread{'s' if threads > 1 else ''}.",
        highlight=False,
    )
    for line in _about_torch(setup):
        console.print(line, highlight=False)
    if recipe.note:
        console.print(recipe.note, highlight=False)
    if setup.storage or setup.dtype is not torch.float32:
        options = ", ".join(f"{name}={value!r}" for name, value in setup.storage.items())
        text = f"All keep weights in {setup.dtype}" + f"; surefoot's optimizers have {options}" * bool(options)
        console.print(f"{text}.", highlight=False, soft_wrap=True)
    console.print()


def _about_torch(setup: TrainingSetup) -> Iterator[str]:
    """Say which of torch's implementations take part."""
    library, *_ = setup.libraries
    _, *others, _ = setup.contenders
    if setup.reference is not None:
        lr = setup.choice(library)[2]
        yield f"{library} has no {setup.optimizer}: its {setup.reference}, lr {lr:g}, learns beside it for reference."
    elif others:
        yield f"{library} takes part by its default and by {others[0].engine}=True: how far its own two"
        yield "end from each other is the measure of how far ours ends from them."
    else:
        yield f"{library} has one implementation of {setup.optimizer}."


def comparison_lines(comparison: Comparison) -> Iterator[ComparisonLine]:
    """Return the lines of the table that compares the trainings."""
    outcomes = comparison.outcomes
    clocks = [outcome.clock for outcome in outcomes]
    yield ComparisonLine("loss, training text", tuple(f"{outcome.train_loss:.4f}" for outcome in outcomes))
    yield ComparisonLine("loss, held-out text", tuple(f"{outcome.held_out_loss:.4f}" for outcome in outcomes))
    if comparison.setup.reference is None:
        yield _gap_line("parameters differ, first step", comparison.gaps(1))
        yield _gap_line("parameters differ, in the end", comparison.gaps(comparison.setup.steps))
    for names in zip(*(clock.optimizers for clock in clocks), strict=True):
        title = f"{names[0]}.step()" if len(set(names)) == 1 else "step()"
        yield from _time_lines(title, [clock.median_ms(name) for clock, name in zip(clocks, names, strict=True)])
    yield from _time_lines("a whole training step", [clock.whole_ms for clock in clocks])
    yield ComparisonLine("of which step() is", tuple(f"{clock.share:.1%}" for clock in clocks))
    yield ComparisonLine("very first step()", tuple(f"{clock.optimizer_ms[0]:.1f} ms" for clock in clocks))


def _gap_line(name: str, gaps: Sequence[Gap]) -> ComparisonLine:
    """Make a line of how far models are from the first one's."""
    return ComparisonLine(name, ("", *("same bits" if gap.same_bits else f"{gap.largest:.1e}" for gap in gaps)))


def _time_lines(name: str, milliseconds: Sequence[float]) -> Iterator[ComparisonLine]:
    first, *others = milliseconds
    yield ComparisonLine(name, tuple(f"{each:.2f} ms" for each in milliseconds))
    yield ComparisonLine("", ("", *(f"{first / other:.2f}x as fast" for other in others)))


def print_table(console: Console, comparison: Comparison) -> None:
    """Print the table, and below it how far apart the models are."""
    setup = comparison.setup
    titles = setup.labels if setup.reference else [contender.label() for contender in setup.contenders]
    table = Table("" if setup.reference else setup.optimizer, *(title.replace(", ", ",\n") for title in titles))
    for column in table.columns[1:]:
        column.justify = "right"
    for line in comparison_lines(comparison):
        table.add_row(line.name, *line.values)
    console.print(table)
    console.print(
        "Losses: nats per character, over the same sequences. Times: medians over all steps. "
        "A training step is forward, backward and the optimizer.",
        style="dim",
    )
    console.print(verdict(comparison), highlight=False)


def verdict(comparison: Comparison) -> str:
    """Say what the distance between the models means, where all should have come to the same."""
    setup = comparison.setup
    if setup.reference is not None:
        return (
            f"{setup.reference} and {setup.optimizer} are different algorithms: the losses compare them on this "
            "model, with these learning rates."
        )
    if comparison.gaps(setup.steps)[-1].same_bits:
        return f"Same bits: after {setup.steps} steps no parameter of torch's model and of ours differs."
    return (
        f"{_measure_of_gap(comparison)} Training amplifies differences in rounding: "
        "it is the losses that have to agree."
    )


def _measure_of_gap(comparison: Comparison) -> str:
    """Say how far our model ended from torch's, beside what lies between torch's own two if there are two."""
    *of_torch, ours = comparison.gaps(comparison.setup.steps)
    apart = f"parameters of surefoot's model ended up to {ours.largest:.1e} from those of torch's"
    if not of_torch:
        return f"The {apart}."
    _, second, _ = comparison.setup.contenders
    if of_torch[0].same_bits:
        return f"The {apart}; torch's two implementations round alike here."
    return f"The {apart}, torch's own {second.engine}=True up to {of_torch[0].largest:.1e}."


def tell_of_kernels(console: Console, milliseconds: float, compiled: int) -> None:
    """Say what the very first step cost, and why no later one costs that.

    Args:
        console: where to print.
        milliseconds: what the very first step took.
        compiled: how many kernels were compiled for the training.
    """
    if (reason := store.unusable_reason()) is not None:
        text = f"Kernels are compiled anew in every run, since they cannot be kept: {reason}."
    elif compiled:
        text = (
            f"The very first step() took {milliseconds:.0f} ms, since it compiled its kernels ({compiled}). This "
            f"machine pays that once: they are kept in {store.cache_dir()} and serve every later training "
            "with these options, whatever its model."
        )
    else:
        text = f"No kernel had to be compiled: those that earlier runs have needed are kept in {store.cache_dir()}."
    console.print(text, highlight=False, markup=False)


def print_sample(console: Console, prompt: str, continuation: str, label: str) -> None:
    """Print text that a model wrote, set apart from the prompt that it was given."""
    console.print(f"\nWritten by the model that {label} trained, after the prompt {prompt!r}:", style="bold")
    console.print(Text.assemble((prompt, "bold green"), continuation))
