"""What `Swarm.serve` was asked for, as an order that the lab thread executes.

It takes places of a grid, plans servers for them, and starts these, while nobody else can take the same places. No
batch passes here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import trio
from torch import Tensor

from labkit.joining import check_announced
from labkit.launch import planning
from labkit.launch.by_value import HandedKind
from labkit.launch.cluster import Cluster
from labkit.launch.handle import ServerHandle, begin_all
from labkit.launch.lab import Lab
from labkit.launch.places import Places, Spare, Wish, hold_places
from labkit.launch.ports import server_address
from labkit.node import NodeConfig
from labkit.reachability import Reach
from labkit.server.backend import beginning
from labkit.server.checkpoints import checkpoint_directory, save_expert
from labkit.server.config import ServerConfig
from labkit.server.layers import Factory, kind_name
from labkit.wire.rpc_client import Client
from labkit.wire.security import Members

logger = logging.getLogger(__name__)

Initial = Callable[[str], Mapping[str, Tensor]]  # uid -> the `state_dict` of its module
SETTLE_TIMEOUT = 5.0  # seconds that servers wait until it is known whether others reach this machine


@dataclass(frozen=True)
class ServeOrder:
    """Servers to start.

    Args:
        wish: The places that are wanted.
        kind: The kind of the experts, as it is handed to a server.
        options: Their options, as the caller gives them.
        fit: Returns all their options, from what the swarm says of their grid.
        servers: How many servers share the experts.
        isolation: "process" or "task".
        config: The other fields of the servers' `ServerConfig`.
        node: The configuration of the swarm's own node.
        members: Who may connect; the servers are added.
        lasting: Whether the checkpoints outlive the swarm.
        threads: Torch's threads in the caller's thread, which the servers here share.
        beside: How many servers run here already.
        folder: The swarm's temporary folder.
        initial: Returns the `state_dict` that an expert begins with; None for fresh parameters.
        cluster: Where the servers run, if not here.

    Attributes:
        handles: The servers, once they begin to start.
    """

    wish: Wish
    kind: str | Factory | HandedKind
    options: Mapping[str, Any]
    fit: planning.Fit
    servers: int
    isolation: str
    config: Mapping[str, Any]
    node: NodeConfig
    members: Members
    lasting: bool
    threads: int
    beside: int
    folder: str | None = None
    initial: Initial | None = None
    cluster: Cluster | None = None
    handles: list[ServerHandle] = field(default_factory=list, init=False)

    async def execute(self, lab: Lab, servers: list[ServerHandle]) -> list[ServerHandle]:
        """Take the places and start the servers. Returns them when their experts can be found.

        Args:
            lab: Where they live.
            servers: They are added to these: here, where no interrupt can come between.

        Raises:
            ExpertsTaken: Others serve these places, or are about to.
            ValueError: What is wanted does not fit together, or does not fit the grid.
            ServerFailed: A server did not start. Then none is left.
        """
        if self.initial is not None and self.cluster is not None and not self.lasting:
            raise ValueError("initial=… on a cluster: give checkpoint_dir=…, a folder that its hosts share with ours")
        if self.cluster is None:
            server_address(self.node, self.servers + self.beside)  # so that no place is taken in vain
        failure = "" if self.node.announce is None else await self._check_announced(lab, self.node.announce)
        hidden = await lab.node.relaying.settle(lab.node.whereabouts, SETTLE_TIMEOUT) or self.node.hidden
        if failure and lab.node.whereabouts.now.state is not Reach.YES:
            logger.warning(
                "announce=%r: this machine does not reach its own node at %s: %s. Not every router leads back to those "
                "behind it, so others may; as soon as there are any they are asked, and swarm says what they found",
                self.node.announce, lab.node.whereabouts.direct.endpoint, failure,
            )  # fmt: skip
        kind = self.kind if isinstance(self.kind, str) else ""
        async with hold_places(lab.node, self.wish, kind, self.fit) as places:
            handles = self._make_handles(lab, places, hidden)
            if self.initial is not None and places.uids:
                await trio.to_thread.run_sync(self._write_initial, places)
            self.handles.extend(handles)
            await begin_all(self.handles)
            servers += self.handles
        return self.handles

    def _write_initial(self, places: Places) -> None:
        """Write what experts begin with as checkpoints, one at a time; those that are there stay as they are."""
        assert self.initial is not None
        folder = Path(self.config["checkpoint_dir"])
        kind = self.kind.name if isinstance(self.kind, HandedKind) else kind_name(self.kind)
        for uid in places.uids:
            if not (folder / f"{uid}.safetensors").exists():
                save_expert(folder, uid, beginning(self.initial(uid)), kind=kind)

    async def _check_announced(self, lab: Lab, announce: str) -> str:
        """Check that the announced address is ours. Returns why this machine does not reach it, if others may."""
        contact, whereabouts = lab.node.contact, lab.node.whereabouts
        if contact != whereabouts.direct or contact in lab.announced:
            return ""  # it is reached through a relay; or that was done
        client = Client(lab.node.endpoint, lab.node.client.limits)
        lab.network.straight.add(contact)
        try:
            failure = await check_announced(client, contact, announce)
        finally:
            lab.network.straight.discard(contact)
            client.forget_all()
        lab.announced.add(contact)
        return failure

    def _make_handles(self, lab: Lab, places: Places, hidden: bool | None) -> list[ServerHandle]:
        if places.options != self.options and self.wish.experts is None and self.wish.uids is None:
            assert not isinstance(self.kind, HandedKind)  # only for kinds that are built in others say the options
            planning.check_all_places(self.kind, places.options, self.wish.name, len(places.uids))
        config = ServerConfig(
            uids=tuple(places.uids), grid=places.sizes, kind=self.kind, options=places.options, name=self.wish.name,
            spare=not places.uids, **self.config,
        )  # fmt: skip
        if config.spare and self.wish.spare is Spare.IF_FULL:
            logger.warning(
                "the grid %s is full: the new server is a spare one. It keeps copies, and is given experts of others",
                self.wish.name,
            )
        node = replace(self.node, hidden=hidden) if self.cluster is None else planning.node_elsewhere(self.node)
        plans = planning.plan_servers(
            config, self.servers, node, lab.node.contact, member_file=self.members.file, lasting=self.lasting,
            threads=self.threads, beside=self.beside, folder=self.folder,
        )  # fmt: skip
        relay = lab.node.relaying.relay
        if relay is not None:  # which they need, too, and so find at once
            plans = [replace(plan, join=(*plan.join, relay)) for plan in plans]
        checkpoint_directory(config.checkpoint_dir)  # made when all else is known to be right
        keys = [plan.identity.public_key for plan in plans]
        self.members.admit(*keys)
        lab.node.relaying.started_here.update(keys)
        if self.cluster is not None:
            plans = planning.plans_elsewhere(plans, self.node, config.threads)
        return [ServerHandle(lab, plan, self.isolation, self.cluster) for plan in plans]
