"""Run by `test_examples.py`: examples, each on two ranks as torchrun would start them, but forked.

What they import takes longer than they do, and is imported once.  Prints as JSON what each has printed.
"""

import functools
import json
import os
import runpy
import sys
import traceback
from pathlib import Path

import torch
import torch._dynamo  # which sharded tensors import
from torch import distributed
from torch.distributed import fsdp  # noqa: F401
from torch.nn import parallel  # noqa: F401

import surefoot.optimizers.adam  # noqa: F401

WORLD = 2


def start(path, rank, folder):
    """Fork a rank of an example, which prints into a file; return its process."""
    child = os.fork()
    if child:
        return child
    try:
        output = os.open(folder / f"{path.stem}.{rank}", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
        store = f"file://{folder}/{path.stem}.store"
        distributed.init_process_group = functools.partial(
            distributed.init_process_group, init_method=store, rank=rank, world_size=WORLD
        )
        runpy.run_path(str(path), run_name="__main__")
        sys.stdout.flush()
        os._exit(0)
    except BaseException:  # noqa: BLE001 (a child must not go on as its parent)
        traceback.print_exc()
        os._exit(1)


def main():
    folder, paths = Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]]
    torch.set_num_threads(1)
    children = [start(path, rank, folder) for path in paths for rank in range(WORLD)]
    failed = [os.waitpid(child, 0)[1] for child in children]
    printed = {
        path.stem: "".join((folder / f"{path.stem}.{rank}").read_text() for rank in range(WORLD)) for path in paths
    }
    json.dump(printed, sys.stdout)
    sys.exit(any(failed))


if __name__ == "__main__":
    main()
