"""Algorithms that torch.optim does not have, against the implementations that others use.

    pip install surefoot[references]
    python benchmarks/peers.py        # in about five minutes on two quiet cores

It prints a table and writes `benchmarks/results/peers.csv`.  Peers run as they do by default, and with `foreach=True`
where they have it; what is not installed is left out, and said.  Ratios are of neighbours in time.
"""

import contextlib
import importlib
import importlib.util
import io
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import Parameter
from turns import Line, compare, run, timed

import surefoot

SHAPES: Mapping[str, Sequence[tuple[int, ...]]] = {
    "1000 x 1 k": [(1000,)] * 1000,
    "200 x 100 k": [(250, 400)] * 200,
    "8 x 4 M": [(2000, 2000)] * 8,
}


class Peer(NamedTuple):
    """An implementation of one of our algorithms.

    Attributes:
        algorithm: our class.
        module, name: where theirs is.
        options: hyperparameters of theirs under which it is the same algorithm, where the defaults are not.
    """

    algorithm: str
    module: str
    name: str
    options: Mapping[str, Any] = {}

    @property
    def package(self) -> str:
        """Return the name of its package."""
        return self.module.partition(".")[0]


OTHERS = "pytorch_optimizer.optimizer"
PEERS = (
    Peer("Lion", "lion_pytorch.lion_pytorch", "Lion"),
    Peer("Lion", "timm.optim.lion", "Lion"),
    Peer("Lion", "optimi.lion", "Lion"),
    Peer("Signum", f"{OTHERS}.sgd", "SignSGD"),
    Peer("AdEMAMix", f"{OTHERS}.ademamix", "AdEMAMix", {"weight_decouple": True}),
    Peer("Adan", "timm.optim.adan", "Adan"),
    Peer("Adan", f"{OTHERS}.adan", "Adan"),
    Peer("Adan", "optimi.adan", "Adan"),
    Peer("AdaBelief", "adabelief_pytorch.AdaBelief", "AdaBelief"),
    Peer("AdaBelief", "timm.optim.adabelief", "AdaBelief"),
    Peer("ADOPT", "timm.optim.adopt", "Adopt"),
    Peer("AdamAtan2", "adam_atan2_pytorch.adam_atan2", "AdamAtan2"),
    Peer("LaProp", "timm.optim.laprop", "LaProp"),
    Peer("QHAdam", f"{OTHERS}.qhadam", "QHAdam"),
    Peer("Yogi", f"{OTHERS}.yogi", "Yogi"),
    Peer("LAMB", "timm.optim.lamb", "Lamb"),
    Peer("LARS", "timm.optim.lars", "Lars", {"momentum": 0.9}),
    Peer("StableAdamW", "optimi.stableadamw", "StableAdamW", {"triton": False}),
    Peer("NovoGrad", "timm.optim.nvnovograd", "NvNovoGrad"),
    Peer("MARS", "timm.optim.mars", "Mars"),
    Peer("AdamWScheduleFree", "schedulefree.adamw_schedulefree", "AdamWScheduleFree"),
    Peer("SGDScheduleFree", "schedulefree.sgd_schedulefree", "SGDScheduleFree"),
    Peer("RAdamScheduleFree", "schedulefree.radam_schedulefree", "RAdamScheduleFree"),
)
OURS: Mapping[str, Mapping[str, Any]] = {"LARS": {"momentum": 0.9}}


def peers(rounds: int) -> Iterator[Line]:
    """Every algorithm with every list of shapes."""
    classes = [(peer, _class_of(peer)) for peer in PEERS if _is_installed(peer)]
    for algorithm in dict.fromkeys(peer.algorithm for peer, _ in classes):
        for case, shapes in SHAPES.items():
            yield from compare("peers", f"{algorithm}, {case}", _steps(algorithm, shapes, classes), rounds)


def _is_installed(peer: Peer) -> bool:
    if peer.package not in sys.modules and importlib.util.find_spec(peer.package) is None:
        print(f"{peer.package} is not installed: no {peer.name}")
        return False
    return True


def _steps(
    algorithm: str, shapes: Sequence[tuple[int, ...]], classes: Sequence[tuple[Peer, type[Any]]]
) -> dict[str, Callable[[], float]]:
    """Return what steps each implementation of an algorithm and gives the seconds of it, ours first."""
    steps = {"surefoot": _step(getattr(surefoot, algorithm), shapes, OURS.get(algorithm, {}))}
    for peer, implementation in classes:
        if peer.algorithm == algorithm:
            steps[peer.package] = _step(implementation, shapes, peer.options)
            with contextlib.suppress(TypeError):  # not every one has the option
                steps[f"{peer.package} foreach"] = _step(implementation, shapes, {**peer.options, "foreach": True})
    return steps


def _step(kind: type[Any], shapes: Sequence[tuple[int, ...]], options: Mapping[str, Any]) -> Callable[[], float]:
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)
    with contextlib.redirect_stdout(io.StringIO()):  # some print their options
        optimizer = kind(params, lr=1e-3, **options)
    if hasattr(optimizer, "train"):
        optimizer.train()
    return lambda: timed(optimizer.step)


def _class_of(peer: Peer) -> type[Any]:
    """Load a module without what its packages import beside it, which may need more than the optimizers do."""
    for end in range(1, peer.module.count(".") + 1):
        package = ".".join(peer.module.split(".")[:end])
        if package not in sys.modules:
            found = importlib.util.find_spec(package)
            sys.modules[package] = types.ModuleType(package)
            sys.modules[package].__path__ = list(found.submodule_search_locations if found else [])
    return getattr(importlib.import_module(peer.module), peer.name)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    run({"peers": peers}, "peers", __doc__)
