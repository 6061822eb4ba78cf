"""The portal, with a lab thread each: values, errors and interrupts cross it, and it always ends."""

from __future__ import annotations

import _thread
import itertools
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
import trio

from labkit.errors import SwarmClosed
from labkit.portal import Portal


@pytest.fixture
def portal() -> Iterator[Portal]:
    portal = Portal("test")
    yield portal
    portal.close()


async def double(number):
    await trio.lowlevel.checkpoint()
    return 2 * number


async def fail(error):
    await trio.lowlevel.checkpoint()
    raise error


async def fail_in_nurseries(error, depth):
    if depth == 0:
        await fail(error)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fail_in_nurseries, error, depth - 1)


async def wait_long(begun):
    begun.release()
    await trio.sleep_forever()


async def refuse_to_end(begun, released):
    begun.release()
    await trio.to_thread.run_sync(released.wait)  # which trio does not cancel


@contextmanager
def calling(portal, function, *args, callers=1):
    """Call in other threads; yields when the calls are under way."""
    begun = threading.Semaphore(0)
    with ThreadPoolExecutor(callers, thread_name_prefix="labkit-caller") as pool:
        calls = [pool.submit(portal.call, function, begun, *args) for _ in range(callers)]
        for _ in calls:
            assert begun.acquire(timeout=5)
        yield calls


@contextmanager
def interrupted_when(begun):
    """Interrupts the main thread, this one, as soon as `begun`."""

    def interrupt():
        assert begun.acquire(timeout=5)
        _thread.interrupt_main()

    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    with pytest.raises(KeyboardInterrupt):
        yield
    interrupter.join()


# ---------------------------------------------------------------- what crosses


def test_a_value_comes_back(portal):
    assert portal.call(double, 21) == 42


def test_an_error_comes_back_as_it_was_raised(portal):
    error = KeyError("no such expert")
    with pytest.raises(KeyError) as raised:
        portal.call(fail, error)
    assert raised.value is error


@pytest.mark.parametrize("depth", [1, 3])
def test_an_error_comes_out_of_the_groups_that_nurseries_put_around_it(portal, depth):
    with pytest.raises(KeyError, match="no such expert"):
        portal.call(fail_in_nurseries, KeyError("no such expert"), depth)


def test_two_errors_at_once_stay_a_group(portal):
    with pytest.raises(ExceptionGroup) as raised:
        portal.call(fail_in_nurseries, ExceptionGroup("two", [KeyError(1), ValueError(2)]), 1)
    assert {type(error) for error in raised.value.exceptions} == {KeyError, ValueError}


def test_the_traceback_is_short_and_speaks_of_one_error(portal):
    with pytest.raises(KeyError) as raised:
        portal.call(fail, KeyError("no such expert"))
    text = "".join(traceback.format_exception(raised.value))
    frames = [frame.name for frame in traceback.extract_tb(raised.value.__traceback__)]
    assert frames[1:] == ["call", "run", "fail"]  # the first is this test
    assert text.count("Traceback") == 1 and "Group" not in text


def test_many_threads_call_at_once(portal):
    with ThreadPoolExecutor(16, thread_name_prefix="labkit-caller") as callers:
        assert list(callers.map(lambda n: portal.call(double, n), range(500))) == [2 * n for n in range(500)]
    assert not portal._waiting


def test_a_started_task_is_ready_when_start_returns_and_lives_on(portal):
    async def collect(seen, *, task_status):
        send, receive = trio.open_memory_channel[int](0)
        task_status.started(send)
        async for number in receive:
            seen.append(number)

    seen: list[int] = []
    send = portal.start(collect, seen)
    portal.call(send.send, 1)
    portal.call(send.send, 2)
    assert seen == [1, 2]


def test_a_task_that_cannot_start_says_why_and_the_lab_thread_goes_on(portal):
    async def unable(*, task_status):
        raise OSError("address in use")

    with pytest.raises(OSError, match="address in use"):
        portal.start(unable)
    assert portal.call(double, 1) == 2


def test_the_lab_thread_uses_one_thread_of_torch_and_leaves_the_caller_its_own():
    async def threads():
        return torch.get_num_threads()

    torch.set_num_threads(4)
    portal = Portal("test")
    try:
        assert portal.call(threads) == 1 and torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(1)
        portal.close()


def test_a_call_from_inside_the_lab_thread_is_refused(portal):
    async def call_again():
        portal.call(double, 1)

    with pytest.raises(RuntimeError, match="await it instead"):
        portal.call(call_again)


# ---------------------------------------------------------------- interrupts


def test_an_interrupt_cancels_the_call_that_it_interrupts_and_nothing_else(portal):
    ended = []

    async def wait_and_tell(begun, name):
        try:
            await wait_long(begun)
        finally:
            ended.append(name)

    begun = threading.Semaphore(0)
    with calling(portal, wait_and_tell, "the other"):
        with interrupted_when(begun):
            portal.call(wait_and_tell, begun, "the interrupted")
        assert ended == ["the interrupted"]
        assert portal.call(double, 1) == 2
        portal.close()


def test_an_interrupt_does_not_wait_for_a_call_that_refuses_to_end(portal, monkeypatch):
    monkeypatch.setattr("labkit.portal._GRACE_PERIOD", 0.1)
    begun, released = threading.Semaphore(0), threading.Event()
    with interrupted_when(begun):
        portal.call(refuse_to_end, begun, released)
    assert portal.call(double, 1) == 2
    released.set()


def test_an_interrupt_at_any_moment_of_a_call_leaves_the_lab_thread_working(portal):
    for moment in itertools.count(1):
        try:
            with interrupted_at(moment):
                portal.call(double, 1)
        except KeyboardInterrupt:
            assert portal.call(double, 2) == 4
        else:
            break
    assert moment > 20
    assert portal.close()


@contextmanager
def interrupted_at(moment):
    """An interrupt at the `moment`-th point where Python looks for one: a function begins, or one in C has returned."""
    moments = itertools.count(1)

    def profile(frame, event, argument):
        if event in ("call", "c_return") and next(moments) == moment:
            raise KeyboardInterrupt

    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(None)


# ---------------------------------------------------------------- the end


def test_close_cancels_what_runs_and_its_callers_hear_of_it(portal):
    with calling(portal, wait_long, callers=2) as calls:
        assert portal.close()
        for call in calls:
            with pytest.raises(SwarmClosed, match="'test' is closed; start or join one again"):
                call.result(5)


def test_after_close_every_call_says_so_at_once(portal):
    assert portal.close() and portal.close()
    assert portal.closed
    for call in (portal.call, portal.start):
        with pytest.raises(SwarmClosed):
            call(double, 1)


def test_close_ends_in_time_also_when_a_task_refuses(portal):
    released = threading.Event()
    started = time.monotonic()
    with calling(portal, refuse_to_end, released) as [call]:
        assert not portal.close(timeout=0.1)
        with pytest.raises(SwarmClosed):
            call.result(5)
        with pytest.raises(SwarmClosed):
            portal.call(double, 1)
    assert time.monotonic() - started < 2
    released.set()
    assert portal.close()


def test_calls_while_it_closes_never_hang():
    for _ in range(30):
        portal = Portal("test")
        ready = threading.Barrier(5)

        def call_until_closed(portal=portal, ready=ready):
            ready.wait()
            with pytest.raises(SwarmClosed, match="is closed; start"):
                while True:
                    portal.call(double, 1)

        with ThreadPoolExecutor(4, thread_name_prefix="labkit-caller") as callers:
            calls = [callers.submit(call_until_closed) for _ in range(4)]
            ready.wait()
            assert portal.close()
            for call in calls:
                call.result(5)


def test_a_task_that_crashes_closes_the_swarm_and_every_caller_hears_the_reason(portal, caplog):
    async def crash_when(go, *, task_status):
        task_status.started()
        await go.wait()
        await fail_in_nurseries(ZeroDivisionError("in the lab"), depth=2)

    async def set_off(go):
        go.set()
        await trio.sleep_forever()

    go = trio.Event()
    portal.start(crash_when, go)
    with calling(portal, wait_long) as [call]:
        for ask in (lambda: portal.call(set_off, go), lambda: call.result(5), lambda: portal.call(double, 1)):
            with pytest.raises(SwarmClosed, match=r"after a failure: ZeroDivisionError\('in the lab'\)") as raised:
                ask()
            assert isinstance(raised.value.__cause__, ZeroDivisionError)
    assert portal.closed
    assert "the lab thread of the swarm 'test' failed" in caplog.text


def test_a_crash_leaves_nobody_waiting_for_a_task_that_refuses_to_end(portal, monkeypatch):
    monkeypatch.setattr("labkit.portal._GRACE_PERIOD", 0.1)

    async def crash(*, task_status):
        task_status.started()
        raise ZeroDivisionError

    released = threading.Event()
    with calling(portal, refuse_to_end, released) as [call]:
        portal.start(crash)
        with pytest.raises(SwarmClosed):
            portal.call(trio.sleep_forever)
        assert not portal.close(timeout=0)
        with pytest.raises(SwarmClosed):
            call.result(5)
    released.set()


def test_an_error_while_it_closes_does_not_hide_behind_the_cancellation(portal):
    async def fail_when_cancelled(begun):
        try:
            await wait_long(begun)
        finally:
            raise OSError("while saving")

    async def with_another(begun):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            nursery.start_soon(fail_when_cancelled, begun)

    with calling(portal, with_another) as [call]:
        assert portal.close()
        with pytest.raises(OSError, match="while saving"):
            call.result(5)


def test_a_lab_thread_that_cannot_start_says_why(monkeypatch):
    monkeypatch.setattr(trio, "run", lambda *_: fail_to_run())
    with pytest.raises(SwarmClosed, match="after a failure: OSError"):
        Portal("test")


def fail_to_run():
    raise OSError("too many open files")


def test_a_call_with_a_timeout_does_not_wait_for_a_lab_thread_that_is_blocked():
    portal, entered, release = Portal("blocked"), threading.Event(), threading.Event()

    async def block() -> None:
        entered.set()
        release.wait(30)  # what a listener of a user may do

    stuck = threading.Thread(target=portal.call, args=(block,))
    stuck.start()
    assert entered.wait(5)
    started = time.monotonic()
    with pytest.raises(SwarmClosed):
        portal.call(trio.lowlevel.checkpoint, timeout=0.2)
    assert time.monotonic() - started < 1
    release.set()
    stuck.join()
    assert portal.close()
