"""The command `surefoot ckpt`: look into checkpoints, check, compare, convert and migrate them."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from surefoot.checkpoint import Checkpoint

app = typer.Typer(
    name="ckpt",
    help="Checkpoints: look into them, check, compare, convert and migrate them.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

PathArgument = Annotated[Path, typer.Argument(help="A checkpoint, or a folder, of which the newest is taken.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON rather than tables.")]

Everything = Annotated[bool, typer.Option("--all", help="Show every row of a long table.")]


@contextmanager
def _errors() -> Iterator[None]:
    """Say what is wrong with a file in one line, with status 2."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from None


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(_finite(value), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    """Return a value in which numbers that JSON lacks are strings."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


@app.callback()
def _group() -> None:
    """Checkpoints: look into them, check, compare, convert and migrate them."""


@app.command()
def inspect(path: PathArgument, as_json: AsJson = False, everything: Everything = False) -> None:
    """Show parts, groups, parameters, state, sizes, norms and non-finite values.

    Reads the header only, and the tensors of state in 8 bits and of weights with a correction, for the norms of what
    they mean.
    """
    from surefoot.checkpoint import inspection  # noqa: PLC0415 (commands import when they run)

    with _errors():
        checkpoint = inspection.open_chosen(path)
        inspection.summarize_values(checkpoint)
        if as_json:
            _print_json(inspection.as_json(checkpoint))
        else:
            _show(checkpoint, everything=everything)


def _show(checkpoint: "Checkpoint", *, everything: bool) -> None:
    from surefoot.cli._ckpt import tables  # noqa: PLC0415

    parts = checkpoint.manifest["parts"]
    models, optimizers = ([label for label in parts if parts[label]["kind"] == kind] for kind in ("model", "optimizer"))
    tables.show(
        tables.overview(checkpoint),
        *(tables.groups(checkpoint, label) for label in optimizers),
        *(tables.parameters(checkpoint, label, everything=everything) for label in models or optimizers),
    )


@app.command()
def verify(path: PathArgument, as_json: AsJson = False) -> None:
    """Check every byte of a checkpoint, or of all in a folder; the status is 1 if one is damaged."""
    with _errors():
        found = {str(one): _damage(one) for one in _paths(path)}
    if as_json:
        _print_json([{"path": one, "whole": problem is None, "problem": problem} for one, problem in found.items()])
    else:
        for one, problem in found.items():
            typer.echo(f"{one}: whole" if problem is None else problem)
    raise typer.Exit(int(any(found.values())))


def _paths(path: Path) -> list[Path]:
    """Return a file, or all checkpoints of a folder."""
    from surefoot.checkpoint import folder  # noqa: PLC0415

    if folder.is_file_name(path):
        return [path]
    if not path.is_dir() or not (found := folder.entries(path)):
        raise FileNotFoundError(f"there is no checkpoint in {path}")
    return found


def _damage(path: Path) -> str | None:
    """Say what is wrong with a file, None if nothing is."""
    from surefoot.checkpoint import Checkpoint, CheckpointError  # noqa: PLC0415

    try:
        Checkpoint(path).verify()
    except CheckpointError as error:
        return str(error)
    except OSError as error:
        return f"{path} cannot be read: {error.strerror or error}"
    return None


@app.command()
def diff(left: PathArgument, right: PathArgument, as_json: AsJson = False, everything: Everything = False) -> None:
    """Compare two checkpoints: tensors by value, everything else by place; the status is 1 if they differ."""
    from surefoot.checkpoint import inspection  # noqa: PLC0415
    from surefoot.checkpoint.diff import differences  # noqa: PLC0415

    with _errors():
        sides = [inspection.open_chosen(path) for path in (left, right)]
        for side in sides:
            side.verify()
        found = list(differences(*sides))
    if as_json:
        _print_json([one._asdict() for one in found])
    elif found:
        _show_differences(found, *(str(side.path) for side in sides), everything=everything)
    else:
        typer.echo("no difference")
    raise typer.Exit(int(bool(found)))


def _show_differences(found: list[Any], left: str, right: str, *, everything: bool) -> None:
    from surefoot.cli._ckpt import tables  # noqa: PLC0415

    tables.show(tables.differences(found, left, right, everything=everything))


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A file of torch.save, or a checkpoint.")],
    target: Annotated[Path, typer.Argument(help="A .safetensors file to write, or a .pt file for torch.load.")],
    force: Annotated[bool, typer.Option("--force", help="Replace the target if it is there.")] = False,
) -> None:
    """Convert a file of torch.save to a checkpoint, or a checkpoint to a file for torch.load(weights_only=True).

    A checkpoint of sharded tensors is also converted to one file, as a process without other ranks would save it.
    """
    from surefoot.checkpoint import folder  # noqa: PLC0415

    with _errors():
        _check_target(target, force=force)
        to_ours = target.suffix == folder.SUFFIX
        if to_ours and (source.is_dir() or source.suffix == folder.SUFFIX) and _to_one_file(source, target):
            return
        if to_ours == (source.suffix == folder.SUFFIX or source.is_dir()):
            raise ValueError(
                f"one of the two must be a {folder.SUFFIX} file, the other a file of torch: {source}, {target}"
            )
        (_from_torch if to_ours else _to_torch)(source, target)


def _check_target(target: Path, *, force: bool) -> None:
    if target.exists() and not target.is_file():
        raise FileExistsError(f"{target} is a folder or a device; name a file")
    if target.exists() and not force:
        raise FileExistsError(f"{target} is there already; name another, or give --force")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {target.parent}")


def _from_torch(source: Path, target: Path) -> None:
    from surefoot.checkpoint.convert import from_torch  # noqa: PLC0415
    from surefoot.checkpoint.manifest import manifest_of  # noqa: PLC0415
    from surefoot.checkpoint.writer import write  # noqa: PLC0415

    contents, step, taken = from_torch(source)
    write(target, contents.tensors, manifest_of(contents, step, 0))
    for one in taken:
        typer.echo(f"{one.key} -> {one.label}")
    typer.echo(f"wrote {target}")


def _to_one_file(source: Path, target: Path) -> bool:
    """Write a checkpoint of sharded tensors as one file; return whether it is one."""
    from surefoot.checkpoint import inspection  # noqa: PLC0415
    from surefoot.checkpoint.convert import to_one_file  # noqa: PLC0415

    checkpoint = inspection.open_chosen(source)
    if not checkpoint.files:
        return False
    to_one_file(checkpoint, target)
    typer.echo(f"wrote {target}, of one file")
    return True


def _to_torch(source: Path, target: Path) -> None:
    from surefoot.checkpoint import inspection  # noqa: PLC0415
    from surefoot.checkpoint.convert import to_torch  # noqa: PLC0415

    found = to_torch(inspection.open_chosen(source), target)
    typer.echo(f"wrote {target} with {', '.join(found)}; open it with torch.load(..., weights_only=True)")


@app.command()
def migrate(
    path: Annotated[Path, typer.Argument(help="A checkpoint, or a folder of them.")],
) -> None:
    """Rewrite checkpoints of earlier versions of the format in the present one, each atomically; others stay.

    The status is 2 if one could not be rewritten; the others are.
    """
    from surefoot.checkpoint.migrate import migrate_file  # noqa: PLC0415

    failed = False
    with _errors():
        paths = _paths(path)
    for one in paths:
        try:
            typer.echo(f"{one}: {migrate_file(one)}")
        except (ValueError, OSError) as error:
            typer.echo(f"Error: {error}", err=True)
            failed = True
    raise typer.Exit(2 if failed else 0)
