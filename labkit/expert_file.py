"""An expert's state as a file: the form of checkpoints, and of copies at other servers.

A batch passes by. It is a file of tensors (`tensor_files`) that says whose state it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from labkit.errors import CheckpointError
from labkit.tensor_files import CHECKSUM, pack_tensors, read_tensors, separate

FORMAT = "labkit expert 1"
WAY_OUT = "move it away to start this expert afresh, or put a good copy in its place"


class DamagedCheckpoint(CheckpointError):
    """A checkpoint cannot be read at all, or its checksum differs."""


def metadata_of(uid: str, kind: str) -> dict[str, str]:
    """Returns what the file of an expert says of itself, beside the checksum."""
    return {"format": FORMAT, "uid": uid, "kind": kind}


def pack_expert(uid: str, state: Mapping[str, Tensor], *, kind: str = "") -> tuple[bytearray, str]:
    """The bytes of an expert's file, as `checkpoints.save_expert` would write it, and the checksum of its state."""
    tensors = separate(state)
    return pack_tensors(tensors, metadata_of(uid, kind))


def read_expert(path: Path, uid: str, kind: str = "") -> tuple[dict[str, Tensor], str]:
    """Read an expert's file. Changes nothing on disk.

    Args:
        path: The file.
        uid: The expert.
        kind: What the expert has to be; any kind will do if it is empty.

    Returns:
        The state, exact to the bit, and its checksum.

    Raises:
        DamagedCheckpoint: The file is damaged.
        CheckpointError: The file is not labkit's, or of another expert or kind.
    """
    try:
        tensors, metadata, whole = read_tensors(path)
    except ValueError as error:
        raise DamagedCheckpoint(f"{path} cannot be read as a checkpoint ({error}); {WAY_OUT}") from error
    if metadata.get("format") != FORMAT:
        found = metadata.get("format", "no format")
        raise CheckpointError(f"{path} is not a checkpoint of this version (it says {found!r}); {WAY_OUT}")
    if metadata.get("uid") != uid:
        raise CheckpointError(f"{path} holds expert {metadata.get('uid')!r}; {WAY_OUT}")
    if kind and metadata.get("kind") and _short(metadata["kind"]) != _short(kind):
        raise CheckpointError(f"{path} holds an expert of kind {metadata['kind']!r}, not {kind!r}; {WAY_OUT}")
    if not whole:
        raise DamagedCheckpoint(f"{path} is damaged (its checksum differs); {WAY_OUT}")
    return tensors, metadata[CHECKSUM]


def _short(kind: str) -> str:
    """A kind without its module, which differs between a script that is run and the same file when it is imported."""
    return kind.rpartition(":")[2]
