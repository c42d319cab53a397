"""Options about how weights and state are kept, which several commands take; the library checks what they may be."""

from typing import Annotated, Any

import typer

DTYPES = ("float32", "float64", "bfloat16", "float16")

StateDtype = Annotated[
    str | None, typer.Option(metavar="NAME", help=f"How state is kept: {', '.join(DTYPES)} or float8.")
]
Rounding = Annotated[
    str | None, typer.Option(metavar="NAME", help="How 16-bit weights are rounded: nearest or stochastic.")
]
MasterWeightBits = Annotated[
    int | None, typer.Option(metavar="N", help="Bits that 16-bit weights have with a correction: 24 or 32.")
]


def storage_options(state_dtype: str | None, rounding: str | None, master_weight_bits: int | None) -> dict[str, Any]:
    """Return the options of an optimizer among these that are given."""
    given = {"state_dtype": state_dtype, "rounding": rounding, "master_weight_bits": master_weight_bits}
    found: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if state_dtype in DTYPES:
        found["state_dtype"] = dtype_of(state_dtype, "--state-dtype")
    return found


def dtype_of(name: str, hint: str) -> Any:
    """Return the dtype of a name."""
    import torch  # noqa: PLC0415 (only when the command runs)

    if name not in DTYPES:
        raise typer.BadParameter(f"must be one of {', '.join(DTYPES)}, but is {name!r}", param_hint=hint)
    return getattr(torch, name)
