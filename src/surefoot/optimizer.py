"""The base class: param groups, state, hooks, zero_grad, the step and the state dict of every optimizer.

It keeps the contract of `torch.optim.Optimizer` and subclasses it so that `isinstance` holds; every documented method
is ours.  What an algorithm computes stands in `optimizers`, how it is run in `engines`.
"""

import functools
import inspect
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.autograd import profiler
from torch.optim import optimizer as torch_hooks
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from surefoot.constructor import complete_constructor
from surefoot.dynamo import opaque
from surefoot.errors import NotRestoredError
from surefoot.rule import (
    DIRECTED,
    EMA,
    ENGINE_OPTIONS,
    ROUNDING_STEP,
    STEP,
    AlgorithmSpec,
    GroupScalar,
    Scalar,
    Slot,
    Sparse,
)
from surefoot.rule.hyperparameters import Check, check_storage, truth
from surefoot.state.check import format_param
from surefoot.state.convert import plain_param
from surefoot.state.load import LoadReport, LoadTarget, load
from surefoot.state.make import make_state, relocated
from surefoot.step.cache import StepCache
from surefoot.step.clipping import listed
from surefoot.step.inputs import StepInput
from surefoot.step.offload import BUCKET_BYTES as OFFLOADED_BYTES
from surefoot.step.offload import OffloadedOptimizer
from surefoot.step.options import (
    OptimizerOptions,
    ReleaseOptions,
    StepOptions,
    Stepping,
    StepStatistics,
    check_changed,
    check_group_options,
    group_ranges,
    refuse_eval_mode,
    refuse_short,
    refuse_unsupported,
)
from surefoot.step.pipeline import finish, run_step
from surefoot.step.ranks import due_exchange, report_failure
from surefoot.step.release import BUCKET_BYTES, ReleasedGradients
from surefoot.step.types import CustomStep, PreparedParam
from surefoot.tensors.modes import mode_is_active

if TYPE_CHECKING:
    from surefoot.telemetry import Telemetry

__all__ = [
    "Optimizer",
    "Params",
    "register_optimizer_step_post_hook",
    "register_optimizer_step_pre_hook",
    "with_hooks",
]

Params = Iterable[Any]
_HOOK_KINDS = (
    "step_pre",
    "step_post",
    "state_dict_pre",
    "state_dict_post",
    "load_state_dict_pre",
    "load_state_dict_post",
)


class Optimizer(torch.optim.Optimizer):
    """Base class of all optimizers.

    An algorithm is a subclass that either declares a rule (`slots`, `scalars`, `flags`, `coefficients`, `update`) and
    gets every engine and option for it, or defines a `step` of its own, as with `torch.optim.Optimizer`.  A
    hyperparameter of such a step may be called like one of `StepOptions`, which it does not take, if its constructor
    names it.

    Args:
        params: iterable of tensors, of `(name, tensor)` pairs such as `model.named_parameters()`, or of dicts, each
            with a key `params` and the hyperparameters that differ in that group.
        defaults: the hyperparameters, used where a group does not give its own.

    Attributes:
        param_groups: list of dicts: the tensors under `params`, their names under `param_names` if they have
            names, and the hyperparameters.  Whatever is changed here counts at the next step.
        state: for each parameter that has been stepped, a dict of its state.
        defaults: the hyperparameters of the constructor.

    Raises:
        TypeError: `params` is a tensor or a set, or holds something that is not a tensor.
        ValueError: `params` is empty, holds a tensor twice or a non-leaf tensor, names some tensors but not all, or a
            hyperparameter is out of its range.

    Example:
        A rule in full, the sign of a momentum:

        >>> import torch, surefoot
        >>> class Signum(surefoot.Optimizer):
        ...     slots = (surefoot.Slot("momentum_buffer"),)
        ...     def __init__(self, params, lr=1e-3, momentum=0.9, **options):
        ...         super().__init__(params, dict(lr=lr, momentum=momentum, **options))
        ...     @staticmethod
        ...     def update(param, grad, momentum_buffer, c, flags):
        ...         momentum_buffer = momentum_buffer * c.momentum + grad
        ...         return torch.add(param, torch.sign(momentum_buffer), alpha=-c.lr), momentum_buffer
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> weight.grad = torch.tensor([3.0, -2.0])
        >>> Signum([weight], lr=0.5).step()
        >>> weight.tolist()
        [0.5, 1.5]
    """

    slots: ClassVar[tuple[Slot, ...]] = ()
    """Tensors kept for each parameter, in the order in which `update` takes and returns them."""
    scalars: ClassVar[tuple[Scalar, ...]] = (STEP,)
    """Numbers kept for each parameter; `coefficients` takes them by name, `step` already counted."""
    group_scalars: ClassVar[tuple[GroupScalar, ...]] = ()
    """Numbers that parameters share, kept in the param groups; `update` returns their new values after the slots."""
    flags: ClassVar[tuple[str, ...]] = ()
    """Hyperparameters whose truth shapes the computation: `update` may branch on `flags.name`."""
    ranges: ClassVar[Mapping[str, Check]] = {}
    """For each hyperparameter a check that raises when a value is out of range."""
    sparse: ClassVar[Sparse] = Sparse.REFUSED
    """What becomes of sparse gradients."""
    instead_of_sparse: ClassVar[str] = ""
    """What the refusal of a sparse gradient recommends."""
    also_called: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """What other implementations call hyperparameters and state, with our names for each; for `load_state_dict`."""
    complex_params: ClassVar[bool] = True
    """Whether complex parameters are taken."""
    state_at_construction: ClassVar[bool] = False
    """Whether state exists from the constructor on, rather than from a parameter's first step."""

    prepares_params: ClassVar[bool] = False
    """Whether a custom step is handed its parameters checked and prepared, see `surefoot.step.custom`."""
    whole_tensors: ClassVar[bool] = False
    """Whether a custom step needs to know more of a tensor than a shard of it: then ranks that hold shards of
    parameters tell one another, before anything changes, which of them have gradients and whether one has failed."""
    has_modes: ClassVar[bool] = False
    """Whether groups have a `train_mode`, and steps are refused unless it is True."""
    eval_slots: ClassVar[tuple[Slot, ...]] = ()
    """Tensors kept for each parameter while its group is in eval mode, and only then."""
    derived_state: ClassVar[tuple[str, ...]] = ()
    """Keys of what `derive_state` returns, which state dicts tell and loading passes over."""
    refused_options: ClassVar[Mapping[str, str]] = {}
    """Options of `StepOptions` that it does not take though its kind does, each with the reason."""
    spec: AlgorithmSpec
    """All of this, as everything below the optimizer is handed it; of the class, or of a combination's instance."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Run hooks and a profiler range around a `step` that the subclass defines."""
        super().__init_subclass__(**kwargs)
        if "step" in vars(cls):
            cls.step = with_hooks(cls.step)  # type: ignore[method-assign]
        complete_constructor(cls)
        cls.spec = _spec_of(cls)

    @opaque
    def __init__(self, params: Params, defaults: dict[str, Any]) -> None:
        defaults = dict(defaults)
        self._stepping = Stepping.take(self.spec, defaults)
        refuse_unsupported(self.spec, self.step_options.requested())
        self.defaults = defaults
        self.state: defaultdict[Tensor, Any] = defaultdict(dict)
        self.param_groups: list[dict[str, Any]] = []
        self._make_hooks()
        self.check_group({name: value for name, value in defaults.items() if value is not torch_hooks.required})
        if isinstance(params, Tensor):
            raise TypeError(
                "params argument given to the optimizer should be an iterable of Tensors or dicts, but got "
                f"{torch.typename(params)}; give a list: [tensor]"
            )
        if isinstance(params, set | frozenset):
            warnings.warn(
                "optimizer parameters need to be organized in ordered collections, but the order of a set changes from "
                "run to run, and with it what a state dict belongs to; give a list. This will be an error in a future "
                "release.",
                FutureWarning,
                stacklevel=3,
            )
        groups = list(params)
        if not groups:
            raise ValueError(
                "optimizer got an empty parameter list; if it comes from a generator, that may have been used up"
            )
        for group in groups if isinstance(groups[0], dict) else [{"params": groups}]:
            self.add_param_group(group)
        if self.state_at_construction:
            make_state(self.spec, self.param_groups, self.state)

    @functools.cached_property
    def _stepping(self) -> Stepping:
        """What is kept of steps, of one whose constructor was not called: its own, or that of whom it forwards to."""
        forward: Any = getattr(type(self), "__getattr__", None)
        try:
            found: Stepping = Stepping(constructed=False) if forward is None else forward(self, "_stepping")
        except AttributeError:
            return Stepping(constructed=False)
        return found

    # What a rule declares

    @classmethod
    def supported_step_options(cls) -> set[str]:
        """Return the options of `StepOptions` that this algorithm takes."""
        if not (cls.is_rule() or cls.prepares_params):
            return {"zero_grad_after_step"}
        return set(StepOptions.__annotations__) - set(DIRECTED).difference(cls.flags) - set(cls.refused_options)

    @classmethod
    def is_rule(cls) -> bool:
        """Return whether this algorithm is a rule that the engines run."""
        return cls.update is not Optimizer.update

    @classmethod
    def is_declared(cls) -> bool:
        """Return whether the class says what state it keeps, so that loading can verify it."""
        return cls.is_rule() or bool(cls.slots)

    @staticmethod
    def coefficients(h: SimpleNamespace, *scalars: Any, **named: Any) -> dict[str, Any]:  # noqa: ARG004
        """Return the numbers of an update that depend on hyperparameters and scalars only.

        Computed once for all parameters that have taken the same number of steps.

        Args:
            h: the group's hyperparameters as attributes; a number may also be a 0-d tensor.
            scalars: the parameter's scalars, passed by name; `step` counts from 1.
            named: the same; an algorithm names what it reads.

        Returns:
            Numbers by name.  `update` reads them as `c.name`, beside the hyperparameters themselves and `c.fresh`,
            which is true when a slot has just been made.  A name of a scalar gives that scalar its new value.
        """
        return {}

    @staticmethod
    def update(param: Tensor, grad: Tensor, *slots_coefficients_flags: Any) -> Any:
        """Return the new parameter and the new slots: `update(param, grad, *slots, c, flags)`.

        Out of place, elementwise but for sums, means and norms of whole tensors, in the operations of
        `surefoot.rule.ops`.  It is traced, once for each setting of the flags: an `if` on `flags.name` is settled then;
        on numbers use `torch.where`.

        Args:
            param: the parameter, seen as real numbers.
            grad: its gradient, negated under `maximize`.
            slots_coefficients_flags: the slots (None where a flag leaves one out), then `c`, then `flags`.

        Returns:
            `(param, *slots, *group_scalars)`, None for the slots left out.
        """
        raise NotImplementedError

    @staticmethod
    def flags_of(group: Mapping[str, Any], param: Tensor) -> Mapping[str, bool]:  # noqa: ARG004
        """Return flags that a parameter settles by itself, by its shape for instance; they are among `flags`.

        Where a group has no parameter to ask, they count as off.
        """
        return {}

    @classmethod
    def rows_suffice(cls, flags: Mapping[str, bool]) -> bool:  # noqa: ARG003
        """Return whether an element without gradient stays as it is, so that a sparse gradient's rows are enough."""
        return True

    @classmethod
    def check_group(cls, group: Mapping[str, Any]) -> None:
        """Raise when a hyperparameter of a group, or a combination of them, is not allowed.

        Raises:
            TypeError: a value is not a number.
            ValueError: a value is out of range.
            RuntimeError: engine options contradict one another.
        """
        check_group_options(cls.spec, group)
        for name, check in (*group_ranges(cls.spec), *cls.ranges.items()):
            if name in group:
                check(name, group[name])
        for name in {"maximize", *ENGINE_OPTIONS, *cls.flags} - set(cls.ranges):
            truth(name, group.get(name))
        check_storage(group)
        if not cls.is_rule():
            refuse_short(cls.spec, group)
        if group.get("fused") and group.get("foreach"):
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
        if group.get("fused") and group.get("differentiable"):
            raise RuntimeError("`fused` does not support `differentiable`")

    @staticmethod
    def check_groups(groups: Sequence[Mapping[str, Any]]) -> None:
        """Raise RuntimeError when groups cannot be stepped together; asked at every step."""

    def check_params(self, params: list[Tensor], group: Mapping[str, Any]) -> None:
        """Raise ValueError when the algorithm cannot optimize one of these tensors with the options of a group."""

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Return whether a GradScaler leaves unscaling to the step, as with `fused=True` in torch.

        No other option needs the scale: what clips or measures gets gradients that the scaler has unscaled.  A
        scaler, or a trainer that asks this for one, is warned of `zero_grad_after_step`, which misses skipped steps.
        """
        if (released := self._releasing()) is not None:
            released.refuse_scaler()
        if (offloaded := self._offloading()) is not None:
            offloaded.refuse_scaler()
        by_step = any(group.get("fused") for group in self.param_groups)
        if self.step_options.zero_grad_after_step and not by_step:
            warnings.warn(
                "`zero_grad_after_step` does nothing in steps that a GradScaler skips, which it does not call; pass "
                "fused=True, or call zero_grad() in the loop, or their infinities stay in the gradients",
                RuntimeWarning,
                stacklevel=2,
            )
        return by_step

    # Groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; a refused one leaves the optimizer and `param_group` as they were.

        Args:
            param_group: the tensors, or `(name, tensor)` pairs, under `params`, and hyperparameters that differ from
                the optimizer's defaults.  The dict itself becomes the group.

        Raises:
            TypeError: not a dict, an unordered collection, or something that is not a tensor.
            ValueError: a parameter is not a leaf, or in another group already; only some have names; a hyperparameter
                is missing or out of range.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        group = {**param_group, **_params_and_names(param_group)}
        for param in group["params"]:
            self._check_tensor(param)
        for name, default in self._defaults_of(group).items():
            if default is torch_hooks.required and name not in group:
                raise ValueError(f"parameter group didn't specify a value of required optimization parameter {name}")
            group.setdefault(name, default)
        algorithm = self._algorithm_of(group)
        others = [other for other in self.param_groups if self._algorithm_of(other) is algorithm]
        for scalar in algorithm.group_scalars:
            shared = others and not scalar.is_split(others)
            group.setdefault(scalar.name, others[0][scalar.name] if shared else scalar.new(group))
        if isinstance(group.get("betas"), list):
            group["betas"] = tuple(group["betas"])
        self._check_own(group)
        self._check_membership(group)
        algorithm.check_params(group["params"], group)
        param_group.update(group)
        self.param_groups.append(param_group)

    def _algorithm_of(self, group: Mapping[str, Any]) -> "Optimizer":  # noqa: ARG002
        """Return whose checks, hyperparameters and derived state are a group's."""
        return self

    def _defaults_of(self, group: Mapping[str, Any]) -> Mapping[str, Any]:  # noqa: ARG002
        """Return the hyperparameters that a group has unless it has its own."""
        return self.defaults

    def _check_tensor(self, param: Any) -> None:
        if not isinstance(param, Tensor):
            raise TypeError(f"optimizer can only optimize Tensors, but one of the params is {torch.typename(param)}")
        if not self.defaults.get("differentiable") and not (param.is_leaf or param.retains_grad):
            raise ValueError("can't optimize a non-leaf Tensor; give the tensor it was computed from, or .detach() it")

    def _check_membership(self, group: dict[str, Any]) -> None:
        """Check names and duplicates against the groups that are there."""
        params = group["params"]
        named = "param_names" in group
        if self.param_groups and named != ("param_names" in self.param_groups[0]):
            raise ValueError(
                "all optimizer param groups should be with/without names. cannot add param group "
                f"{'with' if named else 'without'} names to the optimizer"
            )
        if len(params) != len(set(params)):
            warnings.warn(
                "optimizer contains a parameter group with duplicate parameters; each of them is stepped as often as "
                "it stands there, which is rarely meant",
                stacklevel=4,
            )
        if not set(params).isdisjoint(chain.from_iterable(other["params"] for other in self.param_groups)):
            raise ValueError("some parameters appear in more than one parameter group")

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of all parameters.

        Args:
            set_to_none: drop the gradients rather than filling them with zeros.
        """
        if (released := self._releasing()) is not None:
            released.before_zero_grad()
        if self._offloading() is None:
            self._reset_grads(set_to_none)
        else:
            self._reset_grads_unseen(set_to_none)

    def _reset_grads(self, set_to_none: bool) -> None:
        with _profiled(f"Optimizer.zero_grad#{type(self).__name__}.zero_grad"):
            params = chain.from_iterable(group["params"] for group in self.param_groups)
            with_grad = [param for param in params if param.grad is not None]
            if (offloaded := self._offloading()) is not None and not set_to_none:
                with_grad = [param for param in with_grad if not offloaded.zero(param)]
            if set_to_none:
                for param in with_grad:
                    param.grad = None
                return
            for param in with_grad:
                if param.grad.grad_fn is not None:
                    param.grad.detach_()
                else:
                    param.grad.requires_grad_(False)
            with torch.no_grad():
                for param in with_grad:
                    param.grad.zero_()

    _reset_grads_unseen = opaque(_reset_grads)  # a compiler cannot look at gradients that are on the host

    # The step; `with_hooks`, below, wraps it and tries the fast lane first

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: evaluates the model again, calls `backward`, and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: a gradient, or state, does not fit its parameter; or the engine that was asked for cannot
                serve it.  Nothing has changed then.
        """
        if not (self.is_rule() or self.prepares_params):
            raise NotImplementedError(f"{type(self).__name__} defines neither `update` nor `step`")
        loss = self.evaluate(closure)
        declined = self._stepping.context.fast_lane_declined or self._releasing() is not None
        if not declined and self._may_take_fast_lane() and self._try_fast_lane():
            return loss
        with torch.set_grad_enabled(bool(self.defaults.get("differentiable"))):
            cache = self.__dict__.pop("_step_cache", None)
            self._step_cache = run_step(self._step_input(), cache)
        return loss

    step.is_whole = True  # type: ignore[attr-defined]

    def _step_input(self) -> StepInput:
        """Return all that a step is about."""
        own = self.__dict__
        return StepInput(
            spec=self.spec,
            groups=self.param_groups,
            state=self.state,
            stepping=self._stepping,
            grad_scale=own.get("grad_scale"),
            found_inf=own.get("found_inf"),
            coefficients=self.coefficients,
            make_custom_step=self._make_custom_step,
            check_param=self._check_again,
            released=None if (released := self._releasing()) is None else released.options,
            transfers=self._offloading(),
        )

    @property
    def step_options(self) -> OptimizerOptions:
        """The options of `StepOptions` that are not its groups'; what is changed here counts at the next step."""
        return self._stepping.options

    @property
    def step_statistics(self) -> StepStatistics:
        """How many steps there were, and how many of them were skipped."""
        return self._stepping.statistics

    def _check_again(self, group: Mapping[str, Any], param: Tensor) -> None:
        """Raise RuntimeError when a parameter has become one that the algorithm cannot optimize."""
        try:
            self._algorithm_of(group).check_params([param], group)
        except ValueError as error:
            raise RuntimeError(f"{format_param(group, param)} cannot be stepped: {error}") from error

    def _try_fast_step(self) -> bool:
        """Step if nothing has changed since the last step and nothing is asked for; return whether it was done.

        Where gradients are released, close an iteration of which nothing is left to be done.
        """
        if self.__dict__.get("_released") is not None and (released := self._releasing()) is not None:
            return released.try_close()
        made = self._try_fast_lane()
        if made and self._stepping.options.zero_grad_after_step:
            self.zero_grad()
        return made

    def _try_fast_lane(self) -> bool:
        """Step by what the last step has left, or an earlier one in which the same parameters had gradients.

        Returns:
            Whether nothing has changed since, so that it was done; else nothing is changed.
        """
        cache: StepCache | None = self.__dict__.get("_step_cache")
        if cache is None:
            return False
        if cache.others is not None:
            self._step_cache = cache = cache.of_now()
        return bool(cache.fast and cache.fast.run(self.param_groups, self.state, self.coefficients, self._step_input))

    def _make_custom_step(self, found: list[PreparedParam]) -> CustomStep:
        """Return what steps prepared parameters; what an algorithm with `prepares_params` defines.

        It is kept as long as all but values is as it was, and used for the parameters of later steps; so it must hold
        neither gradients nor the optimizer, and read hyperparameters that are real numbers, which schedules change.
        """
        raise NotImplementedError

    def _is_observed(self) -> bool:
        """Return whether hooks or a profiler have to do with a step."""
        hooks = (
            torch_hooks._global_optimizer_pre_hooks
            or torch_hooks._global_optimizer_post_hooks
            or getattr(self, "_optimizer_step_pre_hooks", None)
            or getattr(self, "_optimizer_step_post_hooks", None)
        )
        return bool(hooks or _is_profiled())

    def _may_take_fast_lane(self) -> bool:
        """Return whether no GradScaler, offloaded parameter or mode that must see operations has to do with a step."""
        own = self.__dict__
        scaled = own.get("grad_scale") is not None or own.get("found_inf") is not None
        elsewhere = own.get("_offloaded") is not None
        return not (scaled or elsewhere or mode_is_active())

    def _begin_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Check options that were changed, count a step, and decide whether it is measured."""
        if (released := self._releasing()) is not None:
            released.before_step(args, kwargs)
        stepping, context = self._stepping, self._stepping.context
        check_changed(stepping, self.spec, self.param_groups)
        context.begin()
        with context.lock:
            stepping.statistics.steps = context.step = stepping.statistics.steps + 1
        telemetry = stepping.options.telemetry
        context.wants_metrics = telemetry is not None and telemetry.wanted(context.step)

    def _finish_step(self) -> Any:
        """Do what comes after the update, and return what was measured, None if nothing was."""
        context = self._stepping.context
        if (released := self._releasing()) is not None:
            released.after_step(context)
        return finish(context, self._step_input)

    # Gradients released while backward runs

    def release_gradients(
        self,
        model: nn.Module,
        *,
        micro_batches: int = 1,
        bucket_bytes: int = BUCKET_BYTES,
        max_previous_grad_norm: float | None = None,
        max_param_grad_norm: float | None = None,
        nonfinite_params: str = "ignore",
    ) -> ReleasedGradients:
        """Step the model's parameters while `backward` runs, and drop each gradient as soon as it is used.

        Gradients are then never there all at once.  The training loop stays as it is: `step` closes the iteration, by
        which it counts, steps parameters that have a gradient still (those of no hook: outside of the model, or
        not yet trained when gradients came), and calls hooks; `zero_grad` has little to do.  What is computed is
        the same, bit for bit (with Muon to rounding).  See docs/release.md for what is refused, and why.

        Args:
            model: the module that the parameters belong to.
            micro_batches: how many backward passes add to a gradient before it is used, >= 1; see also
                `ReleasedGradients.accumulate`.
            bucket_bytes: bytes of gradients that are stepped together, > 0: more of them at a time are faster where
                there are many small ones, and take as much more memory.
            max_previous_grad_norm: greatest norm of the previous step's gradients, all together and before clipping,
                > 0; where it was greater, this step's gradients are scaled down by as much, in the step.  So a sudden
                great gradient is not clipped, but those of the step after it.  The norm stands in the groups, as
                `previous_grad_norm`, and so in state dicts; there is none at first, and then nothing is clipped.
            max_param_grad_norm: greatest norm of the gradient of each parameter, > 0; a greater one is scaled down in
                the step.
            nonfinite_params: what to do with a parameter whose gradient holds inf or NaN: `"ignore"`, `"skip"` it,
                leaving it and its state as they were, or `"raise"` NonFiniteGradientError from `backward`.

        Returns:
            A handle, to be used as a context manager or to be ended by `remove()`.

        Raises:
            TypeError: `model` is not a module, or one that DDP or FSDP1 has wrapped; the algorithm has a custom step
                that takes all parameters at once.
            ValueError: no parameter is one of the model's; or an option needs all gradients at once (`max_grad_norm`,
                `nonfinite`, `differentiable`), or an argument is out of its range.
            RuntimeError: gradients are released already; or ranks would have to wait for one another while backward
                runs, for sums over the shards of a parameter.

        Example:
            >>> model = torch.nn.Linear(2, 1)
            >>> optimizer = surefoot.AdamW(model.parameters())
            >>> with optimizer.release_gradients(model):
            ...     for _ in range(2):
            ...         model(torch.ones(1, 2)).sum().backward()
            ...         optimizer.step()
            >>> model.weight.grad is None
            True
        """
        for name, value in (("micro_batches", micro_batches), ("bucket_bytes", bucket_bytes)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"`{name}` must be an integer >= 1, but is {value!r}")
        self._refuse_own_step("gradients can be released")
        self._refuse_elsewhere()
        options = ReleaseOptions(max_previous_grad_norm, max_param_grad_norm, nonfinite_params)
        self._released = ReleasedGradients(
            model, self._step_input, options, micro_batches=micro_batches, bucket_bytes=bucket_bytes
        )
        return self._released

    def _refuse_own_step(self, what: str) -> None:
        """Raise TypeError where it is not known that the pipeline takes a step's parameters from the groups."""
        in_parts = self.is_rule() or self.prepares_params
        if not (in_parts and getattr(type(self).step, "is_whole", False) and self._stepping.constructed):
            raise TypeError(
                f"{type(self).__name__} has a custom step that takes all parameters at once; {what} with an algorithm "
                f"that is a rule, or steps prepared parameters"
            )

    def _refuse_elsewhere(self) -> None:
        """Raise RuntimeError where parameters are stepped elsewhere than in `step`, or not where they are."""
        if self._releasing() is not None:
            raise RuntimeError("gradients are released already; remove() the handle of release_gradients first")
        if self._offloading() is not None:
            raise RuntimeError("the optimizer is offloaded already; remove() the handle of offload first")

    def _releasing(self) -> ReleasedGradients | None:
        """Return the handle by which gradients are released, None if they are not."""
        released: ReleasedGradients | None = self.__dict__.get("_released")
        return released if released is not None and released.active else None

    # The optimizer on the CPU, the model on a device

    def offload(self, model: nn.Module, *, bucket_bytes: int = OFFLOADED_BYTES) -> OffloadedOptimizer:
        """Step on the CPU what is on another device: state, and copies of the parameters, are in the host's memory.

        Each gradient comes over in its own dtype while `backward` runs, and its memory on the device is free again.
        `step` measures and updates bucket by bucket, in the order in which gradients have come, and what is updated
        goes back while the next bucket is.  The training loop stays as it is, and so does what is computed, bit for
        bit as on the CPU, with all options.  For masters in float32 of 16-bit weights pass `master_weight_bits=32` and
        `state_dtype=torch.float32` to the optimizer.  See docs/offload.md for what is refused, and why.

        Groups, state and state dicts are the optimizer's as ever: the parameters in them are the model's, the state's
        tensors are on the CPU.  What is written to the parameters counts at the next step.

        Args:
            model: the module that the parameters belong to.
            bucket_bytes: bytes of weights that are stepped and sent together, > 0.

        Returns:
            A handle, to be used as a context manager or to be ended by `remove()`.

        Raises:
            TypeError: `model` is not a module, or one that DDP or FSDP1 has wrapped; the algorithm has a custom step
                that takes all parameters at once.
            ValueError: no parameter is one of the model's; a group has `capturable` or `differentiable`; or
                `bucket_bytes` is not an integer >= 1.
            RuntimeError: a parameter is sharded, shares memory with another or has none; or gradients are released, or
                the optimizer is offloaded, already.

        Example:
            >>> model = torch.nn.Linear(2, 1).to(torch.bfloat16)  # and .to("cuda")
            >>> optimizer = surefoot.AdamW(model.parameters(), master_weight_bits=32, state_dtype=torch.float32)
            >>> handle = optimizer.offload(model)
            >>> model(torch.ones(1, 2, dtype=torch.bfloat16)).sum().backward()
            >>> optimizer.step()
            >>> optimizer.zero_grad()
            >>> optimizer.state[model.weight]["exp_avg"].device.type
            'cpu'
        """
        if not isinstance(bucket_bytes, int) or isinstance(bucket_bytes, bool) or bucket_bytes < 1:
            raise ValueError(f"`bucket_bytes` must be an integer >= 1, but is {bucket_bytes!r}")
        self._refuse_own_step("it can be offloaded")
        self._refuse_elsewhere()
        self._offloaded = OffloadedOptimizer(model, self.param_groups, self._bring_back, bucket_bytes=bucket_bytes)
        try:
            self.to()
        except BaseException:
            del self._offloaded
            raise
        return self._offloaded

    def _bring_back(self) -> None:
        """Let the state be on the parameters' devices again."""
        self.__dict__.pop("_offloaded", None)
        self.to()

    def _offloading(self) -> OffloadedOptimizer | None:
        """Return the handle by which the optimizer is offloaded, None if it is not."""
        return self.__dict__.get("_offloaded")

    def _host_param(self, param: Tensor) -> Tensor:
        """Return the tensor that is stepped beside its state for a parameter: itself, or on the CPU if offloaded."""
        offloaded = self._offloading()
        return param if offloaded is None else offloaded.host_param(param)

    def _on_host(self, *, wait: bool = True) -> AbstractContextManager[None]:
        """Let groups and state be the host's inside of a `with` block, where the optimizer is offloaded.

        Args:
            wait: first wait for all gradients, and until weights may be written.
        """
        offloaded = self._offloading()
        return _NO_CONTEXT if offloaded is None or offloaded.inside else self._inside(offloaded, wait)

    @contextmanager
    def _inside(self, offloaded: OffloadedOptimizer, wait: bool) -> Iterator[None]:
        self._enter_host(offloaded)
        try:
            if wait:
                offloaded.wait()
            yield
        finally:
            if offloaded.inside:
                self._leave_host(offloaded)

    def _on_device(self) -> AbstractContextManager[None]:
        """Undo `_on_host` inside of a `with` block, for what a user's closure does in a step."""
        offloaded = self._offloading()
        return _NO_CONTEXT if offloaded is None or not offloaded.inside else self._outside(offloaded)

    @contextmanager
    def _outside(self, offloaded: OffloadedOptimizer) -> Iterator[None]:
        self._leave_host(offloaded)
        try:
            yield
        finally:
            if offloaded.active:  # or removed by the closure
                self._enter_host(offloaded)

    def _enter_host(self, offloaded: OffloadedOptimizer) -> None:
        own = self.param_groups, self.state
        self.param_groups, self.state = offloaded.enter(*own)
        self._own = own

    def _leave_host(self, offloaded: OffloadedOptimizer) -> None:
        self.param_groups, self.state = own = self.__dict__.pop("_own")
        offloaded.leave(*own)

    def evaluate(self, closure: Callable[[], Any] | None) -> Any:
        """Call the closure, if there is one, with gradients enabled; other ranks are told when it fails here."""
        if closure is None:
            return None
        try:
            with self._on_device(), torch.enable_grad():
                loss = closure()
                refuse_eval_mode(self.spec, self.param_groups)
                check_changed(self._stepping, self.spec, self.param_groups)
            context = self._stepping.context
            context.wants_metrics = context.wants_metrics and self.step_options.telemetry is not None
        except Exception:
            step = self._step_input()
            with report_failure(step, due_exchange(step)):
                raise
        return loss

    @property
    def telemetry(self) -> "Telemetry":
        """What the steps have measured.

        Raises:
            AttributeError: the optimizer was made without `telemetry=True` or a `Telemetry`.
        """
        if self.step_options.telemetry is None:
            raise AttributeError(f"{type(self).__name__} measures nothing: make it with `telemetry=True`")
        found: Telemetry = self.step_options.telemetry
        return found

    @contextmanager
    def ema_parameters(self) -> Iterator[None]:
        """Let the parameters be their averages inside a `with` block, for evaluation or saving; then put them back.

        Parameters without an average, which have not been stepped, stay as they are.  What is written to the
        parameters inside the block is lost, and so is another shape that they have been given there.

        Raises:
            RuntimeError: no parameter has an average: pass `ema=` to the optimizer and take a step; or an average has
                another shape than its parameter.  Nothing has changed then.
            NotRestoredError: at the end, parameters cannot take their values back, since they have become tensors of
                another kind.  All others have theirs; the error holds the values of these.
        """
        params = [param for group in self.param_groups for param in group["params"]]
        averages = {param: self.state[param][EMA.name] for param in params if EMA.name in self.state.get(param, {})}
        if not averages:
            raise RuntimeError("there are no averages of parameters: pass `ema=0.999` to the optimizer and take a step")
        if other := [param for param, average in averages.items() if param.shape != average.shape]:
            raise RuntimeError(
                f"the averages of {listed(self._names_among(other))} have another shape than the parameters have now; "
                f"delete them with `del optimizer.state[param]`"
            )
        kept = [(param, param.detach().clone()) for param in averages]
        try:
            with torch.no_grad():
                for param, average in averages.items():
                    param.copy_(average)
            yield
        finally:
            if lost := [pair for pair in kept if not _put_back(*pair)]:
                raise NotRestoredError(
                    f"{listed(self._names_among([param for param, _ in lost]))} could not be put back, having become "
                    f"other tensors inside the block; all others were. What they were is in this error's `values`",
                    lost,
                )

    def _names_among(self, params: Iterable[Tensor]) -> list[str]:
        """Return the names of some of the parameters, which need not be the optimizer's any more."""
        known = self._step_input().names()
        return [known.get(param, "a removed parameter") for param in params]

    # Hooks

    def _make_hooks(self) -> None:
        for kind in _HOOK_KINDS:
            self.__dict__.setdefault(f"_optimizer_{kind}_hooks", OrderedDict())
        # torch wraps classes whose step has no hooks yet, such as one assigned after the class was made.
        if not getattr(type(self).step, "hooked", False):
            type(self).step = with_hooks(type(self).step)  # type: ignore[method-assign]

    def _check_own(self, group: Mapping[str, Any]) -> None:
        """Check a group, unless it is that of another optimizer inside, whose options are not ours."""
        if self._stepping.constructed or self.is_rule():
            self._algorithm_of(group).check_group(self.step_options.own(group))

    def _check_loaded(self, group: Mapping[str, Any]) -> None:
        """Check a group that is to be taken over, and whether its options go with its parameters."""
        self._check_own(group)
        if self._stepping.constructed or self.is_rule():
            self._algorithm_of(group).check_params(group["params"], group)

    def _hooks(self, kind: str) -> Iterable[Callable[..., Any]]:
        """Return the hooks of a kind, in order, for the kinds that torch knows under the same names."""
        hooks: Mapping[int, Callable[..., Any]] = getattr(
            self, f"_optimizer_{kind}_hooks", {}
        )  # a wrapper may lack them
        return tuple(hooks.values())

    def _register(self, kind: str, hook: Callable[..., Any], *, prepend: bool) -> RemovableHandle:
        name = f"_optimizer_{kind}_hooks"
        if not hasattr(self, name):
            self.__dict__[name] = OrderedDict()
        hooks: OrderedDict[int, Callable[..., Any]] = getattr(self, name)
        handle = RemovableHandle(hooks)
        hooks[handle.id] = hook
        if prepend:
            hooks.move_to_end(handle.id, last=False)
        return handle

    def register_step_pre_hook(self, hook: Callable[..., Any], prepend: bool = False) -> RemovableHandle:
        """Call `hook(optimizer, args, kwargs)` before each step; it may return new `(args, kwargs)`.

        Args:
            hook: the hook.
            prepend: call it before the hooks that are there already.

        Returns:
            A handle whose `remove()` takes the hook away.
        """
        return self._register("step_pre", hook, prepend=prepend)

    def register_step_post_hook(self, hook: Callable[..., Any], prepend: bool = False) -> RemovableHandle:
        """Call `hook(optimizer, args, kwargs)` after each step; see `register_step_pre_hook`."""
        return self._register("step_post", hook, prepend=prepend)

    def register_state_dict_pre_hook(self, hook: Callable[..., Any], prepend: bool = False) -> RemovableHandle:
        """Call `hook(optimizer)` before `state_dict` is made; see `register_step_pre_hook`."""
        return self._register("state_dict_pre", hook, prepend=prepend)

    def register_state_dict_post_hook(self, hook: Callable[..., Any], prepend: bool = False) -> RemovableHandle:
        """Call `hook(optimizer, state_dict)` on each state dict made; it may return another."""
        return self._register("state_dict_post", hook, prepend=prepend)

    def register_load_state_dict_pre_hook(self, hook: Callable[..., Any], prepend: bool = False) -> RemovableHandle:
        """Call `hook(optimizer, state_dict)` on a shallow copy of what is to be loaded; it may return another."""
        return self._register("load_state_dict_pre", hook, prepend=prepend)

    def register_load_state_dict_post_hook(self, hook: Callable[..., Any], prepend: bool = False) -> RemovableHandle:
        """Call `hook(optimizer)` after a state dict has been loaded; see `register_step_pre_hook`."""
        return self._register("load_state_dict_post", hook, prepend=prepend)

    # State

    def state_dict(self) -> dict[str, Any]:
        """Return state and groups as plain containers, with parameters replaced by running numbers.

        Returns:
            `{"state": {number: {...}}, "param_groups": [{..., "params": [numbers]}]}`, the layout of torch.optim.  Its
            tensors are the optimizer's own, not copies.
        """
        if (released := self._releasing()) is not None:
            released.refuse_open("state_dict()")
        for hook in self._hooks("state_dict_pre"):
            hook(self)
        with self._on_host():
            result = self._numbered_state()
        for hook in self._hooks("state_dict_post"):
            result = _or(hook(self, result), result)
        return result

    def _numbered_state(self) -> dict[str, Any]:
        """Return state and groups, with parameters replaced by running numbers."""
        numbers = _numbers(self.param_groups)
        groups = [
            {
                **{k: v for k, v in group.items() if k != "params"},
                "params": [numbers[p] for p in group["params"]],
            }
            for group in self.param_groups
        ]
        state = {numbers.get(key, key) if isinstance(key, Tensor) else key: v for key, v in self.state.items()}
        if self.spec.derived_state:
            for param, derived in self._derived_state():
                state[numbers[param]] = {**state[numbers[param]], **derived}
        return {"state": state, "param_groups": groups}

    def exact_param(self, group: Mapping[str, Any], param: Tensor, entry: Mapping[str, Any]) -> Tensor:
        """Return the full value of a parameter: float32 where the state has a correction of it, else itself."""
        return plain_param(group, param, entry)

    def derive_state(self, group: Mapping[str, Any], param: Tensor, entry: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        """Return what a state dict tells of a parameter beside its state; under the keys `derived_state`.

        Raises:
            RuntimeError, TypeError: it cannot be derived; the state dict does without, and a warning says so.
        """
        return {}

    def _derived_state(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Yield what can be derived of each parameter, and warn of what cannot."""
        failed: list[Exception] = []
        for group in self.param_groups:
            for param in group["params"]:
                try:
                    derived = self.derive_state(group, param, self.state.get(param, {}))
                except (RuntimeError, TypeError) as error:
                    failed.append(error)
                else:
                    yield from [(param, derived)] if derived else []
        if failed:
            warnings.warn(
                f"the state dict has no {', '.join(map(repr, self.derived_state))} of {len(failed)} parameters, where "
                f"it cannot be derived; all else is there. The first of them: {failed[0]}",
                RuntimeWarning,
                stacklevel=3,
            )

    @opaque
    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True) -> LoadReport:  # type: ignore[override]
        """Load what `state_dict` of this class, or of its namesake in torch.optim, has given.

        Parameters are matched by name where both sides have names, by position otherwise.  Tensors are copied; they
        keep their dtype and go to their parameter's device, step counters to where this optimizer keeps them; what is
        no state of ours, such as a wrapper's, is kept as it is.  The group's options become those of the state dict,
        but for the options of the step (`max_grad_norm`, `ema` and others), which say what this script wants
        done around the update, and for what the state dict does not know.

        Args:
            state_dict: the dict; it is not changed.
            strict: refuse unless everything matches.  Otherwise load what matches, leave the rest as it is, and
                report it.

        Returns:
            What did not match, nothing when strict; and, as `kept`, where options are this optimizer's own rather than
            those of the state dict.

        Raises:
            ValueError: it does not match (the message lists where), or a hyperparameter is out of range.  The
                optimizer is as it was.
        """
        state_dict = dict(state_dict) if isinstance(state_dict, Mapping) else state_dict
        for hook in self._hooks("load_state_dict_pre"):
            state_dict = _or(hook(self, state_dict), state_dict)
        with self._on_host():
            target = LoadTarget(self.spec, self._defaults_of, self.param_groups, self.state, self._check_loaded)
            loaded = load(target, state_dict, strict=strict)
        before = dict(self.__dict__)
        groups, state = loaded.param_groups, loaded.state
        if (offloaded := self._offloading()) is not None:
            groups, state = offloaded.device_view(groups, state)
        new = {"state": state, "param_groups": groups}
        try:
            self.__setstate__(new)
            self._hand_on(new.keys() - before.keys())
            for hook in self._hooks("load_state_dict_post"):
                hook(self)
        except BaseException:
            self.__dict__.clear()
            self.__dict__.update(before)
            raise
        if (released := self._releasing()) is not None:
            released.abandon()
        return loaded.report

    def _hand_on(self, names: Iterable[str]) -> None:
        """Put what was loaded where a wrapper has its groups and state from, if it has none itself."""
        loaded = {name: self.__dict__.pop(name) for name in names}
        for name, value in loaded.items():
            held = getattr(self, name, None)
            if held is None:
                self.__dict__[name] = value
            elif name == "state":
                held.clear()
                held.update(value)
            else:
                held[:] = value

    def to(self, device: torch.device | str | int | None = None) -> Self:
        """Move the state to a device: to offload it, or to follow parameters that have moved.

        Step counts and other scalars stay on the CPU, except in groups with `capturable=True`.  Parameters and
        gradients are the model's and stay where they are; a step needs state and parameters on the same device again.

        Args:
            device: where to; by default to where each parameter is, or to the CPU while the optimizer is offloaded.

        Returns:
            The optimizer itself.

        Example:
            >>> model = torch.nn.Linear(2, 2)
            >>> optimizer = surefoot.AdamW(model.parameters())
            >>> optimizer = optimizer.to("cpu")  # offload, to make room for an evaluation
            >>> optimizer = optimizer.to()  # and back
        """
        target = None if device is None else torch.device(device)
        with self._on_host():
            pairs = [(group, param) for group in self.param_groups for param in group["params"] if param in self.state]
            moved = [
                relocated(self.spec.of(group), group, self.state[param], target or param.device)
                for group, param in pairs
            ]
            for (_, param), entry in zip(pairs, moved, strict=True):
                self.state[param].update(entry)
        self.__dict__.pop("_step_cache", None)  # it holds the tensors that were
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy groups, state, defaults and the options in use; hooks stay behind, as in torch."""
        options = ("_stepping",) if self.step_options.requested() else ()
        return {name: getattr(self, name) for name in ("defaults", "state", "param_groups", *options)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what `__getstate__` gave, or a part of it."""
        self.__dict__.pop("_step_cache", None)  # it holds the state that was
        self.__dict__.update(state)
        self.__dict__.setdefault("_stepping", Stepping())
        self._make_hooks()

    def __repr__(self) -> str:
        """Show the options of every group."""
        text = f"{type(self).__name__} ("
        for index, group in enumerate(self.param_groups):
            options = (f"    {name}: {group[name]}\n" for name in sorted(group) if name != "params")
            text += f"\nParameter Group {index}\n" + "".join(options)
        return f"{text})"


def _spec_of(cls: type[Optimizer]) -> AlgorithmSpec:
    """Return what a class declares."""
    parameters = inspect.signature(cls.__init__).parameters.values()
    return AlgorithmSpec(
        name=cls.__name__,
        slots=cls.slots,
        scalars=_scalars(cls),
        group_scalars=cls.group_scalars,
        check_groups=cls.check_groups,
        flags=cls.flags,
        flags_of=None if cls.flags_of is Optimizer.flags_of else cls.flags_of,
        update=cls.update if cls.is_rule() else None,
        rows_suffice=cls.rows_suffice,
        sparse=cls.sparse,
        instead_of_sparse=cls.instead_of_sparse,
        also_called=cls.also_called,
        complex_params=cls.complex_params,
        whole_tensors=cls.whole_tensors,
        has_modes=cls.has_modes,
        eval_slots=cls.eval_slots,
        derived_state=cls.derived_state,
        step_options=frozenset(cls.supported_step_options()),
        refused_options=cls.refused_options,
        own_options=frozenset(_own_options(cls)),
        constructor={p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty},
        later_options=frozenset(
            p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not inspect.Parameter.empty
        ),
    )


def _scalars(cls: type[Optimizer]) -> tuple[Scalar, ...]:
    """Return the numbers that a class keeps for each parameter: its own, and if it counts no steps a count of ours."""
    counts = any(scalar.name == STEP.name for scalar in cls.scalars) or not (cls.is_rule() or cls.prepares_params)
    return cls.scalars if counts else (*cls.scalars, ROUNDING_STEP)


def _own_options(cls: type[Optimizer]) -> set[str]:
    """Return the hyperparameters of a custom step that are called like an option which it does not take.

    They are its own if the constructor that calls ours names them.
    """
    ours = cls.__mro__[: cls.__mro__.index(Optimizer)]
    constructors = [vars(base)["__init__"] for base in ours if "__init__" in vars(base)]
    named = inspect.signature(constructors[-1]).parameters if constructors else {}
    return set(named) & set(StepOptions.__annotations__) - cls.supported_step_options()


Optimizer.spec = _spec_of(Optimizer)


def _is_profiled() -> bool:
    """Return whether somebody asks how long things take."""
    return bool(profiler._is_profiler_enabled or torch._C._autograd._profiler_enabled())


def _profiled(name: str) -> AbstractContextManager[Any]:
    """Return a range of the profiler, where there is one; compilers of some releases cannot ask for it."""
    asked = not torch.compiler.is_compiling() and _is_profiled()
    return torch.autograd.profiler.record_function(name) if asked else _NO_CONTEXT


_NO_CONTEXT: AbstractContextManager[None] = nullcontext()


def with_hooks(step: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a `step` in its profiler range and in the global and the optimizer's own hooks, in torch's order."""
    if getattr(step, "hooked", False):
        return step

    is_whole = getattr(step, "is_whole", False)

    @functools.wraps(step)
    def hooked_step(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        context = self._stepping.context
        plain = is_whole and not args and not kwargs and not context.inside
        tried = plain and not self._is_observed() and self._may_take_fast_lane()
        if tried and self._try_fast_step():
            return None
        if context.inside:  # the hooks of a step that calls its base's have been run
            return step(self, *args, **kwargs)
        if not (self._stepping.constructed or is_whole):
            return _with_own_hooks(self, step, args, kwargs)
        with _profiled(f"Optimizer.step#{type(self).__name__}.step"):
            pre = chain(torch_hooks._global_optimizer_pre_hooks.values(), self._hooks("step_pre"))
            positional: tuple[Any, ...] = (self, *args)
            for hook in pre:
                positional, kwargs = _new_arguments(hook(self, positional, kwargs), positional, kwargs)
            self._begin_step(positional[1:], kwargs)
            context.fast_lane_declined = tried
            with context, self._on_host(wait=False):
                result = step(*positional, **kwargs)
                metrics = self._finish_step()
            try:
                if metrics is not None:
                    self.telemetry.record(metrics)
                self._optimizer_step_code()
                for hook in (*self._hooks("step_post"), *torch_hooks._global_optimizer_post_hooks.values()):
                    hook(self, positional, kwargs)
            finally:
                if self._stepping.options.zero_grad_after_step:
                    self.zero_grad()
        return result

    hooked: Callable[..., Any] = functools.wraps(step)(opaque(hooked_step))
    hooked.hooked = True  # type: ignore[attr-defined]
    return hooked


def _with_own_hooks(
    optimizer: Optimizer, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Make the step of one that has not called our constructor, such as a wrapper: only what was registered is ours."""
    positional: tuple[Any, ...] = (optimizer, *args)
    for hook in optimizer._hooks("step_pre"):
        positional, kwargs = _new_arguments(hook(optimizer, positional, kwargs), positional, kwargs)
    result = step(*positional, **kwargs)
    for hook in optimizer._hooks("step_post"):
        hook(optimizer, positional, kwargs)
    return result


def _numbers(groups: Iterable[Mapping[str, Any]]) -> dict[Tensor, int]:
    """Return the running number of each parameter, as torch counts.

    One that stands in a group twice has the last of its numbers, one that stands in several groups that of the first.
    """
    numbers: dict[Tensor, int] = {}
    start = 0
    for group in groups:
        known = set(numbers)
        numbers |= {param: start + i for i, param in enumerate(group["params"]) if param not in known}
        start += len(group["params"])
    return numbers


def _put_back(param: Tensor, value: Tensor) -> bool:
    """Return a parameter the value that it had, in place if it still fits; tell whether that could be done."""
    try:
        with torch.no_grad():
            if param.shape == value.shape and param.is_meta == value.is_meta:
                param.copy_(value)
            else:
                param.data = value
    except RuntimeError:
        return False
    return True


def _new_arguments(
    result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if result is None:
        return args, kwargs
    if isinstance(result, tuple) and len(result) == 2:  # noqa: PLR2004 (args and kwargs)
        return result
    raise RuntimeError(f"a step pre-hook must return None or a tuple of (new_args, new_kwargs), but got {result}.")


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _params_and_names(group: Mapping[str, Any]) -> dict[str, Any]:
    """Split what stands under `params` into tensors and, if given, names."""
    if "params" not in group:
        raise ValueError(f"a param group needs a key `params`, but has only: {', '.join(map(str, group)) or 'nothing'}")
    params = group["params"]
    if isinstance(params, set | frozenset):
        raise TypeError(
            "optimizer parameters need to be organized in ordered collections, but the ordering of tensors in sets "
            "will change between runs. Please use a list instead."
        )
    entries = [params] if isinstance(params, Tensor) else list(params)
    names = [entry[0] for entry in entries if isinstance(entry, tuple)]
    if not names:
        return {"params": entries}
    if len(names) != len(entries):
        raise ValueError("all optimizer params should be with/without names. Some param names are missing")
    return {"params": [entry[1] for entry in entries], "param_names": names}
