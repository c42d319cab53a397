"""The kernels of rules, each compiled once in a process."""

import functools

from surefoot.codegen.compile import Kernel, build_kernel
from surefoot.engines.cpu.source import Layout, print_kernel
from surefoot.rule import Rule


@functools.cache
def compiled_kernel(rule: Rule, layout: Layout, checked: bool = False) -> Kernel:
    """Return the kernel of a rule for a layout."""
    kernel = build_kernel(print_kernel(rule, layout, checked=checked), rule.name.lower() + "_checked" * checked)
    names = ("param", "grad", *(slot.name for slot in rule.slots))
    parts = (f"{name} {kept.part}" for name, kept in zip(names, layout.stored, strict=True) if kept.part)
    return kernel._replace(arrays=(*names, *parts), checked=checked)
