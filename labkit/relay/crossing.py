"""How a node calls those to which it has no way, as where one has only IPv4 and the other only IPv6: through a relay.

The network asks here when it makes a link and has no way of its own (`Endpoint.find_passage`). 1. Relays to which this
node has a way, whom it has joined or which are in the DHT, are asked for a passage, one after the other. 2. If there is
no such relay, that is said once. Relays are looked for in the background, so that no link waits for it.
"""

from __future__ import annotations

import ipaddress
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import trio

from labkit.contact import Address, Contact
from labkit.errors import ConnectionLost, NoWay, Overloaded, RequestRefused, RPCError, UnknownMethod
from labkit.events import Emit, RelayChanged
from labkit.reachability import CALL_BACK_TIME, share_version
from labkit.relay.finding import RelayRecords, find_relays
from labkit.relay.messages import PASSAGE, AskPassage, Passage
from labkit.wire.addresses import find_way, has_version_of, ipaddress_or_none, resolve
from labkit.wire.rpc_client import Client

logger = logging.getLogger(__name__)

ASK_TIMEOUT = CALL_BACK_TIME + 2.0  # seconds for a relay's answer; a no takes as long as a call back
MAX_ASKING = 12  # nodes for which relays are asked at the same time
MAX_ASKED = 4  # relays that are asked for one
KEPT = 5.0  # seconds for which a passage is used for new links without asking again, which renews it
DOUBTED = 30.0  # seconds: if a new link is needed before, it may not have held, and other relays are asked first
NO_RELAY_TIME = 20.0  # seconds for which a node that is no relay is not asked again
LOOK_PERIOD = 3.0  # seconds between two look-ups of relays, while some are needed
LOOK_TIMEOUT = 3.0  # seconds for one
SAID_FOR = 90.0  # seconds for which it is said that there was no way to a node
COUNTED_FOR = 600.0  # seconds for which a node counts that was called through a passage
MAX_REMEMBERED = 1024  # nodes that were called so


@dataclass(frozen=True, slots=True)
class _GivenPassage:
    """Where a passage begins, the relay that has given it, and when."""

    leads: Address
    relay: Contact
    at: float


class PassageFinder:
    """Finds passages for one node.

    Args:
        client: The node's own.
        joined: The nodes through which it has joined, which may be relays.
        emit: Gets a `RelayChanged` when a passage is needed and there is no relay for it.

    Attributes:
        relay: The relay that gave the last one; None if there has been none.
    """

    def __init__(self, client: Client, joined: Sequence[Contact], emit: Emit) -> None:
        self.relay: Contact | None = None
        self._client = client
        self._joined = list(joined)
        self._emit = emit
        self._known: list[Contact] = []  # relays that were found in the DHT
        self._passages: dict[Contact, _GivenPassage] = {}
        self._no_relays: dict[bytes, float] = {}  # keys, and until when they are not asked again
        self._limiter = trio.CapacityLimiter(MAX_ASKING)
        self._wanted = trio.Event()
        self._problem, self._said_at, self._said = "", 0.0, False

    @property
    def problem(self) -> str:
        """Why there is no way to some node, and what to try; empty if that was so for none lately."""
        return self._problem if time.monotonic() < self._said_at + SAID_FOR else ""

    @property
    def called(self) -> int:
        """How many nodes have been called through passages lately."""
        since = time.monotonic() - COUNTED_FOR
        return sum(passage.at > since for passage in self._passages.values())

    async def run(self, dht: RelayRecords, forgive: Callable[[], object]) -> None:
        """Look for relays whenever some are needed, until cancelled.

        Args:
            dht: Where they are found.
            forgive: Called when there is another one: nodes that did not answer may do so now.
        """
        while True:
            await self._wanted.wait()
            before = {relay.key for relay in self._known}
            self._known = await find_relays(dht, LOOK_TIMEOUT) or self._known
            for relay in self._known:
                self._no_relays.pop(relay.key, None)
            if {relay.key for relay in self._known} - before:
                forgive()
            await trio.sleep(LOOK_PERIOD)
            self._wanted = trio.Event()

    async def find(self, contact: Contact) -> Address | None:
        """Returns where a node is called to which there is no way. None if no relay helps.

        Raises:
            ConnectionLost: A relay has tried, and the node did not answer there, either.
        """
        before, now = self._passages.get(contact), time.monotonic()
        if before is not None and now < before.at + KEPT:
            return before.leads
        doubted = before.relay.key if before is not None and now < before.at + DOUBTED else b""
        self._wanted.set()
        target = await _by_ip(contact)
        if target is None:
            return None
        async with self._limiter:
            self._passages.pop(contact, None)
            given = await self._ask(target, doubted)  # 1
        if given is None:
            await self._on_none(target)  # 2
            return None
        self._passages[contact] = given
        if len(self._passages) > MAX_REMEMBERED:
            del self._passages[next(iter(self._passages))]
        self._problem, self._said = "", False
        return given.leads

    async def _ask(self, target: Contact, doubted: bytes) -> _GivenPassage | None:
        asked, tried = 0, ""
        for relay in sorted(self._candidates(target), key=lambda relay: relay.key == doubted):
            if asked >= MAX_ASKED:
                break
            try:
                host, _ = await self._client.endpoint.find_way(relay)
                asked += 1
                reply = await self._client.call(
                    relay, PASSAGE, AskPassage(target), returns=Passage, timeout=ASK_TIMEOUT
                )
            except UnknownMethod:
                self._no_relays[relay.key] = trio.current_time() + NO_RELAY_TIME
                continue
            except (Overloaded, RequestRefused) as error:
                if share_version(relay, target):  # else it is no relay for that
                    tried = f"a relay: {error}"
                continue
            except RPCError as error:
                logger.debug("no passage to %s: %s", target.endpoint, error)
                continue
            if reply.body.port:
                self.relay = relay
                return _GivenPassage((host, reply.body.port), relay, time.monotonic())
            tried = f"the relay {relay.endpoint}, which it did not answer"
        if tried:
            raise ConnectionLost(f"{target.endpoint} could not be called through {tried}")
        return None

    def _candidates(self, target: Contact) -> list[Contact]:
        """The relays to ask: those with the IP version of the target first."""
        now, ours = trio.current_time(), self._client.endpoint.contact.key
        last = [] if self.relay is None else [self.relay]
        some = {contact.key: contact for contact in (*last, *self._joined, *self._known)}
        some.update((contact.key, contact) for contact in self._known)  # which say where they are now
        usable = (
            contact for key, contact in some.items()
            if key not in (ours, target.key) and contact.secure and now >= self._no_relays.get(key, 0.0)
        )  # fmt: skip
        return sorted(usable, key=lambda relay: not share_version(relay, target))

    async def _on_none(self, target: Contact) -> None:
        hosts = [host for host, _ in target.addresses]
        if has_version_of(hosts) and not any(ipaddress.ip_address(host).is_global for host in hosts):
            return  # it is in a network of its own, and it is for that node to be reached from others
        try:
            await find_way(target.addresses)
        except NoWay as error:
            self._problem, self._said_at = str(error), time.monotonic()
            if not self._said:
                self._said = True
                logger.warning("%s", error)
                self._emit(RelayChanged(relay="", detail=str(error)))


async def _by_ip(contact: Contact) -> Contact | None:
    """Returns a contact without names, as a relay is told of it. None if it does not encrypt, or its name is none."""
    try:
        host = contact.host if ipaddress_or_none(contact.host) else await resolve(contact.host, contact.port)
        return Contact(contact.key, host, contact.port, contact.secure, contact.also) if contact.secure else None
    except (ConnectionLost, ValueError):
        return None
