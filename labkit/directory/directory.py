"""The directory: servers declare their experts here, and clients find them and say which ones failed.

On a batch's way it stands between `client/beam_search`, which asks for the children of prefixes, and the DHT node,
which stores the records (paper, section 3.2). Every call to an expert is reported here as a success or a failure, so
that the next search leaves out the experts that are gone.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import aclosing
from dataclasses import replace

import trio

from labkit.directory.declarations import declared, declared_below
from labkit.directory.declaring import Declaring
from labkit.directory.grids import GridInfo, find_grids
from labkit.directory.index import NAMESPACE, Children
from labkit.directory.second_look import OnFound
from labkit.directory.suspicion import boot_of
from labkit.errors import RPCError, UnknownExpert
from labkit.events import ServerLost
from labkit.expert_uid import ExpertInfo, parent, split_uid

MAX_EXPLAINED = 64  # prefixes below a name that are looked up for an error message


class Directory(Declaring):
    """Experts in the DHT: `declare` writes them; `children`, `find`, `walk`, `all_experts` and `experts_of` find them.

    Reading costs nothing in the steady state, as long as `run` runs in some nursery. All of it belongs to one trio
    thread.

    Args:
        dht: Stores the records.
        config: Times and bounds.
        emit: Called with the events of declared experts and lost servers.
        sign: Signs with the key of this node what it claims.
    """

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the prefixes in use fresh, until cancelled. Without it, a call that uses a stale one waits for it."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self._cache.run)
            nursery.start_soon(self._second_look.run)
            task_status.started()

    # ---------------------------------------------------------------- reading

    def cached(self, prefixes: Iterable[str]) -> dict[str, Children]:
        """Returns the children of those `prefixes` whose cached record may be used now. No waiting, no network."""
        return self._cache.cached(prefixes)

    async def children(self, prefixes: Iterable[str]) -> dict[str, Children]:
        """Returns the live children of each prefix, from the cache or by one bulk get. An unknown prefix has none."""
        return await self._cache.children(prefixes)

    async def look_up(self, prefixes: Iterable[str]) -> dict[str, Children]:
        """Returns the live children of each prefix, read now by one bulk get, cached or not."""
        return await self._cache.read(list(dict.fromkeys(prefixes)))

    async def find(self, uids: Iterable[str]) -> dict[str, ExpertInfo | None]:
        """Returns where each expert lives; None for one that is not declared, or suspended after failures.

        If the cached prefix lacks an expert, it is read again unless it was read in the last `absence` seconds. Raises
        `ValueError` for a text that is no uid.
        """
        places: dict[str, tuple[str, int]] = {}
        for uid in uids:
            _, coordinates = split_uid(uid)
            places[uid] = uid[: uid.rindex(".")], coordinates[-1]
        views = self.cached(dict.fromkeys(prefix for prefix, _ in places.values()))
        ask = {
            prefix
            for prefix, coordinate in places.values()
            if prefix not in views
            or (coordinate not in views[prefix].experts and self._cache.age(prefix) >= self.config.absence)
        }
        views |= await self._cache.read(sorted(ask))
        return {uid: views[prefix].experts.get(coordinate) for uid, (prefix, coordinate) in places.items()}

    async def walk(
        self, name: str, dims: int, *, at_once: int | None = None, anew: bool = False, max_prefixes: int | None = None
    ) -> AsyncGenerator[tuple[Mapping[str, Children], bool], None]:
        """Walk the prefix index of a grid level by level, from its name to its experts.

        Close it (`aclosing`) if you leave it early.

        Args:
            name: The grid's name, or any prefix.
            dims: Levels to walk: coordinates of an expert below `name`.
            at_once: How many prefixes a step reads, by one bulk get; by default all of a level.
            anew: Whether to ask the DHT for cached prefixes, too.
            max_prefixes: How many prefixes of a level are visited, at most; by default the config's `max_prefixes`.

        Yields:
            The prefixes of a step with their live children, in the order of coordinates, and whether this is the last
            level, where the children are experts.
        """
        read = self.look_up if anew else self.children
        limit = self.config.max_prefixes if max_prefixes is None else max_prefixes
        prefixes = [name]
        for level in range(1, dims + 1):
            below: list[str] = []
            size = at_once or max(1, len(prefixes))
            for start in range(0, len(prefixes), size):
                some = prefixes[start : start + size]
                views = await read(some)
                children = {prefix: views[prefix] for prefix in some}
                below += [f"{prefix}.{c}" for prefix, view in children.items() for c in sorted(view.inner)]
                yield children, level == dims
            prefixes = below[:limit]

    async def all_experts(self, name: str, dims: int) -> list[ExpertInfo]:
        """Returns every live expert of the `dims`-dimensional grid `name`, by coordinates.

        For displays and tests: it walks the whole index, which a trainer never needs.
        """
        async with aclosing(self.walk(name, dims)) as steps:
            views = [view async for children, last in steps if last for view in children.values()]
        return [info for view in views for _, info in sorted(view.experts.items())]

    async def grids(self) -> dict[str, GridInfo]:
        """Returns all grids that are declared, by name."""
        return await find_grids(self._dht, self.config.timeout)

    async def holders(self, uids: Iterable[str]) -> dict[str, ExpertInfo]:
        """Returns where these experts are declared, by uid, read now: also those that are suspended after failures."""
        return await declared(self._dht, self.config, uids)

    async def holders_below(self, name: str, dims: int) -> dict[str, ExpertInfo]:
        """Returns the same of all experts of the `dims`-dimensional grid `name`."""
        return await declared_below(self._dht, self.config, name, dims)

    async def experts_of(self, grids: Mapping[str, GridInfo]) -> dict[str, ExpertInfo]:
        """Returns every live expert of these grids, by uid. For displays: see `all_experts`."""
        found = [info for name, grid in grids.items() for info in await self.all_experts(name, len(grid.sizes))]
        return {info.uid: info for info in found}

    async def refresh(self, uids: Iterable[str]) -> None:
        """Read every prefix of these experts now, cached or not: for experts that have just been declared."""
        prefixes = set()
        for uid in uids:
            while "." in uid:
                uid, _ = parent(uid)
                prefixes.add(uid)
        await self.look_up(sorted(prefixes))

    def suspended(self, prefixes: Iterable[str]) -> dict[str, ExpertInfo]:
        """Returns the experts right below these prefixes that are declared but not offered after failures, by uid.

        From the cache alone; to be called in the trio thread.
        """
        return self._cache.suspended(prefixes)

    def backing_off(self, prefixes: Iterable[str]) -> dict[str, ExpertInfo]:
        """Returns those suspended experts that are only on back-off: where no other is left, they are worth a try."""
        now = trio.current_time()
        suspended = self.suspended(prefixes).items()
        return {uid: info for uid, info in suspended if self._suspicions.suspended_until(info, now) < math.inf}

    def known(self) -> dict[str, ExpertInfo]:
        """Returns all live experts in the cache, by uid. Asks no other node; to be called in the trio thread."""
        return self._cache.known()

    def statistics(self) -> dict[str, int]:
        """Returns counts since the start, and how many prefixes are cached."""
        return {**self._cache.counts, "prefixes": len(self._cache.records)}

    def declared(self, prefix: str) -> bool:
        """Whether anything is declared below `prefix`, offered or not, as far as the cache knows."""
        record = self._cache.records.get(prefix)
        return record is not None and bool(record.leaves or record.markers)

    def may_hold(self, name: str, dims: int, count: int = 1) -> bool:
        """Whether so many experts may be declared in the `dims`-dimensional grid `name`, offered or not.

        From the cache alone, where prefixes that have not been read may hold any number. Markers outlive the experts
        of servers that have left, so it is leaves that count.
        """
        return self._cache.may_hold(name, dims, count)

    async def explain(self, prefix: str) -> str:
        """Returns where and how `prefix` is looked up, and what is there and one level below, for error messages."""
        asked = f"{NAMESPACE + prefix!r} was looked up through our DHT node at {self._dht.contact.endpoint}"
        views = dict[str, Children]()
        async with aclosing(self.walk(prefix, 2, anew=True, max_prefixes=MAX_EXPLAINED)) as steps:
            async for children, last in steps:
                views |= children
                if not last and not self.declared(prefix):
                    return f"{asked}: no DHT node answered with a record of experts"
        alive, below = sum(len(view.experts) for view in views.values()), len(views) - 1
        suspended = [f"{info.uid} at {info.contact.endpoint}" for info in self.suspended(views).values()]
        found = f"{alive} live experts" + (f" below {below} prefixes" if below else "")
        more = f" and {len(suspended) - 8} more" if len(suspended) > 8 else ""
        return f"{asked}: {found}" + (f"; hidden after failures: {', '.join(suspended[:8])}{more}" if suspended else "")

    # ---------------------------------------------------------------- what calls have shown

    def report_failure(
        self, info: ExpertInfo, cause: str | RPCError, detail: str = "", *, sent: float | None = None
    ) -> tuple[str, ...]:
        """Take note of a failed call.

        "lost" suspends all experts of that server at once, until it declares them anew; `UnknownExpert` (or its code)
        suspends this expert, likewise. "timeout", "bad_reply" and "failed" put the expert on back-off after `patience`
        of them in a row. In these cases the prefix is looked up again when it is next used: at once if it has nothing
        left to offer, else in the background. The other causes ("overloaded", "cancelled", "refused" because of the
        request) say nothing about the expert.

        Args:
            info: The expert that was called.
            cause: The error, or a word of `errors.CAUSES`.
            detail: What else is known, for the event; by default the error's text.
            sent: When the call was made, on trio's clock; by default now.

        Returns:
            The uids that are suspended now.
        """
        if isinstance(cause, RPCError):
            detail = detail or str(cause)
            cause = UnknownExpert.code if isinstance(cause, UnknownExpert) else cause.cause
        if cause == "lost":
            return self._report_lost(info, detail)
        if cause == UnknownExpert.code:
            out = self._suspicions.disown(info)
        elif cause in ("timeout", "bad_reply", "failed"):
            now = trio.current_time()
            out = self._suspicions.fail(info, now, now if sent is None else sent)
        else:
            return ()
        self._cache.doubt(parent(info.uid)[0])
        return (info.uid,) if out else ()

    def report_success(self, info: ExpertInfo) -> None:
        """Take note of an answered call: the failures of this expert are forgotten."""
        if self._suspicions.succeed(info):
            self._cache.changed(parent(info.uid)[0])

    def newest(self, info: ExpertInfo) -> ExpertInfo:
        """Returns where an expert is in a later epoch, if the cache knows of one; else `info`."""
        return self._cache.newest(info)

    def look_again(self, info: ExpertInfo, done: OnFound) -> bool:
        """Begin to look where an expert is in a later epoch, whose server is gone: see `SecondLook.begin`."""
        return self._second_look.begin(info, done)

    def report_moved(self, info: ExpertInfo, now: ExpertInfo) -> ExpertInfo:
        """Take note of what a server has said: that the expert which was called there is elsewhere now.

        Until the next look at the DHT it is found there, unless a higher epoch is known already.

        Args:
            info: The expert that was called.
            now: The same expert, where it is now.

        Returns:
            The same as `now`, with what is known of its server.
        """
        prefix, coordinate = parent(info.uid)
        self._suspicions.own(info.uid)
        if (record := self._cache.records.get(prefix)) is None:
            return now
        # What is known of the server, its life above all, is what its other experts have been declared with.
        same = (other for other, _ in record.leaves.values() if other.contact.key == now.contact.key)
        newest = max(same, key=lambda other: other.stamp, default=now)
        moved = replace(now, stamp=newest.stamp, since=newest.since)
        record.move(coordinate, info, moved, trio.current_time() + self.config.ttl)
        self._cache.doubt(prefix)
        return moved

    def report_leaving(self, info: ExpertInfo) -> None:
        """Take note that a server is about to stop: its expert is not offered until it is declared anew."""
        if self._suspicions.disown(info):
            self._cache.doubt(parent(info.uid)[0])

    def _report_lost(self, info: ExpertInfo, detail: str) -> tuple[str, ...]:
        if self._suspicions.is_lost(info):
            return ()
        # Its other experts may be cached with a later stamp; those of another life are another loss, if at all.
        others = [
            other
            for other in self._cache.known().values()
            if other.contact == info.contact and boot_of(other.stamp) == boot_of(info.stamp)
        ]
        uids = tuple(sorted({info.uid, *(other.uid for other in others)}))
        first = self._suspicions.lose_server(info, max((other.stamp for other in others), default=info.stamp))
        for prefix in dict.fromkeys(parent(uid)[0] for uid in uids):
            self._cache.doubt(prefix)
        if first:
            self._emit(ServerLost(address=info.contact.endpoint, uids=uids, detail=detail))
        return uids
