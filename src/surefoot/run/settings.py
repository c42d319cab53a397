"""What `surefoot run` was asked for, carried to the script's process and its children in an environment variable.

Every Python process below the command reads this at its start: what is imported here, all of them import.
"""

import json
import os
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

VARIABLE, PREFIX = "SUREFOOT_RUN", "SUREFOOT_RUN_PREFIX"
SITE = os.path.join(os.path.dirname(__file__), "site")  # noqa: PTH118, PTH120 (pathlib costs a program's start 10 ms)


class Settings(NamedTuple):
    """The options of `surefoot run`.

    Attributes:
        title: the script or module, as the report calls it.
        compare: whether to time torch's implementation at the end.
        telemetry: absolute path of the folder for telemetry, or None.
        quiet: whether to leave out the report on standard error.
        json: absolute path of the report's file, or None.
        main: the process id of the script; None until that process has started.
    """

    title: str
    compare: bool = False
    telemetry: str | None = None
    quiet: bool = False
    json: str | None = None
    main: int | None = None

    def environment(self) -> dict[str, str]:
        """Return the variables that bring these settings to a Python process."""
        path = os.environ.get("PYTHONPATH")
        return {
            VARIABLE: json.dumps(self._asdict()),
            PREFIX: sys.prefix,
            "PYTHONPATH": os.pathsep.join([SITE, *([path] if path else [])]),
        }

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> "Settings":
        """Read what `environment` has written."""
        content: dict[str, Any] = json.loads(environment[VARIABLE])
        return cls(**content)

    @property
    def is_main(self) -> bool:
        """Whether this is the script's own process rather than a child of it."""
        return self.main == os.getpid()


def suffix(settings: Settings) -> str:
    """Return what tells this process's files from those of others: its rank, or its id if it is a child."""
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        return f".rank{rank}"
    return "" if settings.is_main else f".pid{os.getpid()}"
