"""The placeholder of a gradient that is in the host's memory."""

from typing import Any

import torch
from torch import Tensor


class OffloadedGradient(Tensor):
    """Says that a parameter has a gradient, and refuses to be computed with; `p.grad = None` drops it as usual."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Raise RuntimeError: no function of torch can have the gradient's values."""
        raise RuntimeError(
            "this gradient is in the CPU's memory, where optimizer.step() will use it (`Optimizer.offload`), and "
            "cannot be computed with on the device. To clip, pass `max_grad_norm` or `max_grad_value` to the "
            'optimizer; instead of a GradScaler, train in bfloat16 or pass nonfinite="skip"; norms are in '
            "`optimizer.telemetry`; `zero_grad()` drops it"
        )


def offloaded_gradient(param: Tensor) -> OffloadedGradient:
    """Return a placeholder for a parameter's gradient, without memory for its elements."""
    return torch.empty((), dtype=param.dtype, device=param.device).expand(param.shape).as_subclass(OffloadedGradient)
