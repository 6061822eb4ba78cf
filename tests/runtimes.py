"""Requests to a runtime, as an expert server makes them, and the wait for their answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from labkit.server.runtime import QueuedRequest, Result, Runtime
from labkit.wire.transport import await_callback


class Submission:
    """A request that someone waits for."""

    def __init__(self, runtime: Runtime, answer: Callable[[Result | Exception], None]) -> None:
        self._runtime = runtime
        self._answer: Callable[[Result | Exception], None] | None = answer
        self.request: QueuedRequest | None = None

    def on_result(self, result: Result | Exception) -> None:
        if self._answer is not None:
            self._answer(result)

    def cancel(self) -> None:
        self._answer = None
        if self.request is not None:
            self._runtime.discard(self.request)


async def submit(
    runtime: Runtime,
    uid: str,
    direction: str,
    tensors: Sequence[Tensor],
    deadline: float,
    forward_updates: int | None = None,
) -> Result:
    """`put` a request, and wait for the answer. When the wait is cancelled, the request is taken out again."""

    def begin(answer: Callable[[Result | Exception], None]) -> Submission:
        submission = Submission(runtime, answer)
        submission.request = runtime.put(uid, direction, tensors, deadline, submission.on_result, forward_updates)
        return submission

    return await await_callback(begin)
