"""How an MoE layer calls its experts: how many, how long it waits, and how tensors cross the wire."""

from __future__ import annotations

import math
from dataclasses import dataclass

from labkit.suggest import one_of, suggest_fields
from labkit.wire.compression import CODECS


@suggest_fields
@dataclass(frozen=True)
class DispatchConfig:
    """How many experts a row is sent to, and how long it waits for them.

    Times are in seconds, and finite. Each row waits for `k_min` answers. When every row has
    them, or can't have them any more, the pass waits a little longer for the others. By
    default that is as long as their servers' own latencies justify: half as long again as
    95 % of a server's answers took lately, at most a second, or as long as the pass has
    taken so far. A server that has hardly answered requests of this size yet has a second.

    Example:
        swarm.moe(256, grid=(4, 4), k_best=4, k_min=2, forward_timeout=5.0)

    Args:
        k_best: Experts that each row is sent to. Default 4.
        k_min: Answers that each row needs, 1 to `k_best`. Default 1.
        forward_timeout: Longest time of a forward pass. Default 10.
        backward_timeout: Longest time of a backward pass. Default 10.
        timeout_after_k_min: Time left to experts that no row needs any more; may be 0.
            Default None: what their latencies justify.
        allow_zero_outputs: What happens to a row with fewer than `k_min` answers. False
            (default): the pass raises `NotEnoughExperts`. True: the output of the row is
            zero.
        codec: How tensors are compressed on the wire: "none" (default), "float16" or
            "bfloat16" (half of float32), or "blockwise8" (a quarter). All but "none" round
            the numbers.

    Raises:
        ValueError: A value is out of its range.
    """

    k_best: int = 4
    k_min: int = 1
    forward_timeout: float = 10.0
    backward_timeout: float = 10.0
    timeout_after_k_min: float | None = None
    allow_zero_outputs: bool = False
    codec: str = "none"

    def __post_init__(self) -> None:
        if not (isinstance(self.k_min, int) and isinstance(self.k_best, int)):
            raise ValueError(f"k_min={self.k_min!r}, k_best={self.k_best!r}: whole numbers")
        if not 1 <= self.k_min <= self.k_best:
            raise ValueError(f"k_min={self.k_min}, k_best={self.k_best}: needs 1 <= k_min <= k_best")
        for name in ("forward_timeout", "backward_timeout"):
            seconds = getattr(self, name)
            if not (math.isfinite(seconds) and seconds > 0):
                raise ValueError(f"{name}={seconds!r}: a finite number of seconds above 0")
        after = self.timeout_after_k_min
        if after is not None and not (math.isfinite(after) and after >= 0):
            raise ValueError(
                f"timeout_after_k_min={after!r}: a finite number of seconds of at least 0, or None for what the "
                "experts' latencies justify"
            )
        if self.codec not in CODECS:
            raise ValueError(one_of("codec", self.codec, CODECS))
