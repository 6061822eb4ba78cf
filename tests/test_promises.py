"""Promises of the wire and the DHT, tried in virtual time on networks that hypothesis makes up."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
import torch
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from labkit.dht.node import DHTConfig
from labkit.errors import ConnectionLost, DeadlineExceeded
from labkit.node import Node, NodeConfig, open_node
from labkit.simulation.latency import exponential
from labkit.simulation.network import SimNetwork, open_simnet
from labkit.wire.rpc_types import AsyncMethod, Methods, Reply, Request, RPCLimits
from labkit.wire.security import Identity
from tests.nodes import calling, echo, serving

REPLICAS = 4
SMALL = NodeConfig(dht=DHTConfig(k=REPLICAS, republish_period=20.0, refresh_period=60.0))
SETTLING_TIME = 60.0  # seconds after which each record was republished since the last crash


def in_virtual_time(function: Callable[..., Awaitable[None]], *args: object) -> None:
    trio.run(function, *args, clock=MockClock(autojump_threshold=0))


@dataclass
class Crowd:
    """Nodes on one simulated network."""

    network: SimNetwork
    nodes: list[Node]

    def alive(self, gone: set[int]) -> list[Node]:
        return [node for number, node in enumerate(self.nodes) if number not in gone]


@asynccontextmanager
async def crowd(count: int, seed: int) -> AsyncIterator[Crowd]:
    """Yields so many nodes, which joined one after the other, each through one that was there."""
    draw = random.Random(seed)
    async with open_simnet(seed, latency=exponential(0.02)) as network, trio.open_nursery() as nursery:
        nodes: list[Node] = []

        async def live(task_status: trio.TaskStatus[Node]) -> None:
            join = [draw.choice(nodes).contact] if nodes else []
            async with open_node(network, Identity(draw.randbytes(32)), SMALL, join=join) as node:
                task_status.started(node)
                await trio.sleep_forever()

        while len(nodes) < count:
            nodes.append(await nursery.start(live))
        yield Crowd(network, nodes)
        nursery.cancel_scope.cancel()


Content = bytes | dict[str, bytes]  # of a record: a plain value or a dictionary by subkey


async def store(node: Node, records: Mapping[str, Content]) -> None:
    for key, content in records.items():
        for subkey, value in content.items() if isinstance(content, dict) else [(None, content)]:
            assert await node.dht.store(key, value, ttl=10_000.0, subkey=subkey) > 0


async def assert_found_by_all(nodes: list[Node], records: Mapping[str, Content]) -> None:
    """Check that each node finds each record, and in it what was stored."""
    for node in nodes:
        found = await node.dht.get_many(list(records))
        contents = {
            key: {subkey: value.data for subkey, value in what.items()}
            if isinstance(what, dict)
            else what and what.data
            for key, what in found.items()
        }
        assert contents == records


# ---------------------------------------------------------------- the DHT


@settings(max_examples=6)
@given(seed=st.integers(0, 2**32 - 1), data=st.data())
def test_every_unexpired_record_is_kept_while_fewer_nodes_crash_than_hold_it(seed: int, data: st.DataObject) -> None:
    records: dict[str, Content] = {"plain": b"value", "another": b"thing", "ffn": {"0": b"a", "1": b"b"}}
    key = data.draw(st.sampled_from(sorted(records)))

    async def main() -> None:
        async with crowd(12, seed) as swarm:
            await store(swarm.nodes[0], records)
            gone: set[int] = set()
            for _ in range(2):  # in between, lost replicas are made good
                holding = [
                    number for number in range(12) if number not in gone and key in swarm.nodes[number].dht.storage
                ]
                crashing = data.draw(st.sets(st.sampled_from(holding), min_size=1, max_size=REPLICAS - 1))
                gone |= crashing
                swarm.network.unplug(*(swarm.nodes[number].contact for number in crashing))
                await assert_found_by_all(swarm.alive(gone), records)
                await trio.sleep(SETTLING_TIME)
            await assert_found_by_all(swarm.alive(gone), records)

    in_virtual_time(main)


@pytest.mark.parametrize("sizes", [(4, 4), (5, 7), (1, 7), (1,) * 6], ids=str)
@settings(max_examples=2)
@given(seed=st.integers(0, 2**32 - 1), minutes=st.integers(5, 30))
def test_a_partition_heals(sizes: tuple[int, ...], seed: int, minutes: int) -> None:
    async def main() -> None:
        async with crowd(sum(sizes), seed) as swarm:
            nodes = iter(swarm.nodes)
            sides = [list(itertools.islice(nodes, size)) for size in sizes]
            of_all = {"before": b"value"}
            records: dict[str, Content] = {"before": b"value", "ffn": of_all}
            await store(swarm.nodes[0], records)
            swarm.network.partition(*([node.contact for node in side] for side in sides))
            await trio.sleep(60.0 * minutes)
            for number, side in enumerate(sides):
                of_side: dict[str, Content] = {f"side {number}": b"%d" % number, "ffn": {str(number): b"%d" % number}}
                await store(side[-1], of_side)
            swarm.network.heal()
            await trio.sleep(300.0)
            for number in range(len(sides)):
                records[f"side {number}"] = of_all[str(number)] = b"%d" % number
            await assert_found_by_all(swarm.nodes, records)

    in_virtual_time(main)


# ---------------------------------------------------------------- calls

LARGE = 100_000  # bytes
BANDWIDTHS = st.sampled_from([math.inf, 1e6])  # bytes per second


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1),
    loss=st.floats(0, 0.5),
    bandwidth=BANDWIDTHS,
    outages=st.lists(st.floats(0, 10), max_size=4),
)
def test_no_call_outlives_its_deadline(seed: int, loss: float, bandwidth: float, outages: list[float]) -> None:
    draw, answered = random.Random(seed), 0

    async def slow(request: Request) -> Reply:
        await trio.sleep(draw.expovariate(2.0))
        return Reply(None, request.tensors)

    async def main() -> None:
        async with (
            open_simnet(seed, latency=exponential(0.3), loss=loss, bandwidth=bandwidth) as network,
            serving(network, {"slow": AsyncMethod(slow)}) as server,
            calling(network, limits=RPCLimits(bytes_per_peer=3 * LARGE)) as client,
        ):

            async def caller() -> None:
                nonlocal answered
                for _ in range(10):
                    timeout, size = draw.expovariate(1.0), draw.choice([0, 0, LARGE])
                    started = trio.current_time()
                    try:
                        await client.call(server.contact, "slow", None, [torch.zeros(size // 4)], timeout=timeout)
                        answered += 1
                    except (DeadlineExceeded, ConnectionLost):
                        pass
                    assert trio.current_time() - started <= timeout + 1e-9

            async with trio.open_nursery() as nursery:
                for _ in range(10):
                    nursery.start_soon(caller)
                for pause in outages:
                    await trio.sleep(pause)
                    network.unplug(client.endpoint.contact)
                    await trio.sleep(pause / 2)
                    network.heal()

    in_virtual_time(main)
    assert answered > 0


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1),
    loss=st.sampled_from([0.0, 0.3]),
    bandwidth=BANDWIDTHS,
    calls=st.lists(st.tuples(st.floats(0, 2), st.sampled_from([0, LARGE])), max_size=30),
)
def test_a_cancelled_call_leaves_nothing_behind(
    seed: int, loss: float, bandwidth: float, calls: list[tuple[float, int]]
) -> None:
    started, running = trio.Event(), 0

    async def forever(request: Request) -> Reply:
        nonlocal running
        started.set()
        running += 1
        try:
            await trio.sleep_forever()
        finally:
            running -= 1
        raise AssertionError

    async def main() -> None:
        methods: Methods = {"forever": AsyncMethod(forever), "echo": AsyncMethod(echo)}
        async with (
            open_simnet(seed, latency=exponential(0.3), bandwidth=bandwidth) as network,
            serving(network, methods, limits=RPCLimits(bytes_per_peer=100 * LARGE)) as server,
            calling(network, limits=RPCLimits(bytes_per_peer=5 * LARGE)) as client,
        ):
            tasks = trio.lowlevel.current_statistics().tasks_living

            async def cancelled(after: float, size: int) -> None:
                with trio.move_on_after(after):
                    await client.call(server.contact, "forever", None, [torch.zeros(size // 4)], timeout=100.0)
                    raise AssertionError("nobody answers")

            async with trio.open_nursery() as nursery:
                nursery.start_soon(cancelled, 30.0, LARGE)  # the server takes this one
                await started.wait()
                network.loss = loss
                for after, size in calls:
                    nursery.start_soon(cancelled, after, size)
            await trio.sleep(30.0)  # all that was being sent has left, and the server knows of the end
            assert (client.budget.taken, client.budget.by_peer, client.budget._waiting) == (0, {}, {})
            assert not any(connection.pending for connection in client._connections.values())
            if loss:
                await trio.sleep(100.0)  # or does not, and the requests end nevertheless
            else:
                assert not any(action for _, _, action, _ in network.timers._due)
            assert running == 0
            assert trio.lowlevel.current_statistics().tasks_living == tasks
            network.loss = 0.0
            whole = torch.zeros(100 * LARGE // 4)  # for which the server has room only if it counts nothing else
            assert (await client.call(server.contact, "echo", None, [whole], timeout=1000.0)).tensors[0].equal(whole)

    in_virtual_time(main)
