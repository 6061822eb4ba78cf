"""Injected latency and loss."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import torch
import trio

from labkit.errors import DeadlineExceeded
from labkit.expert_protocol import ExpertRequest
from labkit.faults import Faults
from labkit.server.config import ServerConfig
from labkit.server.executor import InlineCompute
from labkit.server.server import ExpertServer
from labkit.wire.rpc_types import Reply, Request
from labkit.wire.timers import Timers
from labkit.wire.transport import Peer


def test_delays_are_exponential_with_the_mean_that_was_asked_for():
    faults = Faults(latency=0.1, seed=0)
    delays = [faults.draw()[0] for _ in range(20_000)]
    assert sum(delays) / len(delays) == pytest.approx(0.1, rel=0.03)
    assert sum(delay > 0.1 for delay in delays) / len(delays) == pytest.approx(math.exp(-1), abs=0.015)


def test_the_share_of_lost_requests_is_what_was_asked_for():
    faults = Faults(loss=0.1, seed=0)
    assert sum(faults.draw()[1] for _ in range(20_000)) / 20_000 == pytest.approx(0.1, abs=0.01)
    assert not any(Faults(loss=0.0, seed=i).draw()[1] for i in range(100))
    assert all(Faults(loss=1.0, seed=i).draw()[1] for i in range(100))


def test_the_same_seed_draws_the_same_faults_whatever_the_settings_were_before():
    steady, changing = Faults(latency=1, loss=0.5, seed=7), Faults(seed=7)
    for _ in range(10):
        steady.draw(), changing.draw()
    changing.set(latency=1, loss=0.5)
    assert [steady.draw() for _ in range(50)] == [changing.draw() for _ in range(50)]


@asynccontextmanager
async def serving(faults: Faults) -> AsyncIterator[Callable[..., Awaitable[Reply | Exception]]]:
    """A function that asks an expert server with such faults, and returns the answer."""
    timers = Timers()
    server = ExpertServer(ServerConfig(("nop.0",), kind="nop"), faults, executor=InlineCompute(), timers=timers)

    async def ask(within: float = 1000.0) -> Reply | Exception:
        answers, answered = [], trio.Event()

        def respond(answer: Reply | Exception) -> None:
            answers.append(answer)
            answered.set()

        deadline = trio.current_time() + within
        call = Request("expert.forward", ExpertRequest("nop.0"), [torch.ones(1, 1)], Peer(b""), deadline)
        server.rpc_forward(call, respond)
        await answered.wait()
        [answer] = answers
        return answer

    async with trio.open_nursery() as nursery:
        nursery.start_soon(timers.run)
        await nursery.start(server.runtime.run)
        yield ask
        nursery.cancel_scope.cancel()


async def test_latency_delays_by_exactly_what_was_drawn(autojump_clock):
    twin = Faults(latency=3, seed=1)
    async with serving(Faults(latency=3, seed=1)) as ask:
        for _ in range(5):
            began = trio.current_time()
            assert isinstance(await ask(), Reply)
            assert trio.current_time() - began == pytest.approx(twin.draw()[0])


async def test_without_faults_no_time_passes(autojump_clock):
    async with serving(Faults()) as ask:
        assert isinstance(await ask(), Reply)
    assert trio.current_time() == 0


async def test_a_lost_request_is_ended_by_its_deadline_alone(autojump_clock):
    async with serving(Faults(loss=1.0)) as ask:
        assert isinstance(await ask(within=70), DeadlineExceeded)
    assert trio.current_time() == 70


async def test_a_change_counts_from_the_next_request_on(autojump_clock):
    faults, kinds = Faults(), []
    async with serving(faults) as ask:
        for loss in (0.0, 1.0, 0.0):
            faults.set(loss=loss)
            kinds.append(type(await ask()))
    assert kinds == [Reply, DeadlineExceeded, Reply]


@pytest.mark.parametrize("bad", [{"latency": -1}, {"latency": math.inf}, {"latency": math.nan}, {"loss": 1.1},
                                 {"loss": -0.1}, {"loss": math.nan}])  # fmt: skip
def test_impossible_settings_are_refused_by_name_and_change_nothing(bad):
    faults = Faults(latency=0.5, loss=0.25)
    with pytest.raises(ValueError, match=next(iter(bad))):
        faults.set(**({"latency": 2, "loss": 0.75} | bad))
    assert (faults.latency, faults.loss) == (0.5, 0.25)


def test_settings_that_are_not_named_stay():
    faults = Faults(latency=0.5, loss=0.25)
    faults.set(loss=0.5)
    assert repr(faults) == "Faults(latency=0.5, loss=0.5)"
