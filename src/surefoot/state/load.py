"""Verified loading: pair what a state dict holds with what an optimizer has, check it all, and only then hand it over.

Nothing here changes the optimizer; `Optimizer.load_state_dict` installs the result.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from copy import copy, deepcopy
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from surefoot.rule import ALGORITHM, DIRECTED, EMA, STEP, STORAGE_OPTIONS, AlgorithmSpec, Scalar, Slot, scalar_dtype
from surefoot.rule.hyperparameters import is_number
from surefoot.rule.spec import known_algorithms
from surefoot.state.convert import convert_state
from surefoot.state.formats import CORRECTION, CORRECTIONS, takes_correction
from surefoot.state.make import scalar_device
from surefoot.state.peers import translate
from surefoot.storage import decode, format_8_bits, scale_shape
from surefoot.tensors.modes import outside_inference
from surefoot.tensors.shards import (
    is_sharded,
    lay_out,
    misplaced_shard,
    needs_ranks,
    refused_together,
    sharding_mismatch,
)

# What a script asks for around the update: it is not part of what was trained, and stays as the script has it.
_STEP_OPTIONS = ("max_grad_norm", "max_grad_value", "gradient_centralization", *DIRECTED, "ema")
# Hyperparameters that torch.optim gained after dicts without them had been saved, or has not got.
_LATE_OPTIONS = (
    "foreach",
    "maximize",
    "capturable",
    "differentiable",
    "fused",
    "decoupled_weight_decay",
    "split_groups",
    *STORAGE_OPTIONS,
)
_UNASKED = (None, "nearest", 0)
"""What options of storage are where nothing is asked for."""
_LINES = 20
_NO_MISMATCH = ("kept", "restored")


class LoadReport(NamedTuple):
    """What of a state dict did not match an optimizer.

    Attributes:
        missing: what the optimizer has and the state dict does not.
        unexpected: what the state dict has and the optimizer does not.
        mismatched: what both have in different form.
        kept: options for which the optimizer's own value was kept and the state dict says otherwise, or nothing; this
            is no mismatch.
        restored: options of how state and weights are stored that the optimizer was made without and now has, since the
            state dict has them; this is none either.
    """

    missing: list[str]
    unexpected: list[str]
    mismatched: list[str]
    kept: list[str]
    restored: list[str]

    def __bool__(self) -> bool:
        """Return whether anything did not match."""
        return any((self.missing, self.unexpected, self.mismatched))


def _empty_report() -> LoadReport:
    return LoadReport([], [], [], [], [])


@dataclass
class LoadedState:
    """A new state and new groups, ready to be installed, and what did not match."""

    state: defaultdict[Any, Any]
    param_groups: list[dict[str, Any]]
    report: LoadReport = field(default_factory=_empty_report)


class _Pair(NamedTuple):
    """A parameter, its name for messages, and the key of its saved state."""

    param: Tensor
    label: str
    key: Any


@dataclass(frozen=True)
class LoadTarget:
    """What a state dict is loaded into.

    Attributes:
        spec: the algorithm, or the combination of several; `spec.of(group)` is a group's.
        defaults: return the defaults of a group.
        groups: its groups.
        state: its state.
        check_group: raises when a group's options are not allowed.
    """

    spec: AlgorithmSpec
    defaults: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    groups: list[dict[str, Any]]
    state: Mapping[Any, Any]
    check_group: Callable[[Mapping[str, Any]], None]


class _Unlike(NamedTuple):
    """State that fits its parameter, and is laid out over ranks in another way."""

    value: Tensor
    param: Tensor

    def laid_out(self) -> Tensor:
        """Return a copy that is laid out as the parameter is."""
        return lay_out(self.value, self.param).to(self.param.device, copy=True)  # type: ignore[no-any-return]


@outside_inference()
def load(target: LoadTarget, state_dict: Mapping[str, Any], *, strict: bool) -> LoadedState:
    """Prepare the loading of a state dict; see `Optimizer.load_state_dict`.

    State that is laid out over ranks unlike its parameter is laid out anew, after all ranks have found that it fits.
    """
    saved_groups, saved_state = translate(target.spec, *parts_of(state_dict))
    report = _empty_report()
    partners, pairs = _match(target.groups, saved_groups, report)
    with refused_together(_meshes(target, pairs, saved_state)):
        groups = [_merged(target, index, partner, report) for index, partner in enumerate(partners)]
        if strict:
            _refuse(target.spec, report, saved_groups)
        for group in groups:
            target.check_group(group)
        state = {} if strict else {key: copy(entry) for key, entry in target.state.items()}
        for group, group_pairs in zip(groups, pairs, strict=True):
            for pair in group_pairs:
                entry = _entry(target.spec.of(group), group, pair, saved_state.get(pair.key) or {}, report)
                if entry is not None:
                    state[pair.param] = entry
        state = defaultdict(dict, {param: entry for param, entry in state.items() if entry})
        state.update(_other_state(saved_state, saved_groups, report))
        if strict:
            _refuse(target.spec, report, saved_groups)
    for group, group_pairs in zip(groups, pairs, strict=True):
        for pair in group_pairs:
            _finish(target.spec.of(group), group, pair.param, state.get(pair.param, {}))
    return LoadedState(state, groups, report)


def _finish(spec: AlgorithmSpec, group: Mapping[str, Any], param: Tensor, entry: dict[str, Any]) -> None:
    """Lay out a parameter's state as it is, and bring it into the formats that its group asks for."""
    # Ranks may have their state in different order, and must come to the same collectives.
    for name in sorted(name for name, value in entry.items() if isinstance(value, _Unlike)):
        entry[name] = entry[name].laid_out()
    if spec.is_declared:
        convert_state(spec, group, param, entry)


def _meshes(target: LoadTarget, pairs: Iterable[Iterable[_Pair]], saved: Mapping[Any, Any]) -> list[Any]:
    """Return the meshes whose ranks must speak to lay out what is loaded."""
    found = []
    for group, group_pairs in zip(target.groups, pairs, strict=True):
        spec = target.spec.of(group)
        slots = {slot.name for slot in spec.known_slots} if spec.is_declared else set()
        for pair in group_pairs:
            for name, value in (saved.get(pair.key) or {}).items():
                if name in slots and needs_ranks(value, pair.param):
                    found += [value.device_mesh, getattr(pair.param, "device_mesh", value.device_mesh)]
    return found


def parts_of(state_dict: Mapping[str, Any]) -> tuple[list[dict[str, Any]], dict[Any, Any]]:
    """Return groups and state of a state dict, or say why it is none."""
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
        shown = sorted(map(str, state_dict)) if isinstance(state_dict, Mapping) else type(state_dict).__name__
        raise ValueError(
            f"not an optimizer's state dict: it needs the keys 'state' and 'param_groups', but got {shown}; if it is a "
            f"whole checkpoint, pass its optimizer entry"
        )
    groups, state = state_dict["param_groups"], state_dict["state"]
    for problem in _malformed(groups, state):
        raise ValueError(f"not an optimizer's state dict: {problem}")
    return list(groups), state


def _malformed(groups: Any, state: Any) -> Iterator[str]:
    """Say what of groups and state is not what it must be."""
    if not isinstance(groups, list | tuple):
        yield f"'param_groups' must be a list, but is {type(groups).__name__}"
        return
    for index, group in enumerate(groups):
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), list | tuple):
            yield f"param_groups[{index}] must be a dict with a list 'params'"
        elif not isinstance(group.get("param_names"), list | tuple | None):
            yield f"param_groups[{index}]['param_names'] must be a list, but is {group['param_names']!r}"
        elif not all(isinstance(key, Hashable) for key in group["params"]):
            yield f"param_groups[{index}]['params'] must hold numbers or names, but is {group['params']!r}"
    if not isinstance(state, Mapping):
        yield f"'state' must be a dict, but is {type(state).__name__}"
        return
    keys = chain.from_iterable(group["params"] for group in groups)
    for key in keys:
        if not isinstance(state.get(key), Mapping | None):
            yield f"the state of parameter number {key} must be a dict, but is {type(state[key]).__name__}"


# Matching


def _match(
    groups: list[dict[str, Any]], saved: list[dict[str, Any]], report: LoadReport
) -> tuple[list[dict[str, Any] | None], list[list[_Pair]]]:
    """Find for each group its saved group, and for each of its parameters the key of the saved state."""
    if _names(groups) and _names(saved):
        return _match_by_name(groups, saved, report)
    return _match_by_position(groups, saved, report)


def _names(groups: Iterable[Mapping[str, Any]]) -> list[str] | None:
    """All parameter names, or None unless every parameter has one that no other has."""
    if not all(len(group.get("param_names") or ()) == len(group["params"]) for group in groups):
        return None
    names = list(chain.from_iterable(group.get("param_names") or () for group in groups))
    return names if all(isinstance(name, str) for name in names) and len(names) == len(set(names)) else None


def _named(group: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return list(zip(group.get("param_names") or (), group["params"], strict=True))


def _match_by_name(
    groups: list[dict[str, Any]], saved: list[dict[str, Any]], report: LoadReport
) -> tuple[list[dict[str, Any] | None], list[list[_Pair]]]:
    home = {name: (group, key) for group in saved for name, key in _named(group)}
    partners: list[dict[str, Any] | None] = []
    pairs = []
    for index, group in enumerate(groups):
        named = _named(group)
        report.missing.extend(f"parameter `{name}`" for name, _ in named if name not in home)
        pairs.append([_Pair(param, f"`{name}`", home[name][1]) for name, param in named if name in home])
        origins = {id(home[name][0]): home[name][0] for name, _ in named if name in home}
        partners.append(next(iter(origins.values())) if len(origins) == 1 else None)
        if len(origins) > 1:
            report.mismatched.append(
                f"param_groups[{index}]: its parameters stand in {len(origins)} groups of the state dict, whose "
                f"options cannot all hold"
            )
    here = set(_names(groups) or ())
    report.unexpected.extend(f"parameter `{name}`" for name in home if name not in here)
    return partners, pairs


def _match_by_position(
    groups: list[dict[str, Any]], saved: list[dict[str, Any]], report: LoadReport
) -> tuple[list[dict[str, Any] | None], list[list[_Pair]]]:
    if len(groups) != len(saved):
        report.mismatched.append(
            "loaded state dict has a different number of parameter groups: "
            f"{len(saved)}, but the optimizer has {len(groups)}"
        )
    partners: list[dict[str, Any] | None] = [*saved[: len(groups)], *[None] * (len(groups) - len(saved))]
    pairs = []
    for index, (group, partner) in enumerate(zip(groups, partners, strict=True)):
        keys = list(partner["params"]) if partner else []
        names = group.get("param_names") or []
        if len(names) != len(group["params"]):
            names = [f"param_groups[{index}]['params'][{i}]" for i in range(len(group["params"]))]
        if partner and len(keys) != len(group["params"]):
            report.mismatched.append(
                "loaded state dict contains a parameter group that doesn't match the size of optimizer's group: "
                f"param_groups[{index}] has {len(keys)} parameters, but the optimizer's has {len(group['params'])}"
            )
        pairs.append([_Pair(p, f"`{n}`", k) for p, n, k in zip(group["params"], names, keys, strict=False)])
    return partners, pairs


# Groups


def _merged(target: LoadTarget, index: int, partner: Mapping[str, Any] | None, report: LoadReport) -> dict[str, Any]:
    """Return the group that results from loading `partner` into the group at `index`."""
    group = target.groups[index]
    spec, defaults = target.spec.of(group), target.defaults(group)
    if partner is None:
        return dict(group)
    if target.spec.algorithms and partner.get(ALGORITHM) != group[ALGORITHM]:
        report.mismatched.append(
            f"param_groups[{index}]: {group[ALGORITHM]} steps it, in the state dict {partner.get(ALGORITHM)!r} does"
        )
        return dict(group)
    known = set(spec.constructor) or set(defaults)
    late = {*_LATE_OPTIONS, *spec.later_options, *_step_options(spec)}
    required = set(defaults) - late | {each.name for each in spec.group_scalars}
    missing = sorted(required - set(partner))
    foreign = sorted(set(partner) & _all_hyperparameters() - known - set(group)) if spec.is_declared else []
    report.missing.extend(f"param_groups[{index}]: option `{name}`" for name in missing)
    report.unexpected.extend(f"param_groups[{index}]: option `{name}` of another algorithm" for name in foreign)
    if missing or foreign:
        return dict(group)
    own = (*_step_options(spec), *(name for name in STORAGE_OPTIONS if _asks(group.get(name))))
    options = deepcopy({name: value for name, value in partner.items() if name not in ("params", *own)})
    report.kept.extend(_kept_options(spec, index, group, partner, own))
    report.restored.extend(
        f"param_groups[{index}]: option `{name}` is {partner[name]}, as the state dict has it"
        for name in STORAGE_OPTIONS
        if name not in own and _asks(partner.get(name))
    )
    if len(options.get("param_names") or ()) != len(group["params"]):
        options.pop("param_names", None)
    names = {"param_names": group["param_names"]} if "param_names" in group else {}
    return {**group, **options, **names}


def _step_options(spec: AlgorithmSpec) -> tuple[str, ...]:
    """Return the options of the step that a group of this algorithm may have."""
    return tuple(name for name in _STEP_OPTIONS if name in spec.step_options)


def _kept_options(
    spec: AlgorithmSpec, index: int, group: Mapping[str, Any], partner: Mapping[str, Any], of_step: Iterable[str]
) -> Iterator[str]:
    """Say where a group's own options hold although the state dict has others, or does not know them."""
    for name in of_step:
        ours, theirs = group.get(name), partner.get(name)
        if not _is_same(ours, theirs):
            yield f"param_groups[{index}]: option `{name}` stays {ours}, the state dict has {theirs}"
    for name in set(_LATE_OPTIONS) - set(of_step):
        if group.get(name) is not False and _asks(group.get(name)) and name not in partner:
            yield f"param_groups[{index}]: option `{name}` stays {group[name]}, the state dict does not know it"
    for name in spec.later_options - {*_LATE_OPTIONS, *of_step}:
        if name in group and name not in partner and not _is_same(group[name], spec.constructor[name]):
            yield f"param_groups[{index}]: option `{name}` stays {group[name]}, the state dict does not know it"


def _asks(value: Any) -> bool:
    """Return whether an option asks for something; what is no option at all does, and is refused later."""
    return not any(_is_same(value, each) for each in _UNASKED)


def _is_same(value: Any, other: Any) -> bool:
    """Return whether two options are the same, one of which may be anything."""
    comparable = all(isinstance(each, (bool, int, float, str, torch.dtype)) for each in (value, other))
    return value is other or (comparable and value == other)


def _all_hyperparameters() -> set[str]:
    return set().union(*(spec.constructor for spec in known_algorithms()))


def _lookalikes(groups: list[dict[str, Any]]) -> list[str]:
    """Return the names of the algorithms whose hyperparameters are those of a state dict."""
    names = set(groups[0]) & _all_hyperparameters() - set(_LATE_OPTIONS)
    return sorted(
        spec.name
        for spec in known_algorithms()
        if set(spec.constructor) - spec.later_options - set(_LATE_OPTIONS) == names - spec.later_options
    )


# State of one parameter


def _entry(
    spec: AlgorithmSpec,
    group: Mapping[str, Any],
    pair: _Pair,
    saved: Mapping[str, Any],
    report: LoadReport,
) -> dict[str, Any] | None:
    """Return the state of one parameter, copied and in place; None, and a line in the report, where it does not fit."""
    problems = _empty_report()
    if not spec.is_declared:
        return {name: moved(value, pair.param.device, key=name) for name, value in saved.items()}
    saved = {name: value for name, value in saved.items() if value is not None}
    entry: dict[str, Any] = {}
    others: dict[str, Any] = {}
    slots: dict[str, Slot] = {slot.name: slot for slot in spec.known_slots}
    scalars: dict[str, Scalar] = {scalar.name: scalar for scalar in spec.scalars}
    for name, value in saved.items():
        if name in scalars:
            entry[name] = _scalar(scalars[name], group, pair, value, problems)
        elif name in slots:
            entry |= _slot(slots[name], group, pair, value, saved.get(f"{name}_scale"), problems)
        elif name == CORRECTION:
            entry[name] = _correction(pair, value, problems)
        elif name.removesuffix("_scale") in slots or name in spec.derived_state:
            pass  # taken together with its slot, or follows from the rest
        elif saved.keys() & {*scalars, *slots} or name not in _all_state_names():
            others[name] = moved(value, pair.param.device, key=name)  # what a wrapper keeps there is its own
        else:
            problems.unexpected.append(f"{pair.label}: state `{name}`")
    problems.unexpected.extend(
        f"{pair.label}: state `{slot.name}` of eval mode, but param_groups say train mode"
        for slot in spec.eval_slots
        if slot.name in entry and group.get("train_mode", True)
    )
    needed = [name for name, scalar in scalars.items() if scalar.when is None and not callable(scalar.init)]
    needed += [slot.name for slot in spec.all_slots if _needed(slot, group, pair.param)]
    if saved.keys() - others.keys():
        problems.missing.extend(f"{pair.label}: state `{name}`" for name in needed if name not in saved)
    for lines, new in zip(report, problems, strict=True):
        lines.extend(new)
    misses = problems.missing or problems.mismatched or (problems.unexpected and not entry)
    return None if misses else entry | others


def _all_state_names() -> set[str]:
    every = known_algorithms()
    return {slot.name for spec in every for slot in spec.slots} | {s.name for spec in every for s in spec.scalars}


def _needed(slot: Slot, group: Mapping[str, Any], param: Tensor) -> bool:
    """Return whether a parameter that was stepped must have a slot; an average may begin with any step."""
    if slot is EMA or slot.shape_for(param, group) is None:
        return False
    return slot.when is None or bool(group.get(slot.when))


def _scalar(scalar: Scalar, group: Mapping[str, Any], pair: _Pair, value: Any, problems: LoadReport) -> Any:
    """Put a saved scalar where the optimizer keeps it, in the dtype in which it was saved."""
    if isinstance(value, Tensor) and value.numel() != 1:
        problems.mismatched.append(
            f"{pair.label}: state `{scalar.name}` has shape {tuple(value.shape)}, must be one number"
        )
        return None
    if not is_number(value):
        problems.mismatched.append(f"{pair.label}: state `{scalar.name}` is {type(value).__name__}, must be a number")
        return None
    number = float(value)
    counts = scalar.integer or scalar.name == STEP.name
    if math.isnan(number) or (counts and not (number >= 0 and number.is_integer())):
        kind = "a whole number >= 0" if counts else "a number"
        problems.mismatched.append(f"{pair.label}: state `{scalar.name}` is {number}, must be {kind}")
        return None
    dtype = value.dtype if isinstance(value, Tensor) and value.is_floating_point() else scalar_dtype()
    return scalar.stored(number, scalar_device(group, pair.param), dtype)


def _slot(
    slot: Slot, group: Mapping[str, Any], pair: _Pair, value: Any, scale: Any, problems: LoadReport
) -> dict[str, Any]:
    """Return a saved slot on its parameter's device, and its scale if it has one, or say why it does not fit."""
    param, codes = pair.param, isinstance(value, Tensor) and value.dtype is torch.uint8 and slot.float8
    if codes and value.shape == param.shape:
        if not isinstance(scale, Tensor) or scale.shape != scale_shape(value.shape):
            problems.missing.append(f"{pair.label}: state `{slot.name}_scale` for the 8-bit `{slot.name}`")
            return {}
        if is_sharded(value) or not is_sharded(param):
            kept = {slot.name: value, f"{slot.name}_scale": scale}
            return {name: _placed_slot(name, pair, part, problems) for name, part in kept.items()}
        value = decode(format_8_bits(signed=slot.signed), value, scale)  # its blocks may end on other ranks
    return {slot.name: _plain_slot(slot, group, pair, value, problems)}


def _correction(pair: _Pair, value: Any, problems: LoadReport) -> Any:
    """Copy the correction of a 16-bit parameter, or say why it does not fit."""
    param = pair.param
    if not isinstance(value, Tensor) or value.dtype not in CORRECTIONS.values() or value.shape != param.shape:
        shown = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        problems.mismatched.append(f"{pair.label}: state `{CORRECTION}` is {shown}, must be int8 or int16 like it")
    elif not takes_correction(param):
        problems.mismatched.append(
            f"{pair.label}: state `{CORRECTION}` belongs to a bfloat16 or float16 parameter, this is {param.dtype}"
        )
    else:
        return _placed_slot(CORRECTION, pair, value, problems)
    return None


def _plain_slot(slot: Slot, group: Mapping[str, Any], pair: _Pair, value: Any, problems: LoadReport) -> Any:
    """Copy a saved slot to its parameter's device, or say why it does not fit."""
    param = pair.param
    if not isinstance(value, Tensor):
        problems.mismatched.append(f"{pair.label}: state `{slot.name}` is {type(value).__name__}, must be a tensor")
        return None
    if slot.flat_elsewhere:
        value = _unflattened(value, slot.shape_for(param, group) or torch.Size())
    if value.shape != (expected := slot.shape_for(param, group)):
        problems.mismatched.append(
            f"{pair.label}: state `{slot.name}` has shape {_shape(value.shape)}, must be {_shape(expected)}"
        )
    elif value.is_complex() != slot.is_complex_for(param) or not (value.is_complex() or value.is_floating_point()):
        problems.mismatched.append(f"{pair.label}: state `{slot.name}` is {value.dtype}, the parameter {param.dtype}")
    else:
        return _placed_slot(slot.name, pair, value, problems)
    return None


def _unflattened(value: Tensor, shape: torch.Size) -> Tensor:
    """Return a slot that others keep flattened, or as one zero, in its shape here; else as it is."""
    if value.shape == (shape.numel(),):
        return value.reshape(shape)
    return value.expand(shape).contiguous() if not value.dim() and not value.any() else value


def _placed_slot(name: str, pair: _Pair, value: Tensor, problems: LoadReport) -> Any:
    """Copy a slot of the right shape, or return what is to be laid out as its parameter is."""
    param, asks = pair.param, needs_ranks(value, pair.param)
    if asks and (reason := misplaced_shard(value)) is not None:
        raise ValueError(f"{pair.label}: state `{name}` {reason}")  # the others cannot go on without this rank
    dense = value.detach().to_dense() if value.layout is not torch.strided else value.detach()
    reason = sharding_mismatch(dense, param)
    if reason is None:
        return dense.to(param.device, copy=True)
    if asks or not is_sharded(dense):
        return _Unlike(dense, param)
    problems.mismatched.append(f"{pair.label}: state `{name}` {reason}")
    return None


def _shape(shape: torch.Size | None) -> str:
    return "absent" if shape is None else str(tuple(shape))


def moved(value: Any, device: torch.device, key: Any = None) -> Any:
    """Copy tensors, in containers too, to a device; dtypes stay, and so does the device of what is called `step`."""
    if isinstance(value, Tensor):
        return value.detach().clone() if key == "step" else value.detach().to(device, copy=True)
    if isinstance(value, dict):
        return {name: moved(item, device, key=name) for name, item in value.items()}
    if isinstance(value, list | tuple):
        items = [moved(item, device) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return deepcopy(value)


def _other_state(saved: Mapping[Any, Any], groups: list[dict[str, Any]], report: LoadReport) -> dict[Any, Any]:
    """Return state that belongs to no parameter; state of a parameter that stands in no group is unexpected."""
    keys = set(chain.from_iterable(group["params"] for group in groups))
    others = {key: value for key, value in saved.items() if key not in keys}
    report.unexpected.extend(f"state of parameter number {key}" for key in others if isinstance(key, int))
    return {key: deepcopy(value) for key, value in others.items() if not isinstance(key, int)}


def _refuse(spec: AlgorithmSpec, report: LoadReport, groups: list[dict[str, Any]]) -> None:
    """Raise when anything did not match."""
    if not report:
        return
    lines = [
        f"{kind}: {line}" for kind, found in report._asdict().items() if kind not in _NO_MISMATCH for line in found
    ]
    shown = [*lines[:_LINES], *([f"and {len(lines) - _LINES} more"] if len(lines) > _LINES else [])]
    alike = _lookalikes(groups) if groups else []
    known = not alike or spec.name in alike
    hint = "" if known else f"\nIts options are those of {' or '.join(alike)}."
    raise ValueError(
        f"the state dict does not fit this {spec.name}; nothing was loaded.\n  "
        + "\n  ".join(shown)
        + hint
        + "\nUse strict=False to load what matches."
    )
