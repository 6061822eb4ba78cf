"""The backup's side: takes copies in, part by part, and lets them count when they are whole and sound.

Only the primary itself may offer a copy: the connection proves its key. A server takes few copies at a time, and gives
each up that is not sent on; what it had before stays until the new one is whole.
"""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import trio

from labkit.contact import Contact
from labkit.copies.messages import DONE, MAX_PART, OFFER, PART, CopyHead, CopyKept, CopyOffer, CopyPart
from labkit.copies.store import Check, Copy, CopyStore, IncomingCopy, newer_is_kept
from labkit.errors import BadRequest, CheckpointError, Overloaded, RequestRefused
from labkit.expert_protocol import Token
from labkit.wire.rpc_types import AsyncMethod, Methods, Reply, Request

logger = logging.getLogger(__name__)

MAX_TRANSFERS = 2  # at a time
LEASE = 30.0  # seconds after which a copy that is not sent on is given up
SLOWEST = 32 << 10  # bytes a second; one that takes longer is given up, too, after `LIFETIME` more seconds
LIFETIME = 300.0
SHORTEST_PAUSE = 0.1  # seconds between two looks at what is to be given up

Refuse = Callable[[CopyHead], str]  # returns why a copy is not wanted, in words; empty if it is


@dataclass(eq=False, slots=True)
class _Transfer:
    """A copy that is taken in."""

    token: bytes
    incoming: IncomingCopy
    until: float  # when it ends, however it goes on; on trio's clock
    lease: float  # when it ends, unless it goes on
    busy: trio.Lock = field(default_factory=trio.Lock)  # held while its file is written to

    @property
    def sender(self) -> bytes:
        """The key of the primary."""
        return self.incoming.head.primary.key


class CopyReceiver:
    """Takes copies in. Its `methods` have to be served, and `run` has to run.

    Args:
        store: Where they are kept.
        check: Checks the file of a copy before it counts, in a thread; see `checking.check_copy`.
        refuse: Says why a copy is not wanted, as for want of room, or because this server is its primary. It is asked
            before the copy is sent, and again before it counts, and waits for nothing.
        encrypts: Whether connections prove the key of who calls.

    Attributes:
        methods: To be served.
    """

    def __init__(self, store: CopyStore, *, check: Check, refuse: Refuse, encrypts: bool = True) -> None:
        self._store = store
        self._check = check
        self._refuse = refuse
        self._encrypts = encrypts
        self._transfers: dict[bytes, _Transfer] = {}  # by token: those that go on
        self._taken = 0  # of `MAX_TRANSFERS`: those that go on, begin, or end
        self._closed = False
        self._news = trio.Event()  # set when there is one more
        self.methods: Methods = {
            OFFER: AsyncMethod(self.rpc_offer, CopyHead),
            PART: AsyncMethod(self.rpc_part, CopyPart),
            DONE: AsyncMethod(self.rpc_done, Token),
        }

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Give up the copies that are not sent on, until cancelled; then give up all, and take no more."""
        try:
            async with trio.open_nursery() as nursery:
                task_status.started()
                while True:
                    now = trio.current_time()
                    for transfer in list(self._transfers.values()):
                        if min(transfer.lease, transfer.until) <= now and not transfer.busy.locked():
                            nursery.start_soon(self._give_up, transfer)
                    self._news = trio.Event()
                    times = [min(transfer.lease, transfer.until) for transfer in self._transfers.values()]
                    with trio.move_on_at(max(min(times, default=math.inf), now + SHORTEST_PAUSE)):
                        await self._news.wait()
        finally:
            self._closed = True
            with trio.CancelScope(shield=True):
                for transfer in list(self._transfers.values()):
                    await self._give_up(transfer)

    # ------------------------------------------------------------ methods

    async def rpc_offer(self, request: Request) -> Reply:
        """Agree to take a copy in, or say why not. Answers with a `CopyOffer`.

        A small copy may come along, in one part. Then it is checked and counts, as if `copies.done` had been called.
        """
        head: CopyHead = request.body
        began = trio.current_time()
        whole = _bytes_of(request) if request.tensors else None
        if whole is not None and len(whole) != head.size:
            raise BadRequest(f"the copy has {head.size} bytes, and {len(whole)} came along")
        self._check_sender(request, head.primary)
        held = self._store.copies.get(head.uid)
        if held is not None and held.head == head:
            return Reply(CopyOffer())
        self._check_wanted(head)
        for transfer in list(self._transfers.values()):  # the primary begins anew
            if transfer.sender == head.primary.key and transfer.incoming.head.uid == head.uid:
                await self._give_up(transfer)
        if self._taken >= MAX_TRANSFERS:
            raise Overloaded(f"this server is taking {self._taken} copies in, as many as it can at a time")
        self._taken += 1
        try:
            incoming = await self._store.begin(head, b"" if whole is None else whole.numpy().data)
        except BaseException as error:
            self._taken -= 1
            if isinstance(error, OSError):
                raise _cannot_keep(head, error) from None
            raise
        now = trio.current_time()
        until = now + LIFETIME + head.size / SLOWEST
        transfer = _Transfer(secrets.token_bytes(16), incoming, until, now + LEASE)
        if self._closed:
            await self._discard(transfer)
            raise RequestRefused("this server is stopping")
        self._transfers[transfer.token] = transfer
        self._news.set()
        if whole is None:
            older = incoming.older
            return Reply(CopyOffer(transfer.token, "" if older is None else older.head.crc32))
        await self._finish(transfer)
        return Reply(CopyOffer(took=trio.current_time() - began))

    async def rpc_part(self, request: Request) -> Reply:
        """Write a part of a copy to the disk. Answers when it is written."""
        part: CopyPart = request.body
        transfer = self._transfer(request, part.token)
        incoming = transfer.incoming
        data = None if part.same and not request.tensors else _bytes_of(request)
        size = part.same if data is None else len(data)
        if part.offset != incoming.received or part.offset + size > incoming.head.size:
            raise BadRequest(f"{size} bytes at {part.offset} do not follow the {incoming.received} bytes before")
        await self._append(transfer, data, part.same)
        transfer.lease = trio.current_time() + LEASE
        return Reply()

    async def _append(self, transfer: _Transfer, data: torch.Tensor | None, same: int = 0) -> None:
        """Write bytes, or if there are none, those of the older copy."""
        try:
            async with transfer.busy:
                if data is None:
                    await transfer.incoming.append_same(same)
                else:
                    await transfer.incoming.append(data.numpy().data)
        except OSError as error:
            await self._give_up(transfer)
            raise _cannot_keep(transfer.incoming.head, error) from None

    async def rpc_done(self, request: Request) -> Reply:
        """Check a copy that is whole, and let it count. Answers with a `CopyKept`."""
        transfer = self._transfer(request, request.body)
        incoming = transfer.incoming
        if incoming.received != incoming.head.size:
            raise BadRequest(f"{incoming.received} of {incoming.head.size} bytes have been sent")
        return Reply(CopyKept((await self._finish(transfer)).updates))

    async def _finish(self, transfer: _Transfer) -> Copy:
        incoming, head = transfer.incoming, transfer.incoming.head
        del self._transfers[transfer.token]
        try:
            self._check_wanted(head)
            return await incoming.finish(self._check)
        except CheckpointError as error:
            raise RequestRefused(str(error)) from None
        except OSError as error:
            raise _cannot_keep(head, error) from None
        finally:
            with trio.CancelScope(shield=True):
                await self._discard(transfer)

    # ------------------------------------------------------------ checks

    def _check_sender(self, request: Request, primary: Contact) -> None:
        """Raise `RequestRefused` unless the caller is the primary. Who does not encrypt trusts this machine."""
        if request.peer.key != primary.key and (self._encrypts or request.peer.key is not None):
            raise RequestRefused("only an expert's primary sends copies of it")

    def _check_wanted(self, head: CopyHead) -> None:
        if self._closed:
            raise RequestRefused("this server is stopping")
        held = self._store.copies.get(head.uid)
        if held is not None and held.head.version > head.version:
            raise RequestRefused(newer_is_kept(held))
        why = self._refuse(head)
        if why:
            raise RequestRefused(why)

    def _transfer(self, request: Request, token: bytes) -> _Transfer:
        transfer = self._transfers.get(token)
        if transfer is None:
            raise BadRequest("this copy is not taken in any more; offer it again")
        self._check_sender(request, transfer.incoming.head.primary)
        if transfer.busy.locked():
            raise BadRequest("the parts of a copy are sent one after the other")
        return transfer

    # ------------------------------------------------------------ the end of a transfer

    async def _give_up(self, transfer: _Transfer) -> None:
        """Take no more parts, and remove what has arrived. Does nothing if the transfer has ended."""
        if self._transfers.pop(transfer.token, None) is not None:
            await self._discard(transfer)

    async def _discard(self, transfer: _Transfer) -> None:
        """Remove what has arrived, if it does not count, and make room for another transfer."""
        with trio.CancelScope(shield=True):
            async with transfer.busy:
                try:
                    await transfer.incoming.discard()
                except OSError as error:
                    logger.warning("what has arrived of a copy could not be removed: %s", error)
                finally:
                    self._taken -= 1


def _bytes_of(request: Request) -> torch.Tensor:
    if len(request.tensors) == 1:
        (data,) = request.tensors
        if data.dtype == torch.uint8 and data.ndim == 1 and 0 < len(data) <= MAX_PART:
            return data
    raise BadRequest(f"a part of a copy is one tensor, uint8 [n], of at most {MAX_PART} bytes")


def _cannot_keep(head: CopyHead, error: OSError) -> RequestRefused:
    return RequestRefused(f"this server cannot keep a copy of {head.uid}: {error.strerror or error}")
