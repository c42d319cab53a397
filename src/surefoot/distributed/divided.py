"""Plain parameters that are divided over ranks by somebody else, who does not say so in them."""

import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor


def dividing_group() -> Any:
    """Return the process group of the `ZeroRedundancyOptimizer` that is making an optimizer now, None without one."""
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    frame = None if module is None else sys._getframe(1)
    while frame is not None:
        maker = frame.f_locals.get("self")
        if isinstance(maker, module.ZeroRedundancyOptimizer):  # type: ignore[union-attr]
            return maker.process_group
        frame = frame.f_back
    return None


def refuse_flattened(params: Sequence[Tensor], name: str) -> None:
    """Refuse parameters of FSDP1 where nobody has said over which ranks they are divided.

    Raises:
        RuntimeError: a parameter is flattened by FSDP1, or a view of one that is.
    """
    if "torch.distributed.fsdp" in sys.modules and any(getattr(p, "_fsdp_flattened", False) for p in params):
        raise RuntimeError(
            f"{name} is to look at all gradients, but its parameters are flattened by FSDP1, so that a rank has only "
            f"its part of them and does not know it; pass `process_group=` (FSDP's own), or use "
            f"`torch.distributed.fsdp.fully_shard`"
        )
