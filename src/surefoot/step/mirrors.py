"""Groups that mirror an optimizer's: the same options, and other parameters, or some of them only."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from surefoot.tensors.guards import same_objects

OF_PARAMS = ("params", "param_names")
"""Keys of a group that are no options."""
Groups = list[dict[str, Any]]


class MirroredGroups:
    """Groups with the options of an optimizer's and parameters of their own.

    What has not changed is the same object from step to step, so that step caches hold.

    Attributes:
        groups: the groups.
    """

    def __init__(self) -> None:
        self.groups: Groups = []
        self._numbers: list[int] = []

    def follow(self, groups: Groups, params: Mapping[int, Sequence[tuple[int, Tensor]]]) -> None:
        """Mirror some groups.

        Args:
            groups: the optimizer's.
            params: by the number of each group that is mirrored, what its mirror holds: pairs of a parameter's place in
                the group and the tensor that stands there.
        """
        self._numbers = list(params)
        self.groups += [{} for _ in params][len(self.groups) :]
        del self.groups[len(params) :]
        for mirror, number in zip(self.groups, self._numbers, strict=True):
            names, own = groups[number].get("param_names"), params[number]
            _hold(mirror, "params", [tensor for _, tensor in own])
            _hold(mirror, "param_names", None if names is None else [names[place] for place, _ in own])
        self.copy_options_from(groups)

    def copy_options_from(self, groups: Groups) -> None:
        """Copy the options of the optimizer's groups."""
        for mirror, number in zip(self.groups, self._numbers, strict=True):
            _copy_options(mirror, groups[number])

    def copy_options_to(self, groups: Groups) -> None:
        """Copy the options that the mirrors have now to the optimizer's groups."""
        for mirror, number in zip(self.groups, self._numbers, strict=True):
            _copy_options(groups[number], mirror)


def _hold(group: dict[str, Any], name: str, found: list[Any] | None) -> None:
    if found is None:
        group.pop(name, None)
    elif name not in group or not same_objects(group[name], found):
        group[name] = found


def _copy_options(mine: dict[str, Any], theirs: Mapping[str, Any]) -> None:
    for name in [name for name in mine if name not in theirs and name not in OF_PARAMS]:
        del mine[name]
    mine.update((name, value) for name, value in theirs.items() if name not in OF_PARAMS)
