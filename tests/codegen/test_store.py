"""Kernels on disk: who may share them, and what becomes of a folder that is damaged, full, foreign or not there."""

import hashlib
import multiprocessing
import os
import platform
import subprocess
import sys
import time

import pytest

from surefoot.codegen import compile as compiling
from surefoot.codegen import notice, store
from surefoot.codegen import processor as processor_module
from surefoot.codegen.processor import host, named, runs_here

SOURCE = "def kernel(launch):\n    store(launch + 8, {number})\n"


def build(number=1):
    return compiling.build_kernel(SOURCE.format(number=number), "small")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty folder for kernels."""
    monkeypatch.setenv("SUREFOOT_CACHE_DIR", str(tmp_path / "kernels"))
    return tmp_path / "kernels"


@pytest.fixture
def compilations(monkeypatch):
    """How often something is compiled."""
    sources, compile_ = [], compiling._compile
    monkeypatch.setattr(compiling, "_compile", lambda *given: [sources.append(given[0]), compile_(*given)][1])
    return sources


def test_source_and_code_are_kept_and_found_again(cache, compilations):
    name = build().name
    assert (cache / f"{name}.py").read_text() == SOURCE.format(number=1)
    assert build().name == name
    assert len(compilations) == 1
    assert {path.name for path in cache.iterdir()} == {f"{name}.o", f"{name}.py", ".locks"}


@pytest.mark.parametrize("damage", [b"", b"x", b"\x00" * 4096], ids=["empty", "short", "zeros"])
def test_a_damaged_entry_is_compiled_again(cache, damage, compilations):
    path = cache / f"{build().name}.o"
    good = path.read_bytes()
    path.write_bytes(damage)
    build()
    assert path.read_bytes() == good
    assert len(compilations) == 2


def test_every_flipped_byte_of_an_entry_is_noticed(cache):
    path = cache / f"{build().name}.o"
    good = path.read_bytes()
    for position in range(0, len(good), 7):
        path.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
        assert store.read(path.name) is None
    path.write_bytes(good)
    assert store.read(path.name) == good[32:]


def test_an_entry_under_another_name_is_not_used(cache):
    path = cache / f"{build().name}.o"
    path.rename(cache / "other.o")
    assert store.read("other.o") is None


needs_owners = pytest.mark.skipif(sys.platform == "win32", reason="files have no mode on Windows")


@needs_owners
@pytest.mark.parametrize("mode", [0o770, 0o777, 0o1777])
def test_a_folder_that_others_can_write_is_neither_read_nor_written(cache, mode, compilations):
    build()
    cache.chmod(mode)
    before = sorted(cache.iterdir())
    build()
    build(2)
    assert len(compilations) == 3
    assert sorted(cache.iterdir()) == before
    assert store.unusable_reason() == f"others can write to {cache}; to use it, chmod go-w {cache}"


@needs_owners
def test_a_file_that_others_can_write_is_not_read(cache):
    path = cache / f"{build().name}.o"
    path.chmod(0o666)
    assert store.read(path.name) is None


@needs_owners
def test_a_folder_of_another_user_is_not_used(cache, monkeypatch):
    path = cache / f"{build().name}.o"
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    if cache.stat().st_uid == 0:  # a folder of root's may be used, as in an image
        assert store.read(path.name) is not None
        os.chown(cache, 54321, -1)
    assert store.read(path.name) is None
    assert "belongs to another user" in store.unusable_reason()


@needs_owners
@pytest.mark.parametrize("of", ["folder", "file"])
def test_links_are_not_followed(cache, of, compilations):
    path = cache / f"{build().name}.o"
    linked = cache if of == "folder" else path
    linked.rename(linked.with_name("elsewhere"))
    linked.symlink_to(linked.with_name("elsewhere"))
    assert store.read(path.name) is None
    build()
    assert len(compilations) == 2
    assert linked.is_symlink() == (of == "folder")


def test_a_folder_that_cannot_be_made_is_done_without(tmp_path, monkeypatch, compilations):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("SUREFOOT_CACHE_DIR", str(tmp_path / "file" / "kernels"))
    assert build().address != 0
    assert build().address != 0
    assert len(compilations) == 2


def test_a_home_that_cannot_be_found_is_done_without(monkeypatch):
    monkeypatch.setenv("SUREFOOT_CACHE_DIR", "~nosuchuser/kernels")
    assert build().address != 0
    assert "SUREFOOT_CACHE_DIR can name a folder" in store.unusable_reason()


def test_a_uid_without_a_home_is_done_without(monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    for name in ("SUREFOOT_CACHE_DIR", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(store.Path, "home", home)
    assert build().address != 0


def test_a_folder_that_can_only_be_read_is_read(cache, monkeypatch, compilations):
    name = build().name

    def refused(*arguments, **options):
        raise PermissionError(13, "read-only file system")

    opened = os.open
    monkeypatch.setattr(os, "open", lambda path, flags, *more: refused() if flags & os.O_CREAT else opened(path, flags))
    assert build().name == name
    assert len(compilations) == 1
    assert build(2).address != 0
    assert len(compilations) == 2


def test_a_full_disk_leaves_nothing_behind(cache, monkeypatch):
    class Full:
        def __init__(self, *arguments):
            os.close(arguments[0])

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def write(self, content):
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fdopen", Full)
        assert build().address != 0
    assert [path.name for path in cache.iterdir()] == [".locks"]


def test_what_killed_writers_left_goes_after_an_hour(cache):
    build()
    old, young = (cache / f"{name}.tmp" for name in ("old", "young"))
    old.write_text("half")
    young.write_text("half")
    os.utime(old, (time.time() - 4000,) * 2)
    build(2)
    assert not old.exists()
    assert young.exists()


def test_the_oldest_goes_where_there_is_a_limit(cache, monkeypatch):
    names = [build(number).name for number in (1, 2, 3)]
    for age, name in zip((300, 100, 200), names, strict=True):
        for path in cache.glob(f"{name}.*"):
            os.utime(path, (time.time() - age,) * 2)
    size = sum(entry.size for entry in store.entries())
    monkeypatch.setattr(store, "LIMIT", size)
    build(4)
    left = {entry.name for entry in store.entries()}
    assert f"{names[0]}.o" not in left
    assert {f"{names[1]}.o", f"{names[2]}.o"} < left
    assert sum(entry.size for entry in store.entries()) <= size


def test_what_is_read_counts_as_used(cache):
    path = cache / f"{build().name}.o"
    os.utime(path, (1e9, 1e9))
    build()
    assert time.time() - path.stat().st_mtime < 60


def test_another_processor_version_or_compiler_has_kernels_of_its_own(cache, monkeypatch):
    names = {build().name}
    for compiler in (("0.1",), ("0.2",), ("0.1", "# changed")):
        monkeypatch.setattr(compiling, "_compiler", lambda given=compiler: given)
        names.add(build().name)
    for processor in (host()._replace(name="another"), host()._replace(features=host().features + ",+less")):
        names.add(f"small_{compiling._key(SOURCE.format(number=1), processor)}")
    assert len(names) == 6
    assert len(list(cache.glob("*.o"))) == 4


def prebuild(processor):
    compiling.prebuild_kernel(SOURCE.format(number=1), "small", processor)


def test_a_kernel_prebuilt_for_a_processor_of_this_name_is_used(cache, compilations):
    prebuild(named(host().name))
    prebuild(named(host().name))
    (path,) = cache.glob("*.o")
    assert build().name == path.stem
    assert len(compilations) == 1


def test_a_kernel_prebuilt_for_this_machine_is_used(cache, compilations):
    prebuild(host())
    build()
    assert len(compilations) == 1


@pytest.mark.parametrize("reason", ["its name is another", "this machine has less"])
def test_a_kernel_prebuilt_for_another_processor_is_not_used(cache, compilations, monkeypatch, reason):
    if reason == "its name is another":
        prebuild(named("nocona" if "sse2" in host().features else "generic"))
    else:
        prebuild(named(host().name))
        monkeypatch.setattr(compiling, "runs_here", lambda processor: processor == host())
    build()
    assert len(compilations) == 2
    assert len(list(cache.glob("*.o"))) == 2


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names of x86 processors")
def test_which_processors_this_one_can_stand_for(monkeypatch):
    assert runs_here(host())
    assert runs_here(named("x86-64"))
    less = host()._replace(features=host().features.replace("+sse4.2", "-sse4.2").replace("+avx", "-avx"))
    monkeypatch.setattr(processor_module, "host", lambda: less)
    runs_here.cache_clear()
    assert runs_here(named("x86-64"))
    assert not runs_here(named("haswell"))
    runs_here.cache_clear()


def _build_and_count(barrier, compiled):
    compile_ = compiling._compile

    def slow(*given):
        compiled.put(os.getpid())
        time.sleep(0.3)
        return compile_(*given)

    compiling._compile = slow
    barrier.wait()
    for number in (1, 2):
        build(number)


@pytest.mark.skipif(store.fcntl is None, reason="there are no locks of files here")
def test_eight_processes_compile_each_kernel_once(cache):
    context = multiprocessing.get_context("fork")
    barrier, compiled = context.Barrier(8), context.SimpleQueue()
    processes = [context.Process(target=_build_and_count, args=(barrier, compiled)) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * 8
    times = 0
    while not compiled.empty():
        compiled.get()
        times += 1
    assert times == 2
    assert len(list(cache.glob("*.o"))) == 2
    assert not list(cache.glob("*.tmp"))


_KILLED = """
import os, time
from surefoot.codegen import compile as compiling
def compile_(*given):
    print("begun", flush=True)
    time.sleep(100)
compiling._compile = compile_
compiling.build_kernel({source!r}, "small")
"""


@pytest.mark.skipif(store.fcntl is None, reason="there are no locks of files here")
def test_a_killed_process_keeps_nobody_waiting(cache, compilations):
    code = _KILLED.format(source=SOURCE.format(number=1))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:  # noqa: S603
        assert process.stdout.readline() == "begun\n"
        process.kill()
    start = time.monotonic()
    build()
    assert time.monotonic() - start < store.PATIENCE / 2
    assert len(compilations) == 1


def test_who_waits_too_long_goes_on(cache, monkeypatch):
    monkeypatch.setattr(store, "PATIENCE", 0.0)
    with store.alone("x"):
        assert build().address != 0


class Terminal:
    def __init__(self, terminal=True):
        self.text, self._terminal = "", terminal

    def isatty(self):
        return self._terminal

    def write(self, text):
        self.text += text

    def flush(self):
        pass


@pytest.mark.parametrize(("terminal", "quiet", "lines"), [(True, "", 1), (True, "1", 0), (False, "", 0)])
def test_who_waits_at_a_terminal_is_told_once(terminal, quiet, lines, monkeypatch):
    stream = Terminal(terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(notice, "AFTER", 0.01)
    monkeypatch.setenv("SUREFOOT_QUIET", quiet)
    notice._said.clear()
    for _ in range(2):
        with notice.notice():
            time.sleep(0.2)
    assert stream.text.count("surefoot: compiling kernels") == stream.text.count("\n") == lines


def test_who_does_not_wait_is_not_told(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    notice._said.clear()
    with notice.notice():
        pass
    assert stream.text == ""


_STEP = """
import torch, surefoot
param = torch.linspace(-1, 1, 1001).requires_grad_()
optimizer = surefoot.Adam([param], lr=0.5, weight_decay=0.1, fused=True)
for power in (1, 2):
    param.grad = param.detach() ** power
    optimizer.step()
print(param.detach().view(torch.int32).tolist())
"""


def step_elsewhere(folder, **environment):
    """Take two steps in a process of its own; return what it prints, and the kernels that it leaves."""
    environment = os.environ | environment | {"SUREFOOT_CACHE_DIR": str(folder)}
    done = subprocess.run(  # noqa: S603 (our own code)
        [sys.executable, "-c", _STEP], env=environment, check=True, timeout=120, capture_output=True, text=True
    )
    return done.stdout, {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.o")}


def test_settings_of_numba_change_nothing(tmp_path):
    settings = {"NUMBA_DISABLE_JIT": "1", "NUMBA_BOUNDSCHECK": "1", "NUMBA_CPU_NAME": "generic", "NUMBA_OPT": "0"}
    assert step_elsewhere(tmp_path / "one", **settings) == step_elsewhere(tmp_path / "other")


def test_kernels_on_disk_are_not_lowered_again(tmp_path, monkeypatch):
    first = step_elsewhere(tmp_path)
    spoiled = _STEP.replace("import torch", "import surefoot.codegen.compile as c; c._compile = None; import torch", 1)
    monkeypatch.setattr(sys.modules[__name__], "_STEP", spoiled)
    assert step_elsewhere(tmp_path) == first
