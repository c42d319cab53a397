"""Training loops that go on for long: a world whose steps use what the last ones have left, and one that forgets it.

All bits must be the same, whatever happens between steps; what is refused is refused by both, in the same words.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from cases import Case, Pick, Round, draw_kinds
from changes import CHANGES, Change
from memory import Snapshot, everything, lacks_memory
from steps import attempt, give_gradients, take_step
from torch import Tensor
from worlds import ENGINES, SETTINGS, WITHOUT_ENGINES, World, options_of

Failing = Callable[[str, str], Exception]


class LoopCase(Case):
    """A sequence of many steps."""


# What happens between steps to what only surefoot has


def limit_norm(world, a, b, c):
    world.optimizer.step_options.max_grad_norm = (None, 0.5, 0.1, float("inf"))[b % 4]


def limit_norm_of_a_group(world, a, b, c):
    group_of(world, a)["max_grad_norm"] = (None, 0.5, 0.1)[b % 3]


def limit_values(world, a, b, c):
    group_of(world, a)["max_grad_value"] = (None, 0.5)[b % 2]


def average(world, a, b, c):
    group_of(world, a)["ema"] = (0.9, 0.5)[b % 2]  # an average that is not asked for is looked at, but not by guards


def centralize(world, a, b, c):
    group_of(world, a)["gradient_centralization"] = bool(b % 2)


def skip_nonfinite(world, a, b, c):
    world.optimizer.step_options.nonfinite = ("ignore", "skip", "raise")[b % 3]


def measure(world, a, b, c):
    world.optimizer.step_options.telemetry = (None, True)[b % 2]


def zero_after_step(world, a, b, c):
    world.optimizer.step_options.zero_grad_after_step = bool(b % 2)


def choose_engine(world, a, b, c):
    if world.setting.algorithm not in WITHOUT_ENGINES:
        group_of(world, a).update(foreach=(None, True, False)[b % 3], fused=None)


def group_of(world: World, number: int) -> dict[str, Any]:
    return world.optimizer.param_groups[number % len(world.optimizer.param_groups)]


OURS = (limit_norm, limit_norm_of_a_group, limit_values, average, centralize, skip_nonfinite, measure, zero_after_step)
ALL_CHANGES = CHANGES | {each.__name__.replace("_", " "): Change(each) for each in (*OURS, choose_engine)}
del ALL_CHANGES["gradient of subclass"]  # which a kernel that is kept takes for what it holds, and engines of torch too


def draw_loop(pick: Pick, *, engines: Iterable[str] = ENGINES, settings: Iterable[str] = SETTINGS) -> LoopCase:
    """Return a case made of numbers that `pick` gives; it changes few things, and often the same ones."""
    setting, engine, kinds = draw_kinds(pick, engines, settings)
    names = tuple(ALL_CHANGES)
    own = [names[pick(len(names))] for _ in range(6)]
    rounds = []
    for _ in range(8 + pick(20)):
        count = (0, 0, 0, 1, 1, 2)[pick(6)]
        moves = tuple((own[pick(6)], pick(8), pick(12), pick(120)) for _ in range(count))
        between = not moves or any(ALL_CHANGES[move[0]].between for move in moves)
        where = "before" if between or SETTINGS[setting].algorithm == "LBFGS" else PLACES[pick(6)]
        rounds.append(
            Round(("in place", "in place", "new", "new", "some", "kept")[pick(6)], moves, where, _how(pick, where))
        )
    return LoopCase(setting, engine, kinds, tuple(rounds), pick(1000))


PLACES = ("before", "before", "before", "before", "hook", "closure")


SELDOM = ("thread", "both", "enabled", "inference", "closure", "closure raises", "scaled")


def _how(pick: Pick, where: str) -> str:
    how = (("plain",) * 20 + SELDOM)[pick(20 + len(SELDOM))]
    unlike = where == "closure" and how == "scaled"  # a GradScaler takes no closures
    return "plain" if unlike or (where != "before" and how == "both") else how


def run_loop(case: LoopCase, failing: Failing) -> Counter[str]:
    """Run a case; return how its steps ended.

    Raises:
        Exception: `failing` makes it, of the kind of a fault and what was seen.
    """
    torch.set_num_threads(1)
    keeping, forgetting = (World(SETTINGS[case.setting], case.engine, case.kinds, "ours", case.seed) for _ in range(2))
    for world in (keeping, forgetting) if all(each.where != "hook" for each in case.rounds) else ():
        world.hooked.remove()  # steps without hooks have a way of their own
    before = [vars(world.optimizer.step_options).copy() for world in (keeping, forgetting)]
    ended: Counter[str] = Counter()
    for number, each in enumerate(case.rounds):
        for world in (keeping, forgetting):
            give_gradients(world, each.grads, case.seed * 97 + number * 11)
        _change(each, keeping, forgetting, failing)
        seen = Snapshot(keeping)
        errors = [_step(world, each, number, forgets=world is forgetting) for world in (keeping, forgetting)]
        if _told(errors[0]) != _told(errors[1]):
            raise failing("what is kept refuses otherwise", f"{errors[0]!r}, else {errors[1]!r}")
        if found := _difference(keeping, forgetting):
            raise failing("what is kept changes bits", found)
        ended["stepped" if errors[0] is None else "refused"] += 1
        if errors[0] is None:
            continue
        refused = each.where == "before" and each.how not in ("closure raises", "scaled") and keeping.second is None
        if refused and (found := seen.difference(keeping)):
            raise failing("changed by a refusal", f"{found}; {errors[0]!r}")
        for world, options in zip((keeping, forgetting), before, strict=True):
            world.deferred = None
            vars(world.optimizer.step_options).update(options)
            world.repair(case.seed + number)
    return ended


def _change(each: Round, keeping: World, forgetting: World, failing: Failing) -> None:
    """Change both worlds, or let a hook or a closure do so."""
    for world in (keeping, forgetting):

        def call(world: World = world) -> list[str]:
            return [_applied(world, *move) for move in each.moves]

        world.told = call() if each.where == "before" else []
        if each.where != "before":
            world.deferred = each.where, call
    if keeping.told != forgetting.told:
        raise failing("change in one world only", f"{keeping.told} and {forgetting.told}")


def _applied(world: World, name: str, *numbers: int) -> str:
    """Apply a change; return what it raised."""
    if any(lacks_memory(tensor) for _, tensor in everything(world)):
        return ""  # most changes would read what is not there
    return repr(type(attempt(lambda: ALL_CHANGES[name].apply(world, *numbers))))


def _step(world: World, each: Round, number: int, *, forgets: bool) -> BaseException | None:
    """Take a step; return what it raised."""
    for optimizer in world.optimizers if forgets else ():
        vars(optimizer).pop("_step_cache", None)
    closure = each.where == "closure" or each.how.startswith("closure") or world.setting.algorithm == "LBFGS"
    # A GradScaler of torch reads gradients whose memory is gone.
    unscalable = any(param.grad is not None and lacks_memory(param.grad) for param in world.params)
    return take_step(world, "plain" if unscalable else each.how, closure, number)


def _told(error: BaseException | None) -> str:
    """Return what an error tells, but for the tensors that it names: of several those that come first in memory."""
    return re.sub(r"`[^`]*`( of shape \([^)]*\))?", "a tensor", repr(error))


def _difference(keeping: World, forgetting: World) -> str | None:
    """Say where two worlds differ in a bit, or in an option; None if they do not."""
    ours, theirs = (list(everything(world)) for world in (keeping, forgetting))
    if (paths := [path for path, _ in ours]) != [path for path, _ in theirs]:
        return f"there are {sorted(set(paths) ^ {path for path, _ in theirs})}"
    for (path, one), (_, other) in zip(ours, theirs, strict=True):
        if _bits(one) != _bits(other):
            return f"{path}: {one.tolist()} with what is kept, {other.tolist()} without"
    for one, other in zip(keeping.optimizers, forgetting.optimizers, strict=True):
        facts = [[*map(_facts, o.param_groups), vars(o.step_statistics)] for o in (one, other)]
        if repr(facts[0]) != repr(facts[1]):
            return f"{facts[0]} with what is kept, {facts[1]} without"
    return None


def _facts(group: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    return len(group["params"]), options_of(group)


def _bits(tensor: Tensor) -> tuple[Any, ...]:
    """Return what a tensor is, and its elements, bit by bit."""
    known = tensor.dtype, tensor.shape, tensor.stride()
    if tensor.is_meta or tensor._is_zerotensor() or lacks_memory(tensor):
        return known
    with torch.inference_mode():
        plain = tensor.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
        return (*known, plain.view(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
