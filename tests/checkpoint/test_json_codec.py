"""Plain data: it comes back with its very types and bits, and what is none is refused by its place."""

import json
import math
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import surefoot
from surefoot.checkpoint.json_codec import decode, encode

quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def through(value):
    """Write and read a value, by way of JSON text."""
    tensors = {}

    def keep(tensor, path):
        tensors[f"t{len(tensors)}"] = tensor
        return f"t{len(tensors) - 1}"

    return decode(json.loads(json.dumps(encode(value, ("value",), keep), allow_nan=False)), tensors.__getitem__)


def same(left, right):
    """Whether two values are equal in types, order and bits."""
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        factories = [getattr(side, "default_factory", None) for side in (left, right)]
        return factories[0] == factories[1] and same([*left.items()], [*right.items()])
    if isinstance(left, list | tuple | deque):
        lengths = [getattr(side, "maxlen", 0) for side in (left, right)]
        return lengths[0] == lengths[1] and len(left) == len(right) and all(map(same, left, right))
    return exact(left) == exact(right)


def exact(value):
    """Give something that is equal only for equal bits."""
    if isinstance(value, np.ndarray | np.generic):
        return value.dtype, value.shape, value.tobytes()
    if isinstance(value, complex):
        return value.real.hex(), value.imag.hex()
    return value.hex() if isinstance(value, float) else value


_keys = st.text(max_size=5) | st.integers() | st.booleans() | st.none() | st.floats(allow_nan=False) | st.just("$")
_leaves = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.complex_numbers()
    | st.sampled_from([torch.float32, torch.bfloat16, torch.device("cuda:3"), torch.Size([2, 3])])
    | st.floats(width=32).map(np.float32) | st.integers(0, 255).map(np.uint8) | st.floats().map(np.float64)
    | st.sets(st.integers()) | st.frozensets(st.text(max_size=2)) | st.lists(st.text(max_size=1)).map(Counter)
)  # fmt: skip
_values = st.recursive(
    _leaves,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=3).map(tuple)
        | st.lists(inner, max_size=3).map(lambda items: deque(items, maxlen=5))
        | st.dictionaries(_keys, inner, max_size=3)
        | st.dictionaries(_keys, inner, max_size=3).map(OrderedDict)
        | st.dictionaries(_keys, inner, max_size=3).map(lambda items: defaultdict(list, items))
    ),
    max_leaves=12,
)


@quick
@given(_values)
def test_values_come_back_with_their_types_and_bits(value):
    assert same(through(value), value)


@pytest.mark.parametrize(
    "value",
    [
        math.inf,
        -0.0,
        5e-324,
        2**2000,
        -(2**63),
        "\ud800",
        {"$": 1, "of": 2},
        {1: "a", "1": "b", (1, 2): "c"},
        [[]],
        deque([1, 2]),
        defaultdict(None, {1: 2}),
        np.arange(6).reshape(2, 3).T,
        np.array(3.0, dtype=">f4").astype(">f4")[()],
        np.zeros((0, 3), dtype=np.uint16),
        np.array(True),
        np.complex64(1 + 2j),
    ],
)
def test_values_that_are_easily_lost(value):
    assert same(through(value), value)


def test_tensors_come_back_wherever_they_are():
    value = {"a": [torch.ones(2), (torch.tensor(3),)], "p": torch.nn.Parameter(torch.zeros(1))}
    found = through(value)
    assert torch.equal(found["a"][0], torch.ones(2))
    assert found["a"][1][0].item() == 3
    assert type(found["p"]) is torch.Tensor


Point = namedtuple("Point", "x y")  # noqa: PYI024 (what is refused)


class Text(str):
    """A string that is more than one."""

    __slots__ = ()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": {"fn": print}}, r"extra['a']['fn'] is a builtin_function_or_method, which is not plain data and cannot"),
        ([1, (2, lambda: 0)], "extra[1][1] is a function"),
        ({"x": Point(1, 2)}, "extra['x'] is a test_json_codec.Point, which is not plain data"),
        ({"x": Text("a")}, "extra['x'] is a test_json_codec.Text"),
        ({Text("a"): 1}, "extra is a test_json_codec.Text"),
        ({"x": torch.ones(2).to_sparse()}, "extra['x'] is a tensor that is torch.sparse_coo; only dense tensors"),
        ({"x": torch.ones(2, device="meta")}, "extra['x'] is a tensor that is on the meta device"),
        ({"x": np.array(["a"])}, "extra['x'] is an array of <U1; only numbers and booleans"),
        ({"x": np.array([object()])}, "extra['x'] is an array of object"),
        ({"x": np.datetime64("2026-01-01")}, "extra['x'] is a numpy datetime64[D]; only numbers and booleans"),
        ({"x": torch.qint8}, "extra['x'] is torch.qint8, a dtype that cannot be saved; save its name"),
        ({"x": torch.zeros(4, dtype=torch.uint8).view(torch.bits8)}, "extra['x'] is a tensor of torch.bits8, which"),
        ({"x": defaultdict(lambda: 1)}, "extra['x'] is a defaultdict whose factory is"),
        ({"x": type}, "extra['x'] is a type"),
        ({"x": range(3)}, "extra['x'] is a range"),
    ],
)  # fmt: skip
def test_what_is_not_plain_data_is_refused_by_its_place(tmp_path, value, message):
    with pytest.raises(TypeError) as caught:
        surefoot.save(tmp_path, extra=value)
    assert str(caught.value).startswith(message)
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:.*quantize:UserWarning")
def test_a_quantized_tensor_is_refused(tmp_path):
    value = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    with pytest.raises(TypeError, match=r"extra\['x'\] is a tensor that is quantized; only dense tensors"):
        surefoot.save(tmp_path, extra={"x": value})


def test_a_value_that_contains_itself_is_refused(tmp_path):
    value = []
    value.append(value)
    with pytest.raises(ValueError, match=r"extra\[0\]\[0\]\[0\]... is nested more than 64 deep, or contains itself"):
        surefoot.save(tmp_path, extra=value)


def test_a_header_that_no_reader_would_take_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"plain data take [\d,]+ bytes, at most 67,108,864 are allowed; give large lists as"
    ):
        surefoot.save(tmp_path, extra="x" * (65 << 20))


def test_schedulers_with_functions_are_saved_and_with_objects_too(tmp_path):
    class Decay:
        def __init__(self):
            self.rate = 0.5

        def __call__(self, epoch):
            return self.rate**epoch

    def make(optimizer):
        return surefoot.lr_scheduler.LambdaLR(optimizer, Decay())

    optimizer = surefoot.SGD([torch.nn.Parameter(torch.ones(1))])
    scheduler = make(optimizer)
    scheduler.lr_lambdas[0].rate = 0.25
    path = surefoot.save(tmp_path, scheduler=scheduler)
    other = make(surefoot.SGD([torch.nn.Parameter(torch.ones(1))]))
    surefoot.load(path, scheduler=other)
    assert other.lr_lambdas[0].rate == 0.25
