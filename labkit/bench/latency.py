"""`labkit bench latency`: how throughput holds up when the network is slow (paper, section 4.1), scaled to one machine.

A stack of identical blocks is spread over server processes, which answer each call after an exponentially distributed
delay. Many trainers pass batches through it at the same time, each on its own; beside them a model-parallel pipeline,
which has as many micro-batches under way as there are stages and waits for all of them before the next ones begin.
Both make the same calls to the same servers, over real sockets and in real time.
"""

from __future__ import annotations

import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from labkit.bench.figures import check_at_least
from labkit.swarm import Swarm

TIMEOUT = 120.0  # seconds of a call: nothing is to fail here
WARM_UP = 3.0  # batches' worth of delays, before anything is counted
SHAPES = {"ffn": (64,), "transformer": (4, 64)}  # batch, and length of a sequence


@dataclass(frozen=True)
class LatencyConfig:
    """`block`: ffn or transformer. `delays_ms`: means of a call's delay, milliseconds. `seconds`: that each of them is
    measured. Raises `ValueError`."""

    block: str = "ffn"
    blocks: int = 4
    servers: int = 2
    hidden: int = 512
    trainers: int = 64
    delays_ms: tuple[float, ...] = (0.0, 50.0, 100.0, 200.0)
    seconds: float = 10.0

    def __post_init__(self) -> None:
        if self.block not in SHAPES:
            raise ValueError(f"block={self.block!r}: {' or '.join(SHAPES)}")
        check_at_least(1, self, "blocks", "servers", "hidden", "trainers")
        if not self.delays_ms or not all(math.isfinite(delay) and delay >= 0 for delay in self.delays_ms):
            raise ValueError(f"delays_ms={self.delays_ms}: milliseconds, at least 0")
        if not (math.isfinite(self.seconds) and self.seconds > 0):
            raise ValueError(f"seconds={self.seconds}: above 0")


def measure(config: LatencyConfig) -> dict[str, Any]:
    """What `--json` prints: samples per second at each delay, of the trainers and of the pipeline."""
    threads = torch.get_num_threads()
    trainers, pipeline = list[float](), list[float]()
    with Swarm("bench") as swarm:
        swarm.serve(
            config.block, grid=(config.blocks,), servers=config.servers, name="block", hidden=config.hidden,
            isolation="process",
        )  # fmt: skip
        stack = nn.Sequential(*[swarm.expert(f"block.{n}", timeout=TIMEOUT) for n in range(config.blocks)])
        x = torch.randn(*SHAPES[config.block], config.hidden)
        torch.set_num_threads(1)
        try:
            for delay in config.delays_ms:
                swarm.faults(latency=delay / 1000)
                trainers.append(_asynchronous(stack, x, config, delay))
                pipeline.append(_pipelined(stack, x, config))
        finally:
            torch.set_num_threads(threads)
    return {
        **asdict(config),
        "batch": len(x),
        "samples_per_s": [round(rate, 1) for rate in trainers],
        "pipeline_samples_per_s": [round(rate, 1) for rate in pipeline],
        "slowest_to_fastest": round(trainers[-1] / trainers[0], 3),
        "pipeline_slowest_to_fastest": round(pipeline[-1] / pipeline[0], 3),
    }


def _pass(stack: nn.Module, x: Tensor) -> None:
    """Forward and backward, which trains every block."""
    stack(x.clone().requires_grad_()).square().mean().backward()


def _asynchronous(stack: nn.Module, x: Tensor, config: LatencyConfig, delay: float) -> float:
    """Samples per second of trainers that go on as soon as their own batch is done."""
    begin = time.monotonic() + WARM_UP * max(1.0, 2 * config.blocks * delay / 1000)
    end = begin + config.seconds

    def train(_: int) -> int:
        counted = 0
        while time.monotonic() < end:
            _pass(stack, x)
            counted += begin <= time.monotonic() < end
        return counted

    with ThreadPoolExecutor(config.trainers) as pool:
        return sum(pool.map(train, range(config.trainers))) * len(x) / config.seconds


def _pipelined(stack: nn.Module, x: Tensor, config: LatencyConfig) -> float:
    """Samples per second of a pipeline: a stage works on a micro-batch while others work on others."""
    with ThreadPoolExecutor(config.blocks) as pool:

        def step() -> None:
            list(pool.map(lambda _: _pass(stack, x), range(config.blocks)))

        step()
        steps, started = 0, time.monotonic()
        while time.monotonic() < started + config.seconds:
            step()
            steps += 1
        return steps * config.blocks * len(x) / (time.monotonic() - started)
