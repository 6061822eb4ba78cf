"""Synchronous code in a simulation: threads that take turns with trio, so that only one runs at a time.

A forward pass through an MoE layer waits for the network in the middle of plain PyTorch code, so a trainer needs a
thread, as it does in `training/trainer_threads`. In lockstep it computes only while trio stands still, and trio goes on
only while the thread waits for a call. So no virtual time passes while a trainer computes, and a repeated run has the
same result.
"""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

import torch

from labkit.errors import SwarmClosed

T = TypeVar("T")


class Lockstep:
    """The `Entrance` of a simulation. Code started by `run` may use `call`."""

    def __init__(self) -> None:
        self._local = threading.local()
        self._closed = False

    async def run(self, function: Callable[..., T], *args: Any) -> T:
        """Run a synchronous function in a thread of its own; it may `call` async ones.

        If this is cancelled while the function waits for a call, that call and all further ones raise `SwarmClosed`.

        Args:
            function: The function, called with `args`.

        Returns:
            What the function returns; what it raises is raised.
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
        """Run an async function in trio's thread, wait, and return what it returns or raise what it raises."""
        self.check_open()
        thread: _Thread[Any] = self._local.thread
        value: T = thread.ask(function, args)
        return value

    def check_open(self) -> None:
        """Raise `SwarmClosed` if calls are refused."""
        if self._closed:
            raise SwarmClosed("the simulation is over")

    def close(self) -> None:
        """Refuse calls from now on."""
        self._closed = True


class _Thread(Generic[T]):
    """The thread of one function, and the call that it waits for."""

    def __init__(self, local: threading.local, function: Callable[..., T], args: tuple[Any, ...]) -> None:
        self.call: tuple[Callable[..., Awaitable[Any]], tuple[Any, ...]] | None = None  # None once it has ended
        self.value: Any = None  # what the call, or at the end the function, has returned
        self.error: BaseException | None = None  # or raised
        self._abandoned = False
        self._its_turn, self._our_turn = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(
            target=self._main, args=(local, function, args), name="labkit-lockstep", daemon=True
        )
        self._thread.start()

    def _main(self, local: threading.local, function: Callable[..., T], args: tuple[Any, ...]) -> None:
        local.thread = self
        torch.get_num_threads()  # otherwise a thread's first operation in torch would reset the number
        torch.set_num_threads(1)  # otherwise each of many threads would have helpers of its own
        torch.set_flush_denormal(True)
        self._its_turn.acquire()
        try:
            self.value = function(*args)
        except BaseException as error:
            self.error = error
        self.call = None
        self._our_turn.release()

    # ------------------------------------------------------------ in trio's thread

    def resume(self) -> None:
        """Let the thread go on until it makes a call or ends, while this one waits."""
        self._its_turn.release()
        try:
            self._our_turn.acquire()
        except BaseException:  # an interrupt, during what may be a long computation
            self._abandoned = True
            raise

    def abandon(self) -> None:
        """End the thread: its call and all further ones raise `SwarmClosed`."""
        self._abandoned = True
        while self.call is not None:
            self.resume()

    def result(self) -> T:
        """Returns what the function returned, or raises what it raised."""
        self._thread.join()
        if self.error is not None:
            raise self.error
        value: T = self.value
        return value

    # ------------------------------------------------------------ in its own thread

    def ask(self, function: Callable[..., Awaitable[Any]], args: tuple[Any, ...]) -> Any:
        """Hand a call, and the turn, over to trio's thread, and wait for the answer."""
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
