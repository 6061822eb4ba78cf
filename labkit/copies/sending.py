"""The primary's side: sends a copy of an expert to another server, under a budget, so that training hardly notices.

The bytes go over the bulk lane in parts, one at a time. Each part is as large as the link carries in a fraction of a
second, so that no call of a trainer waits for long behind it, and a pause follows it. A copy that makes one part goes
with its offer. Of a larger one only what has changed since the last is sent: where an expert is trained by adapters
alone, its frozen weights go once.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import torch
import trio

from labkit.contact import Contact
from labkit.copies.messages import DONE, MAX_PART, MAX_SAME, OFFER, PART, CopyHead, CopyKept, CopyOffer, CopyPart
from labkit.copies.store import Bytes
from labkit.errors import BadReply, Overloaded, RPCError
from labkit.events import CopyFailed, CopyStored, Emit, ignore
from labkit.wire.rpc_types import BULK, Caller

RATE = float(4 << 20)  # bytes a second that the copies of a server take at most
BURST, HIGHER = 4.0, 3  # seconds of it that can be saved up, and how many times as many bytes go then
MAX_LINKS = 1024  # servers of which it is remembered how quick the way to them is
MAX_KEPT = 4096  # copies of which it is remembered that they were kept
SHARE = 0.25  # of the time in which they are under way
MIN_PART, FIRST_PART = 32 << 10, 256 << 10  # bytes
QUICK, SLOW = 0.05, 0.25  # seconds that a part takes; beyond these the next one is larger, or smaller
PART_SECONDS = 0.5  # of the rate that one may take
BLOCK, DIGEST = 64 << 10, 16  # bytes of which it is remembered what they were, and bytes that this takes
MAX_PAUSE = 5.0  # seconds between two parts, unless the rate asks for more
WHOLE = FIRST_PART  # bytes of a copy that is sent with its offer, in one call
OFFER_TIMEOUT = 10.0  # seconds that the other side has to take an offer
PART_TIMEOUT = 20.0  # seconds that it has for a part; a disk may be slow
CHECK_TIMEOUT = 60.0  # seconds that it has to check a copy, and 1 s for each `CHECKED_PER_SECOND` bytes
CHECKED_PER_SECOND = 20 << 20
RETRY_INTERVAL = 0.2  # seconds between two offers to a server that takes as many copies as it can


@dataclass(slots=True)
class _Link:
    """The way to a server.

    Args:
        round_trip: The shortest time that a call without bytes has taken, in seconds.
        part: Bytes of a part that it carries quickly, as far as is known.
    """

    round_trip: float
    part: int

    def note_part(self, size: int, seconds: float) -> None:
        """Note how long a part has taken: the next one is larger, or smaller."""
        if seconds > SLOW:
            self.part = max(MIN_PART, size // 2)
        elif seconds < QUICK:
            self.part = max(self.part, min(MAX_PART, 2 * size))


@dataclass(slots=True)
class _FreeTime:
    """Seconds of a call in which the link is free for others: its round trip, and what the server does then."""

    seconds: float


@dataclass(frozen=True, slots=True)
class _Kept:
    """The last copy of an expert that a server has kept.

    Args:
        head: What it is of.
        blocks: The digests of its blocks, one behind the other; none of a small one.
        changing: Whether no block of it was one of the copy before.
    """

    head: CopyHead
    blocks: bytes = b""
    changing: bool = False


class CopyBudget:
    """How much of the network, and of time, copies may take. One for all copies that a server sends.

    Args:
        rate: Bytes a second at most, over some seconds.
        share: Share of the time in which parts are under way, at most; 1 for no pauses but those of the rate.

    Attributes:
        sent: Bytes that were sent so far.
    """

    def __init__(self, rate: float = RATE, share: float = SHARE) -> None:
        if not (rate > 0 and 0 < share <= 1):
            raise ValueError(f"rate={rate}, share={share}: a rate above 0, and a share above 0 and at most 1")
        self.rate = rate
        self.share = share
        self.sent = 0
        self._turn = trio.Lock()
        self._next = 0.0  # when the next part may be sent, on trio's clock
        self._saved, self._at = 0.0, math.inf  # seconds of the rate that were saved up, and when
        self._links: dict[bytes, _Link] = {}  # by server
        self._kept: dict[tuple[bytes, str], _Kept] = {}  # by server and expert: the last copy that it has kept

    def in_haste(self) -> CopyBudget:
        """Returns a budget without limits, which knows what this one knows of servers."""
        other = CopyBudget(math.inf, 1.0)
        other._links, other._kept = self._links, self._kept
        return other

    def most(self, link: _Link) -> int:
        """Bytes of a part that takes no longer than others, by the link or by the rate."""
        return min(link.part, max(MIN_PART, int(min(self.rate * PART_SECONDS, MAX_PART))))

    def kept(self, to: Contact, uid: str) -> _Kept | None:
        """Returns the last copy of an expert that a server has kept, as far as is known."""
        return self._kept.get((to.key, uid))

    def note_kept(self, to: Contact, kept: _Kept) -> None:
        """Note which copy a server has kept."""
        if len(self._kept) >= MAX_KEPT:
            self._kept.clear()
        self._kept[to.key, kept.head.uid] = kept

    def forget_kept(self, to: Contact, uid: str) -> None:
        """Note that a server is to keep another copy, while it is not known yet whether it does."""
        self._kept.pop((to.key, uid), None)

    def link(self, to: Contact) -> _Link | None:
        """Returns what is known of the way to a server, if there is anything."""
        return self._links.get(to.key)

    def note_round_trip(self, to: Contact, seconds: float) -> _Link:
        """Note the seconds that a call has taken, which hardly had any bytes to carry."""
        if len(self._links) >= MAX_LINKS:
            self._links.clear()
        link = self._links.setdefault(to.key, _Link(seconds, FIRST_PART))
        link.round_trip = min(seconds, link.round_trip)
        return link

    @asynccontextmanager
    async def part(self, size: int, round_trip: float = 0.0) -> AsyncIterator[_FreeTime]:
        """Wait until a part of `size` bytes may be sent, which is to happen in the block. Others wait meanwhile.

        Args:
            size: Bytes.
            round_trip: Seconds that a call without bytes takes, in which the link is free for others.
        """
        async with self._turn:
            if trio.current_time() < self._next:
                await trio.sleep_until(self._next)
            began, free = trio.current_time(), _FreeTime(round_trip)
            self.sent += size
            seconds = size / self.rate
            self._saved, self._at = min(BURST, self._saved + max(0.0, began - self._at)) - seconds, began
            self._next = began + max(seconds / HIGHER, -self._saved)
            yield free  # if this fails, time was spent on a server that is gone, and not on the link
            took = trio.current_time() - began
            busy = max(0.0, took - free.seconds)
            pause = min(busy / self.share - busy, MAX_PAUSE)
            self._next = max(self._next, began + took + pause)


async def send_copy(
    caller: Caller, to: Contact, head: CopyHead, data: Bytes, budget: CopyBudget, *, patience: float = 0.0,
    emit: Emit = ignore,
) -> None:  # fmt: skip
    """Send a copy of an expert to a server. When this returns, the copy is on disk there, checked and counting.

    Args:
        caller: Makes the calls.
        to: The server.
        head: What the copy is of.
        data: Its file, `head.size` bytes, which stay as they are meanwhile.
        budget: That of this server.
        patience: Seconds to try again while the server takes as many copies as it can.
        emit: Is told how it ended, by `CopyStored` or `CopyFailed`.

    Raises:
        Overloaded: The server takes as many copies as it can.
        RequestRefused: It does not want the copy, has none such, or cannot keep it; the text says why.
        RPCError: It does not answer, or answers what makes no sense.
    """
    view = memoryview(data).cast("B")
    if len(view) != head.size:
        raise ValueError(f"the copy of {head.uid} has {len(view)} bytes, not {head.size}")
    try:
        await _send(caller, to, head, view, budget, trio.current_time() + patience)
    except RPCError as error:
        emit(CopyFailed(uid=head.uid, address=to.endpoint, cause=error.cause, detail=str(error)))
        raise
    emit(CopyStored(uid=head.uid, address=to.endpoint, updates=head.updates))


async def _send(
    caller: Caller, to: Contact, head: CopyHead, data: memoryview, budget: CopyBudget, until: float
) -> None:
    link, kept = budget.link(to), budget.kept(to, head.uid)
    sent = None
    if link is not None and (kept is None or kept.head != head):
        most = max(WHOLE, budget.most(link)) if kept is not None and kept.changing else WHOLE
        if len(data) <= most:
            sent = await _send_whole(caller, to, head, data, budget, link)
    budget.note_kept(to, sent or await _send_in_parts(caller, to, head, data, budget, until))


async def _send_whole(
    caller: Caller, to: Contact, head: CopyHead, data: memoryview, budget: CopyBudget, link: _Link
) -> _Kept | None:
    """Send a small copy with its offer. Returns what is kept; if nothing, it is to be sent in parts."""
    tensor = torch.frombuffer(bytearray(data) if data.readonly else data, dtype=torch.uint8)
    try:
        async with budget.part(len(data), link.round_trip) as free:
            began = trio.current_time()
            reply = await caller.call(to, OFFER, head, [tensor], returns=CopyOffer, timeout=OFFER_TIMEOUT, lane=BULK)
            took, offer = trio.current_time() - began, reply.body
            free.seconds += offer.took
            budget.note_round_trip(to, took)
            link.note_part(len(data), took - offer.took)
    except Overloaded:
        return None
    return None if offer.token else _Kept(head, changing=len(data) > WHOLE)


async def _send_in_parts(
    caller: Caller, to: Contact, head: CopyHead, data: memoryview, budget: CopyBudget, until: float
) -> _Kept:
    """Send what the server has not from an older copy."""
    offer, round_trip = await _offer(caller, to, head, until)
    link, kept = budget.note_round_trip(to, round_trip), budget.kept(to, head.uid)
    if offer.token is None:
        return kept if kept is not None and kept.head == head else _Kept(head)  # it is there already
    budget.forget_kept(to, head.uid)
    before = kept.blocks if kept is not None and kept.head.crc32 == offer.older else b""
    blocks = None if kept is not None and kept.changing else bytearray()
    offset, changing = 0, bool(before)
    while offset < len(data):
        same, count = _next_part(data, offset, budget.most(link), before, blocks)
        some = b"" if same else bytearray(data[offset : offset + count])
        async with budget.part(len(some), round_trip):
            began = trio.current_time()
            tensors = [torch.frombuffer(some, dtype=torch.uint8)] if some else []
            part = CopyPart(offer.token, offset, count if same else 0)
            await caller.call(to, PART, part, tensors, timeout=PART_TIMEOUT, lane=BULK)
            took = trio.current_time() - began
        offset += count
        if same:
            changing = False
        else:
            link.note_part(count, took)
    timeout = CHECK_TIMEOUT + head.size / CHECKED_PER_SECOND
    reply = await caller.call(to, DONE, offer.token, returns=CopyKept, timeout=timeout, lane=BULK)
    if reply.body.updates != head.updates:
        raise BadReply(f"{to.endpoint} says that it keeps another copy of {head.uid} than it was sent")
    if blocks is None or changing:
        return _Kept(head, changing=True)
    return _Kept(head, bytes(blocks))


def _next_part(data: memoryview, offset: int, size: int, before: bytes, blocks: bytearray | None) -> tuple[bool, int]:
    """What to send next.

    Args:
        data: The file.
        offset: Where in it.
        size: Bytes to send along at most.
        before: The digests of the blocks that the server has.
        blocks: Those of this file so far; more are appended. None if they are not wanted.

    Returns:
        Whether the server has the next bytes, and how many.
    """
    if blocks is None:
        return False, min(size, len(data) - offset)

    def is_same(number: int) -> bool:
        place = slice(number * DIGEST, (number + 1) * DIGEST)
        if not blocks[place]:
            block = data[number * BLOCK : (number + 1) * BLOCK]
            blocks.extend(hashlib.blake2b(block, digest_size=DIGEST).digest())
        return before[place] == blocks[place]

    first, inside = divmod(offset, BLOCK)
    same = is_same(first) and not inside
    end, most = first + 1, MAX_SAME if same else size
    while end * BLOCK < min(len(data), offset + most) and is_same(end) == same:
        end += 1
    return same, min(end * BLOCK, len(data), offset + most) - offset


async def _offer(caller: Caller, to: Contact, head: CopyHead, until: float) -> tuple[CopyOffer, float]:
    """Returns the answer, and the seconds that it took."""
    while True:
        began = trio.current_time()
        try:
            reply = await caller.call(to, OFFER, head, returns=CopyOffer, timeout=OFFER_TIMEOUT, lane=BULK)
            offer: CopyOffer = reply.body
            return offer, trio.current_time() - began
        except Overloaded:
            if trio.current_time() >= until:
                raise
            await trio.sleep(RETRY_INTERVAL)
