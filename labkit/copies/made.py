"""The copies of our experts that other servers keep, as far as is known: how fresh they are, and who is still there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import trio

from labkit.contact import Contact
from labkit.copies.backups import SILENCE
from labkit.copies.messages import CopyState
from labkit.copies.placement import score
from labkit.copies.servers import KEY_PREFIX

MAX_KEEPERS = 64  # servers that say to have a copy of an expert, beyond which the silent ones are forgotten
MAX_NAMED = 8  # servers with copies that a declaration names
_NONE: Mapping[bytes, MadeCopy] = MappingProxyType({})


@dataclass(slots=True)
class MadeCopy:
    """A whole copy at another server.

    Args:
        at: The server.
        epoch: The epoch of the expert.
        updates: How far the expert had come.
        size: Bytes; 0 if that is not known.
        made: When the state was taken, on trio's clock.
        heard: When its server said last that it is there.
        reserve: Whether it was made in reserve.
    """

    at: Contact
    epoch: int
    updates: int
    size: int
    made: float
    heard: float
    reserve: bool = False


class MadeCopies:
    """Who has copies of the experts that are served here.

    Args:
        held: Those experts, with the epoch in which each is.
    """

    def __init__(self, held: Mapping[str, int]) -> None:
        self._held = held
        self._copies: dict[str, dict[bytes, MadeCopy]] = {}  # uid -> key -> copy
        self._named: dict[str, tuple[bytes, ...]] = {}  # who was named last

    def of(self, uid: str) -> Mapping[bytes, MadeCopy]:
        """Returns all copies of an expert, by their servers' keys: also older ones, and those of silent servers."""
        return self._copies.get(uid, _NONE)

    def whole(self, uid: str) -> list[MadeCopy]:
        """Returns the copies of this epoch whose servers are there."""
        epoch, now = self._held.get(uid), trio.current_time()
        return [copy for copy in self.of(uid).values() if copy.epoch == epoch and now - copy.heard < SILENCE]

    def fresh(self, uid: str) -> list[MadeCopy]:
        """Returns those that are not in reserve."""
        return [copy for copy in self.whole(uid) if not copy.reserve]

    def keys(self, uid: str) -> tuple[bytes, ...]:
        """Returns the first bytes of the keys of the servers that have a copy of an expert.

        The freshest comes first, and the one in reserve last; of equal ones, another for each expert, so that a server
        which is gone burdens all.
        """
        copies = sorted(self.whole(uid), key=lambda copy: (copy.reserve, -copy.updates, score(uid, copy.at.key)))
        return tuple(copy.at.key[:KEY_PREFIX] for copy in copies[:MAX_NAMED])

    def name(self) -> tuple[Mapping[str, tuple[bytes, ...]], bool]:
        """Returns who is to be named in declarations, as `keys` are, by expert; and whether at once, or with the next.

        Others are named only when others have copies, not when another one is the freshest; at once where nobody was
        named, for then it is not known that others would carry an expert on.
        """
        before, self._named = self._named, {}
        for uid in self._held:
            keys, last = self.keys(uid), before.get(uid, ())
            self._named[uid] = last if set(keys) == set(last) else keys
        return self._named, any(keys and not before.get(uid) for uid, keys in self._named.items())

    def heard(self) -> dict[Contact, float]:
        """Returns the servers with copies, and when each was heard last."""
        last: dict[Contact, float] = {}
        for uid in self._held:
            for copy in self.of(uid).values():
                last[copy.at] = max(copy.heard, last.get(copy.at, copy.heard))
        return last

    def largest(self) -> int:
        """Returns the bytes of the largest copy; 0 if no size is known."""
        return max((copy.size for copies in self._copies.values() for copy in copies.values()), default=0)

    # ------------------------------------------------------------ what is noted

    def note(self, uid: str, copy: MadeCopy) -> None:
        """Note a copy that was made."""
        self._copies.setdefault(uid, {})[copy.at.key] = copy

    def hear(self, states: Iterable[CopyState], by: Contact) -> None:
        """Note that a server says to keep copies."""
        now = trio.current_time()
        for state in states:
            if state.uid not in self._held:
                continue
            copies = self._copies.setdefault(state.uid, {})
            before = copies.get(by.key)
            if before is None and len(copies) >= MAX_KEEPERS:  # some may have said so for years
                for key in [key for key, copy in copies.items() if now - copy.heard >= SILENCE]:
                    del copies[key]
            if before is not None and (before.epoch, before.updates) == (state.epoch, state.updates):
                before.heard, before.at = now, by
            elif before is not None or len(copies) < MAX_KEEPERS:
                copies[by.key] = MadeCopy(by, state.epoch, state.updates, 0, now, now)

    def drop(self, uid: str, key: bytes) -> None:
        """Note that a server, by its key, keeps a copy of an expert no more."""
        self._copies.get(uid, {}).pop(key, None)

    def lose(self, key: bytes) -> None:
        """Note that a server is gone, and its copies with it."""
        for uid in self._copies:
            self.drop(uid, key)

    def forget(self, uid: str) -> None:
        """Forget the copies of an expert that is served here no more."""
        self._copies.pop(uid, None)
