"""Saves that do not come to their end: whatever happens at any moment, the newest whole checkpoint loads."""

import errno
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import killed_writer
import pytest
import torch
from checkpoint_helpers import make, minimal, train
from torch import nn

import surefoot
from surefoot.checkpoint import CheckpointError, writer


def saved(folder, step, **options):
    """Save a model whose weights are all `step`."""
    model = nn.ParameterDict({"w": torch.full((100,), float(step)), "v": torch.full((7,), float(step))})
    return surefoot.save(folder, model=model, rng=False, step=step, **options)


def loaded(folder):
    """Load what `saved` or `killed_writer` has saved; give the step, having checked that all values are it."""
    found = surefoot.checkpoint.folder.open_newest_whole(folder)[0]
    values = torch.cat([found.tensor(name).view(-1) for name in found.places if name.startswith("model.")])
    assert (values == found.manifest["step"]).all()
    return found.manifest["step"]


class PowerCut(BaseException):
    """The process ends here."""


class Disk:
    """Counts what is done to the disk, and ends the process at a chosen moment; writes are cut in the middle."""

    def __init__(self, monkeypatch, moment, error=PowerCut):
        self.moment, self.error, self.events = moment, error, []
        for name in ("write", "fsync", "replace"):
            monkeypatch.setattr(writer.os, name, self._watched(name, getattr(os, name)))

    def _watched(self, name, function):
        def watched(*args):
            self.events.append(name)
            if len(self.events) == self.moment:
                if name == "write":
                    function(args[0], args[1][: len(args[1]) // 2])
                raise self.error
            return function(*args)

        return watched


def moments(tmp_path_factory):
    """Count the moments of one save."""
    folder = tmp_path_factory.mktemp("count")
    with pytest.MonkeyPatch.context() as monkeypatch:
        disk = Disk(monkeypatch, None)
        saved(folder, 2)
    return disk.events


def test_a_save_writes_then_syncs_then_renames_then_syncs_the_folder(tmp_path_factory):
    events = moments(tmp_path_factory)
    assert events[-3:] == ["fsync", "replace", "fsync"]
    assert set(events[:-3]) == {"write"}


@pytest.mark.parametrize("error", [PowerCut(), OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("leftover", [False, True], ids=["cleaned up", "killed"])
def test_a_save_that_ends_at_any_moment_leaves_the_one_before(tmp_path_factory, error, leftover):
    events = moments(tmp_path_factory)
    for moment, event in enumerate(events, 1):
        folder = tmp_path_factory.mktemp("moment")
        saved(folder, 1)
        with pytest.MonkeyPatch.context() as monkeypatch:
            Disk(monkeypatch, moment, error)
            if leftover:  # a killed process does not clean up
                monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
            with pytest.raises(type(error)):
                saved(folder, 2)
        renamed = moment == len(events)
        assert loaded(folder) == (2 if renamed else 1), event
        assert len(list(folder.glob(".*"))) == (leftover and not renamed)
        assert saved(folder, 3).exists()
        assert loaded(folder) == 3
        assert not list(folder.glob(".*"))


def test_what_a_power_cut_leaves_of_unsynced_data_is_never_under_the_final_name(tmp_path, monkeypatch):
    """The worst disk: what is not synced is lost, a rename comes before the data that it names."""
    synced = {}
    fsync, replace = os.fsync, os.replace

    def note(file):
        fsync(file)
        synced[os.fstat(file).st_ino] = os.fstat(file).st_size

    def check(source, target):
        assert synced[os.stat(source).st_ino] == os.stat(source).st_size  # noqa: PTH116
        replace(source, target)
        synced.pop("folder", None)

    monkeypatch.setattr(writer.os, "fsync", note)
    monkeypatch.setattr(writer.os, "replace", check)
    path = saved(tmp_path, 1)
    assert synced[path.stat().st_ino] == path.stat().st_size
    assert tmp_path.stat().st_ino in synced


def test_old_checkpoints_are_removed_only_after_the_new_name_is_synced(tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(writer.os, "replace", lambda a, b, real=os.replace: (events.append("replace"), real(a, b)))
    monkeypatch.setattr(
        writer, "sync_folder", lambda path, real=writer.sync_folder: (events.append("sync"), real(path))
    )
    monkeypatch.setattr(
        Path, "unlink", lambda self, *a, real=Path.unlink, **o: (events.append("unlink"), real(self, *a, **o))
    )
    saved(tmp_path, 1, keep=1)
    saved(tmp_path, 2, keep=1)
    assert [event for event in events if event in ("replace", "sync", "unlink")][-3:] == ["replace", "sync", "unlink"]


def test_a_full_disk_is_named_with_what_is_needed(tmp_path, monkeypatch):
    saved(tmp_path, 1)
    Disk(monkeypatch, 2, OSError(errno.ENOSPC, "No space left on device"))
    message = r"No space left on device: the checkpoint needs [\d,]+ bytes, so make room, or keep fewer"
    with pytest.raises(OSError, match=message) as caught:
        saved(tmp_path, 2)
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize("limit", [0, 1, 100, 1000])
def test_a_filesystem_that_takes_no_more(tmp_path, limit):
    """The limit on the size of files is the system's own: a write is cut short first, and then refused."""
    saved(tmp_path, 1)
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError, match="File too large: the checkpoint needs"):
            saved(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert loaded(tmp_path) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.safetensors"]


def test_a_short_write_is_continued(tmp_path, monkeypatch):
    monkeypatch.setattr(
        writer.os, "write", lambda file, data, real=os.write: real(file, data[: max(1, len(data) // 3)])
    )
    saved(tmp_path, 4)
    assert loaded(tmp_path) == 4


@pytest.mark.parametrize("background", [False, True], ids=["", "async"])
def test_kill_9_at_random_moments(tmp_path, background):
    """benchmarks/checkpoint.py does this hundreds of times."""
    chance = random.Random(3)  # noqa: S311
    command = [sys.executable, killed_writer.__file__, str(tmp_path), "2", *(["async"] if background else [])]
    for _ in range(2):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603
            assert process.stdout.readline() == "ready\n"
            while int(process.stdout.readline()) < 1:
                pass
            time.sleep(chance.random() / 10)
            process.kill()
            steps = process.stdout.read().split()
        assert loaded(tmp_path) >= int(steps[-1] if steps else 0)
    assert saved(tmp_path, 10**6)
    assert not list(tmp_path.glob(".*"))


# Folders


def test_the_newest_whole_one_is_loaded_and_the_damaged_are_named(tmp_path):
    for step in (1, 2, 3, 4):
        saved(tmp_path, step)
    data = (tmp_path / "step-00000003.safetensors").read_bytes()
    (tmp_path / "step-00000003.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    (tmp_path / "step-00000004.safetensors").write_bytes(data[:100])
    model = nn.ParameterDict({"w": torch.zeros(100), "v": torch.zeros(7)})
    with pytest.warns(
        UserWarning,
        match=r"loaded .*step-00000002.safetensors; skipped, since damaged or unreadable:\n .*4.safetens.* trunc",
    ):
        found = surefoot.load(tmp_path, model=model)
    assert found.path == tmp_path / "step-00000002.safetensors"
    assert [skip.path.name for skip in found.skipped] == ["step-00000004.safetensors", "step-00000003.safetensors"]
    assert "corrupted: bytes of `model.w`" in found.skipped[1].reason
    assert model["w"].unique().tolist() == [2]


def test_what_is_loaded_is_logged(tmp_path, caplog):
    saved(tmp_path, 5)
    with caplog.at_level("INFO", "surefoot.checkpoint"):
        surefoot.load(tmp_path)
    assert caplog.messages == [f"loaded {tmp_path / 'step-00000005.safetensors'}"]


def test_rotation_keeps_the_newest_and_what_is_not_ours(tmp_path):
    (tmp_path / "notes.txt").touch()
    (tmp_path / "step-x.safetensors").touch()
    for step in range(1, 6):
        saved(tmp_path, step, keep=3)
    names = [f"step-0000000{step}.safetensors" for step in (3, 4, 5)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", *names, "step-x.safetensors"]


def test_rotation_neither_counts_nor_removes_the_damaged(tmp_path):
    for step in (1, 2, 3):
        saved(tmp_path, step)
    (tmp_path / "step-00000003.safetensors").write_bytes(b"broken")
    saved(tmp_path, 4, keep=2)
    assert sorted(int(path.stem[5:]) for path in tmp_path.iterdir()) == [2, 3, 4]


def test_after_going_back_the_newest_is_the_one_saved_last(tmp_path):
    for step in (1000, 2000, 3000):
        saved(tmp_path, step)
    saved(tmp_path, 1500, keep=2)
    assert sorted(int(path.stem[5:]) for path in tmp_path.iterdir()) == [1500, 3000]
    assert loaded(tmp_path) == 1500


def test_steps_count_on_by_themselves_and_are_overwritten(tmp_path):
    paths = [surefoot.save(tmp_path / "run" / "a", extra=i, rng=False) for i in range(3)]
    assert [path.name for path in paths] == [f"step-0000000{i}.safetensors" for i in range(3)]
    assert surefoot.save(tmp_path / "run" / "a", extra="again", step=1, rng=False) == paths[1]
    assert surefoot.load(tmp_path / "run" / "a").extra == "again"
    assert surefoot.load(paths[2]).extra == 2


def test_one_file_is_replaced(tmp_path):
    path = tmp_path / "last.safetensors"
    for value in (1, 2):
        assert surefoot.save(path, extra=value, rng=False) == path
    assert surefoot.load(path).extra == 2
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": -1}, "`step` must be a whole number >= 0, but got -1"),
        ({"step": 1.0}, "`step` must be a whole number >= 0, but got 1.0"),
        ({"keep": 0}, "`keep` must be a whole number >= 1, but got 0"),
        ({"keep": True}, "`keep` must be a whole number >= 1, but got True"),
    ],
)
def test_numbers_are_checked(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        surefoot.save(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_keep_needs_a_folder(tmp_path):
    with pytest.raises(ValueError, match="`keep` needs a folder of checkpoints, but .*a.safetensors is one file"):
        surefoot.save(tmp_path / "a.safetensors", keep=3)


def test_the_hidden_file_of_a_running_save_is_left_alone(tmp_path):
    partial, file = writer._open_partial(tmp_path / "a.safetensors")
    try:
        writer.remove_leftovers(tmp_path)
        assert partial.exists()
    finally:
        os.close(file)
    writer.remove_leftovers(tmp_path)
    assert not partial.exists()


# In the background


@pytest.fixture
def gate(monkeypatch):
    """Hold the background's writes until the event is set."""
    event = threading.Event()
    real = surefoot.checkpoint.write

    def held(*args):
        event.wait(10)
        real(*args)

    monkeypatch.setattr(surefoot.checkpoint, "write", held)
    yield event
    event.set()
    surefoot.checkpoint.wait()


def test_an_asynchronous_save_is_of_the_moment_of_the_call(tmp_path, gate):
    model, optimizer = make()
    extra = {"tensor": torch.ones(2), "array": torch.ones(2).numpy(), "list": [1]}
    expected = [value.clone() for value in model.state_dict().values()]
    path = surefoot.save(tmp_path, model=model, optimizer=optimizer, extra=extra, async_=True)
    train(model, optimizer, 2)
    extra["list"].append(2)
    extra["tensor"].zero_()
    extra["array"][:] = 0
    assert not path.exists()
    gate.set()
    other, other_optimizer = make(1)
    found = surefoot.load(tmp_path, model=other, optimizer=other_optimizer)
    assert all(map(torch.equal, other.state_dict().values(), expected))
    assert other_optimizer.state[other[0].weight]["step"] == 1
    assert found.extra["list"] == [1]
    assert found.extra["tensor"].tolist() == found.extra["array"].tolist() == [1, 1]


@pytest.mark.parametrize("call", ["save", "load", "wait"])
def test_errors_of_the_background_surface_at_the_next_call_and_once(tmp_path, monkeypatch, call):
    saved(tmp_path, 1)
    with pytest.MonkeyPatch.context() as full:
        Disk(full, 3, OSError(errno.ENOSPC, "No space left on device"))
        saved(tmp_path, 2, async_=True)
        surefoot.checkpoint.BACKGROUND._thread.join()
    calls = {
        "save": lambda: saved(tmp_path, 3),
        "load": lambda: surefoot.load(tmp_path),
        "wait": surefoot.checkpoint.wait,
    }
    with pytest.raises(
        RuntimeError, match=r"step-00000002.safetensors was not written in the background: .*No space left"
    ):
        calls[call]()
    calls[call]()
    assert loaded(tmp_path) == (3 if call == "save" else 1)


def test_what_cannot_be_saved_is_refused_at_once_also_asynchronously(tmp_path):
    with pytest.raises(TypeError, match=r"extra\['f'\] is a builtin_function_or_method"):
        surefoot.save(tmp_path, extra={"f": print}, async_=True)


EXITING = """
import sys, time, torch, surefoot
from surefoot import checkpoint
real = checkpoint.write
def slow(*args):
    time.sleep(0.3)
    real(*args)
    if sys.argv[2] == "fail":
        raise OSError("the disk is gone")
checkpoint.write = slow
surefoot.save(sys.argv[1], extra={"t": torch.ones(10)}, async_=True)
"""


@pytest.mark.parametrize("end", ["whole", "fail"])
def test_the_process_does_not_exit_before_the_write_has_ended_and_says_if_it_failed(tmp_path, end):
    command = [sys.executable, "-c", EXITING, str(tmp_path), end]
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
    assert surefoot.load(tmp_path).extra["t"].sum() == 10
    failed = "surefoot: " in done.stderr and "was not written in the background: the disk is gone" in done.stderr
    assert failed == (end == "fail")


def test_a_forked_child_does_not_wait_for_its_parents_write(tmp_path, gate):
    saved(tmp_path, 1, async_=True)
    child = os.fork()
    if not child:
        os._exit(int(surefoot.checkpoint.BACKGROUND._thread is not None))
    assert os.waitpid(child, 0)[1] == 0
    gate.set()


def test_two_threads_may_save_into_two_folders(tmp_path):
    def save(name):
        for step in range(5):
            saved(tmp_path / name, step, keep=2)

    threads = [threading.Thread(target=save, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [loaded(tmp_path / name) for name in "ab"] == [4, 4]


def test_an_unreadable_folder_is_an_os_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        surefoot.save(tmp_path / "file" / "run", extra=1)
    with pytest.raises(CheckpointError, match="truncated"):
        surefoot.load(tmp_path / "file")


def test_minimal_is_what_it_says(tmp_path):
    assert minimal(tmp_path).stat().st_size < 4096
