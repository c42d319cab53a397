"""The state of every random generator that a training loop draws from without naming it."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor


def rng_state() -> dict[str, Any]:
    """Return the states of the global generators of Python, numpy and torch, and of CUDA devices if CUDA is used."""
    in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),  # noqa: NPY002 (the global one is what is saved)
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if in_use else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Set what `rng_state` gave."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    for index, part in enumerate(state["cuda"]):
        torch.cuda.set_rng_state(part, index)


def rng_problems(state: Any) -> list[str]:
    """Say why `set_rng_state` would fail, by trying what can be tried on generators of its own."""
    trials: dict[str, Callable[[Any], object]] = {
        "python": random.Random().setstate,  # noqa: S311 (nothing is drawn)
        "numpy": np.random.RandomState().set_state,
        "torch": torch.Generator().set_state,
    }
    problems = []
    for name, trial in trials.items():
        try:
            trial(state[name])
        except (TypeError, ValueError, RuntimeError, KeyError) as error:
            problems.append(f"the state of {name}'s generator is not valid here ({error})")
    cuda = state.get("cuda") if isinstance(state, dict) else None
    if not isinstance(cuda, list) or not all(isinstance(part, Tensor) for part in cuda):
        problems.append("the states of CUDA's generators are malformed")
    elif len(cuda) > torch.cuda.device_count():
        problems.append(
            f"it has generators of {len(cuda)} CUDA devices, here are {torch.cuda.device_count()}; rng=False"
        )
    return problems
