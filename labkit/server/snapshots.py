"""An expert's whole state, read over the network: how a run saves experts that live on other machines.

Beside a batch's way: `Snapshots` is the server's side, with methods beside those of `server/server`, and
`fetch_snapshot` the caller's. A snapshot is taken between two batches and read in parts, as the bytes of a checkpoint
(safetensors; nothing is unpickled), so it is of one moment however long the reading takes.

Who may call an expert may read it: all members of a swarm, through the same encrypted connections. A server keeps few
snapshots, and each for a short time after it was read last, since each takes as much memory as its expert.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import trio
from torch import Tensor

from labkit.contact import Contact
from labkit.errors import BadReply, BadRequest, CheckpointError, Overloaded, RemoteFailure, UnknownExpert
from labkit.expert_file import pack_expert
from labkit.expert_protocol import (
    MAX_PART,
    SNAPSHOT,
    SNAPSHOT_DONE,
    SNAPSHOT_PART,
    SnapshotHead,
    SnapshotPart,
    Token,
)
from labkit.server.checkpoints import load_expert
from labkit.server.runtime import Runtime
from labkit.wire.rpc_types import BULK, AsyncMethod, Caller, Methods, Reply, Request, SyncMethod
from labkit.wire.timers import Timer, Timers

MAX_SNAPSHOTS = 4  # that a server keeps at the same time
LEASE = 30.0  # seconds after which a snapshot that is not read is dropped
LIFETIME = 900.0  # seconds after which it is dropped even if it is read
RETRY_INTERVAL = 0.2  # seconds between two requests to a server that keeps too many
CALL_TIMEOUT = 60.0  # seconds that one call may take
BUSY_TIMEOUT = 120.0  # seconds in which a server has to find room for a snapshot
WAY_OUT = "save again when it is better, or ask whoever runs it"


@dataclass(eq=False, slots=True)
class _Kept:
    """A snapshot that is kept to be read."""

    data: bytes | bytearray  # of a checkpoint
    until: float  # on trio's clock
    lease: Timer | None = None


class Snapshots:
    """The server's side: takes snapshots of its experts and keeps them while they are read.

    Args:
        runtime: Holds the experts.
        timers: The network's, for the leases.
        check: Raises `RPCError` if an expert is not to be read here now; see `Holdings.check_readable`.
    """

    def __init__(self, runtime: Runtime, timers: Timers, check: Callable[[str], object] = lambda uid: None) -> None:
        self._check = check
        self._runtime = runtime
        self._timers = timers
        self._kept: dict[bytes, _Kept] = {}
        self._making = 0
        self.methods: Methods = {
            SNAPSHOT: AsyncMethod(self.rpc_snapshot, str),
            SNAPSHOT_PART: SyncMethod(self.rpc_part, SnapshotPart),
            SNAPSHOT_DONE: SyncMethod(self.rpc_done, Token),
        }

    async def rpc_snapshot(self, request: Request) -> Reply:
        """Take a snapshot of an expert between two batches, and keep it. Answers with a `SnapshotHead`."""
        uid: str = request.body
        backend = self._runtime.backends.get(uid)
        if backend is None:
            raise UnknownExpert(f"this server does not hold expert {uid[:200]!r}; look it up again")
        self._check(uid)
        if len(self._kept) + self._making >= MAX_SNAPSHOTS:
            raise Overloaded(f"{MAX_SNAPSHOTS} snapshots of experts are being read here already")
        self._making += 1
        try:
            state = await self._runtime.snapshot(uid)
            updates = int(state["counter.updates"])
            data, crc32 = await trio.to_thread.run_sync(lambda: pack_expert(uid, state, kind=backend.kind))
            self._check(uid)  # it may have been given up meanwhile
        except RemoteFailure:
            if not self._runtime.stopped:
                raise
            raise UnknownExpert(f"this server ends, and its expert {uid} with it; look it up again") from None
        finally:
            self._making -= 1
        token = secrets.token_bytes(16)
        kept = _Kept(data, trio.current_time() + LIFETIME)
        self._kept[token] = kept
        self._renew(token, kept)
        return Reply(SnapshotHead(token, len(data), updates, crc32, backend.kind[:1000], asdict(backend.config)))

    def rpc_part(self, request: Request) -> Reply:
        """Answer with a part of a snapshot: uint8 [n]."""
        part: SnapshotPart = request.body
        kept = self._kept.get(part.token)
        if kept is None:
            raise BadRequest("this snapshot is not kept any more; take another")
        if part.offset >= len(kept.data):
            raise BadRequest(f"a snapshot of {len(kept.data)} bytes has none at {part.offset}")
        self._renew(part.token, kept)
        data = bytearray(memoryview(kept.data)[part.offset : part.offset + MAX_PART])
        return Reply(None, [torch.frombuffer(data, dtype=torch.uint8)])

    def rpc_done(self, request: Request) -> Reply:
        """Forget a snapshot."""
        self._drop(request.body)
        return Reply()

    def _renew(self, token: bytes, kept: _Kept) -> None:
        if kept.lease is not None:
            self._timers.cancel(kept.lease)
        kept.lease = self._timers.at(min(trio.current_time() + LEASE, kept.until), self._drop, token)

    def _drop(self, token: bytes) -> None:
        kept = self._kept.pop(token, None)
        if kept is not None and kept.lease is not None:
            self._timers.cancel(kept.lease)


async def fetch_head(caller: Caller, contact: Contact, uid: str) -> SnapshotHead:
    """Let a server take a snapshot of an expert. Read it within `LEASE` seconds, and `release` it.

    Raises:
        RPCError: The server does not answer, or has no such expert, or keeps too many snapshots for long.
    """
    with trio.move_on_after(BUSY_TIMEOUT):
        while True:
            try:
                reply = await caller.call(contact, SNAPSHOT, uid, returns=SnapshotHead, timeout=CALL_TIMEOUT, lane=BULK)
                head = reply.body
                assert isinstance(head, SnapshotHead)
                return head
            except Overloaded:
                await trio.sleep(RETRY_INTERVAL)
    raise Overloaded(f"the server of {uid} has had no room for a snapshot in {BUSY_TIMEOUT:.0f} s; {WAY_OUT}")


async def release(caller: Caller, contact: Contact, head: SnapshotHead) -> None:
    """Tell a server that a snapshot is not needed any more. Raises `RPCError`."""
    await caller.call(contact, SNAPSHOT_DONE, head.token, timeout=CALL_TIMEOUT, lane=BULK)


async def fetch_snapshot(caller: Caller, contact: Contact, uid: str, folder: Path) -> SnapshotHead:
    """Read an expert's whole state, as it is at one moment, into its checkpoint in a folder.

    What arrives is checked as a checkpoint is: its form, whose it is, its kind and its checksum.

    Args:
        caller: Makes the calls.
        contact: The server of the expert.
        uid: The expert.
        folder: Where its file is written, which is not one that a server saves to.

    Raises:
        RPCError: The server has not given the state; `BadReply` if what it gave is no state of this expert.
        OSError: The file could not be written.
    """
    head = await fetch_head(caller, contact, uid)
    path = folder / f"{uid}.safetensors"
    free = shutil.disk_usage(folder).free
    if head.size > free:
        await release(caller, contact, head)
        raise OSError(f"expert {uid} takes {head.size / 1e9:.2f} GB, and {folder} has {free / 1e9:.2f} GB left")
    async with await trio.open_file(path, "wb") as file:
        offset = 0
        while offset < head.size:
            part = SnapshotPart(head.token, offset)
            reply = await caller.call(contact, SNAPSHOT_PART, part, timeout=CALL_TIMEOUT, lane=BULK)
            data = _checked(reply.tensors, min(MAX_PART, head.size - offset), uid)
            await file.write(data.numpy().data)
            offset += len(data)
        await file.flush()
        await trio.to_thread.run_sync(os.fsync, file.fileno())
    await release(caller, contact, head)
    await trio.to_thread.run_sync(_check_file, folder, uid, head)
    return head


def _checked(tensors: object, size: int, uid: str) -> Tensor:
    if isinstance(tensors, (list, tuple)) and len(tensors) == 1:
        (data,) = tensors
        if isinstance(data, Tensor) and data.dtype == torch.uint8 and data.shape == (size,):
            return data
    raise BadReply(f"the server of {uid} has sent something else than {size} bytes of its state")


def _check_file(folder: Path, uid: str, head: SnapshotHead) -> None:
    try:
        state = load_expert(folder, uid, kind=head.kind)
    except CheckpointError as error:
        raise BadReply(f"the server of {uid} has sent no state of it: {error}") from None
    updates = None if state is None else state.get("counter.updates")
    if updates is None or updates.shape != () or int(updates) != head.updates:
        raise BadReply(f"the server of {uid} has sent another state of it than it said")
