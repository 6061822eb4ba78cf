"""Places of a grid: several who look for free ones at once never take the same, and none stays empty.

Most of them in virtual time, on a network in memory: each seed is another race.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import msgspec
import pytest
import trio

from labkit.contact import Contact
from labkit.dht.node import DHTConfig, Entry
from labkit.directory import claims
from labkit.directory.claims import NAMESPACE, Claims, ClaimState
from labkit.directory.grids import GRIDS_KEY, GridInfo, keep_grid_declared
from labkit.errors import ExpertsTaken, LabkitError
from labkit.events import Event, ExpertGivenUp
from labkit.expert_uid import grid_uids
from labkit.joining import is_alive
from labkit.launch.places import Places, Wish, hold_places
from labkit.node import Node, NodeConfig, open_node
from labkit.portal import unwrap
from labkit.simulation.latency import exponential
from labkit.simulation.network import SimNetwork, open_simnet
from labkit.simulation.virtual_clock import run_in_virtual_time
from labkit.swarm import Swarm
from labkit.wire.security import Identity

pytestmark = pytest.mark.usefixtures("forked_python")

GRID = GridInfo((4, 6), "nop")


@pytest.fixture(autouse=True)
def repeatable(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """The names of claimers, which decide between two equals, are drawn from a seed for each test."""
    draw = random.Random(request.node.name)
    monkeypatch.setattr(claims, "new_ticket", lambda: draw.randbytes(8).hex())


@asynccontextmanager
async def a_swarm(
    seed: int, count: int, *, k: int = 20, latency: Any = None
) -> AsyncIterator[tuple[SimNetwork, list[Node], random.Random]]:
    """Nodes of a swarm that have joined through the first one, all at once."""
    draw = random.Random(seed)
    config = NodeConfig(dht=DHTConfig(k=k))
    async with open_simnet(seed=seed, latency=latency or exponential(0.05)) as network, trio.open_nursery() as nursery:
        nodes: list[Node] = []

        async def live(join: Sequence[Node], *, task_status: trio.TaskStatus[None]) -> None:
            contacts = [node.contact for node in join]
            async with open_node(network, Identity(draw.randbytes(32)), config, join=contacts) as node:
                nodes.append(node)
                task_status.started()
                await trio.sleep_forever()

        await nursery.start(partial(live, []))
        async with trio.open_nursery() as joining:
            for _ in range(count):
                joining.start_soon(nursery.start, partial(live, nodes[:1]))
        yield network, nodes, draw
        nursery.cancel_scope.cancel()


def options_of(known: GridInfo | None) -> dict[str, Any]:
    return dict(known.options) if known is not None else {}


async def serve(node: Node, wish: Wish, seconds: float, done: Callable[[Node, Places | BaseException], object]) -> None:
    """Take places, build for some seconds, declare, and go on declaring."""
    try:
        async with hold_places(node, wish, "nop", options_of) as held:
            await trio.sleep(seconds)
            grid = msgspec.msgpack.encode(GridInfo(held.sizes, "nop"))
            await node.dht.store(GRIDS_KEY, grid, 30.0, wish.name)
            await node.directory.declare(held.uids, node.contact)
    except BaseException as error:
        done(node, unwrap(error))
        if isinstance(unwrap(error), trio.Cancelled):
            raise
        return
    done(node, held)
    keep = partial(node.directory.keep_declared, is_alive=partial(is_alive, node.client))
    await keep(held.uids, node.contact)


Outcomes = list[tuple[Node, Any]]


async def serve_all(nodes: Sequence[Node], wishes: Sequence[Wish], draw: random.Random, spread: float) -> Outcomes:
    """All serve at about the same moment. Returns what each has got."""
    outcomes: Outcomes = []
    enough = trio.Event()

    def done(node: Node, outcome: Any) -> None:
        outcomes.append((node, outcome))
        if len(outcomes) == len(wishes):
            enough.set()

    async with trio.open_nursery() as nursery:
        for node, wish in zip(nodes, wishes, strict=True):
            await trio.sleep(draw.uniform(0, spread))
            nursery.start_soon(serve, node, wish, draw.uniform(0, 3), done)
        with trio.fail_after(300):
            await enough.wait()
        nursery.cancel_scope.cancel()
    return outcomes


async def declare_grid(nursery: trio.Nursery, node: Node) -> None:
    await nursery.start(keep_grid_declared, node.dht, "ffn", GRID, 30.0)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("k", "spread"), [(20, 0.0), (20, 0.3), (3, 0.1)])
def test_six_helpers_that_come_at_once_fill_the_grid_without_an_overlap(seed: int, k: int, spread: float):
    async def race() -> Outcomes:
        async with a_swarm(seed, 6, k=k) as (_, nodes, draw), trio.open_nursery() as nursery:
            await declare_grid(nursery, nodes[0])
            outcomes = await serve_all(nodes[1:], [Wish("ffn", experts=4)] * 6, draw, spread)
            nursery.cancel_scope.cancel()
        return outcomes

    taken = Counter(uid for _, held in run_in_virtual_time(race) for uid in held.uids)
    assert taken == Counter(grid_uids("ffn", (4, 6)))


@pytest.mark.parametrize("seed", range(6))
def test_of_several_who_name_one_expert_one_gets_it_and_the_others_are_told_who(seed: int):
    async def race() -> Outcomes:
        async with a_swarm(seed, 4) as (_, nodes, draw):
            return await serve_all(nodes[1:], [Wish("ffn", (2, 2), uids=["ffn.0.1", "ffn.1.0"])] * 4, draw, 0.05)

    outcomes = run_in_virtual_time(race)
    winners = [node for node, outcome in outcomes if isinstance(outcome, Places)]
    losers = [outcome for _, outcome in outcomes if not isinstance(outcome, Places)]
    assert len(winners) == 1 and len(losers) == 3
    for error in losers:
        assert isinstance(error, ExpertsTaken), error
        assert winners[0].contact.endpoint in str(error) and "ffn.0.1" in str(error)


@pytest.mark.parametrize("seed", range(6))
def test_who_wants_more_than_is_left_is_refused_and_the_rest_goes_to_the_others(seed: int):
    async def race() -> Outcomes:
        async with a_swarm(seed, 5) as (_, nodes, draw), trio.open_nursery() as nursery:
            await declare_grid(nursery, nodes[0])
            outcomes = await serve_all(nodes[1:], [Wish("ffn", experts=7)] * 5, draw, 0.1)
            nursery.cancel_scope.cancel()
        return outcomes

    outcomes = [outcome for _, outcome in run_in_virtual_time(race)]
    taken = Counter(uid for outcome in outcomes if isinstance(outcome, Places) for uid in outcome.uids)
    refused = [str(outcome) for outcome in outcomes if isinstance(outcome, ExpertsTaken)]
    assert len(taken) == 21 and set(taken.values()) == {1}, "three times seven of 24"
    assert len(refused) == 2 and all("3 free places of 24" in text for text in refused)


@pytest.mark.parametrize("seed", range(6))
def test_of_two_who_begin_a_grid_in_different_sizes_the_second_is_told_the_sizes_of_the_first(seed: int):
    async def race() -> Outcomes:
        async with a_swarm(seed, 2) as (_, nodes, draw):
            wishes = [Wish("ffn", (2, 2)), Wish("ffn", (3, 3), experts=2)]
            return await serve_all(nodes[1:], wishes, draw, 0.05)

    outcomes = [outcome for _, outcome in run_in_virtual_time(race)]
    (winner,) = [outcome for outcome in outcomes if isinstance(outcome, Places)]
    (loser,) = [outcome for outcome in outcomes if not isinstance(outcome, Places)]
    assert isinstance(loser, ValueError) and f"has the sizes {winner.sizes}" in str(loser)


def test_a_claimer_that_vanishes_holds_nobody_up():
    async def race() -> tuple[float, Outcomes]:
        async with a_swarm(1, 2) as (network, nodes, draw), trio.open_nursery() as nursery:
            await declare_grid(nursery, nodes[0])
            gone = Claims(nodes[1].dht, lambda: nodes[1].contact, "ffn", 30.0, 20)
            await gone.write(gone.new(ClaimState.CHOOSING, 1))
            network.unplug(nodes[1].contact)
            started = trio.current_time()
            outcomes = await serve_all(nodes[2:], [Wish("ffn", experts=4)], draw, 0.0)
            nursery.cancel_scope.cancel()
            return trio.current_time() - started, outcomes

    seconds, [(_, outcome)] = run_in_virtual_time(race)
    assert isinstance(outcome, Places) and seconds < 45, "its claim expires"


async def test_a_place_whose_server_is_dead_is_free_at_once(autojump_clock):
    async with a_swarm(1, 1, latency=0.01) as (network, nodes, _), trio.open_nursery() as nursery:
        first, other = nodes
        await declare_grid(nursery, first)
        async with open_node(network, Identity.generate(), join=[first.contact]) as dead:
            await dead.directory.declare(["ffn.0.0"], dead.contact)
        assert "ffn.0.0" in await other.directory.holders(["ffn.0.0"]), "its record is still there"
        async with hold_places(other, Wish("ffn", uids=["ffn.0.0"]), "nop", options_of) as held:
            assert held.uids == ["ffn.0.0"]
        nursery.cancel_scope.cancel()


async def test_a_place_is_not_free_because_calls_to_its_expert_have_failed(autojump_clock):
    async with a_swarm(1, 1, latency=0.01) as (_, nodes, _), trio.open_nursery() as nursery:
        server, other = nodes
        await declare_grid(nursery, server)
        await server.directory.declare(list(grid_uids("ffn", (4, 6))), server.contact)
        info = (await other.directory.find(["ffn.0.0"]))["ffn.0.0"]
        assert info is not None
        for _ in range(3):
            other.directory.report_failure(info, "timeout")
            await trio.sleep(0.01)
        assert (await other.directory.find(["ffn.0.0"]))["ffn.0.0"] is None, "layers leave it out for a while"
        with pytest.raises(ExpertsTaken, match="0 free places of 24"):
            async with hold_places(other, Wish("ffn", experts=1), "nop", options_of):
                pass
        nursery.cancel_scope.cancel()


async def test_a_start_that_fails_or_is_interrupted_gives_its_places_back_at_once(autojump_clock):
    async with a_swarm(1, 2, latency=0.01) as (_, nodes, _):
        with trio.move_on_after(5):
            async with hold_places(nodes[1], Wish("ffn", (2, 2)), "nop", options_of):
                await trio.sleep_forever()
        started = trio.current_time()
        async with hold_places(nodes[2], Wish("ffn", (2, 2)), "nop", options_of) as held:
            assert len(held.uids) == 4 and trio.current_time() - started < 1


async def test_claims_of_thousands_of_places_are_written_in_parts_and_garbage_is_ignored(autojump_clock):
    async with a_swarm(1, 1, latency=0.01) as (_, nodes, _):
        mine, theirs = (Claims(node.dht, partial(getattr, node, "contact"), "ffn", 30.0, 20) for node in nodes)
        uids = list(grid_uids("ffn", (100, 100)))
        claim = mine.new(ClaimState.HOLDING, 1, 7, len(uids), uids, GridInfo((100, 100), "nop"))
        assert await mine.write(claim)
        await nodes[0].dht.store_many([
            Entry(NAMESPACE + "ffn", b"\xc1 no msgpack", 30.0, "0123.0"),
            Entry(NAMESPACE + "ffn", b"\x90", 30.0, "4567.x"),
            Entry(NAMESPACE + "ffn", b"", 30.0, "."),
        ])  # fmt: skip
        assert await theirs.read() == {mine.ticket: claim}
        assert await mine.write(mine.new(ClaimState.OVER, 1))
        assert await theirs.read() == {}


@pytest.mark.parametrize("seed", range(4))
def test_when_a_divided_network_is_whole_again_the_server_that_came_later_gives_way(seed: int):
    events: list[tuple[int, Event]] = []

    def note(who: int, event: Event) -> None:
        events.append((who, event))

    async def run() -> tuple[list[Contact], dict[str, Contact]]:
        config = NodeConfig(dht=DHTConfig(republish_period=20.0))
        async with (
            open_simnet(seed=seed, latency=0.02) as network,
            open_node(network, Identity.generate(), config) as one,
            open_node(network, Identity.generate(), config, join=[one.contact], emit=partial(note, 1)) as a,
            open_node(network, Identity.generate(), config, join=[one.contact]) as two,
            open_node(network, Identity.generate(), config, join=[one.contact], emit=partial(note, 2)) as b,
            trio.open_nursery() as nursery,
        ):  # fmt: skip
            network.partition([one.contact, a.contact], [two.contact, b.contact])
            await trio.sleep(30)
            for node, uids in ((a, ["ffn.0", "ffn.1"]), (b, ["ffn.1", "ffn.2"])):
                keep = partial(node.directory.keep_declared, is_alive=partial(is_alive, node.client))
                await nursery.start(keep, uids, node.contact)
            await trio.sleep(60)
            network.heal()
            await trio.sleep(120)
            found = await one.directory.find(["ffn.0", "ffn.1", "ffn.2"])
            nursery.cancel_scope.cancel()
        return [a.contact, b.contact], {uid: info.contact for uid, info in found.items() if info is not None}

    (a, b), found = run_in_virtual_time(run)
    gave_way = [(who, event) for who, event in events if isinstance(event, ExpertGivenUp)]
    assert [who for who, _ in gave_way] == [2], "one of them, and once"
    assert gave_way[0][1].uid == "ffn.1"
    assert found == {"ffn.0": a, "ffn.1": a, "ffn.2": b}


# ---------------------------------------------------------------- real sockets and processes


def test_an_expert_that_is_served_is_not_replaced_by_an_untrained_one_and_can_be_taken_once_its_server_is_gone():
    with Swarm("served twice") as swarm, Swarm.join(swarm.invite(), name="another") as other:
        (server,) = swarm.serve("ffn", hidden=8, grid=(1, 2), experts=1, isolation="task", backups=0)
        for one in (swarm, other):
            with pytest.raises(ExpertsTaken, match=r"ffn\.0\.0 is served at 127\.0\.0\.1:\d+ already"):
                one.serve("ffn", hidden=8, uids=["ffn.0.1", "ffn.0.0"], isolation="task")
        assert swarm.servers == [server] and other.servers == []
        server.kill()
        (heir,) = other.serve("ffn", hidden=8, uids=["ffn.0.0"], isolation="task")
        assert heir.contact is not None
        with pytest.raises(LabkitError, match=f"{heir.contact.endpoint} already"):
            server.restart()
        assert server.state == "failed"
        heir.kill()
        server.restart()
        assert server.alive and swarm.experts()["ffn.0.0"].contact == server.contact


def test_a_server_whose_experts_others_have_by_now_is_restarted_as_a_spare_one():
    with Swarm("served twice") as swarm, Swarm.join(swarm.invite(), name="another") as other:
        (server,) = swarm.serve("ffn", hidden=8, grid=(1, 2), experts=1, isolation="task")
        server.kill()
        (heir,) = other.serve("ffn", hidden=8, uids=["ffn.0.0"], isolation="task")
        server.restart()
        assert server.alive and server.uids == ()
        assert swarm.experts()["ffn.0.0"].contact == heir.contact


def test_notebooks_that_serve_at_the_same_moment_share_a_grid():
    with Swarm("first") as first, Swarm.join(first.invite(), name="second") as second:
        threads = [
            threading.Thread(
                target=swarm.serve, args=("nop",), kwargs={"grid": (2, 4), "experts": 2, "isolation": "task"}
            )
            for swarm in (first, second)
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        first.statistics()  # looks all of them up
        assert len(first.experts()) == 8
        assert sorted(uid for swarm in (first, second) for server in swarm.servers for uid in server.uids) == sorted(
            first.experts()
        )


def test_helpers_from_terminals_that_join_at_once_take_different_places():
    with Swarm("job array") as swarm, contextlib.ExitStack() as stack:
        swarm.serve("nop", grid=(2, 4), experts=2, isolation="task")
        command = [
            sys.executable,
            "-m",
            "labkit",
            "serve",
            "--join",
            swarm.invite(),
            "--expert",
            "nop",
            "--experts",
            "2",
        ]
        helpers = [
            stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
            for _ in range(3)
        ]
        for helper in helpers:
            stack.callback(helper.kill)
        for helper in helpers:
            assert helper.stdout is not None
            said = "".join(itertools.takewhile(lambda line: not line.startswith("serving"), helper.stdout))
            assert "invitation" in said, said
        swarm.statistics()
        assert len(swarm.experts()) == 8
