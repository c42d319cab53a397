"""The backward pass that a thread is in, and calls at its end."""

from collections.abc import Callable
from typing import Any

import torch

_task_id: Callable[[], int] | None = getattr(torch._C, "_current_graph_task_id", None)
_engine: Any = getattr(torch.autograd.Variable, "_execution_engine", None)

_available = _task_id is not None and hasattr(_engine, "queue_callback")

OUTSIDE = -1
"""What `backward_pass` returns outside of a backward pass, and where torch does not tell."""


def backward_pass() -> int:
    """Return the number of the backward pass that this thread is in, `OUTSIDE` if there is none."""
    return _task_id() if _available and _task_id is not None else OUTSIDE


def call_at_end_of_backward(call: Callable[[], object]) -> None:
    """Let `call` be called when the backward pass that this thread is in has come to its end, unless it fails."""
    _engine.queue_callback(call)
