"""Claims: who is about to serve which places of a grid. They keep two who look for free places from taking the same.

Between the look at which places are free and the first declaration of an expert lie seconds in which experts are built.
So whoever wants places writes a claim first, reads the claims of all others, and goes on only if nobody was before it.
That is Lamport's bakery algorithm ("A New Solution of Dijkstra's Concurrent Programming Problem", CACM 1974), whose
registers, each written by one and read by all, are subkeys of one DHT record for each grid:

    key "claims:ffn", subkey "<a random number>.<part>": a `Claim`

A claimer goes through the states `CHOOSING` (it reads which places are free, and which numbers were taken before),
`ASKING` (it has chosen places, and a number above all that it has seen), `HOLDING` (nobody who asked before it wants
one of its places) and `OVER`. What is written goes to all k replicas, and what is read comes from all of them.
`launch/places` walks through the states; here are the claims themselves. Anybody can write to the DHT: what does not
parse is ignored.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Annotated, Protocol

import msgspec

from labkit.contact import Contact
from labkit.dht.node import Entry, Value
from labkit.directory.grids import GridInfo

NAMESPACE = "claims:"
PLACES_IN_A_PART = 2000  # of a claim, so that each part is a value that the DHT takes
MAX_PARTS = 64
MAX_CLAIMS = 4096  # that are read; the rest is ignored

Number = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]


def new_ticket() -> str:
    """Returns the name of a claimer."""
    return secrets.token_hex(8)


class ClaimState(IntEnum):
    """How far a claimer has come."""

    CHOOSING = 0
    ASKING = 1
    HOLDING = 2
    OVER = 3


class Part(msgspec.Struct, frozen=True, array_like=True, tag="c1"):
    """A part of a claim, as it is written. A claim of many places has several, which are alike but for the places."""

    contact: Contact
    state: ClaimState
    attempt: Number
    number: Number
    wanted: Number
    parts: Annotated[int, msgspec.Meta(ge=1, le=MAX_PARTS)]
    places: Annotated[
        list[Annotated[str, msgspec.Meta(max_length=160)]], msgspec.Meta(max_length=PLACES_IN_A_PART)
    ] = []
    grid: GridInfo | None = None


@dataclass(frozen=True, slots=True)
class Claim:
    """What somebody is about to serve in a grid.

    Args:
        ticket: Names the claimer, and decides between equal numbers.
        contact: Its node. If that does not answer, the claim is void.
        state: How far it has come.
        attempt: Which attempt this is: a claimer that lost chooses again.
        number: Of two claims that ask for one place, the one with the smaller number was first.
        wanted: How many places it wants; 0 for all that are free.
        places: The uids that it has chosen.
        grid: The grid that it serves.
    """

    ticket: str
    contact: Contact
    state: ClaimState
    attempt: int
    number: int = 0
    wanted: int = 0
    places: frozenset[str] = frozenset()
    grid: GridInfo | None = None

    def before(self, other: Claim) -> bool:
        """Whether this one comes first, where both ask for the same place."""
        return (self.number, self.ticket) < (other.number, other.ticket)

    def clashes_with(self, other: Claim) -> bool:
        """Whether both cannot be served: they have a place in common, or their grids have different sizes."""
        if not self.places.isdisjoint(other.places):
            return True
        return self.grid is not None and other.grid is not None and self.grid.sizes != other.grid.sizes


class ClaimRecords(Protocol):
    """The DHT, as claims use it: `dht.node.DHTNode`."""

    async def store_many(self, entries: Sequence[Entry]) -> list[int]: ...

    async def get_many(
        self, keys: Sequence[str], *, quorum: int | None = None
    ) -> Mapping[str, Value | Mapping[str, Value] | None]: ...


class Claims:
    """The claims in one grid, and one's own among them.

    Args:
        dht: The DHT.
        contact: Returns the contact of one's own node, which may move.
        name: The grid.
        ttl: Seconds that a claim lives after it was written.
        replicas: How many nodes a record is stored on (the DHT's k).
    """

    def __init__(self, dht: ClaimRecords, contact: Callable[[], Contact], name: str, ttl: float, replicas: int) -> None:
        self.ticket = new_ticket()
        self._dht = dht
        self._contact = contact
        self._key = NAMESPACE + name
        self._ttl = ttl
        self._replicas = replicas
        self._written = 0

    def new(
        self, state: ClaimState, attempt: int, number: int = 0, wanted: int = 0, places: Sequence[str] = (),
        grid: GridInfo | None = None,
    ) -> Claim:  # fmt: skip
        """Returns a claim of one's own."""
        return Claim(self.ticket, self._contact(), state, attempt, number, wanted, frozenset(places), grid)

    async def write(self, claim: Claim) -> bool:
        """Write one's own claim, in place of what it was before. Returns whether any node has taken it."""
        self._written += 1
        return await self._store(claim)

    async def renew(self, claim: Claim) -> bool:
        """Write the same claim again, so that it lives for longer."""
        return await self._store(claim)

    async def _store(self, claim: Claim) -> bool:
        places = sorted(claim.places)
        some = [places[i : i + PLACES_IN_A_PART] for i in range(0, len(places), PLACES_IN_A_PART)] or [[]]
        if len(some) > MAX_PARTS:
            raise ValueError(f"{len(places):,} places at once; at most {MAX_PARTS * PLACES_IN_A_PART:,}")
        fixed = (claim.contact, claim.state, claim.attempt, claim.number, claim.wanted, len(some))
        entries = [
            Entry(self._key, msgspec.msgpack.encode(part), self._ttl, f"{self.ticket}.{index}", self._written)
            for index, part in enumerate(Part(*fixed, uids, claim.grid) for uids in some)
        ]
        return all(copies > 0 for copies in await self._dht.store_many(entries))

    async def read(self) -> dict[str, Claim]:
        """Returns the claims of all others that are not over, by ticket."""
        record = (await self._dht.get_many([self._key], quorum=self._replicas))[self._key]
        parts: dict[str, list[Part]] = {}
        for subkey, value in record.items() if isinstance(record, Mapping) else ():
            ticket, _, index = subkey.partition(".")
            part = _decode(value.data) if index.isdigit() and ticket != self.ticket else None
            if part is not None and (ticket in parts or len(parts) < MAX_CLAIMS):
                parts.setdefault(ticket, []).append(part)
        claims = {ticket: _whole(ticket, some) for ticket, some in parts.items()}
        return {ticket: claim for ticket, claim in claims.items() if claim.state is not ClaimState.OVER}


_DECODER: msgspec.msgpack.Decoder[Part] = msgspec.msgpack.Decoder(Part)


def _decode(data: bytes) -> Part | None:
    try:
        part = _DECODER.decode(data)
    except (msgspec.MsgspecError, RecursionError, ValueError):
        return None
    return part if part.contact.is_safe else None


def _whole(ticket: str, some: Sequence[Part]) -> Claim:
    """Returns the claim of which these are parts. One of which parts are missing counts as still being chosen."""
    newest = max(some, key=lambda part: (part.attempt, part.state))
    same = [part for part in some if (part.attempt, part.state) == (newest.attempt, newest.state)]
    state = newest.state
    if len(same) < newest.parts and state is not ClaimState.OVER:
        state = ClaimState.CHOOSING
    places = frozenset(uid for part in same for uid in part.places)
    return Claim(
        ticket, newest.contact, state, newest.attempt, newest.number, newest.wanted, places, newest.grid
    )  # fmt: skip
