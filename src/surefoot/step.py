"""A step of a rule: from param groups to buckets, and from buckets through an engine.

Everything that can be refused is refused while buckets are made, before any state exists or changes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from surefoot.engines import Bucket, Coefficients, Engine, choose
from surefoot.errors import RuleError
from surefoot.rule import Flags, Scalar, Slot, Sparse, bind

if TYPE_CHECKING:
    from surefoot.optimizer import Optimizer

CAPTURABLE_DEVICES = ("cuda", "xpu", "hpu", "privateuseone", "xla")
ENGINE_OPTIONS = ("foreach", "fused", "capturable", "differentiable")


class Row(NamedTuple):
    """A parameter to be stepped by an optimizer that is no rule; its state is there, its step counted."""

    h: SimpleNamespace
    param: Tensor
    grad: Tensor
    state: dict[str, Any]


@dataclass(eq=False)
class Work:
    """A bucket together with the parameters it comes from and the engine that will run it."""

    group: dict[str, Any]
    params: list[Tensor]
    bucket: Bucket
    engine: Engine


def run_rule(optimizer: "Optimizer") -> None:
    """Step every parameter that has a gradient."""
    works = [work for group in optimizer.param_groups for work in _divide(optimizer, group)]
    for work in works:
        _attach_state(optimizer, work)
        rows = [_SparseRows(grad) for grad in work.bucket.grads] if work.bucket.grads[0].is_sparse else None
        if rows is None:
            work.engine.run(work.bucket)
            continue
        present = _present_rows(work.bucket, rows)
        work.engine.run(present)
        for whole, part in zip((work.bucket.params, *work.bucket.slots), (present.params, *present.slots), strict=True):
            for tensor, values, row in zip(whole, part, rows, strict=True):
                tensor[row.index] = values


def rows(optimizer: "Optimizer") -> list[Row]:
    """Give every parameter that has a gradient, negated under `maximize`, with its state; check all of them first."""
    found = [
        (group, param, admissible_gradient(optimizer, group, param))
        for group in optimizer.param_groups
        for param in group["params"]
        if param.grad is not None
    ]
    return [_row(optimizer, group, param, grad) for group, param, grad in found]


def _row(optimizer: "Optimizer", group: Mapping[str, Any], param: Tensor, grad: Tensor) -> Row:
    ensure_state(optimizer, group, param, optimizer.slots)
    state = optimizer.state[param]
    if "step" in state:
        state["step"] += 1
    return Row(hyperparameters(group), param, -grad if group.get("maximize") else grad, state)


def make_state(optimizer: "Optimizer") -> None:
    """Make the state of every parameter, whether it has a gradient or not."""
    for group in optimizer.param_groups:
        flags = dict(flags_of(optimizer, group))
        for param in group["params"]:
            ensure_state(optimizer, group, param, active_slots(optimizer, flags))


def describe(group: Mapping[str, Any], param: Tensor) -> str:
    """Name a parameter for a message: its name, or its position in the group, and its shape."""
    position = next(i for i, candidate in enumerate(group["params"]) if candidate is param)
    name = group["param_names"][position] if "param_names" in group else f"params[{position}]"
    return f"`{name}` of shape {tuple(param.shape)}"


def flags_of(optimizer: "Optimizer", group: Mapping[str, Any]) -> Flags:
    """Settle the flags of a group: the truth of each hyperparameter that shapes the computation."""
    return tuple((name, bool(group.get(name, False))) for name in ("maximize", *optimizer.flags))


def active_slots(optimizer: "Optimizer", flags: Mapping[str, bool]) -> tuple[Slot, ...]:
    """Give the slots that exist under settled flags."""
    return tuple(slot for slot in optimizer.slots if slot.when is None or flags[slot.when])


def hyperparameters(group: Mapping[str, Any]) -> SimpleNamespace:
    """Give a group's options as attributes; tensors of one element as 0-d tensors."""
    return SimpleNamespace(**{name: _zero_dim(value) for name, value in group.items() if name != "params"})


def _zero_dim(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dim():
        return value.squeeze()
    return tuple(_zero_dim(item) for item in value) if isinstance(value, tuple) else value


def _divide(optimizer: "Optimizer", group: dict[str, Any]) -> Iterator[Work]:
    """Make the buckets of a group, refusing what the rule or the chosen engine cannot do."""
    flags = flags_of(optimizer, group)
    works: dict[tuple[Any, ...], Work] = {}
    for param in group["params"]:
        grad = param.grad
        if grad is None:
            continue
        grad = admissible_gradient(optimizer, group, param, flags)
        key = (param.device, param.dtype, grad.layout)
        if key not in works:
            rule = bind(type(optimizer), flags)
            bucket = Bucket(rule, [], [], {name: group.get(name) for name in ENGINE_OPTIONS})
            works[key] = Work(group, [], bucket, None)  # type: ignore[arg-type]
        works[key].params.append(param)
        works[key].bucket.params.append(_real(param))
        works[key].bucket.grads.append(grad if grad.is_sparse else _real(grad))
    for work in works.values():
        work.engine = choose(work.bucket)
        yield work


def admissible_gradient(optimizer: "Optimizer", group: Mapping[str, Any], param: Tensor, flags: Flags = ()) -> Tensor:
    """Give the gradient of a parameter in a layout that its optimizer takes.

    Raises:
        RuntimeError: a sparse gradient where the optimizer takes none, a dense one where it takes only sparse, a
            gradient or state whose shape or device is no longer that of the parameter.
        AssertionError: `capturable=True` on a device where steps cannot be captured.
    """
    grad: Tensor = param.grad  # type: ignore[assignment]
    name = type(optimizer).__name__
    if group.get("capturable") and param.device.type not in CAPTURABLE_DEVICES:
        raise AssertionError(
            f"If capturable=True, params and state_steps must be on supported devices: {list(CAPTURABLE_DEVICES)}, "
            f"but {describe(group, param)} is on {param.device}"
        )
    if param.is_complex() and not optimizer.complex_params:
        raise RuntimeError(f"{name} does not support complex parameters, but {describe(group, param)} is {param.dtype}")
    if grad.shape != param.shape:
        raise RuntimeError(
            f"the gradient of {describe(group, param)} has shape {tuple(grad.shape)}; set it to None after changing a "
            f"parameter's shape"
        )
    if grad.layout is torch.strided:
        if optimizer.sparse is Sparse.ONLY:
            raise RuntimeError(f"{name} does not support dense gradients, please consider Adam instead")
    elif not grad.is_sparse or optimizer.sparse is Sparse.REFUSED:
        raise RuntimeError(f"{name} does not support sparse gradients{optimizer.instead_of_sparse}")
    elif dict(flags).get("weight_decay"):
        raise RuntimeError("weight_decay option is not compatible with sparse gradients; set weight_decay=0")
    elif not optimizer.rows_suffice(dict(flags)):
        grad = grad.to_dense()
    for slot in optimizer.slots:
        _check_slot(group, param, slot, optimizer.state.get(param, {}).get(slot.name))
    return grad.coalesce() if grad.is_sparse else grad.resolve_conj().resolve_neg()


def _check_slot(group: Mapping[str, Any], param: Tensor, slot: Slot, value: Any) -> None:
    """Refuse state that does not fit its parameter (any more)."""
    if value is None or (value.shape == slot.shape_for(param) and value.device == param.device):
        return
    raise RuntimeError(
        f"state `{slot.name}` of {describe(group, param)} on {param.device} has shape {tuple(value.shape)} on "
        f"{value.device}; after replacing or moving a parameter, move its state too or delete it with "
        f"`del optimizer.state[param]`"
    )


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def ensure_state(optimizer: "Optimizer", group: Mapping[str, Any], param: Tensor, slots: tuple[Slot, ...]) -> bool:
    """Make what is missing of a parameter's state; tell whether a slot was missing."""
    state = optimizer.state[param]
    on_device = group.get("capturable") or (group.get("fused") and param.device.type != "cpu")
    for scalar in optimizer.scalars:
        if scalar.name not in state:
            state[scalar.name] = scalar.new(group, param.device if on_device else torch.device("cpu"))
    missing = [slot for slot in slots if state.get(slot.name) is None and slot.shape_for(param) is not None]
    for slot in missing:
        state[slot.name] = slot.new(param, group)
    return bool(missing)


def _attach_state(optimizer: "Optimizer", work: Work) -> None:
    """Give the bucket its slots and coefficients, and count the step."""
    bucket, known = work.bucket, dict[tuple[Any, ...], tuple[Coefficients, dict[str, float]]]()
    bucket.slots = [[] for _ in bucket.rule.slots]
    h = hyperparameters(work.group)
    for param in work.params:
        fresh = ensure_state(optimizer, work.group, param, bucket.rule.slots)
        state = optimizer.state[param]
        values = tuple(read_scalar(state, scalar) for scalar in optimizer.scalars)
        if (values, fresh) not in known:
            known[values, fresh] = _coefficients(optimizer, work, h, values, fresh=fresh)
        coefficients, scalars = known[values, fresh]
        for name, value in scalars.items():
            write_scalar(state, name, value)
        bucket.coefficients.append(coefficients)
        for tensors, slot in zip(bucket.slots, bucket.rule.slots, strict=True):
            tensors.append(_real(state[slot.name]))


def read_scalar(state: Mapping[str, Any], scalar: Scalar) -> float:
    """Read a scalar of the state as a Python number."""
    value = state[scalar.name]
    number: float = value.item() if isinstance(value, Tensor) else value
    return number


def write_scalar(state: dict[str, Any], name: str, value: Any) -> None:
    """Write a scalar of the state, in place where it is a tensor."""
    if isinstance(state[name], Tensor):
        state[name].fill_(value.detach() if isinstance(value, Tensor) else value)
    else:
        state[name] = type(state[name])(value)


def _coefficients(
    optimizer: "Optimizer", work: Work, h: SimpleNamespace, values: tuple[float, ...], *, fresh: bool
) -> tuple[Coefficients, dict[str, float]]:
    """Compute the numbers of an update and the new scalars from the present scalars."""
    scalars = {scalar.name: value for scalar, value in zip(optimizer.scalars, values, strict=True)}
    if "step" in scalars:
        scalars["step"] += 1
    numbers = {name: value for name, value in vars(h).items() if isinstance(value, float | int | Tensor)}
    derived = optimizer.coefficients(h, **scalars)
    numbers |= {"fresh": fresh, **derived}
    scalars |= {name: derived[name] for name in scalars if name in derived}
    if missing := [name for name in work.bucket.rule.coefficients if name not in numbers]:
        raise RuleError(
            f"{work.bucket.rule.name}.update reads c.{missing[0]}, which is neither a hyperparameter nor given by "
            f"`coefficients`; there are: {', '.join(sorted(numbers))}"
        )
    keep = bool(work.group.get("differentiable"))
    return {name: _number(numbers[name], keep) for name in work.bucket.rule.coefficients}, scalars


def _number(value: Any, keep_tensors: bool) -> Any:
    return value.item() if isinstance(value, Tensor) and not keep_tensors else value


class _SparseRows:
    """The rows at which a coalesced sparse gradient has values."""

    def __init__(self, grad: Tensor) -> None:
        self.index = tuple(grad.indices())
        self.values = _real(grad.values())


def _present_rows(bucket: Bucket, rows: list[_SparseRows]) -> Bucket:
    """Gather the rows of parameters and slots that have a gradient into a bucket of their own."""
    params, *slots = (
        [tensor[row.index] for tensor, row in zip(tensors, rows, strict=True)]
        for tensors in (bucket.params, *bucket.slots)
    )
    grads = [row.values for row in rows]
    return Bucket(bucket.rule, params, grads, bucket.options, slots, bucket.coefficients)
