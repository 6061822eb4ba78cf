"""A session: how layers in one process reach a swarm. Layers hold its name only, so that they pickle and copy freely.

`swarm.py` opens a session for each swarm that it starts or joins; `client/moe` and `client/expert` find it by name.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from labkit.client.expert_client import ExpertClient
from labkit.contact import Contact
from labkit.directory import Directory
from labkit.errors import SwarmClosed
from labkit.events import Emit

T = TypeVar("T")


class Entrance(Protocol):
    """How a synchronous thread enters the thread of trio: a `Portal`, or in a simulation `Lockstep`."""

    def call(self, function: Callable[..., Awaitable[T]], *args: Any) -> T:
        """Run an async function there and wait for what it returns or raises."""

    def check_open(self) -> None:
        """Raise `SwarmClosed` if calls are refused."""


@dataclass(frozen=True)
class Session:
    """What layers need to call a swarm's experts, and the way into the lab thread where the calls are made.

    `absent` belongs to that thread: since when experts that rows need are looked for in vain, and
    where they were last, by uid.
    """

    name: str
    portal: Entrance
    directory: Directory
    experts: ExpertClient
    emit: Emit
    absent: dict[str, tuple[float, Contact | None]] = field(default_factory=dict, repr=False)
    _warned: set[str] = field(default_factory=set, repr=False)

    def first_time(self, what: str) -> bool:
        """Whether this is the first call with `what`: a warning at every batch would be tedious."""
        first = what not in self._warned
        self._warned.add(what)
        return first

    def run(self, function: Callable[..., Awaitable[T]], *args: Any) -> T:
        """Run an async function in the lab thread and wait for it."""
        return self.portal.call(function, *args)


_sessions: dict[str, Session] = {}


def open_session(session: Session) -> None:
    """Let layers find a session by its name."""
    _sessions[session.name] = session


def close_session(session: Session) -> None:
    """Forget a session, unless another has taken its name."""
    if _sessions.get(session.name) is session:
        del _sessions[session.name]


def find_session(name: str) -> Session:
    """The open session of that name. Raises `SwarmClosed`."""
    session = _sessions.get(name)
    if session is None:
        others = f"open here: {', '.join(sorted(_sessions))}" if _sessions else "none is open in this process"
        raise SwarmClosed(
            f"this layer belongs to the swarm {name!r}, which is not open here ({others}); start it with "
            f"lk.Swarm(name={name!r}), join it with lk.Swarm.join(invite, name={name!r}), or use swarm.attach(model)"
        )
    return session
