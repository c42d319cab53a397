"""Putting saved parts back into objects: each part says first what does not fit, then changes its object, and can undo.

Nothing is changed before all parts have been asked.
"""

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from itertools import chain
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from surefoot.checkpoint.collect import Objects, names_in_models, names_in_optimizer
from surefoot.checkpoint.json_codec import TAG, Fetch, decode
from surefoot.checkpoint.ranks import Ranks
from surefoot.checkpoint.reader import Checkpoint
from surefoot.checkpoint.rename import Renaming, hint, renamed
from surefoot.checkpoint.rng import rng_problems, rng_state, set_rng_state
from surefoot.errors import CheckpointError
from surefoot.optimizer import Optimizer
from surefoot.tensors.shards import block_of, has_blocks, is_sharded, lay_out

_LINES = 20


def read_like(checkpoint: Checkpoint, name: str, like: object) -> Tensor:
    """Return a tensor of a checkpoint, laid out over ranks as another is; of a sharded one only the shard is read.

    Args:
        checkpoint: where it is.
        name: its name there.
        like: what it is for.  Only a sharded tensor of the same shape matters.
    """
    place = checkpoint.places.get(name)
    if not (is_sharded(like) and isinstance(like, Tensor) and place is not None and place.shape == tuple(like.shape)):
        return checkpoint.tensor(name)
    if not has_blocks(like):
        laid_out: Tensor = lay_out(checkpoint.tensor(name), like)
        return laid_out
    made = torch.empty_like(like, dtype=place.dtype, requires_grad=False)
    shape, offsets = block_of(like)
    made.to_local().copy_(checkpoint.block(name, shape, offsets))  # type: ignore[attr-defined]
    return made


class Restorer(ABC):
    """A saved part and the object that it goes into.

    Args:
        label: of the part.
        saved: the part in the manifest.
        checkpoint: where its tensors are.
        strict: whether everything must match.
    """

    def __init__(self, label: str, saved: Mapping[str, Any], checkpoint: Checkpoint, *, strict: bool) -> None:
        self.label = label
        self.saved = saved
        self.checkpoint = checkpoint
        self.strict = strict

    @abstractmethod
    def problems(self) -> list[str]:
        """Say what does not fit; nothing is changed."""

    @abstractmethod
    def apply(self) -> list[str]:
        """Change the object; return what of it did not match, which is nothing when strict."""

    @abstractmethod
    def undo(self) -> None:
        """Put back what the object had before `apply`, which may have failed."""

    def another_class(self, value: object) -> list[str]:
        """Say that the object is of another class than the one saved."""
        was, now = self.saved["class"], type(value).__name__
        return [] if was in (None, now) else [f"{self.label}: {was} was saved, this is {now}"]


class ModelRestorer(Restorer):
    """A model: parameters, buffers and extra state; copied into its tensors where they are."""

    def __init__(self, model: nn.Module, renaming: Renaming, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.model = model
        key = self.label.partition(".")[2]
        names = renamed([name for name, _ in self.saved["state"]], renaming, f"{key}." if key else "")
        self.state = list(zip(names, (data for _, data in self.saved["state"]), strict=True))
        self.before: Mapping[str, Any] = {}

    def _value(self, data: Any, here: object) -> Any:
        """Return a tensor as a view of the file, or laid out as it is here; extra state of a module is copied."""
        if isinstance(data, dict) and data.get(TAG) == "tensor":
            return decode(data, lambda name: read_like(self.checkpoint, name, here))
        return decode(data, self.checkpoint.copy)

    def _outline(self, data: Any) -> Any:
        """Return the same without reading it, as far as it is tensors."""
        if isinstance(data, dict) and data.get(TAG) == "tensor" and data.get("of") in self.checkpoint.places:
            place = self.checkpoint.places[data["of"]]
            return torch.empty(place.shape, dtype=place.dtype, device="meta")
        return self._value(data, None)

    def problems(self) -> list[str]:
        """See `Restorer`."""
        here, there = self.model.state_dict(), {name: self._outline(data) for name, data in self.state}
        missing = {name: _shape(value) for name, value in here.items() if name not in there}
        extra = {name: _shape(value) for name, value in there.items() if name not in here}
        lines = [f"`{name}`{shape} is in the model, but was not saved" for name, shape in missing.items()]
        lines += [f"`{name}`{shape} was saved, but is not in the model" for name, shape in extra.items()]
        lines += chain.from_iterable(_misfit(name, here[name], there[name]) for name in here if name in there)
        if missing and extra and (advice := hint(missing, extra)):
            lines.append(advice)
        return [f"{self.label}: {line}" for line in lines]

    def apply(self) -> list[str]:
        """See `Restorer`."""
        lines = [] if self.strict else self.problems()
        here = self.model.state_dict()
        fitting = OrderedDict(
            (name, self._value(data, here.get(name)))
            for name, data in self.state
            if self.strict or (name in here and not any(_misfit(name, here[name], self._outline(data))))
        )
        metadata = decode(self.saved["metadata"], self.checkpoint.copy)
        if metadata is not None:
            fitting._metadata = metadata  # type: ignore[attr-defined]  # where torch keeps versions of modules
        if any(map(_has_own_loading, self.model.modules())):
            self.before = deepcopy(here)
        self.model.load_state_dict(fitting, strict=self.strict)
        return lines

    def undo(self) -> None:
        """See `Restorer`."""
        if self.before:
            self.model.load_state_dict(self.before)


def _has_own_loading(module: nn.Module) -> bool:
    """Whether loading runs code that is not torch's, which may raise when half of the model is loaded."""
    ours = ("_load_from_state_dict", "load_state_dict", "set_extra_state")
    theirs = any(not getattr(type(module), name).__module__.startswith("torch.nn.") for name in ours)
    return theirs or bool(module._load_state_dict_pre_hooks or module._load_state_dict_post_hooks)


def _shape(value: Any) -> str:
    return f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""


def _misfit(name: str, here: Any, there: Any) -> Iterator[str]:
    """Say how a saved tensor differs from the one that it would go into."""
    if isinstance(here, Tensor) != isinstance(there, Tensor):
        yield f"`{name}` was saved as a {type(there).__name__}, in the model it is a {type(here).__name__}"
    elif not isinstance(here, Tensor) or nn.parameter.is_lazy(here):
        return
    elif here.shape != there.shape:
        yield f"`{name}` was saved with shape {tuple(there.shape)}, in the model it has {tuple(here.shape)}"
    elif here.dtype != there.dtype:
        yield (
            f"`{name}` was saved as {there.dtype}, in the model it is {here.dtype}; load into a model of that dtype "
            f"and convert it afterwards"
        )


class OptimizerRestorer(Restorer):
    """An optimizer: through its own `load_state_dict`, with parameters matched by name where there are names."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        renaming: Renaming,
        known: Mapping[Tensor, str],
        *args: Any,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self.optimizer = optimizer
        self.names = names_in_optimizer(optimizer, known)
        self.parameters = [dict(parameter) for parameter in self.saved["parameters"]]
        named = [parameter for parameter in self.parameters if parameter["name"] is not None]
        for parameter, name in zip(named, renamed([one["name"] for one in named], renaming), strict=True):
            parameter["name"] = name
        self.before: dict[str, Any] = {}

    @property
    def by_name(self) -> bool:
        """Whether both sides have names."""
        return self.names is not None and all(parameter["name"] is not None for parameter in self.parameters)

    def problems(self) -> list[str]:
        """See `Restorer`."""
        params = [param for group in self.optimizer.param_groups for param in group["params"]]
        names = [parameter["name"] for parameter in self.parameters]
        lines = []
        if not isinstance(self.optimizer, Optimizer) and self.by_name and names != self.names:
            lines.append("the parameters have other names, or another order, and torch's optimizers go by the order")
        here = dict(zip(self.names if self.by_name and self.names else range(len(params)), params, strict=True))
        there = {parameter["name"] if self.by_name else i: parameter for i, parameter in enumerate(self.parameters)}
        lines += [
            f"{_name(key, there)} was saved with shape {tuple(there[key]['shape'])}, here it has {tuple(param.shape)}"
            for key, param in here.items()
            if key in there and there[key]["shape"] not in (None, list(param.shape))
        ]
        return [*self.another_class(self.optimizer), *(f"{self.label}: {line}" for line in lines)]

    def apply(self) -> list[str]:
        """See `Restorer`."""
        self.before = dict(self.optimizer.__dict__)
        if not isinstance(self.optimizer, Optimizer):
            return self._apply_to_torchs()
        with self._lent_names():
            report = self.optimizer.load_state_dict(self._state_dict(), strict=self.strict)
        lines = [f"{self.label}: {kind}: {line}" for kind, lines in report._asdict().items() for line in lines]
        return [*([] if self.strict else self.another_class(self.optimizer)), *lines]

    def _apply_to_torchs(self) -> list[str]:
        """Load all or nothing: torch's optimizers check nothing.  They keep the tensors that they are given."""
        lines = self.problems()
        if not lines:
            self.optimizer.load_state_dict(self._state_dict(copied=True))
        return lines

    def undo(self) -> None:
        """See `Restorer`."""
        if self.before:
            self.optimizer.__dict__.clear()
            self.optimizer.__dict__.update(self.before)

    def _fetch(self, key: object, *, copied: bool) -> Fetch:
        """Return what reads the tensors of a parameter's state, laid out as the parameter is."""
        params = [param for group in self.optimizer.param_groups for param in group["params"]]
        order = [parameter["number"] for parameter in self.parameters]
        if self.by_name and self.names:
            here = dict(zip(self.names, params, strict=True))
            of = {parameter["number"]: here.get(parameter["name"]) for parameter in self.parameters}
        else:
            of = dict(zip(order, params, strict=False))
        like = of.get(key) if isinstance(key, int) else None
        if copied and not is_sharded(like):
            return self.checkpoint.copy
        return lambda name: read_like(self.checkpoint, name, like)

    def _state_dict(self, *, copied: bool = False) -> dict[str, Any]:
        fetch = self._fetch(None, copied=copied)
        keys = [decode(key, fetch) for key, _ in self.saved["state"]]
        entries = [entry for _, entry in self.saved["state"]]
        state = [
            (key, decode(entry, self._fetch(key, copied=copied))) for key, entry in zip(keys, entries, strict=True)
        ]
        groups: list[Any] = [decode(group["options"], fetch) for group in self.saved["groups"]]
        if not all(isinstance(group, dict) for group in groups) or not all(isinstance(k, int | str) for k, _ in state):
            raise CheckpointError(f"{self.checkpoint.path} is not readable: `{self.label}` is malformed")
        for group, saved in zip(groups, self.saved["groups"], strict=True):
            group["params"] = saved["params"]
        names = {parameter["number"]: parameter["name"] for parameter in self.parameters}
        for group in groups:
            if self.by_name and isinstance(self.optimizer, Optimizer):
                group["param_names"] = [names[number] for number in group["params"]]
            elif not self._has_names():
                group.pop("param_names", None)
        return {"state": dict(state), "param_groups": groups}

    def _has_names(self) -> bool:
        return any("param_names" in group for group in self.optimizer.param_groups)

    @contextmanager
    def _lent_names(self) -> Iterator[None]:
        """Lend an optimizer the names that its parameters have in the models, for the time of a load."""
        if not self.by_name or self._has_names():
            yield
            return
        groups, names = self.optimizer.param_groups, iter(self.names or ())
        for group in groups:
            group["param_names"] = [next(names) for _ in group["params"]]
        try:
            yield
        finally:
            for group in chain(groups, self.optimizer.param_groups):
                group.pop("param_names", None)


def _name(key: Any, parameters: Mapping[Any, Mapping[str, Any]]) -> str:
    name = parameters[key]["name"]
    return f"parameter number {key}" if name is None else f"`{name}`"


class StatefulRestorer(Restorer):
    """A scheduler, scaler, sampler: through its own `load_state_dict`."""

    def __init__(self, value: Any, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.value = value
        self.state = decode(self.saved["state"], self.checkpoint.copy)
        self.before = deepcopy(value.state_dict())

    def problems(self) -> list[str]:
        """See `Restorer`."""
        lines = self.another_class(self.value)
        # Without its class, keys are what tells whose state it is; some objects add keys as they go.
        if isinstance(self.state, dict) and isinstance(self.before, dict) and bool(self.state) != bool(self.before):
            lines.append(
                f"{self.label}: it was {_enabled(self.state)} when it was saved, now it is {_enabled(self.before)}"
            )
        return lines

    def apply(self) -> list[str]:
        """See `Restorer`."""
        lines = [] if self.strict else self.problems()
        self.value.load_state_dict(self.state)
        return lines

    def undo(self) -> None:
        """See `Restorer`."""
        self.value.load_state_dict(self.before)


def _enabled(state: Mapping[str, Any]) -> str:
    return "enabled" if state else "disabled, or has no state"


class GeneratorRestorer(Restorer):
    """A `torch.Generator`."""

    def __init__(self, generator: torch.Generator, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.generator = generator
        self.state = decode(self.saved["state"], self.checkpoint.copy)
        self.before = generator.get_state()

    def problems(self) -> list[str]:
        """See `Restorer`."""
        was, now = self.saved["device"], self.generator.device.type
        if was != now:
            return [f"{self.label}: a generator of {was} was saved, this is one of {now}"]
        try:
            torch.Generator(self.generator.device).set_state(self.state)
        except (TypeError, RuntimeError) as error:
            return [f"{self.label}: its state is not valid here ({error})"]
        return []

    def apply(self) -> list[str]:
        """See `Restorer`."""
        self.generator.set_state(self.state)
        return []

    def undo(self) -> None:
        """See `Restorer`."""
        self.generator.set_state(self.before)


class RngRestorer(Restorer):
    """The global random generators."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.state = decode(self.saved["state"], self.checkpoint.copy)
        self.before = rng_state()

    def problems(self) -> list[str]:
        """See `Restorer`."""
        return [f"{self.label}: {problem}" for problem in rng_problems(self.state)]

    def apply(self) -> list[str]:
        """See `Restorer`."""
        set_rng_state(self.state)
        return []

    def undo(self) -> None:
        """See `Restorer`."""
        set_rng_state(self.before)


_ORDER: Sequence[type[Restorer]] = (OptimizerRestorer, StatefulRestorer, GeneratorRestorer, RngRestorer, ModelRestorer)
"""Schedulers find the learning rates of their optimizer; models come last, since only they cost a copy to undo."""


def restore_objects(
    checkpoint: Checkpoint, objects: Objects, renaming: Renaming, ranks: Ranks, *, rng: bool, strict: bool
) -> list[str]:
    """Check every part, then change every object; if one refuses, on any rank, all are as they were.

    Returns:
        What did not match; nothing when strict.

    Raises:
        ValueError: something does not fit; the message lists it.
        CheckpointError: a part is malformed.
    """
    parts: list[Restorer] = []

    def check() -> None:
        parts.extend(_restorers(checkpoint, objects, renaming, ranks, rng=rng, strict=strict))
        lines = [line for part in parts for line in part.problems()] + renaming.problems()
        vital = lines if strict else [line for line in lines if line.startswith("rename")]
        if vital:
            _refuse(checkpoint, vital)

    ranks.do(check, f"loading {checkpoint.path}")
    return _apply(checkpoint, sorted(parts, key=lambda part: _ORDER.index(type(part))), ranks)


def _apply(checkpoint: Checkpoint, parts: Sequence[Restorer], ranks: Ranks) -> list[str]:
    """Change every object, or none."""
    begun: list[Restorer] = []
    report: list[str] = []

    def change() -> None:
        for part in parts:
            begun.append(part)
            report.extend(part.apply())

    try:
        ranks.do(change, f"loading {checkpoint.path}")
    except BaseException as error:
        error.add_note(f"Raised while loading `{begun[-1].label}` of {checkpoint.path}; everything is as it was.")
        for part in reversed(begun):
            _undo(part, error)
        raise
    return report


def _undo(part: Restorer, error: BaseException) -> None:
    try:
        part.undo()
    except Exception as another:  # noqa: BLE001 (the others are still to be undone)
        error.add_note(f"`{part.label}` could not be put back: {another!r}")


def _restorers(
    checkpoint: Checkpoint, objects: Objects, renaming: Renaming, ranks: Ranks, *, rng: bool, strict: bool
) -> Iterator[Restorer]:
    known, found = names_in_models(objects), checkpoint.manifest["parts"]
    for label, value in objects.items():
        make, kind = _maker(value, renaming, known)
        if label not in found:
            raise ValueError(_absent(checkpoint, label))
        if found[label]["kind"] != kind:
            raise ValueError(f"`{label}` of {checkpoint.path} is a {found[label]['kind']}, not a {kind}")
        yield make(label, *checkpoint.part(label, ranks.rank, ranks.world), strict=strict)
    if rng and "rng" in found:
        yield RngRestorer("rng", *checkpoint.part("rng", ranks.rank, ranks.world), strict=strict)


def _maker(value: Any, renaming: Renaming, known: Mapping[Tensor, str]) -> tuple[Callable[..., Restorer], str]:
    """Return what makes the part of an object, and its kind."""
    if isinstance(value, nn.Module):
        return lambda *args, **options: ModelRestorer(value, renaming, *args, **options), "model"
    if isinstance(value, torch.optim.Optimizer):
        return lambda *args, **options: OptimizerRestorer(value, renaming, known, *args, **options), "optimizer"
    if isinstance(value, torch.Generator):
        return lambda *args, **options: GeneratorRestorer(value, *args, **options), "generator"
    return lambda *args, **options: StatefulRestorer(value, *args, **options), "stateful"


def _absent(checkpoint: Checkpoint, label: str) -> str:
    there = ", ".join(f"`{name}`" for name in checkpoint.manifest["parts"]) or "nothing"
    return f"{checkpoint.path} has no `{label}`; it has {there}. Leave it out, or save it too"


def _refuse(checkpoint: Checkpoint, lines: list[str]) -> NoReturn:
    shown = [*lines[:_LINES], *([f"and {len(lines) - _LINES} more"] if len(lines) > _LINES else [])]
    raise ValueError(
        f"{checkpoint.path} does not fit; nothing was loaded.\n  "
        + "\n  ".join(shown)
        + "\nUse rename= for parameters that have other names now, strict=False to load what matches."
    )
