"""The ranks that save or load together: what one of them finds wrong is wrong for all, and none waits for ever."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from surefoot.tensors.shards import is_sharded

T = TypeVar("T")
_BACKGROUND: dict[Any, Any] = {}
"""For a default process group the one in which its ranks write in the background."""


class Ranks:
    """All ranks of the default process group, or this process alone.

    Args:
        group: the process group; None for this process alone.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.rank: int = 0 if group is None else group.rank()
        self.world: int = 1 if group is None else group.size()

    @property
    def alone(self) -> bool:
        """Whether there are no others."""
        return self.group is None

    def gather(self, value: T) -> list[T]:
        """Return what each rank has."""
        if self.group is None:
            return [value]
        found: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(found, value, group=self.group)
        return found

    def do(self, action: Callable[[], T], what: str) -> list[T]:
        """Let each rank do something; return what each has got.

        Args:
            action: what is done; it must not speak to other ranks.
            what: it in words, for the message.

        Raises:
            RuntimeError: it has failed on another rank.  On that one its error is raised as it is.
        """
        value, error = None, None
        try:
            value = action()
        except Exception as raised:
            if self.group is None:
                raise
            error = raised
        told = self.gather((None if error is None else f"{type(error).__name__}: {error}", value))
        if error is not None:
            raise error
        for rank, (message, _) in enumerate(told):
            if message is not None:
                raise RuntimeError(f"{what} has failed on rank {rank}: {message}")
        return [value for _, value in told]  # type: ignore[misc]

    def first(self, action: Callable[[], T], what: str) -> T:
        """Let the first rank do something, and return on all what it has got; see `do`."""
        return self.do(lambda: action() if self.rank == 0 else None, what)[0]  # type: ignore[return-value]

    def in_background(self) -> "Ranks":
        """Return the same ranks, who speak by another group, while a thread and the training speak at once."""
        key = torch.distributed.group.WORLD
        if key not in _BACKGROUND:
            _BACKGROUND.clear()  # of a world that was destroyed
            _BACKGROUND[key] = torch.distributed.new_group(backend="gloo")
        return Ranks(_BACKGROUND[key])


ALONE = Ranks()


def ranks_of(objects: Mapping[str, Any]) -> Ranks:
    """Return all ranks if parameters of models or optimizers are sharded, else this process alone."""
    if not any(map(is_sharded, _tensors(objects))):
        return ALONE
    return Ranks(torch.distributed.group.WORLD)


def _tensors(objects: Mapping[str, Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in objects.values():
        if isinstance(value, nn.Module):
            found += [*value.parameters(), *value.buffers()]
        elif isinstance(value, torch.optim.Optimizer):
            found += parameters_of(value)
    return found


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return all parameters of an optimizer."""
    return [param for group in optimizer.param_groups for param in group["params"]]
