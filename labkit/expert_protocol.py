"""The words of a call to an expert: method names, bodies and answers. Both wings import it, and neither the other.

On a batch's way: `client/expert_client` sends an `ExpertRequest` with the tensors, `server/server` answers with an
`ExpertReply` and tensors. The words go over the wire as short lists, and whoever reads them checks them: an answer with
numbers that cannot be is a `BadReply`.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

Direction = Literal["forward", "backward"]

FORWARD = "expert.forward"  # inputs -> output
BACKWARD = "expert.backward"  # inputs and the gradient of the output -> gradients of the inputs; trains the expert
STATISTICS = "server.statistics"  # nothing -> `server.statistics.ServerStatistics`
METHODS: dict[Direction, str] = {"forward": FORWARD, "backward": BACKWARD}

# The numbers come from a stranger, so all of them are bounded. (NaN is not >= 0.)
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e9)]


class ExpertRequest(msgspec.Struct, array_like=True):
    """The body of a call to an expert.

    The tensors beside it, each [rows, ...], are the expert's inputs and, in a backward call, the gradient of its output
    behind them.

    Args:
        uid: The expert that is called.
        forward_updates: In a backward call, the `updates` with which the forward call of the same rows was answered, if
            known. The server tells from it how stale the gradient is.
    """

    uid: str
    forward_updates: Count | None = None


class ExpertReply(msgspec.Struct, array_like=True):
    """The body of an expert's answer.

    The tensors beside it are the output [rows, ...] or, for a backward call, the gradients of the floating-point inputs
    in their order.

    Args:
        queue_seconds: How long the request waited for its batch.
        compute_seconds: How long the whole batch took.
        updates: Optimizer steps that the expert has made by now.
    """

    queue_seconds: Seconds
    compute_seconds: Seconds
    updates: Count
