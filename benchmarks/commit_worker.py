"""Steps of one commit's surefoot, taken on request: one of the two processes that `commits.py` compares.

It knows no more of surefoot than the names of optimizers, so that it can run commits of any age.  A line of JSON comes
in, one goes out: a case is made ready, or so many of its steps are timed.
"""

import json
import sys
from collections.abc import Callable, Mapping
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch.nn import Parameter

import surefoot

_WARM_UP = 3


class Case:
    """An optimizer with parameters and gradients.

    Args:
        optimizer: the name of its class.
        options: further arguments of the constructor.
        shapes: one for each parameter.
        dtype: of the parameters, such as "float32".
        threads: how many torch may use.

    Raises:
        AttributeError: this commit has no such optimizer.
        TypeError: or not with these options.
    """

    def __init__(
        self, optimizer: str, options: Mapping[str, Any], shapes: list[list[int]], dtype: str, threads: int
    ) -> None:
        torch.set_num_threads(threads)
        generator = torch.Generator().manual_seed(0)
        params = [Parameter(torch.zeros(shape, dtype=getattr(torch, dtype))) for shape in shapes]
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).mul_(0.01).to(param.dtype)
        self.grads = [param.grad for param in params]
        self.step: Callable[[], object] = getattr(surefoot, optimizer)(params, **options).step
        self.seconds(_WARM_UP)

    def seconds(self, steps: int) -> float:
        """Return the median time of so many steps, after one that finds the caches full of another's data."""
        self.step()
        times = []
        for _ in range(steps):
            start = perf_counter()
            self.step()
            times.append(perf_counter() - start)
        torch._foreach_neg_(self.grads)  # averages must not settle, where a variance becomes zero
        return median(times)


def main() -> None:
    """Answer until the other end closes the pipe."""
    case: Case | None = None
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = {}
        try:
            if "steps" in request and case is not None:
                answer["seconds"] = case.seconds(request["steps"])
            else:
                case = None  # frees its memory before the next one takes some
                case = Case(**request)
        except (AttributeError, TypeError, ValueError) as error:
            answer["error"] = f"{error}"
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
