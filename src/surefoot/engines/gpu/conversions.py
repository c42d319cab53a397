"""Short formats and random bits for Triton: the functions of `codegen/conversions.py`, printed in its language.

So what a format means is said once for all kernels.  Nothing is taken from there but the text.
"""

import ast
import copy
import functools
import re
from collections.abc import Mapping
from pathlib import Path

from surefoot import codegen

_CASTS = ("int8", "int16", "int32", "uint8", "uint16", "uint32", "uint64", "float32")
_CALLS = {
    "min": "tl.minimum({}, {})",
    "max": "tl.maximum({}, {})",
    "from_half": "tl.cast(tl.cast({}, tl.float16, bitcast=True), tl.float32)",
    **{kind: f"tl.cast({{}}, tl.{kind})" for kind in _CASTS},
    **{f"as_{kind}": f"tl.cast({{}}, tl.{kind}, bitcast=True)" for kind in ("float32", "uint32", "uint64")},
}


class _ToTriton(ast.NodeTransformer):
    """Replaces what Triton says otherwise by names that are its text."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        template = _CALLS.get(ast.unparse(node.func))
        return node if template is None else ast.Name(template.format(*map(ast.unparse, node.args)))

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        self.generic_visit(node)
        return ast.Name(f"tl.where({', '.join(map(ast.unparse, (node.test, node.body, node.orelse)))})")

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        """Leave numbers as they are written."""
        return ast.Name(ast.get_source_segment(_text(), node) or "")


@functools.cache
def _text() -> str:
    return Path(codegen.__path__[0], "conversions.py").read_text()


@functools.cache
def definitions() -> Mapping[str, ast.FunctionDef]:
    """Return what is defined there, by name."""
    return {node.name: node for node in ast.parse(_text()).body if isinstance(node, ast.FunctionDef)}


@functools.cache
def _printed(name: str) -> str:
    definition = _ToTriton().visit(copy.deepcopy(definitions()[name]))
    return f"\n\n@triton.jit\n{ast.unparse(definition)}\n"


def print_called(text: str) -> str:
    """Print the functions that a text calls, directly or not."""
    found: dict[str, str] = {}
    texts = [text]
    while texts:
        for name in re.findall(r"\w+(?=\()", texts.pop()):
            if name in definitions() and name not in found:
                found[name] = _printed(name)
                texts.append(found[name])
    return "".join(found[name] for name in definitions() if name in found)
