"""The next letter of a text, with DDP: torchrun --nproc-per-node 2 examples/distributed/ddp_text.py"""

import pydoc_data.topics

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import surefoot as optim


def main():
    distributed.init_process_group("gloo")
    rank, world = distributed.get_rank(), distributed.get_world_size()
    torch.manual_seed(0)
    text = "".join(pydoc_data.topics.topics.values())[:6_000].encode("ascii", "replace")
    letters = torch.tensor(list(text), dtype=torch.long)
    contexts, following = letters[:-1].unfold(0, 8, 1), letters[8:]
    own = slice(rank, None, world)  # every rank trains on its part of the data

    layers = nn.Embedding(128, 16), nn.Flatten(), nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128)
    model = DistributedDataParallel(nn.Sequential(*layers))
    optimizer = optim.AdamW(model.parameters(), lr=3e-3, max_grad_norm=1.0, zero_grad_after_step=True)
    for step in range(40):
        loss = nn.functional.cross_entropy(model(contexts[own]), following[own])
        loss.backward()
        optimizer.step()
        if rank == 0 and step % 10 == 0:
            print(f"step {step:3} loss {loss.item():.4f}")
    if rank == 0:
        right = (model.module(contexts).argmax(dim=1) == following).float().mean().item()
        print(f"{right:.1%} of the letters are foretold")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
