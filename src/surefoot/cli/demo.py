"""The command `surefoot demo`: one small model, trained by torch's optimizer and by ours, side by side.

This file reads the options and tells the story; the parts are in `_demo`.
"""

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from surefoot.cli._demo.errors import DemoError
from surefoot.cli._demo.output import check_writable
from surefoot.cli._demo.recipes import RECIPES, resolve
from surefoot.cli._storage import DTYPES, MasterWeightBits, Rounding, StateDtype, dtype_of, storage_options

INTERRUPTED = 130
MOST_THREADS = 1024
MOST_SEED = 2**63 - 1


def _optimizer(name: str) -> str:
    try:
        return resolve(name)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _steps(steps: int | None) -> int | None:
    if steps is not None and steps < 1:
        raise typer.BadParameter(f"{steps} steps cannot be trained: give 1 or more, or leave it out.")
    return steps


def _lr(lr: float | None) -> float | None:
    if lr is not None and not (math.isfinite(lr) and lr > 0):
        raise typer.BadParameter(f"{lr} is not a learning rate: give a positive number, or leave it out.")
    return lr


def _seed(seed: int) -> int:
    if not 0 <= seed <= MOST_SEED:
        raise typer.BadParameter(f"{seed} is not a seed: give a whole number from 0 to {MOST_SEED}.")
    return seed


def _threads(threads: int | None) -> int | None:
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise typer.BadParameter(f"{threads} threads cannot be used: give 1 to {MOST_THREADS}, or leave it out.")
    return threads


def _out(path: Path) -> Path:
    try:
        return check_writable(path)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def demo(
    optimizer: Annotated[
        str,
        typer.Option(callback=_optimizer, metavar="NAME", help=f"One of {', '.join(sorted(RECIPES))}."),
    ] = "AdamW",
    steps: Annotated[
        int | None,
        typer.Option(
            callback=_steps, metavar="N", help="Training steps.", show_default="as many as take about a minute"
        ),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            callback=_lr,
            metavar="X",
            help="Learning rate of that optimizer.",
            show_default="one that suits the optimizer",
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(callback=_seed, metavar="N", help="Seed of the weights, the batches and the sample."),
    ] = 0,
    out: Annotated[
        Path, typer.Option(callback=_out, readable=False, metavar="PATH", help="The picture: .png, .svg or .pdf.")
    ] = Path("demo.png"),
    threads: Annotated[
        int | None,
        typer.Option(
            callback=_threads,
            metavar="N",
            help="Threads that torch may use.",
            show_default="torch's own choice",
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(metavar="NAME", help=f"Dtype of the models' weights: {', '.join(DTYPES)}.")
    ] = "float32",
    state_dtype: StateDtype = None,
    rounding: Rounding = None,
    master_weight_bits: MasterWeightBits = None,
) -> None:
    """Train a small model with torch.optim and with surefoot, and compare.

    All trainings start from the same weights and see the same batches of real
    English text. torch.optim takes part twice where it has two implementations of
    the optimizer, a loop and fused=True for instance, since they round differently
    too. Printed are losses, how far the models are apart and the time of the
    optimizers' steps; then the model that surefoot trained writes some text, and a
    picture is drawn. It takes about a minute on two cores.
    How state and 16-bit weights are kept is an option of surefoot's side only.
    What torch.optim does not have, such as Lion, learns beside torch's AdamW.
    """
    kept = storage_options(state_dtype, rounding, master_weight_bits)
    try:
        _run(optimizer, steps, lr, seed, out, threads, dtype=dtype_of(dtype, "--dtype"), storage=kept)
    except DemoError as error:
        typer.echo(f"surefoot demo: {error}.", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("surefoot demo: interrupted.", err=True)
        raise typer.Exit(INTERRUPTED) from None


def _run(
    optimizer: str, steps: int | None, lr: float | None, seed: int, out: Path, threads: int | None, **kept: Any
) -> None:
    # torch takes two seconds to import, for which `--help` and a misspelt option need not wait.
    import torch  # noqa: PLC0415
    from rich.console import Console  # noqa: PLC0415

    from surefoot.cli._demo.story import tell  # noqa: PLC0415
    from surefoot.cli._demo.training import TrainingSetup  # noqa: PLC0415

    if threads is not None:
        torch.set_num_threads(threads)
    recipe = RECIPES[optimizer]
    tell(TrainingSetup(optimizer, steps or recipe.steps, lr or recipe.lr, seed, **kept), out, Console())
