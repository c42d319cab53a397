"""Damaged and forged files: every flipped byte and every truncation is noticed, and no file makes a reader do harm."""

import json
import os
import sys
import tracemalloc

import pytest
import torch
from checkpoint_helpers import forge, make, minimal, state_of, write_header
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn

import surefoot
from helpers import assert_same
from surefoot.checkpoint import Checkpoint, CheckpointError, inspection
from surefoot.checkpoint.header import LENGTH, MOST

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "40"))
quick = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
NAMED = r"truncated|corrupted|not a checkpoint|not readable|too new"


def load(path):
    """Load a minimal checkpoint."""
    return surefoot.load(path, optimizer=surefoot.SGD([("weight", nn.Parameter(torch.zeros(3)))], foreach=False))


@pytest.fixture
def path(tmp_path):
    return minimal(tmp_path / "a.safetensors", extra={"epoch": 1})


def test_every_flipped_byte_is_noticed(path):
    good = path.read_bytes()
    assert len(good) < 4096
    for index, byte in enumerate(good):
        for flip in (1 << index % 8, 0xFF):
            path.write_bytes(good[:index] + bytes([byte ^ flip]) + good[index + 1 :])
            with pytest.raises(CheckpointError, match=NAMED):
                Checkpoint(path).verify()


def test_every_truncation_is_noticed(path):
    good = path.read_bytes()
    for size in range(len(good)):
        path.write_bytes(good[:size])
        with pytest.raises(CheckpointError, match=r"truncated"):
            Checkpoint(path)


def test_more_bytes_are_noticed(path):
    good = path.read_bytes()
    for more in (b"\0", b" " * 100, good):
        path.write_bytes(good + more)
        with pytest.raises(CheckpointError, match=r"corrupted: it has \d+ bytes, \d+ more than it should"):
            load(path)


def test_damage_names_the_tensor_and_changes_nothing(tmp_path):
    model, optimizer = make()
    path = surefoot.save(tmp_path, model=model, optimizer=optimizer)
    place = Checkpoint(path).places["optimizer.0.weight.exp_avg_sq"]
    data = bytearray(path.read_bytes())
    data[Checkpoint(path).header.size + place.begin + 5] ^= 4
    path.write_bytes(data)
    other_model, other = make(1)
    before = state_of(other_model, other)
    with pytest.raises(CheckpointError, match=r"corrupted: bytes of `optimizer.0.weight.exp_avg_sq` are not those"):
        surefoot.load(path, model=other_model, optimizer=other)
    assert_same(state_of(other_model, other), before)


def test_swapped_files_and_empty_files_are_no_checkpoints(tmp_path):
    path = tmp_path / "a.safetensors"
    torch.save({"a": torch.ones(3)}, path)
    with pytest.raises(CheckpointError, match=r"announces a header of [\d,]+ bytes, at most 67,108,864"):
        load(path)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="truncated: it has 0 bytes"):
        load(path)


def test_a_plain_safetensors_file_is_told_apart(tmp_path):
    from safetensors.torch import save_file  # noqa: PLC0415

    save_file({"weight": torch.ones(300)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="not a checkpoint of surefoot, or one whose header was changed"):
        load(tmp_path / "a.safetensors")


# Forged: the checksum of the header is right


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, m: m.update(format=2), "too new: its format is 2, this surefoot reads up to 1; upgrade"),
        (lambda h, m: m.update(format=-1), "too new: its format is -1"),
        (lambda h, m: m.update(chunk=1), "has checksums of 1 bytes each"),
        (lambda h, m: m.pop("parts"), "not readable: its manifest is malformed"),
        (lambda h, m: m["parts"]["optimizer"].update(kind="code"), "the part `optimizer` is malformed"),
        (lambda h, m: m["parts"]["optimizer"].update(kind=["code"]), "the part `optimizer` is malformed"),
        (lambda h, m: m["parts"].update(extra=3), "the part `extra` is malformed"),
        (lambda h, m: m.update(step="1"), "`step` is '1'"),
        (lambda h, m: m["tensors"].update(more={"crc32": ""}), "manifest and tensors do not have the same names"),
        (lambda h, m: weight(h).update(shape=[4]), r"is \(4,\) of torch.float32 in bytes 0 to 12"),
        (lambda h, m: weight(h).update(shape=[-3]), "-3 is not a whole number from 0"),
        (lambda h, m: weight(h).update(shape=[1 << 63]), "is not a whole number from 0"),
        (lambda h, m: weight(h).update(shape=[0, 1 << 40, 1 << 40], data_offsets=[0, 0]), "impossible shape"),
        (lambda h, m: weight(h).update(shape=[1] * 65), "is not a list of at most 64"),
        (lambda h, m: weight(h).update(dtype="F8_X"), "malformed"),
        (lambda h, m: weight(h).update(data_offsets=[4, 16]), "overlap or leave gaps"),
        (lambda h, m: weight(h).update(data_offsets=[2, 14]), "in bytes 2 to 14"),
        (lambda h, m: weight(h).update(data_offsets=[0, 1 << 50], shape=[1 << 48]), "has 1 checksums"),
        (lambda h, m: note(m).update(crc32=""), "has 0 checksums"),
        (lambda h, m: note(m).update(crc32="xxxxxxxx"), "malformed"),
        (lambda h, m: note(m).update(order=[1]), "impossible order of dimensions"),
        (lambda h, m: note(m).update(dtype="complex128"), "malformed"),
        (lambda h, m: note(m).update(nonfinite=-1), "malformed"),
        (lambda h, m: h.update(more=weight(h)), "manifest and tensors"),
    ],
)
def test_forged_headers_are_refused(path, change, message):
    forge(path, change)
    with pytest.raises(CheckpointError, match=message):
        load(path)


def weight(header):
    return header["optimizer.weight.momentum_buffer"]


def note(manifest):
    return manifest["tensors"]["optimizer.weight.momentum_buffer"]


@pytest.mark.parametrize(
    "value",
    [
        {"$": "eval", "of": "print()"},
        {"$": "tensor", "of": "nowhere"},
        {"$": "tensor", "of": ["a"]},
        {"$": "tensor"},
        {"$": ["tensor"], "of": "a"},
        {"$": "dtype", "of": "__class__"},
        {"$": "numpy", "of": "00", "dtype": "object"},
        {"$": "numpy", "of": "0", "dtype": "float32"},
        {"$": "float", "of": "1e9"},
        {"$": "bytes", "of": "?"},
        {"$": "set", "of": [[1]]},
        {"$": "dict", "of": [[1]]},
        {"$": "dict", "of": 3},
        {"$": "complex", "of": [1, 2, 3]},
        {"$": "deque", "of": [1], "maxlen": -1},
        {"$": "defaultdict", "of": [], "factory": "os.system"},
        {"$": "size", "of": ["a"]},
        {"$": "device", "of": "/etc/passwd"},
        {"$": "int", "of": "zz"},
    ],
)
def test_forged_plain_data_is_refused(path, value):
    forge(path, lambda _, manifest: manifest["parts"]["extra"].update(state={"a": value}))
    with pytest.raises(CheckpointError, match=r"malformed plain data|refers to a tensor"):
        load(path)


def test_headers_that_are_deep_or_no_json_are_refused(path):
    prefix = b'{"__metadata__":{"crc32":"00000000","surefoot":'
    for tail in (b'"[' + b"[" * 200_000, b"NaN}}", b'"{}"}', b'"\\ud800"}}', b"\xff", b'"{}"}}', b'"3"}}', b'"NaN"}}'):
        write_header(path, prefix + tail)
        with pytest.raises(CheckpointError, match="not readable: its header is malformed"):
            Checkpoint(path)


def test_a_header_of_the_greatest_length_that_is_not_there_costs_no_memory(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(MOST.to_bytes(LENGTH, "little") + b"{" * 100)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=f"truncated: its header should have {MOST} bytes"):
        Checkpoint(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


# Fuzzed

WATCHED = {
    "exec",
    "compile",
    "os.system",
    "subprocess.Popen",
    "pickle.find_class",
    "os.exec",
    "ctypes.dlopen",
    "marshal.loads",
}
_events: list[str] = []
_watching = False


def _hook(event, _):
    if _watching and (event in WATCHED or event.startswith(("socket.", "shutil.", "os.remove", "os.rename"))):
        _events.append(event)


sys.addaudithook(_hook)


def read_all(path):
    """Do everything that reading does, under the eyes of an audit hook; give None, or the error."""
    global _watching  # noqa: PLW0603 (audit hooks cannot be removed)
    _watching = True
    try:
        inspection.as_json(Checkpoint(path))
        load(path)
    except ValueError as error:
        return error
    except TypeError as error:
        assert "must be" in str(error)  # noqa: PT017 (a hyperparameter of a wrong type, refused by the optimizer)
        return error
    finally:
        _watching = False
        assert not _events
    return None


_leaves = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("optimizer.weight.step")
)
_json = st.recursive(
    _leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["$", "of", "kind", "a", "dtype"]), inner, max_size=3)
    ),
    max_leaves=6,
)


def _paths(value, at=()):
    """Give the places of all values inside one."""
    yield at
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from _paths(item, (*at, key))


@quick
@given(data=st.data(), values=st.lists(_json, min_size=1, max_size=3))
def test_whatever_stands_in_a_forged_header_it_is_loaded_or_refused(tmp_path_factory, data, values):
    path = tmp_path_factory.mktemp("forged") / "a.safetensors"
    minimal(path, extra={"epoch": 1, "list": [1, (2, 3)]})

    def change(header, manifest):
        whole = {"header": {k: v for k, v in header.items() if k != "__metadata__"}, "manifest": manifest}
        for value in values:
            at = data.draw(st.sampled_from([p for p in _paths(whole) if len(p) > 1]))
            target = whole
            for key in at[:-1]:
                target = target[key]
            target[at[-1]] = value
        header.update(whole["header"] if isinstance(whole["header"], dict) else {})

    forge(path, change)
    tracemalloc.start()
    read_all(path)
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


@quick
@given(st.binary(max_size=300), st.binary(max_size=100))
@example(b"", b"")
def test_whatever_bytes_a_file_has_it_is_refused(tmp_path_factory, start, rest):
    path = tmp_path_factory.mktemp("bytes") / "a.safetensors"
    for data in (start + rest, len(start).to_bytes(LENGTH, "little") + start + rest):
        path.write_bytes(data)
        assert isinstance(read_all(path), CheckpointError)
    write_header(path, b'{"__metadata__":{"crc32":"00000000"' + start, rest)
    assert isinstance(read_all(path), CheckpointError)


def test_the_audit_hook_sees_what_it_should(tmp_path):
    global _watching  # noqa: PLW0603
    _watching = True
    try:
        exec(compile("1", "", "exec"))  # noqa: S102
    finally:
        _watching = False
    assert {"compile", "exec"} <= set(_events)
    _events.clear()


def test_no_module_that_reads_checkpoints_can_unpickle():
    """`convert` names the module for the error that torch raises."""
    folder = os.path.dirname(surefoot.checkpoint.__file__)  # noqa: PTH120
    for name in sorted(os.listdir(folder)):  # noqa: PTH208
        if name.endswith(".py"):
            with open(os.path.join(folder, name), encoding="utf-8") as file:  # noqa: PTH118, PTH123
                text = file.read()
            assert name == "convert.py" or "pickle" not in text.replace("without pickle", "").replace("Unpickl", "")
            assert json.dumps("eval(") not in text


def test_a_folder_without_a_whole_checkpoint_says_why(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no checkpoint in"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no checkpoint .*nowhere"):
        load(tmp_path / "nowhere")
    path = minimal(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        CheckpointError, match=r"(?s)no checkpoint in .* is whole:.*step-00000000.safetensors is truncated"
    ):
        load(tmp_path)
