"""How each optimizer is shown: its settings and its part of the model.

An optimizer that needs more than the settings that suit most has a row.  torch is not imported here, so that a
misspelt name is refused at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from enum import Enum
from types import MappingProxyType
from typing import Any

from surefoot import optimizers


class TrainedPart(Enum):
    """The parameters that the named optimizer trains; a companion of the same library trains the others."""

    EVERYTHING = "every parameter"
    MATRICES = "the weight matrices of the blocks"
    TABLE = "a table of pairs of characters, with sparse gradients"


@dataclass(frozen=True)
class Recipe:
    """Settings with which one optimizer makes the loss fall in about a minute.

    Attributes:
        lr: the learning rate of the named optimizer; positive.
        steps: training steps; 1 or more.
        batch: sequences in a batch; 1 or more.
        options: further arguments of the optimizer's constructor.
        part: the parameters that the named optimizer trains.
        companion: the optimizer of the other parameters, with its learning rate in `companion_lr`.
        companion_lr: the learning rate of the companion.
        closure: whether `step` evaluates the loss itself, several times, through a closure.
        note: what a reader has to know about this choice, as a sentence.
        reference: the optimizer of torch.optim that is trained beside it, where torch.optim does not have it.
    """

    lr: float = 2e-3
    steps: int = 400
    batch: int = 8
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    part: TrainedPart = TrainedPart.EVERYTHING
    companion: str | None = None
    companion_lr: float = 2e-3
    closure: bool = False
    note: str = ""
    reference: str | None = None


_SPECIAL: Mapping[str, Recipe] = MappingProxyType(
    {
        "SGD": Recipe(lr=0.1, options={"momentum": 0.9}, note="SGD runs with momentum=0.9."),
        "RAdam": Recipe(lr=3e-3),
        "Adamax": Recipe(lr=4e-3),
        "Adadelta": Recipe(lr=1.0),
        "Adagrad": Recipe(lr=1e-2),
        "RMSprop": Recipe(lr=1e-3),
        "Rprop": Recipe(
            lr=1e-3,
            options={"etas": (0.7, 1.2), "step_sizes": (1e-5, 3e-3)},
            note="Rprop is made for noiseless gradients: for batches etas=(0.7, 1.2) and step_sizes=(1e-5, 3e-3).",
        ),
        "ASGD": Recipe(lr=0.3),
        "Adafactor": Recipe(lr=5e-2),
        "Muon": Recipe(
            lr=2e-2,
            part=TrainedPart.MATRICES,
            companion="AdamW",
            note="Muon takes matrices only: AdamW of the same library trains the other parameters.",
        ),
        "LBFGS": Recipe(
            lr=1.0,
            steps=25,
            batch=32,
            closure=True,
            options={"max_iter": 5, "history_size": 10, "line_search_fn": "strong_wolfe"},
            note="LBFGS evaluates the loss several times in each step; that is not counted as its own time.",
        ),
        "SparseAdam": Recipe(
            lr=2e-3,
            part=TrainedPart.TABLE,
            companion="Adam",
            note="SparseAdam takes sparse gradients only: Adam of the same library trains the other parameters.",
        ),
        "Lion": Recipe(lr=5e-4),
        "Signum": Recipe(lr=5e-4),
        "Yogi": Recipe(lr=5e-3),
        "AdamWScheduleFree": Recipe(lr=5e-3),
        "SGDScheduleFree": Recipe(lr=1.0),
        "RAdamScheduleFree": Recipe(lr=5e-3),
        "LAMB": Recipe(lr=1e-2),
        "LARS": Recipe(
            lr=10.0,
            options={"momentum": 0.9, "weight_decay": 1e-4},
            note="LARS runs with momentum=0.9 and weight_decay=1e-4, without which it would be SGD.",
        ),
        "NovoGrad": Recipe(lr=1e-2),
        "Prodigy": Recipe(lr=1.0),
    }
)
REFERENCE = "AdamW"


def _recipe(name: str) -> Recipe:
    recipe = _SPECIAL.get(name, Recipe())
    return replace(recipe, reference=REFERENCE) if name in optimizers.NOT_IN_TORCH else recipe


RECIPES: Mapping[str, Recipe] = MappingProxyType({name: _recipe(name) for name in optimizers.__all__})


def resolve(name: str) -> str:
    """Spell an optimizer's name as its class is called, whatever the case of its letters.

    Args:
        name: the name as the user wrote it.

    Raises:
        ValueError: if there is none of that name; the text lists the names and the nearest one.
    """
    spelling = {known.casefold(): known for known in RECIPES}
    if name.casefold() in spelling:
        return spelling[name.casefold()]
    nearest = get_close_matches(name.casefold(), spelling, n=1)
    hint = f"did you mean {spelling[nearest[0]]}? Choose" if nearest else "choose"
    raise ValueError(f"there is no optimizer {name!r}; {hint} one of {', '.join(sorted(RECIPES))}.")
