"""A server's life through interrupts and orders at once: no runner starts before the last one has ended.

In virtual time: the servers here are tasks that hold nothing. `test_swarm` and `test_servers` are about real ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from labkit.contact import Contact
from labkit.errors import ServerFailed
from labkit.events import ignore
from labkit.faults import Faults
from labkit.launch import runners
from labkit.launch.lab import Lab
from labkit.launch.lifecycle import ServerLifecycle
from labkit.launch.runners import ServerPlan
from labkit.launch.states import TRANSITIONS, ServerEvent, ServerState, next_state
from labkit.node import NodeConfig
from labkit.server.config import ServerConfig
from labkit.wire.security import Identity

START, STOP, DISCARD, KILL, READY, START_FAILED, ENDED, SAVED, NOT_SAVED = ServerEvent
CONTACT = Contact(bytes(32), "127.0.0.1", 1, False)


class Servers:
    """What stands in for `serve_experts`: starts in `start` seconds, saves in `save` seconds, and notes what it does.

    `failure`: what it ends with instead of being saved. `limit`: seconds that it says a stop may take. `when_ready` is
    called in the moment in which it is ready.
    """

    def __init__(self) -> None:
        self.start, self.save, self.limit, self.failure = 0.0, 20.0, 30.0, ""
        self.did: list[str] = []
        self.when_ready: Callable[[], object] = lambda: None

    async def serve(self, *_: Any, stop: trio.Event, allow: Any = None, task_status: Any, **__: Any) -> None:
        self.did.append("begins")
        try:
            with trio.CancelScope(shield=True):  # as experts are built, in a thread
                await trio.sleep(self.start)
            await trio.lowlevel.checkpoint()
            if allow is not None:
                allow(self.limit)
            task_status.started(CONTACT)
            self.when_ready()
            await stop.wait()
            await trio.sleep(self.save)
            if self.failure:
                raise OSError(self.failure)
            self.did.append("has saved")
        finally:
            self.did.append("ends")


@pytest.fixture
def servers(monkeypatch) -> Servers:
    servers = Servers()
    monkeypatch.setattr(runners, "serve_experts", servers.serve)
    return servers


@pytest.fixture
def lifecycle(servers, nursery) -> ServerLifecycle:
    class Directory:
        async def refresh(self, uids: Sequence[str]) -> None: ...

        async def find(self, uids: Sequence[str]) -> dict[str, Any]:
            return {uid: SimpleNamespace(contact=CONTACT) for uid in uids}

    unused: Any = None
    node: Any = SimpleNamespace(directory=Directory(), contact=CONTACT)
    plan = ServerPlan(ServerConfig(("nop.0",), kind="nop"), NodeConfig(), Identity.generate(), join=())
    return ServerLifecycle(Lab(unused, nursery, unused, node, Faults(), ignore), plan, "task")


async def test_a_restart_after_an_interrupted_stop_waits_until_the_experts_are_saved(
    servers, lifecycle, autojump_clock
):
    await lifecycle.order(START)
    with trio.move_on_after(5):  # Ctrl-C
        await lifecycle.end(STOP)
    await lifecycle.order(START)
    assert servers.did == ["begins", "has saved", "ends", "begins"]
    assert lifecycle.alive


async def test_a_restart_while_somebody_else_stops_it_waits_for_that(servers, lifecycle, nursery, autojump_clock):
    await lifecycle.order(START)
    nursery.start_soon(lifecycle.end, STOP)
    await trio.sleep(5)
    await lifecycle.order(START, wait=False)
    await trio.sleep(10)
    assert servers.did == ["begins"] and lifecycle.state == "starting"
    await trio.sleep(6)
    assert servers.did == ["begins", "has saved", "ends", "begins"]
    assert lifecycle.alive


async def test_who_restarts_what_does_not_end_kills_it_in_the_end(servers, lifecycle, autojump_clock):
    servers.save = 1000.0
    await lifecycle.order(START)
    with trio.move_on_after(5):
        await lifecycle.end(STOP)
    with pytest.raises(ServerFailed, match="had not saved its experts after 30 s, and was killed"):
        await lifecycle.order(START)
    assert servers.did == ["begins", "ends"] and lifecycle.state == "failed"
    await lifecycle.order(START)
    assert lifecycle.alive


async def test_what_still_saves_after_an_interrupted_stop_can_be_killed(servers, lifecycle, autojump_clock):
    await lifecycle.order(START)
    with trio.move_on_after(5):
        await lifecycle.end(STOP)
    await lifecycle.end(KILL)
    assert servers.did == ["begins", "ends"] and lifecycle.state == "killed"


async def test_who_waits_for_its_end_waits_for_an_interrupted_stop_too(servers, lifecycle, autojump_clock):
    await lifecycle.order(START)
    with trio.move_on_after(5):
        await lifecycle.end(STOP)
    assert await lifecycle.until_at_rest() == ""
    assert servers.did == ["begins", "has saved", "ends"] and lifecycle.state == "stopped"


async def test_an_interrupted_stop_that_cannot_save_leaves_a_server_that_failed(servers, lifecycle, autojump_clock):
    servers.failure = "no space left"
    await lifecycle.order(START)
    with trio.move_on_after(5):
        await lifecycle.end(STOP)
    assert await lifecycle.until_at_rest() == "no space left"
    assert lifecycle.state == "failed"


async def test_a_restart_that_is_interrupted_before_it_begins_leaves_nothing_to_wait_for(
    servers, lifecycle, nursery, autojump_clock
):
    servers.start = 10.0
    await lifecycle.order(START, wait=False)
    await trio.sleep(1)
    with trio.move_on_after(5):  # while the first one, which is killed, still builds its experts
        await lifecycle.order(START)
    with trio.fail_after(10):
        await lifecycle.end(KILL)
    assert servers.did == ["begins", "ends"] and not lifecycle.alive


async def test_large_experts_have_longer_to_be_saved(servers, lifecycle, autojump_clock):
    servers.save, servers.limit = 100.0, 150.0
    await lifecycle.order(START)
    assert await lifecycle.end(STOP) == ""
    assert servers.did == ["begins", "has saved", "ends"]


async def test_who_waits_for_its_end_waits_for_what_was_killed_too(servers, lifecycle, autojump_clock):
    servers.start = 10.0
    await lifecycle.order(START, wait=False)
    await trio.sleep(1)
    await lifecycle.order(KILL, wait=False)
    assert lifecycle.state == "killed" and servers.did == ["begins"]
    assert await lifecycle.until_at_rest() == ""
    assert servers.did == ["begins", "ends"]


@pytest.mark.parametrize("order", [START, STOP, KILL])
async def test_who_waits_for_a_start_learns_that_another_order_has_overtaken_it(
    servers, lifecycle, nursery, autojump_clock, order
):
    said: list[str] = []

    async def start() -> None:
        with pytest.raises(ServerFailed) as raised:
            await lifecycle.order(START)
        said.append(str(raised.value))

    servers.start = 10.0
    nursery.start_soon(start)
    await trio.sleep(1)
    await lifecycle.order(order)
    await trio.sleep(1)
    assert said == ["the server of nop.0 was ended while it was starting"]


async def test_what_has_only_so_long_to_be_saved_is_killed_then(servers, lifecycle, autojump_clock):
    failure = "it had not saved its experts after 5 s, and was killed"
    await lifecycle.order(START)
    with trio.fail_after(6):
        assert await lifecycle.end(STOP, timeout=5.0) == failure
    assert servers.did == ["begins", "ends"]
    assert (lifecycle.state, lifecycle.failure) == ("failed", failure)


async def test_who_waits_beside_a_start_that_is_interrupted_before_it_begins_learns_of_it(
    servers, lifecycle, nursery, autojump_clock
):
    async def interrupted() -> None:
        with trio.move_on_after(5):
            await lifecycle.order(START)

    servers.start = 10.0
    await lifecycle.order(START, wait=False)
    await trio.sleep(1)
    nursery.start_soon(interrupted)  # while the first one, which is killed, still builds its experts
    await trio.sleep(1)
    with trio.fail_after(20):
        assert await lifecycle.until_at_rest() == "it was interrupted"
    assert lifecycle.state == "failed"


async def test_a_start_that_is_interrupted_in_the_moment_in_which_it_is_ready_has_failed(
    servers, lifecycle, autojump_clock
):
    with trio.CancelScope() as scope:
        servers.when_ready = scope.cancel
        await lifecycle.order(START)
    assert scope.cancelled_caught
    assert servers.did == ["begins", "ends"]
    assert (lifecycle.state, lifecycle.failure) == ("failed", "it was interrupted")


async def test_who_waits_for_a_stop_learns_that_somebody_killed_it(servers, lifecycle, nursery, autojump_clock):
    said: list[str] = []

    async def stop() -> None:
        said.append(await lifecycle.end(STOP))

    await lifecycle.order(START)
    nursery.start_soon(stop)
    await trio.sleep(5)
    await lifecycle.end(KILL)
    await trio.sleep(1)
    assert said == ["it was killed"]
    assert (lifecycle.state, lifecycle.failure) == ("killed", "")  # as somebody wanted


# ---------------------------------------------------------------- orders that nobody waits for


async def test_a_stop_that_nobody_waits_for_saves_all_the_same(servers, lifecycle, autojump_clock):
    await lifecycle.order(START)
    await lifecycle.order(STOP, wait=False)
    assert servers.did == ["begins"] and lifecycle.state == "stopped"
    await trio.sleep(21)
    assert servers.did == ["begins", "has saved", "ends"] and lifecycle.state == "stopped"


@pytest.mark.parametrize(("save", "failure"), [(20.0, "no space left"), (1000.0, "not saved its experts after 30 s")])
async def test_a_stop_that_nobody_waits_for_tells_when_it_could_not_save(
    servers, lifecycle, autojump_clock, caplog, save, failure
):
    servers.save, servers.failure = save, "no space left"
    await lifecycle.order(START)
    await lifecycle.order(STOP, wait=False)
    await trio.sleep(31)
    assert servers.did == ["begins", "ends"]
    assert lifecycle.state == "failed" and failure in lifecycle.failure and failure in caplog.text


@pytest.mark.parametrize(("order", "state"), [(STOP, "stopped"), (KILL, "killed"), (DISCARD, "stopped")])
async def test_what_is_ended_while_it_is_to_restart_does_not_begin(servers, lifecycle, autojump_clock, order, state):
    await lifecycle.order(START)
    await lifecycle.order(START, wait=False)
    await trio.sleep(5)
    await lifecycle.end(order)
    await trio.sleep(100)
    assert servers.did == ["begins", *(["has saved"] if order is STOP else []), "ends"]
    assert lifecycle.state == state


async def test_what_could_not_be_saved_is_not_started_again_at_once(servers, lifecycle, autojump_clock, caplog):
    servers.failure = "no space left"
    await lifecycle.order(START)
    await lifecycle.order(START, wait=False)
    await trio.sleep(21)
    assert servers.did == ["begins", "ends"] and lifecycle.state == "failed"
    assert lifecycle.failure == "it did not end cleanly before: no space left" and "no space left" in caplog.text
    await lifecycle.order(START, wait=False)
    await trio.sleep(1)
    assert lifecycle.alive


async def test_a_kill_that_nobody_waits_for_ends_what_saves_and_what_is_to_begin(servers, lifecycle, autojump_clock):
    await lifecycle.order(START)
    await lifecycle.order(START, wait=False)
    await lifecycle.order(KILL, wait=False)
    assert lifecycle.state == "killed"
    await lifecycle.order(START, wait=False)
    await trio.sleep(1)
    assert servers.did == ["begins", "ends", "begins"] and lifecycle.alive


# ---------------------------------------------------------------- every state, and all that may happen in it


async def reach(lifecycle: ServerLifecycle, state: ServerState, scope: trio.CancelScope) -> None:
    """Bring a new server into a state. If it is starting or restarting, `scope` is that of whoever waits for it."""
    if state in (ServerState.RUNNING, ServerState.SAVING, ServerState.RESTARTING, ServerState.GIVEN_UP):
        await lifecycle.order(START)
    if state is ServerState.SAVING:
        await lifecycle.order(STOP, wait=False)
    elif state is ServerState.GIVEN_UP:
        with trio.move_on_after(5):
            await lifecycle.order(START)
    elif state in (ServerState.STARTING, ServerState.RESTARTING, ServerState.KILLED, ServerState.FAILED):

        async def start() -> None:
            with scope, suppress(ServerFailed):
                await lifecycle.order(START)

        lifecycle._lab.nursery.start_soon(start)
        await trio.sleep(1)
    if state is ServerState.KILLED:
        await lifecycle.end(KILL)
    elif state is ServerState.FAILED:
        scope.cancel()
        await lifecycle.until_at_rest()
    assert lifecycle._state is state


async def bring_about(
    event: ServerEvent, lifecycle: ServerLifecycle, servers: Servers, scope: trio.CancelScope
) -> None:
    """Let something happen, and return when the state has changed."""
    before = lifecycle._state
    if event in (START, STOP, DISCARD, KILL):
        await lifecycle.order(event, wait=False)
        return
    if event is START_FAILED:
        scope.cancel()
    elif event is ENDED:
        assert lifecycle._runner is not None
        lifecycle._runner.kill()  # as somebody else does, who kills the process
    elif event is NOT_SAVED:
        servers.failure = "no space left"
    while lifecycle._state is before:
        await lifecycle._changes.park()


@pytest.mark.parametrize(("state", "event"), list(itertools.product(ServerState, ServerEvent)), ids=str)
async def test_a_server_does_what_the_table_says_of_every_state_and_event(
    servers, lifecycle, autojump_clock, caplog, state, event
):
    if (state, event) not in TRANSITIONS:
        with pytest.raises(ValueError, match=f"that is {state.value} cannot see the event '{event.value}'"):
            next_state(state, event)
        return
    servers.start, scope = 10.0, trio.CancelScope()
    await reach(lifecycle, state, scope)
    await bring_about(event, lifecycle, servers, scope)
    assert lifecycle._state is next_state(state, event)
    assert lifecycle.alive == (lifecycle.state == "running")
    assert ("the server of nop.0 has ended: it was killed" in caplog.text) == (event is ENDED)
    await trio.sleep(100)
    runs = [what for what in servers.did if what != "has saved"]
    assert runs == ["begins", "ends"] * (len(runs) // 2) + ["begins"] * lifecycle.alive  # one after the other
    assert lifecycle._state.at_rest or lifecycle.alive
    assert bool(lifecycle.failure) == (lifecycle.state == "failed")


def test_the_table_says_of_each_event_what_it_leads_to():
    stopped, killed, failed, starting, running, saving, restarting, given_up = ServerState
    at_rest = {state: state for state in (stopped, killed, failed)}  # there is nothing to end
    not_at_rest = (starting, running, saving, restarting, given_up)
    assert {event: {a: b for (a, of), b in TRANSITIONS.items() if of is event} for event in ServerEvent} == {
        START: dict.fromkeys((*at_rest, starting), starting)
        | dict.fromkeys((running, saving, restarting, given_up), restarting),
        STOP: at_rest | {starting: stopped, given_up: given_up} | dict.fromkeys((running, saving, restarting), saving),
        DISCARD: at_rest | dict.fromkeys(not_at_rest, stopped),
        KILL: at_rest | dict.fromkeys(not_at_rest, killed),
        READY: {starting: running},
        START_FAILED: {starting: failed, restarting: given_up},
        ENDED: {running: failed},
        SAVED: {saving: stopped, restarting: starting, given_up: failed},
        NOT_SAVED: dict.fromkeys((saving, restarting, given_up), failed),
    }


def test_every_order_may_come_in_every_state_and_users_see_five_words():
    for state in ServerState:
        assert next_state(state, START).word == "starting"
        for order in (STOP, DISCARD, KILL):
            assert next_state(state, order).at_rest or (order is STOP and next_state(state, order).saves)
    assert {state.word for state in ServerState} == {"starting", "running", "stopped", "killed", "failed"}
    assert {state.word for state in ServerState if state.at_rest} == {"stopped", "killed", "failed"}
