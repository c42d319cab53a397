"""Rewriting files of earlier versions of the format in the present one."""

from pathlib import Path

from surefoot.checkpoint.header import FORMAT
from surefoot.checkpoint.reader import Checkpoint
from surefoot.checkpoint.writer import replacing, write_into


def migrate_file(path: Path) -> str:
    """Rewrite a file in the present version of the format, atomically, if it is of an earlier one.

    Returns:
        What was done, in words.

    Raises:
        CheckpointError: it is damaged, or too new.
        OSError: it could not be written; it is as it was.
    """
    checkpoint = Checkpoint(path)
    was = checkpoint.header.manifest["format"]
    if was == FORMAT:
        return f"has format {FORMAT} already"
    checkpoint.verify()
    with replacing(path, checkpoint.header.file_size) as file:
        write_into(file, {name: checkpoint.tensor(name) for name in checkpoint.places}, checkpoint.manifest)
        checkpoint.release()
    return f"from format {was} to {FORMAT}"
