"""Gradients released as they come: parameters are stepped inside the backward pass, and their gradients dropped.

Parameters are put together in buckets, in the order in which gradients arrive, and a bucket is stepped when it is full.
To the pipeline each is a whole step: of groups that mirror the optimizer's and hold the bucket's parameters, with a
step cache.  `step` closes the iteration: it counts, and steps what has a gradient still.
"""

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, NoReturn, Self

import torch
from torch import Tensor, nn

from surefoot.distributed import refuse_divided_by_module
from surefoot.dynamo import opaque
from surefoot.locks import Lock
from surefoot.step.cache import StepCache
from surefoot.step.clipping import forget_norm, keep_norm, listed
from surefoot.step.context import StepContext
from surefoot.step.inputs import StepInput
from surefoot.step.mirrors import OF_PARAMS, Groups, MirroredGroups
from surefoot.step.options import ReleaseOptions, Stepping, check_changed
from surefoot.step.pipeline import finish_part, run_step
from surefoot.step.ranks import any_sharded
from surefoot.step.types import ParamSlice
from surefoot.tensors.backward import OUTSIDE, backward_pass, call_at_end_of_backward
from surefoot.tensors.guards import same_objects
from surefoot.tensors.modes import mode_is_active
from surefoot.tensors.shards import to_local

BUCKET_BYTES = 4 << 20
"""Bytes of gradients that are stepped together unless another size is asked for."""


@dataclass(eq=False, slots=True, weakref_slot=True)
class _Param:
    """A parameter whose gradient is released.

    Attributes:
        handle: what releases it, not held: the hook keeps no optimizer alive.
        param: the parameter.
        hook: the handle of its hook.
        group: the number of its group.
        index: its number in the group.
        bucket: where it is stepped, None before its first gradient.
        gradients: how many have come since the last `step`, where several make a whole one.
        arrived: whether its gradient has come whole since the last `step`.
    """

    handle: "weakref.ref[ReleasedGradients]"
    param: Tensor
    hook: Any = None
    group: int = 0
    index: int = 0
    bucket: "_Bucket | None" = None
    gradients: int = 0
    arrived: bool = False

    def arrive(self) -> None:
        """Take a gradient that has come, for the hook of the parameter.

        It runs once for each parameter, so that what is known of the bucket's first gradient is not asked again.
        """
        bucket = self.bucket
        if bucket is not None and bucket.awaited and not self.arrived and self.param.grad is not None:
            self.arrived, waiting = True, bucket.waiting
            waiting.append(self)
            if len(waiting) == bucket.awaited and (released := self.handle()) is not None:
                released._step_full(bucket)
        elif (released := self.handle()) is not None:
            released._arrive(self)

    def got_none(self) -> bool:
        """Return whether a function's backward has given None: there is no gradient, and no hook to have dropped it."""
        hooks: Any = getattr(self.param, "_post_accumulate_grad_hooks", None) or ()
        return self.param.grad is None and next(iter(hooks), None) == self.hook.id


def _hook(member: _Param) -> Callable[[Tensor], None]:
    """Return a hook that holds nothing: what it holds would never be freed if it has the parameter."""
    known = weakref.ref(member)

    def arrive(_: Tensor) -> None:
        if (found := known()) is not None:
            found.arrive()

    return arrive


@dataclass(eq=False, slots=True)
class _Bucket:
    """Parameters that are stepped together.

    Attributes:
        stepping: options of the optimizer; statistics and context of its own.
        device: where they are.
        members: the parameters.
        size: bytes of their gradients.
        waiting: those of them whose gradient waits, whole.
        awaited: how many have to wait until it is stepped, where nothing else is to be decided; else 0.
        filling: whether it takes further parameters.
        stepped: whether it has been stepped since the last `step`.
        mirrors: groups that hold the members only, made when they are needed.
        cache: what the last step has left.
        streams: of an accelerator, those on which gradients have arrived.
    """

    stepping: Stepping
    device: torch.device
    members: list[_Param] = field(default_factory=list)
    size: int = 0
    waiting: list[_Param] = field(default_factory=list)
    awaited: int = 0
    filling: bool = True
    stepped: bool = False
    mirrors: MirroredGroups | None = None
    cache: StepCache | None = None
    streams: set[Any] = field(default_factory=set)

    def add(self, member: _Param) -> None:
        """Take a parameter whose gradient has arrived."""
        member.bucket = self
        self.members.append(member)
        grad: Any = member.param.grad
        self.size += 0 if grad.is_sparse else to_local(grad).nbytes
        self.mirrors = self.cache = None

    def drop(self, member: _Param) -> None:
        """Let a parameter be stepped elsewhere."""
        member.bucket = None
        self.members.remove(member)
        self.mirrors = self.cache = None

    def close(self) -> None:
        """Let nothing wait any more."""
        self.waiting, self.awaited = [], 0
        self.streams.clear()

    def groups(self, groups: Groups) -> Groups:
        """Return groups that hold the members only, of an optimizer's groups."""
        if self.mirrors is None:
            params: defaultdict[int, list[tuple[int, Tensor]]] = defaultdict(list)
            for member in sorted(self.members, key=lambda member: (member.group, member.index)):
                params[member.group].append((member.index, member.param))
            self.mirrors = MirroredGroups()
            self.mirrors.follow(groups, params)
        return self.mirrors.groups


class ReleasedGradients:
    """The handle of `Optimizer.release_gradients`; also a context manager, which calls `remove` at its end.

    Attributes:
        micro_batches: how many gradients of a parameter are accumulated before it is stepped.
        bucket_bytes: bytes of gradients that are stepped together.
        options: what is done to gradients before the update.
    """

    def __init__(
        self,
        model: nn.Module,
        step_input: Callable[[], StepInput],
        options: ReleaseOptions,
        *,
        micro_batches: int,
        bucket_bytes: int,
    ) -> None:
        self.micro_batches, self.bucket_bytes, self.options = micro_batches, bucket_bytes, options
        self._model, self._find_step_input = model, weakref.WeakMethod(step_input)
        self._lock, self._members = Lock(), dict[Tensor, _Param]()
        self._active, self._accumulates = True, False
        self._params: list[Tensor] = []
        self._others: list[Any] = []
        self._group_options: list[Any] = []
        self._buckets: list[_Bucket] = []
        self._forget_iteration()
        step = step_input()
        refuse_release(step, model, options)
        self._follow(step)
        if not self._members:
            self._active = False
            raise ValueError(
                f"no parameter of {step.spec.name} that requires a gradient is one of the model's; pass the model that "
                f"the optimizer trains"
            )

    def _has_optimizer(self) -> bool:
        """Return whether there is still an optimizer; it is not kept alive from here."""
        return self._find_step_input() is not None

    def _step_input(self) -> StepInput:
        """Return all that a step of the optimizer is about."""
        found = self._find_step_input()
        if found is None:
            raise ReferenceError("the optimizer by which gradients were released is gone")
        return found()

    def _forget_iteration(self) -> None:
        self._open, self._backward, self._group_count = False, OUTSIDE, 0
        self._stepped: list[_Param] = []
        self._slices: list[ParamSlice] = []
        self._seconds = 0.0

    # What a user calls

    @property
    def active(self) -> bool:
        """Whether gradients are released: until `remove` is called, or the optimizer is gone."""
        return self._active and self._has_optimizer()

    def remove(self) -> None:
        """Release gradients no more; those that are there are left to `step`.  Calling it again does nothing."""
        with self._lock:
            self._active = False
            for member in self._members.values():
                member.hook.remove()
            self._members.clear()
            self._buckets.clear()
            self._forget_iteration()
            if self._has_optimizer():
                forget_norm(self._step_input().groups)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Let backward passes inside a `with` block add to the gradients only, for the next one outside to step."""
        before, self._accumulates = self._accumulates, True
        for bucket in self._buckets:
            bucket.awaited = 0
        try:
            yield
        finally:
            self._accumulates = before

    # Gradients that arrive

    @opaque
    def _arrive(self, member: _Param) -> None:
        """Take a gradient, and decide what is to become of it."""
        with self._lock:
            if not self.active or member.got_none():
                return
            if not self._open:
                self._begin()
                if member.param not in self._members:  # in no group any more
                    return
            if member.arrived:
                raise RuntimeError(
                    f"{self._name(member)} has got another gradient after it was stepped; call step() after each "
                    f"backward pass, one that has failed too, or accumulate: `with handle.accumulate():` around all "
                    f"backward passes but the last, or release_gradients(model, micro_batches=n), which steps at the "
                    f"n-th (now {self.micro_batches})"
                )
            self._refuse_unusable(member)
            if self._accumulates:
                return
            member.gradients += 1
            if member.gradients >= self.micro_batches:
                self._take(member)

    def _begin(self) -> None:
        """Begin an iteration: take over what was changed of groups since the last one."""
        self._open = True
        step = self._step_input()
        self._follow(step)
        options, self._group_count = _options(step.groups), len(step.groups)
        if not same_objects(self._group_options, options):
            self._group_options = options
            for mirrors in [bucket.mirrors for bucket in self._buckets if bucket.mirrors is not None]:
                mirrors.copy_options_from(step.groups)

    def _refuse_unusable(self, member: _Param) -> None:
        """Refuse a gradient that a parameter cannot be stepped by, before it changes anything."""
        grad = member.param.grad
        if grad is None:
            raise RuntimeError(
                f"the gradient of {self._name(member)} is gone before it was released; another hook has dropped it, "
                f"perhaps that of another optimizer: remove one of them"
            )
        if grad.requires_grad:
            raise RuntimeError(
                f"the gradient of {self._name(member)} has a graph (create_graph=True), which needs the parameter as "
                f"it was; remove() the handle of release_gradients for such steps"
            )

    def _take(self, member: _Param) -> None:
        """Let a whole gradient wait for its bucket, and step that if it is the last, or else at the pass's end."""
        bucket = member.bucket
        if bucket is not None and bucket.stepped:
            bucket.drop(member)
            bucket = None
        if bucket is None:
            bucket = self._filling(member.param.device)
            bucket.add(member)
        member.arrived = True
        bucket.waiting.append(member)
        if bucket.device.type == "cuda":
            bucket.streams.add(torch.cuda.current_stream(bucket.device))
        full = bucket.size >= self.bucket_bytes if bucket.filling else len(bucket.waiting) == len(bucket.members)
        if full and len(bucket.streams) <= 1:
            self._step(bucket)
            return
        if (current := backward_pass()) != self._backward:
            self._backward = current
            if current != OUTSIDE:
                call_at_end_of_backward(self._step_waiting)
        if self.micro_batches == 1 and not bucket.filling and bucket.device.type == "cpu":
            bucket.awaited = len(bucket.members)

    @opaque
    def _step_full(self, bucket: _Bucket) -> None:
        """Step a bucket for which nothing else is to be decided."""
        with self._lock:
            if bucket.waiting and self.active:  # no other thread has stepped it
                self._step(bucket)

    def _filling(self, device: torch.device) -> _Bucket:
        """Return the bucket that takes parameters of a device, which have none yet."""
        for bucket in self._buckets:
            if bucket.filling and bucket.device == device:
                return bucket
        options = self._step_input().stepping.options
        self._buckets.append(_Bucket(Stepping(options), device))
        return self._buckets[-1]

    @opaque
    def _step_waiting(self) -> None:
        """Step all that waits: the backward pass has come to its end, and streams have been waited for."""
        with self._lock:
            for bucket in [each for each in self._buckets if each.waiting and self.active]:
                if len(bucket.streams) > 1:
                    _keep_for_this_stream(member.param.grad for member in bucket.waiting)
                self._step(bucket)

    @torch.no_grad()
    def _step(self, bucket: _Bucket) -> None:
        """Step the members of a bucket whose gradients are whole, and drop these."""
        begun = perf_counter()
        bucket.filling, bucket.awaited = False, 0
        for member in bucket.waiting:
            if (grad := member.param.grad) is None or grad.requires_grad:
                self._refuse_unusable(member)
        if len(bucket.waiting) < len(bucket.members):
            for member in [each for each in bucket.members if not each.arrived and each.param.grad is not None]:
                bucket.drop(member)  # it waits for more
        whole = self._step_input()
        step = whole._replace(groups=bucket.groups(whole.groups), stepping=bucket.stepping, whole=whole)
        step.stepping.context.wants_metrics = _is_measured(whole)
        cache, bucket.cache = bucket.cache, None
        bucket.cache, slices = run_part(step, cache)
        self._slices += slices
        for member in bucket.waiting:
            member.param.grad = None
        self._stepped += bucket.waiting
        bucket.close()
        bucket.stepped = True
        self._seconds += perf_counter() - begun

    # The calls of the training loop

    def before_step(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Refuse a `step` that cannot close the iteration.

        Raises:
            RuntimeError: there is a closure, or a GradScaler, or options were changed after parameters were stepped, or
                these have been given gradients again.
        """
        if any(value is not None for value in (*args, *kwargs.values())):
            raise RuntimeError(
                "step() was given a closure, but gradients are released while backward runs, so that a closure that is "
                "called again would step again; call backward before step(), or remove() the handle of "
                "release_gradients"
            )
        step = self._step_input()
        if step.found_inf is not None:
            self.refuse_scaler()
        self._refuse_changed(step)
        if again := [member for member in self._stepped if member.param.grad is not None]:
            raise RuntimeError(
                f"{self._name(again[0])} was given a gradient after it was stepped; set it to None, or give it before "
                f"backward"
            )

    def _refuse_changed(self, step: StepInput) -> None:
        """Refuse options that need all gradients at once, or that were changed after parameters were stepped."""
        refuse_options(step)
        known = step.groups[: self._group_count]  # one that was added since steps with what has a gradient still
        if self._stepped and not same_objects(self._group_options, _options(known)):
            raise RuntimeError(
                f"options of param groups were changed after backward has stepped {len(self._stepped)} parameters by "
                f"those before; change them before backward or after step()"
            )

    def refuse_scaler(self) -> NoReturn:
        """Raise RuntimeError: a GradScaler has to do with the step."""
        raise RuntimeError(
            "a GradScaler leaves out whole steps whose gradients hold inf, but gradients that are released have been "
            "used, scaled as they were, before it can look at them; train in bfloat16, or scale the loss by a constant "
            "and set `optimizer.grad_scale` to it, or remove() the handle of release_gradients"
        )

    def try_close(self) -> bool:
        """Close an iteration after which nothing is left to be done; return whether it is such a one.

        Raises:
            RuntimeError: see `before_step`.
        """
        step = self._step_input()
        stepping = step.stepping
        if not self._stepped or self.options.measures or stepping.options.requested() or not step.has_no_gradients():
            return False
        with stepping.context.lock:
            self._refuse_changed(step)
            stepping.statistics.steps += 1
            self.abandon()
        return True

    def after_step(self, context: StepContext) -> None:
        """Close the iteration, keep the norm of its gradients, and let telemetry have what was measured in it."""
        with self._lock:
            if self._slices:
                rank = {param: number for number, param in enumerate(self._params)}
                slices = [*context.slices, *self._slices]
                context.slices = sorted(slices, key=lambda part: rank.get(part.params[0], len(rank)))
                context.start -= self._seconds
            if self.options.max_previous_grad_norm is not None:
                keep_norm(self._step_input(), context.slices)
            self.abandon()

    def before_zero_grad(self) -> None:
        """Refuse to drop gradients that parameters were stepped by already; forget those that wait.

        Raises:
            RuntimeError: parameters have been stepped since the last `step`.
        """
        self.refuse_open("zero_grad()")
        self.abandon()

    def refuse_open(self, call: str) -> None:
        """Raise RuntimeError where some parameters have been stepped, and the iteration is not closed yet."""
        if count := len(self._stepped):
            raise RuntimeError(
                f"{call} was called after backward has stepped {count} of {len(self._members)} parameters and before "
                f"step(); their gradients are gone. Call step() first, or remove() the handle of release_gradients "
                f"for backward passes whose gradients are not to be used"
            )

    def abandon(self) -> None:
        """Begin anew with the next gradient."""
        with self._lock:
            for member in self._members.values() if self.micro_batches > 1 else ():
                member.gradients = 0
            for bucket in self._buckets:
                self._stepped += bucket.waiting
                bucket.close()
                bucket.stepped = False
            for member in self._stepped:
                member.arrived = False
            self._forget_iteration()

    # Groups

    def _follow(self, step: StepInput) -> None:
        """Take over which parameters there are; if others than before, buckets are made anew."""
        params, others = _structure(step.groups)
        if same_objects(self._params, params) and self._others == others:
            return
        ours, members = set(self._model.parameters()), dict[Tensor, _Param]()
        for number, group in enumerate(step.groups):
            for index, param in enumerate(group["params"]):
                if param not in ours or not (param.requires_grad and param.is_leaf):
                    continue
                member = self._members.pop(param, None)
                if member is None:
                    member = _Param(weakref.ref(self), param)
                    member.hook = param.register_post_accumulate_grad_hook(_hook(member))
                member.group, member.index, member.bucket = number, index, None
                members[param] = member
        for gone in self._members.values():
            gone.hook.remove()
        self._members, self._params, self._others = members, params, others
        self._group_options, self._buckets = _options(step.groups), []

    def _name(self, member: _Param) -> str:
        return listed([self._step_input().names()[member.param]])


def run_part(step: StepInput, cache: StepCache | None) -> tuple[StepCache | None, list[ParamSlice]]:
    """Step the parameters in the groups of `step`, a part of an optimizer's, that have a gradient.

    Args:
        step: the step.
        cache: what the last step of the same has left.

    Returns:
        What the next step of the same may use again, and what telemetry is to get of the parameters.
    """
    cache = None if cache is None else cache.of_now()
    fast: Any = None if cache is None or step.grad_scale is not None or mode_is_active() else cache.fast
    if fast and fast.run(step.groups, step.state, step.coefficients, lambda: step):
        return cache, []
    refuse_options(step)
    check_changed(step.stepping, step.spec, step.groups)
    context, measured = step.stepping.context, step.stepping.context.wants_metrics
    context.begin()
    context.wants_metrics = measured
    with context:
        cache = run_step(step, cache)
        return cache, finish_part(step)


def refuse_options(step: StepInput) -> None:
    """Refuse options that need all gradients at once.

    Raises:
        ValueError: an option is set; the message says which.
    """
    if any(map(step.is_clipped_at_once, step.groups)):
        raise ValueError(
            "`max_grad_norm` needs the norm of all gradients before the first parameter is stepped, and released "
            "gradients are never there all at once; leave it out (LAMB: max_grad_norm=None), and pass to "
            "release_gradients `max_previous_grad_norm`, which clips by the norm of the step before, or "
            "`max_param_grad_norm`, which clips each parameter by itself; `max_grad_value` needs no norm"
        )
    if (nonfinite := step.stepping.options.nonfinite) != "ignore":
        raise ValueError(
            f"nonfinite={nonfinite!r} looks at all gradients before the first parameter is stepped, and released "
            f"gradients are never there all at once, so that no whole step can be left out; leave it out, and pass "
            f"`nonfinite_params={nonfinite!r}` to release_gradients, which decides for each parameter by itself"
        )
    if any(group.get("differentiable") for group in step.groups):
        raise ValueError("differentiable=True keeps the graph of a step, which released gradients are no part of")


def refuse_release(step: StepInput, model: nn.Module, options: ReleaseOptions) -> None:
    """Refuse what cannot be trained with released gradients.

    Raises:
        TypeError: the model is none, or divides the work over ranks in a way that gradients are whole too late.
        ValueError: an option needs all gradients at once.
        RuntimeError: a parameter stands twice in the groups, or ranks need sums over shards in the backward pass.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"release_gradients needs the model, a torch.nn.Module, but got {type(model).__name__}")
    refuse_divided_by_module(model)
    refuse_options(step)
    params = step.params()
    if len(params) != len(set(params)):
        raise RuntimeError(
            "a parameter stands in the groups twice, and its gradient would be dropped after its first step; leave it "
            "out of one of them"
        )
    if any(stage.totals for _, stages in step.stages() for stage in stages):
        raise RuntimeError(
            f"{step.spec.name} sums over all parameters before the first is stepped, and released gradients are never "
            f"there all at once; take an algorithm that steps each parameter by itself, AdamW for instance"
        )
    if any_sharded(step.whole_params()):
        raise RuntimeError(
            f"{step.spec.name} needs to know more of a tensor than a shard, so that ranks would have to wait for one "
            f"another inside of the backward pass; take an elementwise optimizer, AdamW for instance"
        )
    if any_sharded(params) and (asked := options.of_whole_params()):
        raise RuntimeError(
            f"`{asked}` looks at the whole gradient of a parameter, of which a rank has a shard, so that ranks would "
            f"have to wait for one another inside of the backward pass; leave it out"
        )


def _structure(groups: Iterable[Mapping[str, Any]]) -> tuple[list[Tensor], list[Any]]:
    """Return the parameters, and what else decides which of them are released, for comparison."""
    params: list[Tensor] = []
    others: list[Any] = []
    for group in groups:
        own, names = group["params"], group.get("param_names")
        params += own
        others += (len(own), names and [*names])
    return params, others + [param.requires_grad for param in params]


def _options(groups: Iterable[Mapping[str, Any]]) -> list[Any]:
    """Return the names and values of all options."""
    found: list[Any] = []
    for group in groups:
        found += (item for pair in group.items() if pair[0] not in OF_PARAMS for item in pair)
    return found


def _is_measured(step: StepInput) -> bool:
    """Return whether telemetry is to get something of the iteration that the next `step` closes."""
    telemetry = step.stepping.options.telemetry
    return telemetry is not None and telemetry.wanted(step.stepping.statistics.steps + 1)


def _keep_for_this_stream(grads: Iterable[Any]) -> None:
    """Let the memory of gradients that other streams have made be used again only after what runs on this one."""
    for grad in grads:
        grad.record_stream(torch.cuda.current_stream(grad.device))
