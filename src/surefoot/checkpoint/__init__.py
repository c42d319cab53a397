"""Checkpoints: verified when they are loaded, safe to open, atomic, quick to inspect.  See docs/checkpoints.md.

`save` and `load` are the whole of it for a training loop; `Checkpoint` opens one file to look into it.
"""

import logging
import os
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from surefoot.checkpoint import folder
from surefoot.checkpoint.background import BACKGROUND
from surefoot.checkpoint.collect import Contents, collect_contents, objects_of
from surefoot.checkpoint.folder import Skipped
from surefoot.checkpoint.json_codec import decode
from surefoot.checkpoint.manifest import manifest_of
from surefoot.checkpoint.ranks import Ranks, ranks_of
from surefoot.checkpoint.reader import Checkpoint
from surefoot.checkpoint.rename import Rename, Renaming
from surefoot.checkpoint.restore import restore_objects
from surefoot.checkpoint.writer import write
from surefoot.errors import CheckpointError

__all__ = ["Checkpoint", "CheckpointError", "Loaded", "Skipped", "load", "save", "wait"]

StrPath = str | os.PathLike[str]
_log = logging.getLogger(__name__)


class Loaded(NamedTuple):
    """What `load` has loaded.

    Attributes:
        path: the file.
        step: the step under which it was saved; None for a single file without one.
        extra: the plain data that was saved, tensors in it copied; None if there was none.
        skipped: newer checkpoints that are damaged or cannot be read, and why.
        mismatched: what did not match; empty when strict.
        versions: of Python and the libraries with which it was saved.
    """

    path: Path
    step: int | None
    extra: Any
    skipped: list[Skipped]
    mismatched: list[str]
    versions: dict[str, str]


def save(
    path: StrPath,
    *,
    model: Any = None,
    optimizer: Any = None,
    scheduler: Any = None,
    scaler: Any = None,
    sampler: Any = None,
    extra: Any = None,
    rng: bool = True,
    step: int | None = None,
    keep: int | None = None,
    async_: bool = False,
) -> Path:
    """Save a training loop's state, so that `load` in a new process goes on with the same bits.

    The file appears when it is whole and on the disk; until then, what was there before stays.  Where parameters are
    sharded over ranks, all ranks call this, and each writes its shards into a folder beside the file.

    Args:
        path: a folder, in which the file is called `step-<step>.safetensors`; or a file ending in `.safetensors`.
        model: a module, or a dict or list of several; the same holds for the next four.
        optimizer: any optimizer.  Its parameters are saved under their names in `param_groups`, or in the models.
        scheduler: anything with `state_dict` and `load_state_dict`.
        scaler: a `torch.amp.GradScaler`, or the like.
        sampler: a `torch.Generator`, or anything with `state_dict` and `load_state_dict`.
        extra: plain data: None, booleans, numbers, strings, bytes, tensors, arrays, and containers of them.
        rng: save the global random generators of Python, numpy and torch.
        step: number of the step, >= 0; by default, in a folder, one more than the newest's.
        keep: how many checkpoints, >= 1, stay in the folder; by default all.  Older ones are removed after this one
            is whole.
        async_: copy the state and write it in the background.  An error is raised by the next `save`, `load` or `wait`.

    Returns:
        The file.

    Raises:
        TypeError: something is not plain data, or no model, optimizer and so on; the message names it.
        ValueError: `step` or `keep` is out of range.
        OSError: it could not be written; what was there stays.
        RuntimeError: an earlier write in the background has failed, or another rank has.

    Example:
        >>> import tempfile, torch, surefoot
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = surefoot.AdamW(model.named_parameters())
        >>> folder = tempfile.mkdtemp()
        >>> surefoot.save(folder, model=model, optimizer=optimizer, extra={"epoch": 3}, step=1000, keep=3).name
        'step-00001000.safetensors'
        >>> surefoot.load(folder, model=model, optimizer=optimizer).extra
        {'epoch': 3}
    """
    path = Path(path)
    objects = objects_of(model=model, optimizer=optimizer, scheduler=scheduler, scaler=scaler, sampler=sampler)
    ranks = ranks_of(objects)

    def prepare() -> tuple[Contents, tuple[Path, int | None, int] | None]:
        BACKGROUND.wait()
        _check_numbers(path, step, keep)
        contents = collect_contents(objects, extra, rng=rng)
        _refuse_shards(contents, ranks)
        return contents, folder.next_target(path, step) if ranks.rank == 0 else None

    if ranks.alone:
        contents, place = prepare()
        target, number, sequence = place or folder.next_target(path, step)
        write_all: Callable[[Contents], None] = partial(
            _write_and_rotate, target, number=number, sequence=sequence, keep=keep
        )
    else:
        contents, target, write_all = _prepared_on_ranks(ranks, prepare, objects, keep, async_=async_)
    if not async_:
        write_all(contents)
        return target
    copied = contents.copy()
    BACKGROUND.start(target, lambda: write_all(copied))
    return target


def _refuse_shards(contents: Contents, ranks: Ranks) -> None:
    """Refuse sharded tensors that stand where only this process would know of them."""
    if ranks.alone and contents.sharded:
        raise TypeError(
            f"`{next(iter(contents.sharded))}` is sharded, but no parameter of a model or optimizer is, so that other "
            f"ranks may not be saving now; save its full_tensor()"
        )


def _prepared_on_ranks(
    ranks: Ranks,
    prepare: Callable[[], tuple[Contents, Any]],
    objects: Mapping[str, Any],
    keep: int | None,
    *,
    async_: bool,
) -> tuple[Contents, Path, Callable[[Contents], None]]:
    """Return this rank's contents, the file, and what writes them with the other ranks.  All ranks come here."""
    from surefoot.checkpoint import sharded  # noqa: PLC0415 (imports torch.distributed.checkpoint, in 0.3 s)

    own: list[Contents] = []

    def tell() -> tuple[int, dict[str, int], Any, Any]:
        contents, place = prepare()
        own.append(contents)
        facts = sharded.signature(contents), sharded.own_state(contents, objects)
        return *facts, place, folder.shards_of(place[0]) if place else None

    told = ranks.do(tell, "saving")
    if len({signature for signature, *_ in told}) > 1:
        raise ValueError("ranks do not have the same sharded tensors; save the same model and optimizer on all")
    _refuse_own_state([state for _, state, *_ in told])
    _, _, (target, number, sequence), shards = told[0]
    writers = ranks.in_background() if async_ else ranks

    def write_all(contents: Contents) -> None:
        sharded.write_sharded(target, shards, contents, number, sequence, writers)
        if ranks.rank == 0:
            _tidy(target, keep)

    return sharded.in_blocks(own[0]), target, write_all


def _refuse_own_state(states: list[dict[str, int]]) -> None:
    """Refuse plain state of sharded parameters that is not the same on all ranks: one rank's would be loaded by all."""
    for rank, state in enumerate(states):
        for name in state.keys() | states[0].keys():
            if state.get(name) != states[0].get(name):
                raise ValueError(
                    f"`{name}` is a plain tensor beside sharded parameters, and on rank {rank} it is another than on "
                    f"rank 0; state that each rank has for itself, as LBFGS's is, cannot be saved: leave the optimizer "
                    f"out"
                )


def _tidy(target: Path, keep: int | None) -> None:
    """Remove what a new checkpoint has replaced, and older ones beyond `keep`."""
    if keep is not None:
        folder.rotate(target.parent, keep)
    else:
        folder.remove_unreferenced(target.parent)


def _check_numbers(path: Path, step: int | None, keep: int | None) -> None:
    for name, value, least in (("step", step, 0), ("keep", keep, 1)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise ValueError(f"`{name}` must be a whole number >= {least}, but got {value!r}")
    if keep is not None and folder.is_file_name(path):
        raise ValueError(f"`keep` needs a folder of checkpoints, but {path} is one file; give its folder and step=")


def _write_and_rotate(target: Path, contents: Contents, *, number: int | None, sequence: int, keep: int | None) -> None:
    write(target, contents.tensors, manifest_of(contents, number, sequence))
    _tidy(target, keep)


def load(
    path: StrPath,
    *,
    model: Any = None,
    optimizer: Any = None,
    scheduler: Any = None,
    scaler: Any = None,
    sampler: Any = None,
    rng: bool | None = None,
    rename: Rename = None,
    strict: bool = True,
) -> Loaded:
    """Load what `save` has saved into objects that are there.

    Every byte is checked, then every object is asked whether its part fits, and only then is anything changed.  What
    is saved and not asked for is left out.  Where parameters are sharded over ranks, all ranks call this, and each
    reads what it holds, however many have saved and in whatever layout.

    Args:
        path: a folder, of which the newest whole checkpoint is taken; or a file.
        model: as in `save`; its tensors are filled in place, wherever they are.
        optimizer: as in `save`; parameters are matched by name where both sides have names, by position otherwise.
        scheduler: as in `save`.
        scaler: as in `save`.
        sampler: as in `save`.
        rng: set the global random generators; by default if an optimizer is loaded, for that is a resume.
        rename: a function from the saved names of parameters and buffers to their present ones, or a dict of such names
            or of modules.
        strict: refuse unless everything matches.  Otherwise load what matches, and report the rest.

    Returns:
        Which file it was, what was skipped, the extra data and more; see `Loaded`.

    Raises:
        FileNotFoundError: there is no checkpoint.
        CheckpointError: there is no whole one.
        OSError: the folder, or the one file, cannot be read.
        ValueError: it does not fit, with a list of where; nothing has changed.
        RuntimeError: an earlier write in the background has failed.
    """
    objects = objects_of(model=model, optimizer=optimizer, scheduler=scheduler, scaler=scaler, sampler=sampler)
    ranks = ranks_of(objects)
    ranks.do(BACKGROUND.wait, "an earlier save")
    renaming = Renaming(rename)
    checkpoint, skipped = folder.open_newest_whole(path, ranks)
    extra = _extra(checkpoint)
    with_rng = optimizer is not None if rng is None else rng
    mismatched = restore_objects(checkpoint, objects, renaming, ranks, rng=with_rng, strict=strict)
    _log_and_warn(checkpoint, skipped)
    versions: Mapping[str, str] = checkpoint.manifest["versions"]
    return Loaded(checkpoint.path, checkpoint.manifest["step"], extra, skipped, mismatched, dict(versions))


def _extra(checkpoint: Checkpoint) -> Any:
    part = checkpoint.manifest["parts"].get("extra")
    return None if part is None else decode(part["state"], checkpoint.copy)


def _log_and_warn(checkpoint: Checkpoint, skipped: list[Skipped]) -> None:
    _log.info("loaded %s", checkpoint.path)
    if skipped:
        reasons = "\n  ".join(skip.reason for skip in skipped)
        warnings.warn(f"loaded {checkpoint.path}; skipped, since damaged or unreadable:\n  {reasons}", stacklevel=3)


def wait() -> None:
    """Wait until a save in the background has ended.

    Raises:
        RuntimeError: it has failed.
    """
    BACKGROUND.wait()
