"""What a manifest says beside its parts: when, by what and as which step a checkpoint was saved."""

import platform
import sys
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from surefoot.checkpoint.collect import Contents


def manifest_of(contents: Contents, step: int | None, sequence: int) -> dict[str, Any]:
    """Return the manifest of contents that are saved now."""
    return {
        "saved_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": _versions(),
        "step": step,
        "sequence": sequence,
        "parts": contents.parts,
    }


@cache
def _versions() -> dict[str, str]:
    libraries = {"surefoot": version("surefoot"), "torch": torch.__version__, "numpy": np.__version__}
    return {**libraries, "python": platform.python_version(), "platform": sys.platform}
