"""A node's address: which one it announces, and what follows when it changes while the node runs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio

from labkit.dht.node import DHTConfig
from labkit.errors import ConnectionLost
from labkit.events import AddressChanged, Event
from labkit.expert_uid import ExpertInfo
from labkit.node import Node, NodeConfig, open_node
from labkit.simulation.network import SimNetwork, open_simnet
from labkit.wire.security import Identity
from tests.nodes import calling

SMALL = NodeConfig(dht=DHTConfig(k=4))  # small enough that few nodes do not all know each other


@asynccontextmanager
async def swarm_of(
    network: SimNetwork, count: int, config: NodeConfig | None = None, events: list[Event] | None = None
) -> AsyncIterator[list[Node]]:
    """Runs nodes of one swarm, each joined through the first. `events` takes those of the last."""
    nodes: list[Node] = []
    async with AsyncExitStack() as stack:
        for number in range(count):
            emit = events.append if events is not None and number == count - 1 else lambda event: None
            join = [nodes[0].contact] if nodes else []
            opening = open_node(network, identity_of(number), config, join=join, emit=emit)
            nodes.append(await stack.enter_async_context(opening))
        yield nodes


def identity_of(number: int) -> Identity:
    return Identity(number.to_bytes(32, "big"))


async def found(node: Node, uid: str) -> ExpertInfo:
    """Where an expert is, as a node finds it when it looks anew."""
    await node.directory.refresh([uid])
    info = (await node.directory.find([uid]))[uid]
    assert info is not None
    return info


# ---------------------------------------------------------------- a move


async def test_a_node_that_moves_says_so_and_all_who_know_it_call_it_there(autojump_clock) -> None:
    events: list[Event] = []
    async with open_simnet(latency=0.02) as network, swarm_of(network, 5, events=events) as nodes:
        *others, moving = nodes
        before = moving.contact
        after = moving.move("127.0.9.9", 4000, "a test")
        assert moving.contact == moving.dht.contact == after and after.endpoint == "127.0.9.9:4000"
        changes = [(e.contact, e.before, e.reason) for e in events if isinstance(e, AddressChanged)]
        assert changes == [(after, before.endpoint, "a test")]
        await trio.sleep(1.0)
        assert [node.dht.routing.get(after.node_id) for node in others] == [after] * 4
        async with calling(network) as stranger:
            await stranger.call(after, "dht.ping", [None], timeout=1.0)
            with pytest.raises(ConnectionLost, match="refused"):
                await stranger.call(before, "dht.ping", [None], timeout=1.0)


async def test_in_a_large_swarm_too_nobody_is_left_who_calls_a_node_that_has_moved_at_its_old_address(
    autojump_clock,
) -> None:
    async with open_simnet(latency=0.02) as network, swarm_of(network, 14, SMALL) as nodes:
        moving, before = nodes[7], nodes[7].contact
        moving.move("127.0.9.9", 4000)
        await trio.sleep(1.0)
        for node in nodes:
            await node.dht.find_nodes([before.node_id])
        await trio.sleep(60.0)  # who had it from others has tried it by now
        for node in nodes:
            found = (await node.dht.find_nodes([before.node_id]))[before.node_id]
            assert [contact.endpoint for contact in found if contact.node_id == before.node_id] in (
                [],
                ["127.0.9.9:4000"],
            )
            assert node.dht.routing.get(before.node_id) in (None, moving.contact)


async def test_the_experts_of_a_node_that_moves_are_declared_anew_at_once_and_found_there(autojump_clock) -> None:
    async with open_simnet(latency=0.02) as network, swarm_of(network, 3) as (first, server, trainer):
        async with trio.open_nursery() as nursery:
            await nursery.start(server.directory.keep_declared, ["ffn.0", "ffn.1"], server.contact)
            before = await found(trainer, "ffn.0")
            after = server.move("127.0.9.9", 4000)
            await trio.sleep(1.0)
            assert (await found(first, "ffn.1")).contact == (await found(trainer, "ffn.0")).contact == after
            assert (await found(trainer, "ffn.0")).stamp > before.stamp
            nursery.cancel_scope.cancel()
        await server.directory.withdraw(["ffn.0"], server.contact)
        assert "ffn.0" not in await trainer.directory.holders(["ffn.0"])


async def test_a_cache_never_goes_back_to_where_a_server_was_before_it_moved(autojump_clock) -> None:
    async with open_simnet(latency=0.02) as network, swarm_of(network, 3) as (_, server, trainer):
        await server.directory.declare(["ffn.0"], server.contact)
        await found(trainer, "ffn.0")
        after = server.move("127.0.9.9", 4000)
        await server.directory.declare(["ffn.0"], after)
        info = await found(trainer, "ffn.0")
        assert trainer.directory.report_failure(info, "lost") == ("ffn.0",)
        await trainer.directory.refresh(["ffn.0"])
        assert (await trainer.directory.find(["ffn.0"]))["ffn.0"] is None  # what it declared before does not count
        await server.directory.declare(["ffn.0"], after)
        assert (await found(trainer, "ffn.0")).contact == after


async def test_a_node_that_does_not_encrypt_cannot_move_to_where_others_would_call_it(autojump_clock) -> None:
    async with open_simnet() as network, open_node(network, Identity.generate()) as node:
        with pytest.raises(ValueError, match="start it with secure=True"):
            node.move("192.0.2.7", 4000)
        with pytest.raises(ValueError, match="port is between"):
            node.move("127.0.0.9", 70_000)
        before = node.contact
        assert node.move(before.host, before.port) == before
