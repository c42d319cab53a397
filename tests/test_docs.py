"""The code blocks of README and docs do what they say: each page's run in order, by a reader who trains in between."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import surefoot

ROOT = Path(__file__).parents[1]
ELSEWHERE = "frameworks.md"
"""The page whose scripts run where the frameworks are, in tests/frameworks."""
PAGES = [ROOT / "README.md", *sorted(page for page in (ROOT / "docs").glob("*.md") if page.name != ELSEWHERE)]
BATCH = torch.ones(4, 3)
SKIPPED = {
    "torch.cuda.graph(": "needs a GPU; tests/engines/test_gpu_device.py captures steps",
    "fully_shard(": "needs several processes; tests/distributed/test_failing_ranks.py trains so",
    "ZeroRedundancyOptimizer(": "the same",
    "process_group=": "the same",
}
"""Blocks that are not run, by words in them, and why."""


def blocks(page):
    """Return the Python blocks of a page, each with the line on which it begins."""
    text = page.read_text(encoding="utf-8")
    for found in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield text.count("\n", 0, found.start(1)) + 1, found[1]


def loss_of(model, batch):
    return model(batch).square().mean()


class Loss:
    """What a reader has computed before a block that goes on with `loss.backward()`."""

    def __init__(self, model):
        self.model = model

    def backward(self):
        loss_of(self.model, BATCH).backward()


def belongings():
    """Return what the pages take for granted."""
    torch.manual_seed(0)
    model = nn.Sequential()
    model.body, model.head = nn.Sequential(nn.Linear(3, 5), nn.Tanh()), nn.Linear(5, 2)
    optimizer = surefoot.AdamW(model.parameters())
    return {
        "model": model,
        "body": model.body.parameters(),
        "head": model.head.parameters(),
        "batches": [BATCH] * 3,
        "optimizer": optimizer,
        "scheduler": surefoot.lr_scheduler.StepLR(optimizer, 10),
        "loss": Loss(model),
        "evaluate": lambda model: model(BATCH),
    }


def train_step(model, optimizer):
    optimizer.zero_grad()
    loss = loss_of(model, BATCH)
    loss.backward()
    optimizer.step()
    return loss.item()


def reason_to_skip(code):
    return next((reason for words, reason in SKIPPED.items() if words in code), None)


PAGES_WITH_CODE = [page for page in PAGES if any(not reason_to_skip(code) for _, code in blocks(page))]


@pytest.mark.parametrize("page", PAGES_WITH_CODE, ids=lambda page: page.name)
def test_code_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope = belongings()
    scope["train_step"] = lambda: train_step(scope["model"], scope["optimizer"])
    for line, code in blocks(page):
        if reason_to_skip(code):
            continue
        before = dict(scope)
        # Its lines are numbered as in the page, so that a failure points there.
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), scope)  # noqa: S102 (what we ourselves have written)
        made = [value for name, value in scope.items() if value is not before.get(name)]
        algorithms = [kind for kind in made if isinstance(kind, type) and issubclass(kind, surefoot.Optimizer)]
        for optimizer in (scope["optimizer"], *(kind(scope["model"].parameters()) for kind in algorithms)):
            train_step(scope["model"], optimizer)
    if "telemetry" in scope:
        scope["telemetry"].close()


def test_blocks_are_found_and_skipped_for_a_reason():
    code = [code for page in PAGES for _, code in blocks(page)]
    assert len(code) == sum(page.read_text(encoding="utf-8").count("```python") for page in PAGES)
    assert all(any(words in block for block in code) for words in SKIPPED)
