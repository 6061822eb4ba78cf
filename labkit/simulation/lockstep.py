"""Synchronous code in a simulation: threads that take turns with trio, one at a time.

A forward pass through an MoE layer waits for the network in the middle of plain PyTorch code, so a trainer is a thread
here too, as it is in `run`. But it computes only while trio stands still, and trio goes on only while it waits for a
call: no virtual time passes while it computes, and a run is the same twice.
"""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

import torch

from labkit.errors import SwarmClosed

T = TypeVar("T")


class Lockstep:
    """The `Entrance` of a simulation: `call` is for code that `run` runs."""

    def __init__(self) -> None:
        self._local = threading.local()
        self._closed = False

    async def run(self, function: Callable[..., T], *args: Any) -> T:
        """Run a synchronous function, which may `call` async ones, and return what it returns, or raise what it raises.

        If this is cancelled while it waits for a call, the call raises `SwarmClosed`, and so does every further one.
        """
        thread = _Thread(self._local, function, args)
        thread.resume()
        while thread.call is not None:
            wanted, arguments = thread.call
            try:
                thread.value = await wanted(*arguments)
            except Exception as error:
                thread.error = error
            except BaseException:  # cancelled, perhaps within a nursery of its own, or interrupted
                thread.abandon()
                raise
            thread.resume()
        return thread.result()

    def call(self, function: Callable[..., Awaitable[T]], *args: Any) -> T:
        """Run an async function in the thread of trio and wait for what it returns or raises."""
        self.check_open()
        thread: _Thread[Any] = self._local.thread
        value: T = thread.ask(function, args)
        return value

    def check_open(self) -> None:
        """Raises `SwarmClosed` if calls are refused."""
        if self._closed:
            raise SwarmClosed("the simulation is over")

    def close(self) -> None:
        """Refuse calls from now on."""
        self._closed = True


class _Thread(Generic[T]):
    """One function's thread. `call`: what it waits for, None when it has ended; `value`, `error`: the answer."""

    def __init__(self, local: threading.local, function: Callable[..., T], args: tuple[Any, ...]) -> None:
        self.call: tuple[Callable[..., Awaitable[Any]], tuple[Any, ...]] | None = None
        self.value: Any = None
        self.error: BaseException | None = None
        self._abandoned = False
        self._its_turn, self._our_turn = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(
            target=self._main, args=(local, function, args), name="labkit-lockstep", daemon=True
        )
        self._thread.start()

    def _main(self, local: threading.local, function: Callable[..., T], args: tuple[Any, ...]) -> None:
        local.thread = self
        torch.get_num_threads()  # or a thread's first operation in torch would set the number anew
        torch.set_num_threads(1)  # each thread would have helpers of its own otherwise, and there are many
        torch.set_flush_denormal(True)
        self._its_turn.acquire()
        try:
            self.value = function(*args)
        except BaseException as error:
            self.error = error
        self.call = None
        self._our_turn.release()

    # ------------------------------------------------------------ in the thread of trio

    def resume(self) -> None:
        """Let the thread go on until it calls or ends, while this one stands still."""
        self._its_turn.release()
        try:
            self._our_turn.acquire()
        except BaseException:  # an interrupt; it may compute for long
            self._abandoned = True
            raise

    def abandon(self) -> None:
        """End it: it is told so by whatever it calls."""
        self._abandoned = True
        while self.call is not None:
            self.resume()

    def result(self) -> T:
        """What it has returned; or raises what it has raised."""
        self._thread.join()
        if self.error is not None:
            raise self.error
        value: T = self.value
        return value

    # ------------------------------------------------------------ in its own

    def ask(self, function: Callable[..., Awaitable[Any]], args: tuple[Any, ...]) -> Any:
        """Hand a call over, and its turn with it."""
        if self._abandoned:
            raise SwarmClosed("the simulation was ended")
        self.call, self.value, self.error = (function, args), None, None
        self._our_turn.release()
        self._its_turn.acquire()
        if self._abandoned:
            raise SwarmClosed("the simulation was ended")
        value, error = self.value, self.error
        self.value = self.error = None
        if error is not None:
            raise error
        return value
