"""A call to a server that has left: it is made where the expert is by now, or fails soon."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import trio

from labkit.client.expert_client import ExpertClient, ExpertOutput, Outcome
from labkit.directory.second_look import LOOK_TIME
from labkit.errors import ConnectionLost
from labkit.events import CallFailed, CallFinished, Event, ServerLost
from labkit.expert_uid import ExpertInfo
from tests.copied_swarms import CopiedSwarm, Server, X, copied_swarm


class Idle:
    """Who has found an expert of a server, and does not call it before the server is gone."""

    def __init__(self, swarm: CopiedSwarm, server: Server, info: ExpertInfo) -> None:
        self.swarm, self.server, self.info = swarm, server, info
        self.events: list[Event] = []
        self.client = ExpertClient(swarm.node.client, swarm.node.directory, self.events.append)

    def begin(self, direction: str, outcomes: list[Outcome], ended: trio.Event, timeout: float = 5.0) -> Any:
        def done(outcome: Outcome) -> None:
            outcomes.append(outcome)
            ended.set()

        if direction == "forward":
            return self.client.forward(self.info, [X], [(4,)], done, timeout=timeout)
        return self.client.backward(self.info, [X], [torch.ones_like(X)], done, timeout=timeout)

    async def call(self, direction: str = "forward", timeout: float = 5.0) -> Outcome:
        outcomes, ended = list[Outcome](), trio.Event()
        self.begin(direction, outcomes, ended, timeout)
        await ended.wait()
        return outcomes[0]

    def said(self, *kinds: type[Event]) -> list[Event]:
        return [event for event in self.events if isinstance(event, kinds)]


@asynccontextmanager
async def idle_caller(folder: Path, *, copies: bool = True) -> AsyncIterator[Idle]:
    async with copied_swarm(folder) as swarm:
        server, _ = await swarm.serve_grid(2)
        if copies:
            await swarm.until_copied()
        uid = min(server.held)
        info = (await swarm.node.directory.find([uid]))[uid]
        assert info is not None and info.contact == server.contact
        yield Idle(swarm, server, info)


@pytest.mark.parametrize("direction", ["forward", "backward"])
async def test_who_was_idle_while_a_server_left_calls_where_it_has_handed_its_expert_over(
    direction, tmp_path, autojump_clock
):
    async with idle_caller(tmp_path) as idle:
        await idle.server.stop()
        assert isinstance(await idle.call(direction), ExpertOutput)
        (finished,) = idle.said(CallFinished, CallFailed)
        assert isinstance(finished, CallFinished) and finished.address != idle.server.contact.endpoint
        assert not idle.swarm.said(ServerLost)


async def read_for_ever(prefixes: list[str]) -> Any:
    await trio.sleep_forever()


@pytest.mark.parametrize("timeout", [5.0, 0.2])
async def test_a_call_to_an_expert_that_is_lost_fails_as_soon_as_it_is_known_to_be_nowhere_else(
    timeout, tmp_path, autojump_clock, monkeypatch
):
    async with idle_caller(tmp_path, copies=False) as idle:
        await idle.server.kill()
        monkeypatch.setattr(idle.swarm.node.directory._cache, "read", read_for_ever)
        began = trio.current_time()
        assert isinstance(await idle.call(timeout=timeout), ConnectionLost)
        assert trio.current_time() - began <= min(LOOK_TIME, timeout) + 0.1
        assert len(idle.said(CallFailed)) == 1


@pytest.mark.parametrize("end", ["cancel", "time_out"])
async def test_a_call_can_be_given_up_while_its_expert_is_looked_for(end, tmp_path, autojump_clock, monkeypatch):
    async with idle_caller(tmp_path) as idle:
        await idle.server.stop()
        looking, go_on, found = trio.Event(), trio.Event(), trio.Event()
        cache = idle.swarm.node.directory._cache
        read = cache.read

        async def read_slowly(prefixes: list[str]) -> Any:
            looking.set()
            await go_on.wait()
            views = await read(prefixes)
            found.set()
            return views

        monkeypatch.setattr(cache, "read", read_slowly)
        outcomes, ended = list[Outcome](), trio.Event()
        call = idle.begin("forward", outcomes, ended)
        await looking.wait()
        getattr(call, end)()
        go_on.set()
        await found.wait()
        await trio.sleep(2)
        assert len(outcomes) == (end == "time_out") and idle.client.in_flight == 0
        assert len(idle.said(CallFailed, CallFinished)) == 1
