"""Which experts are not offered at present, and until when: plain state, no I/O, the time passed in.

The directory knows from the DHT who *declared* an expert; this module remembers, from the calls made here, who does not
keep that promise. Beam search sees the difference of the two. A server that is gone takes all its experts with it at
once; an expert that keeps failing is put on an exponential back-off; a declaration made after the loss clears it.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import TypeVar

from labkit.contact import Contact
from labkit.expert_uid import ExpertInfo

BOOT_BITS = 43
COUNTER_BITS = 20  # a stamp has 63 bits: which life of a server, and which declaration of that life

K = TypeVar("K")
V = TypeVar("V")


def make_stamp(boot: int, declaration: int) -> int:
    """The stamp of a server's n-th declaration in the life `boot`. After a million of them a new life begins."""
    return ((boot << COUNTER_BITS) + declaration) % (1 << (BOOT_BITS + COUNTER_BITS))


def boot_of(stamp: int) -> int:
    """The life of the server in which a stamp was made."""
    return stamp >> COUNTER_BITS


@dataclass(frozen=True, slots=True)
class SuspicionConfig:
    """`patience`: failures in a row before the first back-off, which takes `backoff` seconds; each further failure
    doubles it, up to `max_backoff` seconds. `max_tracked`: how many servers, and experts, are remembered."""

    patience: int = 2
    backoff: float = 1.0
    max_backoff: float = 30.0
    max_tracked: int = 4096

    def __post_init__(self) -> None:
        if self.patience < 1 or self.max_tracked < 1 or not 0 < self.backoff <= self.max_backoff < math.inf:
            raise ValueError(f"{self}: needs patience and max_tracked >= 1 and 0 < backoff <= max_backoff")


@dataclass(slots=True)
class _Failures:
    """Failures in a row of one expert at one server. `last`: when one was counted; `until`: the end of its back-off."""

    contact: Contact
    boot: int
    count: int = 0
    last: float = -math.inf
    until: float = -math.inf


class Suspicions:
    """What calls have shown about servers and experts. All times are seconds on one monotonic clock."""

    def __init__(self, config: SuspicionConfig | None = None) -> None:
        self.config = config or SuspicionConfig()
        # The newest declaration known at the loss: that one and those before it, of the same life, are void.
        self._lost: OrderedDict[tuple[Contact, int], int] = OrderedDict()
        self._unknown: OrderedDict[str, tuple[Contact, int]] = OrderedDict()  # uid -> who disowned it, at which stamp
        self._failing: OrderedDict[str, _Failures] = OrderedDict()

    def hidden_until(self, info: ExpertInfo, now: float) -> float:
        """When `info` may be offered: `inf` for "not before a new declaration", `now` or earlier for "at once"."""
        if not (self._lost or self._unknown or self._failing):
            return now
        if self.is_lost(info) or self._is_unknown(info):
            return math.inf
        failures = self._failures(info)
        return now if failures is None else failures.until

    def is_lost(self, info: ExpertInfo) -> bool:
        """Whether the loss of the server that made this declaration is known already."""
        return info.stamp <= self._lost.get((info.contact, boot_of(info.stamp)), -1)

    def lose_server(self, info: ExpertInfo, newest: int) -> bool:
        """The server behind `info` is gone; `newest` is its last known stamp. True if this life was not lost before.

        A life that is found lost twice, with no success in between, was lost once: the second report concerns a
        declaration that was made before the loss and seen after it.
        """
        key = (info.contact, boot_of(info.stamp))
        first = key not in self._lost
        self._remember(self._lost, key, max(newest, info.stamp, self._lost.get(key, -1)))
        return first

    def disown(self, info: ExpertInfo) -> bool:
        """The server says that it does not hold this expert: out until it is declared anew. True if that is news."""
        if self._is_unknown(info):
            return False
        self._remember(self._unknown, info.uid, (info.contact, info.stamp))
        return True

    def fail(self, info: ExpertInfo, now: float, sent: float) -> bool:
        """One more failure of an expert, by a call that was `sent` then. True if it goes on back-off now.

        Calls that were sent before the last failure was known are no further one, however many there were at once: a
        server that is slow for a moment is not one that keeps failing.
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
        # min(beyond, 64): a float's exponent is bounded, a count of failures is not.
        failures.until = now + min(self.config.max_backoff, self.config.backoff * 2.0 ** min(beyond, 64))
        return True

    def succeed(self, info: ExpertInfo) -> bool:
        """The expert answered: its failures are forgotten. True if something about it was remembered.

        A lost server is cleared only by the answer to a call made after its new declaration: an answer to an older
        call may have been on its way when the server went.
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
        """Those of this expert at this server, in this life of it: another one starts with a clean slate."""
        failures = self._failing.get(info.uid)
        same = failures is not None and (failures.contact, failures.boot) == (info.contact, boot_of(info.stamp))
        return failures if same else None

    def _remember(self, table: OrderedDict[K, V], key: K, value: V) -> None:
        table[key] = value
        table.move_to_end(key)
        if len(table) > self.config.max_tracked:
            table.popitem(last=False)
