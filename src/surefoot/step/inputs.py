"""StepInput: all that a step is about, as the optimizer hands it over."""

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, NamedTuple

from torch import Tensor

from surefoot.rule import AlgorithmSpec, Flags, Stage, bind
from surefoot.step.options import ReleaseOptions, Stepping
from surefoot.step.types import CustomStep, ParamSlice, PreparedParam, Transfers


class StepInput(NamedTuple):
    """All that a step is about.

    Attributes:
        spec: the algorithm, or the combination of several; `spec.of(group)` is a group's.
        groups: the param groups.
        state: each parameter's entry.
        stepping: options, statistics and context.
        grad_scale: what a GradScaler has multiplied the gradients with, if it leaves unscaling to the step.
        found_inf: whether it has found infinities, as a number on a device.
        coefficients: the algorithm's, of the optimizer where it needs one.
        make_custom_step: the same; see `Optimizer._make_custom_step`.
        check_param: `check_param(group, param)` raises RuntimeError when the algorithm of the group, which has a custom
            step, cannot optimize the parameter any more.
        grads: the gradients, where they are not the parameters' own; nothing is then kept for another step.
        whole: the step of the whole optimizer, by which parameters are named and numbered, where this one is about a
            part of it.
        released: what is done to gradients where they are released while backward runs.
        transfers: what brings gradients and takes away parameters, where both are elsewhere.
    """

    spec: AlgorithmSpec
    groups: list[dict[str, Any]]
    state: MutableMapping[Any, dict[str, Any]]
    stepping: Stepping
    grad_scale: Any
    found_inf: Any
    coefficients: Callable[..., dict[str, Any]]
    make_custom_step: Callable[[list[PreparedParam]], CustomStep]
    check_param: Callable[[Mapping[str, Any], Tensor], None]
    grads: Mapping[Tensor, Tensor | None] | None = None
    whole: "StepInput | None" = None
    released: ReleaseOptions | None = None
    transfers: Transfers | None = None

    def groups_with(self, group: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the groups of the algorithm of a group."""
        if not self.spec.algorithms:
            return self.groups
        own = self.spec.of(group)
        return [each for each in self.groups if self.spec.of(each) is own]

    def params(self) -> list[Tensor]:
        """Return all parameters, group by group."""
        return [param for group in self.groups for param in group["params"]]

    def gradient(self, param: Tensor) -> Any:
        """Return the gradient of a parameter, None if it has none and is not stepped."""
        return param.grad if self.grads is None else self.grads.get(param)

    def has_no_gradients(self) -> bool:
        """Return whether there is nothing to step."""
        if self.grads is not None:
            return all(grad is None for grad in self.grads.values())
        return not any(param.grad is not None for group in self.groups for param in group["params"])

    def is_clipped(self, group: Mapping[str, Any]) -> bool:
        """Return whether the gradients of a group are clipped by a norm."""
        return self.is_clipped_at_once(group) or (self.released is not None and self.released.clips)

    def is_clipped_at_once(self, group: Mapping[str, Any]) -> bool:
        """Return whether a group is clipped by the norm of all gradients, which must be there at once for that."""
        return bool(self.stepping.options.max_grad_norm or group.get("max_grad_norm"))

    def own_norm(self, group: Mapping[str, Any]) -> float | None:
        """Return the greatest norm of a group's own gradients, if it has one."""
        return self.stepping.options.own(group).get("max_grad_norm")

    def needs_gradients(self) -> bool:
        """Return whether the gradients must be measured before the update."""
        if self.released is not None and self.released.measures:
            return True
        guarded = self.stepping.options.nonfinite != "ignore"
        return guarded or any(map(self.is_clipped, self.groups))

    def options_ask_more(self) -> bool:
        """Return whether options ask for something beside the update, while parameters are stepped."""
        return bool(self.stepping.options.requested() - {"zero_grad_after_step"}) or self.needs_gradients()

    def only_clips(self) -> bool:
        """Return whether nothing is asked for beside the update but that gradients are clipped by their norm."""
        scaled = self.grad_scale is not None or self.found_inf is not None
        more = self.stepping.options.requested() - {"zero_grad_after_step", "max_grad_norm"}
        return not (scaled or more or self.transfers is not None or self.released is not None)

    def only_updates(self) -> bool:
        """Return whether nothing is asked for beside the update by the gradients as they are."""
        scaled = self.grad_scale is not None or self.found_inf is not None
        return not (scaled or self.transfers is not None or self.options_ask_more())

    def flags(self, group: Mapping[str, Any]) -> Flags:
        """Return a group's flags, and those of the step.

        These are: whether telemetry is measured, decided later; whether a GradScaler left the gradients for the step to
        unscale; whether they are clipped by norm.
        """
        flags = (("measured", False), ("scaled", self.grad_scale is not None), ("clipped", self.is_clipped(group)))
        return (*flags, *self.spec.of(group).settle_flags(group))

    def stages(self) -> list[tuple[AlgorithmSpec, tuple[Stage, ...]]]:
        """Return for each group that measures tensors before an update, with gradients or not, for what and how."""
        found = ((self.spec.of(group), self.stages_of(group)) for group in self.groups)
        return [(spec, stages) for spec, stages in found if stages]

    def stages_of(self, group: Mapping[str, Any]) -> tuple[Stage, ...]:
        """Return what a group measures of tensors before an update, and how."""
        spec = self.spec.of(group)
        return () if spec.update is None else bind(spec, self.flags(group)).stages

    def takes_whole_gradients(self) -> bool:
        """Return whether gradients are read before the first bucket is stepped, other than to be measured."""
        return any(
            self.spec.of(group).update is None or group.get("gradient_centralization") or self.stages_of(group)
            for group in self.groups
        )

    def whole_params(self, *, alone: bool = False) -> list[Tensor]:
        """Return the parameters whose algorithm needs to know more of a tensor than a shard of it.

        Args:
            alone: without those of which it needs no more than sums over several tensors.
        """
        groups = (
            group
            for group in self.groups
            if self.spec.of(group).whole_tensors
            or any(not alone or len(stage.sums) > stage.totals for stage in self.stages_of(group))
        )
        return [param for group in groups for param in group["params"]]

    def keys(self) -> dict[Tensor, str | int]:
        """Return the name of every parameter, or else its number among all."""
        found: dict[Tensor, str | int] = {}
        for group in (self.whole or self).groups:
            start, names = len(found), group.get("param_names") or ()
            numbers = range(start, start + len(group["params"]))
            found |= zip(group["params"], names if len(names) == len(numbers) else numbers, strict=True)
        return found

    def names(self) -> dict[Tensor, str]:
        """Return the name of every parameter."""
        from surefoot.telemetry.names import names_of_groups  # noqa: PLC0415 (on first use)

        groups = (self.whole or self).groups
        params = (param for group in groups for param in group["params"])
        return dict(zip(params, names_of_groups(groups, self.stepping), strict=True))

    def skip(self) -> None:
        """Note that this step changes nothing."""
        self.stepping.statistics.skipped += 1
        self.stepping.context.skips = True

    @property
    def slices(self) -> list[ParamSlice]:
        """The parameters of the step."""
        return self.stepping.context.slices
