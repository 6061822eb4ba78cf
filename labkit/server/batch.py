"""One batch of an expert server, on the compute thread: several requests become one pass of the expert, and part again.

On a batch's way between `server/runtime`, which gathered the requests, and `server/backend`, which computes.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from labkit.errors import NonFiniteTensor, RemoteFailure, RPCError
from labkit.expert_protocol import Direction
from labkit.server.backend import ExpertBackend
from labkit.server.parts import finish
from labkit.server.task_pool import PoolKey, Task
from labkit.server.user_code import describe_error
from labkit.server.validation import NO_OPTIONS, CallOptions, check_finite, rows_not_finite

logger = logging.getLogger(__name__)

MAX_ERROR_LENGTH = 500  # characters of an error that are sent to the caller


class DeviceLost(RuntimeError):
    """The device cannot compute anything any more until its process ends. The whole server has to end."""


Answers = tuple[list[list[Tensor] | RPCError], int]  # of a batch: see `compute_batch`


def compute_batch(
    backend: ExpertBackend,
    direction: Direction,
    requests: list[Sequence[Tensor]],
    forward_updates: Sequence[int | None] | None = None,
    options: CallOptions = NO_OPTIONS,
) -> Answers:
    """Compute one batch.

    1. Refuse the requests with NaN or infinity, alone. (Where finite numbers overflow, only these rows are not finite
       in the answer.)
    2. Merge the others: one pass, and for a backward pass one optimizer step.
    3. If that fails, compute them one by one, so that only the guilty fail. (A failed pass has changed nothing.)

    Args:
        backend: The expert.
        direction: "forward" or "backward".
        requests: The tensors of each request, [rows, ...]; all requests have the same schema.
        forward_updates: For a backward pass, the expert's updates at each request's forward pass, where the caller said
            so.
        options: What else the requests say, all of them the same.

    Returns:
        For each request, in order, its tensors or its own error; and the expert's updates after the batch.

    Raises:
        DeviceLost: A pass failed, and the device with it.
    """
    return finish(compute_batch_in_parts(backend, direction, requests, forward_updates, options))


def compute_batch_in_parts(
    backend: ExpertBackend,
    direction: Direction,
    requests: list[Sequence[Tensor]],
    forward_updates: Sequence[int | None] | None = None,
    options: CallOptions = NO_OPTIONS,
) -> Generator[None, None, Answers]:
    """As `compute_batch`, with pauses where the expert makes them: see `ExpertBackend.compute_in_parts`."""
    answers: list[list[Tensor] | RPCError] = [RemoteFailure("not computed")] * len(requests)
    # 1.
    good = []
    for i, tensors in enumerate(requests):
        try:
            check_finite(tensors)
            good.append(i)
        except Exception as error:
            answers[i] = _translate(error, backend, direction)
    # 2.
    if len(good) > 1:
        try:
            merged = [torch.cat(column) for column in zip(*(requests[i] for i in good), strict=True)]
            updates = _mean_forward_updates(requests, forward_updates, good)
            results = yield from backend.compute_in_parts(direction, merged, updates, options)
        except Exception as error:
            _check_device(backend.config.device, error)
            logger.debug("a merged batch of %s failed (%s); its requests run one by one", backend.uid, error)
        else:
            sizes = [requests[i][0].shape[0] for i in good]
            for i, *parts in zip(good, *(torch.split(result, sizes) for result in results), strict=True):
                answers[i] = _unless_all_overflowed(parts, backend) if backend.overflowed else parts
            return answers, backend.updates
    # 3. (Or there was only one, which is neither copied nor merged.)
    for i in good:
        try:
            updates = _mean_forward_updates(requests, forward_updates, [i])
            answers[i] = yield from backend.compute_in_parts(direction, requests[i], updates, options)
        except Exception as error:
            _check_device(backend.config.device, error)
            answers[i] = _translate(error, backend, direction)
    return answers, backend.updates


PAUSED = object()  # what a batch's `step` returns between two parts


@dataclass(eq=False, slots=True)
class RunningBatch:
    """Requests that are computed together, or one large request that is computed in parts.

    Args:
        tasks: The requests.
        parts: Computes them.
        started: When the first part was begun, on trio's clock.
        rows: Of a part, at most.
        seconds: How long the parts took so far.
        ending: Why no further part is to be computed.
    """

    tasks: list[Task[Any]]
    parts: Generator[None, None, Answers]
    started: float
    rows: int
    seconds: float = 0.0
    ending: RPCError | None = None

    @property
    def key(self) -> PoolKey:
        """What its requests have in common."""
        return self.tasks[0].key

    def blocks(self, key: PoolKey) -> bool:
        """Whether such requests have to wait for the rest of this batch, since one of both may change the expert."""
        return key.uid == self.key.uid and "backward" in (key.direction, self.key.direction)

    def step(self) -> Any:
        """Compute the next part, on the compute thread. Returns `PAUSED`, or the answers after the last part."""
        try:
            if self.ending is None:
                next(self.parts)
            else:
                self.parts.throw(self.ending)
        except StopIteration as end:
            return end.value
        return PAUSED

    def fail(self, error: Exception) -> None:
        """Give all its requests the same error."""
        for task in self.tasks:
            task.on_result(error)


def _unless_all_overflowed(tensors: list[Tensor], backend: ExpertBackend) -> list[Tensor] | RPCError:
    """The answer to one of several requests, in whose pass some rows overflowed; an error if all of its own did."""
    bad = rows_not_finite(tensors)
    if bad is None or not bad.all():
        return tensors
    return NonFiniteTensor(f"finite inputs gave expert {backend.uid} NaN or infinity in all {len(bad)} rows")


def _mean_forward_updates(
    requests: list[Sequence[Tensor]], forward_updates: Sequence[int | None] | None, places: Sequence[int]
) -> float | None:
    """The mean of the forward updates over the rows of the requests at `places`, as far as they are known."""
    if forward_updates is None:
        return None
    known = [(updates, len(requests[i][0])) for i in places if (updates := forward_updates[i]) is not None]
    return sum(updates * rows for updates, rows in known) / sum(rows for _, rows in known) if known else None


def _translate(error: Exception, backend: ExpertBackend, direction: str) -> RPCError:
    """The error to send to the caller. A new one, since a traceback would keep the batch's tensors alive."""
    if isinstance(error, RPCError):
        return type(error)(*error.args)
    logger.warning("expert %s failed in a %s pass", backend.uid, direction, exc_info=error)
    return RemoteFailure(f"the code of expert {backend.uid} failed in a {direction} pass: {describe_error(error)}")


def _check_device(device: str, error: Exception) -> None:
    """Raise `DeviceLost` if the device no longer computes 1 + 1, as after an assertion that failed in a CUDA kernel.

    The device isn't asked in the usual cases: memory has run out, or the pass was refused. It is asked about a refusal
    that was made of another error, which may be the device's. A device that has no memory for this sum is not lost.
    """
    if isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RPCError) and error.__cause__ is None):
        return
    try:
        torch.ones((), device=device).add(1).item()
    except torch.OutOfMemoryError:
        pass
    except RuntimeError as failure:
        if "out of memory" not in str(failure):  # a driver's own, which torch raises as another class
            said = f"{device} computes nothing any more, after {type(error).__name__}: {error}"
            raise DeviceLost(said[:MAX_ERROR_LENGTH]) from None
