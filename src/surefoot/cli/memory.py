"""The command `surefoot memory`: what training takes for a choice of optimizer and formats."""

import json as encoder
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surefoot.cli._storage import DTYPES, MasterWeightBits, Rounding, StateDtype, dtype_of, storage_options
from surefoot.cli._target import build
from surefoot.cli.explain import algorithm, parse_option

if TYPE_CHECKING:
    from torch.nn import Module

    from surefoot import Optimizer
    from surefoot.memory import Memory, Storage, Weights

_SOURCE = "SOURCE"


_Source = Annotated[
    str,
    typer.Argument(
        metavar=_SOURCE,
        help="A known model (gpt2-small, gpt2-xl, llama-7b, llama-65b, resnet50, ...), FILE.py:FUNCTION or "
        "MODULE:FUNCTION that returns a model, or a checkpoint.",
        show_default=False,
    ),
]
_Dtype = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help=f"Dtype of the weights: {', '.join(DTYPES)}.", show_default="as they are, or float32"
    ),
]
_Options = Annotated[
    list[str] | None,
    typer.Option("--option", "-o", help="A hyperparameter of it, as in amsgrad=True; may be repeated."),
]
_Plot = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Also draw it, as .png, .svg or .pdf; needs surefoot[plot].")
]
_Rest = Annotated[
    str, typer.Option(metavar="NAME", help="The optimizer of parameters that it does not take, as Muon no biases.")
]


def memory(
    source: _Source,
    optimizer: Annotated[str, typer.Option(metavar="NAME", help="An optimizer of surefoot.")] = "AdamW",
    rest: _Rest = "AdamW",
    option: _Options = None,
    dtype: _Dtype = None,
    state_dtype: StateDtype = None,
    rounding: Rounding = None,
    master_weight_bits: MasterWeightBits = None,
    ema: Annotated[bool, typer.Option("--ema", help="Also keep an average of the weights, as `ema=` does.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Show the usual formats side by side.")] = False,
    params: Annotated[bool, typer.Option("--params", help="Also show the parameters that take most.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="Also show every parameter.")] = False,
    plot: _Plot = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON rather than tables.")] = False,
) -> None:
    """Show what training takes of memory: weights, gradients, state, scales, corrections, averages.

    Nothing is allocated: a model is built on the meta device, and the optimizer makes its state there.
    Activations are not counted; they depend on the batch.

    Example: surefoot memory llama-7b --compare --plot memory.png
    """
    from surefoot.memory import Storage, common_storages  # noqa: PLC0415 (commands import when they run)

    kept = storage_options(state_dtype, rounding, master_weight_bits)
    if compare and (kept or dtype or params or everything):
        raise typer.BadParameter(
            "shows the usual formats; leave out --dtype, --state-dtype, --rounding, --master-weight-bits, --params and "
            "--all",
            param_hint="--compare",
        )
    first, second = algorithm(optimizer), algorithm(rest)
    asked = Storage(None if dtype is None else dtype_of(dtype, "--dtype"), kept)
    averaged = {"ema": 0.999} if ema else {}
    title, weights = _weights(source)
    found = _measured(
        weights,
        common_storages(first) if compare else [asked],
        (first, dict(parse_option(text) for text in option or ()) | averaged),
        (second, averaged),
    )
    named = _titled(title, found)
    if plot is not None:
        _draw(named, found, plot)
    if json:
        _print_json(title, found, params=params or everything)
    else:
        _print(named, found, params=params, everything=everything)


def _weights(source: str) -> "tuple[str, Weights]":
    """Return what a source is called, and its parameters and buffers."""
    from surefoot import memory as facts  # noqa: PLC0415
    from surefoot.benchmark import LARGE_SHAPE_LISTS, SHAPE_LISTS  # noqa: PLC0415
    from surefoot.checkpoint.inspection import open_chosen  # noqa: PLC0415

    known = {**SHAPE_LISTS, **LARGE_SHAPE_LISTS}
    if (shapes := known.get(source.casefold())) is not None:
        return shapes.title, facts.weights_of_shapes(shapes.shapes)
    exists = Path(source).exists()
    if not exists and ":" not in source:
        raise typer.BadParameter(
            f"must be a known model ({', '.join(known)}), FILE.py:FUNCTION or MODULE:FUNCTION that returns a model, or "
            f"a checkpoint, but is {source!r}",
            param_hint=_SOURCE,
        )
    model = None if exists else _model(source)
    try:
        weights = facts.weights_of_checkpoint(open_chosen(Path(source))) if model is None else facts.weights_of(model)
    except (ValueError, RuntimeError, OSError) as error:
        raise typer.BadParameter(str(error), param_hint=_SOURCE) from None
    return source, weights


def _model(place: str) -> "Module":
    """Build the user's model without memory."""
    import torch  # noqa: PLC0415

    try:
        with torch.device("meta"):
            model = build(place, _SOURCE)
    except Exception as error:
        error.add_note("surefoot memory builds models on the meta device, where tensors have no values.")
        raise
    if not isinstance(model, torch.nn.Module):
        raise typer.BadParameter(
            f"{place} returns a {type(model).__name__}, must be a torch.nn.Module", param_hint=_SOURCE
        )
    return model


def _measured(
    weights: "Weights", storages: "Sequence[Storage]", *optimizers: tuple[type["Optimizer"], dict[str, Any]]
) -> dict[str, "Memory"]:
    """Measure choices."""
    from surefoot.memory import converted, measure  # noqa: PLC0415

    found = {}
    try:
        for storage in storages:
            chosen = [(each, {**options, **storage.options}) for each, options in optimizers]
            found[str(storage)] = measure(converted(weights, storage.dtype), *chosen)
    except (TypeError, ValueError, RuntimeError) as error:
        raise typer.BadParameter(str(error)) from error
    return found


def _titled(title: str, found: Mapping[str, "Memory"]) -> str:
    """Return the title of tables and pictures."""
    memory = next(iter(found.values()))
    trained = {name: count for name, count in memory.by_optimizer().items() if name is not None}
    by = " and ".join(f"{name} of {count}" if len(trained) > 1 else name for name, count in trained.items())
    return f"{title}, {memory.elements:,} parameters in {len(memory.parameters)} tensors, {by}"


def _print(title: str, found: Mapping[str, "Memory"], *, params: bool, everything: bool) -> None:
    from surefoot.cli._ckpt.tables import show  # noqa: PLC0415
    from surefoot.cli._memory import tables  # noqa: PLC0415

    first, *others = found.values()
    show(
        tables.heading(title),
        tables.choices(found) if others else tables.one_choice(first),
        *(tables.parameters(first, everything=everything) if params or everything else ()),
        "Activations are not counted; they depend on the batch.",
    )


def _print_json(source: str, found: Mapping[str, "Memory"], *, params: bool) -> None:
    typer.echo(encoder.dumps({"source": source, "choices": [_facts(*one, params=params) for one in found.items()]}))


def _facts(choice: str, memory: "Memory", *, params: bool) -> dict[str, Any]:
    """Return what is known of a choice, ready for JSON."""
    found = {
        "choice": choice,
        "elements": memory.elements,
        "bytes": memory.nbytes,
        "kinds": memory.by_kind(),
        "items": list(map(asdict, memory.items)),
    }
    return found | ({"parameters": list(map(asdict, memory.parameters))} if params else {})


def _draw(title: str, found: Mapping[str, "Memory"], path: Path) -> None:
    from surefoot.cli._memory.picture import draw  # noqa: PLC0415

    try:
        draw(title, found, path)
    except (ImportError, OSError, ValueError) as error:
        raise typer.BadParameter(f"{path} was not written: {error}", param_hint="--plot") from None
