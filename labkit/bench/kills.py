"""`labkit bench kills`: servers are killed while a classifier trains on their experts, never to come back.

Servers are processes of this machine, killed with SIGKILL: half of them at the same moment, then half of those that are
left, and so on, until one has all experts. So each expert has as many copies as servers die at once. The same training
runs without kills, too.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import torch
from torch import nn

from labkit.bench.report import check_at_least
from labkit.errors import LabkitError
from labkit.events import Event, ExpertTakenOver
from labkit.launch.handle import ServerHandle
from labkit.swarm import Swarm
from labkit.training.datasets import ClassificationData, load
from labkit.training.fit import fit
from labkit.training.run import Run

TRAINERS = 2
BATCH = 64
FIRST_KILL, LAST_KILL = 0.4, 0.8  # of the steps
COPIES_TIMEOUT = 120.0  # seconds until all experts have their copies
RECOVERY_TIMEOUT = 60.0  # seconds until all experts are served again
LOOK_PERIOD = 0.2  # seconds between two looks at what the experts have learnt
RECOVERY_LOOK_PERIOD = 0.02  # seconds between two looks at what is served again
HISTORY = 600  # looks that are kept

_Look = tuple[float, dict[str, int]]  # when, and the updates of each expert


@dataclass(frozen=True)
class KillsConfig:
    """What `labkit bench kills` measures.

    Args:
        servers: Servers at the beginning.
        experts: Experts in all.
        hidden: Width of the layer and its experts.
        steps: Steps of each training.
        runs: Trainings with kills, and as many without; each has a seed of its own.
        dataset: As for `lk.load`.
        data_dir: Folder with the files of the data set.

    Raises:
        ValueError: A value is not possible.
    """

    servers: int = 8
    experts: int = 32
    hidden: int = 64
    steps: int = 1500
    runs: int = 3
    dataset: str = "digits"
    data_dir: str | None = None

    def __post_init__(self) -> None:
        check_at_least(2, self, "servers")
        check_at_least(1, self, "hidden", "steps", "runs")
        check_at_least(max(4, self.servers), self, "experts")

    @property
    def kills(self) -> list[int]:
        """How many servers are killed each time: half of those that are left, until one is."""
        left, some = self.servers, list[int]()
        while left > 1:
            some.append(left // 2)
            left -= left // 2
        return some


def measure(config: KillsConfig) -> dict[str, Any]:
    """Train with kills and without, in turns.

    Returns:
        What `--json` prints. Each of the `rounds`, one a kill, has the worst of all runs: seconds until all experts
            were served again and until callers found them there, the updates that were lost, and the longest time
            whose updates an expert lost.
    """
    data = load(config.dataset, config.data_dir)
    undisturbed, killed = list[_Training](), list[_Training]()
    for seed in range(config.runs):
        undisturbed.append(_train(config, data, seed, []))
        killed.append(_train(config, data, seed, config.kills))
    accuracies = {
        name: [round(one.accuracy, 4) for one in some]
        for name, some in (("undisturbed", undisturbed), ("killed", killed))
    }
    means = {name: fmean(some) for name, some in accuracies.items()}
    return {
        **asdict(config),
        "rounds": [_worst([one.rounds[i] for one in killed]) for i in range(len(config.kills))],
        "experts_left": min(one.experts for one in killed),
        "failed_batches": sum(one.failed_batches for one in killed),
        "rows_without_an_answer": sum(one.unanswered for one in killed),
        "accuracies": accuracies,
        "accuracy": round(means["killed"], 4),
        "accuracy_without_kills": round(means["undisturbed"], 4),
    }  # fmt: skip


@dataclass(frozen=True)
class _Training:
    """How one training went."""

    rounds: Sequence[dict[str, float]]
    experts: int
    accuracy: float
    failed_batches: int
    unanswered: int


def _worst(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: max(one[name] for one in rounds) for name in rounds[0]}


def _train(config: KillsConfig, data: ClassificationData, seed: int, kills: Sequence[int]) -> _Training:
    """Train, and kill so many servers at a time, evenly spread over the middle of the training."""
    torch.manual_seed(seed)
    taken: list[ExpertTakenOver] = []

    def hear(event: Event) -> None:
        if isinstance(event, ExpertTakenOver):
            taken.append(event)

    with Swarm("kills") as swarm:
        swarm.on_event(hear)
        swarm.serve(
            "ffn", hidden=config.hidden, experts=config.experts, servers=config.servers, threads=1, seed=seed,
            backups=max(config.kills),
        )  # fmt: skip
        moe = swarm.moe(config.hidden, k_best=4)
        model = nn.Sequential(
            nn.Linear(data.dim, config.hidden), nn.LayerNorm(config.hidden), moe, nn.LayerNorm(config.hidden),
            nn.Linear(config.hidden, data.classes),
        )  # fmt: skip
        run = fit(model, data, steps=config.steps, batch_size=BATCH, trainers=TRAINERS, seed=seed)
        left, rounds = list(swarm.servers), list[dict[str, float]]()
        for number, count in enumerate(kills):
            share = FIRST_KILL + (LAST_KILL - FIRST_KILL) * number / max(1, len(kills) - 1)
            history = _watch(swarm, left, run, share * config.steps, copies=count)
            taken.clear()
            rounds.append(_kill(swarm, config, left[:count], left[count:], taken, history))
            left = left[count:]
        run.wait()
        return _Training(
            rounds=rounds,
            experts=len(swarm.experts()),
            accuracy=run.evaluate(data.test_x, data.test_y),
            failed_batches=run.failed_batches,
            unanswered=swarm.telemetry.unanswered_rows,
        )


def _watch(swarm: Swarm, servers: Sequence[ServerHandle], run: Run, steps: float, copies: int) -> deque[_Look]:
    """Wait until a training has come so far, and each expert has so many copies at servers that are alive.

    Returns:
        What the experts had learnt when: a look each `LOOK_PERIOD`, the last one now.
    """
    history, deadline = deque[_Look](maxlen=HISTORY), math.inf
    while True:
        at = time.monotonic()
        history.append((at, {uid: n for server in servers for uid, n in server.statistics().experts.items()}))
        if run.steps >= steps or not run.running:
            deadline = min(deadline, at + COPIES_TIMEOUT)
            alive = {server.contact.key[:8] for server in servers if server.contact is not None}
            if all(len(alive.intersection(info.copies)) >= copies for info in swarm.experts().values()):
                return history
        if at > deadline:
            raise LabkitError(f"not every expert had {copies} copies in time: a busy machine may need fewer servers")
        time.sleep(LOOK_PERIOD)


def _kill(
    swarm: Swarm, config: KillsConfig, killed: Sequence[ServerHandle], left: Sequence[ServerHandle],
    taken: list[ExpertTakenOver], history: Sequence[_Look],
) -> dict[str, float]:  # fmt: skip
    """Kill servers at the same moment, and see how their experts come back."""
    began, updates = time.monotonic(), history[-1][1]
    orphans = [uid for server in killed for uid in server.uids]
    for server in killed:
        server.kill(wait=False)
    places = {server.contact for server in left}
    served = found = 0.0
    while not (served and found and len(taken) >= len(orphans)):
        now = time.monotonic() - began
        if now > RECOVERY_TIMEOUT:
            raise LabkitError(f"not all experts came back within {RECOVERY_TIMEOUT:.0f} s")
        if not served and sum(len(server.uids) for server in left) >= config.experts:
            served = now
        if not found and sum(info.contact in places for info in swarm.experts().values()) >= config.experts:
            found = now
        time.sleep(RECOVERY_LOOK_PERIOD)
    lost = {event.uid: event.lost_updates for event in taken}
    since = [_learnt_at(history, uid, updates[uid] - lost[uid]) for uid in orphans if lost.get(uid)]
    return {
        "servers_killed": len(killed),
        "experts": len(orphans),
        "served_s": round(served, 2),
        "found_s": round(found, 2),
        "updates_lost": sum(lost.values()),
        "worst_loss_s": round(max((began - at for at in since), default=0.0), 1),
    }


def _learnt_at(history: Sequence[_Look], uid: str, updates: int) -> float:
    """When an expert had made so many updates: the last look at which it had not made more."""
    return max((at for at, counts in history if counts.get(uid, 0) <= updates), default=history[0][0])
