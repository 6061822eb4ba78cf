"""`labkit bench latency`: how throughput holds up when the network is slow (paper, section 4.1), scaled to one machine.

A stack of identical blocks is spread over server processes, which answer each call after an exponentially distributed
delay. Many trainers pass batches through the stack at the same time, each on its own. They are compared with a
model-parallel pipeline, which has as many micro-batches in flight as there are stages and waits for all of them before
it begins the next ones. Both make the same calls to the same servers, over real sockets and in real time;
`samples_per_s` measures their throughput.
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

CALL_TIMEOUT = 120.0  # seconds; long, since no call is to fail here
WARM_UP_TIMEOUT = 300.0  # seconds that all have for their first round, once all have begun
BUSY_STATISTICS_TIMEOUT = 30.0  # seconds that busy servers have to report their statistics
POLL_PERIOD = 0.02  # seconds
BATCH_SHAPES = {"ffn": (64,), "transformer": (4, 64)}  # batch size, and length of a sequence


@dataclass(frozen=True)
class LatencyConfig:
    """What `labkit bench latency` measures.

    Args:
        block: The kind of blocks: ffn or transformer.
        blocks: Blocks in the stack.
        servers: Server processes over which the blocks are spread.
        hidden: Width of a block.
        trainers: Trainers that pass batches at the same time.
        delays_ms: Mean delays of a call, in milliseconds, to measure one after the other.
        seconds: How long each delay is measured, after the trainers' starts were spread over as many seconds.
        runs: How often all delays are measured.

    Raises:
        ValueError: A value is not possible.
    """

    block: str = "ffn"
    blocks: int = 4
    servers: int = 2
    hidden: int = 512
    trainers: int = 64
    delays_ms: tuple[float, ...] = (0.0, 50.0, 100.0, 200.0)
    seconds: float = 10.0
    runs: int = 1

    def __post_init__(self) -> None:
        if self.block not in BATCH_SHAPES:
            raise ValueError(f"block={self.block!r}: {' or '.join(BATCH_SHAPES)}")
        check_at_least(1, self, "blocks", "servers", "hidden", "trainers", "runs")
        if not self.delays_ms or not all(math.isfinite(delay) and delay >= 0 for delay in self.delays_ms):
            raise ValueError(f"delays_ms={self.delays_ms}: milliseconds, at least 0")
        if not (math.isfinite(self.seconds) and self.seconds > 0):
            raise ValueError(f"seconds={self.seconds}: above 0")


def measure(config: LatencyConfig) -> dict[str, Any]:
    """Measure samples per second at each delay, of the trainers and of the pipeline.

    Returns:
        What `--json` prints. Figures are medians over the runs, and `…_runs` has each run's, in a list for each delay.

    Raises:
        ValueError, LabkitError: As `samples_per_s` does.
    """
    threads, seconds, rows = torch.get_num_threads(), config.seconds, 2 * config.blocks
    trainers, pipeline = ([list[float]() for _ in config.delays_ms] for _ in range(2))
    with Swarm("bench") as swarm, ThreadPoolExecutor(config.blocks) as stages:
        swarm.serve(
            config.block, grid=(config.blocks,), servers=config.servers, name="block", hidden=config.hidden,
            isolation="process",
        )  # fmt: skip
        stack = nn.Sequential(*[swarm.expert(f"block.{n}", timeout=CALL_TIMEOUT) for n in range(config.blocks)])
        x = torch.randn(*BATCH_SHAPES[config.block], config.hidden)

        def one_pass() -> int:
            """A forward and a backward pass, which trains every block."""
            stack(x.clone().requires_grad_()).square().mean().backward()
            return len(x)

        def one_step() -> int:
            """A step of the pipeline: each stage works on a micro-batch while the others work on other ones."""
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


def _figures(prefix: str, rates: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Summarize the samples per second of each run, for each delay."""
    medians = [median(some) for some in rates]
    return {
        f"{prefix}samples_per_s": [round(rate, 1) for rate in medians],
        f"{prefix}samples_per_s_runs": [[round(rate, 1) for rate in some] for some in rates],
        f"{prefix}slowest_to_fastest": round(medians[-1] / medians[0], 3),
    }


def samples_per_s(
    swarm: Swarm, rounds: Sequence[Callable[[], int]], rows_per_sample: int, seconds: float, spread: float = 0.0
) -> float:
    """Measure the throughput of workers that each do one round after another, all at the same time.

    The count is of rows that the servers computed and answered, forward and backward, in whole batches at the moment
    they are done. Whole rounds would be too coarse, since a worker may do less than two in the window. Requests that
    were refused, were too late in their queue or could not be computed are not counted. No call is made twice, and a
    call that fails ends the measurement. So does a computed row that belongs to no worker's round: see 5.

    1. Each worker begins at random within `spread` seconds. Workers that begin together would stay in step, and while
       all of them wait for one block, the other blocks would have nothing to do.
    2. Warm-up, until each worker has done a round.
    3. The window: each server reports twice how many rows it has computed, and the time by its own clock.
    4. All workers finish their current round.
    5. The rows computed since before the first round must be exactly those of the samples of all rounds.

    Args:
        swarm: The swarm whose servers are called; no other client may call them. It is closed if something fails
            before step 4.
        rounds: For each worker, the function that does a round and returns how many samples that were.
        rows_per_sample: Rows that the servers compute for a sample: with a forward and a backward pass, two per block.
        seconds: Length of the window.
        spread: Seconds over which the workers' starts are spread.

    Returns:
        Samples per second.

    Raises:
        ValueError: No batch was computed within `seconds`.
        LabkitError: A call failed, the warm-up took too long, or rows were computed for another client.
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
                _pause(workers, POLL_PERIOD)
                if time.monotonic() > limit:
                    raise LabkitError(
                        f"{sum(map(bool, finished))} of {len(rounds)} had done a first round after {WARM_UP_TIMEOUT:g}"
                        " s; take fewer trainers, smaller blocks (hidden) or shorter delays"
                    )
            begin = _look(swarm)  # 3
            _pause(workers, seconds)
            end = _look(swarm)
        except BaseException:
            swarm.close()  # so that no worker goes on waiting for an answer
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
    """Wait `seconds`, or raise the error of a worker that ends earlier."""
    for worker in wait(workers, seconds, return_when=FIRST_COMPLETED).done:
        worker.result()


def _look(swarm: Swarm) -> Mapping[str, ServerStatistics]:
    """Returns the statistics of each server, by address."""
    found = swarm.statistics(timeout=BUSY_STATISTICS_TIMEOUT)
    if len(found) != len(swarm.servers):
        raise LabkitError(
            f"{len(found)} of {len(swarm.servers)} servers said within {BUSY_STATISTICS_TIMEOUT:g} s what they have"
            " computed; has one ended, or is the machine too busy?"
        )
    return found


def _rows(found: Mapping[str, ServerStatistics]) -> int:
    return sum(statistics.rows for statistics in found.values())
