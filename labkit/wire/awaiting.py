"""Awaiting what calls back: the way from code that has a task to code that needs none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import trio

T = TypeVar("T")


class UnderWay(Protocol):
    """Something that calls back when it is done."""

    def cancel(self) -> None:
        """Nobody waits for it any more: it calls nobody back. Does nothing when it is done."""


async def outcome_of(begin: Callable[[Callable[[T | Exception], None]], UnderWay]) -> T:
    """Begin something and wait until it calls back. Returns what it says, or raises it, if that is an error.

    `begin` is given what to call with the outcome: once, in this thread, perhaps before it returns.
    """
    await trio.lowlevel.checkpoint_if_cancelled()
    task, waits = trio.lowlevel.current_task(), False
    outcome: list[T | Exception] = []

    def done(what: T | Exception) -> None:
        outcome.append(what)
        if waits:
            trio.lowlevel.reschedule(task)

    under_way = begin(done)
    if outcome:
        await trio.lowlevel.cancel_shielded_checkpoint()
    else:
        waits = True

        def abort(_: object) -> trio.lowlevel.Abort:
            under_way.cancel()
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)
    what = outcome.pop()  # or the frame of an error would hold the error
    if isinstance(what, Exception):
        raise what
    return what
