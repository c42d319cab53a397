"""Plain parameters that are divided over ranks by somebody else, who does not say so in them."""

import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


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


def refuse_flattened(params: Sequence[Tensor], name: str, *, whole_tensors: bool = False) -> None:
    """Refuse parameters of FSDP1 where nobody has said over which ranks they are divided, or where that is no help.

    Args:
        params: the parameters.
        name: the algorithm's name.
        whole_tensors: whether it needs to know more of a tensor than what a rank has of it.

    Raises:
        RuntimeError: a parameter is flattened by FSDP1, or a view of one that is.
    """
    if "torch.distributed.fsdp" in sys.modules and any(getattr(p, "_fsdp_flattened", False) for p in params):
        if whole_tensors:
            raise RuntimeError(
                f"{name} needs its parameters whole, but they are flattened by FSDP1, so that a rank has only its part "
                f"of them and does not know which; use `torch.distributed.fsdp.fully_shard`"
            )
        raise RuntimeError(
            f"{name} is to look at all gradients, but its parameters are flattened by FSDP1, so that a rank has only "
            f"its part of them and does not know it; pass `process_group=` (FSDP's own), or use "
            f"`torch.distributed.fsdp.fully_shard`"
        )


def refuse_divided_by_module(model: nn.Module) -> None:
    """Refuse modules that reduce gradients over ranks after a hook of the parameter has seen them.

    Raises:
        TypeError: there is one of DDP or of FSDP1.
    """
    for kind, where in _DIVIDING:
        found = getattr(sys.modules.get(where), kind, None)
        if found is not None and any(isinstance(module, found) for module in model.modules()):
            raise TypeError(
                f"{kind} reduces gradients over ranks after they have come to their parameters, which would be stepped "
                f"by those of one rank; use `torch.distributed.fsdp.fully_shard`"
            )


_DIVIDING = (
    ("DistributedDataParallel", "torch.nn.parallel.distributed"),
    ("FullyShardedDataParallel", "torch.distributed.fsdp"),
)
