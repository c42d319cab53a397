"""Checkpoints that other ranks have saved, of another number, loaded in every layout."""

import functools
import itertools
from pathlib import Path

from cases_checkpoints import loaded
from cases_layouts import layouts


def cases(world):
    source, known = Path("saved by others").resolve(), layouts(world)
    for saved, layout in itertools.product(("rows", "columns", "copies", "columns of two"), known):
        yield f"loaded / {saved} / {layout}", functools.partial(loaded, source / saved, known[layout])
