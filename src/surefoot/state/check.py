"""Whether gradients and state fit their parameter, and the form in which a step takes a gradient."""

import math
from collections.abc import Mapping
from numbers import Real
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from surefoot.rule import STEP, AlgorithmSpec, Flags, Sparse
from surefoot.state.formats import CORRECTION, CORRECTIONS, takes_correction
from surefoot.storage import scale_shape
from surefoot.tensors.fit import unfit, unfit_memory, unfit_param, unfit_state
from surefoot.tensors.gate import admit_rows
from surefoot.tensors.shards import format_layout, is_sharded, match_layout, sharding_mismatch, to_local

CAPTURABLE_DEVICES = ("cuda", "xpu", "hpu", "privateuseone", "xla")


def format_param(group: Mapping[str, Any], param: Tensor) -> str:
    """Return a parameter's name for a message: its name, or its position in the group, and its shape."""
    position = next(i for i, candidate in enumerate(group["params"]) if candidate is param)
    names = group.get("param_names") or ()
    name = names[position] if position < len(names) else f"params[{position}]"
    return f"`{name}` of shape {tuple(param.shape)}"


def hyperparameters(group: Mapping[str, Any]) -> SimpleNamespace:
    """Return a group's options as attributes; tensors of one element as 0-d tensors."""
    return SimpleNamespace(
        **{
            name: _zero_dim(value) if isinstance(value, (Tensor, tuple)) else value
            for name, value in group.items()
            if isinstance(name, str) and name != "params"
        }
    )


def _zero_dim(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dim():
        return value.squeeze()
    return tuple(_zero_dim(item) for item in value) if isinstance(value, tuple) else value


def validated_gradient(
    spec: AlgorithmSpec, group: Mapping[str, Any], param: Tensor, grad: Any, entry: Mapping[str, Any], flags: Flags = ()
) -> Tensor:
    """Return the gradient of a parameter in a layout that its algorithm takes.

    Raises:
        RuntimeError: a sparse gradient where the algorithm takes none, a dense one where it takes only sparse, a
            gradient or state that does not fit its parameter, or a parameter that cannot be stepped.
        IndexError: a sparse gradient has rows outside of its shape.
        AssertionError: `capturable=True` on a device where steps cannot be captured.
        TypeError: scalar state is not a number.
    """
    if group.get("capturable") and param.device.type not in CAPTURABLE_DEVICES:
        raise AssertionError(
            f"If capturable=True, params and state_steps must be on supported devices: {list(CAPTURABLE_DEVICES)}, "
            f"but {format_param(group, param)} is on {param.device}"
        )
    if param.is_complex() and not spec.complex_params:
        raise RuntimeError(
            f"{spec.name} does not support complex parameters, but {format_param(group, param)} is {param.dtype}"
        )
    if (reason := unfit_param(param)) is not None:
        raise RuntimeError(f"{format_param(group, param)} {reason}")
    if (reason := unfit(grad, param, param.shape, placements=False)) is not None:
        raise RuntimeError(
            f"the gradient of {format_param(group, param)} {reason}; set it to None after changing a parameter"
        )
    check_state(spec, group, param, entry)
    if held := [slot.name for slot in spec.eval_slots if entry.get(slot.name) is not None]:
        raise RuntimeError(
            f"the state of {format_param(group, param)} has `{held[0]}`, so it is that of {spec.name} in eval mode, "
            f"and the parameter is not what is to be stepped; call optimizer.train(), and take state and parameters "
            f"after that"
        )
    if grad.layout is torch.strided:
        return _dense_gradient(spec, group, param, grad)
    return _sparse_gradient(spec, group, param, grad, flags)


def _dense_gradient(spec: AlgorithmSpec, group: Mapping[str, Any], param: Tensor, grad: Tensor) -> Tensor:
    if spec.sparse is Sparse.ONLY:
        raise RuntimeError(f"{spec.name} does not support dense gradients, please consider Adam instead")
    if (reason := unfit_memory(grad, written=False)) is not None:
        raise RuntimeError(f"the gradient of {format_param(group, param)} {reason}")
    try:
        laid_out: Tensor = match_layout(param, grad).resolve_conj().resolve_neg()
    except RuntimeError as error:
        raise RuntimeError(
            f"the gradient of {format_param(group, param)} is {format_layout(grad)}, the parameter "
            f"{format_layout(param)}, and cannot be redistributed: {error}"
        ) from error
    if (reason := sharding_mismatch(laid_out, param)) is not None:
        raise RuntimeError(f"the gradient of {format_param(group, param)} {reason}")
    return torch.zeros_like(param) if laid_out._is_zerotensor() else laid_out


def _sparse_gradient(
    spec: AlgorithmSpec, group: Mapping[str, Any], param: Tensor, grad: Tensor, flags: Flags
) -> Tensor:
    if not grad.is_sparse or spec.sparse is Sparse.REFUSED:
        raise RuntimeError(f"{spec.name} does not support sparse gradients{spec.instead_of_sparse}")
    if "weight_decay" in spec.flags and group.get("weight_decay"):
        raise RuntimeError("weight_decay option is not compatible with sparse gradients; set weight_decay=0")
    if group.get("gradient_centralization"):
        raise RuntimeError(
            f"the gradient of {format_param(group, param)} is sparse, which gradient_centralization=True cannot "
            f"take; put the parameter into a group with gradient_centralization=False"
        )
    rows = admit_rows(grad, lambda: format_param(group, param))
    return rows if spec.rows_suffice(dict(flags)) else rows.to_dense()


def stepped_gradient(
    spec: AlgorithmSpec, group: Mapping[str, Any], param: Tensor, grad: Any, entry: Mapping[str, Any], flags: Flags
) -> Tensor:
    """Return the gradient that a rule steps by: what `validated_gradient` returns, its rows centralized if asked."""
    found = validated_gradient(spec, group, param, grad, entry, flags)
    return match_layout(param, centralized(found)) if group.get("gradient_centralization") else found


def centralized(grad: Tensor) -> Tensor:
    """Return a gradient, of two dimensions at least, less the mean of each of its rows; else the gradient itself.

    One of 16 bits becomes one of float32: differences need not have a place in its dtype.
    """
    if grad.dim() < 2:  # noqa: PLR2004 (a vector is no row of a matrix)
        return grad
    wide, dims = grad.to(torch.promote_types(grad.dtype, torch.float32)), tuple(range(1, grad.dim()))
    if is_sharded(wide):  # of shards of unlike sizes torch 2.9 takes the mean of means
        return wide - wide.sum(dims, keepdim=True) / max(1, math.prod(grad.shape[1:]))
    return wide - wide.mean(dims, keepdim=True)


def check_state(spec: AlgorithmSpec, group: Mapping[str, Any], param: Tensor, entry: Mapping[str, Any]) -> None:
    """Refuse state that does not fit its parameter (any more).

    Raises:
        RuntimeError: a tensor of state does not fit; the message names it.
        TypeError: scalar state is not a number.
    """
    for scalar in spec.scalars:
        if scalar.name in entry:
            _check_scalar(scalar.name, entry[scalar.name], group, param)
    for slot in spec.known_slots:
        if (value := entry.get(slot.name)) is None:
            if slot.begun and STEP.name in entry and slot.shape_for(param, group) is not None:
                raise _missing_state(slot.name, group, param)
            continue
        in_codes = isinstance(value, Tensor) and value.dtype is torch.uint8 and slot.float8
        reason = unfit_state(value, param, slot.shape_for(param, group), kinds=not (in_codes or slot.is_number))
        if reason is None and slot.is_number and not value.is_floating_point():
            reason = f"is {value.dtype}, must be real and floating point"
        if reason is not None:
            raise _unfit_state(f"state `{slot.name}`", group, param, reason)
        if in_codes and (reason := _unfit_scale(value, entry.get(f"{slot.name}_scale"), param)) is not None:
            raise _unfit_state(f"state `{slot.name}_scale`", group, param, reason)
    if (correction := entry.get(CORRECTION)) is not None and (reason := _unfit_correction(correction, param)):
        raise _unfit_state(f"state `{CORRECTION}`", group, param, reason)


def _unfit_state(name: str, group: Mapping[str, Any], param: Tensor, reason: str) -> RuntimeError:
    return RuntimeError(
        f"{name} of {format_param(group, param)} on {param.device} {reason}; after replacing or moving a parameter, "
        f"move its state with `optimizer.to()`, or delete it with `del optimizer.state[param]`"
    )


def _missing_state(name: str, group: Mapping[str, Any], param: Tensor) -> RuntimeError:
    return RuntimeError(
        f"state `{name}` of {format_param(group, param)} is missing, which only its first step makes; put it back, and "
        f"the options that it depends on, or begin anew with `del optimizer.state[param]`"
    )


def _unfit_scale(codes: Tensor, scale: Any, param: Tensor) -> str | None:
    """Return why a tensor is not the scale of a slot kept in 8 bits, None if it is."""
    if not isinstance(scale, Tensor) or scale.dtype is not torch.float32:
        return f"is {scale.dtype if isinstance(scale, Tensor) else type(scale).__name__}, must be a float32 tensor"
    if scale.shape != scale_shape(codes.shape):
        return f"has shape {tuple(scale.shape)}, must have {tuple(scale_shape(codes.shape))}"
    if is_sharded(scale) != is_sharded(param) or scale.device != param.device:
        return f"is {format_layout(scale)} on {scale.device}, the parameter {format_layout(param)} on {param.device}"
    return None if to_local(scale).is_contiguous() else "is not contiguous"


def _unfit_correction(correction: Any, param: Tensor) -> str | None:
    """Return why a tensor is not the correction of a parameter, None if it is."""
    if not isinstance(correction, Tensor) or correction.dtype not in CORRECTIONS.values():
        kind = correction.dtype if isinstance(correction, Tensor) else type(correction).__name__
        return f"is {kind}, must be an int8 or int16 tensor"
    if not takes_correction(param):
        return f"belongs to a bfloat16 or float16 parameter, which this is not any more ({param.dtype})"
    return unfit_state(correction, param, param.shape, kinds=False)


def _check_scalar(name: str, value: Any, group: Mapping[str, Any], param: Tensor) -> None:
    if not _is_one_number(value):
        shown = (
            f"a tensor of {value.dtype} and shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        )
        raise TypeError(
            f"state `{name}` must be a number or a tensor of one element, but is {shown} for "
            f"{format_param(group, param)}"
        )
    reason = "is on meta, which holds no number" if isinstance(value, Tensor) and value.is_meta else None
    if isinstance(value, Tensor) and (reason := reason or unfit_memory(value)) is not None:
        raise RuntimeError(f"state `{name}` of {format_param(group, param)} {reason}")


def _is_one_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_nested and value.numel() == 1 and not value.is_complex()
    return isinstance(value, Real) or (isinstance(value, np.ndarray) and value.size == 1 and value.dtype.kind in "fiu")
