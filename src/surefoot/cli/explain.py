"""The command `surefoot explain`: what an algorithm computes, its kernel and traffic, and who would run it."""

import ast
import difflib
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surefoot.cli._storage import DTYPES, MasterWeightBits, Rounding, StateDtype, dtype_of, storage_options
from surefoot.cli._target import build

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import Console
    from torch import Tensor

    from surefoot import Optimizer


def explain(
    name: Annotated[str, typer.Argument(help="An optimizer of surefoot, NAdam for instance.")],
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", help="A hyperparameter, as in amsgrad=True; may be repeated.")
    ] = None,
    dtype: Annotated[str, typer.Option(help=f"Dtype of the parameters: {', '.join(DTYPES)}.")] = "float32",
    model: Annotated[
        str | None,
        typer.Option(
            help="FILE.py:FUNCTION that returns a model, to tell which engine it would get; with Muon, which of its "
            "parameters `surefoot.muon_with` would step by what."
        ),
    ] = None,
    state_dtype: StateDtype = None,
    rounding: Rounding = None,
    master_weight_bits: MasterWeightBits = None,
    source: Annotated[bool, typer.Option(help="Show the generated source.")] = True,
    gpu: Annotated[bool, typer.Option("--gpu", help="Show the source for a GPU rather than for the CPU.")] = False,
) -> None:
    """Show an algorithm's operations, its generated kernel, the bytes it moves, and which engine would run it."""
    import torch  # noqa: PLC0415 (only when the command runs)
    from rich.console import Console  # noqa: PLC0415

    from surefoot.combined import muon_with  # noqa: PLC0415

    options = dict(parse_option(text) for text in option or ())
    options |= storage_options(state_dtype, rounding, master_weight_bits)
    kind, console = algorithm(name), Console(highlight=False)
    if model is None:
        params = [torch.nn.Parameter(torch.zeros(128, 128, dtype=dtype_of(dtype, "--dtype")))]
    else:
        built = build(model, "--model")
        params = [param for param in built.parameters() if param.requires_grad]
    try:
        if model is not None and kind.__name__ == "Muon":
            console.print(muon_with(built, **options).table(), markup=False, soft_wrap=True)
            return
        optimizer = kind(params, **options)
        if not optimizer.is_rule():
            console.print(f"{type(optimizer).__name__} is not elementwise: torch's operators run its custom step.")
            return
        _show(console, optimizer, max(params, key=torch.numel), source=source, gpu=gpu)
    except (TypeError, ValueError, RuntimeError) as error:
        raise typer.BadParameter(str(error)) from error


def _show(console: "Console", optimizer: "Optimizer", param: "Tensor", *, source: bool, gpu: bool) -> None:
    from surefoot import explain as facts  # noqa: PLC0415

    group = optimizer.param_groups[0]
    rule = facts.rule_of(optimizer, group, param)
    kept = [f"{name} {one.name}" for name, one in facts.formats_of(optimizer, group, param).items()]
    kept += [f"{slot.name} one number" for slot in rule.number_slots]
    kept += [f"{scalar.name} shared, in the groups" for scalar in rule.group_scalars]
    printed = facts.sources(optimizer, param, gpu=gpu) if source else []
    flags = ", ".join(name for name, value in rule.flags if value) or "none"
    console.print(f"[bold]{rule.name}[/bold]   flags that are on: {flags}")
    console.print(f"kept as: {'; '.join(kept)}")
    console.print(f"traffic: {facts.traffic_of(optimizer, group, param)}")
    names = [f" of stage {number}, which measures" for number in range(1, len(rule.stages) + 1)]
    for name, stage in zip(names, rule.stages, strict=True):
        _show_lines(console, f"operations{name}", facts.measured_operations(stage))
    _show_lines(console, "operations" + " of the update" * bool(names), facts.operations(rule.graph))
    titles = [name for name, stage in zip(names, rule.stages, strict=True) if stage.measures.reductions]
    for name, text in zip((*titles, ""), printed, strict=False):
        _show_source(console, f"generated source{name} ({'GPU' if gpu else 'CPU'})", text)
    console.print("\n[bold]engine[/bold]")
    for choice in facts.choices(optimizer):
        console.print(
            f"  {choice.parameters} parameters ({choice.elements:,} elements) of {choice.kind}: {choice.engine}",
            markup=False,
        )
        for refusal in choice.refusals:
            console.print(f"    not {refusal}", soft_wrap=True, markup=False)


def _show_lines(console: "Console", title: str, lines: "Iterable[str]") -> None:
    console.print(f"\n[bold]{title}[/bold]")
    console.print("\n".join(f"  {line}" for line in lines), markup=False, soft_wrap=True)


def _show_source(console: "Console", title: str, text: str) -> None:
    from rich.syntax import Syntax  # noqa: PLC0415

    console.print(f"\n[bold]{title}[/bold]")
    # A line that is longer than the terminal is wide stays a line, for whoever copies it.
    console.print(Syntax("", "python", background_color="default").highlight(text), soft_wrap=True)


def algorithm(name: str) -> "type[Optimizer]":
    """Return the optimizer of a name, in whatever case."""
    from surefoot import optimizers  # noqa: PLC0415

    names: dict[str, str] = {known.lower(): known for known in optimizers.__all__}
    if name.lower() not in names:
        near = difflib.get_close_matches(name.lower(), names, n=1)
        hint = f"; did you mean {names[near[0]]}?" if near else ""
        raise typer.BadParameter(f"there is no optimizer {name!r}{hint} There are {', '.join(names.values())}.")
    found: type[Optimizer] = getattr(optimizers, names[name.lower()])
    return found


def parse_option(text: str) -> tuple[str, Any]:
    """Split `key=value`; the value is a Python literal."""
    key, equals, value = text.partition("=")
    try:
        return key, ast.literal_eval(value) if equals else _missing(text)
    except (ValueError, SyntaxError):
        raise typer.BadParameter(
            f"must be name=value with a Python literal as value, but is {text!r}", param_hint="--option"
        ) from None


def _missing(text: str) -> Any:
    raise ValueError(text)
