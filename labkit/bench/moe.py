"""`labkit bench moe`: forward and backward passes of an MoE layer whose experts are in a server process.

Beside it is the limit that `limits` measures in the same run: the same layer in plain PyTorch.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch

from labkit.bench.limits import moe_limit
from labkit.bench.processes import peak_rss_mb
from labkit.bench.report import EXPERT_KINDS, check_at_least
from labkit.swarm import Swarm

PASS_TIMEOUT = 120.0  # seconds; long, since no pass is to fail here
WARM_UP_PASSES = 2


@dataclass(frozen=True)
class MoEConfig:
    """What `labkit bench moe` measures.

    Args:
        expert: The kind of experts: nop, ffn or ffn2.
        batch: Rows per pass.
        hidden: Width of the layer.
        side: The grid has side × side experts.
        k_best: Experts per row.
        passes: Passes that are measured, after the warm-up.
        secure: Whether connections are encrypted.

    Raises:
        ValueError: A value is not possible.
    """

    expert: str = "ffn"
    batch: int = 64
    hidden: int = 256
    side: int = 4
    k_best: int = 4
    passes: int = 10
    secure: bool = False

    def __post_init__(self) -> None:
        if self.expert not in EXPERT_KINDS:
            raise ValueError(f"expert={self.expert!r}: one of {', '.join(EXPERT_KINDS)}")
        check_at_least(1, self, "batch", "hidden", "side", "k_best", "passes")
        if self.k_best > self.side**2:
            raise ValueError(f"k_best={self.k_best}: the grid has {self.side**2} experts")


def measure(config: MoEConfig) -> dict[str, Any]:
    """Measure the limit, the passes, and the limit again; the better limit counts.

    Returns:
        What `--json` prints. Seconds are medians.
    """
    limits = [_limit(config)]
    torch.manual_seed(0)
    forward, backward = [], []
    with Swarm("bench", secure=config.secure or None) as swarm:
        grid = (config.side, config.side)
        (server,) = swarm.serve(
            EXPERT_KINDS[config.expert], grid=grid, name="ffn", hidden=config.hidden, isolation="process"
        )
        layer = swarm.moe(
            config.hidden, grid, k_best=config.k_best, forward_timeout=PASS_TIMEOUT, backward_timeout=PASS_TIMEOUT,
            timeout_after_k_min=PASS_TIMEOUT,
        )  # fmt: skip
        x = torch.randn(config.batch, config.hidden, requires_grad=True)
        for number in range(WARM_UP_PASSES + config.passes):
            started = time.perf_counter()
            y = layer(x)
            middle = time.perf_counter()
            y.sum().backward()
            if number >= WARM_UP_PASSES:
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
    """Measure the limit in seconds, of a forward and a backward pass together."""
    return sum(moe_limit(**asdict(config), threads=torch.get_num_threads()))
