"""The portal: how a synchronous thread (a notebook cell, a trainer) calls the lab thread.

The lab thread runs one `trio.run`; everything on the network lives there. A call is a task in it with a cancel scope of
its own, so an interrupt (Ctrl-C, the kernel's stop button) ends the call that it interrupts and nothing else.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, wait
from typing import Any, TypeVar

import trio

from labkit.errors import SwarmClosed

T = TypeVar("T")
_CANCEL_PATIENCE = 1.0  # seconds that an interrupted call may take to end
_POLL = 0.2 if os.name == "nt" else None  # seconds; on Windows a wait without end cannot be interrupted


class Portal:
    """A lab thread of its own, from construction to `close`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._started = threading.Event()
        self._failure: BaseException | None = None
        self._waiting: set[Future[Any]] = set()
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=f"labkit-lab-{name}", daemon=True)
        self._thread.start()
        self._started.wait()

    def _run(self) -> None:
        try:
            trio.run(self._main)
        except BaseException as error:
            self._failure = error
        finally:
            with self._lock:
                self._closed = True
                waiting, self._waiting = self._waiting, set()
            for future in waiting:
                if not future.done():
                    future.set_exception(self._gone())
            self._started.set()

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        async with trio.open_nursery() as self._nursery:
            self._nursery.start_soon(trio.sleep_forever)
            self._started.set()

    @property
    def closed(self) -> bool:
        """Whether calls are refused."""
        return self._closed

    def _gone(self) -> SwarmClosed:
        reason = f" after a failure: {self._failure!r}" if self._failure is not None else ""
        return SwarmClosed(f"the swarm {self.name!r} is closed{reason}; start or join one again")

    def call(self, function: Callable[..., Awaitable[T]], *args: Any) -> T:
        """Run an async function in the lab thread and wait for what it returns or raises.

        If this thread is interrupted meanwhile, the function is cancelled and the interrupt goes on. Raises
        `SwarmClosed` if the lab thread is not running, or stops before the function is done.
        """
        if threading.current_thread() is self._thread:
            raise RuntimeError("a blocking call from inside the lab thread would wait for itself; await it instead")
        future: Future[T] = Future()
        scope = trio.CancelScope()
        self._submit(future, self._serve, function, args, future, scope)
        try:
            while not future.done():
                wait([future], _POLL)
            return future.result()
        except (KeyboardInterrupt, SystemExit):
            self._soon(scope.cancel)
            wait([future], _CANCEL_PATIENCE)  # if it does not let itself be cancelled, the interrupt goes first
            raise
        finally:
            with self._lock:
                self._waiting.discard(future)

    def start(self, function: Callable[..., Awaitable[Any]], *args: Any) -> Any:
        """Start a long-lived task and wait until it is ready; returns what it passed to `task_status.started`."""
        return self.call(self._start, function, args)

    async def _start(self, function: Callable[..., Awaitable[Any]], args: tuple[Any, ...]) -> Any:
        return await self._nursery.start(function, *args)

    async def _serve(
        self, function: Callable[..., Awaitable[T]], args: tuple[Any, ...], future: Future[T], scope: trio.CancelScope
    ) -> None:
        try:
            with scope:
                result = await function(*args)
        except trio.Cancelled:
            self._settle(future, self._gone())
            raise
        except BaseException as error:
            self._settle(future, unwrap(error))
        else:
            if scope.cancelled_caught:
                self._settle(future, SwarmClosed("the call was interrupted"))
            else:
                with self._lock:
                    if not future.done():
                        future.set_result(result)

    def _settle(self, future: Future[Any], error: BaseException) -> None:
        with self._lock:
            if not future.done():
                future.set_exception(error)

    def _submit(self, future: Future[Any], function: Callable[..., Awaitable[Any]], *args: Any) -> None:
        with self._lock:
            if self._closed:
                raise self._gone()
            self._waiting.add(future)
        self._soon(self._nursery.start_soon, function, *args)

    def _soon(self, function: Callable[..., Any], *args: Any) -> None:
        try:
            self._token.run_sync_soon(function, *args)
        except trio.RunFinishedError:
            pass  # every waiting call has been failed

    def close(self, timeout: float = 2.0) -> bool:
        """Cancel everything in the lab thread and wait for its end, at most `timeout` seconds. Returns whether it ended."""
        self._soon(lambda: self._nursery.cancel_scope.cancel())
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)
        return not self._thread.is_alive()


def unwrap(error: BaseException) -> BaseException:
    """The one error in a group of one: nurseries wrap what they raise, and a person wants to read what happened."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
