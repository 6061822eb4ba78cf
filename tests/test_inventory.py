"""What is looked up while somebody looks: experts and grids from the directory, statistics from servers."""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
import trio

from labkit.contact import Contact
from labkit.dht.node import Entry
from labkit.directory import Directory
from labkit.directory.grids import GRIDS_KEY, GridInfo
from labkit.errors import BadReply, ConnectionLost, DeadlineExceeded, UnknownMethod
from labkit.expert_uid import grid_uids
from labkit.faults import Faults
from labkit.histogram import BUCKETS
from labkit.node import Node
from labkit.server.statistics import ServerStatistics
from labkit.view.collect import inventory
from labkit.view.collect.inventory import SERVERS_PER_SECOND, UNWATCHED_PACE, Inventory, ask_all_servers, keep_polled
from labkit.wire.rpc_types import CONTROL, Reply
from tests.fake_network import make_contact
from tests.fake_records import FakeRecords

UIDS = list(grid_uids("ffn", (4, 4)))
SAID: dict[str, Any] = {
    "experts": {"ffn.0.0": 3}, "queued_requests": 1, "queued_rows": 2, "batches": 3, "rows": 4, "busy_seconds": 0.5,
    "overloaded": 0, "expired": 0, "latency": 0.0, "loss": 0.0, "uptime": 9.0, "expert_rows": [1],
    "expert_requests": [1], "expert_seconds": [0.1], "total_times": [0] * BUCKETS, "queue_times": [0] * BUCKETS,
    "compute_times": [0] * BUCKETS,
}  # fmt: skip


REACHED = SimpleNamespace(now=SimpleNamespace(text="reachable", state="reachable"))


class Handle:
    """As much of a `ServerHandle` as polling sees."""

    def __init__(self, number: int, state: str = "running", uids: tuple[str, ...] = ("ffn.0.0",)) -> None:
        self.state, self.uids, self.contact = state, uids, make_contact(number)
        self.lifecycle = SimpleNamespace(reachability=None)
        self.plan = SimpleNamespace(identity=SimpleNamespace(public_key=self.contact.key))
        self.label = ""

    @property
    def alive(self) -> bool:
        return self.state == "running"

    def faults(self) -> Faults:
        return Faults(latency=0.5)


class Lab:
    """A node whose servers answer after a moment, each as `answers` says (an error, or a body); None: never."""

    def __init__(self, servers: int = 4) -> None:
        self.records = FakeRecords()
        self.directory = Directory(self.records)
        self.answers: dict[str, Any] = {}
        self.asked: list[tuple[float, str]] = []
        self.most_at_once = self.under_way = 0
        self.contacts = [make_contact(number) for number in range(servers)]
        self.inventories: list[Inventory] = []
        self.node = cast(
            Node,
            SimpleNamespace(
                client=self,
                dht=self.records,
                directory=self.directory,
                whereabouts=REACHED,
                relaying=SimpleNamespace(relay=None, words="", lost=False),
            ),
        )

    async def declare(self, uids: Sequence[str] = UIDS, sizes: tuple[int, ...] = (4, 4)) -> None:
        info = msgspec.msgpack.encode(GridInfo(sizes, "ffn", {}))
        await self.records.store_many([Entry(GRIDS_KEY, info, 1000.0, "ffn")])
        for number, contact in enumerate(self.contacts):
            await self.directory.declare(uids[number :: len(self.contacts)], contact)

    async def call(
        self, contact: Contact, method: str, body: Any = None, tensors: Sequence[Any] = (), *,
        returns: Any = Any, timeout: float, lane: str = CONTROL, codec: str = "none",
    ) -> Reply:  # fmt: skip
        assert method == "server.statistics"
        self.asked.append((trio.current_time(), contact.endpoint))
        self.under_way += 1
        self.most_at_once = max(self.most_at_once, self.under_way)
        try:
            with trio.move_on_after(timeout):
                await trio.sleep(0.01)
                answer = self.answers.get(contact.endpoint, SAID)
                if answer is None:
                    await trio.sleep_forever()
                if isinstance(answer, Exception):
                    raise answer
                try:
                    return Reply(msgspec.msgpack.decode(msgspec.msgpack.encode(answer), type=returns))
                except msgspec.MsgspecError as error:
                    raise BadReply(str(error)) from None
            raise DeadlineExceeded("no answer")
        finally:
            self.under_way -= 1

    @asynccontextmanager
    async def polled(
        self, *handles: Handle, watched: Callable[[], bool] = lambda: True, **options: Any
    ) -> AsyncIterator[trio.CancelScope]:
        async with trio.open_nursery() as nursery:
            publish = self.inventories.append
            poll = partial(keep_polled, self.node, cast(Any, handles), publish, watched=watched, **options)
            yield await nursery.start(poll)
            nursery.cancel_scope.cancel()

    @property
    def last(self) -> Inventory:
        return self.inventories[-1]


async def test_it_publishes_at_once_what_was_started_here_and_soon_what_it_found(autojump_clock):
    lab = Lab()
    await lab.declare()
    async with lab.polled(Handle(0, "starting")):
        (local,) = lab.last.locals
        assert (local.word, local.address, local.latency) == ("starting", make_contact(0).endpoint, 0.5)
        assert lab.last.experts == {} and lab.last.polled_at == -float("inf")
        await trio.sleep(1.5)
        assert sorted(lab.last.experts) == UIDS and lab.last.grids["ffn"].sizes == (4, 4)
        assert lab.last.polled_at <= time.monotonic()
        # One that is starting is not asked.
        assert sorted(lab.last.statistics) == sorted(contact.endpoint for contact in lab.contacts[1:])
        assert lab.last.statistics[lab.contacts[1].endpoint][0].experts == {"ffn.0.0": 3}


async def test_experts_of_a_lost_server_are_suspects(autojump_clock):
    lab = Lab()
    await lab.declare()
    async with lab.polled():
        await trio.sleep(1)
        lab.directory.report_failure(lab.last.experts["ffn.0.0"], ConnectionLost("gone"))
        await trio.sleep(3)
        assert sorted(lab.last.suspects) == sorted(UIDS[0::4])
        assert sorted([*lab.last.experts, *lab.last.suspects]) == UIDS


async def test_failures_in_a_row_are_counted_and_forgotten_when_it_answers(autojump_clock):
    lab = Lab()
    await lab.declare()
    silent, gone = lab.contacts[0].endpoint, lab.contacts[1].endpoint
    lab.answers |= {silent: None, gone: ConnectionLost("gone")}
    async with lab.polled():
        await trio.sleep(4.5)
        assert lab.last.failures[silent] >= 3 and lab.last.failures[gone] >= 3
        assert set(lab.last.statistics) == {contact.endpoint for contact in lab.contacts[2:]}
        lab.answers.clear()
        await trio.sleep(2)
        assert lab.last.failures == {} and len(lab.last.statistics) == 4


async def test_servers_are_asked_in_turn_where_there_are_many_and_the_silent_ones_too(autojump_clock):
    lab = Lab(servers=40)
    await lab.declare(list(grid_uids("ffn", (10, 20))), (10, 20))
    lab.answers |= {contact.endpoint: None for contact in lab.contacts[:5]}
    async with lab.polled():
        await trio.sleep(6)
        before = len(lab.asked)
        await trio.sleep(10)
        asked = Counter(address for _, address in lab.asked[before:])
        assert set(asked) == {contact.endpoint for contact in lab.contacts}
        assert sum(asked.values()) <= 10 * SERVERS_PER_SECOND + 5, "the silent ones twice in a row"
        lab.answers.clear()
        await trio.sleep(11)
        assert len(lab.last.statistics) == 40 and not lab.last.failures


async def test_while_nobody_looks_a_large_swarm_is_polled_more_rarely_and_a_small_one_is_not(
    autojump_clock,
):
    looks = False
    large, small = Lab(servers=100), Lab(servers=2)
    uids = list(grid_uids("ffn", (50, 40)))
    await large.declare(uids, (50, 40))
    await small.declare()
    async with large.polled(watched=lambda: looks), small.polled(watched=lambda: looks):
        await trio.sleep(10.5)  # between two rounds
        assert sorted(large.last.experts) == sorted(uids), "once, to begin with"
        before, looked_up = len(large.asked), large.directory.statistics()["keys_read"]
        await trio.sleep(10)
        assert len(large.asked) - before == 10 * UNWATCHED_PACE * SERVERS_PER_SECOND
        assert len(small.asked) == 20 * len(small.contacts), "each second, since they were found"
        rarely = large.directory.statistics()["keys_read"] - looked_up
        looks = True
        await trio.sleep(2)
        before, looked_up = len(large.asked), large.directory.statistics()["keys_read"]
        await trio.sleep(7)  # and then their declarations run out
        assert len(large.asked) - before == 7 * SERVERS_PER_SECOND
        assert large.directory.statistics()["keys_read"] - looked_up > 2 * rarely


async def test_at_most_sixteen_are_asked_at_once_and_the_silent_do_not_hold_the_others_up(autojump_clock):
    lab = Lab(servers=60)
    uids = list(grid_uids("ffn", (10, 20)))
    await lab.declare(uids, (10, 20))
    lab.answers |= {contact.endpoint: None for contact in lab.contacts[::2]}
    async with lab.polled():
        await trio.sleep(15)
        before = len(lab.asked)
        await trio.sleep(13)
        assert SERVERS_PER_SECOND < lab.most_at_once <= 16
        asked = [address for _, address in lab.asked[before:]]
        answering = [contact.endpoint for contact in lab.contacts[1::2]]
        assert all(asked.count(address) >= 1 for address in answering)
        assert len(asked) <= 13 * (SERVERS_PER_SECOND + 16)
        assert all(lab.last.failures[contact.endpoint] >= 2 for contact in lab.contacts[::2])


@pytest.mark.parametrize(
    "lie",
    [
        {"rows": -1},
        {"rows": 1 << 60},
        {"uptime": float("nan")},
        {"loss": 2.0},
        {"experts": {"x" * 1000: 1}},
        {"expert_rows": [1, 2]},
        {"expert_seconds": [-1.0]},
        {"total_times": [1] * (BUCKETS + 1)},
        {"queue_times": [1] * (BUCKETS - 1)},
        {"compute_times": ["many"]},
        {"experts": {f"ffn.{n}": 1 for n in range(20_001)}},
    ],
)
async def test_statistics_that_cannot_be_are_a_failure_of_that_server_alone(autojump_clock, lie):
    lab = Lab()
    await lab.declare()
    lab.answers[lab.contacts[0].endpoint] = SAID | lie
    async with lab.polled():
        await trio.sleep(2.5)
        assert set(lab.last.failures) == {lab.contacts[0].endpoint}
        assert len(lab.last.statistics) == 3


async def test_servers_that_speak_of_too_many_experts_are_heard_without_them(autojump_clock, monkeypatch):
    monkeypatch.setattr(inventory, "MAX_UNLISTED", 10)
    lab = Lab()
    await lab.declare()  # four each
    for contact, count in zip(lab.contacts, (4, 4, 20, 20), strict=True):
        many = {f"ffn.{n}": 1 for n in range(count)}
        lab.answers[contact.endpoint] = SAID | {"experts": many} | {
            name: [1] * count for name in ("expert_rows", "expert_requests", "expert_seconds")
        }  # fmt: skip
    async with lab.polled():
        await trio.sleep(5.5)
        said = [statistics for statistics, _ in lab.last.statistics.values()]
        assert sorted(len(statistics.experts) for statistics in said) == [0, 0, 4, 4] and not lab.last.failures
        assert all(len(statistics.expert_rows) == len(statistics.experts) for statistics in said)
        assert all(statistics.rows == SAID["rows"] for statistics in said)
    everybody = await ask_all_servers(lab.node, [], 5.0)
    assert sorted(len(statistics.experts) for statistics in everybody.values()) == [0, 0, 4, 4]


async def test_an_older_server_that_tells_less_is_understood(autojump_clock):
    lab = Lab()
    await lab.declare()
    older = {key: value for key, value in SAID.items() if not key.startswith("expert_") and "times" not in key}
    lab.answers[lab.contacts[0].endpoint] = older
    async with lab.polled():
        await trio.sleep(1.5)
        statistics, _ = lab.last.statistics[lab.contacts[0].endpoint]
        assert statistics.queued_requests == 1 and statistics.total_times == []


async def test_nothing_that_goes_wrong_ends_it_but_its_scope_does(autojump_clock, caplog):
    lab = Lab()
    await lab.declare()
    lab.answers[lab.contacts[0].endpoint] = ZeroDivisionError("a mistake of ours")
    lab.answers[lab.contacts[1].endpoint] = UnknownMethod("too old")
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            scope = await nursery.start(keep_polled, lab.node, [], lab.inventories.append)
            await trio.sleep(3)
            assert len(lab.last.statistics) == 2 and len(lab.last.experts) == 16
            scope.cancel()


async def test_asking_everybody_once_gives_those_who_answer_in_time(autojump_clock):
    lab = Lab(servers=4)
    await lab.declare()
    lab.answers[lab.contacts[0].endpoint] = None
    began = trio.current_time()
    answers = await ask_all_servers(lab.node, cast(Any, [Handle(1, "killed"), Handle(9)]), 2.0)
    assert set(answers) == {make_contact(number).endpoint for number in (2, 3, 9)}
    assert trio.current_time() - began <= 2.0
    assert isinstance(answers[make_contact(2).endpoint], ServerStatistics)


async def test_everybody_is_also_who_declared_experts_a_moment_ago(autojump_clock):
    lab = Lab(servers=1)
    await lab.declare(UIDS[:8])
    assert set(await ask_all_servers(lab.node, [], 2.0)) == {lab.contacts[0].endpoint}
    await Directory(lab.records).declare(UIDS[8:], make_contact(5))  # elsewhere
    assert len(await lab.directory.all_experts("ffn", 2)) == 8, "what is cached does not have them yet"
    assert make_contact(5).endpoint in await ask_all_servers(lab.node, [], 2.0)
    assert len(await lab.directory.all_experts("ffn", 2)) == 16, "and from now on layers call them"


class Steps(trio.abc.Instrument):
    """The longest that any task held the thread, in seconds of its work."""

    def __init__(self) -> None:
        self.longest, self.began = 0.0, time.thread_time()

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.began = time.thread_time()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        self.longest = max(self.longest, time.thread_time() - self.began)


async def test_ten_thousand_experts_are_looked_up_in_small_steps(autojump_clock):
    lab = Lab(servers=150)
    uids = list(grid_uids("ffn", (100, 100)))
    await lab.declare(uids, (100, 100))
    async with lab.polled():
        await trio.sleep(30)
        assert len(lab.last.experts) == 10_000 and len(lab.last.statistics) == 150
        gc.disable()  # the garbage collector has all of pytest to go through
        steps = Steps()
        trio.lowlevel.add_instrument(steps)
        await trio.sleep(10)
        trio.lowlevel.remove_instrument(steps)
        gc.enable()
    assert 0 < steps.longest < 0.05  # 0.005, but for a machine that has other things to do
