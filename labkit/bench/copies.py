"""`labkit bench copies`: what copies of experts cost in training.

The same classifier trains for a while over servers that copy their experts, and over as many that do not, in turns, in
an order that is drawn. Servers are processes of this machine, so what copies cost them is time that training lacks.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from torch import nn

from labkit.bench.report import check_at_least
from labkit.swarm import Swarm
from labkit.training.datasets import ClassificationData, load
from labkit.training.fit import fit

TRAINERS = 4
BATCH = 64
WARM_UP_STEPS = 20
ENDLESS = 1_000_000_000  # steps


@dataclass(frozen=True)
class CopiesConfig:
    """What `labkit bench copies` measures.

    Args:
        servers: Servers with copies, and as many without.
        experts: Experts in all, in each of the two swarms.
        hidden: Width of the layer and its experts.
        rounds: Pairs of trainings. Of ten, the lowest and the highest ratio are left out.
        seconds: What is measured of each training. Learning experts are copied each ten.
        seed: Of the order within the pairs.

    Raises:
        ValueError: A value is not possible.
    """

    servers: int = 4
    experts: int = 16
    hidden: int = 64
    rounds: int = 12
    seconds: float = 25.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_at_least(2, self, "servers")
        check_at_least(1, self, "hidden", "rounds")
        check_at_least(max(4, self.servers), self, "experts")
        if not self.seconds > 0:
            raise ValueError(f"seconds={self.seconds}: more than 0")


def measure(config: CopiesConfig) -> dict[str, Any]:
    """Train with copies and without, in turns.

    Returns:
        What `--json` prints: the `ratio` of the speed with copies to that without, and how far
        from the true mean it is at most, with 95 % probability (`ratio_within`).
    """
    data, draw = load("digits"), random.Random(config.seed)
    speeds: dict[int, list[float]] = {0: [], 1: []}
    with ExitStack() as stack:
        swarms = {backups: stack.enter_context(_swarm(config, backups)) for backups in speeds}
        for _ in range(config.rounds):
            for backups in draw.sample(sorted(speeds), 2):
                speeds[backups].append(_steps_per_second(config, swarms[backups], data))
        sent = sum(one.copies.sent_bytes for one in swarms[1].statistics().values() if one.copies is not None)
    ratios = [with_copies / without for without, with_copies in zip(speeds[0], speeds[1], strict=True)]
    mean, within = middle(ratios)
    return {
        **asdict(config),
        "samples_per_s": {"with copies": round(BATCH * fmean(speeds[1])), "without": round(BATCH * fmean(speeds[0]))},
        "ratios": [round(ratio, 4) for ratio in ratios],
        "ratio": round(mean, 4),
        "ratio_within": None if within is None else round(within, 4),
        "copy_mb": round(sent / 1e6, 1),
    }


def _swarm(config: CopiesConfig, backups: int) -> Swarm:
    swarm = Swarm(f"copies={backups}")
    try:
        swarm.serve(
            "ffn", hidden=config.hidden, experts=config.experts, servers=config.servers, threads=1, seed=0,
            backups=backups,
        )  # fmt: skip
    except BaseException:
        swarm.close()
        raise
    return swarm


def _steps_per_second(config: CopiesConfig, swarm: Swarm, data: ClassificationData) -> float:
    moe = swarm.moe(config.hidden, k_best=4)
    model = nn.Sequential(
        nn.Linear(data.dim, config.hidden), nn.LayerNorm(config.hidden), moe, nn.LayerNorm(config.hidden),
        nn.Linear(config.hidden, data.classes),
    )  # fmt: skip
    run = fit(model, data, steps=ENDLESS, batch_size=BATCH, trainers=TRAINERS)
    while run.running and run.steps < WARM_UP_STEPS:
        time.sleep(0.01)
    steps, began = run.steps, time.monotonic()
    time.sleep(config.seconds)
    made, took = run.steps - steps, time.monotonic() - began
    run.stop()
    return made / took


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
