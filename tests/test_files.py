"""Files that are whole or as they were, and what a terminal can show."""

import errno
import io
import os
import stat
import sys
import threading

import pytest

from surefoot import files
from surefoot.files import open_regular, write_whole
from surefoot.terminal import in_encoding, printable, spell_out_the_rest


def test_a_file_is_replaced_as_a_whole_and_keeps_its_mode(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("old")
    path.chmod(0o640)
    write_whole(path, b"new\n")
    assert path.read_bytes() == b"new\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert [*tmp_path.iterdir()] == [path]


def test_a_link_goes_on_pointing_to_the_file(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "page").write_text("old")
    (tmp_path / "link").symlink_to("there/page")
    write_whole(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there" / "page").read_text() == "new"


@pytest.mark.parametrize("step", ["write", "replace"])
def test_what_was_there_stays_when_the_disk_is_full(tmp_path, monkeypatch, step):
    path = tmp_path / "page.html"
    path.write_text("old")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    if step == "replace":
        monkeypatch.setattr(files.os, "replace", full)
    else:
        monkeypatch.setattr(files.shutil, "copymode", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*page\.html'"):
        write_whole(path, b"new")
    assert path.read_text() == "old"
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")  # noqa: PTH110
def test_a_device_is_written_to_and_not_replaced():
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        write_whole("/dev/full", b"x")
    write_whole(os.devnull, b"x")
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)  # noqa: PTH116
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)  # noqa: PTH116


def test_a_pipe_is_written_to(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    got = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    write_whole(tmp_path / "pipe", b"page")
    reader.join(10)
    assert got == [b"page"]


def test_a_folder_is_not_written_to(tmp_path):
    with pytest.raises(IsADirectoryError, match=tmp_path.name):
        write_whole(tmp_path, b"x")


def test_a_pipe_that_takes_the_place_of_a_file_is_not_waited_for(tmp_path, monkeypatch):
    """Between the look at a path and its opening anything may happen."""
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(files.os, "stat", lambda *_: os.lstat(__file__))
    with pytest.raises(OSError, match="Not a file but a named pipe"):
        open_regular(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("utf-8", "● 3 µs ±1 │└─ ⡸⠉⣀ █▁ ☃"),
        ("ascii", "* 3 us +-1 |+- :'. #_ \\u2603"),
        ("latin-1", "* 3 µs ±1 |+- :'. #_ \\u2603"),
        (None, "* 3 us +-1 |+- :'. #_ \\u2603"),
        ("no such encoding", "* 3 us +-1 |+- :'. #_ \\u2603"),
    ],
)
def test_characters_that_an_encoding_lacks(encoding, expected):
    assert in_encoding("● 3 µs ±1 │└─ ⡸⠉⣀ █▁ ☃", encoding) == expected


def test_streams_spell_out_what_they_lack(monkeypatch):
    raw = io.BytesIO()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(raw, encoding="ascii", errors="surrogateescape"))
    spell_out_the_rest()
    sys.stdout.write("● ä \udcff\n")
    sys.stdout.flush()
    assert raw.getvalue() == b"* \\xe4 \\udcff\n"
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    spell_out_the_rest()


def test_control_characters_are_spelt_out():
    assert printable("a ä\n☃") == "a ä\n☃"
    assert printable("\x1b[31mred\x07\ud800\u202e") == "\\x1b[31mred\\x07\\ud800\\u202e"
