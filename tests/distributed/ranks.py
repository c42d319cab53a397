"""Runs the cases of a module on several processes; also the script that each of them runs.

A module of cases has a generator `cases(world)` of names and functions.  Every rank runs all of them in order; what one
returns, or the error that it raises, is kept under its name.
"""

import importlib
import os
import subprocess
import sys
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
    environment = os.environ | {
        "PYTHONPATH": f"{SOURCE}{os.pathsep}{HERE}{os.pathsep}{HERE.parent}",
        "MALLOC_PERTURB_": "165",
    }
    command = [sys.executable, "-u", str(HERE / "ranks.py"), module, str(world), str(folder)]
    processes = [
        subprocess.Popen([*command, str(rank)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # noqa: S603
        for rank in range(world)
    ]
    end, outputs = time.monotonic() + timeout, []
    for process in processes:
        try:
            outputs.append(process.communicate(timeout=max(1.0, end - time.monotonic()))[0].decode())
        except subprocess.TimeoutExpired:
            for each in processes:
                each.kill()
            outputs.append(f"no end within {timeout} s:\n{process.communicate()[0].decode()}")
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world)]


def main():
    """Run the cases on this rank."""
    module, world, folder, rank = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=LIMIT
    )
    found = {}
    for name, case in importlib.import_module(module).cases(world):
        try:
            found[name] = case()
        except Exception as error:  # noqa: BLE001 (what it is, the test decides)
            found[name] = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
