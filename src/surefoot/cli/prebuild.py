"""The command `surefoot prebuild`: kernels compiled before anybody waits for them."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from surefoot.cli._storage import DTYPES
from surefoot.cli.explain import algorithm, parse_option


def prebuild(
    what: Annotated[
        list[str] | None,
        typer.Argument(help="Optimizers of surefoot; or a script.py, after -- with its arguments.", show_default=False),
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help=f"Dtypes of parameters, float32 by default: {', '.join(DTYPES)}.")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", help="A hyperparameter or option, as in amsgrad=True.")
    ] = None,
    recorded: Annotated[
        Path | None, typer.Option("--from", metavar="FOLDER", help="A folder in which a run has kept its kernels.")
    ] = None,
    cpu: Annotated[
        str | None, typer.Option(metavar="NAME", help="For another processor, which surefoot cache names there.")
    ] = None,
) -> None:
    """Compile what training with some optimizers, a script or a recorded run needs, into the cache folder.

    Each optimizer takes two steps on small parameters of each dtype. Options count as in training: weight_decay=0.1
    or max_grad_norm=1.0 is another kernel. A script runs to its end, with surefoot's optimizers in the place of
    torch.optim's. A run is recorded by giving it a folder of its own: SUREFOOT_CACHE_DIR=kernels python train.py

    Example: surefoot prebuild Adam AdamW --dtype float32 --dtype bfloat16 -o weight_decay=0.1

    Of a script: surefoot prebuild --cpu skylake-avx512 -- train.py --epochs 1
    """
    from tempfile import TemporaryDirectory  # noqa: PLC0415 (commands import when they run)

    from surefoot.codegen import store  # noqa: PLC0415

    if bool(what) == bool(recorded):
        raise typer.BadParameter("must be optimizers, a script or --from FOLDER, and one of these")
    if (reason := store.unusable_reason()) is not None:
        raise typer.BadParameter(f"the cache folder is not used: {reason}")
    _check(dtype or (), cpu)
    before, wanted = _kernels(), what or []
    script = wanted[:1] != [] and wanted[0].endswith(".py")
    if recorded is not None:
        _compile(recorded, cpu)
    elif cpu is not None:
        with TemporaryDirectory() as folder:
            kinds = [text for each in dtype or () for text in ("--dtype", each)]
            chosen = [text for each in option or () for text in ("-o", each)]
            _run(["run", *wanted] if script else ["prebuild", *kinds, *chosen, *wanted], folder, silent=not script)
            _compile(Path(folder), cpu)
    elif script:
        _run(["run", *wanted], str(store.cache_dir()))
    else:
        options = dict(parse_option(text) for text in option or ())
        for name in wanted:
            for each in dtype or ("float32",):
                _step(name, each, options)
    new = _kernels() - before
    typer.echo(f"{len(new)} new kernels in {store.cache_dir()}; {len(before)} were there")


def _check(dtypes: list[str] | tuple[str, ...], cpu: str | None) -> None:
    from surefoot.codegen.processor import check_name  # noqa: PLC0415

    for each in dtypes:
        if each not in DTYPES:
            raise typer.BadParameter(f"must be one of {', '.join(DTYPES)}, but is {each!r}", param_hint="--dtype")
    try:
        if cpu is not None:
            check_name(cpu)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--cpu") from None


def _step(name: str, dtype: str, options: dict[str, Any]) -> None:
    import torch  # noqa: PLC0415

    from surefoot.rule import Sparse  # noqa: PLC0415

    chosen = algorithm(name)
    shapes = ((4, 4), (4,)) if chosen.is_rule() else ((4, 4),)  # vectors may have kernels of their own
    params = [torch.nn.Parameter(torch.ones(shape, dtype=getattr(torch, dtype))) for shape in shapes]
    try:
        optimizer = chosen(params, **options)
        for param in params:
            grad = torch.ones_like(param)
            param.grad = grad.to_sparse(1) if optimizer.sparse is Sparse.ONLY else grad
        for _ in range(2):
            optimizer.step(lambda: 0.0)
    except (TypeError, ValueError, RuntimeError) as error:
        raise typer.BadParameter(f"{name} of {dtype}: {error}") from error


def _run(command: list[str], folder: str, *, silent: bool = False) -> None:
    """Let a command of surefoot keep its kernels in a folder; end as it does if it fails."""
    environment, output = os.environ | {"SUREFOOT_CACHE_DIR": folder}, subprocess.DEVNULL if silent else None
    ours = [sys.executable, "-m", "surefoot", *command]
    done = subprocess.run(ours, env=environment, stdout=output, check=False)  # noqa: S603
    if done.returncode:
        raise typer.Exit(done.returncode)


def _compile(folder: Path, cpu: str | None) -> None:
    """Compile the sources in a folder for this machine's processor, or that of a name."""
    from surefoot.codegen import store  # noqa: PLC0415
    from surefoot.codegen.compile import prebuild_kernel  # noqa: PLC0415
    from surefoot.codegen.processor import host, named  # noqa: PLC0415

    try:
        sources = store.sources(folder)
    except OSError as error:
        raise typer.BadParameter(str(error), param_hint="--from") from error
    for name, source in sources.items():
        prebuild_kernel(source, name.rpartition("_")[0], host() if cpu is None else named(cpu))


def _kernels() -> set[str]:
    from surefoot.codegen import store  # noqa: PLC0415

    try:
        return {entry.name for entry in store.entries() if entry.name.endswith(".o")}
    except OSError:
        return set()
