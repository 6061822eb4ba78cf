"""A server's experts come and go while it runs, and whoever calls one that has gone is led to where it is now."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import trio

from labkit.client.expert_client import ExpertClient, ExpertOutput
from labkit.contact import Contact
from labkit.directory import Declared
from labkit.directory.grids import find_grids
from labkit.errors import BadReply, CheckpointError, ExpertsTaken, Overloaded, UnknownExpert
from labkit.events import CallFailed, CallFinished, Event
from labkit.expert_protocol import FORWARD, SNAPSHOT, ExpertReply, ExpertRequest, SnapshotHead
from labkit.expert_uid import ExpertInfo
from labkit.node import Node, open_node
from labkit.portal import unwrap
from labkit.server.backend import ExpertBackend
from labkit.server.checkpoints import keep_checkpoints, load_expert, save_all, save_expert
from labkit.server.config import ServerConfig
from labkit.server.executor import InlineCompute
from labkit.server.holdings import HOLD_TIMEOUT, MAX_MOVED, Holdings
from labkit.server.layers import make_expert
from labkit.server.loading import LoadOrder, carry_out_loads
from labkit.server.optimizer import BackendConfig
from labkit.server.ownership import FolderTaken, claim_checkpoints, keep_claimed
from labkit.server.runtime import ComputeThread, Runtime
from labkit.server.server import ExpertServer
from labkit.server.serving import serve_experts
from labkit.simulation.network import SimNetwork, open_simnet
from labkit.wire.rpc_types import Reply
from labkit.wire.security import Identity
from labkit.wire.transport import await_callback
from tests.swarms import soon

UIDS = ("ffn.0", "ffn.1")
X = torch.linspace(-1, 1, 12).reshape(3, 4)
SECOND = InlineCompute(lambda uid, direction, rows: 1.0)  # that each batch takes


def config(*uids: str, **changes: Any) -> ServerConfig:
    usual: dict[str, Any] = {"options": {"hidden": 4}, "seed": 1, "spare": not uids, "name": "ffn"}
    return ServerConfig(uids, **usual | changes)


class Lab:
    """A node that calls servers on a network in memory."""

    def __init__(self, network: SimNetwork, node: Node, nursery: trio.Nursery) -> None:
        self.network, self.node, self.nursery = network, node, nursery
        self.events: list[Event] = []
        self.nodes: dict[Contact, Node] = {}  # of servers: only these declare what theirs hold
        self.experts = ExpertClient(node.client, node.directory, self.events.append)

    async def serve(self, *uids: str, executor: InlineCompute | None = None) -> tuple[ExpertServer, Contact]:
        executor = executor or InlineCompute()
        server = ExpertServer(config(*uids), executor=executor, timers=self.network.timers)
        await self.nursery.start(server.runtime.run)

        async def run(task_status: trio.TaskStatus[Contact]) -> None:
            async with open_node(
                self.network, Identity.generate(), join=[self.node.contact], methods=server.methods
            ) as node:
                self.nodes[node.contact] = node
                await node.directory.declare(server.holdings.declared(), node.contact)
                task_status.started(node.contact)
                await trio.sleep_forever()

        return server, await self.nursery.start(run)

    async def call(self, contact: Contact, uid: str = UIDS[0], epoch: int = 0, timeout: float = 10.0) -> Reply:
        request = ExpertRequest(uid, epoch=epoch)
        return await self.node.client.call(contact, FORWARD, request, [X], returns=ExpertReply, timeout=timeout)

    async def find(self, uid: str = UIDS[0]) -> ExpertInfo:
        info = (await self.node.directory.find([uid]))[uid]
        assert info is not None
        return info

    async def ask(self, info: ExpertInfo, timeout: float = 10.0) -> Any:
        """Call an expert as a layer does. Returns the answer, or the error."""
        return await await_callback(partial(self._begin, info, timeout))

    async def train(self, info: ExpertInfo, forward_updates: int) -> Any:
        """Make a backward call as a layer does."""

        def begin(done: Any) -> Any:
            wrap = partial(self._wrapped, done)
            return self.experts.backward(info, [X], [X], wrap, timeout=10.0, forward_updates=forward_updates)

        return await await_callback(begin)

    def _wrapped(self, done: Any, outcome: Any) -> None:
        done(Wrapped(outcome))

    def _begin(self, info: ExpertInfo, timeout: float, done: Any) -> Any:
        return self.experts.forward(info, [X], [(4,)], partial(self._wrapped, done), timeout=timeout)


class Wrapped:
    """An outcome that is to be returned even if it is an error."""

    def __init__(self, outcome: Any) -> None:
        self.outcome = outcome


@asynccontextmanager
async def lab() -> AsyncIterator[Lab]:
    async with (
        open_simnet(latency=0.01) as network,
        open_node(network, Identity.generate()) as node,
        trio.open_nursery() as nursery,
    ):
        yield Lab(network, node, nursery)
        nursery.cancel_scope.cancel()


async def move(lab: Lab, uid: str, old: ExpertServer, new: ExpertServer, to: Contact, epoch: int) -> None:
    """Hand an expert over, as the control plane does."""
    old.holdings.hold(uid)
    await old.holdings.settle_expert(uid)
    state = await old.runtime.snapshot(uid)
    await new.adopt(uid, epoch, state)
    old.holdings.give_up(uid, to, epoch)


# ---------------------------------------------------------------- experts come and go


async def test_a_server_adopts_an_expert_with_all_that_it_has_learnt(autojump_clock):
    async with lab() as here:
        (one, _), (other, contact) = await here.serve(*UIDS), await here.serve()
        assert other.statistics().experts == {} and other.schema() is None
        with pytest.raises(UnknownExpert):
            await here.call(contact)
        one.runtime.backends[UIDS[0]].backward(X, X)
        await other.adopt(UIDS[0], 4, await one.runtime.snapshot(UIDS[0]))
        assert other.holdings.held == {UIDS[0]: 4} and other.holdings.declared() == {UIDS[0]: Declared(4)}
        reply = await here.call(contact)
        assert reply.tensors[0].equal(one.runtime.backends[UIDS[0]].forward(X))
        assert (reply.body.updates, reply.body.epoch, reply.body.moved) == (1, 4, None)
        statistics = other.statistics()
        assert (statistics.experts, statistics.expert_rows, statistics.rows) == ({UIDS[0]: 1}, [3], 3)
        assert other.schema() is not None
        with pytest.raises(ValueError, match="already"):
            await other.adopt(UIDS[0], 5)


async def test_a_state_that_does_not_fit_is_not_adopted(autojump_clock):
    async with lab() as here:
        (one, _), (other, contact) = await here.serve(*UIDS), await here.serve()
        state = await one.runtime.snapshot(UIDS[0])
        state.popitem()
        with pytest.raises(CheckpointError):
            await other.adopt(UIDS[0], 1, state)
        assert other.holdings.held == {} and other.statistics().experts == {}
        with pytest.raises(UnknownExpert):
            await here.call(contact)


async def test_whoever_calls_an_expert_that_was_given_up_is_told_where_it_is(autojump_clock):
    async with lab() as here:
        (server, contact), (_, elsewhere) = await here.serve(*UIDS), await here.serve()
        assert server.holdings.give_up(UIDS[0], elsewhere, 1) is not None
        reply = await here.call(contact)
        assert (reply.body.moved, reply.body.epoch, list(reply.tensors)) == (elsewhere, 1, [])
        with pytest.raises(UnknownExpert):
            await here.call(contact, epoch=2)  # it has moved on since
        assert server.holdings.give_up(UIDS[1]) is not None and server.holdings.give_up(UIDS[1]) is None
        with pytest.raises(UnknownExpert, match="look it up again"):
            await here.call(contact, UIDS[1])
        assert server.holdings.held == {} == server.statistics().experts
        await server.adopt(UIDS[0], 2)  # it comes back
        assert len((await here.call(contact, epoch=2)).tensors) == 1


async def test_what_it_takes_is_known_where_an_expert_was(autojump_clock):
    async with lab() as here:
        server, contact = await here.serve(UIDS[0])
        await here.call(contact)
        before = await here.experts.schema(await here.find(), 5.0)
        server.holdings.give_up(UIDS[0], here.node.contact, 1)
        assert before is not None and await here.experts.schema(await here.find(), 5.0) == before
        assert server.schema() == before


async def test_requests_that_wait_go_where_the_expert_is_and_the_batch_that_is_computed_ends_normally(autojump_clock):
    async with lab() as here:
        (server, contact), (_, elsewhere) = await here.serve(*UIDS, executor=SECOND), await here.serve()
        replies = list[Reply]()

        async def call() -> None:
            replies.append(await here.call(contact))

        async with trio.open_nursery() as nursery:
            for _ in range(3):  # one that is computed, and two that wait
                nursery.start_soon(call)
                await trio.sleep(0.1)
            server.holdings.give_up(UIDS[0], elsewhere, 1)
            started = trio.current_time()
            await server.holdings.settle_expert(UIDS[0])
            assert 0.5 < trio.current_time() - started < 1
        assert [reply.body.moved for reply in replies] == [elsewhere, elsewhere, None]
        assert len(replies[2].tensors) == 1
        assert server.statistics().rows == 3, "what was computed counts"


async def test_a_large_request_of_an_expert_that_is_given_up_is_computed_to_its_end(autojump_clock):
    backend = server_backend("ffn.0", max_batch_size=2)
    runtime = Runtime({"ffn.0": backend}, executor=SECOND)
    answers = list[Any]()
    async with trio.open_nursery() as nursery:
        await nursery.start(runtime.run)
        runtime.put("ffn.0", "forward", [torch.ones(6, 4)], 100.0 + trio.current_time(), answers.append)
        await trio.sleep(1.5)
        assert runtime.remove("ffn.0", UnknownExpert("gone")) is backend
        await runtime.settle_expert("ffn.0")
        assert [len(answer.tensors[0]) for answer in answers] == [6]
        nursery.cancel_scope.cancel()


async def test_several_wait_for_experts_to_settle(autojump_clock):
    runtime = Runtime({uid: server_backend(uid) for uid in UIDS}, executor=SECOND)
    settled = list[str]()

    async def settle(uid: str) -> None:
        await runtime.settle_expert(uid)
        settled.append(uid)

    async with trio.open_nursery() as nursery:
        await nursery.start(runtime.run)
        for uid in UIDS:
            runtime.put(uid, "forward", [X], 100.0 + trio.current_time(), lambda answer: None)
        waiting = runtime.put(UIDS[0], "forward", [X], 100.0 + trio.current_time(), lambda answer: None)
        for uid in UIDS:
            nursery.start_soon(settle, uid)
        await trio.sleep(1.5)
        assert settled == []
        assert runtime.discard(waiting) and not runtime.discard(waiting)
        await trio.sleep(0.1)
        assert settled == ["ffn.0"]
        await trio.sleep(1)
        assert settled == ["ffn.0", "ffn.1"]
        nursery.cancel_scope.cancel()


def server_backend(uid: str, **options: Any) -> ExpertBackend:
    return ExpertBackend(uid, make_expert("ffn", hidden=4), BackendConfig(**options))


async def test_a_request_that_is_given_up_is_taken_out_of_its_own_devices_queue(autojump_clock):
    backends = {"ffn.0": server_backend("ffn.0"), "ffn.1": server_backend("ffn.1", device="cpu:0")}
    runtime = Runtime(backends, executor=SECOND)
    answers = list[str]()
    deadline = trio.current_time() + 100
    waiting = [
        runtime.put(uid, "forward", [X], deadline, partial(lambda uid, _: answers.append(uid), uid)) for uid in UIDS
    ]
    assert runtime.discard(waiting[1])
    async with trio.open_nursery() as nursery:
        await nursery.start(runtime.run)
        await trio.sleep(3)
        assert answers == ["ffn.0"]
        nursery.cancel_scope.cancel()


async def test_a_runtime_that_begins_without_experts_has_no_thread_until_the_first_comes():
    runtime = Runtime({})
    async with trio.open_nursery() as nursery:
        await nursery.start(runtime.run)
        threads: list[ComputeThread] = runtime._compute_threads
        assert threads == []
        runtime.add(server_backend("ffn.0"))
        runtime.add(server_backend("ffn.1"))
        done = trio.Event()
        runtime.put("ffn.0", "forward", [X], trio.current_time() + 10, lambda answer: done.set())
        with trio.fail_after(10):
            await done.wait()
        [thread] = threads
        assert thread.alive
        nursery.cancel_scope.cancel()
    assert not thread.alive


async def test_counters_of_an_expert_that_comes_back_go_on(autojump_clock):
    async with lab() as here:
        server, contact = await here.serve(*UIDS)
        await here.call(contact)
        await here.call(contact, UIDS[1])
        server.holdings.give_up(UIDS[0])
        assert server.statistics().expert_rows == [3] and server.statistics().rows == 6
        await server.adopt(UIDS[0], 1)
        await here.call(contact, epoch=1)
        statistics = server.statistics()
        assert list(statistics.experts) == [UIDS[1], UIDS[0]] and statistics.expert_rows == [3, 6]


# ---------------------------------------------------------------- holding requests


async def test_requests_of_an_expert_on_hold_wait_and_go_on(autojump_clock):
    async with lab() as here:
        server, contact = await here.serve(*UIDS)
        server.holdings.hold(UIDS[0])
        replies = dict[str, Reply]()

        async def call(uid: str) -> None:
            replies[uid] = await here.call(contact, uid)

        async with trio.open_nursery() as nursery:
            for uid in UIDS:
                nursery.start_soon(call, uid)
            await trio.sleep(1)
            assert list(replies) == [UIDS[1]], "the other one is not concerned"
            server.holdings.release(UIDS[0])
        assert len(replies[UIDS[0]].tensors) == 1


async def test_a_hand_over_that_takes_too_long_turns_requests_away(autojump_clock):
    async with lab() as here:
        server, contact = await here.serve(*UIDS)
        server.holdings.hold(UIDS[0])
        started = trio.current_time()
        with pytest.raises(Overloaded, match="handed over"):
            await here.call(contact)
        assert trio.current_time() - started == pytest.approx(HOLD_TIMEOUT, abs=0.2)
        with trio.move_on_after(0.5):  # a caller that gives up
            await here.call(contact)
        await trio.sleep(0.1)
        server.holdings.release(UIDS[0])
        await trio.sleep(1)
        assert server.statistics().rows == 0
        assert server.traffic.quiet_at() <= trio.current_time() + 5, "none of them counts as open"


async def test_while_a_server_does_not_know_what_is_its_own_it_answers_nothing(autojump_clock):
    async with lab() as here:
        (server, contact), (_, elsewhere) = await here.serve(*UIDS), await here.serve()
        server.holdings.give_up(UIDS[1], elsewhere, 1)
        server.holdings.suspended = True
        for uid in (*UIDS, "ffn.9"):
            with pytest.raises(Overloaded, match="has been away"):
                await here.call(contact, uid)
        server.holdings.suspended = False
        assert len((await here.call(contact)).tensors) == 1


async def test_what_is_loaded_begins_an_epoch_and_is_not_given_away_before(autojump_clock, tmp_path):
    async with lab() as here:
        server, _ = await here.serve(*UIDS)
        state = server.runtime.backends[UIDS[0]].state()
        save_expert(tmp_path, UIDS[0], {**state, "counter.updates": torch.tensor(5)}, kind="ffn")
        send, orders = trio.open_memory_channel[LoadOrder](1)
        tell, answers = trio.open_memory_channel[str](1)
        here.nursery.start_soon(carry_out_loads, server.holdings, orders, None, {})
        for check_only, kept, epoch, updates in ((True, True, 0, 0), (False, False, 1, 5)):
            await send.send(LoadOrder(str(tmp_path), UIDS[:1], check_only, tell.send_nowait))
            assert await answers.receive() == ""
            assert server.holdings.is_kept(UIDS[0]) is kept and not server.holdings.is_kept(UIDS[1])
            assert server.holdings.held[UIDS[0]] == epoch
            assert server.runtime.backends[UIDS[0]].updates == updates


async def test_the_state_of_an_expert_is_read_only_where_it_is_and_stays(autojump_clock):
    async with lab() as here:
        (server, contact), (_, elsewhere) = await here.serve(*UIDS), await here.serve()

        async def read() -> Reply:
            return await here.node.client.call(contact, SNAPSHOT, UIDS[0], returns=SnapshotHead, timeout=10)

        server.holdings.suspended = True
        with pytest.raises(Overloaded, match="has been away"):
            await read()
        server.holdings.suspended = False
        server.holdings.hold(UIDS[0])
        with pytest.raises(Overloaded, match="is being handed over"):
            await read()
        server.holdings.give_up(UIDS[0], elsewhere, 1)
        with pytest.raises(UnknownExpert, match="look it up again"):
            await read()


async def test_a_caller_that_knows_of_a_later_epoch_is_sent_away_and_the_server_hears_of_it(autojump_clock):
    async with lab() as here:
        server, contact = await here.serve(*UIDS)
        heard = list[tuple[str, int]]()
        server.holdings.on_outdated = lambda uid, epoch: heard.append((uid, epoch))
        with pytest.raises(UnknownExpert, match="another server"):
            await here.call(contact, epoch=3)
        assert heard == [(UIDS[0], 3)] and server.statistics().rows == 0
        server.holdings.raise_epoch(UIDS[0], 3)
        assert (await here.call(contact, epoch=3)).body.epoch == 3
        assert (await here.call(contact, epoch=1)).body.epoch == 3, "who knows an older one is served"


async def test_so_many_experts_that_have_gone_are_remembered_and_no_more(autojump_clock):
    async with open_simnet() as network:
        runtime = Runtime({"ffn.0": server_backend("ffn.0")})
        holdings = Holdings(runtime, {"ffn.0": 0}, network.timers)
        backend, to = runtime.backends["ffn.0"], Contact(bytes(32), "127.0.0.1", 5000)
        for n in range(MAX_MOVED + 5):
            backend.uid = f"ffn.{n}"
            if n:
                holdings.add(backend.uid, backend, 0)
            holdings.give_up(backend.uid, to, 1)
        assert [holdings.moved(f"ffn.{n}") is None for n in (0, 4, 5, MAX_MOVED + 4)] == [True, True, False, False]


# ---------------------------------------------------------------- calls follow


async def test_a_call_follows_its_expert_as_if_nothing_had_happened(autojump_clock):
    async with lab() as here:
        (one, _), (two, second), (three, third) = await here.serve(*UIDS), await here.serve(), await here.serve()
        info = await here.find()
        before = (await here.ask(info)).outcome
        await move(here, UIDS[0], one, two, second, 1)
        await move(here, UIDS[0], two, three, third, 2)
        here.events.clear()
        after = (await here.ask(info)).outcome
        assert isinstance(after, ExpertOutput) and after.tensors[0].equal(before.tensors[0])
        [event] = here.events
        assert isinstance(event, CallFinished) and event.address == third.endpoint
        found = await here.find()
        assert (found.contact, found.epoch) == (third, 2), "and the next one finds it there at once"
        assert here.experts.in_flight == 0 and (one.statistics().rows, three.statistics().rows) == (3, 3)


async def test_a_backward_pass_goes_where_the_expert_is_by_then(autojump_clock):
    async with lab() as here:
        (one, _), (two, second) = await here.serve(*UIDS), await here.serve()
        info = await here.find()
        before = (await here.ask(info)).outcome
        await move(here, UIDS[0], one, two, second, 1)
        outcome = (await here.train(info, before.updates)).outcome
        assert isinstance(outcome, ExpertOutput) and outcome.updates == 1 == two.runtime.backends[UIDS[0]].updates
        event = here.events[-1]
        assert isinstance(event, CallFinished) and (event.address, event.staleness) == (second.endpoint, 0)
        one.holdings.suspended = True  # it need not be there any more
        assert isinstance((await here.train(info, 0)).outcome, ExpertOutput), "what a pass remembers is out of date"


async def test_no_call_fails_and_none_is_answered_twice_while_an_expert_is_handed_over(autojump_clock):
    async with lab() as here:
        (one, _), (two, second) = await here.serve(UIDS[0], executor=SECOND), await here.serve(executor=SECOND)
        info, outcomes = await here.find(), list[Any]()

        async def ask() -> None:
            outcomes.append((await here.ask(info)).outcome)

        async with trio.open_nursery() as nursery:
            for n in range(12):
                if n == 5:
                    nursery.start_soon(move, here, UIDS[0], one, two, second, 1)
                nursery.start_soon(ask)
                await trio.sleep(0.3)
        assert len(outcomes) == 12 and all(isinstance(outcome, ExpertOutput) for outcome in outcomes)
        rows = one.statistics().rows, two.statistics().rows
        assert sum(rows) == 36 and min(rows) > 0


@pytest.mark.parametrize("lie", ["unsafe", "circle", "itself", "older"])
async def test_a_server_that_sends_callers_away_for_nothing_is_not_believed(autojump_clock, lie: str):
    async with lab() as here:
        (one, first), (two, second) = await here.serve(*UIDS), await here.serve(*UIDS)
        info = ExpertInfo(UIDS[0], first, epoch=1 if lie == "older" else 0)
        to = {"unsafe": Contact(bytes(32), "192.0.2.1", 5000, False), "itself": first}.get(lie, second)
        one.holdings.give_up(UIDS[0], to, 1)
        two.holdings.give_up(UIDS[0], first, 1)
        if lie == "older":
            one.holdings._moved[UIDS[0]] = one.holdings._moved[UIDS[0]]._replace(epoch=0)
            one.holdings.check = lambda uid, epoch: one.holdings._moved[uid]  # type: ignore[method-assign]
        outcome = (await here.ask(info)).outcome
        assert isinstance(outcome, UnknownExpert if lie == "older" else BadReply), outcome
        [event] = here.events
        assert isinstance(event, CallFailed) and here.experts.in_flight == 0


async def test_a_call_that_follows_its_expert_keeps_its_deadline_and_can_be_given_up(autojump_clock):
    async with lab() as here:
        (one, _), (two, second) = await here.serve(UIDS[0]), await here.serve(executor=SECOND)
        info = await here.find()
        await move(here, UIDS[0], one, two, second, 1)
        started = trio.current_time()
        outcome = (await here.ask(info, timeout=0.5)).outcome
        assert outcome.cause == "timeout" and trio.current_time() - started < 0.6
        call = here.experts.forward(info, [X], [(4,)], lambda outcome: None, timeout=5.0)
        await trio.sleep(0.2)
        call.cancel()
        await trio.sleep(3)
        assert here.experts.in_flight == 0 and two.statistics().queued_requests == 0


# ---------------------------------------------------------------- checkpoints


async def test_checkpoints_follow_what_a_server_holds(tmp_path: Path):
    async with lab() as here:
        (one, _), (two, second) = await here.serve(*UIDS), await here.serve()
        saved: dict[str, tuple[int, int]] = {}
        claims = [claim_checkpoints(tmp_path, uids) for uids in (UIDS, ())]
        for server, claim in zip((one, two), claims, strict=True):
            here.nursery.start_soon(keep_claimed, claim, server.holdings.held, server.holdings.until_changed, False)
        await here.nursery.start(partial(keep_checkpoints, two.runtime, tmp_path, 0.02, saved, claim=claims[1]))
        await move(here, UIDS[0], one, two, second, 1)

        async def owned() -> bool:
            return claims[1].owns(UIDS[0]) and not claims[0].owns(UIDS[0])

        await soon(owned)
        assert claims[0].owns(UIDS[1]) and not claims[1].owns(UIDS[1])
        two.runtime.backends[UIDS[0]].backward(X, X)

        async def is_saved() -> bool:
            return saved.get(UIDS[0]) == (1, 0)

        await soon(is_saved)
        await save_all(one.runtime, tmp_path, claim=claims[0])
        assert load_expert(tmp_path, UIDS[1]) is not None
        state = load_expert(tmp_path, UIDS[0])
        assert state is not None and int(state["counter.updates"]) == 1, "the one who had it does not write there"
        two.holdings.give_up(UIDS[0])

        async def is_forgotten() -> bool:
            return not saved and not claims[1].owns(UIDS[0])

        await soon(is_forgotten)
        with pytest.raises(FolderTaken, match=r"ffn\.1"):
            claim_checkpoints(tmp_path, UIDS)
        for claim in claims:
            claim.release()


async def test_what_another_owns_is_not_saved_over_it_while_the_others_are(tmp_path: Path):
    runtime = Runtime({uid: server_backend(uid) for uid in UIDS}, executor=InlineCompute())
    claim = claim_checkpoints(tmp_path, UIDS[1:])
    async with trio.open_nursery() as nursery:
        await nursery.start(runtime.run)
        await nursery.start(partial(keep_checkpoints, runtime, tmp_path, 0.02, claim=claim))
        for backend in runtime.backends.values():
            backend.backward(X, X)

        async def is_saved() -> bool:
            return load_expert(tmp_path, UIDS[1]) is not None

        await soon(is_saved)
        assert load_expert(tmp_path, UIDS[0]) is None
        nursery.cancel_scope.cancel()
    claim.release()


async def test_what_another_owns_in_the_folder_is_saved_there_once_it_has_let_go(tmp_path: Path, autojump_clock):
    owner, heir = claim_checkpoints(tmp_path, UIDS), claim_checkpoints(tmp_path, ())
    async with open_simnet() as network, trio.open_nursery() as nursery:
        runtime = Runtime({uid: server_backend(uid) for uid in UIDS}, executor=InlineCompute())
        holdings = Holdings(runtime, dict.fromkeys(UIDS, 1), network.timers)
        nursery.start_soon(keep_claimed, heir, holdings.held, holdings.until_changed, False)
        await trio.sleep(5)
        await save_all(runtime, tmp_path, claim=heir)
        assert load_expert(tmp_path, UIDS[0]) is None and not heir.owns(UIDS[0])
        owner.release()
        await trio.sleep(2)
        await save_all(runtime, tmp_path, claim=heir)
        assert load_expert(tmp_path, UIDS[0]) is not None
        nursery.cancel_scope.cancel()
    heir.release()


# ---------------------------------------------------------------- whole servers


def test_a_config_without_experts_is_one_of_a_spare():
    assert ServerConfig((), (2,), spare=True, name="ffn").name == "ffn"
    assert ServerConfig(("ffn.0",), (2,)).name == "ffn"
    for changes in ({}, {"spare": True}, {"spare": True, "name": "no name"}):
        with pytest.raises(ValueError, match=r"uids|name"):
            ServerConfig((), (2,), **changes)
    with pytest.raises(ValueError, match="of the grid ffn"):
        ServerConfig(("ffn.0",), (2,), name="gate")


async def serve_whole(here: Lab, server: ServerConfig) -> Contact:
    """A whole server, from its start on."""
    contact: Contact = await here.nursery.start(whole(here, server))
    return contact


def whole(here: Lab, server: ServerConfig) -> partial[Any]:
    join = [here.node.contact]
    return partial(serve_experts, here.network, Identity.generate(), server, join=join, executor=InlineCompute())


async def test_a_spare_starts_without_experts_and_keeps_its_grid_known(autojump_clock):
    async with lab() as here:
        await serve_whole(here, config(grid=(2, 2)))
        await trio.sleep(60)
        grids = await find_grids(here.node.dht, 5.0)
        assert grids["ffn"].sizes == (2, 2) and grids["ffn"].kind == "ffn"


@pytest.mark.parametrize("spare", [False, True])
async def test_a_server_that_meets_a_later_epoch_gives_the_expert_up_and_says_where_it_is(autojump_clock, spare: bool):
    async with lab() as here:
        old = await serve_whole(here, config(*UIDS, spare=spare))
        heir, to = await here.serve()
        await heir.adopt(UIDS[0], 1)
        await here.nodes[to].directory.declare(heir.holdings.declared(), to)
        await trio.sleep(11)
        reply = await here.call(old)
        assert (reply.body.moved, reply.body.epoch) == (to, 1)
        assert len((await here.call(old, UIDS[1])).tensors) == 1
        found = await here.node.directory.holders(UIDS)
        assert {uid: info.contact for uid, info in found.items()} == {UIDS[0]: to, UIDS[1]: old}


async def test_a_server_whose_experts_all_are_elsewhere_ends_unless_it_is_a_spare(autojump_clock):
    async with lab() as here:
        heir, to = await here.serve()
        await serve_whole(here, config("ffn.0", spare=True))

        async def lose_all(server: ServerConfig) -> None:
            with pytest.raises(ExpertsTaken, match="is served at"):
                try:
                    await whole(here, server)()
                except BaseExceptionGroup as group:
                    raise unwrap(group) from None

        async with trio.open_nursery() as nursery:
            nursery.start_soon(lose_all, config("ffn.1"))
            await trio.sleep(1)
            for uid in UIDS:
                await heir.adopt(uid, 1)
            await here.nodes[to].directory.declare(heir.holdings.declared(), to)
        await trio.sleep(30)  # and the spare, a task of the lab, has not ended with an error
