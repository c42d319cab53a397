"""The optimizer on the CPU while the model is on a device: parameters of the host that stand for those of the device.

Each parameter has a copy on the host, which is stepped in its place, beside its state.  Its gradient is copied over
while `backward` runs and leaves a placeholder in `param.grad`; what a step has written is copied back while later
buckets compute.  To the pipeline the copies are parameters like any other, in groups that mirror the optimizer's.  A
`Link` does all copying.
"""

import functools
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, Self

import torch
from torch import Tensor, nn

from surefoot.distributed import refuse_divided_by_module
from surefoot.dynamo import opaque
from surefoot.locks import Lock
from surefoot.state.check import format_param
from surefoot.step.mirrors import Groups, MirroredGroups
from surefoot.tensors import links
from surefoot.tensors.fit import unfit_param
from surefoot.tensors.memory import fingerprint, is_dense, is_plain, shared_memory, version
from surefoot.tensors.offloaded import OffloadedGradient, offloaded_gradient, put_gradient
from surefoot.tensors.shards import is_sharded

BUCKET_BYTES = 32 << 20
"""Bytes of weights that are stepped and sent together unless another size is asked for."""
_ALIGNMENT = 64


@dataclass(eq=False, slots=True)
class _Bucket:
    """Memory of the host for parameters that are stepped and sent together.

    Attributes:
        number: its number.
        link: the way to their device.
        kind: their device and dtype.
        size: bytes of the parameters that are in it.
        memory: memory for their weights, for gradients, and for gradients that are to be added, once that is needed.
    """

    number: int
    link: links.Link
    kind: tuple[torch.device, torch.dtype]
    size: int = 0
    memory: dict[str, Tensor] = field(default_factory=dict)

    def view(self, use: str, offset: int, like: Tensor) -> Tensor:
        """Return the memory for one use at an offset, as a tensor with the shape, and order of elements, of another."""
        if use not in self.memory:
            self.memory[use] = self.link.host_memory(self.size)
        strides = like.stride() if is_dense(like) else torch.empty_like(like, device="meta").contiguous().stride()
        flat = torch.empty(0, dtype=like.dtype)
        return flat.set_(self.memory[use].untyped_storage(), offset // like.element_size(), like.shape, strides)


def _nothing() -> None:
    """Return None."""


@dataclass(eq=False, slots=True, weakref_slot=True)
class _Member:
    """A parameter of the device and what stands for it on the host.

    Attributes:
        param: the parameter.
        bucket: where its memory on the host is.
        offset: where in that.
        host: its copy, in the same dtype, which is stepped.
        placeholder: what stands in the place of its gradient.
        grad: memory for its gradient.
        addend: the same for another that is to be added.
        has_addend: whether `addend` is still to be added to `grad`.
        accumulates: whether the next gradient is to be added to the one that is there, None before it is about to come.
        comes: whether what is accumulated is a gradient; a function's backward may have given None.
        late: the gradient on the device that is to be added to the one on the host, until that has been done.
        fetched: the last copy to the host.
        sent: the last copy to the device.
        param_version: version and address of the parameter when the two were last alike.
        host_version: the version of `host` then.
        hooks: handles of its hooks.
        node: what accumulates its gradients, and lives only as long as somebody holds it.
    """

    param: Tensor
    bucket: _Bucket
    offset: int
    host: Tensor
    placeholder: Tensor
    grad: Tensor | None = None
    addend: Tensor | None = None
    has_addend: bool = False
    accumulates: bool | None = None
    comes: bool = True
    late: Callable[[], Tensor | None] = _nothing
    fetched: Any = None
    sent: Any = None
    param_version: tuple[int, int] | None = None
    host_version: int = 0
    hooks: list[Any] = field(default_factory=list)
    node: Any = None

    def fits(self) -> bool:
        """Return whether the parameter is still such that the copy can stand for it."""
        param, host = self.param, self.host
        same_order = param.stride() == host.stride() or not is_dense(param)
        return (param.device, param.dtype) == self.bucket.kind and param.shape == host.shape and same_order

    def wait(self) -> None:
        """Wait for copies of its memory, and add a gradient that has come."""
        link = self.bucket.link
        if self.fetched is not None:
            link.wait(self.fetched)
        if self.sent is not None:
            link.wait(self.sent)
        self.fetched = self.sent = None
        if self.has_addend and self.grad is not None and self.addend is not None:
            self.grad.add_(self.addend)
            self.has_addend = False

    def fetch_weights(self) -> None:
        """Copy the parameter, which somebody else has written, to the host."""
        self.wait()
        link = self.bucket.link
        link.wait(link.fetch(self.param.detach(), self.host))
        self.mark_alike()

    def send_weights(self) -> None:
        """Copy the host's weights to the parameter if they were stepped."""
        if version(self.host) != self.host_version:
            self.sent = self.bucket.link.send(self.host, self.param.detach())
            self.mark_alike()

    def mark_alike(self) -> None:
        """Remember that parameter and copy are alike now."""
        self.param_version, self.host_version = (version(self.param), self.param.data_ptr()), version(self.host)

    def fetch_grad(self, grad: Tensor) -> None:
        """Copy a gradient to the host, to be added to the one that is there if `accumulates`."""
        if self.accumulates and self.has_addend:
            self.wait()
        if self.accumulates:
            self.addend = self.bucket.view("addend", self.offset, grad) if self.addend is None else self.addend
        elif self.grad is None or self.grad.stride() != grad.stride():
            self.grad = self.bucket.view("grad", self.offset, grad)
        target = self.addend if self.accumulates else self.grad
        self.fetched = self.bucket.link.fetch(grad, target)  # type: ignore[arg-type]
        self.has_addend, self.accumulates = bool(self.accumulates), None

    def release(self) -> None:
        """Step the parameter on its device again, by the gradient that it has."""
        for hook in self.hooks:
            hook.remove()
        self.hooks = []
        self.return_grad()

    def has_late(self) -> bool:
        """Return whether the parameter has a gradient that is still to be added to the one on the host."""
        grad = self.param.grad
        return grad is not None and grad is self.late()

    def return_grad(self) -> None:
        """Let the parameter have its gradient itself."""
        late = self.param.grad if self.has_late() else None
        if late is not None or self.param.grad is self.placeholder:
            whole = self.device_grad()
            put_gradient(self.param, whole if late is None else whole + late)

    def device_grad(self) -> Tensor:
        """Return a copy, on the device, of the gradient that is on the host, of which there is a placeholder."""
        self.wait()
        return self.grad.to(self.bucket.kind[0], copy=True)  # type: ignore[union-attr]


class OffloadedOptimizer:
    """The handle of `Optimizer.offload`; also a context manager, which calls `remove` at its end.

    Attributes:
        bucket_bytes: bytes of weights that are stepped and sent together.
    """

    def __init__(self, model: nn.Module, groups: Groups, bring_back: Callable[[], None], *, bucket_bytes: int) -> None:
        # A method of the optimizer, which must not live on because of this.
        self.bucket_bytes, self._bring_back = bucket_bytes, weakref.WeakMethod(bring_back)
        self._lock = Lock()
        self._active, self._inside, self._arrivals = True, False, 0
        self._links: dict[torch.device, links.Link] = {}
        self._members: dict[Tensor, _Member] = {}
        self._of_host: dict[Tensor, _Member] = {}
        self._buckets: list[_Bucket] = []
        self._order: dict[int, int] = {}
        self._fingerprints: dict[torch.device, tuple[list[_Member], Tensor]] = {}
        self._mirrors = MirroredGroups()
        self._state: defaultdict[Any, Any] = defaultdict(dict)
        _refuse(model, groups)

    @property
    def active(self) -> bool:
        """Whether the optimizer is on the CPU: until `remove` is called, or it is gone."""
        return self._active and self._bring_back() is not None

    @property
    def inside(self) -> bool:
        """Whether the optimizer's groups are those of the host, between `enter` and `leave`."""
        return self._inside

    def remove(self) -> None:
        """Step parameters where they are again, with gradients and state there.  Calling it again does nothing."""
        if not self._active:
            return
        self._active = False
        for member in self._members.values():
            member.release()
        self._members.clear()
        self._of_host.clear()
        self._buckets.clear()
        self._fingerprints.clear()
        if (bring_back := self._bring_back()) is not None:
            bring_back()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __del__(self) -> None:
        """Drop gradients that nobody can step by any more, and to whose placeholders torch could not add."""
        for member in self._members.values():
            if member.param.grad is member.placeholder:
                member.param.grad = None

    # Groups and state of the host

    def enter(self, groups: Groups, state: Mapping[Any, Any]) -> tuple[Groups, defaultdict[Any, Any]]:
        """Return groups and state of the host, as the optimizer's are now.

        Weights that somebody has written have come over; gradients may be on their way, until `wait`.
        """
        with self._lock:
            _refuse_options(groups)
            self._follow_params(groups)
            self._follow_weights()
            for param, member in self._members.items():
                _share(state, param, self._state, member.host)
                self._follow_grad(member)
            for key in state.keys() - self._members.keys():
                _share(state, key, self._state, key)
            for key in self._state.keys() - self._of_host.keys() - (state.keys() - self._members.keys()):
                del self._state[key]
            self._inside = True
        return self._mirrors.groups, self._state

    def leave(self, groups: Groups, state: defaultdict[Any, Any]) -> None:
        """Let the optimizer's groups and state be what those of the host have become, and send what was written.

        What is interrupted while it is sent is sent the next time.
        """
        try:
            self.send(self._of_host)
            for link in self._links.values():
                link.join()
            self._take_fingerprints()
        finally:
            self._leave(groups, state)

    def _leave(self, groups: Groups, state: defaultdict[Any, Any]) -> None:
        self._mirrors.copy_options_to(groups)
        for key in [*self._state]:
            member = self._of_host.get(key)
            _share(self._state, key, state, key if member is None else member.param)
        for member in self._of_host.values():
            if member.host not in self._state:
                state.pop(member.param, None)
        self._inside = False

    def device_view(self, groups: Groups, state: Mapping[Any, Any]) -> tuple[Groups, defaultdict[Any, Any]]:
        """Return groups and state with the device's parameters in the place of the host's."""
        found = [{**group, "params": [self._device_param(host) for host in group["params"]]} for group in groups]
        return found, defaultdict(dict, {self._device_param(key): entry for key, entry in state.items()})

    def host_param(self, param: Tensor) -> Tensor:
        """Return what stands for a parameter beside its state, with the values of now."""
        member = self._members.get(param)
        if member is None:
            return param
        member.fetch_weights()
        return member.host

    def _device_param(self, key: Any) -> Any:
        member = self._of_host.get(key) if isinstance(key, Tensor) else None
        return key if member is None else member.param

    def _follow_params(self, groups: Groups) -> None:
        """Have a copy of each parameter that can get a gradient; others stand for themselves."""
        now = {param: group for group in groups for param in group["params"]}
        gone = [param for param, member in self._members.items() if param not in now or not member.fits()]
        known = self._members.keys() - gone
        if new := [p for p in now if p not in known and (p.requires_grad or p.grad is not None)]:
            _refuse_params(now)
        for param in gone:
            member = self._members.pop(param)
            member.release()
            del self._of_host[member.host]
            self._state.pop(member.host, None)
        self._forget_fingerprints(gone)
        self._add(new)
        for member in self._members.values():
            if not member.hooks and member.param.requires_grad and member.param.is_leaf:
                self._hook(member)
        self._mirrors.follow(groups, {n: [*enumerate(map(self._host, g["params"]))] for n, g in enumerate(groups)})

    def _host(self, param: Tensor) -> Tensor:
        member = self._members.get(param)
        return param if member is None else member.host

    def _add(self, params: Iterable[Tensor]) -> None:
        """Make copies of parameters, in buckets of their own."""
        first = len(self._buckets)
        placed = []
        for param in params:
            size = -(-param.numel() * param.element_size() // _ALIGNMENT) * _ALIGNMENT
            bucket = self._filling(first, (param.device, param.dtype), size)
            placed.append((param, bucket, bucket.size))
            bucket.size += size
        for param, bucket, offset in placed:
            host = bucket.view("weights", offset, param.detach())
            placeholder = offloaded_gradient(param)
            member = _Member(param, bucket, offset, host, placeholder)
            placeholder.on_device = functools.partial(_device_grad, weakref.ref(member))
            self._members[param] = self._of_host[host] = member

    def _filling(self, first: int, kind: tuple[torch.device, torch.dtype], size: int) -> _Bucket:
        """Return a bucket, of those from a number on, that has room for a parameter."""
        for bucket in self._buckets[first:]:
            if bucket.kind == kind and bucket.size + size <= self.bucket_bytes:
                return bucket
        device = kind[0]
        link = self._links[device] = self._links.get(device) or links.make_link(device)
        self._buckets.append(_Bucket(len(self._buckets), link, kind))
        return self._buckets[-1]

    # Gradients

    def _hook(self, member: _Member) -> None:
        """Let a parameter tell when a gradient is about to be accumulated, and when it has been."""
        own = weakref.ref(self)
        member.hooks = [
            member.param.register_post_accumulate_grad_hook(functools.partial(hook, own))  # type: ignore[no-untyped-call]
            for hook in (_accumulated, _arrived)
        ]
        _call_first(member.hooks[0])  # others may raise
        self._hook_node(member)

    def _hook_node(self, member: _Member) -> None:
        """Let what accumulates the gradients of a parameter now tell when one is about to be."""
        before_accumulation = functools.partial(_before_accumulation, weakref.ref(self), weakref.ref(member.param))
        with torch.enable_grad():
            member.node = member.param.view_as(member.param).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
        member.hooks[2:] = [member.node.register_prehook(before_accumulation)]

    def _before_accumulation(self, param: Tensor, grad: Tensor | None) -> None:
        """Make room for a gradient on the device; note whether there is one on the host to which it is to be added."""
        member = self._members.get(param)
        if member is not None:
            member.comes = grad is not None
            if grad is None:  # what is there stays as it is
                return
            if not (member.fits() and self.active):
                member.return_grad()
            self._add_late(member)
            member.accumulates = param.grad is member.placeholder
            if member.accumulates:
                param.grad = None

    def _accumulated(self, param: Tensor) -> None:
        """Note a gradient that is to be added to the one on the host, in case that the next hook raises."""
        member = self._members.get(param)
        if member is not None and member.comes and member.accumulates:
            member.late = weakref.ref(param.grad)

    def _add_late(self, member: _Member) -> None:
        """Add what a hook that raised has kept from us."""
        if member.has_late():
            member.accumulates = True
            self._arrived(member.param)

    def _arrived(self, param: Tensor) -> None:
        """Copy a gradient to the host and leave its placeholder."""
        member, grad = self._members.get(param), param.grad
        if member is None or grad is None or not member.fits():
            return
        if not member.comes:
            member.comes = True
            return
        if member.accumulates is None:  # the parameter was of another dtype or device in between
            self._hook_node(member)
        if grad.__class__ is OffloadedGradient:
            raise RuntimeError(f"a gradient of a parameter of shape {tuple(param.shape)} {_TAKEN}")
        if not is_plain(grad) or grad.requires_grad or grad.dtype is not param.dtype:  # left to the step
            if member.accumulates:
                raise RuntimeError(
                    f"a gradient of a parameter of shape {tuple(param.shape)} is sparse, of another dtype, or has a "
                    f"graph (create_graph=True), and cannot be added to one that is in the CPU's memory; call "
                    f"zero_grad() before such backward passes"
                )
            return
        with self._lock, torch.no_grad():
            member.fetch_grad(grad)
            param.grad, member.late = member.placeholder, _nothing
            self._arrivals += 1
            self._order[member.bucket.number] = self._arrivals

    def _follow_grad(self, member: _Member) -> None:
        """Let the copy have the gradient that the parameter has now."""
        self._add_late(member)
        grad, found = member.param.grad, member.grad
        if grad is None:
            found = None
        elif grad is not member.placeholder:
            if grad.__class__ is OffloadedGradient:
                raise RuntimeError(f"the gradient of a parameter of shape {tuple(member.param.shape)} {_TAKEN}")
            if grad.layout is torch.strided and grad.dtype is member.param.dtype:
                member.accumulates = False
                member.fetch_grad(grad.detach())
                found = member.grad
            else:
                found = grad.detach().to("cpu")
                if found.dtype is not member.host.dtype:
                    member.host.grad_dtype = None  # any; the parameter has been told of such gradients
        if member.host.grad is not found:
            member.host.grad = found

    def zero(self, param: Tensor) -> bool:
        """Fill a gradient with zeros if it is on the host; return whether it is."""
        member = self._members.get(param)
        if member is None:
            return False
        self._add_late(member)
        is_here = param.grad is member.placeholder
        if is_here:
            member.wait()
            member.grad.zero_()  # type: ignore[union-attr]
        return is_here

    def refuse_scaler(self) -> NoReturn:
        """Raise RuntimeError: a GradScaler has to do with the step."""
        raise RuntimeError(
            "a GradScaler looks at gradients on the device, and those of an offloaded optimizer are in the CPU's "
            "memory; train in bfloat16, or scale the loss by a constant, set `optimizer.grad_scale` to it and pass "
            'nonfinite="skip"'
        )

    # Weights

    def _follow_weights(self) -> None:
        """Fetch weights that somebody has written; those written through `.data` are told by fingerprints."""
        behind = [m for m in self._members.values() if m.param_version != (version(m.param), m.param.data_ptr())]
        for members, known in self._fingerprints.values():
            changed = (_fingerprints(members) != known).cpu().tolist()
            behind += [member for member, new in zip(members, changed, strict=True) if new]
        for member in dict.fromkeys(behind):
            member.fetch_weights()
        if behind:
            self._fingerprints.clear()

    def _forget_fingerprints(self, gone: Sequence[Tensor]) -> None:
        """Forget the fingerprints of some parameters; those of the others are still to be compared."""
        for device, (members, prints) in [*self._fingerprints.items()] if gone else ():
            left = [number for number, member in enumerate(members) if member.param in self._members]
            self._fingerprints[device] = [members[number] for number in left], prints[left]
            if not left:
                del self._fingerprints[device]

    def _take_fingerprints(self) -> None:
        """Take fingerprints of weights, on their devices, unless there are some."""
        if self._fingerprints:
            return
        of_device: defaultdict[torch.device, list[_Member]] = defaultdict(list)
        for member in self._members.values():
            of_device[member.param.device].append(member)
        self._fingerprints = {device: (members, _fingerprints(members)) for device, members in of_device.items()}

    # What the pipeline asks

    def bucket(self, param: Tensor) -> int:
        """Return the number of the bucket in which a parameter of the host is stepped."""
        member = self._of_host.get(param)
        return -1 if member is None else member.bucket.number

    def order(self, param: Tensor) -> int:
        """Return a rank by which parameters are stepped, the smaller the earlier their gradients have come."""
        return self._order.get(self.bucket(param), 0)

    def wait(self, params: Iterable[Tensor] | None = None) -> None:
        """Wait until gradients of parameters of the host, of all by default, are there, and these may be written."""
        for host in self._of_host if params is None else params:
            if (member := self._of_host.get(host)) is not None:
                member.wait()

    def send(self, params: Iterable[Tensor]) -> None:
        """Copy weights of the host that were written to the device, while others are stepped."""
        with torch.no_grad():
            for host in params:
                if (member := self._of_host.get(host)) is not None and version(host) != member.host_version:
                    member.send_weights()
                    self._fingerprints.clear()


def _fingerprints(members: Sequence[_Member]) -> Tensor:
    return torch.stack([fingerprint(member.param.detach()) for member in members])


def _call_first(handle: Any) -> None:
    """Let a hook of a tensor be called before all others, which torch calls in the order of their keys in memory."""
    hooks = handle.hooks_dict_ref()
    for number in [each for each in hooks if each != handle.id]:
        hooks[number] = hooks.pop(number)


@opaque
def _before_accumulation(
    handle: "weakref.ref[OffloadedOptimizer]", param: "weakref.ref[Tensor]", grads: tuple[Tensor | None, ...]
) -> None:
    """Tell a handle that a gradient is about to be accumulated; a hook, which keeps no optimizer alive."""
    offloaded, coming = handle(), param()
    if offloaded is not None and coming is not None:
        offloaded._before_accumulation(coming, grads[0])


@opaque
def _accumulated(handle: "weakref.ref[OffloadedOptimizer]", param: Tensor) -> None:
    """Tell a handle that a gradient has been accumulated; the first hook, which keeps no optimizer alive."""
    if (offloaded := handle()) is not None and offloaded.active:
        offloaded._accumulated(param)


def _device_grad(member: "weakref.ref[_Member]") -> Tensor | None:
    """Return the gradient for which a placeholder stands, on its device; None if there is none any more."""
    known = member()
    return None if known is None or known.param.grad is not known.placeholder else known.device_grad()


@opaque
def _arrived(handle: "weakref.ref[OffloadedOptimizer]", param: Tensor) -> None:
    """Tell a handle that a parameter has a gradient; a hook, which keeps no optimizer alive."""
    if (offloaded := handle()) is not None and offloaded.active:
        offloaded._arrived(param)


def _share(source: Mapping[Any, Any], key: Any, target: dict[Any, Any], other: Any) -> None:
    """Let the entry of one state be that of another."""
    entry = source.get(key)
    if entry is None:
        target.pop(other, None)
    elif target.get(other) is not entry:
        target[other] = entry


# What is refused


def _refuse(model: nn.Module, groups: Groups) -> None:
    """Refuse what cannot be trained so.

    Raises:
        TypeError: the model is none, or divides the work over ranks in a way that gradients are whole too late.
        ValueError: no parameter is one of the model's, or an option does not go with it.
        RuntimeError: a parameter cannot have a copy.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"offload needs the model, a torch.nn.Module, but got {type(model).__name__}")
    refuse_divided_by_module(model)
    _refuse_options(groups)
    params = {param: group for group in groups for param in group["params"]}
    if params.keys().isdisjoint(model.parameters()):
        raise ValueError("no parameter of the optimizer is one of the model's; pass the model that it trains")
    _refuse_params(params)


def _refuse_options(groups: Groups) -> None:
    """Raise ValueError where an option wants parameters to be stepped where they are."""
    for group in groups:
        if asked := [name for name in ("capturable", "differentiable") if group.get(name)]:
            raise ValueError(
                f"{asked[0]}=True wants parameters to be stepped on their device, and the optimizer is offloaded to "
                f"the CPU; leave it out"
            )


def _refuse_params(params: Mapping[Tensor, Mapping[str, Any]]) -> None:
    """Raise RuntimeError where a parameter cannot have a copy on the host that is stepped in its place."""
    for param, group in params.items():
        if is_sharded(param):
            raise RuntimeError(
                f"{format_param(group, param)} is sharded; let FSDP2 keep it on the CPU: fully_shard(module, "
                f"offload_policy=CPUOffloadPolicy()), and step it there without `offload`"
            )
        reason = unfit_param(param)
        if reason is None and (param.is_meta or not is_plain(param)):
            reason = "has no memory that can be copied"
        if reason is not None:
            raise RuntimeError(f"{format_param(group, param)} {reason}")
    for found in _by_device(params):
        if (pair := shared_memory(found)) is not None:
            one, other = (format_param(params[found[index]], found[index]) for index in pair)
            raise RuntimeError(
                f"{one} and {other} share memory, of which each would have a copy; give the optimizer one of them, or "
                f"tie them by using one parameter twice"
            )


def _by_device(params: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    found: defaultdict[torch.device, list[Tensor]] = defaultdict(list)
    for param in params:
        found[param.device].append(param)
    yield from found.values()


_TAKEN = (
    "is in the CPU's memory already, where another optimizer that is offloaded has it; remove() the handle of that one "
    "(`Optimizer.offload`), and drop the gradients with zero_grad()"
)
