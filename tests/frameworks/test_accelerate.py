"""Hugging Face's Accelerate."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

import surefoot
from conftest import difference, run_script, seeded

SCRIPT = """
import sys

import torch
from accelerate import Accelerator
from torch import nn

optim = torch.optim if sys.argv[2] == "torch" else __import__("surefoot")
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
data = torch.utils.data.TensorDataset(torch.randn(64, 8), torch.randn(64, 1))
optimizer = optim.AdamW(model.parameters(), lr=1e-2)
model, optimizer, loader = accelerator.prepare(model, optimizer, torch.utils.data.DataLoader(data, batch_size=4))
assert accelerator.num_processes == 2


def train():
    for inputs, targets in loader:
        with accelerator.accumulate(model):
            accelerator.backward(nn.functional.mse_loss(model(inputs), targets))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()


train()
accelerator.save_state("state")
train()
first = [param.detach().clone() for param in model.parameters()]
accelerator.load_state("state")
train()
assert all(torch.equal(a, b) for a, b in zip(first, model.parameters()))
if accelerator.is_main_process:
    torch.save(first, sys.argv[1])
accelerator.end_training()
"""


@pytest.fixture(autouse=True)
def fresh_state():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def make_loader():
    generator = torch.Generator().manual_seed(1)
    inputs, targets = (torch.randn(48, size, generator=generator) for size in (8, 1))
    data = torch.utils.data.TensorDataset(inputs, targets)
    return torch.utils.data.DataLoader(data, batch_size=4, shuffle=True)


def make_model():
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))


class Loop:
    """A training with Accelerate, that can be gone on with."""

    def __init__(self, cls, scheduler=None, options=(), **settings):
        AcceleratorState._reset_state(reset_partial_state=True)
        self.accelerator = Accelerator(cpu=True, **settings)
        self.plain, loader = make_model(), make_loader()
        optimizer = cls(self.plain.parameters(), lr=1e-2, **dict(options))
        schedulers = [scheduler(optimizer)] if scheduler else []
        self.model, self.optimizer, self.loader, *self.schedulers = self.accelerator.prepare(
            self.plain, optimizer, loader, *schedulers
        )

    def train(self, clip=None):
        for inputs, targets in self.loader:
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(nn.functional.mse_loss(self.model(inputs), targets))
                if clip and self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), clip)
                self.optimizer.step()
                for scheduler in self.schedulers:
                    scheduler.step()
                self.optimizer.zero_grad()
        return list(self.plain.parameters())


def one_cycle(optim):
    return lambda optimizer: optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=100)


def test_prepare(compare):
    """`prepare` with a scheduler."""
    compare(lambda optim: Loop(optim.Adam, one_cycle(optim)).train())


def test_accumulate_and_clip(compare):
    """`accumulate` over 3 batches and `clip_grad_norm_`."""
    compare(lambda optim: Loop(optim.AdamW, one_cycle(optim), gradient_accumulation_steps=3).train(clip=0.1))


def test_bf16(compare):
    """`mixed_precision="bf16"`."""
    compare(lambda optim: Loop(optim.AdamW, mixed_precision="bf16").train(), tolerance=1e-2)


def saved_and_loaded(optim, options=(), cls="AdamW"):
    loop = Loop(getattr(optim, cls), one_cycle(optim), options)
    loop.train()
    loop.accelerator.save_state("state")
    again = Loop(getattr(optim, cls), one_cycle(optim), options)
    again.accelerator.load_state("state")
    torch.manual_seed(5)
    return again.train()


def test_save_and_load_state(compare):
    """`save_state` and `load_state`."""
    compare(saved_and_loaded)


@pytest.mark.parametrize(
    "options", [{"ema": 0.9, "max_grad_norm": 0.5}, {"state_dtype": "float8"}, {"telemetry": True}], ids=str
)
def test_save_and_load_state_with_options(record_property, options):
    """`save_state` and `load_state` with options of the step or 8-bit state: the bits of the run that went on."""

    def going_on():
        loop = Loop(surefoot.AdamW, one_cycle(surefoot), options)
        loop.train()
        torch.manual_seed(5)
        return loop.train()

    again = seeded(lambda: saved_and_loaded(surefoot, options))
    record_property("difference", value := difference(again, seeded(going_on)))
    assert value == 0


def test_schedule_free(record_property):
    """Schedule-free: `train()` and `eval()` of the prepared optimizer."""

    def accelerated():
        loop = Loop(surefoot.AdamWScheduleFree)
        loop.optimizer.train()
        loop.train()
        loop.optimizer.eval()
        return list(loop.plain.parameters())

    def bare():
        model, loader = make_model(), make_loader()
        optimizer = surefoot.AdamWScheduleFree(model.parameters(), lr=1e-2)
        for inputs, targets in loader:
            nn.functional.mse_loss(model(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
        optimizer.eval()
        return list(model.parameters())

    record_property("difference", value := difference(seeded(accelerated), seeded(bare)))
    assert value == 0


def test_two_processes(record_property):
    """Two processes: accumulate, clip, save and load."""
    Path("train.py").write_text(SCRIPT)
    weights = {}
    for kind in "torch", "surefoot":
        command = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
        run_script(*command, "train.py", f"{kind}.pt", kind)
        weights[kind] = torch.load(f"{kind}.pt")
    record_property("difference", value := difference(weights["surefoot"], weights["torch"]))
    assert value <= 1e-5
