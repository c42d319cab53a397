"""Constructors of algorithms: each says what is its own, and what all of them share is said here.

A signature is the one place that tells of a hyperparameter: `name: Annotated[type, range, "text"] = default`.  Options
that many algorithms have come as `**options: Unpack[EngineOptions]`, which type checkers read.  When a class is made,
its signature, its `ranges` and its docstring are completed from both.
"""

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from textwrap import fill
from typing import Annotated, Any, Unpack, get_args

import torch

from surefoot.rule import Sparse
from surefoot.rule.hyperparameters import Each, Interval
from surefoot.step.options import StepOptions


@dataclass(frozen=True)
class Default:
    """What an option is when it is not given."""

    value: Any


# What an algorithm of torch.optim takes by position stands in its signature, where these cannot name it again.


class WeightOptions(StepOptions, total=False):
    """How 16-bit parameters are stored."""

    rounding_seed: Annotated[int, Default(0), "what the random bits of stochastic rounding begin from"]
    master_weight_bits: Annotated[
        int | None,
        Default(None),
        "24 or 32: keep a correction of 8 or 16 bits beside each bfloat16 or float16 parameter in the state, so that "
        "both together hold its value in so many bits, while the model sees the rounded one.",
    ]
    rounding: Annotated[
        str,
        Default("nearest"),
        'how bfloat16 and float16 parameters are stored: `"nearest"`, where steps of less than half the distance to '
        'the next number are lost, or `"stochastic"`, where they count in the mean.',
    ]


class KernelOptions(WeightOptions, total=False):
    """What no algorithm of torch.optim takes by position."""

    state_dtype: Annotated[
        torch.dtype | str | None,
        Default(None),
        'dtype in which new state is stored, float32 beside 16-bit parameters for instance, or `"float8"`: 8 bits and '
        "a scale for every 128 elements; the parameter's own if None.  Arithmetic is in float32 or better either way.",
    ]
    fused: Annotated[
        bool | None,
        Default(None),
        "True runs generated kernels, and raises where they cannot serve; None uses them where they can.  With True a "
        "GradScaler leaves unscaling and skipping to the step.",
    ]


class ModeOptions(KernelOptions, total=False):
    """What an algorithm takes as keywords that has `foreach` by position."""

    differentiable: Annotated[
        bool, Default(False), "let gradients flow through the step.  Runs one parameter at a time."
    ]
    capturable: Annotated[
        bool,
        Default(False),
        "keep the step count, and compute what depends on it, on the parameters' device, so that steps can be captured "
        "in a graph; tensors among the hyperparameters are read there.  Not on a CPU.",
    ]
    maximize: Annotated[bool, Default(False), "ascend rather than descend."]


class EngineOptions(ModeOptions, total=False):
    """Every option of a rule: who runs it, how its state is stored, and what is done around its update."""

    foreach: Annotated[
        bool | None,
        Default(None),
        "True runs lists of tensors at once with `torch._foreach_*`; False one parameter at a time.  None chooses the "
        "fastest engine.",
    ]


def arguments(scope: Mapping[str, Any]) -> dict[str, Any]:
    """Return a constructor's hyperparameters, given its `locals()`: all but `self` and `params`, and its `**options`.

    Raises:
        TypeError: `options` holds what is no option of this constructor.
    """
    own = {name: value for name, value in scope.items() if name not in ("self", "params", "__class__", "options")}
    given: dict[str, Any] = scope.get("options", {})
    parameters = inspect.signature(scope["__class__"].__init__).parameters.values()
    shared = {p.name: p.default for p in parameters if p.name not in scope}
    if unknown := given.keys() - shared.keys() - StepOptions.__annotations__.keys():
        names = ", ".join([*own, *shared, *StepOptions.__annotations__])
        raise TypeError(
            f"{type(scope['self']).__name__}() got an unexpected keyword argument {min(unknown)!r}; there are: {names}"
        )
    return own | shared | given


def complete_constructor(cls: Any) -> None:
    """Complete a class's signature, `ranges` and docstring from the annotations of its constructor."""
    constructor: Any = vars(cls).get("__init__")
    try:
        signature = inspect.signature(constructor)
    except (NameError, TypeError, ValueError):  # not its own, or nothing that can be inspected
        return
    notes = {name: _notes(parameter.annotation) for name, parameter in signature.parameters.items()}
    checks = {name: note for name, found in notes.items() for note in found if callable(note)}
    cls.ranges = {**cls.ranges, **checks}
    parameters = list(_expanded(signature))
    if any(notes.values()) or len(parameters) > len(signature.parameters):
        constructor.__signature__ = signature.replace(parameters=parameters)
    if cls.__doc__ and _PLACE in cls.__doc__:
        # Python 3.13 strips docstrings' indentation, earlier ones keep it.
        text = inspect.cleandoc(cls.__doc__)
        cls.__doc__ = text.replace(_PLACE, _documented(cls, notes, [p.name for p in parameters]))


_PLACE = "{arguments}"
_SHARED = EngineOptions.__annotations__


def _notes(annotation: Any) -> tuple[Any, ...]:
    """Return what `Annotated` adds to a type."""
    return tuple(getattr(annotation, "__metadata__", ()))


def _expanded(signature: inspect.Signature) -> Iterator[inspect.Parameter]:
    """Yield the parameters with their plain types, and before `**options` each engine option that it stands for."""
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            yield from _engine_options(parameter.annotation)
            yield parameter.replace(annotation=Unpack[StepOptions]) if _bundle(parameter.annotation) else parameter
        else:
            yield parameter.replace(annotation=_plain(parameter.annotation))


def _engine_options(annotation: Any) -> Iterator[inspect.Parameter]:
    bundle = _bundle(annotation)
    # A class lists what its base adds first, torch the other way round.
    for name in reversed(bundle.__annotations__ if bundle else ()):
        for note in _notes(_SHARED[name]):
            if isinstance(note, Default):
                kind = inspect.Parameter.KEYWORD_ONLY
                yield inspect.Parameter(name, kind, default=note.value, annotation=_plain(_SHARED[name]))


def _bundle(annotation: Any) -> Any:
    """Return the options that `Unpack[...]` stands for, if they are ours."""
    inner = next(iter(get_args(annotation)), None)
    return inner if inner in (WeightOptions, KernelOptions, ModeOptions, EngineOptions) else None


def _plain(annotation: Any) -> Any:
    return annotation.__origin__ if _notes(annotation) else annotation


# The docstring


def _documented(cls: Any, notes: Mapping[str, tuple[Any, ...]], names: list[str]) -> str:
    """Write the sections `Args` and, unless the class has its own, `Raises`."""
    lines = [line for name in names if (line := _line(cls, name, notes.get(name, ())))]
    sections = "\n".join(["Args:", *lines])
    return sections if "Raises:" in (cls.__doc__ or "") else f"{sections}\n\n{_errors(cls)}"


def _line(cls: Any, name: str, notes: tuple[Any, ...]) -> str:
    """Write what there is to say of an argument, wrapped; nothing of `self`."""
    known = {"params": _PARAMS, "options": _around(cls)}
    texts = [note for note in (*notes, *_notes(_SHARED.get(name)), known.get(name)) if isinstance(note, str)]
    if not texts:
        return ""
    ranges = [note.words for note in notes if isinstance(note, Interval | Each) and note.words]
    first, semicolon, rest = texts[0].removesuffix(".").partition(";")
    text = f"{name}: {', '.join([first, *ranges])}{semicolon}{rest}."
    return fill(text, 116, initial_indent=" " * 4, subsequent_indent=" " * 8, break_on_hyphens=False)


_PARAMS = "tensors, named tensors or groups; see `surefoot.Optimizer`."


def _around(cls: Any) -> str:
    names = ", ".join(f"`{name}`" for name in StepOptions.__annotations__ if name in cls.supported_step_options())
    return f"what is done around the update, alike for every optimizer: {names}; see `surefoot.StepOptions`."


def _errors(cls: Any) -> str:
    decayed = " with weight decay" if cls.sparse is Sparse.ROWS else ""
    return f"""Raises:
    ValueError: a hyperparameter is out of range.
    TypeError: a hyperparameter is not a number.
    RuntimeError: engine options contradict one another, or, in `step`, a gradient is sparse{decayed}."""
