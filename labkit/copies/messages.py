"""The words of copies: what a primary and a backup say to each other. Each number from a peer is bounded.

A copy travels in parts, each answered before the next is sent:

    copies.offer    `CopyHead` -> `CopyOffer`: a token, or none if the backup holds this very copy; a small copy may lie
                    beside the head, uint8 [n], and is checked and on disk then
    copies.part     `CopyPart`, and the bytes beside it, uint8 [n], or how many are those of the older copy -> nothing;
                    they are on their way to the disk
    copies.done     token -> `CopyKept`: the copy is checked and on disk, and replaces the older one

Then the backup watches the primary, and takes the expert over when that is gone, or asks it to:

    copies.watch    `Watched` -> `WatchReply`: which copies are kept, and how far the experts have come
    copies.probe    a contact -> bool: whether another server answers that the asker does not reach
    copies.have     uids -> a `CopyState` for each, or None
    copies.take     `Take`: serve the expert from now on -> `Taken`, when it is declared
    copies.meet     `Meet`: who serves which experts -> a `ServedState` for each that stays at the one that answers
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from labkit.contact import Contact
from labkit.expert_protocol import Count, Seconds, ShortText, Token
from labkit.expert_uid import split_uid

OFFER = "copies.offer"
PART = "copies.part"
DONE = "copies.done"
WATCH = "copies.watch"
PROBE = "copies.probe"
HAVE = "copies.have"
TAKE = "copies.take"
MEET = "copies.meet"
MAX_WATCHED = 1024  # experts in one message
MAX_HOLD = 10.0  # seconds for which an answer to `copies.watch` may be kept back
MAX_PART = 2 << 20  # bytes of a copy in one call
MAX_SAME = 4 << 20  # bytes in one call that the backup takes from its older copy

Uid = Annotated[str, Meta(max_length=160)]


class CopyHead(msgspec.Struct, array_like=True, frozen=True):
    """What a copy is of. It travels before the bytes, and is kept beside them.

    Args:
        uid: The expert.
        epoch: Of its primary.
        updates: Optimizer steps that it had made.
        size: Bytes of the file (`expert_file.pack_expert`).
        crc32: Of the state, as that file has it.
        kind: What the expert is.
        backend: How it is trained: fields of `BackendConfig`.
        primary: The server that sends it.
        reserve: Whether it is one that is seldom made anew, for the case that all others are gone.

    Raises:
        ValueError: The uid is none, or the primary is not to be called.
    """

    uid: Uid
    epoch: Count
    updates: Count
    size: Annotated[int, Meta(ge=1, le=1 << 40)]
    crc32: Annotated[str, Meta(min_length=8, max_length=8)]
    kind: Annotated[str, Meta(max_length=1000)]
    backend: Annotated[dict[ShortText, bool | int | float | ShortText | None], Meta(max_length=64)]
    primary: Contact
    reserve: bool = False

    def __post_init__(self) -> None:
        split_uid(self.uid)  # which leads out of no folder
        if not self.primary.is_safe:
            raise ValueError(f"{self.primary.endpoint} would be called without encryption")

    @property
    def version(self) -> tuple[int, int]:
        """`(epoch, updates)`: of two copies of an expert, the higher one is newer."""
        return self.epoch, self.updates


class CopyOffer(msgspec.Struct, array_like=True, frozen=True):
    """The answer to an offer.

    Args:
        token: Names the transfer; None if there is nothing to send, since it is held.
        older: The checksum of the copy that is held instead, from which bytes can be taken; empty if there is none.
        took: Seconds that it took to keep a copy that came along.
    """

    token: Token | None = None
    older: Annotated[str, Meta(max_length=8)] = ""
    took: Seconds = 0.0


class CopyPart(msgspec.Struct, array_like=True, frozen=True):
    """What comes next in a copy, right behind what has been sent.

    Args:
        token: Names the transfer.
        offset: Where it belongs.
        same: So many bytes are those of the older copy, at the same place; 0 if they are sent along.
    """

    token: Token
    offset: Count
    same: Annotated[int, Meta(ge=0, le=MAX_SAME)] = 0


class CopyKept(msgspec.Struct, array_like=True, frozen=True):
    """The answer to `copies.done`: how many updates the copy holds that is kept now."""

    updates: Count


class CopyState(msgspec.Struct, array_like=True, frozen=True):
    """How fresh a copy is. `served`: whether it is no copy any more, but the expert itself, which is served there."""

    uid: Uid
    epoch: Count
    updates: Count
    served: bool = False


class Watched(msgspec.Struct, array_like=True, frozen=True):
    """The body of `copies.watch`.

    Args:
        by: Who keeps copies of experts of the server that is called.
        copies: Which.
        hold: Seconds for which the answer may be kept back, if nothing has happened to these experts. Meanwhile a
            connection that breaks tells the caller at once that the server is gone.
    """

    by: Contact
    copies: Annotated[list[CopyState], Meta(max_length=MAX_WATCHED)]
    hold: Annotated[float, Meta(ge=0, le=MAX_HOLD)] = 0.0


class WatchedExpert(msgspec.Struct, array_like=True, frozen=True):
    """How far an expert has come at its server.

    Args:
        epoch: In which epoch it is served.
        updates: Optimizer steps that it has made.
        drop: Whether the copy is needed no more.
        moved: Where it is served instead, in that epoch, if it was given up; `updates` is not known then.
    """

    epoch: Count
    updates: Count
    drop: bool = False
    moved: Contact | None = None


class WatchReply(msgspec.Struct, array_like=True, frozen=True):
    """The answer to `Watched`: for each copy, in their order; None for an expert that is not served there."""

    experts: Annotated[list[WatchedExpert | None], Meta(max_length=MAX_WATCHED)]


class Take(msgspec.Struct, array_like=True, frozen=True):
    """The body of `copies.take`.

    Args:
        copy: The copy to carry on, which has to be exactly this one.
        load: How many experts the server that gives it serves, if it only wants loads to be even; None if it leaves.
    """

    copy: CopyState
    load: Count | None = None


class Taken(msgspec.Struct, array_like=True, frozen=True):
    """The answer to `copies.take`: the epoch in which the expert is served from now on, beside how many others."""

    epoch: Count
    experts: Count


class ServedState(msgspec.Struct, array_like=True, frozen=True):
    """How far an expert has come at a server that serves it.

    Args:
        uid: The expert.
        epoch: In which epoch it is served.
        updates: Optimizer steps that it has made.
        since: Steps that it had made, as far as is known, when it was taken over; those beyond its copy count as lost.
        reserve: Whether it was taken over from the copy in reserve.
        at: The server to which it was given, if it is not served here any more.
    """

    uid: Uid
    epoch: Count
    updates: Count
    since: Count = 0
    reserve: bool = False
    at: Contact | None = None


class Meet(msgspec.Struct, array_like=True, frozen=True):
    """The body of `copies.meet`: who calls, and which experts it serves."""

    by: Contact
    experts: Annotated[list[ServedState], Meta(max_length=MAX_WATCHED)]
