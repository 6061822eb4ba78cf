"""Whether others reach a node: it asks them to call back, and says what they found; and it comes back after changes."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from labkit import Swarm
from labkit.contact import Contact
from labkit.errors import BadRequest, NoWay, Overloaded, RPCError
from labkit.events import AddressChanged, Event, ReachabilityChanged, ignore
from labkit.node import Node, NodeConfig, open_node
from labkit.reachability import (
    ASK_PERIOD,
    CALL_BACK_TIME,
    MAX_CALLS_BACK,
    Reach,
    Reachability,
    ReachReply,
    ReachRequest,
    Vote,
    ask,
    ask_others,
    invite_to,
    judge,
    not_known,
    only_here,
)
from labkit.simulation.network import SILENCE_TIMEOUT, SimNetwork, open_simnet
from labkit.view import export
from labkit.view.collect.inventory import reachability_lines
from labkit.view.page.frame_writer import FrameWriter
from labkit.view.recording import take_keyframe
from labkit.whereabouts import LOOK_PERIOD, NEWCOMER_PAUSE, SLEPT, Whereabouts
from labkit.wire.security import Admission, Identity
from tests.frame_store import FrameStore
from tests.nodes import changed

WIDE = "tcp://0.0.0.0:*"


@asynccontextmanager
async def node_at(network: SimNetwork, host: str, *join: Node, **options: object) -> AsyncIterator[Node]:
    config = NodeConfig(listen=f"tcp://{host}:*")
    async with open_node(network, Identity.generate(), config, join=[n.contact for n in join], **options) as node:  # type: ignore[arg-type]
        yield node


@asynccontextmanager
async def two_machines() -> AsyncIterator[tuple[SimNetwork, Node, Node]]:
    async with (
        open_simnet(latency=0.02) as network,
        node_at(network, "192.0.2.1") as helper,
        node_at(network, "192.0.2.2", helper) as node,
    ):
        yield network, helper, node


# ---------------------------------------------------------------- calling back


async def test_a_node_is_called_back_and_told_from_where_it_was_seen(autojump_clock) -> None:
    async with two_machines() as (_, helper, node):
        assert await ask(node.client, helper.contact, node.contact) == Vote(helper.contact, True, "192.0.2.2")


async def test_a_no_takes_the_same_time_whatever_is_at_the_address_so_that_it_tells_nothing_about_others(
    autojump_clock,
) -> None:
    async with two_machines() as (network, helper, node), node_at(network, "192.0.2.3", helper) as third:
        nobody_listens = changed(node.contact, port=9)
        somebody_else = changed(node.contact, host=third.contact.host, port=third.contact.port)
        silent = changed(node.contact, host="192.0.2.2")
        times = []
        for contact in (nobody_listens, somebody_else):
            started = trio.current_time()
            assert await ask(node.client, helper.contact, contact) == Vote(helper.contact, False, "192.0.2.2")
            times.append(round(trio.current_time() - started, 2))
            await trio.sleep(ASK_PERIOD)
        assert silent == node.contact
        network.unplug(third.contact)
        started = trio.current_time()
        assert (await ask(node.client, helper.contact, somebody_else)).reached is False  # type: ignore[union-attr]
        times.append(round(trio.current_time() - started, 2))
        assert len(set(times)) == 1 and times[0] >= CALL_BACK_TIME


async def test_a_node_that_does_not_admit_the_helper_is_reached_all_the_same(autojump_clock) -> None:
    async with open_simnet(latency=0.02) as network, node_at(network, "192.0.2.1") as helper:
        async with node_at(network, "192.0.2.2", helper, admission=Admission([])) as private:
            assert await ask(private.client, helper.contact, private.contact) == Vote(helper.contact, True, "192.0.2.2")


async def refusal(node: Node, helper: Node, contact: Contact) -> RPCError:
    with pytest.raises(RPCError) as caught:
        await node.client.call(
            helper.contact, "node.reach", ReachRequest(contact), returns=ReachReply, timeout=2 * CALL_BACK_TIME
        )
    return caught.value


async def test_nobody_is_called_back_for_another_or_at_what_is_nobodys_address_or_the_helpers_own(
    autojump_clock,
) -> None:
    async with two_machines() as (network, helper, node), node_at(network, "192.0.2.3", helper) as third:
        before = network.messages
        for contact, said in [
            (third.contact, "proved that key"), (changed(node.contact, secure=False), "proved that key"),
            (changed(node.contact, host="127.0.0.1"), "for another machine"),
            (changed(node.contact, host="0.0.0.0"), "nobody's address"),
            (changed(node.contact, host="224.0.0.1"), "nobody's address"),
            (changed(node.contact, host="::ffff:127.0.0.1"), "for another machine"),
        ]:  # fmt: skip
            error = await refusal(node, helper, contact)
            assert isinstance(error, BadRequest) and said in str(error)
        assert network.messages - before == 12  # six requests, six refusals, and no call to anybody


async def test_who_asks_too_often_and_too_many_at_once_are_sent_away(autojump_clock) -> None:
    async with two_machines() as (network, helper, node):
        assert await ask(node.client, helper.contact, node.contact)
        assert isinstance(await refusal(node, helper, node.contact), Overloaded)
        await trio.sleep(ASK_PERIOD)
        assert await ask(node.client, helper.contact, node.contact)
        async with trio.open_nursery() as nursery:
            votes: list[Vote | None] = []

            async def ask_for_a_no() -> None:
                async with node_at(network, "192.0.2.9", helper) as other:
                    votes.append(await ask(other.client, helper.contact, changed(other.contact, port=9)))

            for _ in range(MAX_CALLS_BACK + 3):
                nursery.start_soon(ask_for_a_no)
        assert sorted(vote is None for vote in votes) == [False] * MAX_CALLS_BACK + [True] * 3


async def test_a_helper_without_the_askers_ip_version_abstains_at_once_and_one_says_which_address_it_called(
    autojump_clock, monkeypatch
) -> None:
    async with two_machines() as (_, helper, node):
        further = changed(node.contact, host="198.51.100.9", also=((node.contact.host, node.contact.port),))

        async def find_way(contact: Contact) -> tuple[str, int]:
            await trio.lowlevel.checkpoint()
            if not contact.also:
                raise NoWay("only IPv6")
            return contact.also[0]

        monkeypatch.setattr(helper.endpoint, "find_way", find_way)
        monkeypatch.setattr("labkit.reachability.has_version_of", lambda hosts: versions.append(list(hosts)))
        started = trio.current_time()
        versions: list[list[str]] = []
        assert await ask(node.client, helper.contact, node.contact) is None
        assert versions == [["192.0.2.2"]]
        assert trio.current_time() - started < 1.0
        await trio.sleep(ASK_PERIOD)
        vote = await ask(node.client, helper.contact, further)
        assert vote == Vote(helper.contact, True, "192.0.2.2", "192.0.2.2")
        said = judge(further, [vote], WIDE, None).text
        assert said == f"reachable: 192.0.2.1 called back at 192.0.2.2:{node.contact.port}"


# ---------------------------------------------------------------- whom to ask


class Helpers:
    """A `Caller` whose nodes answer what they are said to: True, False, or None for nothing."""

    def __init__(self, **found: bool | None) -> None:
        self.found = {host.replace("_", "."): reached for host, reached in found.items()}
        self.asked: list[str] = []

    async def call(self, contact, method, body=None, tensors=(), *, returns=None, timeout, lane="", codec=""):
        self.asked.append(contact.host)
        await trio.lowlevel.checkpoint()
        reached = self.found[contact.host]
        if reached is None:
            raise Overloaded("not now")
        found = reached

        class Answer:
            body = ReachReply(found, "8.8.4.4")

        return Answer


def contact_at(host: str) -> Contact:
    return Contact(host.encode().ljust(32, b"."), host, 4000)


OWN = contact_at("8.8.8.8")


async def asked(joined: list[str], **found: bool | None) -> tuple[list[str], list[bool]]:
    helpers = Helpers(**found)
    known = [contact_at(host) for host in helpers.found]
    votes = await ask_others(helpers, OWN, [contact_at(host) for host in joined], lambda: known)  # type: ignore[arg-type]
    return sorted(helpers.asked), sorted(vote.reached for vote in votes)


async def test_the_node_that_was_joined_and_one_other_are_asked_and_a_third_where_they_disagree() -> None:
    hosts, votes = await asked(["1.1.1.1"], **{"1_1_1_1": True, "2_2_2_2": True, "3_3_3_3": True})
    assert len(hosts) == 2 and "1.1.1.1" in hosts and votes == [True, True]
    hosts, votes = await asked(["1.1.1.1"], **{"1_1_1_1": False, "2_2_2_2": True, "3_3_3_3": True})
    assert len(hosts) == 3 and votes == [False, True, True]


async def test_who_does_not_answer_is_replaced_and_nodes_of_this_machine_are_not_asked() -> None:
    hosts, votes = await asked(["1.1.1.1"], **{"1_1_1_1": None, "2_2_2_2": True, "8_8_8_8": True, "127_0_0_1": True})
    assert hosts == ["1.1.1.1", "2.2.2.2"] and votes == [True]
    assert await asked([], **{"8_8_8_8": True, "127_0_0_1": True}) == ([], [])
    assert await asked(["1.1.1.1"], **{"1_1_1_1": None}) == (["1.1.1.1"], [])


async def test_nodes_with_our_ip_version_are_asked_first() -> None:
    found = {f"[2001:db8::{number}]": True for number in range(1, 9)} | {"2.2.2.2": True, "3.3.3.3": True}
    helpers = Helpers()
    helpers.found = {host.strip("[]"): True for host in found}
    known = [contact_at(host) for host in helpers.found]
    assert len(await ask_others(helpers, OWN, known[:1], lambda: known)) == 2  # type: ignore[arg-type]
    assert sorted(helpers.asked) == ["2.2.2.2", "3.3.3.3"]


async def test_a_neighbour_in_ones_own_network_does_not_outvote_who_is_outside() -> None:
    hosts, votes = await asked(["1.1.1.1"], **{"1_1_1_1": False, "192_168_1_7": True, "192_168_1_8": True})
    assert len(hosts) == 2 and votes == [False, True]  # a second neighbour would prove no more than the first


# ---------------------------------------------------------------- how it is said


HIDDEN = contact_at("192.168.1.5")


def said(votes: list[Vote], listen: str = WIDE, announce: str | None = None, contact: Contact = HIDDEN) -> str:
    return judge(contact, votes, listen, announce).text


def vote(reached: bool, seen: str = "203.0.113.1", by: str = "1.1.1.1") -> Vote:
    return Vote(contact_at(by), reached, seen)


def test_each_answer_is_one_sentence_that_says_what_to_try_and_never_what_was_done() -> None:
    assert said([vote(True)]) == "reachable: 1.1.1.1 called back at 192.168.1.5:4000"
    behind = said([vote(False)])
    assert "could not call back at 192.168.1.5:4000, and saw this machine as 203.0.113.1: a router" in behind
    assert "container" in behind
    assert 'listen="tcp://0.0.0.0:31000-31099", announce="203.0.113.1"' in behind
    ranged = said([vote(False)], "tcp://0.0.0.0:5000-5009")
    assert "Forward ports 5000 to 5009" in ranged and "listen" not in ranged and 'announce="203.0.113.1"' in ranged
    wrong = said([vote(False)], announce="lab.example.org:4000", contact=contact_at("lab.example.org"))
    assert "Is announce='lab.example.org:4000' the address" in wrong and "listen=" not in wrong
    server = said([vote(False)], announce="lab.example.org", contact=contact_at("lab.example.org"))
    assert server.endswith('Start with some that they do: listen="tcp://0.0.0.0:31000-31099"')
    wall = said([vote(False, seen="192.168.1.5")])
    assert "a firewall, of this machine or on the way, does not let port 4000 through" in wall
    assert 'listen="tcp://0.0.0.0:31000-31099"' in wall and "announce" not in wall
    assert said([vote(False, seen="192.168.1.5")], "tcp://[::]:5000").endswith("open port 5000 there")


def test_an_invitation_that_is_of_no_use_elsewhere_says_so() -> None:
    note = invite_to(HIDDEN, WIDE, None, judge(HIDDEN, [vote(False)], WIDE, None)).note
    assert "Only this machine's own network" in note and "1.1.1.1 could not call back at 192.168.1.5:4000" in note
    assert not invite_to(HIDDEN, WIDE, None, judge(HIDDEN, [vote(True)], WIDE, None)).note


def test_a_majority_counts_and_else_those_that_reached_nothing() -> None:
    both = [vote(True, by="2.2.2.2"), vote(False)]
    assert "1.1.1.1 could not call back at 192.168.1.5:4000, 2.2.2.2 could" in said(both)
    assert said([*both, vote(True, by="3.3.3.3")]).startswith("reachable: 2.2.2.2, 3.3.3.3 called back")
    assert judge(HIDDEN, both, WIDE, None).seen == "203.0.113.1"


def test_who_is_on_loopback_is_told_why(monkeypatch) -> None:
    here = contact_at("127.0.0.1")
    monkeypatch.setattr("labkit.reachability.own_addresses", set)
    assert 'listen="tcp://0.0.0.0:*"' in only_here(here, "tcp://127.0.0.1:*", None).text
    assert "no network address but loopback now" in only_here(here, WIDE, None).text
    assert "announce='127.0.0.1'" in only_here(here, WIDE, "127.0.0.1").text
    monkeypatch.setattr("labkit.reachability.own_addresses", lambda: {"2001:db8::5"})
    assert 'listen="tcp://[::]:*"' in only_here(here, WIDE, None).text
    assert not_known(here).state is Reach.UNKNOWN


def test_a_swarm_says_whether_it_is_reached_in_its_repr_its_html_and_in_the_view() -> None:
    with Swarm("local") as swarm:
        swarm.serve("nop", grid=(1,), isolation="task")
        sentence = "reached only from this machine, since it listens there only"
        assert len(re.findall(sentence, repr(swarm))) == 1 and sentence in swarm._repr_html_()
        scene, store, writer = swarm.view.scene(), FrameStore(), FrameWriter()
        assert sentence in scene.reachability[0] and sentence in swarm.servers[0].reachability
        store.apply(*writer.frame(scene, layer=0, mode="load", control=True))
        assert store.reach == list(scene.reachability)
        store.apply(*writer.frame(scene, layer=0, mode="load", control=True))
        assert "reach" not in store.header  # it is sent when it changes
        assert json.loads(export.to_json(scene))["reachability"] == list(scene.reachability)
        assert take_keyframe(scene, False).unpack()[0]["reach"] == list(scene.reachability)


def test_a_sentence_for_each_server_is_short_where_it_is_the_same_and_not_without_end() -> None:
    def server(state: Reach) -> SimpleNamespace:
        found = ReachabilityChanged(contact=contact_at("192.168.1.5"), state=str(state), text="not reachable: a wall")
        return SimpleNamespace(alive=True, lifecycle=SimpleNamespace(reachability=found))

    def lines(own: Reachability, *servers: SimpleNamespace, lost: bool = False) -> tuple[str, ...]:
        relaying = SimpleNamespace(relay=None, words="no relay" * lost, lost=lost)
        node = SimpleNamespace(whereabouts=SimpleNamespace(now=own), contact=own.contact, relaying=relaying)
        return reachability_lines(node, servers)  # type: ignore[arg-type]

    good, bad = judge(HIDDEN, [vote(True)], WIDE, None), judge(HIDDEN, [vote(False)], WIDE, None)
    assert lines(good, server(Reach.YES)) == (good.text,)
    assert lines(good, lost=True) == ("no relay",)
    assert lines(good, server(Reach.NO)) == (good.text, "servers[0]: not reachable: a wall")
    assert lines(bad, server(Reach.NO)) == (bad.text, "servers[0]: 192.168.1.5:4000 is not reachable either")
    assert lines(bad, *[server(Reach.NO)] * 9)[-1] == "and 7 more servers are not reachable"


# ---------------------------------------------------------------- a machine that changes its network, or sleeps


class Machine:
    """What `Whereabouts` looks at: the machine's address, and a clock that goes on while it sleeps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.address = "192.0.2.2"
        self.further: tuple[str, ...] = ()
        self.asleep = 0.0
        monkeypatch.setattr("labkit.whereabouts.further_addresses", lambda host, first: self.further)
        monkeypatch.setattr("labkit.whereabouts.find_own_address", self.find_own_address)
        monkeypatch.setattr("labkit.whereabouts.own_addresses", lambda: {self.address})
        monkeypatch.setattr("labkit.reachability.own_addresses", lambda: {self.address})

    async def find_own_address(self, host: str, toward: object) -> str:
        return self.address

    def clock(self) -> float:
        return trio.current_time() + self.asleep

    @asynccontextmanager
    async def running(self, node: Node, joined: Node, events: list[Event]) -> AsyncIterator[Whereabouts]:
        whereabouts = Whereabouts(node.client, node.dht, WIDE, None, [joined.contact], events.append, clock=self.clock)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(whereabouts.run, node.move, node.directory.declare_anew)
            yield whereabouts
            nursery.cancel_scope.cancel()


def state_of(whereabouts: Whereabouts) -> Reach:
    return whereabouts.now.state


@pytest.fixture
def machine(monkeypatch) -> Machine:
    return Machine(monkeypatch)


async def test_a_node_that_others_reach_at_its_other_ip_version_only_announces_that_and_no_more_once_they_reach_both(
    autojump_clock, machine, monkeypatch
) -> None:
    reached = {"192.0.2.2": False, "2001:db8::2": True}

    async def ask_others(caller, contact, joined, known):
        await trio.lowlevel.checkpoint()
        assert not contact.also, "each is asked about alone"
        return [Vote(joined[0], reached[contact.host], "")]

    monkeypatch.setattr("labkit.whereabouts.ask_others", ask_others)
    machine.further = ("2001:db8::2",)
    async with two_machines() as (_, helper, node), machine.running(node, helper, []) as whereabouts:
        both = changed(node.contact, also=(("2001:db8::2", node.contact.port),))
        await trio.sleep(2 * LOOK_PERIOD + ASK_PERIOD)
        assert node.contact == whereabouts.direct == changed(both, host="2001:db8::2")
        assert (await whereabouts.try_direct()).state is Reach.YES
        reached["192.0.2.2"] = True
        await trio.sleep(400)
        assert node.contact == both


async def test_an_address_of_the_other_ip_version_is_announced_unless_nobody_reaches_it(
    autojump_clock, machine
) -> None:
    async with two_machines() as (_, helper, node), machine.running(node, helper, []) as whereabouts:
        await whereabouts.settled.wait()
        links, port = node.client.links, node.contact.port
        machine.further = ("2001:db8::2",)
        await trio.sleep(LOOK_PERIOD + 0.1)
        assert node.contact.also == (("2001:db8::2", port),) and whereabouts.direct == node.contact
        assert node.client.links >= links  # they lead over the same address as before
        await trio.sleep(1.0)
        assert helper.dht.routing.get(node.contact.node_id) == node.contact
        await trio.sleep(ASK_PERIOD + CALL_BACK_TIME + 1.0)
        assert node.contact == changed(node.contact)  # nobody reaches it there, so nobody is sent there in vain
        assert whereabouts.now.text.startswith("reachable: 192.0.2.1 called back at 192.0.2.2")
        machine.address, machine.further = "198.51.100.7", ()
        await trio.sleep(LOOK_PERIOD + 0.1)
        assert node.contact == changed(node.contact, host="198.51.100.7", port=port)


async def test_a_machine_with_another_address_is_announced_there_and_asks_anew(autojump_clock, machine) -> None:
    events: list[Event] = []
    async with two_machines() as (_, helper, node), machine.running(node, helper, events) as whereabouts:
        await whereabouts.settled.wait()
        assert state_of(whereabouts) is Reach.YES and whereabouts.now.seen == "192.0.2.2"
        machine.address = "198.51.100.7"
        await trio.sleep(2 * LOOK_PERIOD)
        assert node.contact.host == "198.51.100.7" and whereabouts.direct == node.contact
        assert helper.dht.routing.get(node.contact.node_id) == node.contact
        await trio.sleep(LOOK_PERIOD)
        assert whereabouts.now.contact == node.contact and state_of(whereabouts) is Reach.YES
        states = [(event.contact.host, event.state) for event in events if isinstance(event, ReachabilityChanged)]
        assert states == [("192.0.2.2", "reachable"), ("198.51.100.7", "reachable")]


async def test_a_machine_without_a_network_keeps_its_address_until_it_has_one_again(autojump_clock, machine) -> None:
    async with two_machines() as (_, helper, node), machine.running(node, helper, []) as whereabouts:
        await whereabouts.settled.wait()
        before = node.contact
        machine.address = "127.0.0.1"
        await trio.sleep(2 * LOOK_PERIOD)
        assert node.contact == before and state_of(whereabouts) is Reach.HERE
        assert "no network address but loopback now" in whereabouts.now.text
        machine.address = before.host
        await trio.sleep(3 * LOOK_PERIOD)
        assert node.contact == before and state_of(whereabouts) is Reach.YES


async def test_a_machine_that_has_slept_is_back_at_once(autojump_clock, machine) -> None:
    async with two_machines() as (_, helper, node), machine.running(node, helper, []) as whereabouts:
        await whereabouts.settled.wait()
        async with trio.open_nursery() as nursery:
            await nursery.start(node.directory.keep_declared, ["ffn.0"], node.contact)
            await helper.directory.refresh(["ffn.0"])
            before = (await helper.directory.find(["ffn.0"]))["ffn.0"]
            await trio.sleep(LOOK_PERIOD / 2)
            machine.asleep += LOOK_PERIOD + SLEPT
            await trio.sleep(LOOK_PERIOD)
            await helper.directory.refresh(["ffn.0"])
            after = (await helper.directory.find(["ffn.0"]))["ffn.0"]
            assert before is not None and after is not None and after.stamp > before.stamp  # declared anew
            nursery.cancel_scope.cancel()


async def test_who_gave_a_machine_up_while_it_slept_takes_it_back_when_it_wakes(autojump_clock, machine) -> None:
    async with two_machines() as (network, helper, node), machine.running(node, helper, []) as whereabouts:
        await whereabouts.settled.wait()
        network.unplug(node.contact)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(helper.dht.peers.ping, node.contact)
            nursery.start_soon(node.dht.peers.ping, helper.contact)
        await trio.sleep(SILENCE_TIMEOUT)  # in which all links break
        network.heal(node.contact)
        given_up = [(one.dht.peers.blacklist, other.contact.node_id) for one, other in ((helper, node), (node, helper))]
        assert all(node_id in blacklist for blacklist, node_id in given_up)
        machine.asleep += LOOK_PERIOD + SLEPT
        await trio.sleep(LOOK_PERIOD + 1.0)
        assert not any(node_id in blacklist for blacklist, node_id in given_up)


async def test_a_node_behind_a_relay_stays_there_when_its_machine_changes_its_address(autojump_clock, machine) -> None:
    async with two_machines() as (_, helper, node), machine.running(node, helper, []) as whereabouts:
        await whereabouts.settled.wait()
        relayed = node.move("192.0.2.77", 5000, "a relay")
        machine.address = "198.51.100.7"
        await trio.sleep(2 * LOOK_PERIOD)
        assert node.contact == relayed and whereabouts.direct.host == "198.51.100.7"
        assert whereabouts.now.contact == relayed


async def test_others_who_come_are_asked_too_if_only_a_containers_host_has_said_yes(autojump_clock, machine) -> None:
    async with two_machines() as (network, helper, node), machine.running(node, helper, []) as whereabouts:
        await whereabouts.settled.wait()
        assert [vote.by.host for vote in whereabouts.now.votes] == [helper.contact.host]
        async with node_at(network, "203.0.113.5", helper, node):
            await trio.sleep(NEWCOMER_PAUSE + 2 * LOOK_PERIOD)
            assert {vote.by.host for vote in whereabouts.now.votes} == {helper.contact.host, "203.0.113.5"}


async def test_whom_a_neighbour_reaches_is_not_reached_directly_before_those_say_so_who_have_denied_it(
    autojump_clock, machine
) -> None:
    helpers: Any = Helpers(**{"1_1_1_1": True, "2_2_2_2": False})
    helpers.endpoint = SimpleNamespace(direct={})
    machine.address = OWN.host
    dht: Any = SimpleNamespace(contact=OWN, routing=[contact_at(host) for host in helpers.found])
    whereabouts = Whereabouts(helpers, dht, WIDE, None, [contact_at("1.1.1.1")], ignore, clock=machine.clock)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(whereabouts.run, lambda *_: None, lambda: None)
        await whereabouts.news.wait()
        for denied, state in ((False, Reach.NO), (None, Reach.UNKNOWN), (True, Reach.YES)):
            helpers.found["2.2.2.2"] = denied
            assert (await whereabouts.try_direct()).state is state
        nursery.cancel_scope.cancel()


async def test_the_first_node_of_a_swarm_asks_as_soon_as_there_is_somebody(autojump_clock, machine) -> None:
    events: list[Event] = []
    async with open_simnet(latency=0.02) as network, node_at(network, "192.0.2.2") as node:
        whereabouts = Whereabouts(node.client, node.dht, WIDE, None, [], events.append, clock=machine.clock)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(whereabouts.run, node.move, node.directory.declare_anew)
            await whereabouts.settled.wait()
            assert state_of(whereabouts) is Reach.UNKNOWN and "no node on another machine" in whereabouts.now.text
            async with node_at(network, "192.0.2.1", node):
                await trio.sleep(LOOK_PERIOD + 1.0)
                assert state_of(whereabouts) is Reach.YES
            nursery.cancel_scope.cancel()
    assert not [event for event in events if isinstance(event, AddressChanged)]
