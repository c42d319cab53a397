"""The placeholder of a gradient that is in the host's memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_CONVERSIONS = {
    Tensor.to,
    Tensor.type,
    Tensor.double,
    Tensor.float,
    Tensor.half,
    Tensor.bfloat16,
    Tensor.cpu,
    Tensor.cuda,
}
_FACTS = {
    Tensor.is_floating_point,
    Tensor.is_complex,
    Tensor.dim,
    Tensor.is_leaf.__get__,  # type: ignore[attr-defined]
    Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
}
"""What is asked of a gradient beside its values when a module is converted."""


class OffloadedGradient(Tensor):
    """Says that a parameter has a gradient, and refuses to be computed with; `p.grad = None` drops it as usual.

    What converts a module, such as `model.double()`, gets the gradient itself, converted, on the device.

    Attributes:
        on_device: returns the gradient, on the device; None if there is none any more.
    """

    on_device: Callable[[], Tensor | None]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Raise RuntimeError: no function of torch can have the gradient's values, but for conversions."""
        if func is torch._has_compatible_shallow_copy_type:
            return False  # what a conversion gives is another tensor
        if func in _FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args)
        if func in _CONVERSIONS and (gradient := args[0].on_device()) is not None:
            return func(gradient, *args[1:], **(kwargs or {}))
        raise RuntimeError(
            "this gradient is in the CPU's memory, where optimizer.step() will use it (`Optimizer.offload`), and "
            "cannot be computed with on the device. To clip, pass `max_grad_norm` or `max_grad_value` to the "
            'optimizer; instead of a GradScaler, train in bfloat16 or pass nonfinite="skip"; norms are in '
            "`optimizer.telemetry`; `zero_grad()` drops it"
        )


def offloaded_gradient(param: Tensor) -> OffloadedGradient:
    """Return a placeholder for a parameter's gradient, without memory for its elements."""
    return torch.empty((), dtype=param.dtype, device=param.device).expand(param.shape).as_subclass(OffloadedGradient)


def put_gradient(param: Tensor, grad: Tensor) -> None:
    """Let a parameter have a gradient, of the dtype that it had when the gradient came too."""
    if grad.dtype is param.dtype:
        param.grad = grad
        return
    param.grad = torch.empty_like(param.detach())
    param.grad.data = grad
