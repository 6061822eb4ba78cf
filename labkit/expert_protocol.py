"""The words of a call to an expert: method names, bodies and answers. Both wings import it, and neither the other.

On a batch's way: `client/expert_client` sends an `ExpertRequest` with the tensors, `server/server` answers with an
`ExpertReply` and tensors. The words go over the wire as short lists, and whoever reads them checks them: an answer with
numbers that cannot be is a `BadReply`.
"""

from __future__ import annotations

import unicodedata
from typing import Annotated, Literal

import msgspec

from labkit.contact import Contact

Direction = Literal["forward", "backward"]

FORWARD = "expert.forward"  # inputs -> output
BACKWARD = "expert.backward"  # inputs and the gradients of the outputs -> gradients of the inputs; trains the expert
SCHEMA = "expert.schema"  # an `ExpertRequest` without tensors -> its `ExpertSchema`, or None if that is not known
SNAPSHOT = "expert.snapshot"  # an expert's uid -> a `SnapshotHead`; the server keeps the snapshot for a while
SNAPSHOT_PART = "expert.snapshot_part"  # a `SnapshotPart` -> the bytes of a checkpoint from there on, uint8 [n]
SNAPSHOT_DONE = "expert.snapshot_done"  # the token of a snapshot -> nothing; it is not needed any more
STATISTICS = "server.statistics"  # nothing -> `server.statistics.ServerStatistics`
MAX_TENSORS = 16  # of the inputs of an expert, and of its outputs
MAX_PART = 4 << 20  # bytes of a snapshot in one answer
MAX_LABEL = 64  # characters of the name that its owner gives a server
METHODS: dict[Direction, str] = {"forward": FORWARD, "backward": BACKWARD}

# The numbers come from a stranger, so all of them are bounded. (NaN is not >= 0.)
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e9)]


class TensorSchema(msgspec.Struct, array_like=True, frozen=True):
    """One input or output of an expert.

    Args:
        dtype: Such as "float32".
        shape: Of one row; -1 where any size will do.
        name: The keyword by which an input is handed over; "" if it is handed over by its place.
    """

    dtype: Annotated[str, msgspec.Meta(max_length=32)]
    shape: Annotated[tuple[Annotated[int, msgspec.Meta(ge=-1, le=1 << 31)], ...], msgspec.Meta(max_length=7)]
    name: Annotated[str, msgspec.Meta(max_length=64)] = ""


class ExpertSchema(msgspec.Struct, array_like=True, frozen=True):
    """What an expert takes and what it gives, each tensor [rows, *shape]."""

    inputs: Annotated[tuple[TensorSchema, ...], msgspec.Meta(max_length=MAX_TENSORS)]
    outputs: Annotated[tuple[TensorSchema, ...], msgspec.Meta(max_length=MAX_TENSORS)]


class ExpertRequest(msgspec.Struct, array_like=True):
    """The body of a call to an expert.

    The tensors beside it, each [rows, ...], are the expert's inputs and, in a backward call, the gradients of its
    outputs behind them.

    Args:
        uid: The expert that is called.
        forward_updates: In a backward call, the `updates` with which the forward call of the same rows was answered, if
            known. The server tells from it how stale the gradient is.
        outputs: In a backward call, how many of the tensors are gradients of outputs.
        keywords: The names of the last inputs, which are handed to the expert by keyword.
        train: Whether a backward call trains the expert. False asks for the gradients of the inputs only.
        epoch: The expert's epoch, as far as the caller knows (see `ExpertInfo`).
    """

    uid: str
    forward_updates: Count | None = None
    outputs: Annotated[int, msgspec.Meta(ge=1, le=MAX_TENSORS)] = 1
    keywords: Annotated[
        tuple[Annotated[str, msgspec.Meta(max_length=64)], ...], msgspec.Meta(max_length=MAX_TENSORS)
    ] = ()
    train: bool = True
    epoch: Count = 0


class ExpertReply(msgspec.Struct, array_like=True):
    """The body of an expert's answer.

    The tensors beside it are the outputs, each [rows, ...], or, for a backward call, the gradients of the
    floating-point inputs in their order.

    Args:
        queue_seconds: How long the request waited for its batch.
        compute_seconds: How long the whole batch took.
        updates: Optimizer steps that the expert has made by now.
        leaving: Whether the server is about to stop, and the expert is not to be called again there.
        epoch: The expert's epoch where it is now.
        moved: Where the expert is now, if it is not here any more. Then nothing was computed, and there are no tensors:
            the caller asks there.
    """

    queue_seconds: Seconds
    compute_seconds: Seconds
    updates: Count
    leaving: bool = False
    epoch: Count = 0
    moved: Contact | None = None


ShortText = Annotated[str, msgspec.Meta(max_length=200)]
Token = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]


class SnapshotHead(msgspec.Struct, array_like=True, frozen=True):
    """An expert's whole state at one moment, which a server keeps to be read in parts.

    Args:
        token: What to ask for it with.
        size: Bytes of the checkpoint that it is read as.
        updates: Optimizer steps that the expert had made.
        crc32: Of the state, as checkpoints have it.
        kind: What the expert is.
        backend: How it is trained: fields of `BackendConfig`.
    """

    token: Token
    size: Annotated[int, msgspec.Meta(ge=1, le=1 << 40)]
    updates: Count
    crc32: Annotated[str, msgspec.Meta(min_length=8, max_length=8)]
    kind: Annotated[str, msgspec.Meta(max_length=1000)] = ""
    backend: Annotated[dict[ShortText, bool | int | float | ShortText | None], msgspec.Meta(max_length=64)] = {}


class SnapshotPart(msgspec.Struct, array_like=True, frozen=True):
    """Which part of a snapshot is wanted: `MAX_PART` bytes from `offset` on, or what is left."""

    token: Token
    offset: Count


def clean_label(text: str) -> str:
    """Returns the name that somebody has given a server, in one line and without characters that a terminal obeys."""
    plain = "".join(letter if unicodedata.category(letter)[0] != "C" else " " for letter in text)
    return " ".join(plain.split())[:MAX_LABEL].strip()
