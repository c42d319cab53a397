"""Several algorithms in one optimizer: parameters divided among them by name and shape, everything else shared.

A group names its algorithm; below the optimizer a step takes each group's own.  Nothing here knows how a step is made.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from types import SimpleNamespace
from typing import Any, Unpack, cast

from torch import Tensor, nn

from surefoot.groups import hidden_matrices
from surefoot.optimizer import Optimizer
from surefoot.optimizers.adam import AdamW
from surefoot.optimizers.muon import Muon
from surefoot.rule import ALGORITHM, AlgorithmSpec
from surefoot.state.load import LoadReport, parts_of
from surefoot.state.make import make_state
from surefoot.step.clipping import listed
from surefoot.step.options import GROUP_RANGES, StepOptions
from surefoot.step.types import CustomStep, PreparedParam

Selection = str | re.Pattern[str] | Callable[[str, Tensor], bool]
"""Which parameters are meant: a pattern as of file names, a regular expression to be found in the name, or a function
of name and parameter."""


class Part:
    """An algorithm and the parameters that it is to step, for `Combined`.

    Args:
        algorithm: an optimizer class of surefoot, or of your own: a rule, `Muon` or `Adafactor`.
        select: which parameters: a pattern such as `"blocks.*.weight"` (`*` stands for dots too), a compiled regular
            expression that is searched in the name, a function `select(name, param)` that returns True or False, or
            a list of these, of which one must hold.  All that are left by default.
        options: the algorithm's hyperparameters, and options of a param group such as `ema` or `max_grad_norm`.

    Raises:
        TypeError: the algorithm is no such class, `select` none of these, or an option is unknown.
        ValueError: an option is out of its range, or one of the whole optimizer.
    """

    def __init__(
        self, algorithm: type[Optimizer], select: Selection | Iterable[Selection] = "*", /, **options: Any
    ) -> None:
        _check_algorithm(algorithm)
        self.name = algorithm.__name__
        self.select = _selections(select)
        of_step = set(StepOptions.__annotations__) - algorithm.spec.own_options
        around = {name: value for name, value in options.items() if name in of_step}
        own = {name: value for name, value in options.items() if name not in of_step}
        if misplaced := around.keys() - GROUP_RANGES.keys():
            raise ValueError(
                f"`{min(misplaced)}` is an option of the whole optimizer, not of a part; give it to Combined()"
            )
        self.optimizer = algorithm([{"params": []}], **own)
        if (limit := self.optimizer.step_options.max_grad_norm) is not None:
            around = {"max_grad_norm": limit} | around  # an algorithm's own, as LAMB has it
        group = self.optimizer.param_groups.pop()
        if group.get("differentiable"):
            raise ValueError(
                f"`differentiable` lets gradients flow through a whole step, which one of several algorithms has not; "
                f"take it out of the part of {self.name}"
            )
        shared = {scalar.name for scalar in algorithm.spec.group_scalars}  # a group that is there knows better
        self.optimizer.defaults = {n: value for n, value in group.items() if n not in {"params", *shared}} | around

    def selects(self, name: str, param: Tensor) -> bool:
        """Return whether a parameter is meant."""
        return _are_meant(self.select, name, param)

    def __repr__(self) -> str:
        """Show algorithm and selection."""
        shown = ", ".join(_spelled(each) for each in self.select)
        return f"Part({self.name}, {shown})"


def _check_algorithm(algorithm: Any) -> None:
    """Raise TypeError unless a class is an algorithm whose steps are made by the pipeline or take prepared parameters.

    Others have a step that is not known to end without others' being made.
    """
    if not (isinstance(algorithm, type) and issubclass(algorithm, Optimizer)):
        raise TypeError(f"a part needs an optimizer class of surefoot, SGD for instance, but got {algorithm!r}")
    if issubclass(algorithm, Combined) or not getattr(algorithm.step, "is_whole", False):
        raise TypeError(
            f"{algorithm.__name__} has a custom step, which cannot be made together with others; take a rule, Muon or "
            f"Adafactor"
        )


def _selections(select: Any) -> tuple[Selection, ...]:
    """Return one selection, or several, as a tuple.

    Raises:
        TypeError: something is none.
    """
    single = isinstance(select, str | re.Pattern) or callable(select) or not isinstance(select, Iterable)
    found: tuple[Any, ...] = (select,) if single else tuple(select)
    for each in found:
        if not isinstance(each, str | re.Pattern) and not callable(each):
            raise TypeError(
                f"a part selects by patterns, regular expressions and functions of name and parameter, but got {each!r}"
            )
    return found


def _are_meant(selections: Iterable[Selection], name: str, param: Tensor) -> bool:
    return any(_is_meant(each, name, param) for each in selections)


def _is_meant(each: Any, name: str, param: Tensor) -> bool:
    if isinstance(each, str):
        return fnmatchcase(name, each)
    if isinstance(each, re.Pattern):
        return each.search(name) is not None
    answer = each(name, param)
    if not isinstance(answer, bool):
        raise TypeError(f"a part's function must answer True or False, but answered {answer!r} for `{name}`")
    return answer


def _spelled(each: Any) -> str:
    if isinstance(each, str):
        return repr(each)
    return f"/{each.pattern}/" if isinstance(each, re.Pattern) else getattr(each, "__name__", repr(each))


class Combined(Optimizer):
    """Several algorithms in one optimizer: Muon for some parameters and AdamW for the rest, or any others.

    Each parameter goes to the first part that selects it, and is stepped as the part's algorithm would step it by
    itself, with the same bits.  Everything else there is once: a list of groups for schedulers, a state dict, the
    options of the step (one `max_grad_norm` for all parameters together), hooks, telemetry.

    Args:
        params: named tensors such as `model.named_parameters()`, or groups of these, such as
            `surefoot.parameter_groups(model)` gives; each group is divided among the parts, what it says goes before
            what they say, and one with a key `algorithm` goes to that one whole.
        parts: instances of `surefoot.Part`, in order; several may have the same algorithm with other options.
        options: what is done around the update, for all parts together; see `surefoot.StepOptions`.  Those that a
            group may have count where the part does not say otherwise.

    Attributes:
        param_groups: as with every optimizer; under `algorithm` each says its algorithm's name.

    Raises:
        TypeError: tensors come without names, parts are none, or an option is unknown.
        ValueError: no part selects some parameter, a part selects none, or an algorithm cannot step one that it got.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> optimizer = surefoot.Combined(
        ...     model.named_parameters(),
        ...     [surefoot.Part(surefoot.Muon, "0.weight", lr=0.02), surefoot.Part(surefoot.AdamW, lr=3e-4)],
        ...     max_grad_norm=1.0,
        ... )
        >>> print(optimizer.table())
        Muon   0.weight  (8, 4)  lr=0.02
        AdamW  0.bias    (8,)    lr=0.0003
        AdamW  1.weight  (2, 8)  lr=0.0003
        AdamW  1.bias    (2,)    lr=0.0003

    A group that is added later needs an `algorithm`, and has the hyperparameters of that one's first part.
    """

    prepares_params = True

    def __init__(
        self,
        params: Iterable[Any],
        parts: Sequence[Part],
        **options: Unpack[StepOptions],
    ) -> None:
        if unknown := options.keys() - StepOptions.__annotations__.keys():
            raise TypeError(
                f"Combined() got an unexpected keyword argument {min(unknown)!r}; hyperparameters belong to a part, "
                f"and for all there are: {', '.join(StepOptions.__annotations__)}"
            )
        parts = _checked(parts)
        self._take_algorithms({part.name: part.optimizer for part in reversed(parts)})
        super().__init__(list(_divided(params, parts)), dict(options))
        for algorithm in self._algorithms.values():
            if algorithm.state_at_construction:
                make_state(algorithm.spec, self._groups_of(algorithm), self.state)

    def _take_algorithms(self, algorithms: dict[str, Optimizer]) -> None:
        """Take optimizers without parameters, each by its name, that lend their maths, checks and defaults."""
        self._algorithms = algorithms
        self.spec = _combination({name: algorithm.spec for name, algorithm in algorithms.items()})

    def _algorithm_of(self, group: Mapping[str, Any]) -> Optimizer:
        return self._algorithms[self.spec.of(group).name]

    def _defaults_of(self, group: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**self.defaults, **self._algorithm_of(group).defaults}

    def _groups_of(self, algorithm: Optimizer) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if self._algorithm_of(group) is algorithm]

    @classmethod
    def check_group(cls, group: Mapping[str, Any]) -> None:
        """Raise nothing: what a group may have is its algorithm's to say."""

    def coefficients(self, h: SimpleNamespace, *scalars: Any, **named: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the numbers of an update of the group's algorithm."""
        return self._algorithms[h.algorithm].coefficients(h, *scalars, **named)

    # The step

    def _begin_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for index, group in enumerate(self.param_groups):
            if missing := self._algorithm_of(group).defaults.keys() - group.keys() - StepOptions.__annotations__.keys():
                raise ValueError(
                    f"param_groups[{index}] lacks `{min(missing)}`, which {group[ALGORITHM]} needs; set it, or add the "
                    f"group with `add_param_group`"
                )
        super()._begin_step(args, kwargs)

    def _make_custom_step(self, found: list[PreparedParam]) -> CustomStep:
        owned: defaultdict[str, list[int]] = defaultdict(list)
        for position, row in enumerate(found):
            owned[row.h.algorithm].append(position)
        steps = [
            (own, algorithm._make_custom_step([found[position] for position in own]))
            for name, algorithm in self._algorithms.items()  # in the same order on all ranks
            if (own := owned.get(name))
        ]

        def step(rows: list[PreparedParam]) -> None:
            for own, custom_step in steps:
                custom_step([rows[position] for position in own])

        return step

    # Weights to train and weights to evaluate

    def train(self) -> None:
        """Let the parameters of schedule-free algorithms hold the weights to train."""
        self._set_modes("train")

    def eval(self) -> None:
        """Let the parameters of schedule-free algorithms hold the weights to evaluate, and to ship."""
        self._set_modes("eval")

    def _set_modes(self, mode: str) -> None:
        with self._on_host():
            for algorithm in self._algorithms.values():
                if algorithm.has_modes:
                    with self._lent(algorithm):
                        getattr(algorithm, mode)()

    @contextmanager
    def eval_mode(self) -> Iterator[None]:
        """Let the parameters hold the weights to evaluate inside a `with` block, then those that they held before."""
        training = any(group.get("train_mode") for group in self.param_groups)
        self.eval()
        try:
            yield
        finally:
            if training:
                self.train()

    @contextmanager
    def _lent(self, algorithm: Optimizer) -> Iterator[None]:
        """Lend an algorithm its groups and the state, for methods of its own."""
        algorithm.param_groups, algorithm.state = self._groups_of(algorithm), self.state
        try:
            yield
        finally:
            algorithm.param_groups, algorithm.state = [], defaultdict(dict)

    # State

    def exact_param(self, group: Mapping[str, Any], param: Tensor, entry: Mapping[str, Any]) -> Tensor:
        """Return the full value of a parameter, as the algorithm of its group does."""
        return self._algorithm_of(group).exact_param(group, param, entry)

    def derive_state(self, group: Mapping[str, Any], param: Tensor, entry: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the algorithm of a parameter's group tells of it beside its state."""
        return self._algorithm_of(group).derive_state(group, param, entry)

    def load_state_dicts(self, state_dicts: Mapping[str, Mapping[str, Any]], strict: bool = True) -> LoadReport:
        """Load what separate optimizers have saved, one for each algorithm: `{"Muon": ..., "AdamW": ...}`.

        Their parameters are matched by name where both sides have names, otherwise by position: then their groups must
        be those of here, in this order.

        Args:
            state_dicts: by the algorithm's name what `state_dict()` of its optimizer gave, or of its namesake's in
                torch.optim.
            strict: see `Optimizer.load_state_dict`.

        Returns:
            What did not match; see `Optimizer.load_state_dict`.

        Raises:
            ValueError: something does not match, or an algorithm is unknown.  The optimizer is as it was.
        """
        if unknown := set(state_dicts) - set(self._algorithms):
            raise ValueError(f"there is no algorithm {min(unknown)!r} here, only {', '.join(self._algorithms)}")
        return self.load_state_dict(_joined(state_dicts, [group[ALGORITHM] for group in self.param_groups]), strict)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy what every optimizer does, and the algorithms."""
        return super().__getstate__() | {"_algorithms": self._algorithms}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what `__getstate__` gave, or a part of it."""
        super().__setstate__(state)
        self._take_algorithms(self._algorithms)
        for algorithm in self._algorithms.values():
            with self._lent(algorithm):
                algorithm.__setstate__({"param_groups": algorithm.param_groups})

    # Who steps what

    def table(self) -> str:
        """Return who steps what, a line for parameters that differ in the numbers in their names only.

        Each line has the algorithm, the names with `*` for numbers, how many there are if several, shape and `lr`.
        """
        lines: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
        for group in self.param_groups:
            names = group.get("param_names") or [f"params[{i}]" for i in range(len(group["params"]))]
            for name, param in zip(names, group["params"], strict=True):
                alike = ".".join("*" if word.isdecimal() else word for word in name.split("."))
                rate = f"lr={_shown(group.get('lr'))}"
                lines[str(group[ALGORITHM]), alike, str(tuple(param.shape)), rate].append(name)
        return _aligned(
            (algorithm, *((alike, f"{len(names)} x {shape}") if len(names) > 1 else (names[0], shape)), rate)
            for (algorithm, alike, shape, rate), names in lines.items()
        )


def _shown(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def _aligned(lines: Iterable[tuple[str, ...]]) -> str:
    """Return lines of words in columns."""
    rows = list(lines)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(padded)


def _combination(algorithms: Mapping[str, AlgorithmSpec]) -> AlgorithmSpec:
    """Return several algorithms as one."""
    every = algorithms.values()

    def check_groups(groups: Sequence[Mapping[str, Any]]) -> None:
        for name, spec in algorithms.items():
            if own := [group for group in groups if group.get(ALGORITHM) == name]:
                spec.check_groups(own)

    return AlgorithmSpec(
        name=Combined.__name__,
        whole_tensors=any(spec.whole_tensors for spec in every),
        has_modes=any(spec.has_modes for spec in every),
        derived_state=tuple({name for spec in every for name in spec.derived_state}),
        step_options=frozenset(StepOptions.__annotations__),
        algorithms=algorithms,
        check_groups=check_groups,
    )


# Who gets what


def _checked(parts: Any) -> list[Part]:
    """Return the parts, or say why they are none."""
    found = list(parts) if isinstance(parts, Iterable) else []
    if not found or not all(isinstance(part, Part) for part in found):
        raise TypeError(
            f"Combined needs a list of parts, [surefoot.Part(surefoot.Muon, ...), surefoot.Part(surefoot.AdamW)] for "
            f"instance, but got {parts!r}"
        )
    classes: dict[str, type] = {}
    for part in found:
        if classes.setdefault(part.name, type(part.optimizer)) is not type(part.optimizer):
            raise ValueError(
                f"two parts have algorithms of the name {part.name!r}, which groups and state dicts could not tell "
                f"apart; rename one of the classes"
            )
    return found


def _divided(params: Iterable[Any], parts: Sequence[Part]) -> Iterator[dict[str, Any]]:
    """Yield a group for each part and each given group of which it gets something, in the order of the parts."""
    given = list(params)
    if not given:
        raise ValueError(
            "optimizer got an empty parameter list; if it comes from a generator, that may have been used up"
        )
    groups = given if isinstance(given[0], dict) else [{"params": given}]
    whole = [group for group in groups if ALGORITHM in group]
    members: dict[tuple[int, int], list[tuple[str, Tensor]]] = defaultdict(list)
    left = []
    for index, group in enumerate(groups):
        for name, param in () if ALGORITHM in group else _named(group):
            number = next((i for i, part in enumerate(parts) if part.selects(name, param)), None)
            if number is None:
                left.append(name)
            else:
                members[number, index].append((name, param))
    if left:
        raise ValueError(
            f"no part selects {listed(left)}; let the last part take what is left: surefoot.Part(surefoot.AdamW)"
        )
    for number, part in enumerate(parts):
        mine = [index for index in range(len(groups)) if (number, index) in members]
        if not mine and part.select != ("*",) and len(whole) < len(groups):
            raise ValueError(f"{part} selects none of the parameters that parts before it have left; see their names")
        for index in mine:
            yield {**part.optimizer.defaults, **groups[index], "params": members[number, index], ALGORITHM: part.name}
    yield from whole


def _named(group: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    """Return the names and parameters of a group.

    Raises:
        TypeError: they have no names.
    """
    params = group.get("params")
    entries = [params] if isinstance(params, Tensor) else list(params or ())
    if len(names := group.get("param_names") or ()) == len(entries) and names:
        return list(zip(names, entries, strict=True))
    if not all(isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str) for entry in entries):  # noqa: PLR2004 (name and parameter)
        raise TypeError("Combined selects parameters by their names; give it model.named_parameters()")
    return cast("list[tuple[str, Tensor]]", entries)


def _joined(state_dicts: Mapping[str, Mapping[str, Any]], order: Iterable[str]) -> dict[str, Any]:
    """Return state dicts of several algorithms as one, their groups in the order in which algorithms have theirs here.

    Parameters are numbered anew.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    state: dict[Any, Any] = {}
    first = 0
    for name, saved in state_dicts.items():
        saved_groups, saved_state = parts_of(saved)
        numbers = dict.fromkeys(key for group in saved_groups for key in group["params"])
        numbers |= {key: first + i for i, key in enumerate(numbers)}
        first += len(numbers)
        groups[name] = [
            {**group, ALGORITHM: name, "params": [numbers[key] for key in group["params"]]} for group in saved_groups
        ]
        state |= {numbers.get(key, key): entry for key, entry in saved_state.items()}
    found = [groups[name].pop(0) for name in order if groups.get(name)]
    return {"state": state, "param_groups": [*found, *(group for left in groups.values() for group in left)]}


def muon_with(
    model: nn.Module,
    lr: float | Tensor = 0.02,
    rest: type[Optimizer] = AdamW,
    rest_lr: float | Tensor = 3e-4,
    *,
    head: str | Iterable[str] | None = None,
    others: Selection | Iterable[Selection] = (),
    rest_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Combined:
    """Return one optimizer for a whole model: Muon for the matrices of hidden layers, another algorithm for the rest.

    `optimizer.table()` shows who got what.

    Args:
        model: the model; parameters that do not require gradients are left out, as by `surefoot.parameter_groups`.
        lr: learning rate of Muon.
        rest: the algorithm of embeddings, the output layer, vectors and scalars, `surefoot.Lion` for instance.
        rest_lr: its learning rate.
        head: patterns of the names of the output layer's parameters; see `hidden_matrices`, which tells what is hidden.
        others: what else is left to `rest`, selected as by a `Part`.  So is what Muon cannot step.
        rest_options: hyperparameters of `rest`, `dict(weight_decay=0.1, betas=(0.9, 0.95))` for instance.
        options: hyperparameters of Muon, and what is done around the update of all; see `surefoot.StepOptions`.

    Raises:
        TypeError: `model` is not a module, or an option is unknown.
        ValueError: it cannot be told what the output layer is, there is no hidden matrix, or an option is out of its
            range.

    Example:
        >>> model = torch.nn.Sequential()
        >>> model.body, model.head = torch.nn.Linear(4, 8), torch.nn.Linear(8, 2)
        >>> optimizer = surefoot.muon_with(model, max_grad_norm=1.0)
        >>> print(optimizer.table())
        Muon   body.weight  (8, 4)  lr=0.02
        AdamW  body.bias    (8,)    lr=0.0003
        AdamW  head.weight  (2, 8)  lr=0.0003
        AdamW  head.bias    (2,)    lr=0.0003

    The default learning rates are those of Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural
    networks".  With `adjust_lr_fn="match_rms_adamw"` (Liu et al. 2025, "Muon is scalable for LLM training", section
    2.2) one learning rate serves both.
    """
    hidden = hidden_matrices(model, head)
    around = {name: value for name, value in options.items() if name in StepOptions.__annotations__}
    own = {name: value for name, value in options.items() if name not in around}
    algorithm, spared = Part(Muon, lr=lr, **own).optimizer, _selections(others)

    def hidden_matrix(name: str, param: Tensor) -> bool:
        return hidden(name, param) and not _are_meant(spared, name, param) and _can_step(algorithm, param)

    parts = [Part(Muon, hidden_matrix, lr=lr, **own), Part(rest, lr=rest_lr, **(rest_options or {}))]
    trainable = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    return Combined(trainable, parts, **around)


def _can_step(algorithm: Optimizer, param: Tensor) -> bool:
    try:
        algorithm.check_params([param], algorithm.defaults)
    except ValueError:
        return False
    return True
