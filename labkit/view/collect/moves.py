"""Experts that change their server, in words: who took over from whom, and what was lost.

A server that is gone leaves many experts to several others, within a second or two. `telemetry` gathers the events, and
the `sampler` makes marks of them with this: one for all experts that a server lost, or gave away, at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from labkit.events import ExpertGivenUp, ExpertHandedOver, ExpertTakenOver
from labkit.view.scene import count_text

QUIET = 2.0  # seconds without another expert, after which it is over
LONGEST = 10.0  # seconds after which it is told in any case
NAMED = 4  # servers that are named

Move = ExpertTakenOver | ExpertHandedOver | ExpertGivenUp


@dataclass(slots=True)
class _Group:
    """Experts that went from one server, in one way, at about one time."""

    at: float
    began: float  # when it was first looked at
    last: float
    experts: int = 0
    lost: int = 0
    to: dict[str, None] = field(default_factory=dict)  # addresses, in their order


class MoveWords:
    """Puts into words which experts change their server, all of a server together.

    Args:
        name: Returns what a server is called, by its address.
    """

    def __init__(self, name: Callable[[str], str]) -> None:
        self._name = name
        self._groups: dict[tuple[type[Move], str], _Group] = {}

    def take(self, moves: deque[Move], now: float, *, last: bool = False) -> Iterator[tuple[float, str]]:
        """Take events, and put into words what is over; all of it if this is the `last` look.

        Args:
            moves: The events, which are taken out.
            now: Monotonic seconds.
            last: Whether no more will come.

        Returns:
            When each began, monotonic, and a sentence.
        """
        while moves:
            event = moves.popleft()
            before = event.before if isinstance(event, ExpertTakenOver) else event.address
            group = self._groups.setdefault((type(event), before), _Group(event.at, now, now))
            group.last = now
            group.experts += 1
            group.to[event.address if isinstance(event, ExpertTakenOver) else event.to] = None
            group.lost += 0 if isinstance(event, ExpertHandedOver) else event.lost_updates
        for (kind, before), group in list(self._groups.items()):
            if last or now - group.last >= QUIET or now - group.began >= LONGEST:
                del self._groups[kind, before]
                yield group.at, self._text(kind, before, group)

    def _text(self, kind: type[Move], before: str, group: _Group) -> str:
        who, experts = self._name(before), count_text(group.experts, "expert")
        to = listed([self._name(address) for address in group.to])
        lost = count_text(group.lost, "update") if group.lost else "no update"
        if kind is ExpertTakenOver:
            return f"{to} took over {experts} of {who}, {lost} lost"
        if kind is ExpertHandedOver:
            return f"{who} gave {experts} to {to}"
        return f"{who} gave {experts} up to {to}, {lost} lost"


def listed(names: Sequence[str]) -> str:
    """Returns the names of servers in short: servers[0], [1] and [3]."""
    if len(names) > NAMED:
        return f"{len(names)} servers"
    own = [name.removeprefix("servers") if number else name for number, name in enumerate(names)]
    some = own if all(name.startswith("servers[") for name in names) else list(names)
    return " and ".join([", ".join(some[:-1]), some[-1]] if len(some) > 1 else some)
