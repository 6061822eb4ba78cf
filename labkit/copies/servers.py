"""The servers of a grid: who serves it, keeps copies for it, or would. Each writes itself into the DHT.

A grid has one record, a dictionary from a server's key to its `ServerRecord`. Anybody can write one: a wrong one costs
whoever calls there a moment, since the connection proves the key.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Protocol

import msgspec
import trio
from msgspec import Meta

from labkit.contact import Contact
from labkit.dht.node import Entry, Value
from labkit.directory.genuine import OWN_NAMESPACE, signed, unsigned
from labkit.directory.index import Sign
from labkit.errors import LabkitError

logger = logging.getLogger(__name__)

NAMESPACE = OWN_NAMESPACE
KEY_PREFIX = 8  # bytes of a server's key by which `ExpertInfo.copies` names it
PERIOD = 5.0  # seconds between two times that a server writes itself, and reads the others
CALM_ROUNDS = 6  # in which nothing has changed, after which there are twice as many seconds between two
PER_SERVER = 0.1  # seconds at least, for each server of the grid: in a large one a round is much to read
FIRST_PAUSE = 0.5  # the same at first, as other servers may begin at the same moment; it doubles from round to round
REWRITE = 12.0  # seconds after which a server writes itself again that has nothing new to say, and no experts
TTL = 30.0  # seconds that a record lives
QUORUM = 3  # replicas whose records are merged
MAX_SERVERS = 1024  # of one grid that are looked at
SLACK = 0.5  # seconds by which a record may seem younger than it is, since each hop between nodes adds a delay

Few = Annotated[int, Meta(ge=0, le=1_000_000)]


class GridRecords(Protocol):
    """The DHT, as it is used here: `dht.node.DHTNode`."""

    async def store_many(self, entries: Sequence[Entry]) -> list[int]: ...

    async def get_many(
        self, keys: Sequence[str], *, quorum: int | None = None
    ) -> Mapping[str, Value | Mapping[str, Value] | None]: ...


class ServerRecord(msgspec.Struct, frozen=True, array_like=True):
    """A server of a grid, as it writes itself into the DHT.

    Args:
        contact: Where it is reached.
        experts: How many experts it serves.
        copies: How many copies it keeps.
        room: How many more experts it would keep a copy of, or take.
        kind: Of its experts; empty if it has none yet.
        stamp: Grows with each time that it is written; `GridServers` sets it.
        leaving: Whether it is about to stop, so that nothing is to be given to it.
        spare: Whether it takes experts of fuller servers.
    """

    contact: Contact
    experts: Few = 0
    copies: Few = 0
    room: Few = 0
    kind: Annotated[str, Meta(max_length=1000)] = ""
    stamp: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] = 0
    leaving: bool = False
    spare: bool = False


@dataclass(frozen=True, slots=True)
class _Seen:
    """A record that was read. Times are on trio's clock."""

    record: ServerRecord
    expires_at: float


class GridServers:
    """The servers of one grid, and this one's place among them. `run` has to run.

    Args:
        dht: The DHT.
        grid: The name of the grid.
        own: Returns what this server has to say of itself now; None for who only looks.
        period: Seconds between two rounds, in each of which it writes itself if it has news, and reads the others; more
            where nothing changes, or the grid has many servers.
        ttl: Seconds that a record lives. All servers of a grid need the same.
        sign: Signs with the key of this server; without it, nodes that check signatures do not believe what it writes.
    """

    def __init__(
        self, dht: GridRecords, grid: str, own: Callable[[], ServerRecord] | None, period: float = PERIOD,
        ttl: float = TTL, sign: Sign | None = None,
    ) -> None:  # fmt: skip
        self._dht = dht
        self._key = NAMESPACE + grid
        self._own = own
        self._sign = sign
        self._period = period
        self._ttl = ttl
        self._stamp = time.time_ns() // 1_000_000 << 16  # above all of an earlier life with the same key
        self._seen: dict[bytes, _Seen] = {}
        self._others: Mapping[bytes, ServerRecord] = {}
        self._others_until = -math.inf  # when one of them expires; in the past once others were seen
        self._read: dict[tuple[str, bytes], ServerRecord | None] = {}  # what the last round has decoded
        self._lost: dict[bytes, tuple[int, float]] = {}  # the last stamp of a server that is gone, and since when
        self._wake = trio.Event()
        self._round_over = trio.Event()  # set after the next round
        self._left = False
        self._written: tuple[ServerRecord, float] | None = None  # the last time, and when that was

    @property
    def others(self) -> Mapping[bytes, ServerRecord]:
        """The other servers of the grid by key: those that are not known to be gone, nor about to leave."""
        now = trio.current_time()
        if now >= self._others_until:  # it is asked for much more often than it changes
            there = {key: seen for key, seen in self._seen.items() if now < seen.expires_at and not seen.record.leaving}
            self._others = {key: seen.record for key, seen in there.items()}
            self._others_until = min((seen.expires_at for seen in there.values()), default=math.inf)
        return self._others

    def refresh(self) -> None:
        """Let `run` begin the next round now, as when this server has something new to say of itself."""
        self._wake.set()

    async def wait_for_round(self) -> None:
        """Wait until the next round is over."""
        await self._round_over.wait()

    def note(self, contact: Contact, experts: int) -> None:
        """Note how many experts a server has said to serve; it counts until that server has written itself anew."""
        seen = self._seen.get(contact.key)
        if seen is not None:
            record = msgspec.structs.replace(seen.record, experts=experts)
            self._seen[contact.key] = _Seen(record, seen.expires_at)
            self._others_until = -math.inf

    def lose(self, contact: Contact) -> None:
        """Note that a server is gone. It is left out until it has written itself anew, later than now."""
        seen = self._seen.get(contact.key)
        if contact.key in self._lost if seen is None else seen.record.contact != contact:
            return  # that is known, or it is elsewhere by now
        self._seen.pop(contact.key, None)
        self._others_until = -math.inf
        self._lost[contact.key] = (seen.record.stamp if seen is not None else 0), trio.current_time()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Write this server and read the others again and again, until cancelled.

        `task_status` is told after the first round, whether it succeeded or not.
        """
        pause, calm = min(FIRST_PAUSE, self._period), 0
        while True:
            self._wake = trio.Event()
            before = self._loads()
            await self.round()
            calm = calm + 1 if self._loads() == before else 0
            self._round_over.set()
            self._round_over = trio.Event()
            task_status.started()
            task_status = trio.TASK_STATUS_IGNORED
            with trio.move_on_after(pause):
                await self._wake.wait()
            usual = self._period * (2 if calm >= CALM_ROUNDS else 1)
            longest = min(max(usual, PER_SERVER * len(before)), max(self._period, self._ttl / 3))
            pause = min(2 * pause, longest)

    def _loads(self) -> dict[bytes, tuple[int, bool]]:
        """Who is there, and how much each serves."""
        return {key: (seen.record.experts, seen.record.room > 0) for key, seen in self._seen.items()}

    async def round(self) -> None:
        """Write this server, and read the others, once. What the DHT does not do now is logged."""
        try:
            if self._own is not None and not self._left and self._is_news(own := self._own()):
                await self._write(own)
            await self.read()
        except LabkitError as error:
            logger.warning("the servers of the grid could not be read, or this one not be written: %s", error)

    def _is_news(self, record: ServerRecord) -> bool:
        """Whether a record is to be written now. How many copies are kept may be told later."""
        if self._written is None or trio.current_time() >= self._written[1] + min(REWRITE, 0.4 * self._ttl):
            return True
        return msgspec.structs.replace(record, copies=0) != msgspec.structs.replace(self._written[0], copies=0)

    async def leave(self) -> None:
        """Tell the others that this server is about to stop: it is written for the last time. Raises `LabkitError`."""
        self._left = True
        if self._own is not None:
            await self._write(msgspec.structs.replace(self._own(), room=0, leaving=True))

    async def read(self) -> None:
        """Read the others. Raises `LabkitError`.

        Records that a read has missed are kept until they expire.
        """
        found = (await self._dht.get_many([self._key], quorum=QUORUM))[self._key]
        now, own = trio.current_time(), None if self._own is None else self._own().contact.key
        seen: dict[bytes, _Seen] = {}
        values = found if isinstance(found, Mapping) else {}
        read: dict[tuple[str, bytes], ServerRecord | None] = {}
        for subkey in sorted(values)[:MAX_SERVERS]:
            place = subkey, values[subkey].data
            record = read[place] = self._read[place] if place in self._read else _read(*place)
            if record is not None and record.contact.key != own:
                seen[record.contact.key] = _Seen(record, values[subkey].expires_at)
        self._read = read
        for key, old in self._seen.items():
            new = seen.get(key)
            if new is None and len(seen) >= MAX_SERVERS:
                continue
            if new is None or new.record.stamp < old.record.stamp:
                seen[key] = old
        self._seen = {key: one for key, one in seen.items() if now < one.expires_at and not self._is_lost(key, one)}
        self._others_until = -math.inf
        self._lost = {key: (stamp, since) for key, (stamp, since) in self._lost.items() if now < since + 2 * self._ttl}

    def _is_lost(self, key: bytes, seen: _Seen) -> bool:
        """Whether a record is from before its server was lost."""
        stamp, since = self._lost.get(key, (-1, -math.inf))
        if seen.record.stamp > stamp and seen.expires_at - self._ttl > since + SLACK:
            self._lost.pop(key, None)
            return False
        return True

    async def _write(self, record: ServerRecord) -> None:
        await self._dht.store_many([self._entry(record)])
        self._written = record, trio.current_time()

    def entries(self) -> list[Entry]:
        """Returns what this server has to say of itself now, to be stored together with something else."""
        if self._own is None or self._left:
            return []
        record = self._own()
        self._written = record, trio.current_time()
        return [self._entry(record)]

    def _entry(self, record: ServerRecord) -> Entry:
        self._stamp += 1
        stamped = msgspec.structs.replace(record, stamp=self._stamp)
        subkey = record.contact.key.hex()
        value = signed(self._key, subkey, msgspec.msgpack.encode(stamped), self._stamp, self._sign)
        return Entry(self._key, value, self._ttl, subkey, self._stamp)


def _read(subkey: str, data: bytes) -> ServerRecord | None:
    try:
        record = msgspec.msgpack.decode(unsigned(data), type=ServerRecord)
    except (msgspec.MsgspecError, RecursionError, ValueError):
        return None
    return record if record.contact.is_safe and record.contact.key.hex() == subkey else None
