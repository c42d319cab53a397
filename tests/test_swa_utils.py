"""Averaged models: torch's contract, and what is right where torch goes wrong."""

import copy
import inspect
import weakref

import pytest
import torch
import torch.optim.swa_utils as torchs
from torch import nn

from surefoot import swa_utils as ours
from surefoot.lr_scheduler import Schedule
from surefoot.lr_scheduler.schedules import cosine


@pytest.fixture(autouse=True)
def _one_thread():
    """Tensors as small as these are done before a second thread wakes up."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


UPDATES = 20
FUNCTIONS = {
    "swa": lambda lib: {},
    "swa one": lambda lib: {"avg_fn": lib.get_swa_avg_fn()},
    "swa all": lambda lib: {"multi_avg_fn": lib.get_swa_multi_avg_fn()},
    "ema one": lambda lib: {"avg_fn": lib.get_ema_avg_fn(0.9)},
    "ema all": lambda lib: {"multi_avg_fn": lib.get_ema_multi_avg_fn(0.9)},
}


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)).to(dtype)


def train(models, updates=UPDATES):
    """Change all models alike, and update each one's average."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(updates):
        inputs = torch.randn(16, 4, generator=generator)
        noise = [torch.randn(param.shape, generator=generator) for param in models[0][0].parameters()]
        for model, average in models:
            model(inputs.to(next(model.parameters()).dtype))
            with torch.no_grad():
                for param, change in zip(model.parameters(), noise, strict=True):
                    param.add_(change.to(param.dtype), alpha=0.1)
            average.update_parameters(model)


def distance(average, oracle):
    """The largest distance of an average to one in float64, in units of the latter's largest element."""
    pairs = zip(average.module.parameters(), oracle.module.parameters(), strict=True)
    return max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in pairs)


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_averages_are_torchs(kind, use_buffers):
    runs = [(network(), None) for _ in range(2)] + [(network(torch.float64), None)]
    libraries = (ours, torchs, torchs)
    # torch cannot average integers with its own function for many tensors.
    buffers = [use_buffers and not (kind == "swa all" and library is torchs) for library in libraries]
    runs = [
        (model, library.AveragedModel(model, use_buffers=use, **FUNCTIONS[kind](library)))
        for (model, _), library, use in zip(runs, libraries, buffers, strict=True)
    ]
    train(runs)
    mine, theirs, oracle = (average for _, average in runs)
    assert distance(mine, oracle) <= distance(theirs, oracle) * 1.5 + 1e-7
    if "one" in kind or kind == "ema all":
        for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(a, b)
    if buffers[0] == buffers[1]:
        for a, b in zip(mine.buffers(), theirs.buffers(), strict=True):
            assert torch.allclose(a.double(), b.double(), atol=1e-6)
    assert mine.n_averaged.item() == UPDATES
    assert mine.n_averaged.dtype == torch.int64


def test_the_first_update_copies_and_swa_is_the_mean():
    model = nn.Linear(1, 1, bias=False)
    average = ours.AveragedModel(model)
    for value in (2.0, 4.0, 9.0):
        nn.init.constant_(model.weight, value)
        average.update_parameters(model)
    assert average.module.weight.item() == 5.0
    assert average(torch.ones(1, 1)).item() == 5.0


def test_integers_are_averaged_as_numbers():
    for kind, expected in (("swa", 2), ("ema all", 1)):
        for library in (ours, torchs):
            model = nn.BatchNorm1d(2)
            average = library.AveragedModel(model, use_buffers=True, **FUNCTIONS[kind](library))
            for count in (1, 2, 6):
                model.num_batches_tracked.fill_(count)
                average.update_parameters(model)
            assert average.module.num_batches_tracked.item() == expected


def test_complex_and_mixed_dtypes_are_averaged():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.low = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
            self.high = nn.Parameter(torch.zeros(3, dtype=torch.float64))
            self.imaginary = nn.Parameter(torch.zeros(3, dtype=torch.complex64))

    model = Mixed()
    average = ours.AveragedModel(model, multi_avg_fn=ours.get_ema_multi_avg_fn(0.5))
    for value in (0, 1, 1j):
        with torch.no_grad():
            model.low.fill_(abs(value))
            model.high.fill_(abs(value))
            model.imaginary.fill_(value)
        average.update_parameters(model)
    assert average.module.low.tolist() == average.module.high.tolist() == [0.75] * 3
    assert average.module.imaginary.tolist() == [0.25 + 0.5j] * 3


def test_a_float32_average_of_a_bfloat16_model():
    model = network(torch.bfloat16)
    average = ours.AveragedModel(model, multi_avg_fn=ours.get_ema_multi_avg_fn(0.99))
    average.module.float()
    train([(model, average)], 3)
    assert {param.dtype for param in average.parameters()} == {torch.float32}


def test_parameters_of_lazy_modules_are_taken_over():
    """torch fails: the copy's parameters stay without shape."""
    for library, works in ((ours, True), (torchs, False)):
        model = nn.Sequential(nn.LazyLinear(3), *([nn.LazyBatchNorm1d()] if works else []))
        average = library.AveragedModel(model)
        inputs = torch.randn(5, 4)
        model(inputs)
        if not works:
            with pytest.raises((ValueError, RuntimeError)):
                average.update_parameters(model)
            continue
        for _ in range(3):
            average.update_parameters(model)
        assert torch.allclose(average.module[0].weight, model[0].weight)
        model.eval()
        average.eval()
        assert torch.allclose(average(inputs), model(inputs), atol=1e-6)


def test_lazy_modules_that_have_not_run_are_passed_over():
    model = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3))
    average = ours.AveragedModel(model)
    average.update_parameters(model)
    assert torch.equal(average.module[0].weight, model[0].weight)


def test_it_lives_on_its_device_and_in_its_state_dict():
    model = network()
    average = ours.AveragedModel(model, device=torch.device("cpu"))
    train([(model, average)], 4)
    again = ours.AveragedModel(network())
    again.load_state_dict(average.state_dict())
    assert set(average.state_dict()) == set(torchs.AveragedModel(network()).state_dict())
    torchs.AveragedModel(network()).load_state_dict(average.state_dict())
    other = copy.deepcopy(model)
    train([(model, average), (other, again)], 4)
    for a, b in zip(average.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_another_model_is_refused_before_anything_changes():
    model, larger = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    average = ours.AveragedModel(model)
    average.update_parameters(model)
    before = average.module.weight.clone()
    with pytest.raises(ValueError, match="the model has 4 parameters, but the average was made of 2; make a new Aver"):
        average.update_parameters(larger)
    with pytest.raises(
        ValueError, match=r"a tensor of shape \(2, 3\) where the average has \(2, 2\); give the model that"
    ):
        average.update_parameters(nn.Linear(3, 2))
    assert torch.equal(average.module.weight, before)
    assert average.n_averaged.item() == 1


@pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan")])
def test_a_decay_out_of_range_is_refused(decay):
    for make in (ours.get_ema_avg_fn, ours.get_ema_multi_avg_fn):
        with pytest.raises(ValueError, match=f"Invalid decay value {decay} provided"):
            make(decay)


def test_two_functions_are_refused():
    with pytest.raises(AssertionError, match="Only one of avg_fn and multi_avg_fn should be provided"):
        ours.AveragedModel(network(), avg_fn=ours.get_swa_avg_fn(), multi_avg_fn=ours.get_swa_multi_avg_fn())


@pytest.mark.parametrize("name", torchs.__all__)
def test_signatures_are_torchs(name):
    mine, theirs = (inspect.signature(getattr(lib, name)).parameters.values() for lib in (ours, torchs))
    assert [(p.name, p.kind, p.default) for p in mine] == [(p.name, p.kind, p.default) for p in theirs]


def batches(kind):
    generator = torch.Generator().manual_seed(2)
    inputs = [torch.randn(16, 4, generator=generator) for _ in range(5)]
    return {"tensors": inputs, "lists": [[x, 0] for x in inputs], "tuples": [(x, 0) for x in inputs]}[kind]


@pytest.mark.parametrize("kind", ["tensors", "lists", "tuples"])
def test_update_bn_is_torchs(kind):
    models = []
    for library in (ours, torchs):
        model = network()
        model[1].momentum = 0.3
        model.eval()
        library.update_bn(batches(kind), model, torch.device("cpu"))
        assert model[1].momentum == 0.3
        assert not model.training
        models.append(model)
    for a, b in zip(*(model.state_dict().values() for model in models), strict=True):
        assert torch.equal(a, b)


def test_update_bn_puts_everything_back_after_an_exception():
    model = network()
    model[0].eval()
    modes = [module.training for module in model.modules()]
    with pytest.raises(ValueError, match="out of data"):
        ours.update_bn(iter(lambda: (_ for _ in ()).throw(ValueError("out of data")), None), model)
    assert model[1].momentum == 0.1
    assert [module.training for module in model.modules()] == modes


def test_update_bn_puts_statistics_back_after_an_exception():
    model = network()
    model(torch.randn(8, 4))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="out of data"):
        ours.update_bn((torch.randn(8, 4) if number < 2 else fail() for number in range(3)), model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def fail():
    raise ValueError("out of data")


def test_update_bn_without_a_batch_is_refused():
    """torch resets the statistics without a word, which an iterator that was used up comes to as well."""
    model = ours.AveragedModel(network())
    model.module(torch.randn(8, 4))
    before = copy.deepcopy(model.state_dict())
    for loader in ([], iter(())):
        with pytest.raises(ValueError, match=r"the loader gave no batch to compute statistics of: .*; give one that"):
            ours.update_bn(loader, model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_update_bn_without_batch_norm_reads_no_data():
    ours.update_bn(iter([1 / 1, None]), nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"anneal_strategy": "x"}, "anneal_strategy must be one of 'cos' or 'linear', instead got x"),
        ({"anneal_epochs": -1}, "anneal_epochs must be equal or greater than 0, got -1"),
        ({"swa_lr": [0.1, 0.2]}, "swa_lr must have the same length as optimizer.param_groups"),
    ],
)
def test_mistakes_with_swalr_are_named(options, message):
    for library in (ours, torchs):
        optimizer = torch.optim.SGD(network().parameters(), 0.1)
        with pytest.raises(ValueError, match=message):
            library.SWALR(optimizer, **{"swa_lr": 0.1, **options})


def test_swalr_follows_another_schedule():
    optimizer = torch.optim.SGD(network().parameters(), 0.1)
    schedule = Schedule(optimizer, lr=cosine(1, 0, 20))
    optimizer.step()
    for _ in range(10):
        schedule.step()
    swa = ours.SWALR(optimizer, 0.2, anneal_epochs=5, anneal_strategy="linear")
    seen = []
    for _ in range(7):
        swa.step()
        seen.append(optimizer.param_groups[0]["lr"])
    assert seen == pytest.approx([0.08, 0.11, 0.14, 0.17, 0.2, 0.2, 0.2])


# Found by trying to break it


class Bare(torch.nn.Module):
    def __init__(self, *shape, dtype=torch.float32):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))


def test_a_changed_shape_is_refused_later_too():
    for options in ({"multi_avg_fn": ours.get_ema_multi_avg_fn(0.5)}, {"avg_fn": ours.get_ema_avg_fn(0.5)}):
        model = Bare(3)
        average = ours.AveragedModel(model, **options)
        for _ in range(4):
            average.update_parameters(model)
        model.weight.data = torch.full((1,), 5.0)
        for _ in range(2):
            with pytest.raises(ValueError, match="the model has a tensor of shape"):
                average.update_parameters(model)
        assert average.module.weight.tolist() == [0.0] * 3


def test_replaced_memory_of_complex_parameters_is_seen():
    model = Bare(3, dtype=torch.complex64)
    average = ours.AveragedModel(model, multi_avg_fn=ours.get_ema_multi_avg_fn(0.5))
    for _ in range(4):
        average.update_parameters(model)
    model.weight.data = torch.ones(3, dtype=torch.complex64)
    average.update_parameters(model)
    assert average.module.weight.tolist() == [0.5] * 3
    average.module.weight.data = torch.full((3,), 8, dtype=torch.complex64)
    average.update_parameters(model)
    assert average.module.weight.tolist() == [4.5] * 3


def test_an_average_is_freed_at_once_and_keeps_no_model():
    model = Bare(3)
    average = ours.AveragedModel(model, multi_avg_fn=ours.get_ema_multi_avg_fn(0.5))
    for _ in range(3):
        average.update_parameters(model)
    weight = weakref.ref(model.weight)
    del model
    assert weight() is None
    gone = weakref.ref(average)
    del average
    assert gone() is None


# Which tensor belongs to which


def reordered(module, *names):
    """Register tensors anew, so that they come last, as tools do that replace parameters."""
    for name in names:
        tensor = getattr(module, name)
        delattr(module, name)
        if isinstance(tensor, nn.Parameter):
            setattr(module, name, tensor)
        else:
            module.register_buffer(name, tensor)


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_tensors_are_matched_by_name(kind):
    """fairchem#2098: weight and bias, of the same shape, were swapped."""
    model = nn.BatchNorm1d(2)
    with torch.no_grad():
        model.weight.fill_(1), model.bias.fill_(2), model.running_mean.fill_(3), model.running_var.fill_(4)
    average = ours.AveragedModel(model, **FUNCTIONS[kind](ours))
    for count in range(4):
        average.update_parameters(model)
        reordered(model, "weight", "running_mean") if count < 2 else reordered(average.module, "bias")
        seen = {name: tensor.float().mean().item() for name, tensor in average.module.state_dict().items()}
        assert seen == {"weight": 1, "bias": 2, "running_mean": 3, "running_var": 4, "num_batches_tracked": 0}


@pytest.mark.parametrize("compiled", ["model", "average", "both", "layer"])
def test_the_names_of_compiled_modules_are_those_of_what_they_wrap(compiled):
    model = nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 2))
    average = ours.AveragedModel(torch.compile(model, backend="eager") if compiled in ("average", "both") else model)
    with torch.no_grad():
        for index, param in enumerate(model.parameters()):
            param.fill_(index)
    expected = {name: param.detach().clone() for name, param in model.named_parameters()}
    reordered(model[0], "weight")
    if compiled == "layer":
        model[0] = torch.compile(model[0], backend="eager")
    average.update_parameters(torch.compile(model, backend="eager") if compiled in ("model", "both") else model)
    for name, param in average.module.named_parameters():
        assert torch.equal(param, expected[name.replace("_orig_mod.", "")])


def test_a_shared_tensor_has_several_names():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "c": nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    average = ours.AveragedModel(model)
    with torch.no_grad():
        for index, param in enumerate(model.parameters()):
            param.fill_(index)
    expected = {name: param.detach().clone() for name, param in model.named_parameters()}
    first = model.pop("a")
    model["a"] = first  # the shared weight is b's now
    average.update_parameters(model)
    for name, param in average.module.named_parameters():
        assert torch.equal(param, expected[name]), name


def test_other_names_are_matched_by_their_order():
    """A wrapper, such as that of data parallelism, puts its own name before all."""
    model = nn.Linear(2, 3)
    average = ours.AveragedModel(model)
    wrapper = nn.Module()
    wrapper.module = model
    nn.init.constant_(model.weight, 5.0)
    average.update_parameters(wrapper)
    assert torch.equal(average.module.weight, model.weight)
    with pytest.raises(
        ValueError, match=r"weight: the model has a tensor of shape \(2, 2\) where the average has \(3, 2\)"
    ):
        average.update_parameters(nn.Linear(2, 2))


# Inside compiled functions


@pytest.mark.filterwarnings("ignore")  # torch warns of what it does not compile
@pytest.mark.in_turn("made_inside")
@pytest.mark.parametrize("made_inside", [False, True], ids=["", "made inside"])
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_an_average_is_updated_inside_a_compiled_function(kind, made_inside):
    def averaged(*, compiled):
        torch._dynamo.reset()
        model, averages = network(), []

        def train(inputs):
            if made_inside and not averages:
                averages.append(ours.AveragedModel(model, use_buffers=True, **FUNCTIONS[kind](ours)))
            outputs = model(inputs)
            with torch.no_grad():
                for param in model.parameters():
                    param.add_(0.5)
            averages[0].update_parameters(model)
            return outputs.sum()

        if not made_inside:
            averages.append(ours.AveragedModel(model, use_buffers=True, **FUNCTIONS[kind](ours)))
        function = torch.compile(train, backend="eager") if compiled else train
        for _ in range(4):
            function(torch.ones(3, 4))
        return averages[0].state_dict()

    seen, expected = averaged(compiled=True), averaged(compiled=False)
    for name, value in expected.items():
        assert torch.equal(seen[name], value), name


@pytest.mark.filterwarnings("ignore")
def test_functions_for_averages_work_inside_a_compiled_function():
    for make in (ours.get_swa_multi_avg_fn, ours.get_ema_multi_avg_fn):
        function = make()
        seen, expected = ([torch.zeros(3), torch.zeros(2)] for _ in range(2))
        values = [torch.ones(3), torch.ones(2)]
        torch.compile(lambda f=function, s=seen, v=values: f(s, v, 1), backend="eager")()
        function(expected, values, 1)
        for a, b in zip(seen, expected, strict=True):
            assert torch.equal(a, b)
