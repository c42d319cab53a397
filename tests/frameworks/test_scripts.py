"""The scripts of docs/frameworks.md, as they stand there."""

import re
from pathlib import Path

import pytest
import torch

from conftest import difference

PAGE = Path(__file__).parents[2] / "docs" / "frameworks.md"


def sections():
    """Return the scripts of the page by their headings, each in its parts."""
    text = PAGE.read_text(encoding="utf-8")
    _, *parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    block = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    scripts = {title: block.findall(body) for title, body in zip(parts[::2], parts[1::2], strict=True)}
    return {title: blocks for title, blocks in scripts.items() if blocks}


def weights_after(code, scope):
    """Return copies of the weights of a script's model."""
    torch.manual_seed(0)
    exec(compile(code, str(PAGE), "exec"), scope)
    return [param.detach().clone() for param in scope["model"].parameters()]


@pytest.mark.parametrize("title", sections())
def test_script(record_property, title):
    """The script of this page."""
    record_property("framework", title.lower())
    record_property("case", "The script of this page")
    first, *rest = sections()[title]
    plain = first.replace("import surefoot as optim", "from torch import optim")
    assert plain != first
    theirs = weights_after(plain, {"__name__": "__main__"})
    scope = {"__name__": "__main__"}
    record_property("difference", value := difference(weights_after(first, scope), theirs))
    assert value <= 1e-3  # gradients that are nothing but rounding make steps, too
    for code in rest:
        exec(compile(code, str(PAGE), "exec"), scope)
