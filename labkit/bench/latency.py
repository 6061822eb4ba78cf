"""`labkit bench latency`: how throughput holds up when the network is slow (paper, section 4.1), scaled to one machine.

A stack of identical blocks is spread over server processes, which answer each call after an exponentially distributed
delay. Many trainers pass batches through it at the same time, each on its own; beside them a model-parallel pipeline,
which has as many micro-batches under way as there are stages and waits for all of them before the next ones begin.
Both make the same calls to the same servers, over real sockets and in real time. `samples_per_s` measures them.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import nn

from labkit.bench.report import check_at_least
from labkit.errors import LabkitError
from labkit.server.statistics import ServerStatistics
from labkit.swarm import Swarm

TIMEOUT = 120.0  # seconds of a call: nothing is to fail here
WARM_UP_TIMEOUT = 300.0  # seconds, once all have begun, in which each is to do a first round
LOOK_TIMEOUT = 30.0  # seconds in which the servers, busy as they are, say what they have computed
POLL = 0.02  # seconds
SHAPES = {"ffn": (64,), "transformer": (4, 64)}  # batch, and length of a sequence


@dataclass(frozen=True)
class LatencyConfig:
    """`block`: ffn or transformer. `delays_ms`: means of a call's delay, milliseconds. `seconds`: that each of them is
    measured, and over which its trainers begin before. `runs`: of all delays in turn. Raises `ValueError`."""

    block: str = "ffn"
    blocks: int = 4
    servers: int = 2
    hidden: int = 512
    trainers: int = 64
    delays_ms: tuple[float, ...] = (0.0, 50.0, 100.0, 200.0)
    seconds: float = 10.0
    runs: int = 1

    def __post_init__(self) -> None:
        if self.block not in SHAPES:
            raise ValueError(f"block={self.block!r}: {' or '.join(SHAPES)}")
        check_at_least(1, self, "blocks", "servers", "hidden", "trainers", "runs")
        if not self.delays_ms or not all(math.isfinite(delay) and delay >= 0 for delay in self.delays_ms):
            raise ValueError(f"delays_ms={self.delays_ms}: milliseconds, at least 0")
        if not (math.isfinite(self.seconds) and self.seconds > 0):
            raise ValueError(f"seconds={self.seconds}: above 0")


def measure(config: LatencyConfig) -> dict[str, Any]:
    """What `--json` prints: samples per second at each delay, of the trainers and of the pipeline.

    Figures are medians over the runs, and `…_runs` what each run gave, a list for each delay. Raises as
    `samples_per_s` does.
    """
    threads, seconds, rows = torch.get_num_threads(), config.seconds, 2 * config.blocks
    trainers, pipeline = ([list[float]() for _ in config.delays_ms] for _ in range(2))
    with Swarm("bench") as swarm, ThreadPoolExecutor(config.blocks) as stages:
        swarm.serve(
            config.block, grid=(config.blocks,), servers=config.servers, name="block", hidden=config.hidden,
            isolation="process",
        )  # fmt: skip
        stack = nn.Sequential(*[swarm.expert(f"block.{n}", timeout=TIMEOUT) for n in range(config.blocks)])
        x = torch.randn(*SHAPES[config.block], config.hidden)

        def one_pass() -> int:
            """Forward and backward, which trains every block."""
            stack(x.clone().requires_grad_()).square().mean().backward()
            return len(x)

        def one_step() -> int:
            """Of a pipeline: a stage works on a micro-batch while others work on others."""
            return sum(stages.map(lambda _: one_pass(), range(config.blocks)))

        torch.set_num_threads(1)
        try:
            for _ in range(config.runs):
                for delay, by_trainers, by_pipeline in zip(config.delays_ms, trainers, pipeline, strict=True):
                    swarm.faults(latency=delay / 1000)
                    by_trainers.append(samples_per_s(swarm, [one_pass] * config.trainers, rows, seconds, seconds))
                    by_pipeline.append(samples_per_s(swarm, [one_step], rows, seconds))
        finally:
            torch.set_num_threads(threads)
    return {
        **asdict(config),
        "batch": len(x),
        **_figures("", trainers),
        **_figures("pipeline_", pipeline),
    }


def _figures(who: str, rates: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Of the samples per second of each run, for each delay."""
    medians = [median(some) for some in rates]
    return {
        f"{who}samples_per_s": [round(rate, 1) for rate in medians],
        f"{who}samples_per_s_runs": [[round(rate, 1) for rate in some] for some in rates],
        f"{who}slowest_to_fastest": round(medians[-1] / medians[0], 3),
    }


def samples_per_s(
    swarm: Swarm, rounds: Sequence[Callable[[], int]], rows_per_sample: int, seconds: float, spread: float = 0.0
) -> float:
    """Throughput of some that do a round after another at the same time, each as soon as its last one is done.

    `rounds`: what each of them does; it returns how many samples that were. `rows_per_sample`: rows that the servers
    compute for a sample: with a forward and a backward pass, two for each block.

    What is counted are rows that the servers computed and answered, forward and backward, whole batches at the moment
    when they are done, and not whole rounds: of those each may do less than two in the window. A request that was
    refused, too late in its queue or not computable is not among these rows. No call is made twice, and one that fails
    ends the measurement. So does a row that was computed and that belongs to nobody's round: see 5.

    1. Each begins at random within `spread` seconds. Those who begin together stay in step, and while all of them wait
       for one block the others have nothing to do. 2. Warm-up, until each has done a round. 3. The window: each server
       says how many rows it has computed, twice, and at what time by its own clock. 4. All finish the round that they
       are in. 5. The rows computed since before the first round are those of the samples of all rounds, exactly.

    Raises `ValueError` if nothing was done within `seconds`, and `LabkitError`. What fails before 4 closes the swarm.
    """
    finished, ending = [0] * len(rounds), False

    def work(place: int) -> None:
        time.sleep(random.uniform(0.0, spread))
        while not ending:
            finished[place] += rounds[place]()

    before = _look(swarm)
    with ThreadPoolExecutor(len(rounds)) as pool:
        workers = [pool.submit(work, place) for place in range(len(rounds))]  # 1
        try:
            limit = time.monotonic() + spread + WARM_UP_TIMEOUT
            while not all(finished):  # 2
                _pause(workers, POLL)
                if time.monotonic() > limit:
                    raise LabkitError(
                        f"{sum(map(bool, finished))} of {len(rounds)} had done a first round after {WARM_UP_TIMEOUT:g}"
                        " s; take fewer trainers, smaller blocks (hidden) or shorter delays"
                    )
            begin = _look(swarm)  # 3
            _pause(workers, seconds)
            end = _look(swarm)
        except BaseException:
            swarm.close()  # so that nobody goes on waiting for an answer
            raise
        finally:
            ending = True  # 4
    _pause(workers, 0.0)
    computed, expected = _rows(_look(swarm)) - _rows(before), rows_per_sample * sum(finished)  # 5
    if computed != expected:
        raise LabkitError(
            f"the servers computed {computed} rows, and {expected} belong to the {sum(finished)} samples that were"
            " counted: somebody else calls them, or they were started anew"
        )
    if _rows(begin) == _rows(end):
        raise ValueError(f"seconds={seconds:g}: no batch was computed in that time; measure longer")
    per_s = sum((end[a].rows - begin[a].rows) / (end[a].uptime - begin[a].uptime) for a in end)
    return per_s / rows_per_sample


def _pause(workers: Sequence[Future[None]], seconds: float) -> None:
    """Wait so long, or raise what ends one of them before."""
    for worker in wait(workers, seconds, return_when=FIRST_COMPLETED).done:
        worker.result()


def _look(swarm: Swarm) -> Mapping[str, ServerStatistics]:
    """What each server has computed so far, by address."""
    found = swarm.statistics(timeout=LOOK_TIMEOUT)
    if len(found) != len(swarm.servers):
        raise LabkitError(
            f"{len(found)} of {len(swarm.servers)} servers said within {LOOK_TIMEOUT:g} s what they have computed;"
            " has one ended, or is the machine too busy?"
        )
    return found


def _rows(found: Mapping[str, ServerStatistics]) -> int:
    return sum(statistics.rows for statistics in found.values())
