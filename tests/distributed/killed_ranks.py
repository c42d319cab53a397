"""Run by `test_killed_ranks.py`: ranks that save for ever are killed in the middle, one or all, again and again.

Each attempt forks its ranks, which is much faster than to start them.  Prints as JSON what was left by each.
"""

import json
import os
import random
import signal
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch._dynamo  # which sharded tensors import; imported here, once for all ranks, as is what follows
from torch import distributed, nn
from torch.distributed import checkpoint  # noqa: F401
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import surefoot
from surefoot.checkpoint import sharded  # noqa: F401

LIMIT = timedelta(seconds=20)


def save_for_ever(folder, store, rank, world, report, background):
    """Save step after step a model of which every element is the step, and report each that is whole."""
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=LIMIT)
    mesh = init_device_mesh("cpu", (world,))
    model = nn.ParameterDict({"w": distribute_tensor(torch.zeros(300, 200), mesh, [Shard(0)]), "v": torch.zeros(7)})
    for step in range(1, 1000):
        with torch.no_grad():
            for param in model.values():
                param.fill_(step)
        surefoot.save(folder, model=model, extra=step, step=step, keep=2, rng=False, async_=background)
        whole = step - 1 if background else step
        if rank == 0 and whole:
            os.write(report, f"{whole}\n".encode())


def attempt(folder, number, world, chance, background):
    """Return the last step that was reported as whole before a rank was killed, and what became of the others."""
    store = folder.parent / f"store-{number}"
    read, write = os.pipe()
    children = []
    for rank in range(world):
        child = os.fork()
        if not child:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            try:
                save_for_ever(folder, store, rank, world, write, background)
            finally:
                os._exit(1)
        children.append(child)
    os.close(write)
    with os.fdopen(read) as reports:
        first = reports.readline()
        time.sleep(chance.random() / 10)
        victims = children if chance.random() < 0.3 else [chance.choice(children)]
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
        end, hung = time.monotonic() + 60, False
        while children:
            children = [child for child in children if not os.waitpid(child, os.WNOHANG)[0]]
            if time.monotonic() > end:
                hung = True
                for child in children:
                    os.kill(child, signal.SIGKILL)
            time.sleep(0.01)
        steps = [first, *reports]
    return int(steps[-1] or 0), hung


def left_in(folder):
    """Return the step of the newest whole checkpoint, having checked that all values are it, and what is beside it."""
    model = nn.ParameterDict({"w": torch.zeros(300, 200), "v": torch.zeros(7)})
    found = surefoot.load(folder, model=model)
    assert all(bool((param == found.step).all()) for param in model.values()), found
    assert found.extra == found.step
    return found.step, len(found.skipped), len(list(folder.glob("*.shards")))


def main():
    folder, attempts, world = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    chance = random.Random(7)  # noqa: S311
    for number in range(attempts):
        place = folder / f"run-{number % 2}"
        reported, hung = attempt(place, number, world, chance, background=bool(number % 2))
        step, skipped, shards = left_in(place)
        found = {"reported": reported, "hung": hung, "step": step, "skipped": skipped, "shards": shards}
        sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
