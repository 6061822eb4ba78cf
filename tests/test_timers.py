"""Timers run once, each at its time; a timer that was cancelled never runs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from labkit.simulation.virtual_clock import make_timers, run_in_virtual_time
from labkit.wire import timers
from labkit.wire.timers import Timers


@asynccontextmanager
async def running() -> AsyncIterator[Timers]:
    plan = make_timers()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(plan.run)
        yield plan
        nursery.cancel_scope.cancel()


def in_virtual_time(function: Callable[[], Any]) -> None:
    run_in_virtual_time(function)


def under_a_mock_clock(function: Callable[[], Any]) -> None:
    trio.run(function, clock=trio.testing.MockClock(autojump_threshold=0))


@pytest.fixture(params=[in_virtual_time, under_a_mock_clock])
def run(request: pytest.FixtureRequest) -> Callable[[Callable[[], Any]], None]:
    runner: Callable[[Callable[[], Any]], None] = request.param
    return runner


def test_each_thing_is_done_at_its_time_in_the_order_in_which_it_was_asked_for(run):
    done: list[tuple[float, str]] = []

    async def main() -> None:
        start = trio.current_time()
        async with running() as plan:
            for seconds, name in ((2.0, "c"), (1.0, "a"), (1.0, "b"), (3.0, "d")):
                plan.after(seconds, lambda name=name: done.append((trio.current_time() - start, name)))
            await trio.sleep(5)

    run(main)
    assert done == [(1.0, "a"), (1.0, "b"), (2.0, "c"), (3.0, "d")]


def test_what_is_called_off_is_never_done_and_holds_up_nothing(run):
    done: list[str] = []

    async def main() -> None:
        async with running() as plan:
            now = trio.current_time()
            first, second, third = (plan.at(now + at, done.append, str(at)) for at in (1, 2, 3))
            plan.cancel(first)
            plan.cancel(first)
            await trio.sleep(2.5)
            plan.cancel(second)  # too late
            assert done == ["2"]
            plan.cancel(third)
            await trio.sleep(5)

    run(main)
    assert done == ["2"]


def test_what_is_called_off_does_not_pile_up(run, monkeypatch):
    monkeypatch.setattr(timers, "MAX_CANCELLED", 10)

    async def main() -> None:
        async with running() as plan:
            now = trio.current_time()
            plan.at(now + 1, lambda: None)  # before all others, so that they are not at its head when called off
            for _ in range(1000):
                plan.cancel(plan.at(now + 100, lambda: None))
            assert len(plan._due) <= 22

    run(main)


def test_time_does_not_go_on_to_what_was_called_off():
    async def main() -> None:
        async with running() as plan:
            plan.cancel(plan.at(trio.current_time() + 1000, lambda: None))
            with trio.move_on_after(7):
                await trio.sleep_forever()
            assert trio.current_time() == 7

    run_in_virtual_time(main)
