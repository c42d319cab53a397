"""State dicts of other implementations of an algorithm, read as if this one had written them.

Keys tell what they are: what options and state are called elsewhere stands in `Optimizer.also_called`, and some keep
numbers, such as the count of steps, for a whole group.  What another implementation computes differently is refused,
not read as something else.
"""

from collections.abc import Mapping
from typing import Any

from surefoot.rule import ALGORITHM, AlgorithmSpec

_DECOUPLED = ("decoupled", "weight_decouple", "decouple_weight_decay", "decoupled_decay")
"""What others call `decoupled_weight_decay`, where an algorithm may have it on and off."""
_OURS = "decoupled_weight_decay"


def translate(
    spec: AlgorithmSpec, groups: list[dict[str, Any]], state: Mapping[Any, Any]
) -> tuple[list[dict[str, Any]], dict[Any, Any]]:
    """Return the groups and the state of a state dict under our names.

    Raises:
        ValueError: weight decay was no part of the gradient there and always is here, or the other way round.
    """
    found, entries = [], dict(state)
    for given in groups:
        own = spec.algorithms.get(str(given.get(ALGORITHM))) if spec.algorithms else spec
        if own is None or not own.is_declared:
            found.append(given)
            continue
        group = _translated_group(own, given)
        numbers = {scalar.name for scalar in own.scalars} - set(own.constructor)
        kept = {name: group.pop(name) for name in numbers & group.keys()}
        for key in group["params"]:
            if isinstance(entry := entries.get(key), Mapping) and entry:
                entries[key] = {**kept, **_renamed(own, entry)}
        found.append(group)
    return found, entries


def _translated_group(spec: AlgorithmSpec, group: Mapping[str, Any]) -> dict[str, Any]:
    found = _renamed(spec, group)
    for theirs in (name for name in _DECOUPLED if name in found and name not in spec.constructor):
        value = bool(found.pop(theirs))
        if _OURS in spec.constructor:
            found.setdefault(_OURS, value)
            continue
        always = "cautious_weight_decay" in spec.flags
        if value != always and found.get("weight_decay"):
            raise ValueError(
                f"the state dict has `{theirs}={value}`, but weight decay of {spec.name} is "
                f"{'always' if always else 'never'} decoupled; take `{theirs}` out to go on so, nothing was loaded"
            )
    if "fixed_decay" not in spec.constructor and not found.get("fixed_decay"):
        found.pop("fixed_decay", None)
    return found


def _renamed(spec: AlgorithmSpec, found: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group or an entry of state with our names; what stands there under these already is kept.

    What has no name here is left out.
    """
    names = {theirs: ours for theirs, ours in spec.also_called.items() if theirs in found}
    new = {name: value for name, value in found.items() if name not in names}
    return {our: found[theirs] for theirs, ours in names.items() for our in ours} | new
