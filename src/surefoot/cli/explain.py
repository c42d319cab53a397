"""The command `surefoot explain`: what an algorithm computes, its kernel and traffic, and who would run it."""

import ast
import difflib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from surefoot import Optimizer

DTYPES = ("float32", "float64", "bfloat16", "float16")


def explain(
    name: Annotated[str, typer.Argument(help="An optimizer of surefoot, NAdam for instance.")],
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", help="A hyperparameter, as in amsgrad=True; may be repeated.")
    ] = None,
    dtype: Annotated[str, typer.Option(help=f"Dtype of the parameters: {', '.join(DTYPES)}.")] = "float32",
    model: Annotated[
        str | None, typer.Option(help="FILE.py:FUNCTION that returns a model, to tell which engine it would get.")
    ] = None,
    source: Annotated[bool, typer.Option(help="Show the generated source.")] = True,
    gpu: Annotated[bool, typer.Option("--gpu", help="Show the source for a GPU rather than for the CPU.")] = False,
) -> None:
    """Show an algorithm's operations, its generated kernel, the bytes it moves, and which engine would run it."""
    import torch  # noqa: PLC0415 (only when the command runs)
    from rich.console import Console  # noqa: PLC0415

    if dtype not in DTYPES:
        raise typer.BadParameter(f"must be one of {', '.join(DTYPES)}, but is {dtype!r}", param_hint="--dtype")
    options = dict(parse_option(text) for text in option or ())
    if model is None:
        params = [torch.nn.Parameter(torch.zeros(4, 4, dtype=getattr(torch, dtype)))]
    else:
        params = [param for param in _build(model).parameters() if param.requires_grad]
    try:
        optimizer = algorithm(name)(params, **options)
        console = Console(highlight=False)
        if not optimizer.is_rule():
            console.print(f"{type(optimizer).__name__} is not elementwise: torch's operators run its custom step.")
            return
        _show(console, optimizer, params[0].dtype, source=source, gpu=gpu)
    except (TypeError, ValueError, RuntimeError) as error:
        raise typer.BadParameter(str(error)) from error


def _show(console: "Console", optimizer: "Optimizer", dtype: Any, *, source: bool, gpu: bool) -> None:
    from rich.syntax import Syntax  # noqa: PLC0415

    from surefoot import explain as facts  # noqa: PLC0415

    group = optimizer.param_groups[0]
    rule = facts.rule_of(optimizer, group)
    layout = facts.layout_of(rule, dtype, group.get("state_dtype"))
    flags = ", ".join(name for name, value in rule.flags if value) or "none"
    console.print(f"[bold]{rule.name}[/bold]   flags that are on: {flags}")
    console.print(f"traffic: {facts.traffic(layout)}\n")
    console.print("[bold]operations[/bold]")
    console.print("\n".join(f"  {line}" for line in facts.operations(rule.graph)), markup=False, soft_wrap=True)
    if source:
        console.print(f"\n[bold]generated source ({'GPU' if gpu else 'CPU'})[/bold]")
        console.print(
            Syntax(facts.source(optimizer, dtype, gpu=gpu), "python", word_wrap=True, background_color="default")
        )
    console.print("\n[bold]engine[/bold]")
    for choice in facts.choices(optimizer):
        console.print(
            f"  {choice.parameters} parameters ({choice.elements:,} elements) of {choice.kind}: {choice.engine}",
            markup=False,
        )
        for refusal in choice.refusals:
            console.print(f"    not {refusal}", soft_wrap=True, markup=False)


def algorithm(name: str) -> "Callable[..., Optimizer]":
    """Return the optimizer of a name, in whatever case."""
    from surefoot import optimizers  # noqa: PLC0415

    names: dict[str, str] = {known.lower(): known for known in optimizers.__all__}
    if name.lower() not in names:
        near = difflib.get_close_matches(name.lower(), names, n=1)
        hint = f"; did you mean {names[near[0]]}?" if near else ""
        raise typer.BadParameter(f"there is no optimizer {name!r}{hint} There are {', '.join(names.values())}.")
    found: Callable[..., Optimizer] = getattr(optimizers, names[name.lower()])
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


def _build(place: str) -> Any:
    """Call the function that makes the user's model."""
    file, colon, function = place.rpartition(":")
    path = Path(file)
    if not colon or not path.is_file():
        raise typer.BadParameter(f"must be FILE.py:FUNCTION of a file, but is {place!r}", param_hint="--model")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise typer.BadParameter(f"{file} is not a Python file", param_hint="--model")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, function):
        raise typer.BadParameter(f"{file} has no {function!r}", param_hint="--model")
    return getattr(module, function)()
