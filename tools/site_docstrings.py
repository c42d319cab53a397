"""Docstrings as they are at run time: those of constructors are completed when a class is made."""

import importlib
import inspect
from typing import Any

import griffe


class Completed(griffe.Extension):
    """Takes docstrings from the running code where they were completed there, and lets Markdown read all of them."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Put an object's docstring in the form that the site shows."""
        if obj.docstring is None:
            return
        if "{arguments}" in obj.docstring.value:
            made = getattr(importlib.import_module(obj.module.path), obj.name)
            obj.docstring.value = inspect.getdoc(made) or ""
        # The parser tries code of `Examples`, and Markdown indents code without a second colon.
        obj.docstring.value = obj.docstring.value.replace("Example:\n", "Examples:\n").replace("::\n\n", ":\n\n")
