"""The portal: how a synchronous thread (a notebook cell, a trainer) calls the lab thread.

The lab thread runs one `trio.run`, and everything on the network lives there. Each call is a task in it with a cancel
scope of its own, so an interrupt (Ctrl-C, the kernel's stop button) ends the call that it interrupts and nothing else.
A batch crosses the portal on its way from `client.moe` to `client.dispatch`, and the answers cross it on the way back.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeVar

import torch
import trio

from labkit.errors import SwarmClosed
from labkit.forks import is_forked, this_process

logger = logging.getLogger(__name__)
T = TypeVar("T")
_GRACE_PERIOD = 1.0  # seconds that an interrupted call, or a lab thread that failed, may take to end
_INTERRUPT_INTERVAL = 0.2  # seconds of one wait, since on Windows, or from another thread, no interrupt ends a wait
_END_INTERVAL = 0.005  # seconds between two looks at whether the lab thread has ended
_LAB_ENDED = SwarmClosed("the lab thread ended")  # the answer to a call; its caller raises an error that says why


class Portal:
    """A lab thread, which runs from the construction of its portal to `close`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._process = this_process()
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
            started.wait(_GRACE_PERIOD)
            self.close()
            raise
        self._waiting.discard(started)
        torch.set_num_threads(torch_threads)  # what new threads begin with is what was set last, in any thread
        if failure is not None:
            raise self._closed_error()

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
            self._answer_all()

    async def _main(self, started: _Call) -> None:
        self._token = trio.lowlevel.current_trio_token()
        async with trio.open_nursery() as self._nursery:
            self._nursery.start_soon(trio.sleep_forever)
            self._nursery.start_soon(started.run)

    @property
    def closed(self) -> bool:
        """Whether calls are refused."""
        return self._closed or self.forked

    @property
    def forked(self) -> bool:
        """Whether this process was forked from the one that has the lab thread."""
        return is_forked(self._process)

    def check_open(self) -> None:
        """Raise `SwarmClosed`, with the reason, if calls are refused."""
        if self._closed or self.forked:
            raise self._closed_error()

    def check_process(self) -> None:
        """Raise `SwarmClosed` in a forked process; a closed swarm may still be looked at."""
        if self.forked:
            raise self._closed_error()

    def call(
        self, function: Callable[..., Awaitable[T]], *args: Any, timeout: float | None = None,
        meanwhile: Callable[[], object] | None = None,
    ) -> T:  # fmt: skip
        """Run an async function in the lab thread and wait for it.

        If this thread is interrupted meanwhile, the function is cancelled and the interrupt goes on.

        Args:
            function: The function to run. Its errors are raised here, unwrapped from the groups of nurseries.
            args: Its arguments.
            timeout: Seconds to wait for an answer. For closing only: a function should have deadlines of its own.
            meanwhile: Called now and then while this thread waits, to show how it goes.

        Returns:
            What the function returns.

        Raises:
            SwarmClosed: The lab thread does not run, ended before the function did, or gave no answer in time; or it
                runs in the process that this one was forked from.
        """
        self.check_process()
        if threading.current_thread() is self._thread:
            raise RuntimeError("a blocking call from inside the lab thread would wait for itself; await it instead")
        call = _Call(function, args)
        try:
            self._waiting.add(call)  # before `_closed` is read: `close` sets that first, and then answers these
            if self._closed:
                call.settle(error=_LAB_ENDED)
            else:
                self._run_soon(self._start_call, call)
            value, error = call.wait(timeout, meanwhile)
        except BaseException:
            self._run_soon(call.abandon)
            call.wait(_GRACE_PERIOD)  # if it cannot be cancelled, the interrupt goes on all the same
            raise
        finally:
            self._waiting.discard(call)
        try:
            if error is _LAB_ENDED:
                self._run_soon(call.abandon)
                raise self._closed_error(_GRACE_PERIOD if timeout is None else 0.0)
            if error is not None:
                raise error
            result: T = value
            return result
        finally:
            del error  # it refers to this frame, and this frame would refer to it

    def start(self, function: Callable[..., Awaitable[Any]], *args: Any) -> Any:
        """Start a long-lived task and wait until it is ready. If it fails later, the lab thread ends.

        Args:
            function: An async function that takes `task_status`.
            args: Its arguments.

        Returns:
            What the task passes to `task_status.started`.

        Raises:
            SwarmClosed: The lab thread does not run. What the task raises before it is ready is raised as well.
        """
        return self.call(self._start, function, args)

    async def _start(self, function: Callable[..., Awaitable[Any]], args: tuple[Any, ...]) -> Any:
        return await self._nursery.start(function, *args)

    def _start_call(self, call: _Call) -> None:
        try:
            self._nursery.start_soon(call.run)
            call.running = True
        except RuntimeError:  # the nursery has just ended
            call.settle(error=_LAB_ENDED)

    def _run_soon(self, function: Callable[..., Any], *args: Any) -> None:
        try:
            self._token.run_sync_soon(function, *args)
        except trio.RunFinishedError:
            pass  # the lab thread has ended, and has answered every call that waited
        except BaseException:
            # On Python 3.14 an interrupt just after `with lock` has acquired a lock leaves it acquired (cpython issue
            # 148874). With trio's lock in our hands no other thread could call, and the lab thread could not end.
            with suppress(RuntimeError, AttributeError):  # not acquired, or a trio that is made otherwise
                self._token._reentry_queue.lock.release()
            raise

    def _closed_error(self, grace_period: float = _GRACE_PERIOD) -> SwarmClosed:
        if self.forked:
            return SwarmClosed(
                f"the swarm {self.name!r} belongs to the process that this one was forked from, and cannot be used "
                f"here. Join it from here, with lk.Swarm.join(invite, name={self.name!r}), where invite is what "
                "swarm.invite() returns; or start this process by spawn instead of fork and join it there: "
                'multiprocessing.get_context("spawn"), DataLoader(…, multiprocessing_context="spawn")'
            )
        if not self._closed:
            self._wait_for_end(grace_period)  # something failed there, and at its end it is known what
        reason = f" after a failure: {self._failure!r}" if self._failure is not None else ""
        gone = SwarmClosed(f"the swarm {self.name!r} is closed{reason}; start or join one again")
        gone.__cause__ = self._failure
        return gone

    def _answer_all(self) -> None:
        for call in list(self._waiting):
            call.settle(error=_LAB_ENDED)

    def close(self, timeout: float = 2.0) -> bool:
        """Cancel everything in the lab thread and wait for its end.

        New calls raise `SwarmClosed` from now on, and calls that wait raise it at the latest when this returns.

        Args:
            timeout: Seconds to wait at most.

        Returns:
            Whether the lab thread has ended. A forked process has none, and leaves that of the original alone.
        """
        if self.forked:
            return True
        self._closed = True
        self._run_soon(lambda: self._nursery.cancel_scope.cancel())
        if threading.current_thread() is not self._thread:
            self._wait_for_end(timeout)
        self._answer_all()  # even if a task cannot be cancelled: nobody has to wait for it
        return self._ended

    def _wait_for_end(self, timeout: float) -> None:
        # Not `Thread.join`: if that is interrupted, Python before 3.13 takes the thread for dead (cpython issue 90882).
        deadline = time.monotonic() + timeout
        while not self._ended and time.monotonic() < deadline:
            time.sleep(_END_INTERVAL)


class _Call:
    """A call from another thread to the lab thread. The first answer counts.

    The threads share only a `SimpleQueue`, whose operations no interrupt can leave half done. A `Future` would not do:
    its lock is written in Python, and an interrupt there would break the lab thread.
    """

    def __init__(self, function: Callable[..., Awaitable[Any]], args: tuple[Any, ...]) -> None:
        self.running = False  # whether the call has a task in the lab thread
        self._scope = trio.CancelScope()
        self._function = function
        self._args = args
        self._answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    async def run(self) -> None:
        """Run in the lab thread. Raises nothing but the cancellation that comes with the lab thread's end."""
        try:
            with self._scope:
                answer = self._function(*self._args)
                del self._function, self._args  # or this thread might hold a batch when its caller goes on already
                self.settle(await answer)
        except trio.Cancelled:
            self.settle(error=_LAB_ENDED)
            raise
        except BaseException as error:
            self.settle(error=_without_cancelled(error))
        else:
            if self._scope.cancelled_caught:
                self.settle(error=SwarmClosed("the call was interrupted"))
        finally:
            self.running = False

    def abandon(self) -> None:
        """Cancel the call; runs in the lab thread. If it does not run, this answers it at once."""
        self._scope.cancel()
        if not self.running:
            self.settle(error=_LAB_ENDED)

    def settle(self, value: Any = None, *, error: BaseException | None = None) -> None:
        """Answer the call with a value or an error."""
        self._answers.put((value, error))

    def wait(
        self, timeout: float | None = None, meanwhile: Callable[[], object] | None = None
    ) -> tuple[Any, BaseException | None]:
        """Wait for the answer: what was returned, and what was raised.

        If there is none within `timeout` seconds, the answer is that the lab thread has ended. By default this waits
        for as long as it takes.
        """
        while True:
            try:
                return self._answers.get(timeout=_INTERRUPT_INTERVAL if timeout is None else timeout)
            except queue.Empty:
                if timeout is not None:
                    return None, _LAB_ENDED
                if meanwhile is not None:
                    meanwhile()


def unwrap(error: BaseException) -> BaseException:
    """The error inside a group of one error. Nurseries wrap what they raise; a person wants to read what happened."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def _without_cancelled(error: BaseException) -> BaseException:
    """What went wrong in a call, apart from its cancellation when the lab thread ended."""
    if isinstance(error, BaseExceptionGroup):
        rest = error.split(trio.Cancelled)[1]
        return _LAB_ENDED if rest is None else unwrap(rest)
    return error
