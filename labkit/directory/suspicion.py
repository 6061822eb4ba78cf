"""Suspicions: which experts are not offered for a while, because calls to them failed. Plain state, the time passed in.

The directory knows from the DHT which experts are *declared*; this module remembers, from the calls made here, which of
them do not answer. Beam search sees the rest. If a server is gone, all its experts are suspended at once, until it
declares them anew. An expert that keeps failing is put on an exponential back-off.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import TypeVar

from labkit.contact import Contact
from labkit.expert_uid import ExpertInfo
from labkit.suggest import suggest_fields

BOOT_BITS = 43
COUNTER_BITS = 20  # a stamp has 63 bits: the life of a server, and the number of the declaration in that life

K = TypeVar("K")
V = TypeVar("V")


def make_stamp(boot: int, declaration: int) -> int:
    """Returns the stamp of a server's n-th declaration in its life `boot`. After a million a new life begins."""
    return ((boot << COUNTER_BITS) + declaration) % (1 << (BOOT_BITS + COUNTER_BITS))


def boot_of(stamp: int) -> int:
    """Returns the life of the server in which a stamp was made."""
    return stamp >> COUNTER_BITS


@suggest_fields
@dataclass(frozen=True, slots=True)
class SuspicionConfig:
    """When experts are suspended, and for how long.

    Args:
        patience: Failures in a row before the first back-off.
        backoff: Seconds that the first back-off takes; each further failure doubles it.
        max_backoff: Seconds that a back-off takes at most.
        max_tracked: How many servers, and how many experts, are remembered.

    Raises:
        ValueError: A value is out of its range.
    """

    patience: int = 2
    backoff: float = 1.0
    max_backoff: float = 30.0
    max_tracked: int = 4096

    def __post_init__(self) -> None:
        if self.patience < 1 or self.max_tracked < 1 or not 0 < self.backoff <= self.max_backoff < math.inf:
            raise ValueError(f"{self}: needs patience and max_tracked >= 1 and 0 < backoff <= max_backoff")


@dataclass(slots=True)
class _Failures:
    """Failures in a row of one expert at one server: when the last was counted, and when its back-off ends."""

    contact: Contact
    boot: int
    count: int = 0
    last: float = -math.inf
    until: float = -math.inf


class Suspicions:
    """What calls have shown about servers and experts. All times are in seconds, on one monotonic clock."""

    def __init__(self, config: SuspicionConfig | None = None) -> None:
        self.config = config or SuspicionConfig()
        # (server, life) -> the newest declaration known at the loss. It is void, and so are all before it in that life.
        self._lost: OrderedDict[tuple[Contact, int], int] = OrderedDict()
        # uid -> the server that does not hold it, and the stamp of the declaration that said so
        self._unknown: OrderedDict[str, tuple[Contact, int]] = OrderedDict()
        self._failing: OrderedDict[str, _Failures] = OrderedDict()

    def suspended_until(self, info: ExpertInfo, now: float) -> float:
        """Returns when `info` may be offered: `now` or earlier for at once, infinity for after a new declaration."""
        if not (self._lost or self._unknown or self._failing):
            return now
        if self.is_lost(info) or self._is_unknown(info):
            return math.inf
        failures = self._failures(info)
        return now if failures is None else failures.until

    def is_lost(self, info: ExpertInfo) -> bool:
        """Whether the server that made this declaration is known to be lost."""
        return info.stamp <= self._lost.get((info.contact, boot_of(info.stamp)), -1)

    def lose_server(self, info: ExpertInfo, newest: int) -> bool:
        """Note that the server of `info` is gone. Returns True if that is news.

        A life that is found lost twice, with no success in between, was lost once: the second report concerns a
        declaration that was made before the loss and seen after it.

        Args:
            info: An expert of the server.
            newest: The latest stamp of the server that is known.
        """
        key = (info.contact, boot_of(info.stamp))
        first = key not in self._lost
        self._remember(self._lost, key, max(newest, info.stamp, self._lost.get(key, -1)))
        return first

    def disown(self, info: ExpertInfo) -> bool:
        """Note that the server does not hold this expert. It is suspended until it is declared anew. True if news."""
        if self._is_unknown(info):
            return False
        self._remember(self._unknown, info.uid, (info.contact, info.stamp))
        return True

    def own(self, uid: str) -> None:
        """Note that a server has come to hold this expert, perhaps one that did not hold it before."""
        self._unknown.pop(uid, None)

    def fail(self, info: ExpertInfo, now: float, sent: float) -> bool:
        """Note a failed call to an expert. Returns True if the expert goes on back-off now.

        Calls that were sent before the last failure was known do not count, however many there were at once: a server
        that is slow for a moment does not keep failing.

        Args:
            info: The expert.
            now: The time.
            sent: When the call was sent.
        """
        failures = self._failures(info) or _Failures(info.contact, boot_of(info.stamp))
        if now < failures.until or sent < failures.last:
            return False
        failures.count += 1
        failures.last = now
        self._remember(self._failing, info.uid, failures)
        beyond = failures.count - self.config.patience
        if beyond < 0:
            return False
        # min(beyond, 64), since the exponent of a float is bounded and a count of failures is not.
        failures.until = now + min(self.config.max_backoff, self.config.backoff * 2.0 ** min(beyond, 64))
        return True

    def succeed(self, info: ExpertInfo) -> bool:
        """Note that the expert answered, and forget its failures. Returns True if there were any.

        A lost server is cleared only by the answer to a call that was made after its new declaration: an answer to an
        older call may have been on its way when the server went.
        """
        forgotten = self._failures(info) is not None
        if forgotten:
            del self._failing[info.uid]
        key = (info.contact, boot_of(info.stamp))
        if info.stamp > self._lost.get(key, info.stamp):
            del self._lost[key]
        return forgotten

    def _is_unknown(self, info: ExpertInfo) -> bool:
        contact, stamp = self._unknown.get(info.uid, (None, -1))
        return contact == info.contact and boot_of(stamp) == boot_of(info.stamp) and info.stamp <= stamp

    def _failures(self, info: ExpertInfo) -> _Failures | None:
        """Returns the failures of this expert at this server in this life; another life begins without any."""
        failures = self._failing.get(info.uid)
        same = failures is not None and (failures.contact, failures.boot) == (info.contact, boot_of(info.stamp))
        return failures if same else None

    def _remember(self, table: OrderedDict[K, V], key: K, value: V) -> None:
        table[key] = value
        table.move_to_end(key)
        if len(table) > self.config.max_tracked:
            table.popitem(last=False)
