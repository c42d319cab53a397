"""What tests of checkpoints share: a small model with its optimizer, comparison, and files with a right checksum."""

import json
import zlib
from copy import deepcopy
from typing import Any

import torch
from torch import nn

import surefoot
from surefoot.checkpoint.header import LENGTH

CRC = slice(len(b'{"__metadata__":{"crc32":"'), len(b'{"__metadata__":{"crc32":"') + 8)


def make(seed: int = 0, **options: Any) -> tuple[nn.Module, surefoot.Optimizer]:
    """Make a model and its optimizer, which has taken a step."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2, bias=False))
    optimizer = surefoot.AdamW(model.parameters(), lr=0.1, foreach=False, **options)
    return train(model, optimizer), optimizer


def train(model: nn.Module, optimizer: Any, steps: int = 1) -> nn.Module:
    for _ in range(steps):
        model(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def state_of(*objects: Any) -> list[Any]:
    """Copy everything that loading could change."""
    return deepcopy([one.get_state() if isinstance(one, torch.Generator) else one.state_dict() for one in objects])


def minimal(path, **options: Any):
    """Save as little as possible, to have few bytes."""
    parameter = nn.Parameter(torch.arange(3.0))
    optimizer = surefoot.SGD([("weight", parameter)], momentum=0.5, foreach=False)
    parameter.grad = torch.ones(3)
    optimizer.step()
    return surefoot.save(path, optimizer=optimizer, rng=False, **options)


def forge(path, change) -> None:
    """Let `change` edit header and manifest of a file, and make its checksum right again."""
    data = path.read_bytes()
    length = int.from_bytes(data[:LENGTH], "little")
    header = json.loads(data[LENGTH : LENGTH + length])
    manifest = json.loads(header["__metadata__"]["surefoot"])
    change(header, manifest)
    header["__metadata__"] = {"crc32": "0" * 8, "format": "pt", "surefoot": json.dumps(manifest)}
    write_header(path, json.dumps(header, separators=(",", ":")).encode(), data[LENGTH + length :])


def write_header(path, text: bytes, rest: bytes = b"") -> None:
    """Write a file with a header whose checksum is right."""
    text = text.ljust(-(-(len(text) + LENGTH) // 64) * 64 - LENGTH)
    text = text[: CRC.start] + b"0" * 8 + text[CRC.stop :]
    text = text[: CRC.start] + f"{zlib.crc32(text):08x}".encode() + text[CRC.stop :]
    path.write_bytes(len(text).to_bytes(LENGTH, "little") + text + rest)
