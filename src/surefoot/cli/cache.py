"""The command `surefoot cache`: the compiled kernels on disk."""

import contextlib
import time
from typing import Annotated

import typer


def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove all of them.")] = False,
) -> None:
    """Show where compiled kernels are kept, how many, for which processor, whether they are used; or remove them."""
    from surefoot.codegen import store  # noqa: PLC0415 (commands import when they run)
    from surefoot.codegen.processor import host  # noqa: PLC0415 (the same)

    try:
        folder = store.cache_dir()
        typer.echo(f"folder: {folder}")
        with contextlib.suppress(ImportError):  # without llvmlite there are no kernels
            typer.echo(f"processor: {host().name}")
        if clear:
            store.clear()
        files = store.entries()
    except FileNotFoundError as error:
        typer.echo("kernels: none" if error.filename else f"not used: {error}")
        return
    except OSError as error:
        typer.echo(f"not used: {error}")
        raise typer.Exit(1) from error
    kernels = [file for file in files if file.name.endswith(".o")]
    size = sum(file.size for file in files)
    typer.echo(
        f"kernels: {len(kernels)}, {size / 1024:,.0f} KiB with their sources, of at most {store.LIMIT >> 20} MiB"
    )
    if kernels:
        days = (time.time() - kernels[0].used) / 86400
        typer.echo(f"not used for longest: {kernels[0].name}, {days:.0f} days")
