"""From a rule to a graph: `bind` runs a rule's `update` once on symbols and hands the result through the passes.

A graph is a `torch.fx.Graph` whose placeholders are `param`, `grad`, the active slots, and then the coefficients that
the rule asked for; whose calls are operations of `ops.py`; and whose output is the new param and the new slots.  Where
a rule reduces tensors to numbers, `stages.py` divides its graph.
"""

import functools
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable
from types import MethodDescriptorType, SimpleNamespace
from typing import Any

import torch
from torch import fx

from surefoot.errors import RuleError
from surefoot.rule.bound import Rule
from surefoot.rule.declare import EMA, ROUNDING_STEP, Reduction, Slot
from surefoot.rule.passes import run_passes
from surefoot.rule.sampling import divide_sampled
from surefoot.rule.spec import SAMPLED, AlgorithmSpec, Flags
from surefoot.rule.stages import divide


class _Symbol(fx.Proxy):
    """Stands for a tensor while tracing."""

    @classmethod
    def __torch_function__(
        cls,
        orig_method: Any,
        types: tuple[type, ...],
        args: tuple[Any, ...] | None = None,
        kwargs: dict[str, Any] | None = None,
    ) -> fx.Proxy:
        """Record a function, or a method of tensors that is called as one.

        `fx.Proxy` tells the two apart by a table of all of torch, which takes longer to make than all else of a rule.
        """
        given = args or (), kwargs or {}
        symbols: list[fx.Proxy] = []
        fx.node.map_aggregate(given, lambda each: symbols.append(each) if isinstance(each, cls) else None)
        if isinstance(orig_method, MethodDescriptorType):
            return symbols[0].tracer.create_proxy("call_method", orig_method.__name__, *given)
        return symbols[0].tracer.create_proxy("call_function", orig_method, *given)


class _Tracer(fx.Tracer):
    """Records with each node the line of the rule that made it."""

    def __init__(self, file: str) -> None:
        super().__init__()
        self.graph = fx.Graph(tracer_cls=type(self))
        self.root = torch.nn.Module()
        self.file = file

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["source"] = self.source()
        return node

    def proxy(self, node: fx.Node) -> _Symbol:
        return _Symbol(node, self)

    def source(self) -> str:
        """`file:line` of the innermost frame inside the rule's file."""
        frame = sys._getframe()
        while frame.f_back is not None and frame.f_code.co_filename != self.file:
            frame = frame.f_back
        return f"{frame.f_code.co_filename}:{frame.f_lineno}"

    def to_bool(self, obj: fx.Proxy) -> bool:
        raise RuleError(
            f"{self.source()}: a rule may branch on flags only, not on the value of `{obj.node.name}`; "
            f"use torch.where, or declare a flag"
        )

    def iter(self, obj: fx.Proxy) -> Any:
        raise RuleError(
            f"{self.source()}: a rule works on whole tensors; `{obj.node.name}` cannot be iterated or unpacked"
        )


class _Coefficients:
    """Stands for the coefficients while tracing: each name asked for becomes a placeholder."""

    def __init__(self, tracer: _Tracer) -> None:
        self._tracer = tracer
        self._proxies: dict[str, fx.Proxy] = {}

    def __getattr__(self, name: str) -> fx.Proxy:
        return self._placeholder(name)

    def of_slot(self, name: str) -> fx.Proxy:
        """Return what stands for a slot that is one number."""
        proxy = self._placeholder(name)
        proxy.node.meta["slot"] = True
        return proxy

    def _placeholder(self, name: str) -> fx.Proxy:
        if name not in self._proxies:
            last = [node for node in self._tracer.graph.nodes if node.op == "placeholder"][-1]
            with self._tracer.graph.inserting_after(last):
                proxy = self._tracer.create_proxy("placeholder", f"c_{name}", (), {})
            proxy.node.meta["coefficient"] = name
            self._proxies[name] = proxy
        return self._proxies[name]

    def names(self) -> tuple[str, ...]:
        return tuple(self._proxies)


@functools.cache
def bind(spec: AlgorithmSpec, flags: Flags) -> Rule:
    """Trace the rule of an algorithm under settled flags; once for each pair.

    Raises:
        RuleError: the rule takes a tensor apart, branches on a number, uses an operation outside the list, or does not
            return what its slots promise.  The message names the file and line.
    """
    update: Callable[..., Any] = spec.update  # type: ignore[assignment]
    settled = dict(flags)
    averaged = (EMA,) if settled.get("ema") else ()
    active = tuple(slot for slot in spec.slots if slot.when is None or settled[slot.when])
    tensors = (*(slot for slot in active if not slot.is_number), *averaged)
    tracer = _Tracer(inspect.getsourcefile(inspect.unwrap(update)) or "")
    inputs: dict[str, Any] = {
        name: tracer.create_proxy("placeholder", name, (), {})
        for name in ("param", "grad", *(slot.name for slot in tensors))
    }
    coefficients: Any = _Coefficients(tracer)
    inputs |= {slot.name: coefficients.of_slot(slot.name) for slot in active if slot.is_number}
    unscaled = inputs["grad"] / coefficients.loss_scale if settled.get("scaled") else inputs["grad"]
    grad = _clipped(unscaled, coefficients, settled)
    given = [inputs.get(slot.name) for slot in spec.slots]
    try:
        returned = update(inputs["param"], grad, *given, coefficients, SimpleNamespace(**settled))
    except TypeError as error:  # torch's own, of arguments that it takes no symbols for
        raise RuleError(f"{_place(error, tracer.file)}: {str(error).partition(', but expected')[0]}") from error
    outputs = _outputs(spec, returned, active)
    numbers = {slot: outputs.pop(slot.name) for slot in active if slot.is_number}
    shared = [outputs.pop(scalar.name) for scalar in spec.group_scalars]
    if averaged:
        new: Any = outputs["param"]
        average: Any = torch.lerp(inputs[EMA.name], new, coefficients.step_ema_weight)
        outputs[EMA.name] = average
    if settled.get("rounded"):
        getattr(coefficients, ROUNDING_STEP.name)  # which engines read, and not the rule
    measured = _measured(inputs["param"], unscaled, outputs["param"]) if settled.get("measured") else {}
    results = (*outputs.values(), *measured.values(), *numbers.values(), *shared)
    tracer.create_node("output", "output", (tuple(value.node for value in results),), {})
    run_passes(tracer.graph, len(outputs))
    due = [(name, True) for name in outputs] + [("telemetry", True)] * len(measured)
    _check_kinds(spec, tracer.graph, [*due, *((slot.name, False) for slot in numbers)])
    rule = Rule(
        spec.name,
        flags,
        tensors,
        coefficients.names(),
        tracer.graph,
        tuple(measured),
        spec.active_scalars(settled),
        tuple(numbers),
        group_scalars=spec.group_scalars,
    )
    divided = divide(rule)
    return divide_sampled(divided) if settled.get(SAMPLED) else divided


def _check_kinds(spec: AlgorithmSpec, graph: fx.Graph, due: Iterable[tuple[str, bool]]) -> None:
    """Raise RuleError where a rule returns a number for a tensor, or a tensor for a number.

    Args:
        spec: the algorithm.
        graph: its graph.
        due: of each result, in order, its name and whether it must be a tensor.
    """
    results = next(iter(reversed(graph.nodes))).args[0]
    for (name, tensor), node in zip(due, results, strict=False):
        if node.meta["tensor"] is not tensor:
            wanted, got = ("a tensor", "one number") if tensor else ("one number", "a tensor")
            raise RuleError(
                f"{node.meta['source']}: {spec.name}.update must return {wanted} for `{name}`, but returned {got}; a "
                f"slot that is one number has shape=one_number"
            )


def _place(error: BaseException, file: str) -> str:
    """`file:line` of the innermost frame of an error inside a rule's file."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == file]
    return f"{file}:{lines[-1]}" if lines else file


def _clipped(grad: Any, coefficients: Any, settled: dict[str, bool]) -> Any:
    """Return the gradient as the rule is to see it: clipped by norm, then by value, and negated under `maximize`."""
    if settled.get("clipped"):
        grad = grad * coefficients.step_clip
    if settled.get("max_grad_value"):
        grad = torch.clamp(grad, -coefficients.max_grad_value, coefficients.max_grad_value)
    return -grad if settled["maximize"] else grad


def _measured(param: Any, grad: Any, new: Any) -> dict[Reduction, Any]:
    """Return what telemetry measures of a parameter, its gradient and its new value."""
    return dict(zip(TELEMETRY, (grad, new, new - param, grad, grad), strict=True))


TELEMETRY = (
    Reduction("gradient", "sum_of_squares"),
    Reduction("parameter", "sum_of_squares"),
    Reduction("update", "sum_of_squares"),
    Reduction("gradient", "largest"),
    Reduction("gradient", "nonfinite"),
)
GRADIENT_REDUCTIONS = (Reduction("gradient", "sum_of_squares", precise=True), Reduction("gradient", "largest"))


@functools.cache
def gradient_rule() -> Rule:
    """Return the rule that leaves everything as it is and measures the gradient."""
    graph = fx.Graph()
    param, grad = graph.placeholder("param"), graph.placeholder("grad")
    graph.output((param, grad, grad))
    run_passes(graph, 1)
    return Rule("Gradients", (), (), (), graph, GRADIENT_REDUCTIONS)


def _outputs(spec: AlgorithmSpec, returned: Any, active: tuple[Slot, ...]) -> dict[str, fx.Proxy]:
    """Check what `update` returned, and return it by name without the slots that do not exist."""
    values = returned if isinstance(returned, tuple) else (returned,)
    where = f"{spec.name}.update"
    names = ["param", *(slot.name for slot in spec.slots), *(scalar.name for scalar in spec.group_scalars)]
    if len(values) != len(names):
        raise RuleError(f"{where} must return ({', '.join(names)}), but returned {len(values)} values")
    absent = {slot.name for slot in spec.slots} - {slot.name for slot in active}
    outputs = {name: value for name, value in zip(names, values, strict=True) if name not in absent}
    shared = {scalar.name for scalar in spec.group_scalars}
    for name, value in outputs.items():
        if not isinstance(value, fx.Proxy):
            kind = "a number that follows from coefficients" if name in shared else "a tensor"
            raise RuleError(f"{where} must return {kind} for `{name}`, but returned {value!r}")
    return outputs
