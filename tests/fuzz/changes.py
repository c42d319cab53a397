"""What a user, a hook or another library may do between two steps: one table, `CHANGES`.

Each change is a function of a world and three numbers, by which it chooses; it has the same effect in a world and in
its twin.  Most leave tensors behind whose fitness can be seen (`judge.misfits`); whether a step may be refused for
what cannot be seen is an attribute of the change.
"""

import pickle
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from copy import copy, deepcopy
from typing import Any, NamedTuple

import numpy as np
import torch
from memory import lacks_memory, storage_of
from torch import Tensor, nn
from worlds import LAYOUTS, OTHER_DTYPE, World, canaries, laid_out, options_of, values

from surefoot.tensors.memory import is_dense


class Change(NamedTuple):
    """A row of the table.

    Attributes:
        apply: what is done.
        refusable: whether the next steps may be refused although all tensors fit, until the world is repaired.
        raises: whether the change itself may be refused by surefoot, and then must change nothing.
        between: whether it may happen between steps only, not in a hook or a closure.
        judge: "torch", or "eager" where surefoot's eager engine says what is right, since torch differs by design.
    """

    apply: Callable[[World, int, int, int], None]
    refusable: bool = False
    raises: bool = False
    between: bool = False
    judge: str = "torch"


CHANGES: dict[str, Change] = {}


def change(**attributes: Any) -> Callable[..., Any]:
    """Enter a function into the table, under its name."""

    def enter(function: Callable[[World, int, int, int], None]) -> Any:
        CHANGES[function.__name__.replace("_", " ").strip()] = Change(function, **attributes)
        return function

    return enter


class Plain(Tensor):
    """A subclass of tensors that means nothing else."""


def other_dtype(tensor: Tensor) -> torch.dtype:
    return OTHER_DTYPE.get(tensor.dtype, torch.float32)


def in_layout(tensor: Tensor, which: int) -> Tensor:
    return laid_out(tensor, LAYOUTS[which % len(LAYOUTS)])


def keep(world: World, *tensors: Any) -> None:
    """Keep tensors alive, and see to it that steps leave them alone."""
    world.extras += tensors


# Parameters


@change()
def data_in_another_layout(world, a, b, c):
    param = world.param(a)
    param.data = in_layout(param, b)


@change()
def data_of_another_dtype(world, a, b, c):
    param = world.param(a)
    param.data = param.data.to(other_dtype(param))


@change()
def data_complex_or_real(world, a, b, c):
    param = world.param(a)
    param.data = param.data.real.clone() if param.is_complex() else param.data.to(param.dtype.to_complex())


@change()
def data_of_another_shape(world, a, b, c):
    param = world.param(a)
    shape = [(*param.shape, 2), param.shape[1:], (3, *param.shape[1:]), (1,) * param.dim(), (param.numel(),)][b % 5]
    param.data = values(shape, param.dtype, c)


@change()
def data_expanded(world, a, b, c):
    param = world.param(a)
    if param.dim():
        one = param.data.select(b % param.dim(), 0) if param.numel() else param.data
        param.data = one.unsqueeze(b % param.dim()).expand(param.shape) if param.numel() else param.data


@change()
def data_swapped_between_parameters(world, a, b, c):
    one, other = world.param(a), world.param(b)
    one.data, other.data = other.data, one.data


@change()
def data_shared_by_two(world, a, b, c):
    one, other = world.param(a), world.param(b)
    if one is not other:
        one.data = other.data.view(one.shape) if one.numel() == other.numel() and other.is_contiguous() else other.data


@change()
def data_overlapping(world, a, b, c):
    one, other = world.param(a), world.param(a + 1)
    if one is not other:
        flat = values((one.numel() + other.numel() + 1,), one.dtype, c)
        start = min(1 + b % 3, one.numel())
        one.data = flat[: one.numel()].view(one.shape)
        other.data = flat[start : start + other.numel()].view(other.shape)


@change()
def data_at_the_end_of_a_storage(world, a, b, c):
    param = world.param(a)
    flat = canaries(param.numel() + 5, param.dtype)
    flat[5:].copy_(param.data.flatten())
    param.data = flat[5:].view(param.shape)


@change(refusable=True)
def data_negated_lazily(world, a, b, c):
    param = world.param(a)
    param.data = param.data.conj() if param.is_complex() and b % 2 else torch._neg_view(param.data)


@change(refusable=True)
def data_without_memory(world, a, b, c):
    param = world.param(a)
    param.data = torch._efficientzerotensor(param.shape, dtype=param.dtype)


@change(refusable=True)
def data_of_inference(world, a, b, c):
    param = world.param(a)
    with torch.inference_mode():
        new = param.data.clone()
    param.data = new


@change(refusable=True)
def data_of_integers(world, a, b, c):
    param = world.param(a)
    param.requires_grad_(requires_grad=False)
    param.data = param.data.abs().to([torch.int64, torch.int8, torch.bool][b % 3])


@change()
def set_to_new_storage(world, a, b, c):
    param = world.param(a)
    with torch.no_grad():
        param.set_(in_layout(param, b))


@change()
def set_to_part_of_a_storage(world, a, b, c):
    param = world.param(a)
    with torch.no_grad():
        new = canaries(2 * param.numel() + 8, param.dtype)
        new[4 : 4 + param.numel()].copy_(param.data.flatten())
        param.set_(new.untyped_storage(), 4, param.shape, torch.empty(param.shape, device="meta").stride())


@change()
def strided_anew(world, a, b, c):
    param = world.param(a)
    with torch.no_grad():
        if b % 3 == 0 and param.dim() > 1:
            param.t_() if param.dim() == 2 else param.transpose_(0, 1)
        elif b % 3 == 1 and param.dim() and param.numel():
            param.as_strided_(param.shape, (0,) * param.dim())
        elif b % 3 == 2 and param.dim():
            param.resize_(param.shape[0] + 1, *param.shape[1:])
            param.copy_(values(param.shape, param.dtype, c))


def resize(tensor: Tensor, how: int, seed: int) -> None:
    """Resize the storage of a tensor: to nothing, to less, to less and then to more that still is too little, ..."""
    storage = storage_of(tensor)
    if storage is None or not storage.nbytes() or not is_dense(tensor):
        return  # ours and torch's state may be ordered differently, and what is done must be the same to both
    whole, size = storage.nbytes(), tensor.element_size()
    sizes = [(0,), (whole // 2,), (size, whole - size), (0, whole - size), (0, whole), (whole * 2,), (size, whole)]
    chosen = sizes[how % len(sizes)]
    address = storage.data_ptr()
    for _ in range(20 if how % len(sizes) == 2 else 1):
        for nbytes in chosen:
            storage.resize_(max(0, nbytes))
        if storage.data_ptr() == address:
            break  # what looks at addresses only sees no change
    with torch.no_grad():  # whoever stands in the storage and still has memory is not to find garbage there
        flat = torch.empty(0, dtype=tensor.dtype).set_(storage)
        flat.copy_(values(flat.shape, tensor.dtype, seed))
        if not lacks_memory(tensor):
            tensor.detach().copy_(values(tensor.shape, tensor.dtype, seed))


@change()
def storage_resized(world, a, b, c):
    resize(world.param(a).data, b, c)


@change()
def swapped_with_new_tensor(world, a, b, c):
    param = world.param(a)
    grad, param.grad = param.grad, None
    new = nn.Parameter(in_layout(param, b), requires_grad=param.requires_grad)
    torch.utils.swap_tensors(param, new)
    param.grad = grad


@change(refusable=True)
def swapped_between_parameters(world, a, b, c):
    one, other = world.param(a), world.param(b)
    if one is not other:
        torch.utils.swap_tensors(one, other)


@change()
def module_cast(world, a, b, c):
    module = nn.ParameterList(world.params)
    dtype = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64][b % 5]
    if dtype.is_complex:
        module.to(dtype)
    elif not any(param.is_complex() for param in world.params):
        module.to(dtype if b % 5 < 2 else OTHER_DTYPE[world.dtype])


@change()
def requires_no_gradient(world, a, b, c):
    world.param(a).requires_grad_(requires_grad=False)


@change()
def values_changed_in_place(world, a, b, c):
    with torch.no_grad():
        world.param(a).mul_(0.5)


@change(refusable=True)
def moved_to_meta(world, a, b, c):
    param = world.param(a)
    new = nn.Parameter(torch.empty(param.shape, dtype=param.dtype, device="meta"), requires_grad=param.requires_grad)
    if b % 2:
        new.grad = torch.empty_like(new)
    param.grad = None
    torch.utils.swap_tensors(param, new)


# Gradients


def grad_of(world: World, number: int) -> Tensor | None:
    """Return the gradient of a parameter if it is dense and there is one."""
    grad = world.param(number).grad
    return grad if grad is not None and grad.layout is torch.strided else None


def put_grad(world: World, number: int, grad: Tensor) -> None:
    """Set a gradient past the checks of its setter."""
    param = world.param(number)
    try:
        param.grad = grad
    except (RuntimeError, TypeError):
        param.grad = torch.empty_like(param.data)
        param.grad.data = grad


@change()
def gradient_in_another_layout(world, a, b, c):
    if (grad := grad_of(world, a)) is not None:
        world.param(a).grad = None
        put_grad(world, a, in_layout(grad, b))


@change()
def gradient_of_another_dtype(world, a, b, c):
    if (grad := grad_of(world, a)) is not None:
        put_grad(world, a, grad.to(other_dtype(grad)))


@change()
def gradient_complex_or_real(world, a, b, c):
    if (grad := grad_of(world, a)) is not None:
        put_grad(world, a, grad.real.clone() if grad.is_complex() else grad.to(grad.dtype.to_complex()))


@change()
def gradient_of_integers(world, a, b, c):
    if (grad := grad_of(world, a)) is not None:
        put_grad(world, a, grad.real.to([torch.int64, torch.int8, torch.bool][b % 3]))


@change()
def gradient_expanded(world, a, b, c):
    if (grad := grad_of(world, a)) is not None and grad.dim() and grad.numel():
        put_grad(world, a, grad.select(b % grad.dim(), 0).unsqueeze(b % grad.dim()).expand(grad.shape))


@change()
def gradient_of_one_number(world, a, b, c):
    if (grad := grad_of(world, a)) is not None:
        put_grad(world, a, values((), grad.dtype, c).expand(grad.shape))


@change()
def gradient_of_another_shape(world, a, b, c):
    if (grad := grad_of(world, a)) is not None:
        shape = [(*grad.shape, 2), grad.shape[1:], (1,) * grad.dim(), (grad.numel(),), (1, *grad.shape)][b % 5]
        put_grad(world, a, values(shape, grad.dtype, c))


@change()
def gradient_negated_lazily(world, a, b, c):
    if (grad := grad_of(world, a)) is not None:
        put_grad(world, a, grad.conj() if grad.is_complex() and b % 2 else torch._neg_view(grad))


@change()
def gradient_without_memory(world, a, b, c):
    if (grad := grad_of(world, a)) is not None:
        put_grad(world, a, torch._efficientzerotensor(grad.shape, dtype=grad.dtype))


@change()
def gradient_dropped(world, a, b, c):
    world.param(a).grad = None


@change()
def gradient_with_history(world, a, b, c):
    if (grad := grad_of(world, a)) is not None and (grad.is_floating_point() or grad.is_complex()):
        put_grad(world, a, grad.detach().clone().requires_grad_() * 2)


@change()
def gradient_not_finite(world, a, b, c):
    if (grad := grad_of(world, a)) is not None and grad.numel() and not grad._is_zerotensor() and not grad.is_meta:
        put_grad(world, a, laid_out(grad, "contiguous"))
        grad = world.param(a).grad
        if grad.is_floating_point():
            grad.data.view(-1)[b % grad.numel()] = [float("nan"), float("inf"), -float("inf")][c % 3]


@change()
def gradient_of_subclass(world, a, b, c):
    if (grad := grad_of(world, a)) is not None:
        put_grad(world, a, grad.detach().as_subclass(Plain))


@change()
def gradient_shared_by_two(world, a, b, c):
    one, other = world.param(a), world.param(b)
    if one.grad is not None and one.shape == other.shape and one.dtype == other.dtype:
        put_grad(world, b, one.grad)


@change()
def gradient_is_a_parameter(world, a, b, c):
    one, other = world.param(a), world.param(b)
    if one.shape == other.shape:
        put_grad(world, a, other.detach())


@change()
def gradient_is_state(world, a, b, c):
    state, name = world.slot(b, c)
    if name is not None and state[name].shape == world.param(a).shape:
        put_grad(world, a, state[name])


@change(refusable=True)
def gradient_sparse(world, a, b, c):
    param = world.param(a)
    grad = values(param.shape, param.dtype, c)
    if param.dim() and param.numel():
        put_grad(world, a, grad.to_sparse(1 + b % param.dim()))


@change(refusable=True)
def gradient_sparse_and_dense(world, a, b, c):
    param = world.param(a)
    if param.grad is not None and param.grad.layout is torch.sparse_coo:
        param.grad = param.grad.to_dense()


@change(refusable=True)
def gradient_with_rows_outside(world, a, b, c):
    param = world.param(a)
    if param.dim() and param.numel():
        rows = torch.tensor([[0, [len(param), -1, 10**6][b % 3]]])
        grad = values((2, *param.shape[1:]), param.dtype, c)
        put_grad(world, a, torch.sparse_coo_tensor(rows, grad, param.shape, check_invariants=False))


@change()
def gradient_storage_resized(world, a, b, c):
    grad = world.param(a).grad
    if grad is not None:
        resize(grad._values() if grad.layout is torch.sparse_coo else grad.data, b, c)


@change(refusable=True)
def gradient_on_meta(world, a, b, c):
    if (grad := grad_of(world, a)) is not None:
        new = torch.empty(grad.shape, dtype=grad.dtype, device="meta")
        try:
            torch.utils.swap_tensors(grad, new)
        except RuntimeError:
            world.param(a).grad = None


@change()
def gradient_values_changed_in_place(world, a, b, c):
    if (grad := grad_of(world, a)) is not None and not grad._is_zerotensor():
        world.param(a).grad = laid_out(grad, "contiguous").mul_(2) if grad.dtype is not torch.bool else None


# State


def put_slot(world: World, a: int, b: int, make: Callable[[Tensor], Any]) -> None:
    """Replace a slot of a parameter's state."""
    state, name = world.slot(a, b)
    if name is not None:
        state[name] = make(state[name])


def put_slots(world: World, make: Callable[[Tensor], Any]) -> None:
    """Replace all slots of all parameters."""
    for a in range(len(world.params)):
        for name in [name for b in range(4) if (name := world.slot(a, b)[1]) is not None]:
            world.state(a)[name] = make(world.state(a)[name])


@change()
def state_in_another_layout(world, a, b, c):
    put_slot(world, a, b, lambda slot: in_layout(slot, c))


@change()
def all_state_guarded(world, a, b, c):
    for index in range(len(world.params)):
        for name in {world.slot(index, which)[1] for which in range(4)} - {None}:
            world.state(index)[name] = laid_out(world.state(index)[name], "guarded")


@change()
def state_of_another_dtype(world, a, b, c):
    for name in {world.slot(a, which)[1] for which in range(4)} - {None}:
        world.state(a)[name] = world.state(a)[name].to(other_dtype(world.state(a)[name]))


@change()
def state_complex_or_real(world, a, b, c):
    put_slot(world, a, b, lambda s: s.real.clone() if s.is_complex() else s.to(s.dtype.to_complex()))


@change()
def state_of_another_shape(world, a, b, c):
    def reshaped(slot: Tensor) -> Tensor:
        shape = [(*slot.shape, 2), slot.shape[1:], (1,) * slot.dim(), (slot.numel(),), (2, *slot.shape[1:])][c % 5]
        return values(shape, slot.dtype, c)

    put_slot(world, a, b, reshaped)


@change()
def state_expanded(world, a, b, c):
    def expanded(slot: Tensor) -> Tensor:
        if not slot.dim() or not slot.numel():
            return slot
        return slot.select(c % slot.dim(), 0).unsqueeze(c % slot.dim()).expand(slot.shape)

    put_slot(world, a, b, expanded)


@change()
def state_of_integers(world, a, b, c):
    put_slot(world, a, b, lambda slot: slot.real.to([torch.int8, torch.int64, torch.bool, torch.uint8][c % 4]))


@change(refusable=True)
def state_no_tensor(world, a, b, c):
    put_slot(
        world,
        a,
        b,
        lambda slot: (
            [slot.tolist(), slot.detach().clone().to(torch.float64).numpy(), 0.5, "text", None][c % 5]
            if not slot.is_complex()
            else [0.5]
        ),
    )


@change()
def state_shared_by_two(world, a, b, c):
    state, name = world.slot(a, b)
    other = world.state(a + 1 + c)
    if name is not None and name in other:
        other[name] = state[name]


@change()
def state_shared_by_slots(world, a, b, c):
    state, name = world.slot(a, b)
    _, other = world.slot(a, b + 1)
    if name is not None:
        state[name] = state[other] if c % 2 else state[other].view(state[other].shape)


@change()
def state_overlapping(world, a, b, c):
    state, name = world.slot(a, b)
    _, other = world.slot(a, b + 1)
    if name is not None and name != other and state[name].numel() == state[other].numel():
        slot = state[name]
        flat = values((slot.numel() + 2,), slot.dtype, c)
        flat = flat if slot.is_complex() else flat.abs()
        state[name] = flat[:-2].view(slot.shape)
        state[other] = flat[2:].view(slot.shape)


@change()
def state_is_the_parameter(world, a, b, c):
    state, name = world.slot(a, b)
    if name is not None and state[name].shape == world.param(a).shape:
        state[name] = world.param(a).detach()


@change()
def state_swapped_between_parameters(world, a, b, c):
    state, other = world.state(a), world.state(b)
    both = dict(state), dict(other)
    if state is not other and both[0] and both[1]:
        state.clear()
        other.clear()
        state.update(both[1])
        other.update(both[0])


@change()
def state_storage_resized(world, a, b, c):
    state, name = world.slot(a, b)
    if name is not None:
        resize(state[name], c, a)


@change(refusable=True)
def state_on_meta(world, a, b, c):
    put_slot(world, a, b, lambda slot: torch.empty(slot.shape, dtype=slot.dtype, device="meta"))


@change(refusable=True, judge="eager")
def state_entry_deleted(world, a, b, c):
    state = world.state(a)
    names = sorted(map(str, state))
    if names:
        del state[names[b % len(names)]]


@change(judge="eager")
def state_of_one_deleted(world, a, b, c):
    world.optimizer.state.pop(world.param(a), None)


@change()
def state_of_one_cleared(world, a, b, c):
    world.state(a).clear()


@change()
def state_cleared(world, a, b, c):
    world.optimizer.state.clear()


@change(refusable=True)
def state_dict_replaced(world, a, b, c):
    state, param = world.optimizer.state, world.param(a)
    if param in state:
        state[param] = dict(state[param]) if b % 2 else copy(state[param])


@change(refusable=True)
def state_zero_or_negated(world, a, b, c):
    put_slot(
        world,
        a,
        b,
        lambda slot: torch._neg_view(slot) if c % 2 else torch._efficientzerotensor(slot.shape, dtype=slot.dtype),
    )


@change(refusable=True)
def state_of_subclass(world, a, b, c):
    put_slot(world, a, b, lambda slot: slot.detach().as_subclass(Plain))


@change(refusable=True)
def state_sparse(world, a, b, c):
    put_slot(world, a, b, lambda slot: slot.to_sparse() if slot.dim() else slot)


@change(refusable=True)
def state_requires_gradient(world, a, b, c):
    put_slot(world, a, b, lambda slot: slot.detach().requires_grad_() if slot.is_floating_point() else slot)


@change()
def state_of_somebody_else(world, a, b, c):
    world.optimizer.state[world.param(a)]["of somebody else"] = values((3,), torch.float32, c)
    if not any(name in world.state(a) for name in ("step", "exp_avg", "momentum_buffer")):
        del world.optimizer.state[world.param(a)]["of somebody else"]


@change(refusable=True, judge="eager")
def scalar_replaced(world, a, b, c):
    state = world.state(a)
    names = sorted({"step", "eta", "mu", "mu_product"} & state.keys())
    if names:
        name = names[b % len(names)]
        number = float(state[name]) if not isinstance(state[name], str) else 1.0
        state[name] = [
            torch.tensor(number, dtype=torch.float64),
            int(number),
            torch.tensor([number]),
            torch.tensor(number).expand(2),
            torch.tensor(int(number)),
            np.float64(number),
            torch.tensor(complex(number)),
            np.array(number),
            torch.tensor(number, dtype=torch.bfloat16),
            torch._neg_view(torch.tensor(-number)),
            torch.empty((), device="meta"),
            str(number),
        ][c % 12]


@change(judge="eager")
def scalar_shared(world, a, b, c):
    state = world.state(a)
    for index in range(len(world.params)):
        other = world.state(index)
        if isinstance(state.get("step"), Tensor) and "step" in other:
            other["step"] = state["step"]


@change()
def scalar_storage_resized(world, a, b, c):
    step = world.state(a).get("step")
    if isinstance(step, Tensor) and not step.is_meta:
        resize(step, b, c)
        if b % 7 > 3:
            step.fill_(3)


# Optimizers


def keep_engine(world: World, groups: list[dict[str, Any]]) -> None:
    """Leave options of engines as they were, whatever was loaded."""
    for group, before in zip(world.optimizer.param_groups, groups, strict=False):
        for name in ("foreach", "fused"):
            if name in before:
                group[name] = before[name]


@change(raises=True)
def load_own(world, a, b, c):
    world.optimizer.load_state_dict(deepcopy(world.optimizer.state_dict()))


def has_removed_state(world: World) -> bool:
    """Whether there is state of parameters that were removed, of which torch can make no state dict."""
    stepped = {param for group in world.optimizer.param_groups for param in group["params"]}
    return any(isinstance(key, Tensor) and key not in stepped for key in world.optimizer.state)


@change(raises=True)
def load_of_twin(world, a, b, c):
    source = world if world.partner is None or b % 2 or has_removed_state(world.partner) else world.partner
    found = deepcopy(source.optimizer.state_dict())
    groups = [options_of(group) for group in world.optimizer.param_groups]
    mine = {name for group in groups for name in group}
    for group in found["param_groups"]:
        for name in [name for name in group if name not in mine | {"params", "param_names"}]:
            del group[name]
    world.optimizer.load_state_dict(found)
    keep_engine(world, groups)


@change(raises=True, judge="eager")
def load_altered(world, a, b, c):
    found = deepcopy(world.optimizer.state_dict())
    states = [state for state in found["state"].values() if isinstance(state, dict) and state]
    if not states:
        return
    state = states[a % len(states)]
    names = sorted(name for name, value in state.items() if isinstance(value, Tensor) and name != "step")
    if not names:
        return
    name = names[b % len(names)]
    old = state[name]
    state[name] = [
        lambda: values((*old.shape, 2), old.dtype, c),
        lambda: old.to(torch.complex64),
        lambda: old.to(torch.int8),
        old.tolist,
        lambda: laid_out(old, "strided"),
        lambda: old[:1].expand(old.shape) if old.dim() and old.numel() else old,
        lambda: old.to(torch.float64),
        lambda: torch.empty(old.shape, device="meta"),
        lambda: old.to_sparse() if old.dim() else old,
        lambda: values(old.shape[::-1], old.dtype, c),
    ][c % 10]()
    if world.who == "torch":
        raise ValueError("torch loads anything")
    world.optimizer.load_state_dict(found)


@change(between=True)
def copied(world, a, b, c):
    copied_ = deepcopy((world.params, world.optimizer, [p.grad for p in world.params]))
    install(world, *copied_)


@change(between=True)
def pickled(world, a, b, c):
    if sum(param.numel() for param in world.params) < 500 and not any(p.grad is not None for p in world.params[6:]):
        grads = [param.grad for param in world.params]
        install(world, *pickle.loads(pickle.dumps((world.params, world.optimizer, grads))))


def install(world: World, params: list[Any], optimizer: Any, grads: list[Any]) -> None:
    """Let copies take the place of a world's parameters and its optimizer."""
    if world.second is not None:
        return
    world.params, world.optimizer = params, optimizer
    world.hook()
    for index, grad in enumerate(grads):
        if grad is not None:
            put_grad(world, index, grad)


@change(raises=True)
def group_added(world, a, b, c):
    if len(world.params) > 7 or world.setting.algorithm == "LBFGS" or world.second is not None:
        return
    shape = (3, 2)
    param = nn.Parameter(in_layout(values(shape, world.dtype, c), b))
    name = f"weight{len(world.params)}"
    items = [(name, param)] if world.named else [param]
    named = {"algorithm": "AdamW"} if world.setting.algorithm == "Combined" else {}
    world.optimizer.add_param_group({"params": items, **named})
    world.params.append(param)
    world.names.append(name)
    param.grad = world.new_grad(param, c)


@change()
def learning_rate_changed(world, a, b, c):
    group = world.optimizer.param_groups[a % len(world.optimizer.param_groups)]
    group["lr"] = [0.02, 0.05, 0.0, 1][b % 4]


@change(refusable=True)
def learning_rate_a_tensor(world, a, b, c):
    group = world.optimizer.param_groups[a % len(world.optimizer.param_groups)]
    if world.setting.algorithm in ("SGD", "Adam", "AdamW"):
        group["lr"] = torch.tensor(0.03)


@change(refusable=True)
def option_changed(world, a, b, c):
    group = world.optimizer.param_groups[a % len(world.optimizer.param_groups)]
    unlike = {"momentum"} if world.setting.sparse else set()
    if world.setting.algorithm == "LBFGS":
        unlike.add("maximize")  # which torch's has later only
    names = sorted((OPTIONS.keys() & group) - unlike)
    if names:
        name = names[b % len(names)]
        group[name] = OPTIONS[name][c % 2]


OPTIONS: dict[str, tuple[Any, Any]] = {
    "betas": ((0.5, 0.9), (0.9, 0.99)),
    "momentum": (0.5, 0.0),
    "weight_decay": (0.05, 0.0),
    "maximize": (True, False),
    "amsgrad": (True, False),
}


@change()
def parameter_moved_to_another_group(world, a, b, c):
    groups = world.optimizer.param_groups
    if len(groups) > 1 and len(groups[0]["params"]) > 1:
        position = a % len(groups[0]["params"])
        groups[1]["params"].append(groups[0]["params"].pop(position))
        if "param_names" in groups[0]:
            groups[1]["param_names"].append(groups[0]["param_names"].pop(position))


@change()
def parameters_reordered(world, a, b, c):
    group = world.optimizer.param_groups[0]
    group["params"].reverse()
    if "param_names" in group:
        group["param_names"].reverse()


@change()
def parameter_removed(world, a, b, c):
    group = world.optimizer.param_groups[0]
    if len(group["params"]) > 1:
        group["params"].pop()
        if "param_names" in group:
            group["param_names"].pop()


@change()
def parameter_twice_in_a_group(world, a, b, c):
    group = world.optimizer.param_groups[0]
    if len(group["params"]) < 8 and world.setting.algorithm != "LBFGS":
        group["params"].append(group["params"][0])
        if "param_names" in group:
            group["param_names"].append(group["param_names"][0])


@change()
def parameters_in_another_sequence(world, a, b, c):
    for group in world.optimizer.param_groups:
        group["params"] = (list, list, tuple)[b % 3](group["params"])


@change()
def parameters_exchanged(world, a, b, c):
    groups = world.optimizer.param_groups
    one, other = (groups[number % len(groups)]["params"] for number in (a, b))
    if type(one) is type(other) is list and world.setting.algorithm != "LBFGS":
        i, j = c % len(one), a % len(other)
        one[i], other[j] = other[j], one[i]


@change()
def groups_replaced(world, a, b, c):
    groups = world.optimizer.param_groups
    if b % 2:
        groups[a % len(groups)] = dict(groups[a % len(groups)])
    else:
        world.optimizer.param_groups = list(groups)


@change(judge="eager")
def state_in_another_dict(world, a, b, c):
    world.optimizer.state = (dict, OrderedDict, lambda state: defaultdict(dict, state))[b % 3](world.optimizer.state)


@change()
def threads(world, a, b, c):
    torch.set_num_threads(1 + b % 2)


@change(between=True)
def second_optimizer(world, a, b, c):
    if world.second is None and world.setting.algorithm != "LBFGS":
        shapes = [(3, 2), (4, 3)]
        params = [nn.Parameter(in_layout(values(shape, world.dtype, c + i), b)) for i, shape in enumerate(shapes)]
        names = [f"weight{len(world.params) + i}" for i in range(len(params))]
        world.second = world.build(params, names)
        world.params += params
        world.names += names
        for param in params:
            param.grad = world.new_grad(param, c)
