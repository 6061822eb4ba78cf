"""What copies need of a server that holds experts: `server.carrying.CarriedExperts`, or a few lines in a test."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from labkit.contact import Contact
from labkit.copies.messages import CopyHead

Plain = bool | int | float | str | None


@dataclass(frozen=True, slots=True)
class PackedExpert:
    """An expert's whole state at one moment.

    Args:
        data: The bytes of a checkpoint.
        updates: Optimizer steps that it had made.
        crc32: The checksum of its state, as checkpoints have it.
        kind: What it is.
        backend: How it is trained: fields of `BackendConfig`.
    """

    data: bytes | bytearray
    updates: int
    crc32: str
    kind: str
    backend: Mapping[str, Plain]


Pack = Callable[[], Awaitable[PackedExpert]]  # raises `RPCError` if the state cannot be taken


class ServedExperts(Protocol):
    """The experts of one server, as they come and go. All of it belongs to one trio thread."""

    @property
    def held(self) -> Mapping[str, int]:
        """The experts that are served, with the epoch in which each is."""

    @property
    def largest_copy(self) -> int:
        """Bytes that the file of a copy may have at most."""

    def updates(self, uid: str) -> int:
        """Optimizer steps that an expert has made."""

    async def pack(self, uid: str) -> PackedExpert:
        """Returns an expert's state, taken between two batches. Raises `RPCError` if it cannot be taken."""

    def check(self, head: CopyHead, path: Path) -> None:
        """Check the file of a copy, in any thread. Raises `CheckpointError` if this server could not carry it on."""

    async def adopt(self, uid: str, path: Path, backend: Mapping[str, Plain], epoch: int) -> None:
        """Carry an expert on from the file of a copy, and serve it from now on. Raises `LabkitError` if it cannot."""

    def is_kept(self, uid: str) -> bool:
        """Whether an expert is not to be given away only to make loads even, as while its state is being loaded."""

    async def hold(self, uid: str) -> None:
        """Let requests of an expert wait from now on. Returns when no batch of it is being computed any more."""

    def release(self, uid: str) -> None:
        """Let them go on."""

    def give_up(self, uid: str, to: Contact | None, epoch: int) -> Pack | None:
        """Serve an expert no more, and tell who calls it where it is, if that is known.

        Returns what takes its state as it was, after the batch that it is in; None if it was not served.
        """

    def moved(self, uid: str) -> tuple[Contact, int] | None:
        """Where an expert is that was given up, and its epoch there, if that is known."""

    def raise_epoch(self, uid: str, epoch: int) -> None:
        """Note that an expert is served with a higher epoch than so far."""

    def name_copies(self, copies: Mapping[str, tuple[bytes, ...]], *, at_once: bool) -> None:
        """Let it be declared who has copies, at once or with all the rest: the first bytes of keys, by expert."""
