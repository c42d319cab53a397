"""What users do between steps, with short numbers: kernels do what torch's operations do, bit for bit.

Gradients, rates and momenta are small multiples of powers of two, so that arithmetic is exact on every engine.
"""

import copy
import io

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import surefoot

STORAGE = (
    {},
    {"rounding": "stochastic"},
    {"master_weight_bits": 24},
    {"master_weight_bits": 24, "rounding": "stochastic"},
    {"master_weight_bits": 32},
)
SHAPES = ((41, 128), (37, 125), (2, 3, 31, 33), (5,), (0, 3), ())


class Twin:
    """The same parameters, optimizer and changes on one engine."""

    def __init__(self, dtype, options, **engine):
        generator = torch.Generator().manual_seed(0)
        self.params = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
        self.optimizer = surefoot.SGD(
            [{"params": self.params[:3]}, {"params": self.params[3:]}], lr=2**-6, momentum=0.5, **options, **engine
        )

    def step(self, seed):
        for number, param in enumerate(self.params):
            generator = torch.Generator().manual_seed(seed + number)
            grad = (torch.randint(-8, 9, param.shape, generator=generator) / 4).to(param.dtype)
            param.grad = torch.empty_like(param).copy_(grad)
        self.optimizer.step()

    def no_gradient(self):
        self.params[0].grad = None
        self.optimizer.step()

    def other_strides(self):
        param = self.params[2]
        param.data = param.data.to(memory_format=torch.channels_last)

    def strided(self):
        wide = torch.zeros(41, 256, dtype=self.params[0].dtype)
        wide[:, ::2] = self.params[0].data
        self.params[0].data = wide[:, ::2]

    def state_gone(self):
        self.optimizer.state.pop(self.params[1], None)

    def zeroed(self):
        with torch.no_grad():
            self.params[0].zero_()

    def stochastic(self):
        self.optimizer.param_groups[0]["rounding"] = "stochastic"

    def nearest(self):
        self.optimizer.param_groups[0]["rounding"] = "nearest"

    def reseeded(self):
        self.optimizer.param_groups[0]["rounding_seed"] = 77

    def in_8_bits(self):
        self.optimizer.param_groups[0]["state_dtype"] = "float8"

    def corrected(self):
        self.optimizer.param_groups[1]["master_weight_bits"] = 32

    def copied(self):
        self.params, self.optimizer = copy.deepcopy((self.params, self.optimizer))

    def reloaded(self):
        file = io.BytesIO()
        torch.save(self.optimizer.state_dict(), file)
        file.seek(0)
        self.optimizer.load_state_dict(torch.load(file, weights_only=True))

    def clipped(self):
        self.optimizer.step_options.nonfinite = "skip"

    def odd(self):
        self.params[1].grad = torch.full_like(self.params[1], torch.inf)
        self.params[1].grad[0, 0] = torch.nan
        self.optimizer.step()

    def bits(self):
        for number, param in enumerate(self.params):
            for name, value in {"param": param.detach(), **self.optimizer.state[param]}.items():
                yield f"{name} of {number}", value


CHANGES = [name for name in vars(Twin) if not name.startswith("_") and name not in ("step", "bits")]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    st.sampled_from(STORAGE),
    st.sampled_from([None, "float8", torch.float32]),
    st.lists(st.sampled_from(CHANGES), max_size=6),
)
def test_engines_agree_whatever_happens_between_steps(dtype, options, state_dtype, changes):
    twins = [Twin(dtype, options | {"state_dtype": state_dtype}, **engine) for engine in ({"foreach": False}, {})]
    for position, change in enumerate(["nearest", *changes]):
        for twin in twins:
            getattr(twin, change)()
            twin.step(10 * position)
            twin.step(10 * position + 7)
        one, other = (dict(twin.bits()) for twin in twins)
        assert list(one) == list(other)
        for name, value in one.items():
            same = (value == other[name]) | (value.isnan() & other[name].isnan())
            assert value.dtype == other[name].dtype, name
            assert same.all(), (name, change)
