"""The report at the end of a run: facts as a dict, the same as text."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from time import perf_counter
from typing import Any

import surefoot
from surefoot.run.settings import Settings, suffix
from surefoot.terminal import in_encoding

_MOST = 8
_reported: set[int] = set()
"""Processes that have reported: this one, or those that it was forked from."""


def at_exit(settings: Settings, started: float) -> None:
    """Say, and write, what happened in this process; a child that took no step says nothing."""
    from surefoot.run import swap, watch  # noqa: PLC0415 (they need torch)

    seconds = perf_counter() - started
    if os.getpid() in _reported:
        return
    _reported.add(os.getpid())
    watch.stop()
    if not (settings.is_main or watch.found):
        return
    swap.put_back()
    _publish(settings, run_facts(settings, seconds, watch.found, watch.total[0]))
    _end_as_interrupted()


def without_torch(settings: Settings, started: float) -> None:
    """Say that there was nothing to do."""
    _publish(settings, run_facts(settings, perf_counter() - started, [], 0.0))
    _end_as_interrupted()


def _end_as_interrupted() -> None:
    """Let an interrupted script end with SIGINT, as Python does.

    Python remembers that an interrupt ended the program, and forgets it when source is run afterwards, as imports in
    the report do; to be reminded, it has to see another.
    """
    if isinstance(getattr(sys, "last_value", None), KeyboardInterrupt):
        with contextlib.suppress(KeyboardInterrupt):
            exec("raise KeyboardInterrupt")  # noqa: S102


def run_facts(settings: Settings, seconds: float, found: list[Any], in_steps: float) -> dict[str, Any]:
    """Return what the report tells.

    Args:
        settings: what was asked for.
        seconds: how long the process ran.
        found: the optimizers, as `watch.Watched`.
        in_steps: seconds in their steps.
    """
    return {
        "script": settings.title,
        "process": os.getpid(),
        "rank": int(os.environ.get("RANK", "0")),
        "failed": _failed(),
        "seconds": seconds,
        "step_seconds": in_steps,
        "step_share": in_steps / seconds,
        "optimizers": [_optimizer(watched, settings) for watched in found],
    }


def _failed() -> bool:
    """Whether an exception has ended the script."""
    return getattr(sys, "last_value", None) is not None


def _optimizer(watched: Any, settings: Settings) -> dict[str, Any]:
    from statistics import median  # noqa: PLC0415

    from surefoot.run.compare import compared  # noqa: PLC0415 (it needs torch)

    compare = settings.compare and not _failed()
    silent = None if settings.telemetry is None else _why_silent(watched.algorithm)
    return {
        "class": watched.algorithm.__qualname__,
        "module": watched.algorithm.__module__,
        "surefoot": watched.is_ours,
        "parameters": len(watched.shapes),
        "elements": watched.elements,
        "groups": watched.groups,
        "devices": sorted({device for _, _, device in watched.shapes}),
        "engines": [vars(choice) for choice in watched.engines],
        "custom_step": watched.custom_step,
        "steps": len(watched.seconds),
        "seconds": sum(watched.seconds),
        "first_step_seconds": watched.seconds[0],
        "median_step_seconds": median(watched.seconds),
        "telemetry": watched.telemetry,
        "no_telemetry": None if watched.telemetry else silent,
        "compared": compared(watched) if compare else None,
    }


def _why_silent(algorithm: type) -> str:
    """Say why an optimizer has no file."""
    spec = getattr(algorithm, "spec", None)
    if spec is not None and "telemetry" in spec.step_options:
        return "nothing: a copy of an optimizer writes nothing"
    return f"nothing: {algorithm.__name__} takes no `telemetry`"


def _publish(settings: Settings, content: dict[str, Any]) -> None:
    problem = None if settings.json is None else _write_json(settings, settings.json, content)
    if settings.quiet or content["rank"]:
        told = [problem] if problem else []
    else:
        child = "" if settings.is_main else f" (process {content['process']})"
        told = ["", *report_lines(content, child), *([problem] if problem else [])]
    if told:
        _print("\n".join(told) + "\n")


def _write_json(settings: Settings, file: str, content: dict[str, Any]) -> str | None:
    """Write the report as JSON; say why it could not be written, which is no reason to keep back the other one."""
    from pathlib import Path  # noqa: PLC0415 (most runs write none)

    from surefoot.files import write_whole  # noqa: PLC0415

    path, content = Path(file), {"surefoot": surefoot.__version__, **content}
    path = path.with_name(f"{path.stem}{suffix(settings)}{path.suffix}")
    try:
        write_whole(path, (json.dumps(content, indent=2) + "\n").encode())
    except OSError as error:
        return f"surefoot run: the report was not written to {path}: {error.strerror}"
    return None


def _print(text: str) -> None:
    """Print on standard error, whatever the script has done to its streams."""
    with contextlib.suppress(Exception):  # closed, replaced by something else, or nobody reads it any more
        sys.stdout.flush()
    for stream in (sys.stderr, sys.__stderr__):
        if stream is None:
            continue
        with contextlib.suppress(Exception):
            stream.write(in_encoding(text, getattr(stream, "encoding", None) or "utf-8"))
            stream.flush()
            return


def report_lines(content: dict[str, Any], which: str = "") -> Iterator[str]:
    """Write the report as text.

    Args:
        content: what `run_facts` gave.
        which: names the process, if it is not the script's own.
    """
    head = f"surefoot run: {content['script']}{which} took {_time(content['seconds'])}"
    optimizers = content["optimizers"]
    if not optimizers:
        yield f"{head}; no optimizer took a step"
        return
    yield f"{head}, {content['step_share']:.1%} of it in optimizer steps ({_time(content['step_seconds'])})"
    for optimizer in optimizers[:_MOST]:
        yield from _lines_of(optimizer)
    if len(optimizers) > _MOST:
        yield f"  and {len(optimizers) - _MOST} more optimizers"


def _lines_of(optimizer: dict[str, Any]) -> Iterator[str]:
    whose = "" if optimizer["surefoot"] else f" of {optimizer['module']}, which is not replaced"
    steps, size = (
        optimizer["steps"],
        f"{_several(optimizer['parameters'], 'parameter')}, {optimizer['elements']:,} elements",
    )
    yield f"  {optimizer['class']}{whose}: {size}, {_several(steps, 'step')}"
    host = " (of the host; devices work on)" if optimizer["devices"] != ["cpu"] else ""
    median, first = (_time(optimizer[f"{which}_step_seconds"]) for which in ("median", "first"))
    yield f"    time     {_time(optimizer['seconds'])}; a step {median}, the first {first}{host}"
    if optimizer["custom_step"]:
        yield f"    engine   {optimizer['custom_step']}"
    for choice in optimizer["engines"]:
        yield f"    engine   {choice['engine']} for {_several(choice['parameters'], 'parameter')} of {choice['kind']}"
        yield from (f"             not {refusal}" for refusal in choice["refusals"])
    if optimizer["compared"]:
        yield f"    torch    {_comparison(optimizer['compared'])}"
    if optimizer["telemetry"]:
        yield f"    see      surefoot report {optimizer['telemetry']}"
    if optimizer["no_telemetry"]:
        yield f"    see      {optimizer['no_telemetry']}"


def _comparison(compared: dict[str, Any]) -> str:
    if "reason" in compared:
        return f"not compared: {compared['reason']}"
    times = ", ".join(f"{name} {_time(seconds)}" for name, seconds in compared["seconds"].items())
    return f"on the same shapes: {times}; surefoot is {compared['speedup']:.2f} times as fast as the best of torch"


def _several(count: int, what: str) -> str:
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def _time(seconds: float) -> str:
    """Write a time with three digits in a unit that suits it."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}" if seconds < 1000 * size else f"{seconds:.0f} s"
    return f"{seconds * 1e6:.3g} µs"
