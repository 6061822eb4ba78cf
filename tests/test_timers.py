"""Timers run once, each at its time; a timer that was cancelled never runs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from labkit.simulation.virtual_clock import make_timers, run_in_virtual_time
from labkit.wire import timers as timers_module
from labkit.wire.timers import Timers


@asynccontextmanager
async def running() -> AsyncIterator[Timers]:
    timers = make_timers()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(timers.run)
        yield timers
        nursery.cancel_scope.cancel()


def in_virtual_time(function: Callable[[], Any]) -> None:
    run_in_virtual_time(function)


def under_a_mock_clock(function: Callable[[], Any]) -> None:
    trio.run(function, clock=trio.testing.MockClock(autojump_threshold=0))


@pytest.fixture(params=[in_virtual_time, under_a_mock_clock])
def run(request: pytest.FixtureRequest) -> Callable[[Callable[[], Any]], None]:
    runner: Callable[[Callable[[], Any]], None] = request.param
    return runner


def test_each_timer_runs_at_its_time_and_those_of_one_time_in_the_order_in_which_they_were_made(run):
    done: list[tuple[float, str]] = []

    async def main() -> None:
        start = trio.current_time()
        async with running() as timers:
            for seconds, name in ((2.0, "c"), (1.0, "a"), (1.0, "b"), (3.0, "d")):
                timers.after(seconds, lambda name=name: done.append((trio.current_time() - start, name)))
            await trio.sleep(5)

    run(main)
    assert done == [(1.0, "a"), (1.0, "b"), (2.0, "c"), (3.0, "d")]


def test_a_cancelled_timer_never_runs_and_holds_up_no_other(run):
    done: list[str] = []

    async def main() -> None:
        async with running() as timers:
            now = trio.current_time()
            first, second, third = (timers.at(now + at, done.append, str(at)) for at in (1, 2, 3))
            timers.cancel(first)
            timers.cancel(first)
            await trio.sleep(2.5)
            timers.cancel(second)  # too late
            assert done == ["2"]
            timers.cancel(third)
            await trio.sleep(5)

    run(main)
    assert done == ["2"]


def test_cancelled_timers_do_not_pile_up(run, monkeypatch):
    monkeypatch.setattr(timers_module, "MAX_CANCELLED", 10)

    async def main() -> None:
        async with running() as timers:
            now = trio.current_time()
            timers.at(now + 1, lambda: None)  # before all others, so that they are not at its head when cancelled
            for _ in range(1000):
                timers.cancel(timers.at(now + 100, lambda: None))
            assert len(timers._due) <= 22

    run(main)


def test_virtual_time_does_not_go_on_to_a_timer_that_was_cancelled():
    async def main() -> None:
        async with running() as timers:
            timers.cancel(timers.at(trio.current_time() + 1000, lambda: None))
            with trio.move_on_after(7):
                await trio.sleep_forever()
            assert trio.current_time() == 7

    run_in_virtual_time(main)
