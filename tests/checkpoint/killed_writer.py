"""Saves checkpoints again and again until it is killed; run as a program by the tests and benchmarks/checkpoint.py.

    python killed_writer.py FOLDER MEGABYTES [async]

It prints the number of each step when its `save` has returned, or, when asynchronous, when the one after it has begun.
Step n holds n everywhere, so that whoever looks can tell a mixture.
"""

import sys

import torch

import surefoot


def main() -> None:
    torch.set_num_threads(1)
    folder, megabytes, background = sys.argv[1], float(sys.argv[2]), sys.argv[3:] == ["async"]
    model = torch.nn.ParameterDict({f"w{i}": torch.zeros(int(megabytes * 62_500)) for i in range(4)})
    optimizer = surefoot.SGD(model.named_parameters(), foreach=False)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    step = 1 + max((int(path.stem[5:]) for path in surefoot.checkpoint.Path(folder).glob("step-*")), default=0)
    while True:
        for param in model.values():
            param.data.fill_(step)
        surefoot.save(folder, model=model, optimizer=optimizer, step=step, keep=2, async_=background)
        sys.stdout.write(f"{step - background}\n")
        sys.stdout.flush()
        step += 1


if __name__ == "__main__":
    main()
