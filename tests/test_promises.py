"""Promises 2 to 7 of the design, engine by engine; promise 1, same answers, has its own file."""

import copy
import os
import pickle
import threading
import warnings

import pytest
import torch
from torch import Tensor

import surefoot
from conformance import (
    DENSE,
    ELEMENTWISE,
    ENGINES,
    FLAGS,
    SPARSE,
    STEADY,
    Params,
    assert_close,
    assert_same,
    bits,
    each_engine,
    each_row,
    gradients,
    groups,
    normals,
    results,
    train,
    unclipped,
    zoo,
)
from helpers import difference
from surefoot.rule import DIRECTED, ENGINE_OPTIONS

BEFORE = range(STEADY - 2, STEADY + 2)
AFTER = range(STEADY + 2, STEADY + 4)
"""Steps before and after what a test does; in the last before, and in the last after, a plan may be used again."""
SOME = ("odd", "matrix", "channels_last", "strided view", "transposed", "late")


def some(dtype: torch.dtype = torch.float32, admits=lambda param: True) -> Params:
    return {name: param for name, param in zoo(dtype, admits).items() if name in SOME}


def started(row, engine, options=None):
    """Make an optimizer that has taken steps."""
    params = some()
    optimizer = row.build(groups(params), row.all_flags() if options is None else options, engine)
    train(optimizer, params, torch.float32, steps=BEFORE)
    return optimizer, params


def snapshot(optimizer):
    """Copy parameters, gradients, state and options."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return copy.deepcopy(
        {
            "params": [param.detach() for param in params],
            "state": [dict(optimizer.state[param]) if param in optimizer.state else None for param in params],
            "groups": [{**group, "params": len(group["params"])} for group in optimizer.param_groups],
        }
    )


def assert_unchanged(optimizer, before):
    assert difference(snapshot(optimizer), before) is None


# 2. Same contract: a checkpoint of either goes on in the other


@pytest.mark.in_turn("engine")
@each_row(DENSE)
@each_engine
def test_checkpoints_of_torch_go_on_here_and_ours_there(engine, row):
    ours, theirs = some(admits=row.admits), some(admits=row.admits)
    optimizer = row.build(groups(ours), row.all_flags(), row.engines([engine])[0])
    oracle = row.build_oracle(groups(theirs), row.all_flags())
    train(oracle, theirs, torch.float32, steps=BEFORE)
    for taker, giver, start in ((optimizer, oracle, STEADY + 2), (oracle, optimizer, STEADY + 5)):
        for name in theirs:
            (ours if taker is optimizer else theirs)[name].data.copy_((theirs if taker is optimizer else ours)[name])
        wishes = [{name: group[name] for name in ("foreach", "fused") if name in group} for group in taker.param_groups]
        taker.load_state_dict(copy.deepcopy(giver.state_dict()))  # torch keeps the very tensors
        for group, wish in zip(taker.param_groups, wishes, strict=True):
            group.update(wish)
        train(optimizer, ours, torch.float32, steps=range(start, start + 3))
        train(oracle, theirs, torch.float32, steps=range(start, start + 3))
    equal = assert_same if engine == "eager" and row.exact else assert_close
    found = {
        name: value for name, value in results(oracle, theirs).items() if _part(name) not in row.ours.derived_state
    }
    equal(results(optimizer, ours), found)


def _part(name: str) -> str:
    """Return what of a parameter a result is."""
    return name.split(" of ", maxsplit=1)[0]


# 3. Only your memory


def views(storage: Tensor) -> list[Tensor]:
    """Return views of many layouts, with gaps between them and inside."""
    return [
        storage[3:40],
        storage[41],
        storage[50:150].view(10, 10)[:, 1::3],
        storage[150:180].view(5, 6).t(),
        storage[181:391].view(2, 7, 5, 3).permute(0, 3, 1, 2),
        storage[400:464].view(4, 4, 4)[1:3, :, ::2],
        storage[470:470],
    ]


def in_views(tensors: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Lay tensors out as views of one storage; give that and them."""
    storage = normals(tensors[0].dtype, seed=9)(500)
    laid = [view.copy_(tensor) for view, tensor in zip(views(storage), tensors, strict=True)]
    return storage, laid


def gaps(storage: Tensor) -> Tensor:
    """Return the bits of what belongs to no view."""
    free = torch.ones(len(storage), dtype=torch.bool)
    for view in views(free):
        view.fill_(False)
    return bits(storage)[free]


@pytest.mark.in_turn("engine")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=str)
@each_row(ELEMENTWISE)
@each_engine
def test_neighbours_in_shared_storages_stay(engine, row, dtype):
    """Parameters, gradients and each slot are views of a storage; results are those of tensors of their own."""
    normal = normals(dtype, seed=1)
    values = [normal(*view.shape) for view in views(torch.zeros(500))]
    memory, params = in_views(values)
    grad_memory, grads = in_views([normal(*value.shape) for value in values])
    alone = [value.clone().requires_grad_() for value in values]
    # In 16 bits elements are rounded by their order in memory, which is another one in the views.
    options = row.all_flags() | ({"state_dtype": torch.float32} if dtype is torch.bfloat16 else {})
    optimizer = row.build([param.requires_grad_() for param in params], options, engine)
    twin = row.build(alone, options, engine)
    storages = [memory, grad_memory]
    for step in range(3):
        for param, other, grad in zip(params, alone, grads, strict=True):
            param.grad, other.grad = grad, grad.clone(memory_format=torch.contiguous_format)
        if step == 1:
            for slot in optimizer.state[params[0]].keys() & {
                slot.name for slot in row.ours.slots if not slot.is_number
            }:
                storage, laid = in_views([optimizer.state[param][slot] for param in params])
                storages.append(storage)
                for param, state in zip(params, laid, strict=True):
                    optimizer.state[param][slot] = state
        before, version = [gaps(storage.detach()) for storage in storages], grad_memory._version
        optimizer.step()
        assert grad_memory._version == version
        twin.step()
        assert all(torch.equal(gaps(storage.detach()), old) for storage, old in zip(storages, before, strict=True))
    assert torch.equal(grad_memory, in_views(grads)[0])
    assert_close(dict(enumerate(params)), dict(enumerate(alone)))


@pytest.mark.in_turn("engine")
@each_row(ELEMENTWISE)
@each_engine
def test_gradients_are_never_written(engine, row):
    for options in row.variants(few=True):
        param = normals(torch.float32, seed=2)(50).requires_grad_()
        optimizer = row.build([param], options, engine)
        for _ in range(3):
            param.grad = grad = normals(torch.float32, seed=3)(50)
            version, values = grad._version, grad.clone()
            optimizer.step()
            assert param.grad is grad
            assert grad._version == version
            assert torch.equal(grad, values)


@each_row(ELEMENTWISE)
@each_engine
def test_a_parameter_that_overlaps_itself_is_refused(engine, row):
    param = torch.ones(3, 1).expand(3, 4).requires_grad_()
    param.grad = torch.ones(3, 4)
    with pytest.raises(RuntimeError, match="single memory location|overlap"):
        row.build([param], {}, engine).step()


# 4. Autograd knows


@pytest.mark.in_turn("engine")
@each_row(ELEMENTWISE)
@each_engine
def test_a_step_is_seen_by_autograd(engine, row):
    """What was saved for the backward pass, and changed since, raises; what was not changed does not."""
    optimizer, params = started(row, engine)
    for name, grad in gradients(params, STEADY + 2, torch.float32).items():
        params[name].grad = None if name == "odd" else grad
    slots = {slot.name for slot in row.ours.slots if not slot.copies_param}
    saved = [param for name, param in params.items() if name != "odd"]
    saved += [
        state[slot] for param in saved for slot, state in [(s, optimizer.state[param]) for s in slots] if slot in state
    ]
    still = [params["odd"]]
    losses = [[(tensor * torch.ones((), requires_grad=True)).sum() for tensor in tensors] for tensors in (saved, still)]
    optimizer.step()
    for loss in losses[0]:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    for loss in losses[1]:
        loss.backward()


# 5. Deterministic


@pytest.fixture
def threads():
    """Let a test set the number of threads."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@each_row(ELEMENTWISE)
@each_engine
def test_same_bits_run_after_run_for_any_number_of_threads(engine, row, threads):
    size = 100_003
    outcomes = []
    for count in (1, 2, 3):
        threads(count)
        params = {
            "large": normals(torch.float32, seed=5)(size).requires_grad_(),
            "small": torch.ones(3, requires_grad=True),
        }
        optimizer = row.build(params.values(), row.all_flags(), engine)
        train(optimizer, params, torch.float32, steps=range(STEADY, STEADY + 3))
        outcomes.append(results(optimizer, params))
    for outcome in outcomes[1:]:
        assert_same(outcome, outcomes[0])


@each_row(row for row in ELEMENTWISE if not row.reduces)
@each_engine
def test_same_bits_however_parameters_are_cut(engine, row):
    """One tensor, and the same numbers as many tensors of all lengths and offsets."""
    values, grad = (normals(torch.float32, seed=seed)(5000) for seed in (6, 7))
    lengths = [1, 2, 3, 5, 8, 15, 16, 17, 31, 64, 100, 1000, 3738]
    whole, cut = values.clone().requires_grad_(), [part.requires_grad_() for part in values.clone().split(lengths)]
    optimizers = [row.build([whole], row.all_flags(), engine), row.build(cut, row.all_flags(), engine)]
    for _ in range(3):
        whole.grad = grad
        for param, part in zip(cut, grad.split(lengths), strict=True):
            param.grad = part
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(whole, torch.cat(cut))


# 6. All or nothing


def sparse(param):
    return torch.ones(param.shape).to_sparse()


def wrong_gradient(optimizer, param):
    param.data = torch.ones(5, 5)
    param.grad = torch.ones(5, 5)
    param.data = torch.ones(2, 3)


def wrong_state(optimizer, param):
    slot = optimizer.slots[0].name
    if slot not in optimizer.state[param]:
        pytest.skip("no state")
    optimizer.state[param][slot] = torch.ones(7)


def sparse_gradient(optimizer, param):
    if optimizer.sparse is not surefoot.rule.Sparse.REFUSED:
        pytest.skip("takes sparse gradients")
    param.grad = torch.ones(param.shape).to_sparse()


def capturable(optimizer, param):
    optimizer.param_groups[-1]["capturable"] = True


def contradicting_engines(optimizer, param):
    optimizer.param_groups[-1].update(foreach=True, differentiable=True)


def no_numbers(optimizer, param):
    group = optimizer.param_groups[-1]
    group.update(dict.fromkeys(group.keys() & {"lr", "etas"}))


INADMISSIBLE = (wrong_gradient, wrong_state, sparse_gradient, capturable, contradicting_engines, no_numbers)


@pytest.mark.in_turn("engine")
@pytest.mark.in_turn("row", every=4)
@pytest.mark.parametrize("spoil", INADMISSIBLE, ids=lambda spoil: spoil.__name__)
@each_row(ELEMENTWISE)
@each_engine
def test_a_refused_step_changes_nothing(engine, row, spoil):
    """What is inadmissible stands in the last group, behind groups that are in order."""
    optimizer, params = started(row, engine)
    last = torch.ones(2, 3, requires_grad=True)
    optimizer.add_param_group({"params": [last]})
    params["new"] = last
    train(optimizer, params, torch.float32, steps=[STEADY + 2, STEADY + 3])
    for name, grad in gradients(params, STEADY + 4, torch.float32).items():
        params[name].grad = grad + 1
    spoil(optimizer, last)
    before = snapshot(optimizer)
    with pytest.raises((RuntimeError, AssertionError, TypeError)):
        optimizer.step()
    assert_unchanged(optimizer, before)


@pytest.mark.in_turn("engine")
@each_row(DENSE)
@each_engine
def test_a_closure_that_raises_changes_nothing(engine, row):
    params = some(admits=row.admits)
    optimizer = row.build(groups(params), {}, row.engines([engine])[0])
    train(optimizer, params, torch.float32, steps=BEFORE)
    before = snapshot(optimizer)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    assert_unchanged(optimizer, before)


@each_row(DENSE)
@pytest.mark.parametrize(
    "group",
    [
        {"params": [torch.ones(2, 2, requires_grad=True)], "lr": -1.0},
        {"params": [torch.ones(2, 2, requires_grad=True)], "lr": torch.nan},
        {"params": [torch.ones(2, 2, requires_grad=True), 1.0]},
        {"params": [torch.ones(2, 2, requires_grad=True).clone()]},
        {"lr": 1.0},
    ],
    ids=["negative", "nan", "no tensor", "no leaf", "no params"],
)
def test_a_refused_group_changes_nothing(row, group):
    optimizer = row.build([torch.ones(2, 2, requires_grad=True)], {})
    before, keys = snapshot(optimizer), set(group)
    with pytest.raises((ValueError, TypeError)):
        optimizer.add_param_group(group)
    assert_unchanged(optimizer, before)
    assert set(group) == keys


@pytest.mark.in_turn("engine")
@each_row(DENSE)
@each_engine
def test_a_failed_load_changes_nothing(engine, row):
    params = some(admits=row.admits)
    optimizer = row.build(groups(params), row.all_flags(), row.engines([engine])[0])
    train(optimizer, params, torch.float32, steps=BEFORE)
    before = snapshot(optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    entry = saved["state"][max(saved["state"])]
    slot = next(name for name, value in entry.items() if isinstance(value, Tensor) and value.dim())
    entry[slot] = torch.ones(3, 5, 7)
    with pytest.raises(ValueError, match=slot):
        optimizer.load_state_dict(saved)
    assert_unchanged(optimizer, before)


# 7. Threads and forks


@pytest.mark.in_turn("engine")
@each_row(DENSE)
@each_engine
def test_two_optimizers_step_in_two_threads(engine, row):
    def run(outcome):
        params = some(admits=row.admits)
        optimizer = row.build(groups(params), row.all_flags(), row.engines([engine])[0])
        train(optimizer, params, torch.float32, steps=range(STEADY - 2, STEADY + 4))
        outcome.update(results(optimizer, params))

    outcomes: list[dict] = [{}, {}, {}]
    run(outcomes[0])
    workers = [threading.Thread(target=run, args=(outcome,)) for outcome in outcomes[1:]]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert_same(outcomes[1], outcomes[0])
    assert_same(outcomes[2], outcomes[0])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@each_engine
def test_a_forked_child_steps(engine):
    row = next(row for row in ELEMENTWISE if row.ours is surefoot.Adam)
    optimizer, params = started(row, engine)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python warns of forks where threads run
        child = os.fork()
    train(optimizer, params, torch.float32, steps=AFTER)
    twin, theirs = started(row, engine)
    train(twin, theirs, torch.float32, steps=AFTER)
    right = all(torch.equal(params[name], theirs[name]) for name in params)
    if child == 0:
        os._exit(0 if right else 1)
    assert right
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# A plan is a cache: whatever is changed between two steps counts


def set_option(**options):
    def change(optimizer, params):
        for group in optimizer.param_groups:
            group.update({name: value for name, value in options.items() if name in group})

    return change


def no_momentum(optimizer, params):
    for group in optimizer.param_groups:
        least = 0.5 if "train_mode" in group else 0  # without momentum there is nothing to evaluate, and a step refuses
        group.update({name: value for name, value in {"momentum": least, "nesterov": False}.items() if name in group})


def other_betas(optimizer, params):
    for group in optimizer.param_groups:
        if "betas" in group:
            group["betas"] = (0.5, 0.6, *group["betas"][2:])


def tensor_lr(optimizer, params):
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(0.25)


def new_data(optimizer, params):
    for param in params.values():
        param.data = param.data.mul(2).t().contiguous().t() if param.dim() == 2 else param.data + 1


def new_strides(optimizer, params):
    for param in params.values():
        param.data = param.data.clone(memory_format=torch.contiguous_format)


def shared_memory(optimizer, params):
    for param in params.values():
        param.share_memory_()
        for value in optimizer.state[param].values():
            value.share_memory_()


def edited_state(optimizer, params):
    for state in optimizer.state.values():
        for value in state.values():
            value.mul_(2)


def replaced_state(optimizer, params):
    for state in optimizer.state.values():
        for name, value in state.items():
            state[name] = value.t().contiguous().t() * 0.5 if value.dim() == 2 else value * 0.5


def cleared_entry(optimizer, params):
    optimizer.state[params["matrix"]].clear()


def removed_entry(optimizer, params):
    del optimizer.state[params["matrix"]]


def cleared_state(optimizer, params):
    optimizer.state.clear()


def added_group(optimizer, params):
    params["new"] = torch.ones(2, 3, requires_grad=True)
    optimizer.add_param_group({"params": [params["new"]], "lr": 0.5})


def removed_parameter(optimizer, params):
    group = optimizer.param_groups[0]
    group["params"] = [param for param in group["params"] if param is not params["odd"]]


def reordered(optimizer, params):
    for group in optimizer.param_groups:
        group["params"].reverse()


def exchanged_parameter(optimizer, params):
    group = optimizer.param_groups[0]
    old, params["odd"] = params["odd"], torch.ones(11, requires_grad=True)
    group["params"] = [params["odd"] if param is old else param for param in group["params"]]


def other_shape(optimizer, params):
    params["odd"].data = torch.ones(4, 4)
    params["odd"].grad = None
    optimizer.state[params["odd"]].clear()


def loaded(optimizer, params):
    saved = copy.deepcopy(optimizer.state_dict())
    train(optimizer, params, torch.float32, steps=[STEADY + 2])
    optimizer.load_state_dict(saved)


CHANGES = {
    "lr": set_option(lr=0.3),
    "no weight decay": set_option(weight_decay=0.0),
    "no momentum": no_momentum,
    "minimize": set_option(maximize=False),
    "eps": set_option(eps=0.1),
    "betas": other_betas,
    "coupled": set_option(decoupled_weight_decay=False),
    **{
        change.__name__: change
        for change in (
            tensor_lr,
            new_data,
            new_strides,
            shared_memory,
            edited_state,
            replaced_state,
            cleared_entry,
            removed_entry,
            cleared_state,
            added_group,
            removed_parameter,
            reordered,
            exchanged_parameter,
            other_shape,
            loaded,
        )
    },
}


@pytest.mark.in_turn("engine")
@pytest.mark.in_turn("row", every=4)
@pytest.mark.parametrize("change", CHANGES)
@each_row(ELEMENTWISE)
@each_engine
def test_what_is_changed_between_steps_counts(engine, row, change):
    """As it counts with torch's for-loop."""
    ours, theirs = some(), some()
    optimizer, oracle = (
        row.build(groups(ours), row.all_flags(), engine),
        row.build_oracle(groups(theirs), row.all_flags()),
    )
    for stepped, params in ((optimizer, ours), (oracle, theirs)):
        train(stepped, params, torch.float32, steps=BEFORE)
        CHANGES[change](stepped, params)
        train(stepped, params, torch.float32, steps=AFTER)
    equal = assert_same if engine == "eager" and row.exact else assert_close
    equal(results(optimizer, ours), results(oracle, theirs), **{"rtol": 1e-4, "atol": 1e-4} if row.reduces else {})


def switches(row):
    """Return the options of a row's groups that are on or off."""
    optimizer = row.build([torch.zeros(2, 2, requires_grad=True)], {})
    own = [name for name, value in optimizer.param_groups[0].items() if isinstance(value, bool)]
    around = [name for name in ("gradient_centralization", *DIRECTED) if name in row.ours.spec.step_options]
    return sorted({*own, *around} - {*ENGINE_OPTIONS, "train_mode"})


def switched(row, engine, names):
    """Return what training comes to while one switch after the other is turned, and turned back."""
    params, found = some(), {}
    optimizer = row.build(groups(params), unclipped(row), engine)
    train(optimizer, params, torch.float32, steps=BEFORE)
    for name in names:
        before = [group.get(name, False) for group in optimizer.param_groups]
        for group, value in zip(optimizer.param_groups, before, strict=True):
            group[name] = not value
        try:
            train(optimizer, params, torch.float32, steps=AFTER)
        except (ValueError, RuntimeError) as error:  # some do not go with others
            found[f"{name} is refused"] = str(error)
        else:
            found |= {f"{key}, with {name}": value.clone() for key, value in results(optimizer, params).items()}
        for group, value in zip(optimizer.param_groups, before, strict=True):
            group[name] = value
    return found


@each_row(ELEMENTWISE)
def test_every_switch_counts_at_the_next_step(row):
    """As it counts where nothing is kept from step to step."""
    names = switches(row)
    for engine, some_names in (("cpu", names[::2]), ("foreach", names[1::2])):
        assert_close(switched(row, engine, some_names), switched(row, "eager", some_names))


@pytest.mark.in_turn("kind")
@pytest.mark.parametrize("kind", ["negated", "conjugated"])
@each_row(ELEMENTWISE)
@each_engine
def test_gradients_may_be_lazily_negated_or_conjugated(engine, row, kind):
    """Torch marks such views with a bit and leaves their memory as it is."""
    values = normals(torch.complex64, seed=1)(3, 20)
    start = values[0] if kind == "conjugated" else values[0].real.clone()
    lazy, plain = start.clone().requires_grad_(), start.clone().requires_grad_()
    optimizer, twin = row.build([lazy], row.all_flags(), engine), row.build([plain], row.all_flags(), engine)
    for value in values:
        lazy.grad = value.conj() if kind == "conjugated" else value.conj().imag
        plain.grad = lazy.grad.resolve_conj().resolve_neg().clone()
        optimizer.step()
        twin.step()
    assert torch.equal(lazy, plain)


@pytest.mark.in_turn("engine")
@each_row(ELEMENTWISE)
@each_engine
def test_gradients_may_change_their_strides(engine, row):
    ours, plain = (normals(torch.float32, seed=1)(4, 6).requires_grad_() for _ in range(2))
    optimizer, twin = row.build([ours], row.all_flags(), engine), row.build([plain], row.all_flags(), engine)
    for step, layout in enumerate(("rows", "rows", "columns", "columns", "one", "one", "rows", "rows", "strided")):
        grad = normals(torch.float32, seed=step)(4, 6) if layout != "one" else torch.ones(1, 1).expand(4, 6)
        ours.grad = {"columns": grad.t().contiguous().t(), "strided": grad.repeat_interleave(2, 1)[:, ::2]}.get(
            layout, grad
        )
        plain.grad = grad.contiguous()
        optimizer.step()
        twin.step()
    assert torch.equal(ours, plain)


@each_row([row for row in SPARSE if row.elementwise])
@each_engine
def test_gradients_may_be_sparse_in_some_steps_and_dense_in_others(engine, row):
    for flags in row.flag_variants():
        options = {**flags, "weight_decay": 0}
        ours, plain = (torch.ones(6, 2, requires_grad=True) for _ in range(2))
        optimizer, twin = row.build([ours], options, engine), row.build([plain], options, engine)
        for step, layout in enumerate(("sparse", "sparse", "dense", "dense", "empty", "sparse", "sparse")):
            grad = torch.zeros(6, 2)
            grad[step % 6] = 0.0 if layout == "empty" else step + 1.0
            plain.grad = grad
            ours.grad = grad if layout == "dense" else grad.to_sparse(1)
            optimizer.step()
            twin.step()
        assert_close({"param": ours}, {"param": plain})


@pytest.mark.in_turn("engine")
@each_row(ELEMENTWISE)
@each_engine
def test_parameters_may_be_swapped(engine, row):
    """As `module.to` does under `torch.__future__.set_swap_module_params_on_conversion`."""
    param, other = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.full((3,), 9.0))
    at_once = {"silent_sgd_phase": False} if "silent_sgd_phase" in row.defaults else {}
    optimizer = row.build([param], at_once, engine)
    for _ in range(2):
        param.grad = torch.ones(3)
        optimizer.step()
    other.grad = torch.ones(3)
    param.grad = torch.ones(3)
    torch.utils.swap_tensors(param, other)
    optimizer.step()
    assert (param > 5).all()
    assert (param < 9).all()


@pytest.mark.in_turn("engine")
@each_row(ELEMENTWISE)
@each_engine
def test_flags_switched_on_later_count(engine, row):
    """Torch raises KeyError for buffers that are missing; here they start as at the first step."""
    params = some()
    off = {name: FLAGS[name][0] for name in row.all_flags()}
    optimizer = row.build(groups(params), off, engine)
    train(optimizer, params, torch.float32, steps=BEFORE)
    set_option(**row.all_flags())(optimizer, params)
    train(optimizer, params, torch.float32, steps=AFTER)
    slots = {slot.name for slot in row.ours.slots}
    assert slots <= optimizer.state[params["matrix"]].keys()
    assert all(param.isfinite().all() for param in params.values())


@pytest.mark.in_turn("engine")
@each_row(ELEMENTWISE)
@each_engine
def test_a_model_in_another_dtype_goes_on(engine, row):
    """After `model.double()` the state is still in float32, and neither is lost."""
    optimizer, params = started(row, engine)
    twin, theirs = started(row, "eager")
    theirs = {name: param.detach().double().requires_grad_() for name, param in theirs.items()}
    oracle = row.build_oracle(groups(theirs), row.all_flags())
    saved = twin.state_dict()
    for group in saved["param_groups"]:
        group.update(dict.fromkeys(group.keys() & {"foreach", "fused"}, None))
    oracle.load_state_dict(saved)
    for param in params.values():
        param.data = param.data.double()
        param.grad = None
    train(optimizer, params, torch.float64, steps=AFTER)
    train(oracle, theirs, torch.float64, steps=AFTER)
    assert_close(
        {n: p.detach() for n, p in params.items()}, {n: p.detach() for n, p in theirs.items()}, rtol=1e-5, atol=1e-6
    )
    assert all(param.dtype is torch.float64 for param in params.values())


@pytest.mark.in_turn("copied")
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"]
)
@each_row(DENSE)
@each_engine
def test_copies_go_on(engine, row, copied):
    params = some(admits=row.admits)
    optimizer = row.build(groups(params), row.all_flags(), row.engines([engine])[0])
    train(optimizer, params, torch.float32, steps=BEFORE)
    twin, theirs = copied((optimizer, params))
    for stepped, tensors in ((optimizer, params), (twin, theirs)):
        train(stepped, tensors, torch.float32, steps=AFTER)
    assert_same(results(twin, theirs), results(optimizer, params))


@each_row(ELEMENTWISE)
def test_engines_may_be_changed_between_steps(row):
    ours, theirs = some(), some()
    optimizer, oracle = row.build(groups(ours), row.all_flags()), row.build_oracle(groups(theirs), row.all_flags())
    for step, options in enumerate([options for options in ENGINES.values() for _ in range(3)] * 2):
        for group in optimizer.param_groups:
            group.update({"foreach": None, "fused": None} | options)
        train(optimizer, ours, torch.float32, steps=[step])
        train(oracle, theirs, torch.float32, steps=[step])
    assert_close(results(optimizer, ours), results(oracle, theirs))
