"""The network in memory, in virtual time: its latency, loss and bandwidth, and nodes that vanish."""

from __future__ import annotations

import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
import torch
import trio
from trio._core import _run
from trio.testing import MockClock

from labkit.contact import Contact
from labkit.errors import ConnectionLost, DeadlineExceeded, LabkitError, RPCError
from labkit.simulation.latency import constant, exponential, regions
from labkit.simulation.network import SILENCE_TIMEOUT, SimNetwork, open_simnet
from labkit.simulation.virtual_clock import run_in_virtual_time
from labkit.wire.frames import FrameLimits
from labkit.wire.rpc_client import Client
from labkit.wire.rpc_types import AsyncMethod, Reply, Request, SyncMethod
from labkit.wire.security import Identity
from tests.nodes import calling, serving

pytestmark = pytest.mark.usefixtures("autojump_clock")


@asynccontextmanager
async def pair(**options: Any) -> AsyncIterator[tuple[SimNetwork, Contact, Client]]:
    """Yields a network, the contact of a server on it, and a client."""
    async with open_simnet(**options) as network, serving(network) as server, calling(network) as client:
        yield network, server.contact, client


async def forever(request: Request) -> Reply:
    await trio.sleep_forever()


async def seconds_of(client: Client, contact: Contact, size: int = 0, timeout: float = 100.0) -> float:
    """Returns how long a call takes that carries so many bytes there and back."""
    started = trio.current_time()
    await client.call(contact, "echo", None, [torch.zeros(size, dtype=torch.uint8)], timeout=timeout)
    return trio.current_time() - started


# ---------------------------------------------------------------- latency and bandwidth


async def test_a_call_takes_the_latency_there_and_back(autojump_clock) -> None:
    async with pair(latency=0.046) as (_, contact, client):
        assert await seconds_of(client, contact) == pytest.approx(0.092)


async def test_messages_arrive_at_ticks_and_never_earlier_than_they_would(autojump_clock) -> None:
    async with pair(latency=0.0463, tick=0.01) as (_, contact, client):
        assert await seconds_of(client, contact) == pytest.approx(0.1)  # 0.05 there and back
        await trio.sleep(0.003)
        assert await seconds_of(client, contact) == pytest.approx(0.097)  # sent between two of them


async def test_a_new_connection_costs_its_round_trips_once(autojump_clock) -> None:
    async with pair(latency=0.05, handshake=2.0) as (_, contact, client):
        assert await seconds_of(client, contact) == pytest.approx(0.3)
        assert await seconds_of(client, contact) == pytest.approx(0.1)


async def test_calls_that_wait_for_one_connection_are_sent_together(autojump_clock) -> None:
    async with pair(latency=0.05, handshake=2.0) as (_, contact, client), trio.open_nursery() as nursery:
        for _ in range(2):
            nursery.start_soon(seconds_of, client, contact)
        await trio.sleep(0.31)
        assert len(nursery.child_tasks) == 0 and client.links == 1


async def test_latency_is_drawn_for_each_message_from_the_seed(autojump_clock) -> None:
    async def durations(seed: int) -> list[float]:
        async with pair(seed=seed, latency=exponential(0.1)) as (_, contact, client):
            return [round(await seconds_of(client, contact), 9) for _ in range(300)]

    first = await durations(1)
    assert sum(first) / 300 == pytest.approx(0.2, rel=0.2)
    assert len(set(first)) == 300
    assert await durations(1) == first
    assert await durations(2) != first


async def test_regions_are_as_far_apart_as_they_are_said_to_be(autojump_clock) -> None:
    latency = regions({("eu", "us"): 0.045, ("eu", "asia"): 0.1}, within=0.001)
    async with open_simnet(latency=latency) as network, trio.open_nursery() as nursery:
        contacts = {}

        async def serve(region: str, task_status: trio.TaskStatus[None]) -> None:
            async with serving(network, address=f"tcp://{region}:*") as endpoint:
                contacts[region] = endpoint.contact
                task_status.started()
                await trio.sleep_forever()

        for region in ("eu", "us", "asia"):
            await nursery.start(serve, region)
        async with calling(network, address="tcp://eu:*") as client:
            found = {region: await seconds_of(client, contact) for region, contact in contacts.items()}
        async with calling(network, address="tcp://us:*") as client:
            with pytest.raises(ValueError, match="the way between us and asia"):
                await seconds_of(client, contacts["asia"])
        nursery.cancel_scope.cancel()
    assert found == pytest.approx({"eu": 0.002, "us": 0.09, "asia": 0.2})


async def test_bandwidth_delays_by_size_and_one_message_after_the_other(autojump_clock) -> None:
    async with pair(bandwidth=1e6) as (_, contact, client):
        assert await seconds_of(client, contact, 500_000) == pytest.approx(1.0, rel=0.01)
        started = trio.current_time()
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(seconds_of, client, contact, 500_000)
        assert trio.current_time() - started == pytest.approx(
            2.5, rel=0.01
        )  # the two ways there take their time one after the other


async def test_a_node_that_runs_behind_hears_and_answers_later(autojump_clock) -> None:
    async with pair(latency=0.01) as (network, contact, client):
        network.slow_down(contact, 0.5)
        assert await seconds_of(client, contact) == pytest.approx(1.02)
        network.slow_down(contact, 0.0)
        assert await seconds_of(client, contact) == pytest.approx(0.02)


async def test_a_request_that_nobody_waits_for_any_more_holds_its_bytes_until_it_has_left(autojump_clock) -> None:
    async with pair(bandwidth=1e6) as (_, contact, client):
        await seconds_of(client, contact)
        with pytest.raises(DeadlineExceeded):
            await seconds_of(client, contact, 3_000_000, timeout=0.5)
        await trio.sleep(1.5)
        assert client.budget.taken > 3_000_000  # what is sent now arrives only after it
        await trio.sleep(1.2)
        assert client.budget.taken == 0


# ---------------------------------------------------------------- what goes wrong


async def test_a_share_of_requests_and_of_answers_is_lost(autojump_clock) -> None:
    received = 0

    async def receive(request: Request) -> Reply:
        nonlocal received
        received += 1
        return Reply()

    async with (
        open_simnet(3, loss=0.2) as network,
        serving(network, {"receive": AsyncMethod(receive)}) as server,
        calling(network) as client,
    ):
        answered = 0
        for _ in range(1000):
            try:
                await client.call(server.contact, "receive", timeout=1.0)
                answered += 1
            except DeadlineExceeded:
                pass
    assert received == pytest.approx(800, abs=40)
    assert answered == pytest.approx(640, abs=50)


async def test_a_node_without_power_is_silent_and_then_given_up(autojump_clock) -> None:
    async with pair(latency=0.01) as (network, contact, client):
        await seconds_of(client, contact)
        network.unplug(contact)
        with pytest.raises(DeadlineExceeded):
            await seconds_of(client, contact, timeout=1.0)
        started = trio.current_time()
        with pytest.raises(ConnectionLost, match="broke"):
            await seconds_of(client, contact)
        assert trio.current_time() - started == pytest.approx(SILENCE_TIMEOUT - 1.0)
        network.heal(contact)
        assert await seconds_of(client, contact) == pytest.approx(0.02)


async def test_a_partition_cuts_groups_off_from_each_other_until_it_heals(autojump_clock) -> None:
    async with pair() as (network, contact, client), serving(network) as other:
        network.partition([contact], [client.endpoint.contact, other.contact])
        await seconds_of(client, other.contact)
        with pytest.raises(DeadlineExceeded, match="could not be reached"):
            await seconds_of(client, contact, timeout=1.0)
        network.heal()
        assert await seconds_of(client, contact) <= 2.0  # when the connection is tried again


async def test_what_is_under_way_when_a_partition_comes_arrives_in_its_order_when_it_heals(autojump_clock) -> None:
    received: list[int] = []

    def receive(request: Request) -> Reply:
        received.append(request.body)
        return Reply()

    async with (
        open_simnet(latency=0.1) as network,
        serving(network, {"receive": SyncMethod(receive, int)}) as server,
        calling(network) as client,
    ):
        await client.call(server.contact, "receive", 0, timeout=1.0)
        started = trio.current_time()
        async with trio.open_nursery() as nursery:
            for number, pause in enumerate([0.05, 0.03, 0.03], 1):  # else the second would overtake the first
                nursery.start_soon(partial(client.call, server.contact, "receive", number, timeout=1.0))
                await trio.sleep(pause)
                if number == 2:
                    network.unplug(server.contact)
            network.heal()
        assert trio.current_time() - started == pytest.approx(0.11 + 0.2)
    assert received == [0, 1, 2, 3]


async def test_a_short_outage_loses_nothing_and_a_long_one_breaks_the_connection(autojump_clock) -> None:
    async with pair() as (network, contact, client):
        await seconds_of(client, contact)
        for outage in (SILENCE_TIMEOUT - 1, SILENCE_TIMEOUT + 1):
            network.unplug(contact)
            async with trio.open_nursery() as nursery:

                async def ask(outage: float = outage) -> None:
                    if outage < SILENCE_TIMEOUT:
                        assert await seconds_of(client, contact) == pytest.approx(outage)
                    else:
                        with pytest.raises(ConnectionLost, match="broke"):
                            await seconds_of(client, contact)

                nursery.start_soon(ask)
                await trio.sleep(outage)
                network.heal()
            assert not network._held and not network._silent


async def test_silence_counts_from_the_outage_that_lasts(autojump_clock) -> None:
    async with pair() as (network, contact, client):
        await seconds_of(client, contact)
        network.unplug(contact)
        await trio.sleep(1.0)
        network.heal(contact)
        await trio.sleep(4.0)
        network.unplug(contact)
        started = trio.current_time()
        await trio.sleep(1.0)
        network.unplug(client.endpoint.contact)  # this cuts it no less than before
        with pytest.raises(ConnectionLost, match="broke"):
            await seconds_of(client, contact)
        assert trio.current_time() - started == pytest.approx(SILENCE_TIMEOUT)


async def test_a_connection_that_is_cut_while_it_opens_goes_on_when_that_heals(autojump_clock) -> None:
    async with pair(latency=0.1, handshake=2.0) as (network, contact, client), trio.open_nursery() as nursery:
        seconds: list[float] = []

        async def ask() -> None:
            seconds.append(await seconds_of(client, contact, timeout=50.0))

        nursery.start_soon(ask)
        await trio.sleep(0.3)  # the server has accepted it, the client does not know that yet
        network.unplug(contact)
        await trio.sleep(3.0)
        network.heal(contact)
        await trio.sleep(0.31)
        assert seconds == [pytest.approx(3.6)]


@pytest.mark.parametrize("healed", [False, True])
async def test_the_end_of_a_node_is_not_heard_while_it_is_cut_off(healed: bool, autojump_clock) -> None:
    async with open_simnet(latency=0.1) as network, calling(network) as client, trio.open_nursery() as nursery:
        async with serving(network, {"wait": AsyncMethod(forever)}) as server:
            started = trio.current_time()
            lost_at: list[float] = []

            async def ask() -> None:
                with pytest.raises(ConnectionLost, match="broke"):
                    await client.call(server.contact, "wait", timeout=50.0)
                lost_at.append(trio.current_time() - started)

            nursery.start_soon(ask)
            await trio.sleep(1.0)
            network.unplug(server.contact)
        await trio.sleep(2.0)
        assert not lost_at
        if healed:
            network.heal()
        await trio.sleep(SILENCE_TIMEOUT)
        assert lost_at == [pytest.approx(3.1 if healed else 1.0 + SILENCE_TIMEOUT)]


@pytest.mark.parametrize("healed", [False, True])
async def test_a_link_closed_while_it_is_cut_off_is_a_peer_until_silence_or_the_heal(healed, autojump_clock) -> None:
    async with pair(latency=0.1) as (network, contact, client):
        await seconds_of(client, contact)
        client.forget(contact)  # the server does not know that yet
        network.unplug(client.endpoint.contact)
        peers = network.nodes[contact.host, contact.port].peers
        await trio.sleep(3.0)
        assert len(peers) == 1
        if healed:
            network.heal()
        await trio.sleep(0.2)
        assert len(peers) == (0 if healed else 1)
        await trio.sleep(SILENCE_TIMEOUT)
        assert not peers and not network._held and not network._silent


async def test_a_node_that_starts_again_at_its_address_is_found_there(autojump_clock) -> None:
    identity = Identity.generate()
    async with open_simnet() as network, calling(network) as client:
        for _ in range(2):
            async with serving(network, identity=identity, address="tcp://127.0.0.1:4000") as server:
                await seconds_of(client, server.contact)
            with pytest.raises(ConnectionLost, match="broke"):
                await seconds_of(client, server.contact)
            with pytest.raises(ConnectionLost, match="refused"):
                await seconds_of(client, server.contact)


async def test_an_address_belongs_to_one_node(autojump_clock) -> None:
    async with open_simnet() as network, serving(network, address="tcp://127.0.0.1:4000"):
        with pytest.raises(LabkitError, match="Address already in use"):
            async with serving(network, address="tcp://127.0.0.1:4000"):
                pass


async def test_a_frame_over_the_limit_breaks_the_connection_on_both_sides(autojump_clock) -> None:
    async with pair(limits=FrameLimits(message_bytes=1000)) as (network, contact, client):
        with pytest.raises(ConnectionLost, match="broke"):
            await seconds_of(client, contact, 2000)
        assert not network.nodes[contact.host, contact.port].peers
        await seconds_of(client, contact, 10)


async def test_what_was_sent_does_not_change_when_the_sender_writes_over_it(autojump_clock) -> None:
    async with pair(latency=1.0) as (_, contact, client):
        tensor = torch.ones(4)
        async with trio.open_nursery() as nursery:

            async def ask() -> None:
                reply = await client.call(contact, "echo", None, [tensor], timeout=10)
                assert reply.tensors[0].tolist() == [1.0] * 4

            nursery.start_soon(ask)
            await trio.sleep(0.5)
            tensor.zero_()


# ---------------------------------------------------------------- the same run twice


async def history() -> list[tuple[float, str]]:
    """Returns how a hundred calls end, and when."""
    events: list[tuple[float, str]] = []
    started = trio.current_time()
    async with pair(seed=7, latency=exponential(0.1), loss=0.1, bandwidth=1e6) as (network, contact, client):

        async def ask(number: int) -> None:
            for turn in range(5):
                outcome = "answered"
                try:
                    await client.call(contact, "echo", number, [torch.zeros(number * 100)], timeout=0.5)
                except RPCError as error:
                    outcome = error.code
                events.append((round(trio.current_time() - started, 9), f"{number}.{turn} {outcome}"))

        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(ask, number)
            await trio.sleep(1.0)
            network.unplug(contact)
            await trio.sleep(0.3)
            network.heal()
    return events


async def test_a_seed_gives_the_same_run_twice_event_for_event(autojump_clock) -> None:
    first, again = await history(), await history()
    assert len({outcome for _, outcome in first}) == 100
    assert first == again


def test_the_virtual_clock_gives_the_same_run_as_the_one_of_trios_tests() -> None:
    started = time.monotonic()
    assert run_in_virtual_time(history) == trio.run(history, clock=MockClock(autojump_threshold=0))
    assert time.monotonic() - started < 10


def test_in_virtual_time_whatever_comes_next_is_at_once() -> None:
    async def main() -> list[float]:
        times = []
        async with open_simnet() as network:
            network.timers.after(3600.0, lambda: times.append(trio.current_time()))
            for seconds in (1800.0, 3600.0):
                await trio.sleep(seconds)
                times.append(trio.current_time())
        return times

    assert run_in_virtual_time(main) == [1800.0, 3600.0, 5400.0]


def test_after_a_simulation_trio_draws_as_if_there_had_been_none(monkeypatch) -> None:
    async def main() -> None:
        async with open_simnet(5):
            assert _run._ALLOW_DETERMINISTIC_SCHEDULING
            raise LabkitError("it ends in a failure")

    monkeypatch.setattr(_run, "_ALLOW_DETERMINISTIC_SCHEDULING", False)
    spy = Spy()
    monkeypatch.setattr(_run, "_r", spy)
    with pytest.raises(ExceptionGroup):
        trio.run(main)
    assert not _run._ALLOW_DETERMINISTIC_SCHEDULING
    assert spy.put_back == spy.found


class Spy(random.Random):
    """A generator that remembers the state in which it was found, and the one that was put back."""

    def getstate(self) -> Any:
        self.found = super().getstate()
        return self.found

    def setstate(self, state: Any) -> None:
        self.put_back = state
        super().setstate(state)


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"latency": -0.1}, "latency"),
        ({"latency": float("nan")}, "latency"),
        ({"latency": "1"}, "latency"),
        ({"loss": 1.5}, "loss"),
        ({"loss": "x"}, "loss"),
        ({"bandwidth": 0}, "bandwidth"),
        ({"bandwidth": "x"}, "bandwidth"),
        ({"tick": -1}, "tick"),
        ({"handshake": -1}, "handshake"),
        ({"handshake": "x"}, "handshake"),
    ],
)
async def test_what_cannot_be_is_refused_by_the_name_of_the_argument(options, argument, autojump_clock) -> None:
    with pytest.raises(ValueError, match=f"^{argument}="):
        SimNetwork(**options)


def test_a_latency_below_zero_is_refused_in_each_of_its_forms() -> None:
    with pytest.raises(ValueError, match=r"^latency=-1"):
        exponential(-1)
    with pytest.raises(ValueError, match=r"^latency=-1"):
        regions({("eu", "us"): -1})
    with pytest.raises(ValueError, match=r"^latency=-1"):
        regions({}, within=-1)


@pytest.mark.parametrize("drawn", [-5.0, float("nan"), float("inf"), "x", None])
async def test_a_latency_that_cannot_be_is_refused_when_it_is_drawn(drawn, autojump_clock) -> None:
    async with pair(latency=lambda *_: drawn) as (_, contact, client):
        with pytest.raises(ValueError, match=r"^latency="):
            await seconds_of(client, contact)
        endpoint: Any = client.endpoint
        endpoint._network.latency = constant(0.0)  # and all may end


@pytest.mark.parametrize("pair", [("eu",), ("eu", "us", "asia"), "eu", ("eu", "eu")])
def test_regions_are_given_by_twos(pair) -> None:
    with pytest.raises(ValueError, match=r"^between: "):
        regions({pair: 0.5})


async def test_only_nodes_of_this_network_are_cut_off_and_each_is_in_one_group(autojump_clock) -> None:
    async with pair() as (network, contact, client):
        stranger = Contact(contact.key, contact.host, 9, contact.secure)
        with pytest.raises(ValueError, match="no node of this network"):
            network.unplug(contact, stranger)
        with pytest.raises(ValueError, match="no node of this network"):
            network.partition([contact], [stranger])
        with pytest.raises(ValueError, match="in two groups"):
            network.partition([contact], [client.endpoint.contact, contact])
        await seconds_of(client, contact)  # all works as before
