"""From torch's files to ours and back.  Theirs are opened with `weights_only=True`: no code in them is run."""

import os
import pickle
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from surefoot.checkpoint.collect import Contents, encoded_optimizer
from surefoot.checkpoint.json_codec import decode, encode
from surefoot.checkpoint.reader import Checkpoint
from surefoot.checkpoint.writer import replacing, write
from surefoot.files import open_regular

_ROLES: dict[str, tuple[str, ...]] = {
    "model": ("model", "model_state_dict", "state_dict", "module", "net"),
    "optimizer": ("optimizer", "optimizer_state_dict", "optim", "opt", "optimizer_states"),
    "scheduler": ("scheduler", "scheduler_state_dict", "lr_scheduler", "lr_scheduler_state_dict", "lr_schedulers"),
    "scaler": ("scaler", "scaler_state_dict", "grad_scaler"),
}
"""Under which keys trainers keep what."""
_STEPS = ("step", "global_step", "iteration")


class Taken(NamedTuple):
    """What became of an entry of torch's file.

    Attributes:
        key: its key.
        label: the part that it is now.
    """

    key: str
    label: str


def from_torch(path: Path) -> tuple[Contents, int | None, list[Taken]]:
    """Read a file of `torch.save`: a state dict of a model or an optimizer, or a dict of such and of plain data.

    Returns:
        The contents, the step if an entry says it, and what became of each entry.

    Raises:
        ValueError: the file holds objects that only running code could restore, or is not a dict.
        TypeError: it holds something that is not plain data.
        OSError: it cannot be opened.
    """
    data = _load_torch_file(path)
    if not isinstance(data, Mapping):
        raise ValueError(f"{path} holds a {type(data).__name__}, not a dict of state dicts; save a dict")  # noqa: TRY004
    whole = _whole(data)
    contents, taken = Contents(), []
    extra: dict[Any, Any] = {}
    for key, value in whole.items():
        if key == "extra" and isinstance(value, Mapping):
            extra.update(value)
            taken.append(Taken(key, "extra"))
            continue
        found = list(_parts_of_entry(str(key), value))
        if not found:
            extra[key] = value
        for label, part in found:
            contents.parts[label] = _encoded_entry(label, part, contents)
        taken += [Taken(str(key), label) for label, _ in found] or [Taken(str(key), f"extra[{key!r}]")]
    if extra:
        contents.parts["extra"] = {"kind": "plain", "class": None, "state": encode(extra, ("extra",), contents.keep)}
    steps = (whole[key] for key in _STEPS if type(whole.get(key)) is int)
    return contents, next(steps, None), taken


def _load_torch_file(path: Path) -> Any:
    open_regular(path).close()  # torch would wait for a named pipe
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is damaged, or holds more than tensors and plain data, which only running code could restore: "
            f"{error}"
        ) from None
    except Exception as error:  # torch's reader raises what comes first
        raise ValueError(f"{path} is not a whole file of torch.save: {error!r}") from error


def _whole(data: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """Return a dict of parts, also for a file that is one state dict."""
    if _is_optimizer(data):
        return {"optimizer": data}
    return {"model": data} if data and _is_model(data) else data


def _is_optimizer(value: Any) -> bool:
    return isinstance(value, Mapping) and {"state", "param_groups"} <= value.keys()


def _is_model(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())


def _parts_of_entry(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Return the parts in an entry, none if it is of no known kind."""
    role = next((role for role, keys in _ROLES.items() if key in keys), None)
    role = "optimizer" if role is None and _is_optimizer(value) else role
    values = value if isinstance(value, list) and value else [value]
    fits = {"model": _is_model, "optimizer": _is_optimizer}.get(role or "", lambda one: isinstance(one, Mapping))
    if role is None or not all(map(fits, values)):
        return
    plain = role if key in _ROLES[role] else f"{role}.{key}"
    for index, one in enumerate(values):
        yield plain if len(values) == 1 else f"{plain}.{index}", one


def _encoded_entry(label: str, value: Mapping[str, Any], contents: Contents) -> dict[str, Any]:
    role = label.partition(".")[0]
    if role == "model":
        state = [[name, encode(tensor, (label, name), contents.keep)] for name, tensor in value.items()]
        metadata = encode(getattr(value, "_metadata", None), (label,), contents.keep)
        return {"kind": "model", "class": None, "state": state, "metadata": metadata, "parameters": [], "tied": {}}
    if role == "optimizer":
        parameters = list(_numbers_and_names(value))
        return {"kind": "optimizer", "class": None, **encoded_optimizer(label, value, parameters, contents)}
    return {"kind": "stateful", "class": None, "state": encode(dict(value), (label,), contents.keep)}


def _numbers_and_names(state_dict: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Return numbers and, if there are any, names; torch's files have no shapes."""
    groups = state_dict["param_groups"]
    numbers = list(chain.from_iterable(group["params"] for group in groups))
    names: list[Any] = list(chain.from_iterable(group.get("param_names") or [] for group in groups))
    names = names if len(names) == len(numbers) else [None] * len(numbers)
    for number, name in zip(numbers, names, strict=True):
        yield {"number": number, "name": name, "shape": None, "dtype": None}


def to_torch(checkpoint: Checkpoint, path: Path) -> dict[str, Any]:
    """Write a checkpoint as a file that `torch.load(path, weights_only=True)` opens; its tensors are copied to memory.

    Returns:
        What was written: state dicts by label, and the extra data.

    Raises:
        CheckpointError: it is damaged.
        OSError: it could not be written; what was at `path` is as it was.
    """
    checkpoint.verify()
    found = {label: _state_dict(part, checkpoint) for label, part in checkpoint.manifest["parts"].items()}
    found |= {"step": checkpoint.manifest["step"]}
    with replacing(path, checkpoint.nbytes) as file, os.fdopen(os.dup(file), "wb") as stream:
        torch.save(found, stream)
    return found


def to_one_file(checkpoint: Checkpoint, path: Path) -> None:
    """Write a checkpoint of sharded tensors as one of a single process; its tensors are copied to memory.

    Raises:
        CheckpointError: it is damaged.
        OSError: it could not be written; what was at `path` is as it was.
    """
    checkpoint.verify()
    manifest = {name: value for name, value in checkpoint.manifest.items() if name != "shards"}
    write(path, {name: checkpoint.tensor(name) for name in checkpoint.places}, manifest)


def _state_dict(part: Mapping[str, Any], checkpoint: Checkpoint) -> Any:
    copies: dict[str, Tensor] = {}

    def fetch(name: str) -> Tensor:
        if name not in copies:  # what was one tensor stays one
            copies[name] = checkpoint.copy(name)
        return copies[name]

    if part["kind"] == "model":
        return OrderedDict((name, _without_numpy(decode(data, fetch))) for name, data in part["state"])
    if part["kind"] == "optimizer":
        groups = [{**decode(group["options"], fetch), "params": group["params"]} for group in part["groups"]]
        return _without_numpy(
            {"state": {decode(k, fetch): decode(v, fetch) for k, v in part["state"]}, "param_groups": groups}
        )
    return _without_numpy(decode(part["state"], fetch))


def _without_numpy(value: Any) -> Any:
    """Return arrays as tensors and numpy's numbers as Python's, which torch opens without being told to trust them."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        items = {key: _without_numpy(item) for key, item in value.items()}
        return type(value)(items) if type(value) in (OrderedDict, Counter) else items
    if type(value) in (list, tuple, set, frozenset):
        return type(value)(_without_numpy(item) for item in value)
    return list(value) if type(value).__name__ == "deque" else value
