"""Holdings: which experts a server serves, with which epochs, and where those are that it has served before.

On a batch's way: `server/server` asks `check` before it queues a request with the runtime. Experts come and go while
the server runs: one that is taken over or handed over is added, one that another server has now is given up. All of
this belongs to the lab thread, and nothing here waits, except for `settle_expert`.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import NamedTuple

import trio

from labkit.contact import Contact
from labkit.directory.index import Declared
from labkit.errors import Overloaded, UnknownExpert
from labkit.expert_protocol import ExpertSchema
from labkit.server.backend import ExpertBackend
from labkit.server.device import State
from labkit.server.pulse import Pulse
from labkit.server.runtime import Runtime
from labkit.wire.timers import Timer, Timers

HOLD_TIMEOUT = 3.0  # seconds that a request waits at most while its expert is handed over
MAX_MOVED = 4096  # experts that were given up, of which it is remembered where they are


class Moved(NamedTuple):
    """Where an expert is that was here, and its epoch there."""

    to: Contact
    epoch: int


class GivenUp(Exception):
    """What a request is answered with in the runtime whose expert was given up meanwhile: see `Holdings.check`."""


class Waiting:
    """A request that waits while its expert is on hold. It ends by one call of `go_on`, or when it is cancelled."""

    __slots__ = ("_others", "_timer", "_timers", "go_on")

    def __init__(
        self, go_on: Callable[[Overloaded | None], object], until: float, timers: Timers, others: set[Waiting]
    ) -> None:
        self.go_on = go_on
        self._timers = timers
        self._others = others
        others.add(self)
        self._timer: Timer | None = timers.at(until, self._expire)

    def _expire(self) -> None:
        self._timer = None
        self._others.discard(self)
        self.go_on(Overloaded("the expert is being handed over to another server; nothing was computed"))

    def cancel(self) -> None:
        """Wait no more, and call nothing."""
        self._others.discard(self)
        if self._timer is not None:
            self._timers.cancel(self._timer)
            self._timer = None


class Holdings:
    """The experts of a server, as they come and go, each with its epoch.

    The epoch of an expert grows with each change of the server that serves it: of two servers, the one with the higher
    epoch has it.

    Args:
        runtime: Computes; it is told which experts there are.
        epochs: The experts that it has already, and their epochs.
        timers: The network's, for requests that wait.
    """

    def __init__(self, runtime: Runtime, epochs: Mapping[str, int], timers: Timers) -> None:
        self.suspended = False  # whether all requests are turned away, since it is not known what is still ours
        self.pulse: Pulse | None = None  # notices that the server was away; then they are turned away, too
        self.copies: dict[str, tuple[bytes, ...]] = {}  # who holds a whole copy: see `ExpertInfo.copies`
        self.last_schema: ExpertSchema | None = None  # of the last expert that was given up
        self.on_outdated: Callable[[str, int], object] = lambda uid, epoch: None
        self._runtime = runtime
        self._timers = timers
        self._held = dict(epochs)
        self._on_hold: dict[str, set[Waiting]] = {}
        self._moved = OrderedDict[str, Moved]()
        self._kept: dict[str, float] = {}  # experts that are not to be given away without need, and until when
        self._changed = trio.Event()

    @property
    def held(self) -> Mapping[str, int]:
        """The epochs of the experts that are served, by uid, those on hold included. It changes: copy what is kept."""
        return self._held

    def name_copies(self, copies: Mapping[str, tuple[bytes, ...]], *, at_once: bool) -> None:
        """Let it be declared from now on who has copies of which experts: see `ExpertInfo.copies`.

        `at_once`: whether that is worth a declaration of its own.
        """
        self.copies = {uid: keys for uid, keys in copies.items() if keys and uid in self._held}
        if at_once:
            self._tell()

    def declared(self) -> dict[str, Declared]:
        """What is to be declared in the DHT now."""
        return {uid: Declared(epoch, self.copies.get(uid, ())) for uid, epoch in self._held.items()}

    # ---------------------------------------------------------------- changes

    def add(self, uid: str, backend: ExpertBackend, epoch: int) -> None:
        """Serve an expert from now on. Raises `ValueError` if it is served already."""
        self._runtime.add(backend)
        self._held[uid] = epoch
        self._moved.pop(uid, None)
        self._tell()

    def raise_epoch(self, uid: str, epoch: int) -> None:
        """Note that an expert is served with a higher epoch than so far."""
        if uid in self._held and epoch > self._held[uid]:
            self._held[uid] = epoch
            self._tell()

    def keep(self, uid: str, seconds: float) -> None:
        """Let nobody give an expert away only to make loads even, for some time or until its state is loaded."""
        if uid in self._held:
            self._kept[uid] = trio.current_time() + seconds

    def is_kept(self, uid: str) -> bool:
        """Whether an expert is not to be given away only to make loads even."""
        return trio.current_time() < self._kept.get(uid, -math.inf)

    def backend(self, uid: str) -> ExpertBackend | None:
        """Returns an expert that is served; None if it is not."""
        return self._runtime.backends.get(uid)

    async def load(self, uid: str, state: State) -> None:
        """Put another state in the place of an expert's own, between two batches. Copies of what it was are outdated.

        Raises:
            CheckpointError: The state does not fit.
            UnknownExpert: The expert is not served any more.
        """
        await self._runtime.load(uid, state)
        self._kept.pop(uid, None)
        if uid in self._held:
            self.raise_epoch(uid, self._held[uid] + 1)

    def hold(self, uid: str) -> None:
        """Let new requests of an expert wait, for `HOLD_TIMEOUT` seconds each at most, until `release` or `give_up`."""
        if uid in self._held:
            self._on_hold.setdefault(uid, set())

    def is_on_hold(self, uid: str) -> bool:
        """Whether requests of an expert wait."""
        return uid in self._on_hold

    def release(self, uid: str) -> None:
        """Go on with the requests that wait. Does nothing if the expert is not on hold."""
        for waiting in list(self._on_hold.pop(uid, ())):
            waiting.cancel()
            waiting.go_on(None)

    def give_up(self, uid: str, to: Contact | None = None, epoch: int = 0) -> ExpertBackend | None:
        """Serve an expert no more. A batch that is being computed ends normally: see `settle_expert`.

        Args:
            uid: The expert.
            to: Where it is now: all who call it, and all whose requests wait, are told so. With None they are told that
                it is not here.
            epoch: Its epoch there.

        Returns:
            The expert as it was; None if it was not served.
        """
        if uid not in self._held:
            return None
        del self._held[uid]
        self.copies.pop(uid, None)
        self._kept.pop(uid, None)
        self._moved.pop(uid, None)
        if to is not None:
            self._moved[uid] = Moved(to, epoch)
            if len(self._moved) > MAX_MOVED:
                self._moved.popitem(last=False)
        backend = self._runtime.remove(uid, GivenUp())
        self.last_schema = backend.schema or self.last_schema
        self.release(uid)
        self._tell()
        return backend

    async def settle_expert(self, uid: str) -> None:
        """Wait until nothing of an expert is queued or computed. `hold` it before, or `give_up`, or it may never be."""
        await self._runtime.settle_expert(uid)

    async def until_changed(self) -> None:
        """Wait until experts come or go, or get another epoch, from now on."""
        await self._changed.wait()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    # ---------------------------------------------------------------- requests

    def check(self, uid: str, epoch: int) -> Moved | None:
        """Look at a request before it is queued.

        Args:
            uid: The expert that is called.
            epoch: The expert's epoch, as the caller knows it. If it is higher than ours, another server has the expert:
                then `on_outdated(uid, epoch)` is called.

        Returns:
            Where the expert is, if it was given up to another server; None if the request is to be queued.

        Raises:
            UnknownExpert: The expert is not here, so that the caller looks it up again.
            Overloaded: Requests are turned away at present.
        """
        ours = self._held.get(uid)
        suspended = self.suspended or (self.pulse is not None and self.pulse.is_late)
        if ours is not None and epoch <= ours and not suspended:
            return None
        if suspended:
            raise Overloaded("this server has been away, and finds out which experts are still its own")
        if ours is not None:
            self.on_outdated(uid, epoch)
            raise UnknownExpert(f"expert {uid} was taken over by another server; look it up again")
        moved = self.moved(uid)
        if moved is None or epoch > moved.epoch:
            raise UnknownExpert(f"this server does not hold expert {uid!r}; look it up again")
        return moved

    def check_readable(self, uid: str) -> None:
        """Look whether an expert's state may be read: whether it is here, stays here, and is ours for all we know.

        Raises:
            UnknownExpert: It is not here, or not any more.
            Overloaded: It is about to move, or this server was away. Later it is known where it is.
        """
        if self.check(uid, 0) is not None:
            raise UnknownExpert(f"expert {uid} was given to another server; look it up again")
        if self.is_on_hold(uid):
            raise Overloaded(f"expert {uid} is being handed over to another server; ask again")

    def moved(self, uid: str) -> Moved | None:
        """Where an expert is that was given up; None if it is here, or never was, or if that is not known."""
        return self._moved.get(uid)

    def wait(
        self, uid: str, go_on: Callable[[Overloaded | None], object], deadline: float = math.inf
    ) -> Waiting | None:
        """Let a request wait, if its expert is on hold.

        Args:
            uid: The expert.
            go_on: Called once, with None when the request is to be looked at again, or with what it is answered with.
            deadline: Of the request, on trio's clock.

        Returns:
            What ends the wait; None if there is nothing to wait for.
        """
        others = self._on_hold.get(uid)
        if others is None:
            return None
        return Waiting(go_on, min(deadline, trio.current_time() + HOLD_TIMEOUT), self._timers, others)
