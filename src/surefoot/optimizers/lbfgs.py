"""L-BFGS: a quasi-Newton method over all parameters at once, which evaluates the model as often as it needs to.

Here stands the method; how far to go along a direction is found in `line_search`.  Parameters and gradients are seen as
one flat vector of real numbers, made anew whenever it is needed, so that nothing can go stale between steps.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from ctypes import c_float
from dataclasses import dataclass, field, fields
from itertools import product
from numbers import Real
from types import SimpleNamespace
from typing import Annotated, Any, Unpack

import torch
from torch import Tensor

from surefoot.constructor import arguments
from surefoot.distributed import Totals, make_totals, refuse_flattened
from surefoot.optimizer import Optimizer, Params
from surefoot.optimizers.line_search import Step, StrongWolfe, Trial
from surefoot.rule import Sparse
from surefoot.rule.hyperparameters import LR, Interval, Number, at_least_zero, number
from surefoot.state.check import check_state, format_param, hyperparameters, validated_gradient
from surefoot.state.load import LoadReport
from surefoot.step.options import StepOptions
from surefoot.tensors.fit import unfit_memory, unfit_param
from surefoot.tensors.guards import make_guard, same_objects
from surefoot.tensors.memory import PLAIN, has_memory, is_plain
from surefoot.tensors.native.guards import AlikeGuard, LaunchSequence, TensorGuard, alike_guard
from surefoot.tensors.shards import to_local

SMALLEST_CURVATURE = 1e-10
"""A pair is remembered only if y.s is greater: this keeps the inverse Hessian positive definite."""

_WIDE = (torch.float32, torch.float64)
_REAL, _PLAIN_TYPES = (int, float), frozenset(PLAIN)

Weight = Callable[[Tensor], Tensor]
"""Multiplies a vector by C."""


COMMON = ("max_iter", "max_eval", "tolerance_grad", "tolerance_change", "history_size", "line_search_fn", "maximize")
"""What all groups must have alike."""


class LBFGS(Optimizer):
    """Limited-memory BFGS, with steps of fixed length or with a line search for the strong Wolfe conditions.

    With theta all parameters in one vector and g its gradient, an iteration does::

        d = -H g
        theta += t d

    H approximates the inverse Hessian.  It comes from the last `history_size` iterations, each with the step s it took
    and the change y of the gradient over it: from the oldest to the newest, and starting with gamma I, where
    gamma = y.s / y.y of the newest::

        H = (I - rho s y') H (I - rho y s') + rho s s',   rho = 1 / y.s

    A pair with y.s <= 1e-10 is left out.  The step length t is `lr`, or what the line search finds from there; in the
    very first iteration, where d = -g, it is min(1, 1 / |g|_1) * `lr`.  A `step` ends after `max_iter` iterations, when
    `max_eval` evaluations are used up, or when max |g| <= `tolerance_grad`, -g.d < `tolerance_change`,
    max |t d| <= `tolerance_change`, or the loss changed by less than `tolerance_change`.

    Groups may differ in `lr`, and in nothing else.  The lr of a group then is the scale of its parameters: with r the
    greatest lr and c = lr / r, the method runs over theta / sqrt(c) with the learning rate r.  That is, H starts from
    gamma C instead of gamma I, where the diagonal matrix C holds the c of each parameter and gamma = y.s / y.C y, and
    the very first d is -C g: at first a group moves by its own lr times -g, later as the curvature tells.  (To multiply
    the parts of one direction by different lr may lead uphill.)  A group of lr 0 counts as constant, unless all are 0.

    A parameter without gradient counts as one whose gradient is zero; sparse gradients are made dense; a complex number
    counts as two real ones.  State stands with the first parameter, on its device, in the gradients' dtype; where they
    have 16 bits all is computed in float32, and rounded when a parameter moves.  When the closure raises, or the step
    is interrupted, parameters and state are as before the step.  Of sharded parameters each rank keeps its own elements
    of all vectors, and all ranks decide by the mean of their losses.

    {arguments}

    Raises:
        ValueError: a hyperparameter is out of range, or a group has another value than the first one.
        TypeError: a hyperparameter is not a number.
        RuntimeError: `line_search_fn` is another one.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([-1.0, 2.0]))
        >>> optimizer = surefoot.LBFGS([weight], line_search_fn="strong_wolfe")
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = (1 - weight[0]) ** 2 + 100 * (weight[1] - weight[0] ** 2) ** 2
        ...     loss.backward()
        ...     return loss
        >>> for _ in range(3):
        ...     loss = optimizer.step(closure)
        >>> torch.allclose(weight, torch.ones(2), atol=1e-3)
        True

    Papers: Nocedal 1980, "Updating quasi-Newton matrices with limited storage"; Liu & Nocedal 1989, "On the limited
    memory BFGS method for large scale optimization", algorithm 2.1; Nocedal & Wright 2006, "Numerical Optimization",
    algorithms 7.4, 7.5 and, for the line search, 3.5 and 3.6.

    Other than in torch there may be groups, several devices and any strides; all hyperparameters are checked, and so is
    the state that is loaded; a step that fails changes nothing; `max_eval` is kept by the line search too, which torch
    lets evaluate once more; and it steps back from a point where loss or slope is NaN or infinite.
    """

    def __init__(
        self,
        params: Params,
        lr: Annotated[
            Number, LR, "learning rate: the step length in units of d, a number or a tensor of one element"
        ] = 1,
        max_iter: Annotated[int, at_least_zero("max_iter"), "greatest number of iterations in one step"] = 20,
        max_eval: Annotated[
            int | None,
            at_least_zero("max_eval"),
            "greatest number of evaluations of the closure in one step, of which there is one at least; by default "
            "1.25 * `max_iter`",
        ] = None,
        tolerance_grad: Annotated[
            float,
            number("tolerance_grad"),
            "greatest element of a gradient that counts as zero; below 0 none does",
        ] = 1e-7,
        tolerance_change: Annotated[
            float,
            number("tolerance_change"),
            "change of the loss, or of any parameter, that counts as none; below 0 every one counts",
        ] = 1e-9,
        history_size: Annotated[
            int,
            Interval("Invalid history_size value: ", low=1, whole=True),
            "number of pairs remembered; each takes twice the memory of the parameters",
        ] = 100,
        line_search_fn: Annotated[str | None, '`"strong_wolfe"`, or None for steps of fixed length'] = None,
        *,
        maximize: bool = False,
        **options: Unpack[StepOptions],
    ) -> None:
        if max_eval is None:
            self.ranges["max_iter"]("max_iter", max_iter)
            max_eval = max_iter * 5 // 4 if math.isfinite(max_iter) else max_iter
        super().__init__(params, arguments(locals()))

    scalars = ()
    sparse = Sparse.ROWS
    _guard: "_Guard | None" = None

    @classmethod
    def check_group(cls, group: Mapping[str, Any]) -> None:
        super().check_group(group)
        search = group.get("line_search_fn")
        if search not in (None, "strong_wolfe"):
            raise RuntimeError(
                f"only 'strong_wolfe' is supported as `line_search_fn`, or None for steps of fixed length, "
                f"but got {search!r}"
            )

    @classmethod
    def rows_suffice(cls, flags: Mapping[str, bool]) -> bool:  # noqa: ARG003
        return False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; it takes the options of the first one, `lr` excepted, and all state starts afresh.

        Raises:
            ValueError: as `surefoot.Optimizer.add_param_group`, or the group gives another value to such an option.
        """
        if self.param_groups and isinstance(param_group, dict):
            _refuse_disagreement([*self.param_groups, param_group])
        super().add_param_group(param_group)
        param_group.update({name: self.param_groups[0][name] for name in COMMON})
        self.state.clear()

    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True) -> LoadReport:  # type: ignore[override]
        """Load what `state_dict` of this class, or of its namesake in torch.optim, has given.

        See `surefoot.Optimizer.load_state_dict`; flat vectors must have as many elements as the parameters.
        """
        misfits: list[str] = []

        def verify(_: Optimizer, incoming: dict[str, Any]) -> dict[str, Any] | None:
            misfits.extend(_misfits(self.param_groups, incoming))
            if misfits and strict:
                raise ValueError(
                    "the state dict does not fit this LBFGS; nothing was loaded.\n  " + "\n  ".join(misfits)
                )
            return {**incoming, "state": {}} if misfits else None

        state = self.state
        # The last of the pre-hooks sees what will be loaded.
        handle = self.register_load_state_dict_pre_hook(verify)
        try:
            report = super().load_state_dict(state_dict, strict)
        finally:
            handle.remove()
        if misfits:
            self.state = state
            report.mismatched.extend(misfits)
        return report

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Run up to `max_iter` iterations.

        Args:
            closure: clears the gradients, evaluates the model, calls `backward`, and returns the loss: a number or a
                tensor of one element.

        Returns:
            What the closure returned the first time.

        Raises:
            TypeError: there is no closure, or it returned no loss.
            ValueError: groups differ in another option than `lr`.
            RuntimeError: state or a gradient does not fit the parameters.  Whatever is raised, also by the
                closure, parameters and state are as before the step.
        """
        if closure is None:
            raise TypeError("LBFGS evaluates the model several times in a step: call step(closure), not step()")
        _refuse_disagreement(self.param_groups)
        params = [param for group in self.param_groups for param in group["params"]]
        refuse_flattened(params, "LBFGS", whole_tensors=True)
        totals = make_totals(params)
        with nullcontext() if totals is None else _failures_told(totals, numbers=(0, 1)):
            variables = _Variables(self, totals)
            memory = self._recall(variables) if variables.params else None
        if totals is not None:  # before closures, in which the model's own collectives wait for all ranks
            _refuse_failed(totals.combine(means=[0.0]).means[0])
        if memory is None:
            return self.evaluate(closure)
        with torch.no_grad():
            before = variables.copy()
            try:
                options = hyperparameters(self.param_groups[0])
                result = _Run(closure, variables, memory, options).minimize()
            except BaseException:
                variables.restore(before)
                raise
        self.state.setdefault(variables.params[0], {}).update(memory.entry())
        variables.keep_guard()
        return result

    def _recall(self, variables: "_Variables") -> "_Memory":
        """Take over the state, which stands with the first parameter, without handing out its lists."""
        state = self.state.get(variables.params[0], {})
        size, layout = sum(variables.sizes), variables.totals.layout if variables.totals else None
        places = variables.state_guard.places_of(state, size) if state.get("layout") == layout else None
        if places is None and (misfits := list(_vector_misfits(state, size, layout))):
            raise RuntimeError(
                f"{misfits[0]}; after changing a parameter's shape start afresh with `optimizer.state.clear()`"
            )
        known = {name: value for name, value in state.items() if name in _REMEMBERED and value is not None}
        copy: dict[str, Any] = {n: [*value] if isinstance(value, list | tuple) else value for n, value in known.items()}
        memory = _Memory(**copy | {"layout": layout})
        memory.places = places
        return memory


@dataclass
class _Memory:
    """What one iteration leaves to the next, under the keys that it has in the state."""

    func_evals: int = 0
    n_iter: int = 0
    d: Tensor | None = None
    """The direction of the last iteration."""
    t: Step = 0.0
    """How far it was followed."""
    old_dirs: list[Tensor] = field(default_factory=list)
    """The changes y of the gradient, the oldest first."""
    old_stps: list[Tensor] = field(default_factory=list)
    """The steps s over which it changed."""
    ro: list[Tensor] = field(default_factory=list)
    """1 / y.s for each of these pairs."""
    H_diag: Tensor | float = 1
    """The scale gamma of the inverse Hessian before any pair is applied."""
    prev_flat_grad: Tensor | None = None
    """The gradient where the last iteration began."""
    prev_loss: float = math.nan
    """The loss there."""
    al: list[Tensor | float | None] | None = None
    """The coefficients of the pairs in the last direction; torch keeps them, as tensors."""
    layout: str | None = None
    """Which elements of sharded parameters the vectors have."""

    def __post_init__(self) -> None:
        self.places: set[Any] | None = None
        """The dtypes and devices of vectors and numbers, None if they are not known."""
        self._rhos: list[float] | None = None
        """`ro` on the host, None if it is not known there."""

    def follow(self, grad: Tensor) -> None:
        """Move to the device and dtype of the gradients, which change with the model's; the step length to the host."""
        self.t = _on_host(self.t)
        if self.places is not None and not self.places - {(grad.dtype, grad.device)}:
            return
        for name in ("d", "prev_flat_grad", "H_diag"):
            setattr(self, name, _as(getattr(self, name), grad))
        for past in (self.old_dirs, self.old_stps, self.ro):
            past[:] = [_as(item, grad) for item in past]

    def learn(self, step: Tensor, change: Tensor, variables: "_Variables", history_size: int) -> None:
        """Remember a pair, unless the curvature along it is not positive; forget what is too old."""
        curvature, square = variables.dots((change, step), (change, variables.weighted(change)))
        if not curvature.item() > _rounded(SMALLEST_CURVATURE, curvature):
            return
        for past, new in ((self.old_dirs, change), (self.old_stps, step), (self.ro, curvature.reciprocal())):
            past.append(new)
            del past[:-history_size]
        if self._rhos is not None:
            self._rhos = [*self._rhos, self.ro[-1].item()][-history_size:]
        self.H_diag = curvature / square

    def newton(self, grad: Tensor, variables: "_Variables", history_size: int) -> Tensor:
        """Return -H grad by the two loops of algorithm 7.4."""
        weighted = variables.weighted
        if grad.is_cpu or variables.totals is not None:
            return self._newton_on_host(grad, weighted, history_size, variables.dot_on_host)
        pairs = list(zip(self.old_dirs, self.old_stps, self.ro, strict=True))
        direction = grad.neg()
        parts: list[Tensor] = []
        for change, step, rho in reversed(pairs):
            parts.insert(0, step.dot(direction) * rho)
            direction.addcmul_(change, -parts[0])
        direction = weighted(direction.mul(self.H_diag))
        for (change, step, rho), part in zip(pairs, parts, strict=True):
            direction.addcmul_(step, part - change.dot(direction) * rho)
        self.al = [*parts, *[None] * (history_size - len(parts))]
        return direction

    def _newton_on_host(
        self, grad: Tensor, weighted: Weight, history_size: int, dot: Callable[[Tensor, Tensor], float]
    ) -> Tensor:
        """Do the same where numbers are read at once: by Python's, rounded as tensors of the gradient's dtype are."""
        single = grad.dtype is torch.float32
        if self._rhos is None:
            self._rhos = [rho.item() if isinstance(rho, Tensor) else rho for rho in self.ro]
        pairs = list(zip(self.old_dirs, self.old_stps, self._rhos, strict=True))
        direction, parts = grad.neg(), []
        # A product or difference of two numbers of float32, computed in float64 and rounded, is that of float32.
        for change, step, rho in reversed(pairs):
            part = dot(step, direction) * rho
            part = c_float(part).value if single else part
            direction.add_(change, alpha=-part)
            parts.append(part)
        parts.reverse()
        direction = weighted(direction.mul(self.H_diag))
        for (change, step, rho), part in zip(pairs, parts, strict=True):
            other = dot(change, direction) * rho
            left = c_float(part - c_float(other).value).value if single else part - other
            direction.add_(step, alpha=left)
        self.al = [*parts, *[None] * (history_size - len(parts))]
        return direction

    def entry(self) -> dict[str, Any]:
        """Return the state; before the first iteration it is the counters only."""
        if self.d is None:
            return {"func_evals": self.func_evals, "n_iter": self.n_iter}
        if self.al is not None and type(self.al[0]) is float:
            numbers = [part for part in self.al if part is not None]
            self.al[: len(numbers)] = torch.tensor(numbers, dtype=self.d.dtype).unbind()
        named = {name: getattr(self, name) for name in _REMEMBERED}
        return {name: value for name, value in named.items() if name not in ("al", "layout") or value is not None}


class _Guard:
    """Tells whether real parameters and their gradients, once found fit, are as they were but for values."""

    def __init__(self, params: list[Tensor]) -> None:
        self._params, self._guard, self.state = params, make_guard([params], gradients=True), _StateGuard()
        self._looks: LaunchSequence | None = None
        if type(self._guard) is TensorGuard:
            self._looks = LaunchSequence([launch for launch in self._guard.launches() if launch])

    @classmethod
    def of(cls, params: list[Tensor]) -> "_Guard | None":
        """Return the guard of parameters, None where it could not tell."""
        tensors = [tensor for param in params for tensor in (param, param.grad)]
        fit = all(tensor is not None and is_plain(tensor) and not tensor.is_complex() for tensor in tensors)
        return cls(params) if fit else None

    def holds(self, params: list[Tensor]) -> bool:
        """Return whether these are the parameters, and they and their gradients are as they were."""
        if not same_objects(self._params, params):
            return False
        if self._looks is not None:
            found = self._looks.run()
            if found:
                self._guard.release_grads()
            return not found
        holds = not self._guard.changed()
        self._guard.release_grads()
        return holds


class _StateGuard:
    """Tells where vectors and numbers of state are if all are sound, by a compiled look if they are like the last."""

    def __init__(self) -> None:
        self._counts: tuple[int, ...] = ()
        self._places: set[Any] = set()
        self._alike: AlikeGuard | None = None

    def places_of(self, state: Mapping[str, Any], size: int) -> set[Any] | None:
        """Return dtypes and devices of state if it surely has flat vectors of a size and single numbers; else None."""
        if (found := _tensors_of(state)) is None:
            return None
        vectors, numbers = found
        counts, tensors = (size, len(vectors), len(numbers)), [*vectors, *numbers]
        again = counts == self._counts
        known = self._alike if again and _PLAIN_TYPES.issuperset(map(type, tensors)) else None
        if known is not None and not known.changed(tensors):
            return self._places
        self._counts, self._alike = (), None
        of_vectors, of_numbers = _flat_kinds(vectors, torch.Size((size,))), _flat_kinds(numbers, torch.Size(()))
        if of_vectors is None or of_numbers is None:
            return None
        self._counts, self._places = counts, of_vectors | of_numbers
        if again:
            self._alike = alike_guard(tensors, [[torch.empty(0)] * len(tensors)])
        return self._places


_REMEMBERED = tuple(each.name for each in fields(_Memory))


class _Variables:
    """The parameters of all groups as one vector of real numbers, of float32 at least."""

    def __init__(self, optimizer: LBFGS, totals: Totals | None = None) -> None:
        self.optimizer, self.totals = optimizer, totals
        self.owners = [(group, param) for group in optimizer.param_groups for param in group["params"]]
        self.params = [param for _, param in self.owners]
        known = optimizer.__dict__.pop("_guard", None)
        self._guard: _Guard | None = known if known is not None and known.holds(self.params) else None
        if self._guard is None:
            for group, param in self.owners:
                if (reason := unfit_param(param)) is not None:
                    raise RuntimeError(f"{format_param(group, param)} {reason}")
                if param.is_meta and type(param) in PLAIN:
                    raise RuntimeError(f"{format_param(group, param)} is on meta; LBFGS decides by values")
                check_state(optimizer.spec, group, param, optimizer.state.get(param, {}))
        self._complex = any(map(torch.is_complex, self.params))
        self._plain = all(type(param) in PLAIN and not param.is_neg() for param in self.params)
        self.sizes = [value.numel() for value in self.values()]
        self.scattered = len({param.device for param in self.params}) > 1
        rates = [_on_host(_rate(group["lr"])) for group in optimizer.param_groups]
        self.rate: Step = max(rates, key=float)
        shares = [1.0 if rate == self.rate else float(rate) / float(self.rate) for rate in rates]
        self.shares = [
            share for share, group in zip(shares, optimizer.param_groups, strict=True) for _ in group["params"]
        ]
        self._alike, self._moving = set(self.shares) == {1.0}, all(self.shares)
        self.is_half = all(param.dtype is torch.float16 for param in self.params)
        self.maximize = bool(optimizer.param_groups[0].get("maximize"))

    @property
    def state_guard(self) -> _StateGuard:
        """What knows whether state is sound."""
        return _StateGuard() if self._guard is None else self._guard.state

    def values(self) -> list[Tensor]:
        """Return the parameters, or this process's shards of them, as real numbers."""
        if self.totals is not None:
            return [to_local(param) for param in self.params]
        return [_real(param) for param in self.params] if self._complex else self.params

    def gradient(self) -> Tensor:
        """Collect the gradients on the first parameter's device, negated where the loss is to grow."""
        if self._guard is not None and self._guard.holds(self.params):
            grads: list[Any] = [param.grad for param in self.params]
        else:
            grads = [self._gradient_of(group, param) for group, param in self.owners]
            self._guard = _Guard.of(self.params)
        flat = _joined([grad.to(grads[0].device) for grad in grads] if self.scattered else grads)
        flat = flat if flat.dtype in _WIDE else flat.to(torch.promote_types(flat.dtype, torch.float32))
        return flat.neg() if self.maximize else flat

    def _gradient_of(self, group: Mapping[str, Any], param: Tensor) -> Tensor:
        grad = param.grad
        if grad is None:
            return to_local(param).new_zeros(to_local(param).numel())
        if _flat_kinds([grad], param.shape) is None and (
            not is_plain(grad) or grad.shape != param.shape or not has_memory(grad)
        ):
            grad = validated_gradient(self.optimizer.spec, group, param, grad, {})
        return to_local(grad).reshape(-1)

    def copy(self) -> Any:
        """Copy the values of the parameters."""
        values = self.values()
        if self.scattered or not self._plain:
            return [value.clone() for value in values]
        return _joined(values)

    def keep_guard(self) -> None:
        """Let the next step know what this one has found fit."""
        self.optimizer._guard = self._guard

    def restore(self, copy: Any) -> None:
        """Return the parameters the values of a copy."""
        values = self.values()
        if isinstance(copy, Tensor):
            torch._foreach_copy_(values, self._parts(copy, values))
            return
        for param, value in zip(values, copy, strict=True):
            param.copy_(value)

    def dots(self, *pairs: tuple[Tensor, Tensor]) -> list[Tensor]:
        """Return dot products, of vectors over all ranks, in the dtype of the first of them."""
        if self.totals is None:
            return [a.dot(b) for a, b in pairs]
        return [pairs[0][0].new_tensor(dot) for dot in self.totals.combine(dots=pairs).dots]

    def dot_on_host(self, a: Tensor, b: Tensor) -> float:
        """Return a dot product as a Python number."""
        return a.dot(b).item() if self.totals is None else self.totals.combine(dots=[(a, b)]).dots[0]

    def largest(self, vector: Tensor) -> Tensor:
        """Return the greatest absolute value."""
        if self.totals is None:
            return vector.abs().max() if vector.numel() else vector.new_zeros(())
        return vector.new_tensor(self.totals.combine(largest=[vector]).largest[0])

    def largest_on_host(self, vector: Tensor) -> float:
        """Return the greatest absolute value as a Python number."""
        if self.totals is not None or not vector.is_cpu or not vector.numel():
            return self.largest(vector).item()
        low, high = torch.aminmax(vector)  # reads once, and writes no absolute values
        return max(-low.item(), high.item())

    def _parts(self, vector: Tensor, values: list[Tensor]) -> list[Tensor]:
        """Return a vector cut into parts of the shapes of values."""
        if self.totals is not None or 0 in self.sizes:  # torch 2.9's function loses the shape of what is empty
            sizes = [value.numel() for value in values]
            return [part.view(v.shape) for part, v in zip(torch.split(vector, sizes), values, strict=True)]
        if len(values) == 1:
            return [vector.view(values[0].shape)]
        return list(torch._utils._unflatten_dense_tensors(vector, values))  # type: ignore[no-untyped-call]

    def advance(self, step: Step, direction: Tensor) -> None:
        """Add a multiple of the direction, except where the learning rate is 0."""
        values = self.values()
        if not self._moving:
            values = [value for value, share in zip(values, self.shares, strict=True) if share]
        if not (factor := float(step)) or not values:
            return
        parts = self._parts(self._shared(direction), values)
        if self.scattered:
            parts = [part.to(value.device) for part, value in zip(parts, values, strict=True)]
        if self._plain:
            torch._foreach_add_(values, parts, alpha=factor)
            return
        for value, part in zip(values, parts, strict=True):
            value.add_(part, alpha=factor)

    def _shared(self, vector: Tensor) -> Tensor:
        """Return what of a vector belongs to parameters whose learning rate is not 0."""
        if self._moving:
            return vector
        parts = zip(torch.split(vector, self.sizes), self.shares, strict=True)
        return torch.cat([part for part, share in parts if share])

    def weighted(self, vector: Tensor) -> Tensor:
        """Return C times the vector."""
        return vector if self._alike else self._times(vector, self.shares)

    def moving(self, vector: Tensor) -> Tensor:
        """Return the vector with zeros where the learning rate is 0."""
        return vector if self._moving else self._times(vector, [1.0 if share else 0.0 for share in self.shares])

    def _times(self, vector: Tensor, factors: list[float]) -> Tensor:
        parts = zip(torch.split(vector, self.sizes), factors, strict=True)
        return torch.cat([part.mul(factor) if factor else torch.zeros_like(part) for part, factor in parts])


def _joined(tensors: list[Tensor]) -> Tensor:
    """Return the elements of tensors as one vector, which is new."""
    flat: Tensor = torch._utils._flatten_dense_tensors(tensors)  # type: ignore[no-untyped-call]
    return flat.clone() if len(tensors) == 1 else flat


class _Run:
    """The iterations of one step."""

    loss: float
    grad: Tensor
    largest: Tensor
    """The greatest element of the gradient, where parameters are sharded."""

    def __init__(
        self, closure: Callable[[], Any], variables: _Variables, memory: _Memory, options: SimpleNamespace
    ) -> None:
        self.closure = closure
        self.variables = variables
        self.memory = memory
        self.options = options
        self.evaluations = 0

    def minimize(self) -> Any:
        """Iterate until there is a reason to stop.

        Returns:
            What the closure returned the first time.
        """
        result = self._evaluate()
        self.memory.follow(self.grad)
        iterations, more = 0, not self._is_stationary()
        while more and iterations < self.options.max_iter:
            iterations += 1
            more = self._iterate(last=iterations >= self.options.max_iter)
        return result

    def _evaluate(self) -> Any:
        totals = self.variables.totals
        with nullcontext() if totals is None else _failures_told(totals, numbers=(1, 2)):
            with torch.enable_grad():
                result = self.closure()
            if result is None:
                raise TypeError("the closure given to LBFGS must return the loss, but it returned None")
            self.loss = float(result.item() if isinstance(result, Tensor) else result)
            self.grad = self.variables.gradient()
        if totals is not None:
            self._agree(totals)
        if self.variables.maximize:
            self.loss = -self.loss
        self.evaluations += 1
        self.memory.func_evals += 1
        return result

    def _agree(self, totals: Totals) -> None:
        """Take the mean loss of all ranks, which each have theirs, and learn whether one has failed."""
        moving = self.variables.moving(self.grad)
        _, (largest,), (failed, self.loss) = totals.combine(largest=[moving], means=[0.0, self.loss])
        self.largest = moving.new_tensor(largest)
        _refuse_failed(failed)

    def _iterate(self, *, last: bool) -> bool:
        """Move once; tell whether to go on."""
        memory = self.memory
        direction, slope = self._aim()
        memory.n_iter += 1
        memory.d, memory.prev_flat_grad, memory.prev_loss = direction, self.grad, self.loss
        if slope.item() > -_rounded(self.options.tolerance_change, slope):
            return False
        if self.options.line_search_fn:
            self._search(direction, slope)
            self.variables.advance(memory.t, direction)
        else:
            self.variables.advance(memory.t, direction)
            last = last or self.evaluations >= self.options.max_eval
            if not last:  # with stochastic closures one more evaluation would tell nothing
                self._evaluate()
        return not (last or self._is_done(direction))

    def _aim(self) -> tuple[Tensor, Tensor]:
        """Return the direction and, on the host, the slope along it; settle the step to try first."""
        memory, variables, history_size = self.memory, self.variables, self.options.history_size
        grad = variables.moving(self.grad)
        if memory.d is None or memory.prev_flat_grad is None:
            direction = variables.weighted(grad.neg())
            size = grad.abs().sum() if variables.totals is None else variables.dots((grad, grad.sign()))[0]
            memory.t = min(1.0, 1.0 / size.cpu()) * variables.rate
        else:
            change = variables.moving(self.grad.sub(memory.prev_flat_grad))
            memory.learn(memory.d.mul(memory.t), change, variables, history_size)
            direction = variables.moving(memory.newton(grad, variables, history_size))
            memory.t = variables.rate
        return direction, variables.dots((grad, direction))[0].cpu()

    def _search(self, direction: Tensor, slope: Tensor) -> None:
        """Find the step length, and leave the parameters where they are."""
        origin, memory, options = self.variables.copy(), self.memory, self.options

        longest = float(self.variables.largest(direction)) if self.variables.is_half else 0.0

        def evaluate(step: Step) -> Trial:
            _refuse_overflow(abs(float(step)) * longest)
            self.variables.advance(step, direction)
            self._evaluate()
            self.variables.restore(origin)
            slope = self.variables.dots((self.grad, direction))[0].cpu()
            exists = not (math.isnan(self.loss) or slope.isnan())
            return Trial(step, self.loss if exists else math.inf, slope, self.grad)

        _refuse_overflow(longest)
        start = Trial(0, self.loss, slope, self.grad)
        budget = max(options.max_eval - self.evaluations, 1)  # else nothing would ever move
        wolfe = StrongWolfe(evaluate, start, lambda: self.variables.largest(direction).cpu(), budget)
        memory.t, self.loss, _, self.grad = wolfe.search(memory.t)
        if self.variables.totals is not None:
            self.largest = self.variables.largest(self.variables.moving(self.grad))

    def _is_stationary(self) -> bool:
        known, variables = self.variables.totals is not None, self.variables
        largest = self.largest.item() if known else variables.largest_on_host(variables.moving(self.grad))
        return largest <= _rounded(self.options.tolerance_grad, self.grad)

    def _is_done(self, direction: Tensor) -> bool:
        options, memory = self.options, self.memory
        if self.evaluations >= options.max_eval or self._is_stationary():
            return True
        move = direction.mul(memory.t)
        if self.variables.largest_on_host(move) <= _rounded(options.tolerance_change, move):
            return True
        return bool(abs(self.loss - memory.prev_loss) < options.tolerance_change)


@contextmanager
def _failures_told(totals: Totals, numbers: tuple[int, int]) -> Iterator[None]:
    """Tell the other ranks, which wait for as many largest values and means, when this one fails inside of it."""
    try:
        yield
    except Exception:
        totals.fail(*numbers)
        raise


def _refuse_failed(failed: float) -> None:
    if failed:
        raise RuntimeError(
            "LBFGS's step was refused on another rank, which tells why; parameters and state are as before the step"
        )


def _refuse_overflow(move: float) -> None:
    """Raise RuntimeError when a move of float16 parameters leaves their range."""
    if not move <= torch.finfo(torch.float16).max:
        raise RuntimeError(
            f"the line search of LBFGS would move a float16 parameter by {move}, an overflow; nothing was changed. "
            f"Scale the loss, give a smaller `lr`, or use float32 parameters"
        )


def _rounded(bound: float, like: Tensor) -> float:
    """Return a number as a comparison with a tensor's number takes it: rounded to its precision."""
    return c_float(bound).value if like.dtype is torch.float32 else bound


def _flat_kinds(tensors: Sequence[Any], shape: torch.Size) -> set[tuple[torch.dtype, torch.device]] | None:
    """Return the dtypes and devices of tensors if all are surely real, contiguous memory of a shape; else None."""
    if not {*map(type, tensors)} <= _PLAIN_TYPES:
        return None
    kinds = {(tensor.dtype, tensor.device, tensor.layout, tensor.shape) for tensor in tensors}
    for dtype, device, layout, own in kinds:
        if not dtype.is_floating_point or device.type == "meta" or layout is not torch.strided or own != shape:
            return None
    if any(map(Tensor._is_zerotensor, tensors)) or not all(map(Tensor.is_contiguous, tensors)):
        return None
    count = shape.numel()
    for tensor in tensors:
        if (tensor.storage_offset() + count) * tensor.itemsize > tensor.untyped_storage().nbytes():
            return None
    return {(dtype, device) for dtype, device, *_ in kinds}


def _tensors_of(state: Mapping[str, Any]) -> tuple[list[Any], list[Any]] | None:
    """Return the vectors of state and its numbers that are not Python's; None unless lists have one length."""
    lists = [state.get(name) or [] for name in ("old_dirs", "old_stps", "ro")]
    if not all(type(each) is list and len(each) == len(lists[0]) for each in lists):
        return None
    numbers = [n for n in (state.get("t"), state.get("H_diag"), *lists[2]) if n is not None and type(n) not in _REAL]
    vectors = [v for v in (state.get("d"), state.get("prev_flat_grad"), *lists[0], *lists[1]) if v is not None]
    return vectors, numbers


def _rate(lr: Any) -> Any:
    """Return a learning rate; a tensor of one element as a 0-d one."""
    return lr.squeeze() if isinstance(lr, Tensor) and lr.dim() else lr


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _on_host(value: Any) -> Any:
    """Copy a learning rate that is a tensor: schedulers change such a one in place, and the state keeps it."""
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def _as(value: Any, like: Tensor) -> Any:
    return value.to(like) if isinstance(value, Tensor) else value


def _refuse_disagreement(groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError when groups differ in more than their learning rate."""
    first = groups[0] if groups else {}
    for (index, group), name in product(enumerate(groups), COMMON):
        if name in first and group.get(name, first[name]) != first[name]:
            raise ValueError(
                "LBFGS doesn't support per-parameter options (parameter groups) except `lr`, but "
                f"param_groups[{index}] has {name}={group[name]!r} and param_groups[0] {name}={first[name]!r}; "
                "give all groups the same"
            )


def _misfits(groups: list[dict[str, Any]], incoming: Any) -> list[str]:
    """Say why flat vectors in a state dict do not belong to these parameters."""
    if not _well_formed(incoming):
        return []  # the base class refuses it
    saved, state = incoming["param_groups"], incoming["state"]
    _refuse_disagreement(saved)
    keys = [key for group in saved for key in group["params"]]
    lines = [
        f"state of parameter number {key}: LBFGS keeps its state with the first parameter"
        for key, entry in state.items()
        if key in keys[1:] and key != keys[0] and "func_evals" in entry
    ]
    names, saved_names = ([n for group in side for n in group.get("param_names", ())] for side in (groups, saved))
    if names != saved_names and set(names) == set(saved_names):
        lines.append("the parameters have the same names in another order, and flat vectors follow the order")
    params = [param for group in groups for param in group["params"]]
    size, totals = sum(to_local(param).numel() for param in params), make_totals(params)
    layout = totals.layout if totals else None
    return [*lines, *_vector_misfits(state.get(keys[0], {}) if keys else {}, size, layout)]


def _well_formed(incoming: Any) -> bool:
    if not isinstance(incoming, Mapping) or not {"state", "param_groups"} <= incoming.keys():
        return False
    groups, state = incoming["param_groups"], incoming["state"]
    if not isinstance(groups, list | tuple) or not isinstance(state, Mapping):
        return False
    lists = all(isinstance(group, Mapping) and isinstance(group.get("params"), list | tuple) for group in groups)
    return lists and all(isinstance(entry, Mapping) for entry in state.values())


def _unfit_numbers(tensor: Any, *, single: bool) -> str | None:
    """Return why a value of state does not hold real numbers, or not a single one, None if it does."""
    if not isinstance(tensor, Tensor):
        return None if isinstance(tensor, Real | None) else f"is {type(tensor).__name__}, must be a number"
    if single and tensor.numel() != 1:
        return f"has shape {tuple(tensor.shape)}, must be one number"
    if tensor.is_meta and type(tensor) in PLAIN:
        return "is on meta, which holds no numbers"
    if is_plain(tensor) and tensor.is_floating_point() and has_memory(tensor):
        return None
    if tensor.layout is not torch.strided or not tensor.is_floating_point():
        return f"is {tensor.dtype} of layout {tensor.layout}, must be dense and of real floating-point numbers"
    return unfit_memory(tensor)


def _layout(layout: Any) -> str:
    return "plain tensors" if layout is None else f"shards {layout}"


def _vector_misfits(state: Mapping[str, Any], size: int, layout: str | None) -> Iterator[str]:
    """Say which flat vectors do not have `size` elements, whether there are as many of each kind, and of what."""
    if state.get("d") is not None and state.get("layout") != layout:
        yield (
            f"state of LBFGS is of {_layout(state.get('layout'))}, but the parameters here are {_layout(layout)}; "
            f"flat vectors belong to one rank of one layout"
        )
        return
    lists = {name: state.get(name) or [] for name in ("old_dirs", "old_stps", "ro")}
    for name, items in lists.items():
        if not isinstance(items, list | tuple):
            yield f"state `{name}` is {type(items).__name__}, must be a list"
            return
    vectors = {name: state[name] for name in ("d", "prev_flat_grad") if state.get(name) is not None}
    vectors |= {f"{name}[{i}]": v for name in ("old_dirs", "old_stps") for i, v in enumerate(lists[name])}
    for name, vector in vectors.items():
        if not isinstance(vector, Tensor):
            yield f"state `{name}` is {type(vector).__name__}, must be a tensor"
        elif vector.shape != (size,):
            yield f"state `{name}` has shape {tuple(vector.shape)}, but the parameters have {size} real elements in all"
    numbers = {name: state[name] for name in ("t", "H_diag") if state.get(name) is not None}
    numbers |= {f"{name}[{i}]": item for name in ("ro", "al") for i, item in enumerate(state.get(name) or [])}
    known = {name: vector for name, vector in vectors.items() if isinstance(vector, Tensor)} | numbers
    for name, value in known.items():
        if (reason := _unfit_numbers(value, single=name in numbers)) is not None:
            yield f"state `{name}` {reason}"
    if len({len(items) for items in lists.values()}) > 1:
        yield "state " + ", ".join(f"`{name}` has length {len(items)}" for name, items in lists.items())
