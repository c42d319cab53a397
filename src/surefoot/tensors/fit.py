"""Whether a gradient or a tensor of state fits its parameter, for every engine: torch would broadcast or cast some."""

from typing import Any

import torch
from torch import Tensor

from surefoot.tensors.gate import lost_memory
from surefoot.tensors.memory import has_address, is_writable, overlaps_itself
from surefoot.tensors.shards import is_sharded, sharding_mismatch, to_local


def unfit_param(param: Tensor) -> str | None:
    """Return why a tensor cannot be stepped as a parameter, None if it can."""
    if not (param.is_floating_point() or param.is_complex()):
        return f"is {param.dtype}; only floating point and complex parameters can be stepped"
    if param.is_nested or param.layout is not torch.strided or param._is_zerotensor():
        return (
            f"is {_layout(param)}; only dense parameters with memory of their own can be stepped: give the optimizer "
            f"its values as a dense tensor"
        )
    if param.is_complex() and param.is_conj():
        return "is conjugated lazily; give it values of its own with `p.data = p.data.resolve_conj()`"
    return unfit_memory(param)


def unfit(
    tensor: Any, param: Tensor, shape: torch.Size | None, *, placements: bool = True, kinds: bool = True
) -> str | None:
    """Return why a gradient or a tensor of state does not belong to a parameter, None if it does.

    Args:
        tensor: the gradient, of any layout, or the state.
        param: the parameter.
        shape: the shape that it must have.
        placements: whether it must be laid out over ranks as the parameter is, beyond being on the same mesh.
        kinds: whether it must be real or complex as the parameter is.
    """
    if not isinstance(tensor, Tensor):
        return f"is {type(tensor).__name__}, must be a tensor"
    if tensor.is_nested:
        return "is a nested tensor, must be a dense one"
    if tensor.shape != shape:
        return f"has shape {tuple(tensor.shape)}, must have {'none' if shape is None else tuple(shape)}"
    if tensor.device != param.device:
        return f"must be on {param.device}, but is on {tensor.device}"
    if kinds and (tensor.is_complex() != param.is_complex() or not (tensor.is_complex() or tensor.is_floating_point())):
        kind = "complex" if param.is_complex() else "real and floating point"
        return f"is {tensor.dtype}, must be {kind} as the parameter is {param.dtype}"
    return sharding_mismatch(tensor, param, placements=placements)


def unfit_state(tensor: Any, param: Tensor, shape: torch.Size | None, *, kinds: bool = True) -> str | None:
    """Return why a tensor of state, which a step writes, does not belong to a parameter, None if it does.

    Args:
        tensor: the state.
        param: the parameter.
        shape: the shape that it must have.
        kinds: whether it must be real or complex as the parameter is; else it may hold codes.
    """
    if (reason := unfit(tensor, param, shape, kinds=kinds)) is not None:
        return reason
    if tensor.layout is not torch.strided or tensor._is_zerotensor() or tensor.is_conj():
        return f"is {_layout(tensor)}, must be a dense tensor with memory of its own"
    return unfit_memory(tensor)


def unfit_memory(tensor: Tensor, *, written: bool = True) -> str | None:
    """Return why the memory of a strided tensor cannot be read, or written, None if it can."""
    local = to_local(tensor) if is_sharded(tensor) else tensor
    with torch._C.DisableTorchFunctionSubclass():
        if written and not is_writable(local):
            return "is an inference tensor, which can be written in inference mode only; clone it"
        if not has_address(local):
            return None  # what such a tensor's memory is, only its own operations know
        if (reason := lost_memory(local)) is not None:
            return reason
        if written and overlaps_itself(local):
            return f"has several elements at a single memory location (strides {local.stride()}); clone it"
    return None


def _layout(tensor: Tensor) -> str:
    if tensor.is_nested or tensor._is_zerotensor():
        return "nested" if tensor.is_nested else "a zero tensor"
    return "conjugated lazily" if tensor.is_conj() else str(tensor.layout)
