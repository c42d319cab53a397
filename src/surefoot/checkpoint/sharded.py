"""Writing sharded tensors: torch.distributed.checkpoint says who writes what, and each rank writes its file.

The files of shards stand in a folder of a name that no other save has.  They become a checkpoint when the first rank
writes the file that refers to them, which is as atomic as that of one process: until then what was there before stays,
whichever rank dies.  Each file has the format that a single process writes.
"""

import zlib
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.distributed.tensor import DTensor, Replicate

from surefoot.checkpoint.collect import Contents
from surefoot.checkpoint.dtypes import as_bytes, flat
from surefoot.checkpoint.dtypes import name as dtype_name
from surefoot.checkpoint.folder import writing_shards
from surefoot.checkpoint.json_codec import tensors_in
from surefoot.checkpoint.manifest import manifest_of
from surefoot.checkpoint.ranks import Ranks, parameters_of
from surefoot.checkpoint.reader import Checkpoint, found_shards, whole_places
from surefoot.checkpoint.writer import sync_folder, write
from surefoot.tensors.shards import has_blocks, is_sharded

OWN = ("rng", "sampler")
"""Roles of which every rank has its own state, and keeps it in its file."""


def file_of(rank: int) -> str:
    """Return the name of a rank's file of shards."""
    return f"rank-{rank:05}.safetensors"


def signature(contents: Contents) -> int:
    """Return a number that tells whether ranks mean the same sharded tensors."""
    facts = [(name, tuple(tensor.shape), dtype_name(tensor.dtype)) for name, tensor in contents.sharded.items()]
    return zlib.crc32(repr(facts).encode())


def own_state(contents: Contents, objects: Mapping[str, Any]) -> dict[str, int]:
    """Return checksums of the plain state of optimizers of sharded parameters, which all ranks must have alike."""
    found = {}
    for label, value in objects.items():
        if isinstance(value, torch.optim.Optimizer) and any(map(is_sharded, parameters_of(value))):
            for name in tensors_in(contents.parts[label]["state"]):
                if (tensor := contents.tensors[name]).numel() > 1 and not is_sharded(tensor):
                    found[name] = zlib.crc32(as_bytes(flat(tensor)))
    return found


def in_blocks(contents: Contents) -> Contents:
    """Return contents in which every rank has one block of each sharded tensor; the others are put together on all."""
    tensors = dict(contents.tensors)
    for name, tensor in contents.sharded.items():
        if not has_blocks(tensor):
            mesh = tensor.device_mesh  # type: ignore[attr-defined]
            whole = tensor.full_tensor()  # type: ignore[attr-defined]
            tensors[name] = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return Contents(contents.parts, tensors)


def write_sharded(
    target: Path, folder: Path, contents: Contents, step: int | None, sequence: int, ranks: Ranks
) -> None:
    """Write a checkpoint, on all ranks at once; it appears when all of it is on the disk.

    Args:
        target: the file that refers to the others.
        folder: for the files of shards; new, and removed if anything fails.
        contents: of this rank.
        step: of the checkpoint.
        sequence: its place in the order of saves.
        ranks: who writes.

    Raises:
        OSError: this rank could not write.
        RuntimeError: another rank could not.
    """
    writer = _Writer(target, folder, contents, manifest_of(contents, step, sequence), ranks)
    with ExitStack() as stack:
        ranks.first(lambda: stack.enter_context(writing_shards(folder)), f"saving {target}")
        _save(contents, writer, ranks)


def _save(contents: Contents, writer: "_Writer", ranks: Ranks) -> None:
    try:
        save(dict(contents.sharded), storage_writer=writer, process_group=ranks.group)
    except CheckpointException as error:
        failures = {rank: failure[0] for rank, failure in error.failures.items()}
        if (own := failures.get(ranks.rank)) is not None:
            raise own from None
        rank, other = next(iter(failures.items()))
        raise RuntimeError(f"{writer.target} was not saved: rank {rank} has failed: {other}") from None


class _Writer(StorageWriter):
    """Lets each rank write its share, and at the end the first rank what holds them together."""

    def __init__(
        self, target: Path, folder: Path, contents: Contents, manifest: Mapping[str, Any], ranks: Ranks
    ) -> None:
        self.target = target
        self._folder = folder
        self._contents = contents
        self._manifest = manifest
        self._ranks = ranks

    def reset(self, checkpoint_id: Any = None) -> None:
        """See `StorageWriter`."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """See `StorageWriter`."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """See `StorageWriter`."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """See `StorageWriter`."""
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:  # noqa: ARG003
        """See `StorageWriter`."""
        return True

    def storage_meta(self) -> StorageMeta | None:
        """See `StorageWriter`."""
        return None

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        """Write this rank's file of shards."""
        own = {label: part for label, part in self._contents.parts.items() if label.partition(".")[0] in OWN}
        tensors, chunks = _own_tensors(own, self._contents), {}
        for item in plan.items:
            block = cast("Tensor", planner.resolve_data(item)).detach()
            if block.numel():
                stored, chunk = _named_block(item)
                tensors[stored], chunks[stored] = block, chunk
        path = self._folder / file_of(self._ranks.rank)
        write(path, tensors, {**self._manifest, "parts": own, "chunks": chunks})
        done: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        done.set_result([WriteResult(item.index, item.tensor_storage_size() or 0, path.name) for item in plan.items])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:  # noqa: ARG002
        """Look whether all shards are there, and only then write the file that makes them a checkpoint."""
        files = [Checkpoint(self._folder / file_of(rank)) for rank in range(self._ranks.world)]
        tensors = {
            name: [dtype_name(tensor.dtype), list(tensor.shape)] for name, tensor in self._contents.sharded.items()
        }
        whole_places(tensors, found_shards(files))
        sync_folder(self._folder)
        sync_folder(self._folder.parent)
        shards = {
            "folder": self._folder.name,
            "files": [[file.path.name, file.header.file_size, file.header.crc32] for file in files],
            "tensors": tensors,
        }
        write(self.target, self._contents.plain, {**self._manifest, "shards": shards})


def _own_tensors(parts: Mapping[str, Any], contents: Contents) -> dict[str, Tensor]:
    names = [name for part in parts.values() for name in tensors_in(part)]
    return {name: contents.tensors[name] for name in names}


def _named_block(item: WriteItem) -> tuple[str, list[Any]]:
    """Return the name under which a block is stored, as one would slice it, and of what tensor it is, and where."""
    name, data = item.index.fqn, item.tensor_data
    if data is None:
        raise TypeError(f"`{name}` is not a tensor")
    slices = ", ".join(f"{o}:{o + size}" for o, size in zip(data.chunk.offsets, data.chunk.sizes, strict=True))
    return f"{name}[{slices}]", [name, list(data.chunk.offsets)]
