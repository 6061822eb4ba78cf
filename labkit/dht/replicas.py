"""On whom a record is stored: the k nodes nearest to its key, looked up, and remembered for a while.

Servers declare their experts again and again; to look up the same keys each time would be most of what it costs them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import trio

from labkit.contact import Contact
from labkit.dht.storage import key_id

if TYPE_CHECKING:
    from labkit.dht.node import DHTNode

MAX_REMEMBERED = 4096  # keys


class Replicas:
    """The replicas of what `node` stores."""

    __slots__ = ("_looked_up", "_node")

    def __init__(self, node: DHTNode) -> None:
        self._node = node
        self._looked_up: dict[int, tuple[float, list[Contact]]] = {}  # when, and what was found; the oldest first

    async def of(self, keys: Iterable[str]) -> dict[str, tuple[list[Contact], bool]]:
        """For each key the other nodes to store it on, and whether this node is one of the k nearest itself."""
        node, ids = self._node, {key: key_id(key) for key in keys}
        k = node.config.k
        if len(node.routing) < k:  # then no bucket was ever full and we know everyone: no look-up is needed
            nearest = {target: node.peers.nearest(target, k) for target in ids.values()}
        else:
            nearest = {target: self._remembered(target) for target in ids.values()}
            nearest |= await self._look_up([target for target, contacts in nearest.items() if not contacts])
        return {key: self.among(target, nearest[target]) for key, target in ids.items()}

    def among(self, target: int, nearest: Sequence[Contact]) -> tuple[list[Contact], bool]:
        """Of `nearest` (by distance to `target`) and this node the k nearest: the others, and whether this is one."""
        node = self._node
        k, distance = node.config.k, node.contact.node_id ^ target
        here = not node.client_only and (len(nearest) < k or distance < nearest[k - 1].node_id ^ target)
        return list(nearest[: k - here]), here

    def forget(self, key: str) -> None:
        """One of them did not answer: look them up the next time."""
        self._looked_up.pop(key_id(key), None)

    def _remembered(self, target: int) -> list[Contact]:
        """Those that were looked up not long ago, and who came to be known since; empty if they are to be looked up."""
        node, (at, contacts) = self._node, self._looked_up.get(target, (-math.inf, []))
        k = node.config.k
        if trio.current_time() - at > node.config.republish_period:
            return []
        alive = [contact for contact in contacts if node.peers.usable(contact)]
        if len(alive) < k:
            return []
        both = {contact.node_id: contact for contact in (*alive, *node.peers.nearest(target, k))}
        return [both[node_id] for node_id in sorted(both, key=target.__xor__)[:k]]

    async def _look_up(self, targets: Sequence[int]) -> dict[int, list[Contact]]:
        if not targets:
            return {}
        found, now = await self._node.find_nodes(targets), trio.current_time()
        for target, contacts in found.items():
            self._looked_up.pop(target, None)
            self._looked_up[target] = (now, contacts)
        while len(self._looked_up) > MAX_REMEMBERED:
            del self._looked_up[next(iter(self._looked_up))]
        return found
