"""The replicas of a record: the k nodes nearest to its key, looked up once and remembered for a while.

Servers declare their experts again and again. To look up the same keys each time would be most of what it costs them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import trio

from labkit.contact import Contact
from labkit.dht.lookup import FindNodes
from labkit.dht.peers import Peers
from labkit.dht.storage import key_id

MAX_REMEMBERED = 4096  # keys


class Replicas:
    """Knows on which nodes to store a record.

    Args:
        peers: The other nodes.
        find_nodes: Looks up the nodes nearest to ids.
    """

    __slots__ = ("_find_nodes", "_peers", "_remembered")

    def __init__(self, peers: Peers, find_nodes: FindNodes) -> None:
        self._peers = peers
        self._find_nodes = find_nodes
        # For each id when it was looked up, and what was found; the oldest first.
        self._remembered: dict[int, tuple[float, list[Contact]]] = {}

    async def of(self, keys: Iterable[str]) -> dict[str, tuple[list[Contact], bool]]:
        """Returns for each key the other nodes to store it on, and whether this node is one of the k nearest itself."""
        ids = {key: key_id(key) for key in keys}
        nearest = {target: self._recall(target) for target in ids.values()}
        if len(self._peers.routing) >= self._peers.config.k:
            nearest |= await self._find([target for target, contacts in nearest.items() if not contacts])
        return {key: self.among(target, nearest[target]) for key, target in ids.items()}

    def known(self, keys: Iterable[str]) -> dict[str, list[Contact]]:
        """Returns the other nodes that hold each key, for those keys of which that is known without a look-up."""
        ids = {key: key_id(key) for key in keys}
        return {key: self.among(target, nearest)[0] for key, target in ids.items() if (nearest := self._recall(target))}

    def note(self, target: int, contacts: Sequence[Contact]) -> None:
        """Note which nodes are said to be the nearest to an id, if most of them are known here: then it is so."""
        known = [contact for contact in contacts if contact.node_id in self._peers.routing]
        if 2 * len(known) >= self._peers.config.k and not self._recall(target):
            self._remember({target: known})

    def among(self, target: int, nearest: Sequence[Contact]) -> tuple[list[Contact], bool]:
        """Returns the others of the k nearest nodes, and whether this node is one of the k nearest.

        `nearest`: other nodes, by distance to `target`.
        """
        peers = self._peers
        k, distance = peers.config.k, peers.contact.node_id ^ target
        here = not peers.client_only and (len(nearest) < k or distance < nearest[k - 1].node_id ^ target)
        return list(nearest[: k - here]), here

    def _recall(self, target: int) -> list[Contact]:
        """Returns the replicas of an id from a recent look-up and the nodes that came to be known since.

        Those that do not answer are left out; others that are known take their places, as when records are republished.
        The list is empty if they have to be looked up, as when half of those that were found are gone.
        """
        peers, (at, contacts) = self._peers, self._remembered.get(target, (-math.inf, []))
        k = peers.config.k
        if len(peers.routing) < k:  # then no bucket was ever full and we know all nodes: no look-up is needed
            return peers.nearest(target, k)
        if trio.current_time() - at > peers.config.republish_period:
            return []
        now = [peers.routing.get(contact.node_id) or contact for contact in contacts]  # some may have moved
        alive = [contact for contact in now if peers.usable(contact)]
        if 2 * len(alive) < k:
            return []
        both = {contact.node_id: contact for contact in (*alive, *peers.nearest(target, k))}
        return [both[node_id] for node_id in sorted(both, key=target.__xor__)[:k]]

    async def _find(self, targets: Sequence[int]) -> dict[int, list[Contact]]:
        """Look ids up, and remember what was found."""
        if not targets:
            return {}
        found = await self._find_nodes(targets)
        self._remember(found)
        return found

    def _remember(self, found: Mapping[int, list[Contact]]) -> None:
        for target, contacts in found.items():
            self._remembered.pop(target, None)
            self._remembered[target] = (trio.current_time(), contacts)
        while len(self._remembered) > MAX_REMEMBERED:
            del self._remembered[next(iter(self._remembered))]
