"""Every private name of torch that is used, in one table: what for, and what happens without it.

A test holds the table against the code.
"""

import importlib
from typing import Any, NamedTuple

import torch

from surefoot.tensors.native.layout import stable_functions


class PrivateName(NamedTuple):
    """A private name of torch.

    Attributes:
        name: where it is.
        room: the module that uses it.
        used_for: what for.
        without: what happens in a release of torch that has it no more.
    """

    name: str
    room: str
    used_for: str
    without: str


_PLAIN_GUARDS = "plain guards serve: as right, slower"
_CONTRACT = "part of the contract of torch.optim.Optimizer, which torch's own tools rely on"

PRIVATE_NAMES: tuple[PrivateName, ...] = (
    *(
        PrivateName(name, "tensors.native.layout", "finding where torch keeps tensors in memory", _PLAIN_GUARDS)
        for name in (
            "Tensor._cdata",
            "UntypedStorage._cdata",
            "Tensor._version",
            "Tensor._lazy_clone",
            "torch._C._dispatch_keys",
            "torch._efficientzerotensor",
            "torch._neg_view",
            "aoti_torch_*",
        )
    ),
    *(
        PrivateName(name, "tensors.modes", "seeing that a mode or transform must see operations", "import fails")
        for name in (
            "torch._C._len_torch_dispatch_stack",
            "torch._C._len_torch_function_stack",
            "torch._C._functorch.peek_interpreter_stack",
            "torch._C._functorch.is_functorch_wrapped_tensor",
            "torch._is_functional_tensor",
            "torch.overrides._get_current_function_mode_stack",
            "torch._subclasses.fake_tensor",
            "torch.utils._device",
        )
    ),
    PrivateName(
        "Tensor._version",
        "tensors.memory",
        "seeing what was written, and what can be",
        "the step raises AttributeError",
    ),
    PrivateName("Tensor._is_zerotensor", "tensors", "refusing zero tensors", "the step raises AttributeError"),
    PrivateName("Tensor._indices", "tensors.gate", "checking the rows of sparse gradients", "their step raises"),
    PrivateName("Tensor._values", "tensors.gate", "checking the memory of sparse gradients", "their step raises"),
    PrivateName(
        "torch._C.DisableTorchFunctionSubclass",
        "tensors",
        "asking a tensor subclass for its memory, or for its dtype",
        "refusals raise",
    ),
    PrivateName(
        "torch._has_compatible_shallow_copy_type",
        "tensors.offloaded",
        "converting a module that has offloaded gradients",
        "that conversion raises",
    ),
    PrivateName("DTensor._local_tensor", "tensors.shards", "the shard of a sharded tensor", "sharded steps raise"),
    PrivateName("DTensor._spec", "tensors.shards", "the layout of a sharded tensor", "sharded steps raise"),
    PrivateName(
        "torch.distributed.tensor.placement_types._StridedShard",
        "tensors.shards",
        "shards of FSDP on top of tensor parallelism",
        "laying out raises",
    ),
    PrivateName(
        "torch.distributed.tensor._utils",
        "tensors.shards",
        "where a shard stands in its tensor",
        "loading shards raises",
    ),
    *(
        PrivateName(name, "tensors.backward", "stepping at the end of a backward pass", "step() steps what is left")
        for name in ("torch._C._current_graph_task_id", "torch.autograd.Variable._execution_engine")
    ),
    PrivateName(
        "Tensor._post_accumulate_grad_hooks",
        "step.release",
        "telling a gradient that is None from one that was dropped",
        "a gradient that is None is refused as one that was dropped",
    ),
    PrivateName("FlatParameter._fsdp_flattened", "distributed.divided", "knowing FSDP1", "norms are of one rank"),
    PrivateName("torch._foreach_*", "engines.foreach", "operations over lists of tensors", "foreach engine raises"),
    PrivateName("torch._utils._flatten_dense_tensors", "optimizers.lbfgs", "making a flat vector", "LBFGS raises"),
    PrivateName("torch._utils._unflatten_dense_tensors", "optimizers.lbfgs", "views of a flat vector", "LBFGS raises"),
    PrivateName("torch._compile._disable_dynamo", "dynamo", "a step inside a compiled function", "import fails"),
    PrivateName(
        "torch._dynamo.eval_frame.skip_code",
        "dynamo",
        "hooks inside a compiled function",
        "hooks are compiled for each shape",
    ),
    PrivateName("torch._C._autograd._profiler_enabled", "optimizer", "naming steps in profiles", "the step raises"),
    PrivateName(
        "torch.autograd.profiler._is_profiler_enabled", "optimizer", "naming steps in profiles", "the step raises"
    ),
    PrivateName("torch.nn.modules.batchnorm._BatchNorm", "swa_utils", "update_bn", "import fails"),
    PrivateName("torch.nn.modules.batchnorm._NormBase", "groups", "telling norms from other modules", "import fails"),
    *(
        PrivateName(name, "optimizer", "hooks", _CONTRACT)
        for name in (
            "torch.optim.optimizer._global_optimizer_pre_hooks",
            "torch.optim.optimizer._global_optimizer_post_hooks",
            "Optimizer._optimizer_step_pre_hooks",
            "Optimizer._optimizer_step_post_hooks",
        )
    ),
    PrivateName("Optimizer._optimizer_step_code", "optimizer", "wrapping the step in a profile", _CONTRACT),
    *(
        PrivateName(name, "checkpoint", "finding what a module's own hooks do at loading", "loading raises")
        for name in ("Module._load_state_dict_pre_hooks", "Module._load_state_dict_post_hooks")
    ),
)


def missing_names() -> list[PrivateName]:
    """Return the names that this release of torch does not have; those of packages that it was built without too."""
    return [row for row in PRIVATE_NAMES if not _is_there(row.name)]


def _is_there(name: str) -> bool:
    try:
        if name.startswith("aoti_torch_"):
            return bool(stable_functions())
        owner, _, attribute = name.rpartition(".")
        if owner == "FlatParameter":  # torch sets this one by name
            return bool(attribute == _owner("torch.distributed.fsdp._common_utils").FSDP_FLATTENED)
        found = _owner(owner)
        if attribute.endswith("*"):
            return any(each.startswith(attribute[:-1]) for each in dir(found))
        return _has(found, attribute)
    except (ImportError, AttributeError, LookupError):
        return False


def _owner(name: str) -> Any:
    """Return what a name of the table is an attribute of: a module of torch, or an object of a class that has it."""
    if name in _OBJECTS:
        return _OBJECTS[name]()
    if name.startswith("torch"):
        parent, _, last = name.rpartition(".")
        try:
            return importlib.import_module(name)
        except ImportError:
            return getattr(_owner(parent), last)
    raise LookupError(name)


def _has(owner: Any, attribute: str) -> bool:
    """Return whether an object has an attribute, or a module a submodule."""
    try:
        return hasattr(owner, attribute) or bool(importlib.import_module(f"{owner.__name__}.{attribute}"))
    except (ImportError, AttributeError):
        return False


_OBJECTS: dict[str, Any] = {
    "Tensor": lambda: torch.zeros(1),
    "UntypedStorage": lambda: torch.zeros(1).untyped_storage(),
    "Module": torch.nn.Module,
    "Optimizer": lambda: torch.optim.SGD([torch.zeros(1)]),
    "DTensor": lambda: importlib.import_module("torch.distributed.tensor").DTensor,
}
