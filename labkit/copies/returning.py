"""Returning: what others have of the experts with which a server begins, so that none of it is lost, or served twice.

A server that was away may have been missed: others serve its experts by now, or are about to, from their copies. It
leaves those to them, unless its own checkpoint is newer than every copy, and looks whether they are served indeed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

import trio

from labkit.contact import Contact
from labkit.copies.messages import HAVE, MAX_WATCHED, CopyState
from labkit.copies.placement import rank
from labkit.copies.servers import KEY_PREFIX, GridServers
from labkit.directory import Directory
from labkit.directory.declarations import of_others
from labkit.errors import DeadlineExceeded, RPCError
from labkit.expert_uid import ExpertInfo
from labkit.joining import is_alive
from labkit.wire.rpc_types import Caller

ASK_TIME = 1.0  # seconds that a server has to say what it has
GUESSES = 3  # servers that are asked for copies where no declaration names any, or those that it names have none
TURNS = 3  # in which others are asked, as long as nobody has a copy who should
SILENT_CALLS = 2  # that a server leaves unanswered, after which it is not asked again; one if it cannot be reached


@dataclass(slots=True)
class Carried:
    """What others have of some experts.

    Args:
        served: The experts that they serve.
        copied: The newest copy of each of the others, as far as there is one.
        epochs: The highest epoch of each, as far as one is known.
    """

    served: set[str] = field(default_factory=set)
    copied: dict[str, CopyState] = field(default_factory=dict)
    epochs: dict[str, int] = field(default_factory=dict)

    def note(self, uid: str, epoch: int) -> None:
        """Note an epoch of an expert."""
        self.epochs[uid] = max(epoch, self.epochs.get(uid, 0))


async def carried_by_others(
    caller: Caller, directory: Directory, servers: GridServers, own: Callable[[], Contact], uids: Iterable[str]
) -> Carried:
    """Find out what other servers have of experts that are not served here.

    Args:
        caller: Asks them.
        directory: Where experts are declared.
        servers: The servers of the grid.
        own: Returns our own contact.
        uids: The experts.

    Raises:
        LabkitError: The DHT cannot be asked.
    """
    uids, carried = list(uids), Carried()
    found: dict[str, ExpertInfo] = await directory.holders(uids)
    held, _ = await of_others(found, own().key, partial(is_alive, caller))
    carried.served.update(held)
    for uid, info in found.items():
        carried.note(uid, info.epoch)
    await servers.read()
    others = servers.others
    answered: dict[str, set[Contact]] = {uid: set() for uid in uids}
    silent: Counter[Contact] = Counter()

    def whom_to_ask(uid: str, *, first: bool) -> list[Contact]:
        named = found[uid].copies if uid in found and first else ()
        keepers = [record.contact for key, record in others.items() if key[:KEY_PREFIX] in named]
        if keepers:
            return keepers
        ranked = (record.contact for record in rank(uid, others.values(), own()))
        return [one for one in ranked if one not in answered[uid] and silent[one] < SILENT_CALLS][:GUESSES]

    async def ask(contact: Contact, some: list[str]) -> None:
        for start in range(0, len(some), MAX_WATCHED):
            part = some[start : start + MAX_WATCHED]
            try:
                reply = await caller.call(contact, HAVE, part, returns=list[CopyState | None], timeout=ASK_TIME)
            except RPCError as error:  # it is gone, or keeps no copies
                silent[contact] += 1 if isinstance(error, DeadlineExceeded) else SILENT_CALLS
                doubtful.update(some)
                return
            for uid, state in zip(part, reply.body, strict=False):
                answered[uid].add(contact)
                if state is not None:
                    take(uid, state)

    def take(uid: str, state: CopyState) -> None:
        carried.note(uid, state.epoch)
        best = carried.copied.get(uid)
        if state.served:
            carried.served.add(uid)
        elif best is None or (best.epoch, best.updates) < (state.epoch, state.updates):
            carried.copied[uid] = state

    doubtful = set(uids)  # those of which there may be a copy all the same, if none is found
    for turn in range(TURNS):
        to_ask: dict[Contact, list[str]] = {}
        for uid in uids:
            if uid in doubtful and uid not in carried.served and uid not in carried.copied:
                for contact in whom_to_ask(uid, first=turn == 0):
                    to_ask.setdefault(contact, []).append(uid)
        doubtful = set(found)
        async with trio.open_nursery() as nursery:
            for contact, some in to_ask.items():
                nursery.start_soon(ask, contact, some)
    return carried
