"""What a kernel reads beside tensors: small tables on the device, to which only what has changed is sent.

What is sent goes from pinned memory, asynchronously, on the current stream.  While a graph is captured, everything is
sent, from memory that is the graph's own from then on: each replay sends it again, whatever other steps have changed.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

SPARES = 16
"""Graphs that may be captured between two steps outside of one: no pinned memory can be had while capturing."""
_kept_for_graphs: list[Any] = []


def capturing(device: torch.device) -> bool:
    """Return whether what is done on a device now goes into a graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Make a device the current one, to which Triton launches."""
    module: Any = getattr(torch, device.type)
    return module.device(device) if device.type != "cpu" else nullcontext()


def keep_for_graphs(*memory: Tensor) -> None:
    """Keep memory that a graph refers to.  Nobody says when the graph is gone, so it is never given back."""
    _kept_for_graphs.append(memory)


class Table:
    """Numbers on a device, and what they were set to last by a step that was not captured.

    Attributes:
        there: the numbers, on the device.

    Args:
        values: the numbers.
        device: the device.
        for_graphs: how often at most a captured step sets them.
    """

    def __init__(self, values: np.ndarray, device: torch.device, *, for_graphs: int = 0) -> None:
        self._sent = values.ravel().copy()
        self._pinned = device.type != "cpu"
        self._for_graphs = for_graphs
        self._spares: list[Tensor] = []
        self._in_graphs = False
        self.there = torch.empty(values.shape, dtype=torch.from_numpy(self._sent).dtype, device=device)
        self._send(0, len(self._sent))
        self._provide()

    def update(self, values: np.ndarray) -> None:
        """Set the numbers; send from the first that has changed to the last, while a graph is captured all of them.

        Raises:
            RuntimeError: more graphs are captured than there is memory set aside for.
        """
        new = values.ravel()
        if capturing(self.there.device):
            self._send_by_graph(new)
            return
        self._provide()
        # What a graph has set since, nobody knows here.
        changed = np.arange(len(new)) if self._in_graphs else np.flatnonzero(_bits(new) != _bits(self._sent))
        if len(changed):
            first, end = int(changed[0]), int(changed[-1]) + 1
            self._sent[first:end] = new[first:end]
            self._send(first, end)

    def _send(self, first: int, end: int) -> None:
        # Torch gives a pinned tensor's memory to others only when the copy from it has been made.
        here = self._staging(end - first).copy_(torch.from_numpy(self._sent[first:end]))
        self.there.view(-1)[first:end].copy_(here, non_blocking=True)

    def _provide(self) -> None:
        """Set memory aside for graphs."""
        if missing := SPARES * self._for_graphs - len(self._spares):
            self._spares += self._staging(missing, len(self._sent)).unbind()

    def _send_by_graph(self, values: np.ndarray) -> None:
        if not self._spares:
            raise RuntimeError(
                f"at most {SPARES} graphs may be captured in a row; take a step outside of a capture before the next"
            )
        self._in_graphs = True
        here = self._spares.pop().copy_(torch.from_numpy(values))
        self.there.view(-1).copy_(here, non_blocking=True)
        keep_for_graphs(self.there, here)

    def _staging(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.there.dtype, pin_memory=self._pinned)


def _bits(values: np.ndarray) -> np.ndarray:
    return values.view(f"i{values.itemsize}")
