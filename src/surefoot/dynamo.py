"""torch.compile around what we do: methods that a compiled function calls as they are, without looking into them."""

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch._compile import _disable_dynamo
from torch.compiler import is_dynamo_compiling

Given = ParamSpec("Given")
Result = TypeVar("Result")


def opaque(method: Callable[Given, Result]) -> Callable[Given, Result]:
    """Keep torch.compile out of a method: a compiled function breaks off there and goes on behind it."""
    closed: Callable[Given, Result]

    @functools.wraps(method)
    def open_or_closed(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        # The first is a constant to the compiler, which would take all modules for inputs of the function.
        return (closed if is_dynamo_compiling() or "torch._dynamo" in sys.modules else method)(*args, **kwargs)

    def first_closed(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        nonlocal closed
        # Else it is compiled itself where torch calls it, once for every shape of a hook's tensor.
        if skip_code := getattr(torch._dynamo.eval_frame, "skip_code", None):
            skip_code(open_or_closed.__code__)  # type: ignore[attr-defined]
        closed = _disable_dynamo(method)
        return method(*args, **kwargs)

    closed = _disable_dynamo(first_closed)  # imports torch._dynamo, which takes seconds, only when it is called
    return open_or_closed
