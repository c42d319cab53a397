"""Runs the cases of a module on several processes; also the script that each of them runs.

A module of cases has a generator `cases(world)` of names and functions.  Every rank runs all of them in order, in a
folder that they share; what one returns, or the error that it raises, is kept under its name.  To start processes takes
longer than most modules, so those of one number of ranks serve one module after the other.
"""

import atexit
import functools
import importlib
import os
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import torch

HERE, SOURCE = Path(__file__).parent, Path(__file__).parents[2] / "src"
LIMIT = timedelta(seconds=30)
"""How long a rank waits for another in a collective."""


def run_ranks(module, world, folder, timeout=240):
    """Run all cases of a module; return for each rank a dict of what they have returned."""
    return _group(world).run(module, folder, timeout)


@functools.cache
def _group(world):
    return _Group(world)


class _Group:
    """The processes of one number of ranks."""

    def __init__(self, world):
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        here = Path(self._folder.name)
        environment = os.environ | {
            "PYTHONPATH": f"{SOURCE}{os.pathsep}{HERE}{os.pathsep}{HERE.parent}",
            "MALLOC_PERTURB_": "165",
        }
        command = [sys.executable, "-u", str(HERE / "ranks.py"), str(here / "store"), str(world)]
        self._outputs = [(here / f"output {rank}").open("w+b") for rank in range(world)]
        self._processes = [
            subprocess.Popen(  # noqa: S603 (our own script)
                [*command, str(rank)], env=environment, stdin=subprocess.PIPE, stdout=output, stderr=output
            )
            for rank, output in enumerate(self._outputs)
        ]
        atexit.register(self._end)

    def run(self, module, folder, timeout):
        """Run a module, or fail with what the processes have printed; then others are to be started."""
        results, end = [Path(folder) / f"{rank}.pt" for rank in range(len(self._processes))], time.monotonic() + timeout
        for process in self._processes:
            process.stdin.write(f"{module} {folder}\n".encode())
            process.stdin.flush()
        while not all(result.exists() for result in results):
            late = time.monotonic() > end
            if late or any(process.poll() is not None for process in self._processes):
                printed = [f"no end within {timeout} s" * late, *map(_text, self._outputs)]
                self._end()
                _group.cache_clear()
                raise AssertionError("\n".join(printed))
            time.sleep(0.02)
        return [torch.load(result, weights_only=False) for result in results]

    def _end(self):
        for process in self._processes:
            process.kill()
            process.wait()
            process.stdin.close()
        for output in self._outputs:
            output.close()
        self._folder.cleanup()


def _text(output):
    output.seek(0)
    return output.read().decode(errors="replace")


def main():
    """Run on this rank the cases of the modules that standard input names, each in its folder."""
    store, world, rank = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=LIMIT
    )
    for line in sys.stdin:
        module, folder = line.rstrip("\n").split(" ", 1)
        os.chdir(folder)
        found = {}
        for name, case in importlib.import_module(module).cases(world):
            try:
                found[name] = case()
            except Exception as error:  # noqa: BLE001 (what it is, the test decides)
                found[name] = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
        torch.save(found, f"{rank}.part")
        torch.distributed.barrier()
        Path(f"{rank}.part").rename(f"{rank}.pt")


if __name__ == "__main__":
    main()
