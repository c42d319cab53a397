"""What a checkpoint contains, as facts for people and programs; all but `summarize_values` read its header only."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from surefoot import optimizers
from surefoot.checkpoint.dtypes import name as dtype_name
from surefoot.checkpoint.folder import is_file_name, open_headers
from surefoot.checkpoint.header import Place
from surefoot.checkpoint.json_codec import TAG, tensors_in
from surefoot.checkpoint.reader import Checkpoint
from surefoot.errors import CheckpointError
from surefoot.rule import ALGORITHM, AlgorithmSpec
from surefoot.state.formats import CORRECTION
from surefoot.storage import BLOCK, Format, decode, format_8_bits, format_16_bits

_BLOCKS = 1 << 13
"""Blocks that are decoded at a time."""


class TensorTotals(NamedTuple):
    """A number of tensors, summed up.

    Attributes:
        tensors: how many.
        elements: of all.
        nbytes: of all.
        nonfinite: elements that are infinite or NaN.
    """

    tensors: int
    elements: int
    nbytes: int
    nonfinite: int


class ParameterInfo(NamedTuple):
    """A parameter or buffer, and its state in an optimizer.

    Attributes:
        name: its name, or number.
        shape: its shape, None if it is not known.
        dtype: its dtype.
        values: the tensor in a model, None if no model was saved.
        tied_to: the name under which it is stored, if that is another.
        state: by slot its tensor, or the number itself.
    """

    name: str
    shape: tuple[int, ...] | None
    dtype: str | None
    values: Place | None
    tied_to: str | None
    state: Mapping[str, Any]


def open_chosen(path: Path) -> Checkpoint:
    """Open a file, or the newest in a folder whose header is whole.

    Raises:
        CheckpointError: there is none.
        OSError: it cannot be opened.
    """
    if is_file_name(path):
        return Checkpoint(path)
    found, skipped = open_headers(path)
    if not found:
        reasons = "".join(f"\n  {skip.reason}" for skip in skipped)
        raise CheckpointError(f"there is no checkpoint in {path}{reasons}")
    return found[0]


def summarize_values(checkpoint: Checkpoint) -> None:
    """Let norms and counts of what is kept in two tensors be those of its values, for which these tensors are read.

    That is state in 8 bits, whose norm would be one of codes, of algorithms of this library; and weights with a
    correction in the state of their optimizer.
    """
    found = dict(checkpoint.places)
    for first, second, kept in _pairs(checkpoint):
        stored, part = checkpoint.tensor(first).reshape(-1), checkpoint.tensor(second).reshape(-1)
        norm, nonfinite = _measured(kept, stored, part)
        summary = found[first].summary._replace(norm=norm, nonfinite=nonfinite)
        found[first] = replace(found[first], summary=summary)
    checkpoint.places = found


def _pairs(checkpoint: Checkpoint) -> Iterator[tuple[str, str, Format]]:
    """Yield the names of two tensors that together hold values, and their format."""
    parts = checkpoint.manifest["parts"]
    weights: dict[str | None, str] = {
        _full_name(label, name): tensor
        for label, part in parts.items()
        for name, data in (part["state"] if part["kind"] == "model" else ())
        for tensor in places_of(checkpoint, data)
    }
    for part in (part for part in parts.values() if part["kind"] == "optimizer"):
        specs = {number: spec for group in part["groups"] for number, spec in _specs_of_group(part["class"], group)}
        named = {one["number"]: one["name"] for one in part["parameters"]}
        for key, entry in part["state"]:
            held = _tensor_names(checkpoint, entry)
            spec = specs.get(key) if isinstance(key, int) else None
            slots, eval_slots = (spec.all_slots, spec.eval_slots) if spec else ((), ())
            pairs = [(held.get(s.name), held.get(f"{s.name}_scale"), format_8_bits(signed=s.signed)) for s in slots]
            weight, correction = weights.get(named.get(key) if isinstance(key, int) else None), held.get(CORRECTION)
            weight = next((held[s.name] for s in eval_slots if s.name in held), weight)  # whose correction it is then
            if weight is not None and correction is not None:
                dtype, rest = (checkpoint.places[name].dtype for name in (weight, correction))
                pairs.append((weight, correction, format_16_bits(dtype, stochastic=False, correction=rest)))
            for first, second, kept in pairs:
                if first is not None and second is not None and _fit(checkpoint, first, second, kept):
                    yield first, second, kept


def _specs_of_group(name: str | None, group: Mapping[str, Any]) -> list[tuple[int, AlgorithmSpec]]:
    """Return the numbers of a group's parameters, each with its algorithm; none of an unknown one."""
    options = group["options"] if isinstance(group["options"], dict) else {}
    algorithm = options.get(ALGORITHM, name)
    if algorithm not in optimizers.__all__:
        return []
    return [(number, getattr(optimizers, algorithm).spec) for number in group["params"]]


def _tensor_names(checkpoint: Checkpoint, entry: Any) -> dict[str, str]:
    """Return under which names the tensors of a parameter's state stand in the file."""
    entry = entry if isinstance(entry, dict) and TAG not in entry else {}
    return {slot: name for slot, data in entry.items() for name in places_of(checkpoint, data)}


def _fit(checkpoint: Checkpoint, first: str, second: str, kept: Format) -> bool:
    """Return whether two tensors are what a format says."""
    stored, part = checkpoint.places[first], checkpoint.places[second]
    expected = (torch.float32, -(-stored.elements // BLOCK)) if kept.code else (kept.correction, stored.elements)
    return stored.dtype is kept.dtype and (part.dtype, part.elements) == expected


def _measured(kept: Format, stored: Tensor, part: Tensor) -> tuple[float, int]:
    """Return the norm of the finite values, and how many are not finite."""
    sizes = (_BLOCKS * BLOCK, _BLOCKS if kept.code else _BLOCKS * BLOCK)
    norms, nonfinite = [], 0
    for piece, its_part in zip(torch.split(stored, sizes[0]), torch.split(part, sizes[1]), strict=True):
        values = decode(kept, piece, its_part)
        finite = values.isfinite()
        nonfinite += values.numel() - int(finite.sum())
        norms.append(float(torch.linalg.vector_norm(values.where(finite, 0).double())))
    return math.hypot(*norms), nonfinite


def total(places: Iterable[Place]) -> TensorTotals:
    """Sum up tensors."""
    found = list(places)
    return TensorTotals(
        len(found),
        sum(place.elements for place in found),
        sum(place.nbytes for place in found),
        sum(place.summary.nonfinite for place in found),
    )


def places_of(checkpoint: Checkpoint, data: Any) -> dict[str, Place]:
    """Return the tensors to which encoded data refers, each once."""
    return {name: checkpoint.places[name] for name in tensors_in(data) if name in checkpoint.places}


def groups_of(checkpoint: Checkpoint, label: str) -> list[dict[str, Any]]:
    """Return the param groups of an optimizer: hyperparameters as they print, and numbers of parameters."""
    return [
        {name: shown(value, checkpoint) for name, value in group["options"].items() if name != "param_names"}
        | {"params": group["params"]}
        for group in checkpoint.manifest["parts"][label]["groups"]
    ]


def shown(value: Any, checkpoint: Checkpoint) -> Any:
    """Return plain data in the plainest form: tuples as lists, tensors by their names."""
    if isinstance(value, list):
        return [shown(item, checkpoint) for item in value]
    if not isinstance(value, dict):
        return value
    place = next(iter(places_of(checkpoint, value).values()), None)
    if value.get(TAG) == "tensor" and place is not None and place.elements == 1:
        number = checkpoint.tensor(value["of"]).item()
        return number if isinstance(number, int | float) else str(number)
    return shown(value.get("of"), checkpoint) if TAG in value else {k: shown(v, checkpoint) for k, v in value.items()}


def parameters_of(checkpoint: Checkpoint, label: str) -> list[ParameterInfo]:
    """Return what a model, or an optimizer that stands alone, has; a model's with their state in every optimizer."""
    part = checkpoint.manifest["parts"][label]
    if part["kind"] == "optimizer":
        return [*_of_optimizer(checkpoint, part)]
    state = _states(checkpoint)
    return [
        _of_model(checkpoint, name, data, part, state.get(_full_name(label, name), {})) for name, data in part["state"]
    ]


def _full_name(label: str, name: str) -> str:
    """Return what optimizers call a model's parameter."""
    key = label.partition(".")[2]
    return f"{key}.{name}" if key else name


def _of_model(
    checkpoint: Checkpoint, name: str, data: Any, part: Mapping[str, Any], state: Mapping[str, Any]
) -> ParameterInfo:
    place = checkpoint.places.get(next(iter(tensors_in(data)), ""))
    if place is None:
        return ParameterInfo(name, None, None, None, None, {})
    return ParameterInfo(name, place.shape, dtype_name(place.dtype), place, part["tied"].get(name), state)


def _of_optimizer(checkpoint: Checkpoint, part: Mapping[str, Any]) -> Iterator[ParameterInfo]:
    entries = {key: entry for key, entry in part["state"] if isinstance(key, int)}
    for one in part["parameters"]:
        shape = None if one["shape"] is None else tuple(one["shape"])
        name = str(one["number"]) if one["name"] is None else one["name"]
        state = _slots(checkpoint, entries.get(one["number"], {}))
        yield ParameterInfo(name, shape, one["dtype"], None, None, state)


def _states(checkpoint: Checkpoint) -> dict[str, Mapping[str, Any]]:
    """Return the state in all optimizers by the names of parameters."""
    optimizers = [part for part in checkpoint.manifest["parts"].values() if part["kind"] == "optimizer"]
    return {one.name: one.state for part in optimizers for one in _of_optimizer(checkpoint, part)}


def _slots(checkpoint: Checkpoint, entry: Any) -> dict[str, Any]:
    """Return the slots of an entry: tensors as places, counters and other numbers as they are."""
    entry = entry if isinstance(entry, dict) and TAG not in entry else {}
    found: dict[str, Any] = {}
    for name, data in entry.items():
        places = list(places_of(checkpoint, data).values())
        value = shown(data, checkpoint) if not places or places[0].elements == 1 else places
        found[name] = places[0] if value is places and len(places) == 1 else value
    return found


def as_json(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return everything but the values of tensors, ready for JSON."""
    manifest = checkpoint.manifest
    own = {name: manifest[name] for name in ("format", "step", "sequence", "saved_at", "versions")}
    return {
        "path": str(checkpoint.path),
        "bytes": checkpoint.nbytes,
        **own,
        "parts": {label: _part_facts(checkpoint, label) for label in manifest["parts"]},
        "tensors": {name: tensor_facts(place) for name, place in checkpoint.places.items()},
    }


def _part_facts(checkpoint: Checkpoint, label: str) -> dict[str, Any]:
    part = checkpoint.manifest["parts"][label]
    found = {"kind": part["kind"], "class": part.get("class")}
    found |= total(places_of(checkpoint, part).values())._asdict()
    if part["kind"] == "optimizer":
        found |= {"groups": groups_of(checkpoint, label), "parameters": part["parameters"]}
    if part["kind"] == "model":
        found |= {"parameters": part["parameters"], "tied": part["tied"]}
    if part["kind"] in ("stateful", "plain"):
        found |= {"state": shown(part["state"], checkpoint)}
    return found


def tensor_facts(place: Place) -> dict[str, Any]:
    """Return what is known of a tensor, ready for JSON."""
    return {
        "shape": list(place.shape),
        "dtype": dtype_name(place.dtype),
        "bytes": place.nbytes,
        "norm": place.summary.norm,
        "nonfinite": place.summary.nonfinite,
        "crc32": [f"{crc:08x}" for crc in place.summary.checksums],
    }
