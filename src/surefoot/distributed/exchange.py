"""Numbers of parameters, put together over the ranks that hold their shards.

Every rank takes part in every exchange, one whose shards are all empty or that has no gradients too: there is a row for
each parameter of the optimizer, in the order of its groups, whatever a rank knows of it.
"""

from collections.abc import Sequence
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from surefoot.tensors.shards import is_sharded, sharded_type, to_local


class _Ranks(NamedTuple):
    """Parameters whose numbers the same ranks know.

    Attributes:
        groups: process groups over which collectives go one after the other, so that together they reach all ranks.
        rows: positions of the parameters.
        weights: for each parameter one divided by the number of ranks that know the same of it: float64.
    """

    groups: tuple[Any, ...]
    rows: Tensor
    weights: Tensor


class Exchange:
    """Puts together what ranks know of an optimizer's parameters; make one with `make_exchange`.

    What several ranks know alike, of replicated parameters and plain ones, is averaged over them, so that all ranks get
    the same number from it.

    Args:
        params: the parameters, in the order of the groups.
        process_group: over which plain parameters are divided, each rank having its own or its part of each, as with
            `ZeroRedundancyOptimizer`; None if every rank has all of them.
    """

    def __init__(self, params: Sequence[Tensor], process_group: Any = None) -> None:
        self.params, self.process_group = list(params), process_group
        self._layouts = _layouts(params)
        by_mesh: dict[Any, list[int]] = {}
        plain = [position for position, param in enumerate(params) if not is_sharded(param)]
        for position, param in enumerate(self.params):
            if is_sharded(param):
                by_mesh.setdefault(param.device_mesh, []).append(position)  # type: ignore[attr-defined]
        self._ranks = [self._of_mesh(mesh, rows) for mesh, rows in by_mesh.items()]
        if self._ranks and process_group is None:
            first = self._ranks[0]
            size = next(iter(by_mesh)).size()
            weights = torch.full((len(plain),), 1 / size, dtype=torch.float64)
            self._ranks[0] = _Ranks(
                first.groups,
                torch.cat([first.rows, torch.tensor(plain, dtype=torch.long)]),
                torch.cat([first.weights, weights]),
            )

    def _of_mesh(self, mesh: Any, rows: list[int]) -> _Ranks:
        """Return the ranks of a mesh; one that holds all ranks needs one collective, whatever its dimensions."""
        from torch import distributed  # noqa: PLC0415 (there is a mesh)

        everyone = mesh.ndim > 1 and mesh.size() == distributed.get_world_size()
        groups = (distributed.group.WORLD,) if everyone else tuple(map(mesh.get_group, range(mesh.ndim)))
        placements = [self.params[row].placements for row in rows]  # type: ignore[attr-defined]
        alike = [
            [mesh.size(dim) for dim, placement in enumerate(each) if placement.is_replicate()] for each in placements
        ]
        weights = [1.0 / torch.Size(sizes).numel() for sizes in alike]
        return _Ranks(groups, torch.tensor(rows), torch.tensor(weights, dtype=torch.float64))

    @property
    def device(self) -> torch.device:
        """The device of the numbers that are put together."""
        own = self.params if self.process_group is not None else filter(is_sharded, self.params)
        return next((to_local(param).device for param in own), torch.device("cpu"))

    @property
    def shards(self) -> Tensor:
        """How many parts of each parameter there are on different ranks, 1 where all have all of it: float64."""
        found = torch.ones(len(self.params), dtype=torch.float64)
        for position, param in enumerate(self.params):
            if is_sharded(param):
                mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
                sizes = [mesh.size(dim) for dim, each in enumerate(placements) if not each.is_replicate()]
                found[position] = torch.Size(sizes).numel()
        return found

    def is_of(self, params: Sequence[Tensor]) -> bool:
        """Return whether this was made for these parameters, sharded as they are."""
        return (
            len(params) == len(self.params) and all(map(is_, params, self.params)) and self._layouts == _layouts(params)
        )

    def sum(self, rows: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
        """Return sums over ranks: one all-reduce for each process group.

        Args:
            rows: what this rank knows of each parameter, to be added up over its shards: float64 of shape
                (parameters, n).
            shared: what is not about a parameter: float64 of shape (m,).

        Returns:
            The sums, in new tensors: of plain parameters that every rank has, the mean.
        """
        rows, shared = rows.clone(), shared.clone()
        for ranks in self._ranks:
            known = rows[ranks.rows] * ranks.weights.to(rows.device)[:, None]
            found = _all_reduced(torch.cat([known.flatten(), shared]), ranks.groups)
            rows[ranks.rows] = found[: known.numel()].view_as(known)
            shared = found[known.numel() :]
        if self.process_group is not None:
            shared = _all_reduced(shared, (self.process_group,))
        return rows, shared

    def sum_groups(self, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        """Return sums over the parameters of each group: one all-reduce, where a process group divides plain ones.

        Args:
            rows: what all ranks know of each parameter, as `sum` returns it: float64 of shape (parameters, n).
            sizes: how many parameters each group has, one group after the other.

        Returns:
            The sums: float64 of shape (groups, n).
        """
        if self.process_group is None:
            return _sums(rows, sizes)
        plain = torch.tensor([not is_sharded(param) for param in self.params], dtype=torch.bool, device=rows.device)
        divided = _all_reduced(_sums(rows * plain[:, None], sizes), (self.process_group,))
        return divided + _sums(rows * ~plain[:, None], sizes)

    def gather(self, numbers: Tensor) -> Tensor:
        """Return the tensors of all ranks that the process group divides parameters over, along a first dimension."""
        return gathered(numbers, self.process_group)

    def combine(self, rows: Tensor, largest: Sequence[int]) -> Tensor:
        """Return sums over ranks, and of some columns the largest, NaN where there is one: one gathering per group.

        Args:
            rows: what this rank knows of each parameter: float64 of shape (parameters, n).
            largest: the columns of which the largest is wanted.
        """
        rows = rows.clone()
        for ranks in self._ranks:
            weights = ranks.weights.to(rows.device)[:, None].expand(-1, rows.shape[1]).clone()
            weights[:, largest] = 1.0
            known = rows[ranks.rows] * weights
            for group in ranks.groups:
                every = gathered(known, group)
                known = every.sum(dim=0)
                known[:, largest] = every[:, :, largest].amax(dim=0)
            rows[ranks.rows] = known
        return rows


def _layouts(params: Sequence[Tensor]) -> list[Any]:
    return [(param.device_mesh, param.placements) if is_sharded(param) else None for param in params]  # type: ignore[attr-defined]


def make_exchange(params: Sequence[Tensor], process_group: Any = None) -> Exchange | None:
    """Return what puts numbers of parameters together over ranks, None if one process knows all of them."""
    if sharded_type() is None and process_group is None:
        return None
    if process_group is None and not any(map(is_sharded, params)):
        return None
    return Exchange(params, process_group)


def _sums(rows: Tensor, sizes: Sequence[int]) -> Tensor:
    return torch.stack([part.sum(dim=0) for part in torch.split(rows, list(sizes))])


def _all_reduced(numbers: Tensor, groups: Sequence[Any]) -> Tensor:
    from torch import distributed  # noqa: PLC0415 (there are ranks)

    for group in groups:
        distributed.all_reduce(numbers, group=group)
    return numbers


def gathered(numbers: Tensor, group: Any) -> Tensor:
    """Return the tensors of all ranks of a group, along a first dimension."""
    from torch import distributed  # noqa: PLC0415

    size = distributed.get_world_size(group)
    every = numbers.new_empty(size * numbers.numel())
    gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
    gather(every, numbers.flatten(), group=group)
    return every.view(size, *numbers.shape)
