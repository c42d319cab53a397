"""surefoot's optimizers among those that timm makes by name."""

import inspect
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from timm.optim import OptimInfo
from timm.optim._optim_factory import default_registry

from surefoot import optimizers

PREFIX = "surefoot-"
_LEFT_OUT = ("LBFGS", "Muon", "Rprop", "SparseAdam")
"""Those that do not step any dense parameter from its gradient, or take no weight decay, which timm always gives."""


def register() -> list[str]:
    """Let `timm.optim.create_optimizer_v2`, and so the option `--opt` of timm's scripts, make optimizers of surefoot's.

    What timm takes from torch.optim is there with `surefoot-` before its name and timm's own defaults (`surefoot-sgd`
    has Nesterov's momentum, `surefoot-momentum` has not), every other algorithm by its name in small letters:
    `surefoot-lion`, `surefoot-adamwschedulefree`.  `lookahead_surefoot-adamw` works as well.  LBFGS, Muon
    and SparseAdam, which do not step every parameter of a model from its gradient, and Rprop, which takes none of the
    weight decay that timm gives, are left out.

    Returns:
        The names, in alphabetical order.
    """
    infos = {info.name: info for info in (*_own(), *_of_torch())}
    known = set(default_registry.list_optimizers())
    for name in infos.keys() - known:
        default_registry.register(infos[name])
    return sorted(name for name in {*infos, *known} if name.startswith(PREFIX))


def _of_torch() -> Iterator[Any]:
    """Yield timm's entries for classes of torch.optim, with ours in their place."""
    for name in default_registry.list_optimizers():
        info = default_registry.get_optimizer_info(name)
        ours = getattr(info.opt_class, "__name__", "")
        if ours in optimizers.__all__ and info.opt_class is getattr(torch.optim, ours, None):
            description = f"surefoot.{ours}"
            yield replace(info, name=f"{PREFIX}{name}", opt_class=getattr(optimizers, ours), description=description)


def _own() -> Iterator[Any]:
    """Yield an entry for every algorithm."""
    for name in optimizers.__all__:
        if name in _LEFT_OUT:
            continue
        arguments = inspect.signature(getattr(optimizers, name)).parameters
        betas = arguments["betas"].default if "betas" in arguments else ()
        yield OptimInfo(
            name=f"{PREFIX}{name.lower()}",
            opt_class=getattr(optimizers, name),
            description=f"surefoot.{name}",
            has_eps="eps" in arguments,
            has_momentum="momentum" in arguments,
            has_betas=bool(betas),
            num_betas=len(betas),
        )
