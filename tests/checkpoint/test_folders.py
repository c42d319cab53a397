"""Folders in which not everything is a checkpoint that can be read, and places where none can be written."""

import errno
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_helpers import forge
from typer.testing import CliRunner

import surefoot
from surefoot import files
from surefoot.checkpoint import Checkpoint, CheckpointError, folder, reader, writer
from surefoot.cli import app


def saved(place, step, **options):
    return surefoot.save(
        place, extra={"step": step, "t": torch.full((50,), float(step))}, rng=False, step=step, **options
    )


@pytest.fixture(autouse=True)
def alarm():
    """A test that waits for a pipe fails, rather than wait for ever."""
    signal.alarm(120)
    yield
    signal.alarm(0)


# What cannot be read


def pipe(path):
    os.mkfifo(path)


def loop(path):
    path.symlink_to(path)


def dangling(path):
    path.symlink_to(path.with_name("nothing"))


def bad_disk(path):
    """Link to a file that the system opens and then answers with "Input/output error"."""
    path.symlink_to("/proc/self/mem")


def device(path):
    path.symlink_to("/dev/zero")


def unix_socket(path):
    with socket.socket(socket.AF_UNIX) as made:
        here = Path.cwd()
        os.chdir(path.parent)  # the name of a socket is short
        try:
            made.bind(path.name)
        finally:
            os.chdir(here)


ODD = [
    pytest.param(Path.mkdir, "Is a directory", id="folder"),
    pytest.param(pipe, "Not a file but a named pipe", id="pipe"),
    pytest.param(unix_socket, "Not a file but a socket", id="socket"),
    pytest.param(device, "Not a file but a device", id="device"),
    pytest.param(loop, "Too many levels of symbolic links", id="loop"),
    pytest.param(dangling, "is a link to nothing", id="dangling link"),
    pytest.param(
        bad_disk,
        "Input/output error",
        id="bad disk",
        marks=pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's"),
    ),
]


@pytest.mark.parametrize(("make", "reason"), ODD)
def test_an_entry_that_cannot_be_read_is_passed_over(tmp_path, make, reason):
    saved(tmp_path, 1)
    make(tmp_path / "step-00000007.safetensors")
    with pytest.warns(UserWarning, match=reason):
        found = surefoot.load(tmp_path)
    assert found.step == 1
    (skip,) = found.skipped
    assert skip.path.name == "step-00000007.safetensors"
    assert reason in skip.reason
    # Nor does it stop a save, which comes after it and leaves it alone.
    kind = (tmp_path / "step-00000007.safetensors").lstat().st_mode
    path = surefoot.save(tmp_path, extra="new", rng=False, keep=1)
    assert path.name == "step-00000008.safetensors"
    assert (tmp_path / "step-00000007.safetensors").lstat().st_mode == kind
    assert not (tmp_path / "step-00000001.safetensors").exists()
    with pytest.warns(UserWarning, match="unreadable"):
        assert surefoot.load(tmp_path).extra == "new"


@pytest.mark.parametrize(("make", "reason"), ODD)
def test_one_file_that_cannot_be_read_is_an_error(tmp_path, make, reason):
    path = tmp_path / "last.safetensors"
    make(path)
    if make is dangling:
        reason = "No such file"
    with pytest.raises(OSError, match=rf"{reason}.*last\.safetensors"):
        surefoot.load(path)


def test_a_pipe_that_looks_like_the_hidden_file_of_a_save_is_left_alone(tmp_path):
    pipe(tmp_path / f".a{writer.PARTIAL}")
    assert saved(tmp_path, 1).exists()
    assert stat.S_ISFIFO((tmp_path / f".a{writer.PARTIAL}").stat().st_mode)


def refusing(monkeypatch, name, error):
    """Refuse to open files of a name, as the system does where permission is missing; root has every permission."""
    real = os.open

    def opened(path, *args, **options):
        if Path(path).name == name:
            raise OSError(error, os.strerror(error), str(path))
        return real(path, *args, **options)

    monkeypatch.setattr(files.os, "open", opened)


@pytest.mark.parametrize("error", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_an_entry_without_permission_is_passed_over_and_not_forgotten(tmp_path, error):
    for step in (1, 2, 3):
        saved(tmp_path, step)
    with pytest.MonkeyPatch.context() as monkeypatch:
        refusing(monkeypatch, "step-00000003.safetensors", error)
        with pytest.warns(UserWarning, match=f"cannot be read: {os.strerror(error)}"):
            assert surefoot.load(tmp_path).step == 2
        path = surefoot.save(tmp_path, extra="later", rng=False)
    # It can be read again, and is what it was; the newest is the one that was saved last.
    assert path.name == "step-00000004.safetensors"
    assert Checkpoint(tmp_path / "step-00000003.safetensors").manifest["step"] == 3
    assert surefoot.load(tmp_path).extra == "later"


@pytest.mark.parametrize("error", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_a_process_with_too_much_open_does_not_load_an_older_one(tmp_path, monkeypatch, error):
    saved(tmp_path, 1)
    saved(tmp_path, 2)
    refusing(monkeypatch, "step-00000002.safetensors", error)
    with pytest.raises(OSError, match="step-00000002") as caught:
        surefoot.load(tmp_path)
    assert caught.value.errno == error


@pytest.mark.skipif(sys.platform == "win32", reason="there, files are mapped")
def test_a_disk_that_fails_among_the_tensors_is_an_error_and_no_signal(tmp_path, monkeypatch):
    saved(tmp_path, 1)
    last = saved(tmp_path, 2)
    failing = os.stat(last).st_ino  # noqa: PTH116
    real = os.pread

    def pread(file, *args):
        if os.fstat(file).st_ino == failing:
            raise OSError(errno.EIO, "Input/output error")
        return real(file, *args)

    monkeypatch.setattr(reader.os, "pread", pread)
    with pytest.warns(UserWarning, match=r"2\.safetensors cannot be read: Input/output error"):
        assert surefoot.load(tmp_path).step == 1
    with pytest.raises(OSError, match=r"Input/output error: '.*2\.safetensors'"):
        surefoot.load(last)


def test_a_file_that_is_replaced_while_it_is_read_is_noticed(tmp_path):
    path = surefoot.save(tmp_path / "a.safetensors", extra=torch.zeros(5), rng=False)
    opened = Checkpoint(path)
    surefoot.save(path, extra=torch.ones(5), rng=False)
    with pytest.raises(CheckpointError, match="was changed while it was read; load it again"):
        opened.verify()
    with pytest.raises(CheckpointError, match="was changed while it was read"):
        opened.tensor("extra")


def test_nothing_that_can_be_read_says_why(tmp_path):
    (tmp_path / "step-00000001.safetensors").mkdir()
    with pytest.raises(
        CheckpointError, match=r"no checkpoint in .* is whole:\n .*1\.safetensors cannot be read: Is a d"
    ):
        surefoot.load(tmp_path)


def test_a_folder_that_cannot_be_read_is_not_called_empty(tmp_path, monkeypatch):
    def refuse(path="."):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    for function in ("listdir", "scandir"):  # the one is what Python 3.12 reads folders by, the other what 3.13 does
        monkeypatch.setattr(os, function, refuse)
    with pytest.raises(PermissionError, match="Permission denied"):
        surefoot.load(tmp_path)


@pytest.mark.parametrize(("make", "reason"), ODD)
def test_the_commands_go_on_behind_what_cannot_be_read(tmp_path, make, reason):
    saved(tmp_path, 1)
    make(tmp_path / "step-00000002.safetensors")
    saved(tmp_path, 3)
    run = CliRunner().invoke
    done = run(app, ["ckpt", "verify", str(tmp_path), "--json"])
    assert done.exit_code == 1
    reason = "No such file" if make is dangling else reason
    problems = [one["problem"] for one in json.loads(done.output)]
    assert problems[0] is problems[2] is None
    assert reason in problems[1]
    assert run(app, ["ckpt", "inspect", str(tmp_path)]).exit_code == 0
    done = run(app, ["ckpt", "migrate", str(tmp_path)])
    assert done.exit_code == 2
    assert reason in done.output
    assert "3.safetensors: has format 1 already" in done.output


# What cannot be written


@pytest.mark.parametrize("background", [False, True], ids=["", "async"])
def test_a_folder_that_vanishes_is_named(tmp_path, monkeypatch, background):
    place = tmp_path / "run"

    def vanish(file, real=os.fsync):
        real(file)
        if stat.S_ISREG(os.fstat(file).st_mode):
            for path in place.iterdir():
                path.unlink()
            place.rmdir()

    monkeypatch.setattr(writer.os, "fsync", vanish)

    def save():
        saved(place, 1, async_=background)
        surefoot.checkpoint.wait()

    with pytest.raises((FileNotFoundError, RuntimeError), match=r"the folder was removed while .*1\.safetensors"):
        save()
    monkeypatch.undo()
    assert saved(place, 2).exists()  # which makes it again


@pytest.mark.parametrize("step", [None, 3])
def test_a_folder_in_the_place_of_a_checkpoint_is_refused_before_anything_is_written(tmp_path, step):
    place = tmp_path / ("step-00000003.safetensors" if step else "a.safetensors")
    place.mkdir()
    words = "`step` 3 cannot be saved: a folder" if step else r"`path` ends in \.safetensors and so names a file, but"
    with pytest.raises(IsADirectoryError, match=words):
        surefoot.save(tmp_path if step else place, extra=1, rng=False, step=step)
    assert [*tmp_path.iterdir()] == [place]


@pytest.mark.parametrize(
    "name", ["ordner mit ä, ☃ und 'x'", "[a]*?", "new\nline", "a" * 240, "-o", "50%s{0}", "\udcff"]
)
def test_names_with_odd_characters(tmp_path, name):
    try:
        (tmp_path / name).touch()
    except (OSError, UnicodeError):
        pytest.skip("this system has no such names")
    (tmp_path / name).unlink()
    assert surefoot.load(surefoot.save(tmp_path / f"{name}.safetensors", extra=1, rng=False)).extra == 1
    place = tmp_path / name
    for step in (1, 2):
        saved(place, step, keep=1)
    assert surefoot.load(place).step == 2
    assert [path.name for path in place.iterdir()] == ["step-00000002.safetensors"]


def test_names_that_no_file_has(tmp_path):
    with pytest.raises(ValueError, match="null"):
        surefoot.save(tmp_path / "a\0b", extra=1)
    with pytest.raises(OSError, match="name too long"):
        surefoot.save(tmp_path / ("a" * 300), extra=1)
    assert not [*tmp_path.iterdir()]


def test_a_disk_without_room_for_a_name_says_what_is_needed(tmp_path, monkeypatch):
    saved(tmp_path, 1)
    refusing(monkeypatch, "", errno.ENOSPC)
    real = os.open

    def full(path, flags, *args):
        if flags & os.O_CREAT:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return real(path, flags, *args)

    monkeypatch.setattr(writer.os, "open", full)
    with pytest.raises(OSError, match=r"No space left on device: the checkpoint needs .*2\.safetensors") as caught:
        saved(tmp_path, 2)
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert surefoot.load(tmp_path).step == 1


@pytest.mark.parametrize("error", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_file_system_that_syncs_no_folders(tmp_path, monkeypatch, error):
    real = os.fsync

    def fsync(file):
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(error, os.strerror(error))
        real(file)

    monkeypatch.setattr(writer.os, "fsync", fsync)
    if error == errno.EIO:
        with pytest.raises(OSError, match="Input/output"):
            saved(tmp_path, 1)
    else:
        assert saved(tmp_path, 1).exists()


def test_an_old_one_that_cannot_be_removed_is_said(tmp_path, monkeypatch):
    saved(tmp_path, 1)
    monkeypatch.setattr(folder.Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "in use")))
    with pytest.warns(UserWarning, match=r"1\.safetensors was not removed: in use; remove it yourself"):
        saved(tmp_path, 2, keep=1)
    assert surefoot.load(tmp_path).step == 2


# Windows, where open files keep their names


@pytest.fixture
def windows(monkeypatch):
    """Imitate it: no locks, text mode by default, and neither a file that is open nor one that is mapped is renamed."""
    binary = 1 << 30
    opened, real_open, real_replace = {}, os.open, os.replace

    def open_binary(path, flags, *args, **options):
        assert flags & binary or Path(path).is_dir(), f"{path} is opened in text mode"
        return real_open(path, flags & ~binary, *args, **options)

    def replace(source, target):
        in_use = [os.path.realpath(f"/proc/self/fd/{file}") for file in os.listdir("/proc/self/fd")]  # noqa: PTH208
        in_use += [line.split(None, 5)[-1].strip() for line in Path("/proc/self/maps").read_text().splitlines()]
        for path in (source, target):
            assert str(path) not in in_use, f"{path} is open"
        opened[Path(target).name] = True
        real_replace(source, target)

    monkeypatch.setattr(writer, "fcntl", None)
    for module in (files, writer):
        monkeypatch.setattr(module, "BINARY", binary)
    monkeypatch.setattr(os, "open", open_binary)
    monkeypatch.setattr(os, "replace", replace)
    return opened


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc what is open")
def test_saves_rename_nothing_that_is_open(tmp_path, windows):
    model = torch.nn.Linear(3, 2)
    optimizer = surefoot.AdamW(model.named_parameters(), foreach=False)  # with kernels it might read one, or keep it
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    path = tmp_path / "last.safetensors"
    for _ in range(2):
        surefoot.save(path, model=model, optimizer=optimizer)
        surefoot.load(path, model=model, optimizer=optimizer)
    for step in (1, 1, 2):
        surefoot.save(tmp_path / "run", model=model, step=step, keep=1)
        surefoot.load(tmp_path / "run", model=model)
    assert windows.keys() == {"last.safetensors", "step-00000001.safetensors", "step-00000002.safetensors"}


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc what is open")
def test_a_migrated_file_is_not_mapped_when_it_is_replaced(tmp_path, windows):
    path = saved(tmp_path, 1)

    def older(_, manifest):
        manifest.update(manifest.pop("parts"), format=0)
        del manifest["sequence"]

    forge(path, older)
    windows.clear()
    assert CliRunner().invoke(app, ["ckpt", "migrate", str(path)]).exit_code == 0
    assert windows
    assert CliRunner().invoke(app, ["ckpt", "convert", str(path), str(tmp_path / "a.pt")]).exit_code == 0
    assert "a.pt" in windows


def test_a_save_that_fails_there_says_why_and_leaves_nothing(tmp_path, windows, monkeypatch):
    def full(file, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    saved(tmp_path, 1)
    monkeypatch.setattr(writer.os, "write", full)
    with pytest.raises(OSError, match="the checkpoint needs"):
        saved(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.safetensors"]


def test_a_file_that_somebody_reads_is_replaced_when_they_have_read_it(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("new")
    attempts = []

    def replace(source, target, real=os.replace):
        attempts.append(source)
        if len(attempts) < 3:
            raise PermissionError(13, "The process cannot access the file")
        real(source, target)

    monkeypatch.setattr(files.sys, "platform", "win32")
    monkeypatch.setattr(files.os, "replace", replace)
    files.replace(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "new"
    assert len(attempts) == 3


def test_a_folder_with_a_pipe_in_a_process_of_its_own(tmp_path):
    """No thread of torch's or ours waits for the pipe either."""
    saved(tmp_path, 1)
    pipe(tmp_path / "step-00000002.safetensors")
    code = f"import surefoot; print(surefoot.load({str(tmp_path)!r}).step)"
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=300, check=True
    )
    assert done.stdout == "1\n"
