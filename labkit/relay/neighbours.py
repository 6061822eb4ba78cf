"""Neighbours: nodes that are relayed, too, and that this node reaches without the relay, as in one home's network.

Their contacts lead to a relay, through which all their bytes would leave the network and come back. So a relay says
which of its clients come from the same address, and each that answers where it is itself is called there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import trio

from labkit.contact import Contact
from labkit.dht.protocol import Ping, Pong
from labkit.errors import RPCError
from labkit.relay.messages import NEIGHBOURS, AskNeighbours, Neighbours
from labkit.wire.addresses import find_way, ipaddress_or_none
from labkit.wire.rpc_types import Caller

ASK_TIMEOUT = 3.0  # seconds
PING_TIMEOUT = 1.0  # seconds in which a neighbour has to answer


def _is_plausible(contact: Contact) -> bool:
    """Whether a relay, which may say what it likes, may make us call there: an IP address, and encrypted."""
    return contact.secure and ipaddress_or_none(contact.host) is not None


class Shortcuts:
    """The neighbours of one node that are called directly.

    Args:
        caller: Makes the calls.
        key: The node's own.
        direct: Where nodes are called, by key, whatever their contacts say: the network's.
        renew: Called with the key of a node that is called elsewhere from now on.
    """

    def __init__(
        self, caller: Caller, key: bytes, direct: dict[bytes, tuple[str, int]], renew: Callable[[bytes], object]
    ) -> None:
        self._caller = caller
        self._key = key
        self._direct = direct
        self._renew = renew
        self._ours: dict[bytes, Contact] = {}

    async def look(self, relay: Contact) -> None:
        """Ask a relay for neighbours, and call those directly from now on that answer where they are.

        Those that do not, or no more, are called where their contacts say.
        """
        named: Sequence[Contact] = list(self._ours.values())
        try:
            reply = await self._caller.call(
                relay, NEIGHBOURS, AskNeighbours(self._key), returns=Neighbours, timeout=ASK_TIMEOUT
            )
            named = reply.body.contacts
        except RPCError:
            pass  # it is gone, or older: those that are known are tried again
        found = {contact.key: contact for contact in named if contact.key != self._key and _is_plausible(contact)}
        for key in self._ours.keys() - found.keys():
            self._forget(key)
        async with trio.open_nursery() as nursery:
            for contact in found.values():
                if contact.key in self._ours or contact.key not in self._direct:
                    nursery.start_soon(self._try, contact)

    def forget_all(self) -> None:
        """Call all of them where their contacts say."""
        for key in list(self._ours):
            self._forget(key)

    async def _try(self, contact: Contact) -> None:
        known = self._ours.get(contact.key)
        if known != contact:
            self._forget(contact.key)
        try:
            at = await find_way(contact.addresses)
            there = Contact(contact.key, *at, contact.secure)
            reply = await self._caller.call(there, "dht.ping", Ping(None), returns=Pong, timeout=PING_TIMEOUT)
            answers = reply.body.key == contact.key
        except RPCError:
            answers = False
        if answers:
            self._ours[contact.key] = contact
            self._direct[contact.key] = at
            if known != contact:
                self._renew(contact.key)
        else:
            self._forget(contact.key)

    def _forget(self, key: bytes) -> None:
        if self._ours.pop(key, None) is not None:
            self._direct.pop(key, None)
