"""How many bytes may be under way at once, to one peer and in all.

ZeroMQ's own limits count messages; a message of ours is anything between 40 bytes and 256 MB.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

Go = Callable[[], object]


@dataclass
class ByteBudget:
    """Bytes that are taken, by peer. A message over a limit may go when nothing else of that peer is under way."""

    per_peer: int
    total: int
    taken: int = 0
    by_peer: dict[Hashable, int] = field(default_factory=dict)
    _waiting: dict[Go, tuple[Hashable, int]] = field(default_factory=dict)  # the longest first
    _letting_go: bool = False

    def fits(self, peer: Hashable, size: int) -> bool:
        """Whether `size` more bytes for this peer are within the budget."""
        mine = self.by_peer.get(peer, 0)
        return (mine == 0 or mine + size <= self.per_peer) and (self.taken == 0 or self.taken + size <= self.total)

    def take(self, peer: Hashable, size: int) -> None:
        """Count bytes in; each is to be given back with `give`."""
        self.taken += size
        self.by_peer[peer] = self.by_peer.get(peer, 0) + size

    def take_when_it_fits(self, peer: Hashable, size: int, go: Go) -> None:
        """Count the bytes in and call `go`, now or when others have been given back, unless it is told to `forget`."""
        if self.fits(peer, size):
            self.take(peer, size)
            go()
        else:
            self._waiting[go] = peer, size

    def forget(self, go: Go) -> None:
        """It waits no more."""
        self._waiting.pop(go, None)

    def give(self, peer: Hashable, size: int) -> None:
        """Count bytes out."""
        self.taken -= size
        self.by_peer[peer] -= size
        if self.by_peer[peer] == 0:
            del self.by_peer[peer]
        if not self._letting_go:  # what goes may give back at once, and so let others go: in a loop, not ever deeper
            self._letting_go = True
            try:
                while (go := self._next()) is not None:
                    self.take(*self._waiting.pop(go))
                    go()
            finally:
                self._letting_go = False

    def _next(self) -> Go | None:
        return next((go for go, wanted in self._waiting.items() if self.fits(*wanted)), None)
