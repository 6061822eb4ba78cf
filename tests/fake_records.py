"""A dictionary in place of the DHT: what is stored is found until it expires. It counts calls and can be slow.

As in the DHT, a value with a higher sequence number stays.
"""

from collections.abc import Sequence

import trio

from labkit.contact import Contact
from labkit.dht.node import Entry, Value


def contact(n: int = 0, secure: bool = True, host: str = "127.0.0.1") -> Contact:
    return Contact(bytes([n]) * 32, host, 5000 + n, secure)


class FakeRecords:
    """`labkit.directory.Records` in memory. `gets` has the keys of each bulk get, `stored` the places of each store."""

    def __init__(self, latency: float = 0.0) -> None:
        self.contact = contact(99)
        self.latency = latency
        self.records: dict[str, dict[str, Value]] = {}
        self.sequences: dict[tuple[str, str], int] = {}  # by key and subkey
        self.plain: dict[str, Value] = {}
        self.stores = 0
        self.gets: list[list[str]] = []
        self.stored: list[list[tuple[str, str | None]]] = []
        self.fail_with: Exception | None = None
        self.copies = 1  # how many nodes store each entry

    async def store_many(self, entries: Sequence[Entry]) -> list[int]:
        self.stores += 1
        self.stored.append(sorted((entry.key, entry.subkey) for entry in entries))
        await self._travel()
        return [self._store(entry) if self.copies else 0 for entry in entries]

    def _store(self, entry: Entry) -> int:
        assert entry.subkey is not None
        now, place, record = trio.current_time(), (entry.key, entry.subkey), self.records.setdefault(entry.key, {})
        held = record.get(entry.subkey)
        if held is not None and now < held.expires_at and entry.sequence < self.sequences[place]:
            return 0
        record[entry.subkey], self.sequences[place] = Value(entry.value, now + entry.ttl), entry.sequence
        return self.copies

    async def get_many(
        self, keys: Sequence[str], *, quorum: int | None = None
    ) -> dict[str, Value | dict[str, Value] | None]:
        self.gets.append(list(keys))
        await self._travel()
        return {key: self.plain.get(key) or self._live(key) for key in keys}

    async def _travel(self) -> None:
        await trio.sleep(self.latency)
        if self.fail_with is not None:
            raise self.fail_with

    def _live(self, key: str) -> dict[str, Value] | None:
        now = trio.current_time()
        return {k: v for k, v in self.records.get(key, {}).items() if now < v.expires_at} or None
