"""Models that a user names: FILE.py:FUNCTION or MODULE:FUNCTION."""

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import typer


def build(place: str, hint: str) -> Any:
    """Call the function that makes the user's model.

    Args:
        place: where it is, as `FILE.py:FUNCTION` or `MODULE:FUNCTION`; modules are also found in the working directory.
        hint: the option that says so, for messages.
    """
    origin, _, function = place.rpartition(":")
    path = Path(origin)
    if not origin or not (path.is_file() or origin.replace(".", "").isidentifier()):
        raise typer.BadParameter(f"must be FILE.py:FUNCTION or MODULE:FUNCTION, but is {place!r}", param_hint=hint)
    module = _from_file(path, hint) if path.is_file() else _imported(origin, hint)
    if not callable(found := getattr(module, function, None)):
        raise typer.BadParameter(f"{origin} has no function {function!r}", param_hint=hint)
    return found()


def _from_file(path: Path, hint: str) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise typer.BadParameter(f"{path} is not a Python file", param_hint=hint)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _imported(name: str, hint: str) -> Any:
    if "" not in sys.path:
        sys.path.insert(0, "")  # as `python -m` has it
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):
            raise
        raise typer.BadParameter(f"there is no file or module {name}", param_hint=hint) from None
