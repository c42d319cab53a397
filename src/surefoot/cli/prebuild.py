"""The command `surefoot prebuild`: kernels compiled before anybody waits for them."""

from typing import Annotated, Any

import typer

from surefoot.cli.explain import DTYPES, algorithm, parse_option


def prebuild(
    names: Annotated[list[str], typer.Argument(help="Optimizers of surefoot.", show_default=False)],
    dtype: Annotated[
        list[str] | None, typer.Option(help=f"Dtypes of parameters, float32 by default: {', '.join(DTYPES)}.")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", help="A hyperparameter or option, as in amsgrad=True.")
    ] = None,
) -> None:
    """Compile for this machine's processor what training with some optimizers needs, into the cache folder.

    Each optimizer takes two steps on a small parameter of each dtype. Options count as in training: weight_decay=0.1
    or max_grad_norm=1.0 is another kernel. What a script needs is compiled by running it once.

    Example: surefoot prebuild Adam AdamW --dtype float32 --dtype bfloat16 -o weight_decay=0.1
    """
    from surefoot.codegen import store  # noqa: PLC0415 (commands import when they run)

    options = dict(parse_option(text) for text in option or ())
    for each in dtype or ("float32",):
        if each not in DTYPES:
            raise typer.BadParameter(f"must be one of {', '.join(DTYPES)}, but is {each!r}", param_hint="--dtype")
    if (reason := store.unusable_reason()) is not None:
        raise typer.BadParameter(f"the cache folder is not used: {reason}")
    before = _kernels()
    for name in names:
        for each in dtype or ("float32",):
            _step(name, each, options)
    new = _kernels() - before
    typer.echo(f"{len(new)} new kernels in {store.cache_dir()}; {len(before)} were there")


def _step(name: str, dtype: str, options: dict[str, Any]) -> None:
    import torch  # noqa: PLC0415

    param = torch.nn.Parameter(torch.ones(4, 4, dtype=getattr(torch, dtype)))
    param.grad = torch.ones_like(param)
    try:
        optimizer = algorithm(name)([param], **options)
        for _ in range(2):
            optimizer.step()
    except (TypeError, ValueError, RuntimeError) as error:
        raise typer.BadParameter(f"{name} of {dtype}: {error}") from error


def _kernels() -> set[str]:
    from surefoot.codegen import store  # noqa: PLC0415

    try:
        return {entry.name for entry in store.entries() if entry.name.endswith(".o")}
    except OSError:
        return set()
