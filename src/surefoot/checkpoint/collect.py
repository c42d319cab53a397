"""What a checkpoint holds: objects of a training loop as parts of a manifest, and the tensors that they refer to."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from surefoot.checkpoint.dtypes import name as dtype_name
from surefoot.checkpoint.json_codec import encode, spell
from surefoot.checkpoint.rng import rng_state
from surefoot.tensors.shards import is_sharded


@runtime_checkable
class Stateful(Protocol):
    """Anything that has a state to save and load: schedulers, scalers, samplers, data loaders."""

    def state_dict(self) -> Any:
        """Return the state."""

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Take a state."""


ROLES: dict[str, tuple[Any, str]] = {
    "model": (nn.Module, "a torch.nn.Module"),
    "optimizer": (torch.optim.Optimizer, "an optimizer"),
    "scheduler": (Stateful, "an object with state_dict and load_state_dict"),
    "scaler": (Stateful, "an object with state_dict and load_state_dict"),
    "sampler": ((Stateful, torch.Generator), "a torch.Generator or an object with state_dict and load_state_dict"),
}
"""What `save` and `load` take, the type it must have, and the type in words."""
Objects = Mapping[str, Any]


def objects_of(**roles: Any) -> dict[str, Any]:
    """Return the objects of all roles under labels: `model`, or `model.a` and `model.b` for a dict or list of several.

    Raises:
        TypeError: an object cannot have its role.
    """
    found: dict[str, Any] = {}
    for role, given in roles.items():
        for label, value in _labelled(role, given):
            kind, words = ROLES[role]
            if not isinstance(value, kind):
                raise TypeError(f"`{label}` must be {words}, but is {type(value).__name__}")
            found[label] = value
    return found


def _labelled(role: str, given: Any) -> list[tuple[str, Any]]:
    if given is None:
        return []
    if isinstance(given, Mapping):
        return [(f"{role}.{key}", value) for key, value in given.items()]
    if isinstance(given, list | tuple):
        return [(f"{role}.{index}", value) for index, value in enumerate(given)]
    return [(role, given)]


def names_in_models(objects: Objects) -> dict[Tensor, str]:
    """Name every parameter of the models; those of one among several begin with its key."""
    models = {label: model for label, model in objects.items() if isinstance(model, nn.Module)}
    names: dict[Tensor, str] = {}
    for label, model in models.items():
        key = label.partition(".")[2]
        for name, param in model.named_parameters():
            names.setdefault(param, f"{key}.{name}" if key else name)
    return names


def names_in_optimizer(optimizer: torch.optim.Optimizer, known: Mapping[Tensor, str]) -> list[str] | None:
    """Return the names of an optimizer's parameters: its own, or those in the models; None unless all are named."""
    groups = optimizer.param_groups
    if all(len(group.get("param_names") or ()) == len(group["params"]) for group in groups):
        return [name for group in groups for name in group["param_names"]]
    names = [known.get(param) for group in groups for param in group["params"]]
    complete = None not in names and len(set(names)) == len(names)
    return cast("list[str]", names) if complete else None


@dataclass
class Contents:
    """Parts of a manifest, and the tensors that they refer to, each once.

    Attributes:
        parts: by label.
        tensors: by name.
    """

    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    _names: dict[Any, str] = field(default_factory=dict)
    _held: list[Tensor] = field(default_factory=list)  # memory that is freed may be another tensor's next

    @property
    def sharded(self) -> dict[str, Tensor]:
        """Those that are divided over ranks."""
        return {name: tensor for name, tensor in self.tensors.items() if is_sharded(tensor)}

    @property
    def plain(self) -> dict[str, Tensor]:
        """Those that are not."""
        return {name: tensor for name, tensor in self.tensors.items() if not is_sharded(tensor)}

    def keep(self, tensor: Tensor, path: tuple[Any, ...]) -> str:
        """Take a tensor; return its name, which is an earlier one's if it is the same memory."""
        memory: tuple[Any, ...] = (tensor.data_ptr(), tensor.dtype, tensor.device, tensor.shape, tensor.stride())
        marks: tuple[Any, ...] = (tensor.is_conj(), tensor.is_neg()) if tensor.numel() else (id(tensor),)
        if is_sharded(tensor):
            # A rank's shard may be empty, and all ranks must give a tensor the same name.
            local = tensor.to_local()  # type: ignore[attr-defined]
            memory = (local.untyped_storage()._cdata, local.storage_offset(), *memory[1:])
            marks = (tensor.placements, tensor.device_mesh)  # type: ignore[attr-defined]
            self._held.append(local)
        if (memory, marks) not in self._names:
            self._names[memory, marks] = self._new_name(".".join(map(str, path)))
            self.tensors[self._names[memory, marks]] = tensor
        return self._names[memory, marks]

    def _new_name(self, wanted: str) -> str:
        """Return a name that no tensor has; different paths may spell alike."""
        candidates = chain([wanted], (f"{wanted}#{number}" for number in range(2, len(self.tensors) + 3)))
        return next(name for name in candidates if name not in self.tensors)

    def copy(self) -> "Contents":
        """Copy all tensors to memory of the CPU, so that training can go on."""
        return Contents(self.parts, {name: tensor.to("cpu", copy=True) for name, tensor in self.tensors.items()})


def collect_contents(objects: Objects, extra: Any, *, rng: bool) -> Contents:
    """Collect what is to be saved.

    Args:
        objects: see `objects_of`.
        extra: plain data.
        rng: whether to include the global random generators.

    Raises:
        TypeError: something is not plain data; the message names its place.
    """
    contents, names = Contents(), names_in_models(objects)
    for label, value in objects.items():
        contents.parts[label] = _encoded_object(label, value, names, contents)
    if rng:
        contents.parts["rng"] = {"kind": "rng", "state": encode(rng_state(), ("rng",), contents.keep)}
    if extra is not None:
        contents.parts["extra"] = {"kind": "plain", "state": encode(extra, ("extra",), contents.keep)}
    return contents


def _encoded_object(label: str, value: Any, names: Mapping[Tensor, str], contents: Contents) -> dict[str, Any]:
    kind = type(value).__name__
    if isinstance(value, nn.Module):
        return {"kind": "model", "class": kind, **_model(label, value, contents)}
    if isinstance(value, torch.optim.Optimizer):
        return {"kind": "optimizer", "class": kind, **_optimizer(label, value, names, contents)}
    if isinstance(value, torch.Generator):
        state = encode(value.get_state(), (label,), contents.keep)
        return {"kind": "generator", "class": kind, "device": value.device.type, "state": state}
    return {"kind": "stateful", "class": kind, "state": encode(value.state_dict(), (label,), contents.keep)}


def _model(label: str, model: nn.Module, contents: Contents) -> dict[str, Any]:
    state = model.state_dict()
    metadata = getattr(state, "_metadata", None)
    first: dict[Tensor, str] = {}
    ties = {
        name: first[param]
        for name, param in model.named_parameters(remove_duplicate=False)
        if first.setdefault(param, name) != name
    }
    return {
        "state": [[name, encode(value, (label, name), contents.keep)] for name, value in state.items()],
        "metadata": encode(None if metadata is None else dict(metadata), (f"{label} metadata",), contents.keep),
        "parameters": [name for name, _ in model.named_parameters()],
        "tied": ties,
    }


def _optimizer(
    label: str, optimizer: torch.optim.Optimizer, known: Mapping[Tensor, str], contents: Contents
) -> dict[str, Any]:
    state_dict, names = optimizer.state_dict(), names_in_optimizer(optimizer, known)
    return encoded_optimizer(label, state_dict, list(_parameter_records(optimizer, state_dict, names)), contents)


def _parameter_records(
    optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any], names: list[str] | None
) -> Iterator[dict[str, Any]]:
    """Return number, name, shape and dtype of each parameter."""
    params = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    numbers = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    for index, (param, number) in enumerate(zip(params, numbers, strict=True)):
        name = names[index] if names else None
        yield {"number": number, "name": name, "shape": list(param.shape), "dtype": dtype_name(param.dtype)}


def encoded_optimizer(
    label: str, state_dict: Mapping[str, Any], parameters: list[dict[str, Any]], contents: Contents
) -> dict[str, Any]:
    """Return the part of an optimizer's state dict.

    Args:
        label: of the part.
        state_dict: as `Optimizer.state_dict` returns it.
        parameters: number, name (or None), shape and dtype of each parameter.
        contents: takes the tensors.
    """
    names = {parameter["number"]: parameter["name"] for parameter in parameters}
    groups = [_group(label, index, group, contents) for index, group in enumerate(state_dict["param_groups"])]
    state = [
        [encode(key, (label, "state"), contents.keep), encode(entry, (label, names.get(key) or key), contents.keep)]
        for key, entry in state_dict["state"].items()
    ]
    return {"parameters": parameters, "groups": groups, "state": state}


def _group(label: str, index: int, group: Mapping[str, Any], contents: Contents) -> dict[str, Any]:
    options = {name: value for name, value in group.items() if name != "params"}
    path = (label, "param_groups", index)
    for number in group["params"]:
        if type(number) is not int:
            raise TypeError(f"{spell((*path, 'params'))} must hold numbers, but holds {number!r}")
    return {"options": encode(options, path, contents.keep), "params": list(group["params"])}
