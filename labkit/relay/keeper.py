"""Keeps a node that takes no connections reachable: finds a relay, and another one when that is gone.

1. Whom we joined may relay, and others are in the DHT. 2. They are asked one after the other, each a moment after the
one before; the first that takes us is the one, and the node moves to its port there. 3. When it is gone, all begins
anew, with what is known already. If there is none, that is said, and tried again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import trio

from labkit.contact import Address, Contact
from labkit.errors import RPCError, UnknownMethod
from labkit.events import RelayChanged
from labkit.relay.finding import RelayRecords, find_relays
from labkit.relay.reservation import RelayedAddress, hold_reservation
from labkit.relay.splice import Held
from labkit.wire.rpc_types import Caller

logger = logging.getLogger(__name__)

LOOK_PERIOD = 20.0  # seconds between two look-ups of relays
LOOK_TIMEOUT = 3.0  # seconds for one
STAGGER = 0.5  # seconds that a relay has before the next one is asked, too
MAX_ASKED = 8  # relays in a round
MAX_NAMED = 3  # relays that do not take us, in a sentence
MAX_SAID = 8  # different problems, each of which is said once
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 5.0  # seconds between two rounds in which none took us
WHAT_TO_TRY = (
    "Others cannot call this node. Let a host that they reach relay: labkit relay --join INVITE there, or labkit serve "
    '--relay --join INVITE, or start the swarm there: lk.Swarm(listen="tcp://0.0.0.0:*", relay=True)'
)

Move = Callable[[str, int, str, Sequence[Address]], object]  # host, port, reason, further addresses


class RelayKeeper:
    """Keeps one node reachable through relays while `run` runs.

    Args:
        caller: Makes the calls.
        dht: Where relays are found.
        contact: The node itself, as it was before.
        own: Host and port of its listening socket, as it is reached from this machine.
        joined: The nodes through which it has joined, which may be relays.
        move: Called with the address of the node from now on, and the reason.
        emit: Gets a `RelayChanged` whenever a relay is found or lost.

    Attributes:
        relay: The relay through which the node is reached now; None if there is none.
        problem: Why there is none, as far as that is known, and what to try.
        held: Counts the bytes that are relayed and held here.
    """

    def __init__(
        self, caller: Caller, dht: RelayRecords, contact: Contact, own: tuple[str, int], *, joined: Sequence[Contact],
        move: Move, emit: Callable[[RelayChanged], object],
    ) -> None:  # fmt: skip
        self.relay: Contact | None = None
        self.problem = ""
        self.held = Held()
        self._caller = caller
        self._dht = dht
        self._contact = contact
        self._own = own
        self._joined = [contact for contact in joined if contact.key != self._contact.key]
        self._move = move
        self._emit = emit
        self._known: list[Contact] = []  # relays that were found in the DHT
        self._said: set[str] = set()  # the problems since there was a relay
        self._holding = trio.CancelScope()  # of the reservation through which it is reached
        self._lost = b""  # the key of the last one that was lost

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Be reached through a relay until cancelled.

        Args:
            task_status: Told when there is a relay, or none was found.
        """
        ready, pause, again = False, FIRST_PAUSE, False

        def on_ready() -> None:
            nonlocal ready
            if not ready:
                ready = True
                task_status.started()

        await self._look()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_looking)
            while True:
                refusals = await self._serve_through_one(on_ready)
                if refusals is None:
                    pause, again = FIRST_PAUSE, False
                    continue
                if again:  # the first look-up may have been too early, or a relay be about to start
                    self._on_none(refusals)
                    on_ready()
                await trio.sleep(pause)
                pause, again = min(2 * pause, LONGEST_PAUSE), True
                await self._look()

    async def _look(self) -> None:
        found = await find_relays(self._dht, LOOK_TIMEOUT)
        self._known = found or self._known

    async def _keep_looking(self) -> None:
        while True:
            await trio.sleep(LOOK_PERIOD)
            await self._look()

    def reject(self) -> None:
        """Take another relay, if one is known: others do not reach the node through this one."""
        if self.relay is not None and any(contact.key != self.relay.key for contact in self._candidates()):
            self._holding.cancel()

    def _candidates(self) -> list[Contact]:
        """The relays to ask: the one that has just been lost comes last."""
        some = {contact.key: contact for contact in (*self._joined, *self._known)}
        usable = (c for c in some.values() if c.key != self._contact.key and (self._contact.secure or c.is_loopback))
        return sorted(usable, key=lambda contact: contact.key == self._lost)[:MAX_ASKED]

    async def _serve_through_one(self, on_ready: Callable[[], None]) -> dict[str, str] | None:
        """Ask relays, and be reached through the first that takes us, until it is gone.

        Returns None then; if none takes us, why not, by address.
        """
        scopes: list[trio.CancelScope] = []
        refusals: dict[str, str] = {}

        async def contend(relay: Contact, settled: trio.Event) -> None:
            if self.relay is not None:
                return
            scope = trio.CancelScope()
            scopes.append(scope)

            def on_started(address: RelayedAddress) -> None:
                if self.relay is not None:
                    scope.cancel()
                    return
                for other in scopes:
                    if other is not scope:
                        other.cancel()
                self._holding = scope
                self._on_relayed(address)
                on_ready()
                settled.set()

            with scope:
                try:
                    status: trio.TaskStatus[RelayedAddress] = _Calls(on_started)  # type: ignore[assignment]
                    await hold_reservation(
                        self._caller,
                        relay,
                        self._contact,
                        self._own,
                        members=self._joined,
                        held=self.held,
                        task_status=status,
                    )
                except UnknownMethod:
                    refusals[relay.endpoint] = f"{relay.endpoint} is no relay"
                except RPCError as error:
                    refusals[relay.endpoint] = str(error)
            settled.set()

        async with trio.open_nursery() as nursery:
            for relay in self._candidates():
                if self.relay is not None:
                    break
                settled = trio.Event()
                nursery.start_soon(contend, relay, settled)
                with trio.move_on_after(STAGGER):
                    await settled.wait()
        if self.relay is None:
            return refusals
        self._on_lost(refusals.get(self.relay.endpoint, ""))
        return None

    def _on_relayed(self, address: RelayedAddress) -> None:
        self.relay, self.problem = address.relay, ""
        self._said.clear()
        logger.info("this node takes no connections; the relay %s takes them", address.relay.endpoint)
        self._move(address.host, address.port, f"relayed by {address.relay.endpoint}", address.also)
        self._emit(RelayChanged(relay=address.relay.endpoint, detail=f"callers reach us at port {address.port} there"))

    def _on_lost(self, detail: str) -> None:
        assert self.relay is not None
        logger.warning("%s; looking for another one", detail or f"the relay {self.relay.endpoint} is gone")
        self._lost, self.relay = self.relay.key, None
        self._emit(RelayChanged(relay="", detail=detail))

    def _on_none(self, refusals: Mapping[str, str]) -> None:
        reasons = sorted(refusals.values(), key=lambda reason: (reason.endswith("is no relay"), reason))
        others = [f"and {len(reasons) - MAX_NAMED} others do not either"] * (len(reasons) > MAX_NAMED)
        why = "; ".join([*reasons[:MAX_NAMED], *others]) or "none is known"
        problem = f"no relay takes connections for this node ({why}). {WHAT_TO_TRY}"
        if problem not in self._said and len(self._said) < MAX_SAID:
            self._said.add(problem)
            logger.warning("%s", problem)
            self._emit(RelayChanged(relay="", detail=problem))
        self.problem = problem


class _Calls:
    """A task status that calls a function."""

    def __init__(self, function: Callable[[RelayedAddress], None]) -> None:
        self.started = function
