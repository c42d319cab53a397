"""From earlier versions of the format to the present one: a step for each version, in one table."""

from collections.abc import Callable, Mapping
from typing import Any

from surefoot.checkpoint.header import FORMAT
from surefoot.checkpoint.schema import check
from surefoot.errors import CheckpointError

Manifest = Mapping[str, Any]


def migrated(manifest: Manifest) -> Manifest:
    """Return a manifest in the present version of the format.

    Args:
        manifest: of this or an earlier version; it is not changed.

    Raises:
        CheckpointError: it is malformed.
    """
    try:
        while manifest["format"] < FORMAT:
            manifest = STEPS[manifest["format"]](manifest)
        check(manifest)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"not readable: its manifest is malformed ({type(error).__name__}: {error})") from error
    return manifest


def _from_0(manifest: Manifest) -> Manifest:
    """Version 0, a draft: parts stood at the top, an optimizer's class was its `algorithm`, files had no sequence."""
    own = ("format", "step", "versions", "saved_at")
    parts = {name: _part_from_0(part) for name, part in manifest.items() if name not in own}
    kept = {name: manifest[name] for name in own}
    return {**kept, "format": 1, "sequence": manifest["step"], "parts": parts}


def _part_from_0(part: Any) -> Any:
    return {"class" if name == "algorithm" else name: value for name, value in part.items()}


STEPS: Mapping[int, Callable[[Manifest], Manifest]] = {0: _from_0}
"""For each version the step to the next."""
