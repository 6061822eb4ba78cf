"""`labkit bench copies`: what copies of experts cost in training.

The same classifier trains for a while over servers that copy their experts, and over as many that do not, in turns, in
an order that is drawn. Servers are processes of this machine, so what copies cost them is time that training lacks.
What others cost this machine is much more, and is told apart in two ways: by a yardstick beside the trainings, and by
the share of the processors' time that trainers and experts get. Of the two the latter is the more exact, since a step
takes the same work with copies and without; how fast that work is done, it does not tell.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from torch import nn

from labkit.bench.report import check_at_least
from labkit.bench.yardstick import at_equal_speed, open_yardstick
from labkit.swarm import Swarm
from labkit.training.datasets import ClassificationData, load
from labkit.training.fit import fit
from labkit.training.run import Run

TRAINERS = 4
BATCH = 64
WARM_UP = 12.0  # seconds: after these copies are made as often as later on
ENDLESS = 1_000_000_000  # steps
ANSWER_TIME = 30.0  # seconds that a server has to say how far it is, on a machine that is busy


@dataclass(frozen=True)
class CopiesConfig:
    """What `labkit bench copies` measures.

    Args:
        servers: Servers of each training.
        experts: Experts in all, at those servers.
        backups: Copies of each expert in the trainings that have some. What they cost adds up: where
            it is lost in the noise, more of them tell.
        hidden: Width of the layer and its experts.
        rounds: Pairs of trainings. Of ten, the lowest and the highest ratio are left out.
        seconds: What is measured of each training. Learning experts are copied each ten.
        seed: Of the order within the pairs.

    Raises:
        ValueError: A value is not possible.
    """

    servers: int = 4
    experts: int = 16
    backups: int = 1
    hidden: int = 64
    rounds: int = 12
    seconds: float = 25.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_at_least(2, self, "servers")
        check_at_least(1, self, "hidden", "rounds")
        check_at_least(max(4, self.servers), self, "experts")
        if not 1 <= self.backups < self.servers:
            raise ValueError(f"backups={self.backups}: from 1 to {self.servers - 1} with {self.servers} servers")
        if not self.seconds > 0:
            raise ValueError(f"seconds={self.seconds}: more than 0")


def measure(config: CopiesConfig) -> dict[str, Any]:
    """Train with copies and without, in turns.

    Returns:
        What `--json` prints: the `ratio` of the speed with copies to that without, and how far
        from the true mean it is at most, with 95 % probability (`ratio_within`); the same had the
        machine been equally fast for both of each pair, by the yardstick (`equal_speed_ratio`);
        the same of the seconds of processors' time that trainers and experts had in a second
        (`work_time_ratio`); and the megabytes that were copied in a second.
    """
    data, draw = load("digits"), random.Random(config.seed)
    runs: dict[int, list[_Speeds]] = {0: [], config.backups: []}
    for _ in range(config.rounds):
        for backups in draw.sample(sorted(runs), 2):
            runs[backups].append(_train(config, backups, data))
    without, with_copies = runs.values()
    pairs = list(zip(with_copies, without, strict=True))
    ratios, speeds = [one.samples / other.samples for one, other in pairs], [a.machine / b.machine for a, b in pairs]
    mean, within = middle(ratios)
    fair, fair_within = at_equal_speed(ratios, speeds) or (None, None)
    shares = [one.work_time / other.work_time for one, other in pairs]
    share, share_within = middle(shares)
    return {
        **asdict(config),
        "samples_per_s": {
            "with copies": round(fmean(run.samples for run in with_copies)),
            "without": round(fmean(run.samples for run in without)),
        },
        "ratios": [round(ratio, 4) for ratio in ratios],
        "ratio": round(mean, 4),
        "ratio_within": None if within is None else round(within, 4),
        "machine_speed_ratios": [round(speed, 4) for speed in speeds],
        "equal_speed_ratio": None if fair is None else round(fair, 4),
        "equal_speed_ratio_within": None if fair_within is None else round(fair_within, 4),
        "work_time": {
            "with copies": round(fmean(run.work_time for run in with_copies), 4),
            "without": round(fmean(run.work_time for run in without), 4),
        },
        "work_time_ratios": [round(share, 4) for share in shares],
        "work_time_ratio": round(share, 4),
        "work_time_ratio_within": None if share_within is None else round(share_within, 4),
        "copy_mb_per_s": round(fmean(run.copied for run in with_copies) / 1e6, 2),
    }


@dataclass(frozen=True)
class _Speeds:
    """What was measured of a training, a second.

    Args:
        samples: That were trained on.
        copied: Bytes of copies.
        machine: How fast the machine was.
        work_time: Seconds of processors' time that trainers and experts had: of this process, and of the threads that
            compute in the servers.
    """

    samples: float
    copied: float
    machine: float
    work_time: float


def _train(config: CopiesConfig, backups: int, data: ClassificationData) -> _Speeds:
    """Train over servers of its own, so that none of another training still copies what that has learnt."""
    with Swarm(f"copies={backups}") as swarm, open_yardstick() as yardstick:
        swarm.serve(
            "ffn", hidden=config.hidden, experts=config.experts, servers=config.servers, threads=1, seed=0,
            backups=backups,
        )  # fmt: skip
        moe = swarm.moe(config.hidden, k_best=4)
        model = nn.Sequential(
            nn.Linear(data.dim, config.hidden), nn.LayerNorm(config.hidden), moe, nn.LayerNorm(config.hidden),
            nn.Linear(config.hidden, data.classes),
        )  # fmt: skip
        run = fit(model, data, steps=ENDLESS, batch_size=BATCH, trainers=TRAINERS)
        time.sleep(WARM_UP)
        before, began = _count(swarm, run), time.monotonic()
        yardstick.begin(config.seconds)
        machine = yardstick.speed()
        steps, copied, work_time = (now - then for now, then in zip(_count(swarm, run), before, strict=True))
        took = time.monotonic() - began
        run.stop()
    return _Speeds(BATCH * steps / took, copied / took, machine, work_time / took)


def _count(swarm: Swarm, run: Run) -> tuple[int, int, float]:
    """Returns the steps so far, the bytes of copies, and the seconds of processors' time of trainers and experts."""
    servers = [server.statistics(ANSWER_TIME) for server in swarm.servers]
    copied = sum(one.copies.sent_bytes for one in servers if one.copies is not None)
    return run.steps, copied, time.process_time() + sum(one.processor_seconds for one in servers)


def middle(ratios: Sequence[float]) -> tuple[float, float | None]:
    """Returns the mean of the middle four fifths, and the half-width of its 95 % interval; None for one ratio.

    Those that are left out count, too, for how much the ratios vary (Yuen, Biometrika, 1974).
    """
    from scipy.stats import mstats, t  # it takes a while

    if len(ratios) == 1:
        return ratios[0], None
    left_out = len(ratios) // 10  # at each end
    limits = (0.1, 0.1) if left_out else None
    error = mstats.trimmed_stde(ratios, limits=limits)
    within = t.ppf(0.975, len(ratios) - 2 * left_out - 1) * error
    return float(mstats.trimmed_mean(ratios, limits=limits)), float(within)
