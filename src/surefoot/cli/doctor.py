"""The command `surefoot doctor`: what runs where on this machine, and why."""

import json as encoder
from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated, Any

import typer

from surefoot.terminal import printable

_WIDTH = 10


def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")] = False,
) -> None:
    """Show what runs where on this machine and why: guards, engines, threads, the kernel cache, Triton, private names.

    The exit code is 1 if the fast path is off, or something is broken, without anybody having asked for it.
    """
    from surefoot.doctor import examine  # noqa: PLC0415 (commands import when they run)

    found = examine()
    if json:
        typer.echo(encoder.dumps(asdict(found), indent=2))
    else:
        for title, text in _lines(found.facts):
            typer.echo(f"{title:{_WIDTH}}{printable(text)}")
        for kind, texts in (("warning", found.warnings), ("problem", found.problems)):
            for text in texts:
                typer.echo(f"{kind + ':':{_WIDTH}}{printable(text)}")
        if not found.problems:
            typer.echo("Nothing is wrong.")
    if found.problems:
        raise typer.Exit(1)


def _lines(facts: dict[str, dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Yield the title and the text of each line."""
    for section, found in facts.items():
        if "error" in found:
            yield section, f"cannot be told: {found['error']}"
        else:
            for number, text in enumerate(_SECTIONS[section](found)):
                yield section if number == 0 else "", text


def _versions(found: dict[str, Any]) -> Iterator[str]:
    yield ", ".join(f"{name} {text or '(not installed)'}" for name, text in found.items())


def _variables(found: dict[str, Any]) -> Iterator[str]:
    yield ", ".join(f"{name}={value}" for name, value in found.items()) or "no SUREFOOT_* is set"


def _guard(found: dict[str, Any]) -> Iterator[str]:
    yield found["kind"] + (f": {found['reason']}" if found["reason"] else "")


def _engines(found: dict[str, Any]) -> Iterator[str]:
    """Say which engine serves what, dtypes of one answer together."""
    together: dict[tuple[str, str, tuple[str, ...]], list[str]] = {}
    for row in found["choices"]:
        together.setdefault((row["device"], row["engine"], tuple(row["refusals"])), []).append(row["dtype"])
    for (device, engine, refusals), dtypes in together.items():
        reasons = f"; not {', not '.join(refusals)}" if engine == "eager" or not engine or found["told"] else ""
        yield f"{engine or 'none'} serves {', '.join(dtypes)} on {device}{reasons if refusals else ''}"
    if found["told"]:
        yield "SUREFOOT_ENGINE asks for it"


def _threads(found: dict[str, Any]) -> Iterator[str]:
    openmp = found["openmp"]
    pool = f"torch's OpenMP pool ({openmp})" if openmp else "a pool of Python's: no OpenMP library was found"
    given = "".join(f", {name}={value}" for name, value in found["variables"].items())
    yield f"{found['torch']} on {found['cores']} cores, from {pool}{given}"


def _cache(found: dict[str, Any]) -> Iterator[str]:
    usable = "can be written" if found["writable"] else "cannot be written"
    how = f"not used: {found['reason']}" if found["reason"] else usable
    yield f"{found['folder'] or 'no folder'}: {found['kernels']} kernels, {how}"


def _triton(found: dict[str, Any]) -> Iterator[str]:
    there = "installed" if found["installed"] else "not installed"
    yield found["missing"] or there + ("" if found["needed"] else "; there is no GPU that needs it")


def _private(found: dict[str, Any]) -> Iterator[str]:
    missing = ", ".join(found["missing"])
    yield f"{found['names']} names of torch that are not public are used; missing here: {missing or 'none'}"


_SECTIONS = {
    "versions": _versions,
    "variables": _variables,
    "guard": _guard,
    "engines": _engines,
    "threads": _threads,
    "cache": _cache,
    "triton": _triton,
    "private": _private,
}
