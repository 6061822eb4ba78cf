"""What servers say of copies: how many there are, which experts they adopted, what was lost; and who is told."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

import msgspec
import pytest
import torch
import trio

from labkit.errors import BadReply
from labkit.events import Event, ExpertGivenUp, ExpertHandedOver, ExpertTakenOver
from labkit.expert_uid import grid_uids
from labkit.server.statistics import MAX_TAKEOVERS, CopyStatistics, ServerStatistics, call_statistics, without_experts
from labkit.view.collect.takeovers import TELLING_TIME, ReportedTakeOvers
from tests.copied_swarms import CopiedSwarm, Server, X, copied_swarm
from tests.test_inventory import SAID, Handle, Lab

UIDS = list(grid_uids("ffn", (2, 2)))
TAKEN: dict[str, Any] = {
    "uid": "ffn.0.0", "before": "10.0.0.9:1", "epoch": 1, "lost_updates": 2, "seconds": 1.5, "ago": 0.0,
}  # fmt: skip
TAKEN_EVENT = {name: value for name, value in TAKEN.items() if name != "ago"} | {"address": "10.0.0.1:1"}
GIVEN: dict[str, Any] = {"uid": "ffn.0.0", "before": "10.0.0.9:1", "epoch": 1, "ago": 0.0}


async def said_by(swarm: CopiedSwarm, server: Server) -> CopyStatistics:
    said = (await call_statistics(swarm.node.client, server.contact, 2.0)).copies
    assert said is not None
    return said


async def test_a_server_says_how_many_copies_there_are_and_what_it_adopted_when_another_was_gone(
    tmp_path, autojump_clock
):
    async with copied_swarm(tmp_path) as swarm:
        servers = await swarm.serve_grid(2)
        first = await said_by(swarm, servers[0])
        assert (first.backups, first.copied + first.at_risk, first.adopted, first.takeovers) == (1, 2, [], [])
        await swarm.until_copied()
        await trio.sleep(5)
        for server in servers:
            said = await said_by(swarm, server)
            assert (said.kept, said.copied, said.at_risk, said.period) == (2, 2, 0, 9.0)
            assert said.sent_bytes > 0
        theirs = sorted(uid for uid, info in (await swarm.holders()).items() if info.contact == servers[1].contact)
        await servers[1].kill()
        await swarm.until(partial(adopted, swarm, servers[0], theirs), 10)
        await trio.sleep(10)
        last = await said_by(swarm, servers[0])
        assert sorted((one.uid, one.before, one.epoch, one.lost_updates) for one in last.takeovers) == [
            (uid, servers[1].contact.endpoint, 1, 0) for uid in theirs
        ]
        assert (last.copied, last.at_risk) == (0, 4), "there is no other server to copy to"


async def adopted(swarm: CopiedSwarm, server: Server, uids: list[str]) -> bool:
    return sorted((await said_by(swarm, server)).adopted) == uids


async def test_where_experts_are_too_large_for_ten_seconds_it_says_what_is_promised(tmp_path, autojump_clock):
    async with copied_swarm(tmp_path) as swarm:
        large = await swarm.serve(UIDS, options={"hidden": 512})  # 4 × 25 MB of parameters, at 4 MiB/s
        assert 24 < (await said_by(swarm, large)).period < 25


async def test_a_server_without_copies_says_nothing_of_them(tmp_path, autojump_clock):
    async with copied_swarm(tmp_path) as swarm:
        server = await swarm.serve(UIDS, backups=0)
        assert (await call_statistics(swarm.node.client, server.contact, 2.0)).copies is None


async def test_who_loses_after_a_partition_says_how_many_updates_went(tmp_path, autojump_clock):
    async with copied_swarm(tmp_path) as swarm:
        servers = await swarm.serve_grid(2)
        await swarm.until_copied()
        await trio.sleep(5)
        before = await swarm.holders()
        lone = next(server for server in servers if server.contact != before[UIDS[0]].contact)
        other = before[UIDS[0]].contact
        swarm.network.partition([lone.contact, swarm.node.contact], [other])
        await swarm.until(partial(is_at, swarm, UIDS[0], lone), 20)
        swarm.network.partition([lone.contact], [swarm.node.contact, other])
        for _ in range(3):
            await swarm.call(before[UIDS[0]], "backward", [X, torch.ones_like(X)])
        swarm.network.heal()
        await swarm.until(partial(has_given_up, swarm, UIDS[0]), 120)
        (event,) = [event for event in swarm.said(ExpertGivenUp) if event.uid == UIDS[0]]
        assert (event.address, event.to, event.lost_updates) == (other.endpoint, lone.contact.endpoint, 3)


async def is_at(swarm: CopiedSwarm, uid: str, server: Server) -> bool:
    return (await swarm.holders())[uid].contact == server.contact


async def has_given_up(swarm: CopiedSwarm, uid: str) -> bool:
    return any(event.uid == uid for event in swarm.said(ExpertGivenUp))


# ---------------------------------------------------------------- what is not believed


@pytest.mark.parametrize(
    "wrong",
    [
        {"backups": -1},
        {"period": -1.0},
        {"adopted": ["ffn.0.0", "ffn.0.1"]},  # more than it has
        {"adopted": ["f" * 161]},
        {"takeovers": [TAKEN] * (MAX_TAKEOVERS + 1)},
        {"takeovers": [TAKEN | {"uid": "ffn.\n0"}]},
        {"takeovers": [TAKEN | {"seconds": float("inf")}]},
        {"takeovers": [TAKEN | {"before": "x" * 300}]},
        {"handovers": [GIVEN] * (MAX_TAKEOVERS + 1)},
        {"handovers": [GIVEN | {"before": "x\ny"}]},
        {"handovers": [GIVEN | {"ago": -1.0}]},
    ],
)
async def test_statistics_of_copies_that_cannot_be_are_a_bad_reply(wrong: dict[str, Any], autojump_clock):
    lab = Lab()
    lab.answers[lab.contacts[0].endpoint] = SAID | {"copies": wrong}
    with pytest.raises(BadReply):
        await call_statistics(lab.node.client, lab.contacts[0], 1.0)


def test_older_servers_say_nothing_of_copies_and_statistics_without_experts_keep_the_rest():
    old = msgspec.msgpack.decode(msgspec.msgpack.encode(SAID), type=ServerStatistics)
    assert old.copies is None and without_experts(old).copies is None
    told = msgspec.msgpack.encode(SAID | {"copies": {"adopted": ["ffn.0.0"], "kept": 3}})
    new = without_experts(msgspec.msgpack.decode(told, type=ServerStatistics)).copies
    assert new is not None and (new.adopted, new.kept) == ([], 3)


# ---------------------------------------------------------------- events of what others report


async def test_what_a_server_elsewhere_took_over_is_an_event_once_and_those_started_here_tell_it_themselves(
    autojump_clock,
):
    lab, events = Lab(), list[Event]()
    await lab.declare()
    here, elsewhere, third = (contact.endpoint for contact in lab.contacts[:3])
    for address, uid in ((here, "ffn.0.0"), (elsewhere, "ffn.0.1"), (third, "ffn.0.1")):
        lab.answers[address] = SAID | {"copies": {"takeovers": [TAKEN | {"uid": uid}]}}
    async with lab.polled(Handle(0), takeovers=ReportedTakeOvers(events.append, 0.0)):
        await trio.sleep(5)
        (event,) = events
        assert isinstance(event, ExpertTakenOver) and event.address in (elsewhere, third)
        assert {name: asdict(event)[name] for name in ("uid", "before", "epoch", "lost_updates", "seconds")} == {
            "uid": "ffn.0.1", "before": "10.0.0.9:1", "epoch": 1, "lost_updates": 2, "seconds": 1.5,
        }  # fmt: skip
        lab.answers[third] = SAID | {"copies": {"takeovers": [TAKEN | {"uid": "ffn.0.1", "epoch": 2}]}}
        await trio.sleep(2)
        assert [event.epoch for event in events if isinstance(event, ExpertTakenOver)] == [1, 2]


async def test_who_is_given_an_expert_tells_of_it_and_that_is_an_event_where_both_servers_are_elsewhere(
    tmp_path, autojump_clock
):
    async with copied_swarm(tmp_path) as swarm:
        first, second = await swarm.serve_grid(2)
        await swarm.until_copied()
        theirs = sorted(first.held)
        await first.stop()
        said = await call_statistics(swarm.node.client, second.contact, 2.0)
        heard = dict[str, list[Event]]()
        for name, own in (("elsewhere", ()), ("from here", [first.contact.endpoint])):
            reported = ReportedTakeOvers(heard.setdefault(name, []).append, 0.0)
            for _ in range(2):
                reported.take(second.contact.endpoint, said, 1000.0, own)
        assert heard["from here"] == [], "the server that was started here tells it itself"
        given = [(e.uid, e.address, e.to, e.epoch) for e in heard["elsewhere"] if isinstance(e, ExpertHandedOver)]
        assert sorted(given) == [(uid, first.contact.endpoint, second.contact.endpoint, 1) for uid in theirs]


async def test_a_server_that_was_started_here_tells_what_one_elsewhere_has_given_it(autojump_clock):
    lab, events = Lab(), list[Event]()
    await lab.declare()
    here = lab.contacts[0].endpoint
    lab.answers[here] = SAID | {"copies": {"takeovers": [TAKEN], "handovers": [GIVEN | {"uid": "ffn.0.1"}]}}
    async with lab.polled(Handle(0), takeovers=ReportedTakeOvers(events.append, 0.0)):
        await trio.sleep(3)
    (event,) = events
    assert isinstance(event, ExpertHandedOver)
    assert (event.uid, event.address, event.to) == ("ffn.0.1", "10.0.0.9:1", here)


@pytest.mark.parametrize("tells", [True, False])
def test_what_a_server_that_was_started_here_cannot_tell_itself_is_an_event_after_a_while(tells):
    events, own = list[Event](), ["10.0.0.1:1", "10.0.0.9:1"]
    reported = ReportedTakeOvers(events.append, since=1000.0)
    if tells:
        reported.hear(ExpertTakenOver(**TAKEN_EVENT))
        reported.hear(ExpertHandedOver(uid="ffn.0.1", address="10.0.0.9:1", to="10.0.0.1:1", epoch=1))
    for ago in (0.0, TELLING_TIME - 0.1, TELLING_TIME, TELLING_TIME + 1):
        moves = {"takeovers": [TAKEN | {"ago": ago}], "handovers": [GIVEN | {"uid": "ffn.0.1", "ago": ago}]}
        reported.take("10.0.0.1:1", msgspec.convert(SAID | {"copies": moves}, ServerStatistics), 1010.0 + ago, own)
        late = ago >= TELLING_TIME and not tells
        assert [type(event) for event in events] == ([ExpertTakenOver, ExpertHandedOver] if late else [])
    assert all(event.at == 1010.0 for event in events)


def test_what_was_taken_over_before_one_looked_is_no_news():
    events = list[Event]()
    said = msgspec.convert(SAID | {"copies": {"takeovers": [TAKEN | {"ago": 60.0}, TAKEN | {"epoch": 2, "ago": 5.0}]}},
                           ServerStatistics)  # fmt: skip
    reported = ReportedTakeOvers(events.append, since=1000.0)
    for _ in range(2):
        reported.take("10.0.0.1:1", said, 1030.0)
    assert [(event.at, event.epoch) for event in events if isinstance(event, ExpertTakenOver)] == [(1025.0, 2)]
