"""The table of torch's private names, held against the code; and the switch that turns native guards off."""

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest
import torch

import surefoot
from surefoot.tensors import guards
from surefoot.tensors.native import guards as native
from surefoot.tensors.private import PRIVATE_NAMES

SOURCE = Path(surefoot.__file__).parent
OF_OTHERS = {"_make", "_asdict", "_replace", "_getframe", "_env_reloader", "_internal_codegen", "_is_gil_enabled"}


def own_names(trees):
    """Return all names that the code defines or assigns to."""
    nodes = [node for tree in trees for node in ast.walk(tree)]
    defined = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    stored = [node for node in nodes if isinstance(getattr(node, "ctx", None), ast.Store)]
    return defined | {getattr(node, "attr", getattr(node, "id", None)) for node in stored}


def private_names():
    """Yield the private names that the code takes from what it has not defined itself, with the file."""
    trees = {path: ast.parse(path.read_text()) for path in SOURCE.rglob("*.py")}
    ours = own_names(trees.values())
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
                yield from ((alias.name, path) for alias in node.names if alias.name.startswith("_"))
            elif isinstance(node, ast.Attribute) and re.match("_[a-zA-Z]", node.attr):  # noqa: SIM102
                if ast.unparse(node).startswith("torch.") or node.attr not in ours | OF_OTHERS:
                    yield node.attr, path


def test_every_private_name_of_torch_stands_in_the_table():
    known = [row.name.rpartition(".")[2] for row in PRIVATE_NAMES]
    parents = {part for row in PRIVATE_NAMES for part in row.name.split(".")[:-1]}
    missing = defaultdict(set)
    for name, path in private_names():
        listed = any(re.fullmatch(each.replace("*", ".*"), name) for each in known)
        if not listed and name not in parents:
            missing[name].add(path.name)
    assert not missing


@pytest.mark.parametrize("row", PRIVATE_NAMES, ids=lambda row: row.name)
def test_a_room_uses_its_private_name(row):
    room = SOURCE.joinpath(*row.room.split("."))
    files = room.rglob("*.py") if room.is_dir() else [room.with_suffix(".py")]
    name = row.name.rpartition(".")[2].replace("*", "")
    names = (name, re.sub("(pre|post)", "{kind}", name))  # hooks of both kinds are one function's
    assert any(each in path.read_text() for path in files for each in names)


def test_native_guards_can_be_turned_off(monkeypatch):
    tensors = [torch.zeros(3)]
    assert type(guards.make_guard([tensors])) is native.TensorGuard
    monkeypatch.setenv("SUREFOOT_NATIVE_GUARD", "0")
    assert native.unavailable() == "SUREFOOT_NATIVE_GUARD=0 turns them off"
    assert type(guards.make_guard([tensors])) is guards.PlainTensorGuard
    assert type(guards.make_dict_guard([{}])) is guards.PlainDictGuard
    monkeypatch.setenv("SUREFOOT_NATIVE_GUARD", "yes")
    with pytest.raises(ValueError, match="SUREFOOT_NATIVE_GUARD must be 1 or 0, but is 'yes'"):
        guards.make_guard([tensors])


def test_native_guards_need_the_interpreter_lock(monkeypatch):
    monkeypatch.setattr("sys._is_gil_enabled", lambda: False, raising=False)
    assert "without the interpreter lock" in native.unavailable()


def test_a_step_without_native_guards_is_the_same(monkeypatch):
    def train():
        params = [torch.nn.Parameter(torch.ones(3, 4)) for _ in range(3)]
        optimizer = surefoot.Adam(params)
        for step in range(4):
            for param in params:
                param.grad = torch.full((3, 4), 1.0 + step)
            optimizer.step()
        return params

    expected = train()
    monkeypatch.setenv("SUREFOOT_NATIVE_GUARD", "0")
    assert all(map(torch.equal, train(), expected))
