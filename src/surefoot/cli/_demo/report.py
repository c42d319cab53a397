"""What the demo prints before and after the trainings: what they are, and what came out."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from surefoot.cli._demo.training import Comparison, TrainingSetup


class ComparisonLine(NamedTuple):
    """A line of the table: a quantity, its value for torch and for surefoot, and what the two come to."""

    name: str
    torch: str
    surefoot: str
    verdict: str


def introduce(console: Console, setup: TrainingSetup, characters: int, threads: int) -> None:
    """Say what will be trained on what, and how."""
    recipe = setup.recipe
    console.print(Text(" against ".join(setup.labels), style="bold"))
    console.print(
        f"One small transformer learns {characters:,} characters of Python's help texts twice,\n"
        "from the same weights and with the same batches, a step of each in turn.\n"
        f"{setup.steps} steps of {recipe.batch} x {setup.shape.context} characters, lr {setup.lr:g}, "
        f"seed {setup.seed}, {threads} thread{'s' if threads > 1 else ''}.",
        highlight=False,
    )
    if setup.reference is not None:
        console.print(
            f"torch.optim has no {setup.optimizer}: its {setup.reference}, lr {setup.choice(setup.libraries[0])[2]:g}, "
            "learns beside it for reference.",
            highlight=False,
            soft_wrap=True,
        )
    if recipe.note:
        console.print(recipe.note, highlight=False)
    if setup.storage or setup.dtype is not torch.float32:
        options = ", ".join(f"{name}={value!r}" for name, value in setup.storage.items())
        text = f"Both keep weights in {setup.dtype}" + f"; surefoot's optimizers have {options}" * bool(options)
        console.print(f"{text}.", highlight=False, soft_wrap=True)
    console.print()


def _loss_row(name: str, one: float, other: float) -> ComparisonLine:
    return ComparisonLine(name, f"{one:.4f}", f"{other:.4f}", "equal" if one == other else f"{other - one:+.1e}")


def _time_row(name: str, one: float, other: float) -> ComparisonLine:
    return ComparisonLine(name, f"{one:.2f} ms", f"{other:.2f} ms", f"{one / other:.2f}x as fast")


def comparison_lines(comparison: Comparison) -> Iterator[ComparisonLine]:
    """Return the lines of the table that compares both trainings."""
    one, other = comparison.outcomes
    a, b = one.clock, other.clock
    yield _loss_row("loss, training text", one.train_loss, other.train_loss)
    yield _loss_row("loss, held-out text", one.held_out_loss, other.held_out_loss)
    for name, ours in zip(a.optimizers, b.optimizers, strict=True):
        yield _time_row(f"{name}.step()" if name == ours else "step()", a.median_ms(name), b.median_ms(ours))
    yield ComparisonLine("share of a training step", f"{a.share:.1%}", f"{b.share:.1%}", "")
    yield _time_row("a whole training step", a.whole_ms, b.whole_ms)
    yield ComparisonLine("very first step()", f"{a.optimizer_ms[0]:.1f} ms", f"{b.optimizer_ms[0]:.1f} ms", "")
    if comparison.setup.reference is None:
        yield ComparisonLine("parameters differ by", "", "", f"{comparison.last_gap.largest:.2g}")


def print_table(console: Console, comparison: Comparison) -> None:
    """Print the table, and below it how far apart the two models are."""
    setup = comparison.setup
    table = Table(*(("", *setup.labels) if setup.reference else (setup.optimizer, *setup.libraries)), "surefoot is")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in comparison_lines(comparison):
        table.add_row(*row)
    console.print(table)
    console.print(
        "Losses: nats per character, over the same sequences. Times: medians over all steps. "
        "A training step is forward, backward and the optimizer.",
        style="dim",
    )
    console.print(verdict(comparison), highlight=False)


def verdict(comparison: Comparison) -> str:
    """Say how far the parameters of the two models are apart, where both should have come to the same."""
    if (reference := comparison.setup.reference) is not None:
        return (
            f"{reference} and {comparison.setup.optimizer} are different algorithms: the losses compare them on this "
            "model, with these learning rates."
        )
    steps, first, last = comparison.setup.steps, comparison.first_gap, comparison.last_gap
    if last.same_bits:
        return f"Same bits: after {steps} steps no parameter of the two models differs."
    return (
        f"Some bits differ: parameters by up to {first.largest:.1e} after the first step, {last.largest:.1e} after "
        f"all {steps}. Training amplifies differences in rounding: it is the losses that have to agree."
    )


def print_sample(console: Console, prompt: str, continuation: str, label: str) -> None:
    """Print text that a model wrote, set apart from the prompt that it was given."""
    console.print(f"\nWritten by the model that {label} trained, after the prompt {prompt!r}:", style="bold")
    console.print(Text.assemble((prompt, "bold green"), continuation))
