"""The directory: servers declare their experts here, and clients find them and say which ones failed.

On a batch's way it stands between `client/beam_search`, which asks for the children of prefixes, and the DHT node, that
stores the records (paper, section 3.2). Every call to an expert is reported here as a success or a failure, so that the
next search leaves out who is gone.
"""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import Callable, Iterable, Sequence

import trio

from labkit.contact import Contact
from labkit.directory.cache import DirectoryConfig, PrefixCache, Records
from labkit.directory.index import NAMESPACE, Children, entries_of
from labkit.directory.suspicion import BOOT_BITS, Suspicions, boot_of, make_stamp
from labkit.errors import LabkitError, RPCError, UnknownExpert
from labkit.events import Emit, ExpertDeclared, ServerLost, ignore
from labkit.expert_uid import ExpertInfo, parent, split_uid

logger = logging.getLogger(__name__)


class Directory:
    """Experts in the DHT: `declare` writes them; `children`, `find` and `all_experts` find them.

    Reading costs nothing in the steady state, as long as somebody's nursery holds `run`. All of it belongs to one trio
    thread.
    """

    def __init__(self, dht: Records, config: DirectoryConfig | None = None, emit: Emit = ignore) -> None:
        self.config = config or DirectoryConfig()
        self._dht = dht
        self._emit = emit
        self._boot = secrets.randbits(BOOT_BITS)
        self._declarations = 0
        self._suspicions = Suspicions(self.config.suspicion)
        self._cache = PrefixCache(dht, self.config, self._suspicions)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep what is in use fresh, until cancelled. Without it, whoever uses a stale prefix waits for it instead."""
        await self._cache.run(task_status=task_status)

    # ---------------------------------------------------------------- writing

    async def declare(self, uids: Sequence[str], contact: Contact) -> None:
        """Say that the experts `uids` live at `contact` for the next `ttl` seconds. One bulk store.

        Raises `ValueError` for what is no uid, `LabkitError` if some entry was stored nowhere, not even here.
        """
        self._declarations += 1
        stamp = make_stamp(self._boot, self._declarations)
        entries = entries_of(uids, contact, stamp, self.config.ttl)
        if not entries:
            await trio.lowlevel.checkpoint()
            return
        copies = [0] * len(entries)
        with trio.move_on_after(self.config.timeout):
            copies = await self._dht.store_many(entries)
        missing = [f"{entry.key} / {entry.subkey}" for entry, n in zip(entries, copies, strict=True) if n < 1]
        if missing:
            raise LabkitError(
                f"declaring {len(uids)} experts at {contact.endpoint}: {len(missing)} of {len(entries)} entries "
                f"(first: {missing[0]}) were stored nowhere within {self.config.timeout:g} s, not even at our own "
                f"DHT node {self._dht.contact.endpoint}; is it running?"
            )
        for uid in uids:
            self._cache.forget_absence(uid)  # what we declare, we find at once
        for uid in uids:
            self._emit(ExpertDeclared(uid=uid, address=contact.endpoint, ttl=self.config.ttl))

    async def keep_declared(
        self,
        uids: Sequence[str] | Callable[[], Sequence[str]],
        contact: Contact,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Declare every `ttl / 3` seconds until cancelled; ready when the first declaration is stored.

        Raises what the first `declare` raises. A later one that fails is logged and tried again after `ttl / 10`.
        """
        await self.declare(uids() if callable(uids) else uids, contact)
        task_status.started()
        pause = self.config.ttl / 3
        while True:
            await trio.sleep(pause)
            try:
                await self.declare(uids() if callable(uids) else uids, contact)
                pause = self.config.ttl / 3
            except LabkitError as error:
                logger.warning("%s", error)
                pause = self.config.ttl / 10

    # ---------------------------------------------------------------- reading

    def cached(self, prefixes: Iterable[str]) -> dict[str, Children]:
        """The children of those `prefixes` whose cached record may be used now. No waiting, no network."""
        return self._cache.cached(prefixes)

    async def children(self, prefixes: Iterable[str]) -> dict[str, Children]:
        """The live children of each prefix, from the cache or by one bulk get; a prefix that nobody knows has none."""
        return await self._cache.children(prefixes)

    async def look_up(self, prefixes: Iterable[str]) -> dict[str, Children]:
        """The same, read now by one bulk get, cached or not."""
        return await self._cache.read(list(dict.fromkeys(prefixes)))

    async def find(self, uids: Iterable[str]) -> dict[str, ExpertInfo | None]:
        """Where each expert lives; None for one that is not declared, or hidden after failures.

        Raises `ValueError` for what is no uid. An expert that its cached prefix lacks is looked up again if that was
        read `absence` seconds ago or earlier.
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

    async def all_experts(self, name: str, dims: int) -> list[ExpertInfo]:
        """Every live expert of the `dims`-dimensional grid `name`, by coordinates. For displays and tests: it walks the
        whole index (at most `max_prefixes` prefixes a level), which a trainer never needs."""
        prefixes = [name]
        for _ in range(dims - 1):
            views = await self.children(prefixes)
            below = [f"{prefix}.{coordinate}" for prefix in prefixes for coordinate in sorted(views[prefix].inner)]
            prefixes = below[: self.config.max_prefixes]
        views = await self.children(prefixes)
        return [info for prefix in prefixes for _, info in sorted(views[prefix].experts.items())]

    async def refresh(self, uids: Iterable[str]) -> None:
        """Read every prefix of these experts now, cached or not: for who knows that they have just been declared."""
        prefixes = set()
        for uid in uids:
            while "." in uid:
                uid, _ = parent(uid)
                prefixes.add(uid)
        await self.look_up(sorted(prefixes))

    def suspended(self, prefixes: Iterable[str]) -> dict[str, ExpertInfo]:
        """Experts right below these prefixes that are declared and, after failures, not offered, by uid. From the cache
        alone; for displays (to be called in the trio thread)."""
        return self._cache.hidden(prefixes)

    def backing_off(self, prefixes: Iterable[str]) -> dict[str, ExpertInfo]:
        """Those of the hidden experts that are only on back-off: where nobody else is left, they are worth a try."""
        now = trio.current_time()
        hidden = self.suspended(prefixes).items()
        return {uid: info for uid, info in hidden if self._suspicions.hidden_until(info, now) < math.inf}

    def known(self) -> dict[str, ExpertInfo]:
        """All live experts in the cache, by uid. Asks nobody; for displays (to be called in the trio thread)."""
        return self._cache.known()

    def statistics(self) -> dict[str, int]:
        """Counts since the start, and how many prefixes are cached."""
        return {**self._cache.counts, "prefixes": len(self._cache.records)}

    async def explain(self, prefix: str) -> str:
        """Where and how `prefix` is looked up, and what is there and one level below, in words, for error messages."""
        asked = f"{NAMESPACE + prefix!r} was looked up through our DHT node at {self._dht.contact.endpoint}"
        views = await self._cache.read([prefix])
        if not (record := self._cache.records.get(prefix)) or not (record.leaves or record.markers):
            return f"{asked}: no DHT node answered with a record of experts"
        below = [f"{prefix}.{coordinate}" for coordinate in sorted(views[prefix].inner)[:64]]
        views |= await self._cache.read(below)
        alive = sum(len(view.experts) for view in views.values())
        now, hidden = trio.current_time(), list[str]()
        for path, view in views.items():
            leaves = self._cache.records[path].leaves if path in self._cache.records else {}
            for coordinate, (info, expires_at) in leaves.items():
                if coordinate not in view.experts and now < expires_at:
                    hidden.append(f"{info.uid} at {info.contact.endpoint}")
        found = f"{alive} live experts" + (f" below {len(below)} prefixes" if below else "")
        more = f" and {len(hidden) - 8} more" if len(hidden) > 8 else ""
        return f"{asked}: {found}" + (f"; hidden after failures: {', '.join(hidden[:8])}{more}" if hidden else "")

    # ---------------------------------------------------------------- what calls have shown

    def report_failure(
        self, info: ExpertInfo, cause: str | RPCError, detail: str = "", *, sent: float | None = None
    ) -> tuple[str, ...]:
        """A call to `info` failed; `cause` is the error, or a word of `errors.CAUSES`. Returns the uids that went.
        `sent`: when the call was made, on trio's clock (by default now).

        "lost": all experts of that server are out at once, until it declares anew. `UnknownExpert` (or its code): this
        expert is, likewise. "timeout", "bad_reply", "failed": after `patience` in a row the expert goes on back-off.
        In these cases the prefix is looked up again when it is next used: at once if it has nothing left to offer, else
        in the background. The other causes ("overloaded", "cancelled", "refused" for the request's sake) say nothing
        about the expert.
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
        """A call to `info` was answered: its failures are forgotten."""
        if self._suspicions.succeed(info):
            self._cache.changed(parent(info.uid)[0])

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
