"""Relays in the DHT: those that can take more nodes write themselves there, and hidden nodes find them.

They are one record, a dictionary from a relay's key to its contact. Anybody can write one: a wrong one costs whoever
tries it a moment, since the connection proves the key.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Protocol

import msgspec
import trio

from labkit.contact import Contact
from labkit.dht.node import Entry, Value
from labkit.errors import LabkitError
from labkit.relay.server import RelayServer

logger = logging.getLogger(__name__)

RELAYS_KEY = "relays"  # of the record in the DHT
TTL = 45.0  # seconds that an entry lives
DECLARE_PERIOD = 15.0  # seconds between two times that it is written
MAX_RECORDS = 256  # that are looked at


class RelayRecords(Protocol):
    """The DHT, as relays use it: `dht.node.DHTNode`."""

    async def store_many(self, entries: Sequence[Entry]) -> list[int]: ...

    async def get_many(
        self, keys: Sequence[str], *, quorum: int | None = None
    ) -> Mapping[str, Value | Mapping[str, Value] | None]: ...


class RelayRecord(msgspec.Struct, frozen=True, array_like=True):
    """A relay, and how many more nodes it can take."""

    contact: Contact
    free: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)]


async def keep_relay_declared(
    dht: RelayRecords, contact: Callable[[], Contact], relay: RelayServer, is_reached: Callable[[], bool]
) -> None:
    """Write a relay into the DHT every fifteen seconds, until cancelled.

    Args:
        dht: The DHT.
        contact: Returns where the relay's node is reached now.
        relay: The relay.
        is_reached: Whether others reach it; it is not written otherwise.
    """
    while True:
        if not is_reached():
            await trio.sleep(DECLARE_PERIOD)
            continue
        where = contact()
        record = RelayRecord(where, relay.free)
        try:
            await dht.store_many([Entry(RELAYS_KEY, msgspec.msgpack.encode(record), TTL, where.key.hex())])
        except LabkitError as error:
            logger.warning("this relay could not be written into the DHT: %s", error)
        await trio.sleep(DECLARE_PERIOD)


async def find_relays(dht: RelayRecords, timeout: float) -> list[Contact]:
    """Returns the relays that are in the DHT, those with room first, else in random order. `timeout`: seconds."""
    found: Value | Mapping[str, Value] | None = None
    with trio.move_on_after(timeout):
        found = (await dht.get_many([RELAYS_KEY]))[RELAYS_KEY]
    records: list[RelayRecord] = []
    if isinstance(found, Mapping):
        some = random.sample(sorted(found), min(len(found), MAX_RECORDS))
        records = [record for key in some if (record := _read(key, found[key].data)) is not None]
    return [record.contact for record in sorted(records, key=lambda record: record.free == 0)]


def _read(key: str, data: bytes) -> RelayRecord | None:
    try:
        record = msgspec.msgpack.decode(data, type=RelayRecord)
    except (msgspec.MsgspecError, RecursionError, ValueError):
        return None
    return record if record.contact.is_safe and record.contact.key.hex() == key else None
