"""The cache of prefixes: when the DHT is asked, and when a cached record will do.

On a batch's way it sits between `directory`, which beam search asks for the children of prefixes, and the DHT node. It
makes beam search free in the steady state: cached records are used, and refreshed in the background before they go
stale.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import trio

from labkit.contact import Contact
from labkit.dht.node import Entry, Value
from labkit.directory.index import NAMESPACE, Children, Decoded, PrefixRecord
from labkit.directory.suspicion import SuspicionConfig, Suspicions
from labkit.errors import LabkitError
from labkit.expert_uid import ExpertInfo, parent
from labkit.suggest import suggest_fields

logger = logging.getLogger(__name__)

IDLE = 2  # times the period of refreshing, after which a record that was not used is not used before it is read again


class Records(Protocol):
    """The DHT, as the directory uses it: `dht.node.DHTNode`, or a dictionary in a test."""

    @property
    def contact(self) -> Contact: ...

    async def store_many(self, entries: Sequence[Entry]) -> list[int]: ...

    async def get_many(
        self, keys: Sequence[str], *, quorum: int | None = None
    ) -> Mapping[str, Value | Mapping[str, Value] | None]: ...


@suggest_fields
@dataclass(frozen=True, slots=True)
class DirectoryConfig:
    """How experts are declared, and how long cached records are used. Times are in seconds.

    Args:
        ttl: How long a declaration lives; it is renewed every `ttl / 3`.
        refresh: A record that is used and older than this is read again in the background.
        absence: How long it is believed that a prefix has no experts.
        timeout: How long a look-up, or a store, may take.
        max_prefixes: How many prefixes are cached.
        max_children: How many children of a prefix are cached.
        suspicion: Which experts are not offered after failures.

    Raises:
        ValueError: Unless 0 < absence <= refresh < ttl, all of them and timeout finite, and the counts at least 1.
    """

    ttl: float = 30.0
    refresh: float = 3.0
    absence: float = 1.0
    timeout: float = 10.0
    max_prefixes: int = 4096
    max_children: int = 1 << 14
    suspicion: SuspicionConfig = field(default_factory=SuspicionConfig)

    def __post_init__(self) -> None:
        if not (0 < self.absence <= self.refresh < self.ttl < math.inf and 0 < self.timeout < math.inf):
            raise ValueError(f"{self}: needs 0 < absence <= refresh < ttl, all of them and timeout finite")
        if min(self.max_prefixes, self.max_children) < 1:
            raise ValueError(f"{self}: max_prefixes and max_children are at least 1")


class PrefixCache:
    """The records of the prefixes in use. `run` refreshes them in the background.

    Without `run`, a search that uses a stale prefix waits until it is read again.

    Args:
        dht: The DHT.
        config: How long records are used.
        suspicions: Which experts are not offered.
    """

    def __init__(self, dht: Records, config: DirectoryConfig, suspicions: Suspicions) -> None:
        self.config = config
        self.records: OrderedDict[str, PrefixRecord] = OrderedDict()  # by prefix, least recently used first
        self.counts = dict.fromkeys(("used", "missed", "gets", "keys_read", "malformed", "gets_failed"), 0)
        self._dht = dht
        self._suspicions = suspicions
        self._reading: dict[str, trio.Event] = {}  # prefixes that are being read, and what is set afterwards
        self._stale: set[str] = set()  # prefixes that wait for `run`
        self._wake = trio.Event()
        self._running = False

    def cached(self, prefixes: Iterable[str]) -> dict[str, Children]:
        """Returns the children of those `prefixes` whose cached record may be used now."""
        now, views = trio.current_time(), dict[str, Children]()
        for prefix in prefixes:
            record = self.records.get(prefix)
            if record is None:
                continue
            view = record.children(now, self._suspicions)
            if self._usable(prefix, record, bool(view), now):
                self.records.move_to_end(prefix)
                views[prefix] = view
        self.counts["used"] += len(views)
        return views

    async def children(self, prefixes: Iterable[str]) -> dict[str, Children]:
        """Returns the live children of each prefix, from the cache or else by one bulk get."""
        prefixes = list(dict.fromkeys(prefixes))
        views = self.cached(prefixes)
        return views | await self.read([prefix for prefix in prefixes if prefix not in views])

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Refresh prefixes that are used and old, until cancelled. `task_status` is told when this is ready.

        Prefixes that become due during a bulk get share the next one. A refresh that fails is logged, and the cached
        records are used until they expire.
        """
        self._running = True
        task_status.started()
        try:
            while True:
                await self._wake.wait()
                self._wake = trio.Event()
                prefixes, self._stale = sorted(self._stale - self._reading.keys()), set()
                try:
                    await self._read(prefixes)
                except LabkitError as error:
                    self.counts["gets_failed"] += 1
                    logger.warning("refreshing %d prefixes of experts failed: %s", len(prefixes), error)
        finally:
            self._running = False

    def age(self, prefix: str) -> float:
        """Returns the seconds since the prefix was read; infinity if it is not cached."""
        record = self.records.get(prefix)
        return math.inf if record is None else trio.current_time() - record.read_at

    def known(self) -> dict[str, ExpertInfo]:
        """Returns all live experts in the cache, by uid."""
        now = trio.current_time()
        views = [record.children(now, self._suspicions) for record in self.records.values()]
        return {info.uid: info for view in views for info in view.experts.values()}

    def newest(self, info: ExpertInfo) -> ExpertInfo:
        """Returns where an expert is in a later epoch, if that is known; else `info`."""
        prefix, coordinate = parent(info.uid)
        if (record := self.records.get(prefix)) is None or coordinate not in record.leaves:
            return info
        held, _ = record.leaves[coordinate]
        return held if held.epoch > info.epoch else info

    def suspended(self, prefixes: Iterable[str]) -> dict[str, ExpertInfo]:
        """Returns the experts right below these prefixes that are declared, but not offered after failures, by uid.

        Prefixes that are not cached have none.
        """
        now, suspended = trio.current_time(), dict[str, ExpertInfo]()
        for prefix in prefixes:
            if (record := self.records.get(prefix)) is not None:
                offered = record.children(now, self._suspicions).experts
                for coordinate, (info, expires_at) in record.leaves.items():
                    if coordinate not in offered and now < expires_at:
                        suspended[info.uid] = info
        return suspended

    def may_hold(self, name: str, dims: int, count: int) -> bool:
        """Whether `count` experts may be declared in the `dims`-dimensional grid `name`, offered or not.

        Prefixes that are not cached, but have a marker, may hold any number.
        """
        now, prefixes = trio.current_time(), [name]
        for level in range(1, dims + 1):
            records = [record for prefix in prefixes if (record := self.records.get(prefix)) is not None]
            if level > 1 and len(records) < len(prefixes):
                return True
            if level == dims:
                break
            prefixes = [f"{r.prefix}.{c}" for r in records for c, expires_at in r.markers.items() if now < expires_at]
        leaves = (expires_at for record in records for _, expires_at in record.leaves.values())
        return sum(now < expires_at for expires_at in leaves) >= count

    def changed(self, prefix: str) -> None:
        """Note that the suspicions about a prefix's experts have changed."""
        if (record := self.records.get(prefix)) is not None:
            record.changed()

    def doubt(self, prefix: str) -> None:
        """Note that an expert of this prefix failed: the prefix is read again when it is next used."""
        if (record := self.records.get(prefix)) is not None:
            record.doubted = True
            record.changed()

    def forget_absence(self, uid: str) -> None:
        """Drop those cached records on the way to `uid` that do not know of it."""
        prefix, last, now = uid, True, trio.current_time()
        while "." in prefix:
            prefix, coordinate = parent(prefix)
            if (record := self.records.get(prefix)) is not None:
                view = record.children(now, self._suspicions)
                if coordinate not in (view.experts if last else view.inner):
                    del self.records[prefix]
            last = False

    def _usable(self, prefix: str, record: PrefixRecord, alive: bool, now: float) -> bool:
        """Whether a cached record may be used now, or has to be read first. Requests a refresh if one is due.

        A record with live children may be used until they expire, even after a failure: the failed expert is suspended,
        and the others need not wait for its sake. Where others are about to carry an expert on, it is read again soon.
        A record without any is believed for `absence` seconds. After that, a prefix below a grid's name is refreshed in
        the background (a stale marker led there, and nothing depends on it), but a grid's name is waited for
        (everything depends on it). A new failure under a prefix that has no live children left is worth the wait, too,
        and so is the first use after a while without any: servers may have left meanwhile.
        """
        age, config = now - record.read_at, self.config
        if min(age, now - record.asked_at) >= IDLE * config.refresh:
            return False
        if alive:
            due = age >= (config.absence if record.doubted or record.orphaned else config.refresh)
        elif record.doubted or age >= (config.refresh if "." in prefix else config.absence):
            return False
        else:
            due = age >= config.absence
        if due and not self._running:
            return False
        if due and now - record.asked_at >= config.absence:
            record.asked_at = now
            self._stale.add(prefix)
            self._wake.set()
        return True

    async def read(self, prefixes: list[str]) -> dict[str, Children]:
        """Read the prefixes (no duplicates) now, by one bulk get. Those that are being read already are waited for."""
        if not prefixes:
            await trio.lowlevel.checkpoint()
        self.counts["missed"] += len(prefixes)
        views: dict[str, Children] = {}
        missing = prefixes
        while missing:
            mine = [prefix for prefix in missing if prefix not in self._reading]
            theirs = {prefix: self._reading[prefix] for prefix in missing if prefix in self._reading}
            views |= await self._read(mine)
            for event in theirs.values():
                await event.wait()
            # A reader that failed or was cancelled leaves its prefixes unread: then we read them.
            now = trio.current_time()
            for prefix in theirs:
                record = self.records.get(prefix)
                if record is not None and now - record.read_at < self.config.absence:
                    views[prefix] = record.children(now, self._suspicions)
            missing = [prefix for prefix in theirs if prefix not in views]
        return views

    async def _read(self, prefixes: Sequence[str]) -> dict[str, Children]:
        """Read prefixes by one bulk get, into the cache. If it takes longer than `timeout`, nothing was found."""
        if not prefixes:
            return {}
        done = trio.Event()
        self._reading |= dict.fromkeys(prefixes, done)
        try:
            self.counts["gets"] += 1
            self.counts["keys_read"] += len(prefixes)
            found: Mapping[str, Value | Mapping[str, Value] | None] = {}
            with trio.move_on_after(self.config.timeout) as scope:
                found = await self._dht.get_many([NAMESPACE + prefix for prefix in prefixes])
            if scope.cancelled_caught:
                self.counts["gets_failed"] += 1
            now, views = trio.current_time(), dict[str, Children]()
            decoded: Decoded = {}
            for prefix in prefixes:
                record = PrefixRecord(prefix, now)
                value, limit = found.get(NAMESPACE + prefix), self.config.max_children
                self.counts["malformed"] += record.take(value, limit, decoded)
                if (old := self.records.get(prefix)) is not None:
                    record.keep_unexpired(old, now, limit)
                self._keep(prefix, record)
                views[prefix] = record.children(now, self._suspicions)
            return views
        finally:
            for prefix in prefixes:
                del self._reading[prefix]
                if (kept := self.records.get(prefix)) is not None:
                    kept.asked_at = trio.current_time()  # even if that has failed: then the old one has to do
            done.set()

    def _keep(self, prefix: str, record: PrefixRecord) -> None:
        self.records[prefix] = record
        self.records.move_to_end(prefix)
        if len(self.records) > self.config.max_prefixes:
            self.records.popitem(last=False)
