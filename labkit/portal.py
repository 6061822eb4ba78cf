"""The portal: how a synchronous thread (a notebook cell, a trainer) calls the lab thread.

The lab thread runs one `trio.run`; everything on the network lives there. A call is a task in it with a cancel scope of
its own, so an interrupt (Ctrl-C, the kernel's stop button) ends the call that it interrupts and nothing else.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import torch
import trio

from labkit.errors import SwarmClosed

logger = logging.getLogger(__name__)
T = TypeVar("T")
_PATIENCE = 1.0  # seconds that an interrupted call, or a lab thread that failed, may take to end
_POLL = 0.2  # seconds; not every interrupt ends a wait: none does on Windows, nor one that another thread sends
_END_POLL = 0.005  # seconds
_GONE = SwarmClosed("the lab thread ended")  # an answer; the caller, who knows why by then, raises another


class Portal:
    """A lab thread of its own, from construction to `close`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._failure: BaseException | None = None
        self._waiting: set[_Call] = set()
        self._closed = False
        self._ended = False
        started = _Call(trio.lowlevel.checkpoint, ())
        self._waiting.add(started)
        self._thread = threading.Thread(target=self._run, args=(started,), name=f"labkit-lab-{name}", daemon=True)
        torch_threads = torch.get_num_threads()
        self._thread.start()
        try:
            _, failure = started.wait()
        except BaseException:
            started.wait(_PATIENCE)
            self.close()
            raise
        self._waiting.discard(started)
        torch.set_num_threads(torch_threads)  # what new threads begin with is what was set last, in any thread
        if failure is not None:
            raise self._gone()

    def _run(self, started: _Call) -> None:
        # The lab thread moves rows about; to wake torch's other threads for that takes fifty times as long as the work.
        torch.get_num_threads()  # or a thread's first operation in torch would set the number anew
        torch.set_num_threads(1)
        try:
            trio.run(self._main, started)
        except BaseException as error:
            self._failure = unwrap(error)
            logger.error("the lab thread of the swarm %r failed", self.name, exc_info=self._failure)
        finally:
            self._closed = self._ended = True
            self._dismiss()

    async def _main(self, started: _Call) -> None:
        self._token = trio.lowlevel.current_trio_token()
        async with trio.open_nursery() as self._nursery:
            self._nursery.start_soon(trio.sleep_forever)
            self._nursery.start_soon(started.run)

    @property
    def closed(self) -> bool:
        """Whether calls are refused."""
        return self._closed

    def check_open(self) -> None:
        """Raises `SwarmClosed`, with the reason, if calls are refused."""
        if self._closed:
            raise self._gone()

    def call(self, function: Callable[..., Awaitable[T]], *args: Any, timeout: float | None = None) -> T:
        """Run an async function in the lab thread and wait for what it returns or raises.

        If this thread is interrupted meanwhile, the function is cancelled and the interrupt goes on. Raises
        `SwarmClosed` if the lab thread is not running, stops before the function is done, or has given no answer after
        `timeout` seconds (which is for closing: whatever has deadlines of its own needs none here).
        """
        if threading.current_thread() is self._thread:
            raise RuntimeError("a blocking call from inside the lab thread would wait for itself; await it instead")
        call = _Call(function, args)
        try:
            self._waiting.add(call)  # and then a look at `_closed`; who closes sets that, and then answers those here
            if self._closed:
                call.settle(error=_GONE)
            else:
                self._soon(self._begin, call)
            value, error = call.wait(timeout)
        except BaseException:
            self._soon(call.abandon)
            call.wait(_PATIENCE)  # if it does not let itself be cancelled, the interrupt goes first
            raise
        finally:
            self._waiting.discard(call)
        try:
            if error is _GONE:
                self._soon(call.abandon)
                raise self._gone(_PATIENCE if timeout is None else 0.0)
            if error is not None:
                raise error
            result: T = value
            return result
        finally:
            del error  # or it would hold this frame, and this frame it

    def start(self, function: Callable[..., Awaitable[Any]], *args: Any) -> Any:
        """Start a long-lived task and wait until it is ready; returns what it passed to `task_status.started`.

        If it fails later, the lab thread ends.
        """
        return self.call(self._start, function, args)

    async def _start(self, function: Callable[..., Awaitable[Any]], args: tuple[Any, ...]) -> Any:
        return await self._nursery.start(function, *args)

    def _begin(self, call: _Call) -> None:
        try:
            self._nursery.start_soon(call.run)
            call.under_way = True
        except RuntimeError:  # the nursery has just ended
            call.settle(error=_GONE)

    def _soon(self, function: Callable[..., Any], *args: Any) -> None:
        try:
            self._token.run_sync_soon(function, *args)
        except trio.RunFinishedError:
            pass  # every call that waits has been answered

    def _gone(self, patience: float = _PATIENCE) -> SwarmClosed:
        if not self._closed:
            self._wait_for_end(patience)  # something failed there; what, is known at its end
        reason = f" after a failure: {self._failure!r}" if self._failure is not None else ""
        gone = SwarmClosed(f"the swarm {self.name!r} is closed{reason}; start or join one again")
        gone.__cause__ = self._failure
        return gone

    def _dismiss(self) -> None:
        for call in list(self._waiting):
            call.settle(error=_GONE)

    def close(self, timeout: float = 2.0) -> bool:
        """Cancel everything in the lab thread and wait at most `timeout` seconds for its end. Returns whether it came.

        Calls raise `SwarmClosed` from now on, those under way at the latest when this returns.
        """
        self._closed = True
        self._soon(lambda: self._nursery.cancel_scope.cancel())
        if threading.current_thread() is not self._thread:
            self._wait_for_end(timeout)
        self._dismiss()  # if a task there does not let itself be cancelled, nobody has to wait for it
        return self._ended

    def _wait_for_end(self, timeout: float) -> None:
        # Not `Thread.join`: if that is interrupted, Python before 3.13 takes the thread for dead (cpython issue 90882).
        deadline = time.monotonic() + timeout
        while not self._ended and time.monotonic() < deadline:
            time.sleep(_END_POLL)


class _Call:
    """A call from one thread to the other. The first answer counts.

    Threads meet only in a `SimpleQueue`, which an interrupt cannot leave half-way; a `Future`, whose lock is written in
    Python, it can, and then the lab thread would be the one to stumble.
    """

    def __init__(self, function: Callable[..., Awaitable[Any]], args: tuple[Any, ...]) -> None:
        self.under_way = False  # whether it has a task in the lab thread
        self._scope = trio.CancelScope()
        self._function = function
        self._args = args
        self._answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    async def run(self) -> None:
        """The task in the lab thread. It raises nothing but its cancellation by the lab thread's end."""
        try:
            with self._scope:
                answer = self._function(*self._args)
                del self._function, self._args  # or this thread might hold a batch when its caller goes on already
                self.settle(await answer)
        except trio.Cancelled:
            self.settle(error=_GONE)
            raise
        except BaseException as error:
            self.settle(error=_without_cancelled(error))
        else:
            if self._scope.cancelled_caught:
                self.settle(error=SwarmClosed("the call was interrupted"))
        finally:
            self.under_way = False

    def abandon(self) -> None:
        """Cancel it, in the lab thread. It has an answer soon, if it ended long ago, or never began, at once."""
        self._scope.cancel()
        if not self.under_way:
            self.settle(error=_GONE)

    def settle(self, value: Any = None, *, error: BaseException | None = None) -> None:
        """Answer it."""
        self._answers.put((value, error))

    def wait(self, timeout: float | None = None) -> tuple[Any, BaseException | None]:
        """What was returned or raised. Without an answer within `timeout` seconds (by default: whenever it comes), as
        if the lab thread had ended."""
        while True:
            try:
                return self._answers.get(timeout=_POLL if timeout is None else timeout)
            except queue.Empty:
                if timeout is not None:
                    return None, _GONE


def unwrap(error: BaseException) -> BaseException:
    """The one error in a group of one: nurseries wrap what they raise, and a person wants to read what happened."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def _without_cancelled(error: BaseException) -> BaseException:
    """What went wrong in a call while the lab thread was ending."""
    if isinstance(error, BaseExceptionGroup):
        rest = error.split(trio.Cancelled)[1]
        return _GONE if rest is None else unwrap(rest)
    return error
