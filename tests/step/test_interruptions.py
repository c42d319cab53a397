"""A step that is interrupted anywhere leaves nothing behind that makes later ones wrong."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import surefoot
from helpers import set_grads, train


class Interruption(KeyboardInterrupt):
    """What nobody else raises."""


def interrupted(call, line):
    """Call, and interrupt it at one of the lines of the package that it comes to; return whether it was."""
    passed, before = [0], sys.gettrace()

    def trace(frame, event, _):
        if "/surefoot/" not in frame.f_code.co_filename:
            return None
        passed[0] += event == "line"
        if passed[0] == line:
            sys.settrace(before)
            raise Interruption
        return trace

    sys.settrace(trace)
    try:
        call()
    except Interruption:
        return True
    finally:
        sys.settrace(before)
    return False


def tensors(optimizer, params):
    """All that a step writes."""
    return [
        *(param.detach() for param in params),
        *(value for entry in optimizer.state.values() for value in entry.values()),
    ]


CHANGES = {
    "nothing": lambda *_: None,
    "rates": lambda group, step: group.update(lr=0.1 / (1 + step)),
    "options": lambda group, step: group.update({"lr": 0.1 / (1 + step), f"title {step % 3}": step}),
    "moves": lambda group, _: [setattr(param, "data", param.data.clone()) for param in group["params"]],
    "layouts": lambda group, _: [setattr(p, "grad", p.grad.t().contiguous().t()) for p in group["params"][1:]],
}


@pytest.mark.parametrize("name", ["AdamW", "Muon"])
@pytest.mark.parametrize("change", CHANGES)
def test_an_interrupted_step_leaves_the_next_ones_right(change, name):
    with ThreadPoolExecutor(1) as thread:  # an interruption may leave torch's modes as they are, which are a thread's
        thread.submit(interrupt_steps, change, name).result()


def interrupt_steps(change, name):
    """Interrupt step after step, each a line later, and compare the next one with one that nothing is left for."""
    params = [torch.nn.Parameter(torch.linspace(-1, i, 6).view(2, 3)) for i in range(1, 4)]
    optimizer = train(getattr(surefoot, name)(params, lr=0.1), steps=5)
    for step in range(1, 250):
        set_grads(optimizer, step)
        CHANGES[change](optimizer.param_groups[0], step)
        before = [tensor.clone() for tensor in tensors(optimizer, params)]
        if not interrupted(optimizer.step, step):
            break
        after = []
        for forgets in (False, True):
            with torch.no_grad():
                torch._foreach_copy_(tensors(optimizer, params), before)
            kept = optimizer.__dict__.get("_step_cache")
            if forgets:
                optimizer._step_cache = None
            optimizer.step()
            after.append([tensor.clone() for tensor in tensors(optimizer, params)])
        assert all(map(torch.equal, *after))
        optimizer._step_cache = kept
