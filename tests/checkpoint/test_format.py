"""The file: what anyone with safetensors reads, what the header says of values, and where tensors stand."""

import json
import math
import zlib

import pytest
import safetensors
import torch
from checkpoint_helpers import forge, make, minimal, train
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import surefoot
from helpers import assert_same
from surefoot.checkpoint import Checkpoint, header, writer
from surefoot.checkpoint.dtypes import DTYPES
from surefoot.checkpoint.migrate import migrate_file
from surefoot.checkpoint.writer import summarize

SHAPES = {
    "0-d": (),
    "empty": (0, 3),
    "vector": (5,),
    "matrix": (3, 4),
    "channels_last": (2, 3, 4, 5),
}
EASY = [dtype for dtype, stored in DTYPES.items() if not stored.pairs]


def tensor(shape, dtype, seed=0):
    """Make a tensor of any dtype with any bits."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(256, (*shape, DTYPES[dtype].itemsize), generator=generator, dtype=torch.uint8)
    return bits[..., 0] > 99 if dtype is torch.bool else bits.view(dtype)[..., 0]


def bits(value):
    return value.contiguous().view(-1).view(torch.uint8)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_shape_comes_back_with_its_bits(tmp_path, dtype):
    tensors = {name: tensor(shape, dtype) for name, shape in SHAPES.items()}
    tensors["strided"] = tensor((6, 8), dtype)[::2, 1::3]
    tensors["expanded"] = tensor((1, 3), dtype).expand(4, 3)
    tensors["channels_last"] = tensors["channels_last"].contiguous(memory_format=torch.channels_last)
    tensors["transposed"] = tensors["matrix"].clone().T
    found = surefoot.load(surefoot.save(tmp_path, extra=tensors)).extra
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        assert torch.equal(bits(found[name]), bits(value)), name
    for name in ("channels_last", "transposed", "matrix"):
        assert found[name].stride() == tensors[name].stride()


@pytest.mark.parametrize("dtype", EASY, ids=str)
def test_safetensors_reads_the_same(tmp_path, dtype):
    tensors = {name: tensor(shape, dtype) for name, shape in SHAPES.items()}
    path = surefoot.save(tmp_path, extra=tensors, rng=False)
    if dtype is torch.float8_e8m0fnu:  # which its bridge to torch does not know yet
        raw = dict(safetensors.deserialize(path.read_bytes()))
        found = {
            name: torch.frombuffer(one["data"], dtype=dtype).view(one["shape"])
            for name, one in raw.items()
            if one["data"]
        }
        del tensors["empty"]
    else:
        found = load_file(path)
    assert {name.removeprefix("extra.") for name in found} == tensors.keys()
    for name, value in tensors.items():
        assert torch.equal(bits(found[f"extra.{name}"]), bits(value))
        assert (found[f"extra.{name}"].dtype, found[f"extra.{name}"].shape) == (value.dtype, value.shape)


def test_complex_numbers_that_safetensors_lacks_are_pairs_there(tmp_path):
    value = torch.tensor([1 + 2j, 3 + 4j], dtype=torch.complex128)
    path = surefoot.save(tmp_path, extra={"z": value, "conj": value.conj(), "imag": value.conj().imag}, rng=False)
    assert load_file(path)["extra.z"].tolist() == [[1, 2], [3, 4]]
    found = surefoot.load(path).extra
    assert found["conj"].tolist() == [1 - 2j, 3 - 4j]
    assert found["imag"].tolist() == [-2, -4]


def test_weights_have_their_names_and_the_metadata_is_readable(tmp_path):
    model, optimizer = make()
    path = surefoot.save(tmp_path, model=model, optimizer=optimizer, step=7)
    with safe_open(path, "pt") as file:
        assert {f"model.{name}" for name in model.state_dict()} < set(file.keys())
        assert "optimizer.0.weight.exp_avg" in file.keys()  # noqa: SIM118 (no mapping)
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    manifest = json.loads(metadata["surefoot"])
    assert (manifest["format"], manifest["step"], manifest["sequence"]) == (header.FORMAT, 7, 0)
    assert manifest["versions"]["torch"] == torch.__version__
    part = manifest["parts"]["optimizer"]
    assert part["class"] == "AdamW"
    assert part["parameters"][0] == {"number": 0, "name": "0.weight", "shape": [4, 3], "dtype": "float32"}
    assert part["groups"][0]["options"]["lr"] == 0.1


def test_tensors_stand_aligned_and_without_gaps(tmp_path):
    tensors = {str(i): tensor((i,), dtype) for i, dtype in enumerate([*DTYPES] * 2)}
    checkpoint = Checkpoint(surefoot.save(tmp_path, extra=tensors))
    assert checkpoint.header.size % 64 == 0
    assert checkpoint.header.file_size == checkpoint.path.stat().st_size
    assert all(place.begin % DTYPES[place.dtype].itemsize == 0 for place in checkpoint.places.values())


def test_loaded_tensors_are_views_of_the_file(tmp_path):
    checkpoint = Checkpoint(surefoot.save(tmp_path, extra={"a": torch.ones(3), "b": torch.zeros(2)}))
    found = [checkpoint.tensor(f"extra.{name}").untyped_storage().data_ptr() for name in "ab"]
    assert found[0] == found[1]
    checkpoint.tensor("extra.a").fill_(7)  # of a private mapping
    assert Checkpoint(checkpoint.path).tensor("extra.a").sum() == 3
    with pytest.raises(surefoot.checkpoint.CheckpointError, match="refers to a tensor `x`, which it does not have"):
        checkpoint.tensor("x")


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(50, 50, bias=False), "b": nn.Linear(50, 50, bias=False)})
    model["b"].weight = model["a"].weight
    path = surefoot.save(tmp_path, model=model, extra=[model["a"].weight, model["a"].weight.detach()], rng=False)
    checkpoint = Checkpoint(path)
    assert [*checkpoint.places] == ["model.a.weight"]
    assert checkpoint.manifest["parts"]["model"]["tied"] == {"b.weight": "a.weight"}
    expected = model["a"].weight.detach().clone()
    nn.init.zeros_(model["a"].weight)
    surefoot.load(path, model=model)
    assert model["b"].weight is model["a"].weight
    assert torch.equal(model["b"].weight, expected)


def test_names_that_spell_alike_are_told_apart(tmp_path):
    extra = {"a.b": torch.zeros(1), "a": {"b": torch.ones(1), "__metadata__": torch.ones(2)}}
    path = surefoot.save(tmp_path, extra=extra, rng=False)
    assert set(Checkpoint(path).places) == {"extra.a.b", "extra.a.b#2", "extra.a.__metadata__"}
    assert_same(surefoot.load(path).extra, extra)


def test_buffers_and_extra_state_and_versions_of_modules(tmp_path):
    class Counting(nn.BatchNorm1d):
        count = 0

        def get_extra_state(self):
            return {"count": self.count, "last": torch.ones(2)}

        def set_extra_state(self, state):
            self.count, self.last = state["count"], state["last"]

    model = nn.Sequential(nn.Linear(3, 3), Counting(3))
    model[1].count = 5
    model.train()(torch.randn(4, 3))
    other = nn.Sequential(nn.Linear(3, 3), Counting(3))
    path = surefoot.save(tmp_path, model=model)
    surefoot.load(path, model=other)
    assert other[1].count == 5
    assert other[1].last.untyped_storage().nbytes() == 8  # a copy, no view of the file
    assert torch.equal(other[1].running_mean, model[1].running_mean)
    assert other[1].num_batches_tracked == 1
    assert Checkpoint(path).manifest["parts"]["model"]["metadata"]["1"] == {"version": 2}


def test_a_model_in_another_memory_format_keeps_its_own(tmp_path):
    model = nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last)
    path = surefoot.save(tmp_path, model=model)
    other = nn.Conv2d(2, 3, 2)
    surefoot.load(path, model=other)
    assert torch.equal(other.weight, model.weight)
    assert other.weight.is_contiguous()


def test_state_keeps_its_memory_format(tmp_path):
    """Matrix products sum in another order over another layout, so bits depend on it."""
    param = nn.Parameter(torch.randn(4, 6).t())
    optimizer = surefoot.Muon([param])
    param.grad = torch.randn(6, 4)
    optimizer.step()
    other = surefoot.Muon([nn.Parameter(param.detach().clone())])
    path = surefoot.save(tmp_path, optimizer=optimizer)
    surefoot.load(path, optimizer=other)
    stride = optimizer.state[param]["momentum_buffer"].stride()
    assert other.state[other.param_groups[0]["params"][0]]["momentum_buffer"].stride() == stride


def test_one_element_of_a_longer_tensor_is_saved(tmp_path):
    one = torch.arange(10.0).bfloat16()[3::11]
    assert one.stride() == (11,)
    surefoot.save(tmp_path / "one", extra={"one": one})
    assert torch.equal(surefoot.load(tmp_path / "one").extra["one"], one)


def test_nothing_at_all_can_be_saved(tmp_path):
    found = surefoot.load(surefoot.save(tmp_path, rng=False))
    assert (found.extra, found.step, found.mismatched, found.skipped) == (None, 0, [], [])


# Several chunks


@pytest.fixture
def small_chunks(monkeypatch):
    for module in (header, writer, surefoot.checkpoint.reader):
        monkeypatch.setattr(module, "CHUNK", 64)
    monkeypatch.setattr(writer, "_AT_ONCE", 32)


def test_large_tensors_have_a_checksum_for_each_chunk(tmp_path, small_chunks):
    value = torch.randn(1000)
    path = surefoot.save(tmp_path, extra={"a": value, "b": torch.ones(3, dtype=torch.int64)}, rng=False)
    checkpoint = Checkpoint(path)
    data = value.numpy().tobytes()
    expected = [zlib.crc32(data[i : i + 64]) for i in range(0, len(data), 64)]
    assert list(checkpoint.places["extra.a"].summary.checksums) == expected
    assert checkpoint.places["extra.a"].summary.norm == pytest.approx(float(value.double().norm()), rel=1e-6)
    checkpoint.verify()
    raw = bytearray(path.read_bytes())
    for index in (checkpoint.header.size + 3, len(raw) - 1):
        raw[index] ^= 1
    path.write_bytes(raw)
    assert Checkpoint(path).corrupted() == ["extra.b", "extra.a"]
    assert Checkpoint(path).corrupted(["extra.a"]) == ["extra.a"]
    assert Checkpoint(path).corrupted([]) == []
    with pytest.raises(surefoot.checkpoint.CheckpointError, match="bytes of `extra.b`, `extra.a` are not"):
        Checkpoint(path).verify()


# What the header says of values

_floats = st.floats(width=32)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(_floats, min_size=1, max_size=20))
def test_norms_and_non_finite_values(values):
    vector = torch.tensor(values)
    finite = [value for value in values if math.isfinite(value)]
    found = summarize(vector)
    assert found.norm == pytest.approx(math.hypot(*finite), rel=1e-5, abs=1e-44)
    assert found.nonfinite == len(values) - len(finite)


@pytest.mark.parametrize(
    ("value", "norm", "nonfinite"),
    [
        (torch.tensor([3e-30, 4e-30]), 5e-30, 0),
        (torch.tensor([3e30, 4e30]), 5e30, 0),
        (torch.tensor([3.0, 4.0, math.nan, math.inf]), 5.0, 2),
        (torch.tensor([3 + 4j, complex(math.nan, 1), complex(math.inf, math.inf)]), math.sqrt(26), 2),
        (torch.tensor([1e300, 1e300], dtype=torch.float64), None, 0),
        (torch.tensor([3.0, 4.0], dtype=torch.bfloat16), 5.0, 0),
        (torch.tensor([3.0, 4.0, math.nan]).to(torch.float8_e4m3fn), 5.0, 1),
        (torch.tensor([300.0, 400.0], dtype=torch.float16), 500.0, 0),
        (torch.tensor([3, 4]), None, 0),
        (torch.tensor([True]), None, 0),
        (torch.zeros(0), None, 0),
        (torch.zeros(3), 0.0, 0),
    ],
)
def test_norms_of_all_kinds(tmp_path, value, norm, nonfinite):
    path = surefoot.save(tmp_path, extra={"x": value}, rng=False)
    found = Checkpoint(path).places["extra.x"].summary
    assert found.norm == (norm if norm is None else pytest.approx(norm, rel=1e-6))
    assert found.nonfinite == nonfinite


# Earlier versions


def draft(header_, manifest):
    """Make a manifest what version 0, a draft, had."""
    parts = manifest.pop("parts")
    manifest.pop("sequence")
    manifest["format"] = 0
    for name, part in parts.items():
        manifest[name] = {"algorithm" if key == "class" and name == "optimizer" else key: part[key] for key in part}


def test_an_earlier_version_is_loaded_and_migrated(tmp_path):
    model, optimizer = make()
    path = surefoot.save(tmp_path, model=model, optimizer=optimizer, extra=[1], step=12)
    new = Checkpoint(path).manifest
    forge(path, draft)
    assert Checkpoint(path).header.manifest["format"] == 0
    other, again = make(1)
    assert surefoot.load(path, model=other, optimizer=again).extra == [1]
    assert_same(again.state_dict(), optimizer.state_dict())
    assert migrate_file(path) == "from format 0 to 1"
    assert migrate_file(path) == "has format 1 already"
    Checkpoint(path).verify()
    assert Checkpoint(path).header.manifest == {**new, "sequence": 12}
    third, optimizer = make(2)
    surefoot.load(path, model=third, optimizer=optimizer)
    assert_same(third.state_dict(), model.state_dict())


def test_a_malformed_earlier_version_is_refused(tmp_path):
    path = minimal(tmp_path / "a.safetensors", extra=[1])
    forge(path, lambda _, manifest: manifest.update(format=0, saved_at=3))
    with pytest.raises(surefoot.checkpoint.CheckpointError, match="not readable: its manifest is malformed"):
        Checkpoint(path)


def test_training_goes_on_after_a_load(tmp_path):
    """The engines' plans notice the new state."""
    runs = []
    for interrupted in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(3, 4)
        optimizer = surefoot.AdamW(model.parameters())
        train(model, optimizer, 3)
        path = surefoot.save(tmp_path, model=model, optimizer=optimizer)
        if interrupted:
            train(model, optimizer, 3)
            surefoot.load(path, model=model, optimizer=optimizer)
        train(model, optimizer, 3)
        runs.append(model.weight.detach().clone())
    assert torch.equal(*runs)
