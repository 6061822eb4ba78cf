"""Serving: an expert server from its start to its end, with its node, its declarations and its checkpoints.

A batch passes by: `server/server` has the experts and the methods by which they are called.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial

import trio

from labkit.contact import Contact
from labkit.directory.grids import GridInfo, keep_grid_declared
from labkit.events import Emit, ignore
from labkit.expert_uid import ExpertInfo
from labkit.faults import Faults
from labkit.joining import is_alive
from labkit.node import Node, NodeConfig, open_node
from labkit.server.building import build_in_thread
from labkit.server.carrying import Carrying
from labkit.server.checkpoints import Progress, keep_checkpoints, save_all
from labkit.server.config import ServerConfig
from labkit.server.leaving import leave, stop_timeout
from labkit.server.loading import LoadOrder, carry_out_loads
from labkit.server.ownership import GRACE, HURRIED_GRACE, FolderClaim, claim_the_rest, keep_claimed, own_checkpoints
from labkit.server.runtime import Executor
from labkit.server.server import ExpertServer
from labkit.wire.security import Admission, Identity
from labkit.wire.transport import Network

SETTLE_TIMEOUT = 20.0  # seconds that a clean stop waits for the batch that is being computed
HEADER_ROOM = 1 << 16  # bytes of an answer that are not its tensors, at most


async def serve_experts(
    network: Network,
    identity: Identity,
    config: ServerConfig,
    node_config: NodeConfig | None = None,
    *,
    join: Sequence[Contact] = (),
    admission: Admission | None = None,
    faults: Faults | None = None,
    emit: Emit = ignore,
    stop: trio.Event | None = None,
    hurry: trio.Event | None = None,
    alone: trio.Event | None = None,
    executor: Executor | None = None,
    allow: Callable[[float], object] | None = None,
    orders: trio.MemoryReceiveChannel[LoadOrder] | None = None,
    on_held: Callable[[Collection[str]], object] = lambda uids: None,
    task_status: trio.TaskStatus[Contact] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Run an expert server until `stop` is set (a clean stop: every expert is saved) or until cancelled (a crash).

    1. build the experts, or load them; 2. start the runtime; 3. join the swarm; 4. declare the experts: from then on
    they can be found, and only then the server counts as started; 5. declare again and save, until the stop; 6. leave:
    hand experts over, if others keep copies, and go on answering until nobody calls any more (`server/leaving`).

    Args:
        network: Where the server's node listens.
        identity: The node's key pair.
        config: What the server holds.
        node_config: How the node listens.
        join: Nodes of the swarm to join; none for a swarm of its own.
        admission: Who may connect; None for everybody.
        faults: The delays and losses to inject; none by default.
        emit: Gets the events of the server and its node.
        stop: Set it for a clean stop.
        hurry: Set it, too, if a clean stop has to be over within a second.
        alone: Set it, too, before, if no other server of the grid goes on, so that no expert is handed over.
        executor: Where to compute. In a simulation that is `InlineCompute`, with which nothing leaves this thread.
        allow: Called before the server counts as started, with the seconds that a clean stop may take (`stop_timeout`).
        orders: Where orders to load experts come from, if any may.
        on_held: Called with the experts that it holds, before it counts as started and whenever some come or go.
        task_status: Started with the node's contact.

    Raises:
        FolderTaken: Another server saves one of these experts in the same folder.
    """
    carries = config.carries
    own = own_checkpoints(config.checkpoint_dir, config.uids, in_thread=executor is None, all_of_them=not carries)
    async with own as claim:
        wanted = set(config.uids)
        if carries:  # what others save, they are to hold
            uids = tuple(uid for uid in config.uids if claim.owns(uid))
            config = replace(config, uids=uids, spare=config.spare or uids != config.uids)
        await _serve_owned(
            network, identity, config, node_config, claim, wanted, join=join, admission=admission, faults=faults,
            emit=emit, stop=_event(stop), hurry=_event(hurry), alone=_event(alone), executor=executor, allow=allow,
            orders=orders, on_held=on_held, task_status=task_status,
        )  # fmt: skip


def _event(given: trio.Event | None) -> trio.Event:
    return trio.Event() if given is None else given


async def _serve_owned(
    network: Network, identity: Identity, config: ServerConfig, node_config: NodeConfig | None, claim: FolderClaim,
    wanted: set[str], *, join: Sequence[Contact], admission: Admission | None, faults: Faults | None, emit: Emit,
    stop: trio.Event, hurry: trio.Event, alone: trio.Event, executor: Executor | None,
    allow: Callable[[float], object] | None,
    orders: trio.MemoryReceiveChannel[LoadOrder] | None, on_held: Callable[[Collection[str]], object],
    task_status: trio.TaskStatus[Contact],
) -> None:  # fmt: skip
    """Do it all, with the experts' checkpoints owned."""
    message_bytes = (node_config or NodeConfig()).limits.frames.message_bytes
    limit = message_bytes - min(HEADER_ROOM, message_bytes // 4)
    make = partial(ExpertServer, config, faults, emit, executor, timers=network.timers, answer_limit=limit)
    server = await build_in_thread(make, in_thread=executor is None)  # 1
    holdings = server.holdings
    carrying = Carrying(server, emit)
    if allow is not None:
        allow(stop_timeout(server.runtime.backends.values()))
    saved: dict[str, Progress] = {}
    async with trio.open_nursery() as nursery:
        await nursery.start(server.runtime.run)  # 2
        if config.checkpoint_dir is not None:
            nursery.start_soon(keep_claimed, claim, holdings.held, holdings.until_changed, server.in_thread)
        async with open_node(  # 3
            network, identity, node_config, join=join, methods=carrying.methods, admission=admission, emit=emit
        ) as node:
            server.relay = lambda: node.relaying.relay
            await carrying.leave_to_others(wanted - set(config.uids), claim.refused)
            async with trio.open_nursery() as keepers:
                if config.grid is not None:
                    info = partial(grid_info, server)
                    await keepers.start(keep_grid_declared, node.dht, config.name, info, node.directory.config.ttl)
                await keepers.start(partial(_keep_declared, server, node, carrying, allow, on_held))  # 4
                await keepers.start(carrying.run)
                if config.checkpoint_dir is not None:
                    await keepers.start(
                        keep_checkpoints,
                        server.runtime,
                        config.checkpoint_dir,
                        config.checkpoint_period,
                        saved,
                        config.checkpoint_keep,
                        claim,
                    )
                if orders is not None:
                    keepers.start_soon(
                        carry_out_loads, holdings, orders, config.checkpoint_dir, saved, config.checkpoint_keep,
                        claim,
                    )  # fmt: skip
                task_status.started(node.contact)
                await stop.wait()  # 5
                if not alone.is_set():
                    await carrying.hand_over(hurry)  # 6
                keepers.cancel_scope.cancel()
            async with claim.busy:
                claim.leave()
            await leave(server.traffic, node.directory, holdings.declared(), node.contact, hurry)
        with trio.move_on_after(SETTLE_TIMEOUT):  # a batch that takes long must not keep all experts from being saved
            await server.runtime.settle()
        nursery.cancel_scope.cancel()
    if config.checkpoint_dir is not None:
        await claim_the_rest(claim, holdings.held, HURRIED_GRACE if hurry.is_set() else GRACE, server.in_thread)
        await save_all(server.runtime, config.checkpoint_dir, saved, config.checkpoint_keep, claim)


async def _keep_declared(
    server: ExpertServer, node: Node, carrying: Carrying, allow: Callable[[float], object] | None,
    on_held: Callable[[Collection[str]], object], *, task_status: trio.TaskStatus[None],
) -> None:  # fmt: skip
    """Declare the experts that are held, at once when that changes, and give way to others."""
    holdings, directory = server.holdings, node.directory

    served = False

    def give_up(uid: str, info: ExpertInfo) -> None:
        carrying.give_up(uid, info, was_served=served)

    async with trio.open_nursery() as nursery:
        keep = partial(
            directory.keep_declared, is_alive=partial(is_alive, node.client), on_given_up=give_up,
            on_outranked=holdings.raise_epoch, on_rivals=carrying.on_rivals, lost_updates=carrying.lost_updates,
            is_moving=holdings.is_on_hold,
            spare=server.config.spare or server.config.backups > 0,
        )  # fmt: skip
        await nursery.start(keep, holdings.declared, node.contact)
        served = True
        on_held(holdings.held)
        task_status.started()
        while True:
            await holdings.until_changed()
            on_held(holdings.held)
            directory.declare_news()
            if allow is not None:
                allow(stop_timeout(server.runtime.backends.values()))


def grid_info(server: ExpertServer) -> GridInfo:
    """The record of a server's grid that is declared; of the options only those that are plain text or numbers."""
    config = server.config
    plain: dict[str, bool | int | float | str | None] = {
        key: value for key, value in config.options.items() if isinstance(value, (bool, int, float, str))
    }
    return GridInfo(config.grid or (), config.kind if isinstance(config.kind, str) else "", plain, server.schema())
