"""Modes and transforms that must see torch's operations: while one is active, nothing may be done behind torch's back.

Fake tensors (memory estimators), `make_fx`, `torch.func`, counters and loggers are such; what they do not see is
missing from what they find, and a tensor under them may be a stand-in without memory.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack

_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_transform = torch._C._functorch.peek_interpreter_stack


def mode_is_active() -> bool:
    """Return whether a mode or transform is active that must see operations."""
    if _dispatch_modes() or _transform() is not None:
        return True
    if not _function_modes():
        return False
    stack: list[object] = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    return not all(map(_only_places, stack))


def _only_places(mode: object) -> bool:
    """Return whether a mode is that of `torch.set_default_device`, which says where tensors are made."""
    device: Any = sys.modules.get("torch.utils._device")
    return device is not None and isinstance(mode, device.DeviceContext)


@contextmanager
def outside_inference() -> Iterator[None]:
    """Let tensors that are made be such as may be written in every mode, though inference mode is on."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(mode=False), torch.set_grad_enabled(False):
        yield


def is_stand_in(tensor: Tensor) -> bool:
    """Return whether a tensor of torch's own type stands for another one in a transform, and has no memory itself."""
    if _transform() is None:
        return False
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor) or torch._is_functional_tensor(tensor)


def has_no_values(tensor: Tensor) -> bool:
    """Return whether a tensor's values cannot be read: it is fake, on meta, or stands in for another."""
    fake: Any = sys.modules.get("torch._subclasses.fake_tensor")
    return tensor.is_meta or (fake is not None and isinstance(tensor, fake.FakeTensor)) or is_stand_in(tensor)
