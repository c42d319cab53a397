"""Names for parameters that an optimizer was given without: those that the models in memory have for them."""

import functools
import gc
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import Module

_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.")
_PARALLEL = (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel)


def parameter_names(optimizer: torch.optim.Optimizer) -> list[str]:
    """Name every parameter of an optimizer, group by group, each differently.

    A group's own `param_names` count first, as `AdamW(model.named_parameters())` makes them.  Else a model in memory
    that has the parameter names it, without what `torch.compile`, FSDP and DistributedDataParallel put in front.  A
    tensor of no model is named by its place.

    To find models it looks through all objects of the program, some 0.1 s in a large one; it remembers what it found
    until the groups hold other parameters.

    Args:
        optimizer: any optimizer.

    Returns:
        As many names as there are parameters.
    """
    return names_of_groups(optimizer.param_groups, optimizer)


def names_of_groups(groups: Sequence[Mapping[str, Any]], owner: Any) -> list[str]:
    """Return what `parameter_names` does for the groups of an optimizer, remembered as long as `owner` is there."""
    given = [(*map(id, group["params"]), *group.get("param_names", ())) for group in groups]
    if owner not in _found or _found[owner][0] != given:
        _found[owner] = given, _names(groups)
    return list(_found[owner][1])


def _names(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    known = {} if all("param_names" in group for group in groups) else _names_in_models()
    names = [name for index, group in enumerate(groups) for name in _of_group(group, index, len(groups), known)]
    return list(_distinct(names))


_found: WeakKeyDictionary[Any, tuple[Any, list[str]]] = WeakKeyDictionary()


def _of_group(group: Mapping[str, Any], index: int, groups: int, known: Mapping[Tensor, str]) -> Iterator[str]:
    where = "" if groups == 1 else f"param_groups[{index}]."
    given = group.get("param_names") or ()  # fewer than parameters, if somebody has added to `params` only
    for param, name, position in zip_longest(group["params"], given, range(len(group["params"]))):
        if param is not None:
            yield known.get(param, f"{where}params[{position}]") if name is None else str(name)


def _names_in_models() -> dict[Tensor, str]:
    """Return the names of all parameters of all models; with the model's class in front if several models share one."""
    models = [(type(model).__name__, dict(_named(model))) for model in _models()]
    counts = Counter(name for _, names in models for name in set(names.values()))
    found: dict[Tensor, str] = {}
    for model, names in models:
        for param, name in names.items():
            found.setdefault(param, f"{model}.{name}" if counts[name] > 1 else name)
    return found


def _models() -> list[Module]:
    """Return the modules that are part of no other."""
    objects = gc.get_objects()
    classes = {each for each in set(map(type, objects)) if issubclass(each, Module)}
    modules = [each for each in objects if type(each) in classes and "_modules" in vars(each)]
    parts = {id(part) for module in modules for part in module._modules.values()}
    return [module for module in modules if id(module) not in parts]


def _named(model: Module) -> Iterator[tuple[Tensor, str]]:
    parallel = any(isinstance(part, _PARALLEL) for part in model.modules())
    for name, param in model.named_parameters():
        plain = functools.reduce(lambda text, wrapper: text.replace(wrapper, ""), _WRAPPERS, name)
        yield param, plain.removeprefix("module.") if parallel else plain


def _distinct(names: list[str]) -> Iterator[str]:
    """Number the names that stand there several times."""
    seen: Counter[str] = Counter()
    for name in names:
        seen[name] += 1
        yield name if seen[name] == 1 else f"{name} ({seen[name]})"
