"""What tests of `surefoot run` share: starting it, and plain Python beside it."""

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
_HIDDEN = ("SUREFOOT_RUN", "SUREFOOT_RUN_PREFIX", "RANK", "LOCAL_RANK")


def start(*command, cwd=None, **variables):
    """Run a command to its end; give exit status, standard output and standard error."""
    environment = {name: value for name, value in os.environ.items() if name not in _HIDDEN}
    environment |= {"OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(  # noqa: S603
        [sys.executable, *map(str, command)], capture_output=True, text=True, cwd=cwd, env=environment, check=False
    )
    return done.returncode, done.stdout, done.stderr


def surefoot_run(*arguments, cwd=None, **variables):
    """Run `surefoot run` with arguments."""
    return start("-m", "surefoot", "run", *arguments, cwd=cwd, **variables)
