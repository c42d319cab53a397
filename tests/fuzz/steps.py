"""A step of a world: gradients as a backward pass leaves them, the call of `step`, and what it raises."""

import functools
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from memory import lacks_memory, overlaps_itself
from torch import Tensor
from worlds import World, values


def attempt(call: Callable[[], Any]) -> Exception | None:
    """Call something; return what it raised."""
    try:
        call()
    except Exception as error:  # noqa: BLE001 (whatever it is, it is judged)
        error.origin = _origin(error)
        forget_frames(error)
        return error
    return None


def forget_frames(error: BaseException | None) -> None:
    """Let an error hold no tensors: what holds a tensor keeps it from being swapped."""
    while error is not None:
        error.__traceback__, error = None, error.__context__


def _origin(error: BaseException) -> str:
    """Say where in surefoot an error came from."""
    trace, place = error.__traceback__, "?"
    while trace is not None:
        if "surefoot" in trace.tb_frame.f_code.co_filename:
            place = f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place


def give_gradients(world: World, how: str, seed: int) -> None:
    """Let a backward pass happen."""
    for index, param in enumerate(world.params):
        if how == "kept" and param.grad is not None:
            continue
        if param.is_meta or not (param.is_floating_point() or param.is_complex()):
            continue
        if how == "some" and (seed + index) % 3 == 0:
            param.grad = None
            continue
        new = world.new_grad(param, seed + index)
        grad = param.grad
        if how == "in place" and type(grad) is Tensor and _takes(grad, new):
            grad.detach().copy_(new)
        else:
            param.grad = None
            param.grad = new


def _takes(grad: Tensor, new: Tensor) -> bool:
    if grad.layout is not torch.strided or new.layout is not torch.strided or grad.is_meta or grad._is_zerotensor():
        return False
    return grad.shape == new.shape and grad.dtype == new.dtype and not lacks_memory(grad) and not overlaps_itself(grad)


def give_gradients_of_quadratic(world: World) -> None:
    """Return gradients of a function that falls with the steps of LBFGS."""
    for index, param in enumerate(world.params):
        if param.is_floating_point() or param.is_complex():
            param.grad = None
            target = values(param.shape, param.dtype, index)
            param.grad = target if lacks_memory(param) else (param.detach() - target) * 0.5


def in_threads(calls: Iterable[Callable[[], Any]], *, at_once: bool) -> list[BaseException | None]:
    """Make calls in threads of their own, one after the other or at once; return what they raised."""
    errors: dict[int, BaseException | None] = {}
    threads = []
    for index, call in enumerate(calls):
        threads.append(threading.Thread(target=lambda i=index, c=call: errors.update({i: attempt(c)})))
        threads[-1].start()
        if not at_once:
            threads[-1].join()
    for thread in threads:
        thread.join()
    return [errors[index] for index in sorted(errors)]


def take_step(world: World, how: str, with_closure: bool, number: int) -> BaseException | None:
    """Take a step of all optimizers; return what it raised."""

    def closure() -> float:
        world.run_deferred("closure")
        if world.setting.algorithm == "LBFGS":
            give_gradients_of_quadratic(world)
        if how == "closure raises":
            raise ArithmeticError("of a closure")
        return 1.0

    def call(optimizer: torch.optim.Optimizer) -> Any:
        if how == "scaled":
            return scaled_step(optimizer)
        return optimizer.step(closure) if with_closure else optimizer.step()

    calls = [functools.partial(call, optimizer) for optimizer in world.optimizers]
    if world.who == "ours" and how in ("both", "thread"):
        errors = in_threads(calls, at_once=how == "both")
    else:
        with torch.inference_mode() if how == "inference" else torch.set_grad_enabled(how == "enabled"):
            errors = list(map(attempt, calls))
    return next((error for error in errors if error is not None), None)


def scaled_step(optimizer: torch.optim.Optimizer) -> None:
    """Take a step by way of a GradScaler, which takes gradients for twice what they are."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
