"""The next letter of a text, with FSDP2: torchrun --nproc-per-node 2 examples/distributed/fsdp2_text.py"""

import pydoc_data.topics

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import surefoot as optim


def main():
    distributed.init_process_group("gloo")
    rank, world = distributed.get_rank(), distributed.get_world_size()
    torch.manual_seed(0)
    text = "".join(pydoc_data.topics.topics.values())[:6_000].encode("ascii", "replace")
    letters = torch.tensor(list(text), dtype=torch.long)
    contexts, following = letters[:-1].unfold(0, 8, 1), letters[8:]
    own = slice(rank, None, world)

    model = nn.Sequential(nn.Embedding(128, 16), nn.Flatten(), nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128))
    mesh = init_device_mesh("cpu", (world,))
    for layer in (model[0], model[2], model[4], model):
        fully_shard(layer, mesh=mesh)  # every rank keeps its rows of each weight, and of the optimizer's state

    # The norm, and what is done about NaN, are of all ranks together: one all-reduce a step.
    optimizer = optim.AdamW(model.named_parameters(), lr=3e-3, max_grad_norm=1.0, nonfinite="skip")
    for step in range(40):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(contexts[own]), following[own])
        loss.backward()
        optimizer.step()
        if rank == 0 and step % 10 == 0:
            print(f"step {step:3} loss {loss.item():.4f}")
    right = (model(contexts).argmax(dim=1) == following).float().mean().item()
    if rank == 0:
        print(f"{right:.1%} of the letters are foretold")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
