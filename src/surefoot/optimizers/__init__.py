"""The algorithms, one file each: what they compute and nothing about how it is run.

`__all__` is the one list of them: the package, the benchmarks, the demo and the tests go by it, in its order.  A class
is imported when it is first asked for, so that the list is there before torch is.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surefoot.optimizers.adabelief import AdaBelief
    from surefoot.optimizers.adadelta import Adadelta
    from surefoot.optimizers.adafactor import Adafactor
    from surefoot.optimizers.adagrad import Adagrad
    from surefoot.optimizers.adam import Adam, AdamW
    from surefoot.optimizers.adam_atan2 import AdamAtan2
    from surefoot.optimizers.adamax import Adamax
    from surefoot.optimizers.adan import Adan
    from surefoot.optimizers.ademamix import AdEMAMix
    from surefoot.optimizers.adopt import ADOPT
    from surefoot.optimizers.asgd import ASGD
    from surefoot.optimizers.lamb import LAMB
    from surefoot.optimizers.laprop import LaProp
    from surefoot.optimizers.lars import LARS
    from surefoot.optimizers.lbfgs import LBFGS
    from surefoot.optimizers.lion import Lion
    from surefoot.optimizers.mars import MARS
    from surefoot.optimizers.muon import Muon
    from surefoot.optimizers.nadam import NAdam
    from surefoot.optimizers.novograd import NovoGrad
    from surefoot.optimizers.prodigy import Prodigy
    from surefoot.optimizers.qhadam import QHAdam
    from surefoot.optimizers.radam import RAdam
    from surefoot.optimizers.rmsprop import RMSprop
    from surefoot.optimizers.rprop import Rprop
    from surefoot.optimizers.schedule_free import AdamWScheduleFree, RAdamScheduleFree, SGDScheduleFree
    from surefoot.optimizers.sgd import SGD
    from surefoot.optimizers.signum import Signum
    from surefoot.optimizers.soap import SOAP
    from surefoot.optimizers.sparse_adam import SparseAdam
    from surefoot.optimizers.stable_adamw import StableAdamW
    from surefoot.optimizers.yogi import Yogi

__all__ = [  # noqa: RUF022 (the order of tables)
    "SGD",
    "Adam",
    "AdamW",
    "NAdam",
    "RAdam",
    "Adamax",
    "Adadelta",
    "Adagrad",
    "RMSprop",
    "Rprop",
    "ASGD",
    "Adafactor",
    "Muon",
    "LBFGS",
    "SparseAdam",
    "Lion",
    "Signum",
    "AdEMAMix",
    "Adan",
    "AdaBelief",
    "ADOPT",
    "AdamAtan2",
    "LaProp",
    "QHAdam",
    "Yogi",
    "AdamWScheduleFree",
    "SGDScheduleFree",
    "RAdamScheduleFree",
    "LAMB",
    "LARS",
    "StableAdamW",
    "NovoGrad",
    "MARS",
    "Prodigy",
    "SOAP",
]

NOT_IN_TORCH = frozenset(
    {
        *("Lion", "Signum", "AdEMAMix", "Adan", "AdaBelief", "ADOPT", "AdamAtan2", "LaProp", "QHAdam", "Yogi"),
        *("AdamWScheduleFree", "SGDScheduleFree", "RAdamScheduleFree"),
        *("LAMB", "LARS", "StableAdamW", "NovoGrad", "MARS", "Prodigy", "SOAP"),
    }
)
"""Those that torch.optim does not have, so that nothing there can be compared with them."""

_FUNCTIONS = {"AdamAtan2": "adam_atan2", "SparseAdam": "sparse_adam", "StableAdamW": "stable_adamw"}
_FUNCTIONS |= {f"{name}ScheduleFree": f"{name.lower()}_schedule_free" for name in ("AdamW", "SGD", "RAdam")}
_FILES = {"AdamW": "adam"}
_FILES |= {f"{name}ScheduleFree": "schedule_free" for name in ("AdamW", "SGD", "RAdam")}
"""Where an algorithm's function, or its file, is not its name in small letters."""


def function_name(name: str) -> str:
    """Return what an algorithm is called as a function, and as a file unless it shares one."""
    return _FUNCTIONS.get(name, name.lower())


if not TYPE_CHECKING:  # or any name would pass for one of ours

    def __getattr__(name: str) -> Any:
        """Import an algorithm when it is first asked for."""
        if name not in __all__:
            raise AttributeError(f"module 'surefoot.optimizers' has no attribute {name!r}")
        module = importlib.import_module(f"surefoot.optimizers.{_FILES.get(name, function_name(name))}")
        return globals().setdefault(name, getattr(module, name))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
