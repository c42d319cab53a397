"""The GPU engine on a GPU: `pytest -m gpu`, in a few minutes, with nothing but PyTorch for CUDA and pytest.

Every test is skipped, and says so, where there is no CUDA device.
"""

import pytest
import torch

import surefoot

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),
]

RULES = {
    "SGD": (surefoot.SGD, {}),
    "SGD momentum": (surefoot.SGD, {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1}),
    "SGD nesterov": (surefoot.SGD, {"momentum": 0.9, "nesterov": True, "maximize": True}),
    "Adam": (surefoot.Adam, {}),
    "Adam amsgrad": (surefoot.Adam, {"amsgrad": True, "weight_decay": 0.1}),
    "AdamW": (surefoot.AdamW, {}),
    "NAdam": (surefoot.NAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    "RAdam": (surefoot.RAdam, {"betas": (0.9, 0.7)}),
    "Adamax": (surefoot.Adamax, {"weight_decay": 0.1}),
    "Adadelta": (surefoot.Adadelta, {"lr": 1.0}),
    "Adagrad": (surefoot.Adagrad, {"lr_decay": 0.1}),
    "RMSprop": (surefoot.RMSprop, {}),
    "RMSprop centered": (surefoot.RMSprop, {"centered": True, "momentum": 0.9, "alpha": 0.5}),
    "Rprop": (surefoot.Rprop, {}),
    "ASGD": (surefoot.ASGD, {"t0": 2, "lambd": 0.1}),
}
"""Every elementwise optimizer, with the flags that change its kernel most."""
OWN_STEP = {
    "Muon": (surefoot.Muon, {}),
    "Muon of rows": (surefoot.Muon, {"normuon": True, "cautious": True, "cautious_weight_decay": True, "num_heads": 2}),
    "Adafactor": (surefoot.Adafactor, {"weight_decay": 0.1}),
}
SHAPES = [(), (0,), (1,), (7,), (768,), (1024,), (1000,), (1025,), (50, 40), (64, 3, 7, 7), (300_007,)]
rules = pytest.mark.parametrize("name", RULES)


def made(dtype=torch.float32, device="cuda", seed=0):
    """Make parameters of many sizes and layouts, the same at each call."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    plain = [normal(*shape) for shape in SHAPES]
    laid_out = [normal(8, 4, 3, 3).to(memory_format=torch.channels_last), normal(30, 20).t(), normal(8, 10)[:, ::2]]
    return [tensor.requires_grad_() for tensor in (*plain, *laid_out, normal(4099)[3:], normal(5000)[4:4084])]


def set_grads(params, step):
    """Return the gradients of a step; in odd steps some are laid out otherwise than their parameter."""
    generator = torch.Generator().manual_seed(1000 + step)
    for position, param in enumerate(params):
        grad = torch.randn(param.shape, generator=generator).to(param.device, param.dtype)
        turned = step % 2 and param.dim() == 4 and position % 2
        param.grad = grad.to(memory_format=torch.channels_last) if turned else grad


def trained(make, params, steps=8):
    optimizer = make(params)
    for step in range(steps):
        if step == 5:
            for group in optimizer.param_groups:
                group["lr"] *= 0.5
        set_grads(params, step)
        optimizer.step()
    return torch.cat([param.detach().double().flatten() for param in params])


def oracle(cls):
    return getattr(torch.optim, cls.__name__)


def used_engines(optimizer):
    return {run.engine.__name__ for run in optimizer._step_cache.runs}


# The same answers


@rules
def test_no_farther_from_float64_than_torch(name):
    cls, options = RULES[name]
    exact = [param.detach().double().requires_grad_() for param in made()]
    exact = trained(lambda params: oracle(cls)(params, **options, foreach=False), exact)
    theirs = trained(lambda params: oracle(cls)(params, **options, foreach=cls is not surefoot.ASGD), made()) - exact
    for way in ({}, {"fused": True}, {"capturable": True}):
        ours = trained(lambda params, way=way: cls(params, **options, **way), made()) - exact
        assert ours.square().mean().sqrt() <= 1.1 * theirs.square().mean().sqrt()
        assert ours.abs().max() <= 1.5 * theirs.abs().max()


@rules
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes(name, dtype):
    """As the eager engine, which computes 16 bits in float32 and rounds once."""
    cls, options = RULES[name]
    expected = trained(lambda params: cls(params, **options, foreach=False), made(dtype), steps=4)
    actual = trained(lambda params: cls(params, **options), made(dtype), steps=4)
    tolerance = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    assert (actual == expected).double().mean() > (0.98 if dtype.itemsize == 2 else 0.0)


def test_state_wider_than_parameters_and_complex_parameters():
    for dtype, options in ((torch.bfloat16, {"state_dtype": torch.float32}), (torch.complex64, {})):
        found = []
        for way in ({}, {"foreach": False}):
            params = [torch.ones(1000, dtype=dtype, device="cuda").requires_grad_() for _ in range(3)]
            optimizer = surefoot.AdamW(params, lr=0.1, **options, **way)
            for step in range(4):
                for param in params:
                    param.grad = torch.full_like(param, step - 1.5)
                optimizer.step()
            found.append(torch.cat([param.detach() for param in params]))
        torch.testing.assert_close(*found, rtol=0.02, atol=1e-3)


def test_the_engine_is_the_default():
    for way in ({}, {"fused": True}, {"capturable": True}):
        params = made()
        optimizer = surefoot.AdamW(params, **way)
        set_grads(params, 0)
        optimizer.step()
        assert used_engines(optimizer) == {"surefoot.engines.gpu"}


@rules
def test_nan_inf_denormals_and_signed_zero(name):
    """Denormals are neither flushed nor rounded otherwise than on the host."""
    cls, options = RULES[name]
    info = torch.finfo(torch.float32)
    finite = [0.0, -0.0, 1.0, -1.5, 1e-20, info.tiny, -info.tiny / 4, info.tiny * info.eps]
    values = torch.tensor([*finite, torch.inf, -torch.inf, torch.nan])
    found = []
    for device, engine in (("cuda", {}), ("cpu", {"foreach": False})):
        param = values.repeat_interleave(len(values)).to(device).requires_grad_()
        optimizer = cls([param], **options, **engine)
        for step in range(4):
            param.grad = values.roll(3 * step).repeat(len(values)).to(device)
            optimizer.step()
        found.append([t.cpu() for t in (param.detach(), *optimizer.state[param].values()) if torch.is_tensor(t)])
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, equal_nan=True, rtol=1e-5, atol=1e-44)


def test_every_operation():
    class Everything(surefoot.Optimizer):
        def __init__(self, params, lr=0.5, **options):
            super().__init__(params, {"lr": lr, **options})

        @staticmethod
        def update(param, grad, c, flags):
            x = torch.exp(-torch.abs(grad)) + torch.tanh(param) * torch.rsqrt(torch.abs(param) + 1.0)
            x = torch.atan2(x, grad)
            y = torch.pow(torch.abs(grad) + 1.0, c.lr * 3) + torch.log(x * x + 1.0)
            return torch.clamp(param - c.lr * y, -2.0, 2.5) + torch.where(grad > 0, torch.sign(param), 0.0)

    ours = trained(Everything, made())
    exact = trained(
        lambda params: Everything(params, foreach=False),
        [param.detach().double().requires_grad_() for param in made()],
    )
    torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)


def test_offsets_beyond_32_bits():
    size = 2**31 + 1030
    if torch.cuda.mem_get_info()[0] < 5 * size:
        pytest.skip(f"needs {5 * size / 1e9:.0f} GB of free device memory")
    param = torch.zeros(size, dtype=torch.bfloat16, device="cuda").requires_grad_()
    param.grad = torch.ones_like(param)
    surefoot.SGD([param], lr=1.0).step()
    assert param.detach().min() == param.detach().max() == -1


def test_only_its_own_elements_are_written():
    base = torch.arange(60.0, device="cuda")
    param = base[3:51].view(8, 6)[:, ::2].detach().requires_grad_()
    param.grad = torch.ones(1, device="cuda").expand(8, 3)
    before = base.clone()
    surefoot.SGD([param], lr=1.0).step()
    mine = torch.zeros(60, dtype=torch.bool, device="cuda")
    mine[3:51].view(8, 6)[:, ::2] = True
    assert torch.equal(base, torch.where(mine, before - 1, before))


# Graphs


def model():
    torch.manual_seed(0)
    layers = [torch.nn.Linear(64, 100), torch.nn.Tanh(), torch.nn.Linear(100, 8, bias=False)]
    return torch.nn.Sequential(*layers).cuda()


def replayed(cls, options, *, graph, only_matrices, replays=100):
    """Train: forward, backward and step, after three steps of warming up either replayed or not."""
    net, generator = model(), torch.Generator("cuda").manual_seed(1)
    params = [param for param in net.parameters() if param.dim() == 2 or not only_matrices]
    lr = torch.tensor(0.01, device="cuda")
    optimizer = cls(params, lr=lr, capturable=True, **options)
    batch = torch.empty(32, 64, device="cuda")

    def train():
        net.zero_grad(set_to_none=True)
        net(batch).square().mean().backward()
        optimizer.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            batch.normal_(generator=generator)
            train()
    torch.cuda.current_stream().wait_stream(side)
    recorded = torch.cuda.CUDAGraph()
    if graph:
        with torch.cuda.graph(recorded):
            train()
    for step in range(replays):
        batch.normal_(generator=generator)
        lr.mul_(1.01 if step % 3 else 0.97)
        if graph:
            recorded.replay()
        else:
            train()
        if step == 50:  # a step outside of the graph, whose gradients stand elsewhere
            for param in net.parameters():
                param.grad = torch.full_like(param, 0.01)
            optimizer.step()
    state = [value for param in params for value in optimizer.state[param].values()]
    return [tensor.detach().clone() for tensor in (*net.parameters(), *state)]


@pytest.mark.parametrize("name", [*RULES, *OWN_STEP])
def test_a_replayed_step_has_the_bits_of_one_that_is_not(name):
    cls, options = (RULES | OWN_STEP)[name]
    options = {key: value for key, value in options.items() if key != "lr"}
    ways = [replayed(cls, options, graph=graph, only_matrices=cls is surefoot.Muon) for graph in (False, True)]
    for actual, expected in zip(*ways, strict=True):
        assert torch.equal(actual.nan_to_num(1e30), expected.nan_to_num(1e30))


def test_several_graphs_of_one_optimizer():
    params = [torch.ones(1000, device="cuda").requires_grad_() for _ in range(3)]
    optimizer = surefoot.Adam(params, capturable=True)
    for param in params:
        param.grad = torch.ones_like(param)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    graphs = []
    for scale in (1.0, -1.0, 2.0, -2.0, 3.0, -3.0):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for param in params:
                param.grad = torch.full_like(param, scale)
            optimizer.step()
        graphs.append(graph)
    for graph in graphs:
        graph.replay()
    reference = torch.ones(1000, device="cuda").requires_grad_()
    eager = surefoot.Adam([reference], foreach=False)
    for scale in (1.0, 1.0, -1.0, 2.0, -2.0, 3.0, -3.0):
        reference.grad = torch.full_like(reference, scale)
        eager.step()
    for param in params:
        torch.testing.assert_close(param, reference)


@pytest.mark.parametrize("cls", [surefoot.AdamW, surefoot.Muon, surefoot.Adafactor])
def test_capture_without_capturable_is_refused(cls):
    param = torch.ones(8, 8, device="cuda").requires_grad_()
    param.grad = torch.ones_like(param)
    optimizer = cls([param])
    optimizer.step()
    before = param.detach().clone()
    with (
        pytest.raises(RuntimeError, match="Attempting CUDA graph capture of step.. for an instance of " + cls.__name__),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        optimizer.step()
    torch.cuda.synchronize()
    assert torch.equal(param, before)


def test_a_first_step_that_is_captured_is_refused():
    param = torch.ones(8, 8, device="cuda").requires_grad_()
    param.grad = torch.ones_like(param)
    with (
        pytest.raises(RuntimeError, match="take a step outside of the capture first"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        surefoot.AdamW([param], capturable=True).step()


# Waiting


@pytest.fixture
def no_waiting():
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("way", [{}, {"fused": True}, {"capturable": True}], ids=["default", "fused", "capturable"])
@rules
def test_a_step_waits_for_nothing(name, way, no_waiting):
    cls, options = RULES[name]
    params = made()
    step_without_waiting(cls(params, **options, **way), params, no_waiting)


def step_without_waiting(optimizer, params, no_waiting):
    """Take steps, the first two of which may wait."""
    for step in range(4):
        set_grads(params, step)
        if step > 1:
            no_waiting()
        optimizer.step()
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", OWN_STEP)
@pytest.mark.parametrize("capturable", [False, True])
def test_steps_of_their_own_wait_for_nothing(name, capturable, no_waiting):
    cls, options = OWN_STEP[name]
    params = [torch.randn(32, 48, device="cuda").requires_grad_() for _ in range(4)]
    optimizer = cls(params, lr=torch.tensor(0.01, device="cuda"), capturable=capturable, **options)
    step_without_waiting(optimizer, params, no_waiting)


def test_tensor_hyperparameters_wait_for_nothing(no_waiting):
    params = made()
    numbers = {name: torch.tensor(value, device="cuda") for name, value in (("lr", 0.01), ("weight_decay", 0.1))}
    betas = (torch.tensor(0.9, device="cuda"), torch.tensor(0.99, device="cuda"))
    optimizer = surefoot.AdamW(params, **numbers, betas=betas, capturable=True)
    step_without_waiting(optimizer, params, no_waiting)
    exact = surefoot.AdamW(made(), lr=0.01, weight_decay=0.1, betas=(0.9, 0.99), foreach=False)
    for step in range(4):
        set_grads(exact.param_groups[0]["params"], step)
        exact.step()
    for param, expected in zip(params, exact.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(param, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OWN_STEP)
def test_steps_of_their_own_are_those_of_the_host(name):
    """Muon's products are rounded to bfloat16, on each device in its own order."""
    cls, options = OWN_STEP[name]
    found = []
    for device in ("cpu", "cuda"):
        generator = torch.Generator().manual_seed(0)
        params = [torch.randn(32, 48, generator=generator).to(device).requires_grad_() for _ in range(4)]
        optimizer = cls(params, lr=0.01, **options)
        for step in range(3):
            set_grads(params, step)
            optimizer.step()
        found.append(torch.cat([param.detach().cpu() for param in params]))
    tolerance = 2e-3 if cls is surefoot.Muon else 1e-5
    torch.testing.assert_close(*found, rtol=tolerance, atol=tolerance)


# What is measured


def test_norms_are_those_of_float64():
    """Of many sizes and layouts, with squares that no float32 holds; twice the same bits."""
    params = [*made(), torch.ones(2_000_003, device="cuda").requires_grad_()]
    found = []
    for _ in range(2):
        optimizer = surefoot.SGD(params, lr=0.0, max_grad_norm=1.0, telemetry=True)
        set_grads(params, 1)
        params[5].grad *= 1e30
        optimizer.step()
        (run,) = optimizer._step_cache.runs
        assert run.engine.__name__ == "surefoot.engines.gpu"
        squares = torch.stack([param.grad.double().square().sum() for param in params])
        torch.testing.assert_close(run.slice.gradients[:, 0], squares, rtol=1e-12, atol=0.0)
        largest = torch.stack([param.grad.double().abs().amax() if param.numel() else squares[1] for param in params])
        assert torch.equal(run.slice.gradients[:, 1], largest)
        ours = torch.stack([param.detach().double().square().sum() for param in params])
        torch.testing.assert_close(run.slice.sums[:, 1], ours, rtol=1e-5, atol=0.0)
        found.append(torch.cat([run.slice.gradients, run.slice.sums], dim=1))
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_strange_gradients_are_counted(dtype):
    param = torch.ones(9000, dtype=dtype, device="cuda").requires_grad_()
    param.grad = torch.ones_like(param)
    param.grad[::1000], param.grad[8999] = torch.nan, -torch.inf
    optimizer = surefoot.AdamW([param], telemetry=True)
    optimizer.step()
    sums = optimizer.telemetry.latest().sums[0]
    assert sums[4] == 10
    assert torch.isnan(torch.tensor(sums[[0, 3]])).all()


def test_clipping_is_torchs():
    for dtype in (torch.float32, torch.bfloat16):
        params, expected = made(dtype), made(dtype)
        optimizer = surefoot.SGD(params, lr=0.1, max_grad_norm=0.5)
        plain = surefoot.SGD(expected, lr=0.1, foreach=False)
        for step in range(4):
            set_grads(params, step)
            set_grads(expected, step)
            optimizer.step()
            torch.nn.utils.clip_grad_norm_([param for param in expected if param.numel()], 0.5)
            plain.step()
        for param, other in zip(params, expected, strict=True):
            tolerance = 1e-5 if dtype is torch.float32 else 0.02
            torch.testing.assert_close(param, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("way", [{}, {"fused": True}, {"capturable": True}], ids=["default", "fused", "capturable"])
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_measuring_waits_for_nothing(name, way, no_waiting):
    cls, options = RULES[name]
    params = made()
    optimizer = cls(params, **options, **way, max_grad_norm=1.0, telemetry=True, ema=0.9)
    step_without_waiting(optimizer, params, no_waiting)
    assert torch.isfinite(torch.tensor(optimizer.telemetry.latest().sums)).all()


def test_a_clipped_step_is_replayed_with_the_same_bits():
    options = {"max_grad_norm": 0.01, "ema": 0.9}
    ways = [replayed(surefoot.AdamW, options, graph=graph, only_matrices=False) for graph in (False, True)]
    assert all(map(torch.equal, *ways))


def test_what_a_scaler_skips_is_measured_as_it_stands():
    param = torch.ones(5000, device="cuda").requires_grad_()
    optimizer = surefoot.AdamW([param], lr=0.1, fused=True, telemetry=True)
    optimizer.grad_scale = torch.full((), 4.0, device="cuda")
    for skipped in (0.0, 1.0):
        optimizer.found_inf = torch.full((), skipped, device="cuda")
        param.grad = torch.full_like(param, 4.0)
        optimizer.step()
    sums = optimizer.telemetry.latest().sums[0]
    square = param.detach().double().square().sum().item()
    assert sums.tolist() == [5000.0, pytest.approx(square, rel=1e-6), 0.0, 1.0, 0.0]


def test_scalars_left_on_the_device_come_home():
    """A step that the host counts reads no step count from the device, whoever has put it there."""
    params = made()
    optimizer = surefoot.Adam(params, capturable=True)
    set_grads(params, 0)
    optimizer.step()
    optimizer.param_groups[0]["capturable"] = False
    for step in range(1, 4):
        set_grads(params, step)
        optimizer.step()
    assert all(entry["step"].is_cpu and entry["step"] == 4 for entry in optimizer.state.values())
    assert used_engines(optimizer) == {"surefoot.engines.gpu"}


# GradScaler


@pytest.mark.parametrize("name", ["SGD momentum", "AdamW", "NAdam", "ASGD", "Adagrad"])
def test_a_grad_scalers_steps(name, no_waiting):
    """Scaling, skipping and counting as if the steps with infinities had not been, and without waiting for any."""
    cls, options = RULES[name]
    params, expected = made(), made()
    optimizer, plain = cls(params, **options, fused=True), cls(expected, **options, foreach=False)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    scaler.scale(torch.ones((), device="cuda"))
    for step in range(6):
        spoilt = step in (0, 3)
        set_grads(params, 2 * step)
        for param in params:
            param.grad *= scaler._scale
        if spoilt:
            params[5].grad[0] = torch.inf
        if step > 3:
            no_waiting()
        scaler.step(optimizer)
        torch.cuda.set_sync_debug_mode("default")
        scaler.update()
        if not spoilt:
            set_grads(expected, 2 * step)
            plain.step()
    for param, other in zip(params, expected, strict=True):
        torch.testing.assert_close(param, other, rtol=1e-4, atol=1e-5)
        counted = optimizer.state[param].get("step", torch.tensor(4.0))
        assert counted == 4


def test_a_whole_step_with_a_grad_scaler_is_captured():
    param = torch.ones(1000, device="cuda").requires_grad_()
    optimizer = surefoot.AdamW([param], lr=0.1, fused=True, capturable=True)
    optimizer.grad_scale, optimizer.found_inf = torch.full((), 4.0, device="cuda"), torch.zeros((), device="cuda")
    param.grad = torch.full_like(param, 4.0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    graph.replay()
    optimizer.found_inf.fill_(1.0)
    before = param.detach().clone()
    graph.replay()
    assert torch.equal(param, before)
    optimizer.found_inf.fill_(0.0)
    graph.replay()
    assert not torch.equal(param, before)
    assert optimizer.state[param]["step"] == 3


# Streams, devices, checkpoints


def test_steps_on_several_streams():
    """Each optimizer on a stream of its own, then all of them on another."""
    ways = []
    for streams in (1, 3):
        pools = [torch.cuda.Stream() for _ in range(streams)]
        params = [made(seed=seed) for seed in range(3)]
        optimizers = [surefoot.AdamW(some, lr=0.01) for some in params]
        for step in range(10):
            for position, optimizer in enumerate(optimizers):
                set_grads(params[position], step)
                stream = pools[(position + step // 5) % streams]
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    optimizer.step()
                torch.cuda.current_stream().wait_stream(stream)
        ways.append(torch.cat([param.detach().flatten() for some in params for param in some]))
    assert torch.equal(*ways)


def test_several_devices_in_one_optimizer():
    """The host is a device too."""
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    params = [torch.ones(3000, device=device).requires_grad_() for device in devices]
    optimizer = surefoot.AdamW(params, lr=0.1)
    for step in range(4):
        for param in params:
            param.grad = torch.full_like(param, step - 1.5)
        optimizer.step()
    for param in params[1:]:
        torch.testing.assert_close(param.cpu(), params[0])


@pytest.mark.parametrize("way", [{}, {"fused": True}, {"capturable": True}], ids=["default", "fused", "capturable"])
def test_a_checkpoint_of_the_host_goes_on_here(way):
    host, params = made(device="cpu"), made()
    optimizer = surefoot.NAdam(host, lr=0.01)
    for step in range(2):
        set_grads(host, step)
        optimizer.step()
    ours = surefoot.NAdam(params, **way)
    ours.load_state_dict({"state": optimizer.state_dict()["state"], "param_groups": ours.state_dict()["param_groups"]})
    ours.param_groups[0]["lr"] = 0.01
    with torch.no_grad():
        for param, source in zip(params, host, strict=True):
            param.copy_(source)
    for step in range(2, 4):
        for some, stepped in ((host, optimizer), (params, ours)):
            set_grads(some, step)
            stepped.step()
    for param, source in zip(params, host, strict=True):
        torch.testing.assert_close(param.cpu(), source, rtol=1e-4, atol=1e-5)


def test_plans_survive_gradients_that_are_made_anew():
    params = made()
    optimizer = surefoot.AdamW(params)
    found = []
    for step in range(0, 8, 2):
        set_grads(params, step)
        optimizer.step()
        optimizer.zero_grad()
        found.append(optimizer._step_cache.runs)
    assert all(runs is found[0] for runs in found)
