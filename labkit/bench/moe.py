"""`labkit bench moe`: forward and backward passes of an MoE layer whose experts are in a server process."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch

from labkit.bench.limits import moe_limit
from labkit.bench.processes import peak_rss_mb
from labkit.bench.report import KINDS, check_at_least
from labkit.swarm import Swarm

TIMEOUT = 120.0  # seconds of a pass: nothing is to fail here
WARM_UP = 2  # passes


@dataclass(frozen=True)
class MoEConfig:
    """`side`: the grid is side x side. Raises `ValueError`."""

    expert: str = "ffn"
    batch: int = 64
    hidden: int = 256
    side: int = 4
    k_best: int = 4
    passes: int = 10
    secure: bool = False

    def __post_init__(self) -> None:
        if self.expert not in KINDS:
            raise ValueError(f"expert={self.expert!r}: one of {', '.join(KINDS)}")
        check_at_least(1, self, "batch", "hidden", "side", "k_best", "passes")
        if self.k_best > self.side**2:
            raise ValueError(f"k_best={self.k_best}: the grid has {self.side**2} experts")


def measure(config: MoEConfig) -> dict[str, Any]:
    """What `--json` prints: the limit, the passes, and the limit again, in one run; the better limit counts.

    Seconds are medians.
    """
    limits = [_limit(config)]
    torch.manual_seed(0)
    forward, backward = [], []
    with Swarm("bench", secure=config.secure or None) as swarm:
        grid = (config.side, config.side)
        (server,) = swarm.serve(KINDS[config.expert], grid=grid, name="ffn", hidden=config.hidden, isolation="process")
        layer = swarm.moe(
            config.hidden, grid, k_best=config.k_best, forward_timeout=TIMEOUT, backward_timeout=TIMEOUT,
            timeout_after_k_min=TIMEOUT,
        )  # fmt: skip
        x = torch.randn(config.batch, config.hidden, requires_grad=True)
        for number in range(WARM_UP + config.passes):
            started = time.perf_counter()
            y = layer(x)
            middle = time.perf_counter()
            y.sum().backward()
            if number >= WARM_UP:
                forward.append(middle - started)
                backward.append(time.perf_counter() - middle)
        server_rss = peak_rss_mb(server.pid)
    limits.append(_limit(config))
    limit, seconds = min(limits), median(forward) + median(backward)
    return {
        **asdict(config),
        "forward_s": round(median(forward), 5),
        "backward_s": round(median(backward), 5),
        "samples_per_s": round(config.batch / seconds, 1),
        "limit_s": round(limit, 5),
        "of_limit": round(limit / seconds, 3),
        "server_rss_mb": server_rss,
        "client_rss_mb": peak_rss_mb(),
    }


def _limit(config: MoEConfig) -> float:
    """Seconds of a forward and a backward pass."""
    return sum(moe_limit(**asdict(config), threads=torch.get_num_threads()))
