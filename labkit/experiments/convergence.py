"""How far a mixture of experts gets where the network is slow and unreliable (paper, section 4.2), in virtual time.

Trainers are tasks that share one model; their way is the product's own: MoE layer, remote calls, a simulated network,
servers, backends. So the gate is trained, and the gradients of trunk and experts are as stale as the delays make them.
What differs from the authors' published emulation: that trains no gate, and delays no gradient of an expert.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
import trio
from torch import Tensor, nn

from labkit.client.dispatch import DispatchConfig
from labkit.client.moe import MixtureOfExperts
from labkit.data import ClassificationData, batches
from labkit.errors import NoExperts, NotEnoughExperts, RPCError
from labkit.events import CallFailed, CallFinished, Event, RoutingChosen
from labkit.experiments.lockstep import Lockstep
from labkit.experiments.simulated_swarm import SimulatedSwarm, open_simulated_swarm
from labkit.expert_uid import check_grid, grid_uids, spread
from labkit.server.layers import FeedForward
from labkit.server.optimizer import Adam, BackendConfig
from labkit.server.server import ServerConfig
from labkit.shared_model import SharedModel
from labkit.trainer import SCHEDULES, evaluate, train_step
from labkit.update_rule import UpdateRule
from labkit.wire.simclock import run_in_virtual_time
from labkit.wire.simnet import open_simnet

SWARM = "convergence"
SERVERS = 4  # of each layer
TIMEOUT = 12  # mean delays that a pass takes at most; half of it for the last experts: 0.25 % of answers are later
LEAST_TIMEOUT = 10.0  # seconds
EVALUATION_BATCH = 1000


@dataclass(frozen=True)
class ConvergenceConfig:
    """One run. `latency`: mean of the exponential delay of each call, seconds; `loss`: share of calls that fail.

    `model`: "dmoe", or "dense", whose trainers wait as long as those of a mixture would: once a layer and direction.
    `width`: of a row between layers; an expert is width -> 4 width -> 4 width -> width. A dense block is twice as wide.
    `lr`, `beta1`, `schedule`, `warmup` (in updates), `clip_grad_norm`, `age_power`: of the trunk and of experts, which
    make their share of the updates. `compensation`: of the trunk; see `UpdateRule`. `accumulate`: calls after which an
    expert updates. `validation`: training samples that are held out, by which the run is judged instead of the test
    set, for the choice of settings. Raises `ValueError`.
    """

    model: str = "dmoe"
    grid: tuple[int, ...] = (4, 4)
    layers: int = 4
    k_best: int = 4
    width: int = 64
    trainers: int = 64
    batch_size: int = 4
    updates: int = 20 * 1024
    evaluate_every: int = 1024
    latency: float = 1.0
    loss: float = 0.0
    lr: float = 1e-3
    beta1: float = 0.9
    accumulate: int = 1
    schedule: str = "constant"
    warmup: int = 0
    clip_grad_norm: float | None = None
    age_power: float = 0.0
    compensation: float = 0.0
    validation: int = 0
    seed: int = 1337

    def __post_init__(self) -> None:
        check_grid(self.grid)
        if self.model not in ("dmoe", "dense"):
            raise ValueError(f"model={self.model!r}: dmoe or dense")
        for name in ("layers", "k_best", "width", "trainers", "batch_size", "updates", "evaluate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: at least 1")
        if self.k_best > math.prod(self.grid):
            raise ValueError(f"k_best={self.k_best}: the grid {self.grid} has {math.prod(self.grid)} experts")
        if not (math.isfinite(self.latency) and self.latency >= 0):
            raise ValueError(f"latency={self.latency}: seconds, at least 0")
        if not 0 <= self.loss < 1:
            raise ValueError(f"loss={self.loss}: a share of at least 0 and below 1")
        if self.validation < 0:
            raise ValueError(f"validation={self.validation}: a number of samples, at least 0")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule={self.schedule!r}: one of {', '.join(SCHEDULES)}")
        self.update_rule()
        self.backend()

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> ConvergenceConfig:
        """From its fields as JSON has them."""
        return cls(**{**fields, "grid": tuple(fields["grid"])})

    def update_rule(self) -> UpdateRule:
        """That of the trunk."""
        decay_over = self.updates if self.schedule == "linear" else 0
        return UpdateRule(self.warmup, decay_over, self.clip_grad_norm, self.age_power, self.compensation)

    def backend(self) -> BackendConfig:
        """How experts are trained. One that is chosen as often as others makes `share` of the trunk's updates."""
        share = min(1.0, self.batch_size * self.k_best / math.prod(self.grid)) / max(1, self.accumulate)
        return BackendConfig(
            lr=self.lr, beta1=self.beta1, amsgrad=True, clip_grad_norm=self.clip_grad_norm, schedule=self.schedule,
            accumulate=self.accumulate, age_power=self.age_power,
            warmup_steps=round(self.warmup * share), total_steps=max(1, round(self.updates * share)),
        )  # fmt: skip


@dataclass
class History:
    """What came of a run. `points`: after so many updates and virtual seconds, the accuracy (on the test set, or what
    was held out) and the mean training loss since the point before. Staleness: how many updates were how many behind,
    of the trunk and of experts."""

    points: list[tuple[int, float, float, float]] = field(default_factory=list)
    staleness: Counter[int] = field(default_factory=Counter)
    expert_staleness: Counter[int] = field(default_factory=Counter)
    usage: Counter[str] = field(default_factory=Counter)  # rows that were sent to each expert in training
    failures: Counter[str] = field(default_factory=Counter)  # calls by cause
    dropped: int = 0  # batches

    @property
    def accuracy(self) -> float:
        """The last one measured."""
        return self.points[-1][2]


def run(
    config: ConvergenceConfig, data: ClassificationData, progress: Callable[[int], None] = lambda updates: None
) -> History:
    """Train, as fast as the machine computes. `progress` is told how many updates there were. The same config and data
    give the same history. Raises `ValueError` if more is held out than there is."""
    if config.validation >= len(data.train_x):
        raise ValueError(f"validation={config.validation}: there are {len(data.train_x)} training samples in all")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a batch is small
    torch.set_flush_denormal(True)  # as compute threads do
    try:
        return run_in_virtual_time(_run, config, data, progress)
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(False)


async def _run(config: ConvergenceConfig, data: ClassificationData, progress: Callable[[int], None]) -> History:
    history = History()
    if config.model == "dense":
        lockstep = Lockstep()
        await _Training(config, data, history, progress, lockstep, None).run()
        return history
    training: list[_Training] = []

    def listen(event: Event) -> None:
        if training:
            training[0].hear(event)

    async with (
        open_simnet(config.seed) as network,
        open_simulated_swarm(network, list(_servers(config)), seed=config.seed, name=SWARM, emit=listen) as swarm,
    ):
        training.append(_Training(config, data, history, progress, swarm.lockstep, swarm))
        await training[0].run()
    return history


def _servers(config: ConvergenceConfig) -> Iterator[ServerConfig]:
    backend = config.backend()
    for layer in range(config.layers):
        uids = list(grid_uids(f"layer{layer}", config.grid))
        for held in spread(uids, min(SERVERS, len(uids))):
            yield ServerConfig(
                held, config.grid, options={"hidden": config.width}, backend=backend, seed=config.seed, threads=1
            )


def make_model(config: ConvergenceConfig, dim: int, classes: int) -> nn.Module:
    """The trunk, with a layer for each grid; or the dense network."""
    torch.manual_seed(config.seed)
    if config.model == "dense":
        width = 2 * config.width
        blocks: list[nn.Module] = [FeedForward(width) for _ in range(config.layers)]
    else:
        width = config.width
        wait = max(LEAST_TIMEOUT, TIMEOUT * config.latency)
        dispatch = DispatchConfig(
            k_best=config.k_best, forward_timeout=wait, backward_timeout=wait, timeout_after_k_min=wait / 2
        )
        blocks = [
            MixtureOfExperts(width, config.grid, f"layer{layer}", swarm=SWARM, dispatch=dispatch)
            for layer in range(config.layers)
        ]
    return nn.Sequential(nn.Linear(dim, width), *blocks, nn.LayerNorm(width), nn.Linear(width, classes))


class _Training:
    """The trainers of one run, and what they share. All of it runs in turn, so nothing needs a lock."""

    def __init__(
        self, config: ConvergenceConfig, data: ClassificationData, history: History, progress: Callable[[int], None],
        lockstep: Lockstep, swarm: SimulatedSwarm | None,
    ) -> None:  # fmt: skip
        training = len(data.train_x) - config.validation
        self._judges = (data.test_x, data.test_y)
        if config.validation:
            self._judges = (data.train_x[training:], data.train_y[training:])
        self._config = config
        self._history = history
        self._progress = progress
        self._lockstep = lockstep
        self._swarm = swarm
        self._model = make_model(config, data.dim, data.classes)
        optimizer = Adam(self._model.parameters(), lr=config.lr, betas=(float(config.beta1), 0.999), amsgrad=True)
        self._shared = SharedModel(self._model, optimizer, config.update_rule())
        generator = torch.Generator().manual_seed(config.seed)
        self._batches = batches(data.train_x[:training], data.train_y[:training], config.batch_size, generator)
        self._draw = random.Random(config.seed)  # delays of the dense model
        self._claimed = 0
        self._losses: list[float] = []
        self._evaluating = False

    async def run(self) -> None:
        if self._swarm is not None:
            self._swarm.set_faults(self._config.latency, self._config.loss)
        async with trio.open_nursery() as nursery:
            for _ in range(self._config.trainers):
                nursery.start_soon(self._lockstep.run, self._train)

    def _train(self) -> None:
        """One trainer."""
        config, replica = self._config, self._shared.replica()
        while self._claimed < config.updates:
            self._claimed += 1
            try:
                loss, staleness = train_step(self._shared, replica, next(self._batches), self._loss, 0.0)
            except (NotEnoughExperts, NoExperts, RPCError):
                self._claimed -= 1
                self._history.dropped += 1
                continue
            self._losses.append(loss)
            self._history.staleness[staleness] += 1
            self._progress(self._shared.updates)
            if self._shared.updates % config.evaluate_every == 0:
                self._evaluate()

    def _loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        if self._swarm is None and self._config.latency:
            ways = 2 * self._config.layers
            self._lockstep.call(trio.sleep, sum(self._draw.expovariate(1 / self._config.latency) for _ in range(ways)))
        return F.cross_entropy(outputs, y)

    def _evaluate(self) -> None:
        """Over the network as it would be without delays and failures, so that no virtual time passes meanwhile."""
        config, updates, losses = self._config, self._shared.updates, self._losses
        self._losses, self._evaluating = [], True
        if self._swarm is not None:
            self._swarm.set_faults(0.0, 0.0)
        accuracy = evaluate(self._model, *self._judges, batch_size=EVALUATION_BATCH)
        if self._swarm is not None:
            self._swarm.set_faults(config.latency, config.loss)
        self._evaluating = False
        self._history.points.append((updates, self._lockstep.call(_now), accuracy, sum(losses) / len(losses)))

    def hear(self, event: Event) -> None:
        """Count what calls and passes tell."""
        history = self._history
        if self._evaluating:
            return
        if isinstance(event, CallFinished):
            if event.staleness is not None:
                history.expert_staleness[event.staleness] += 1
        elif isinstance(event, CallFailed):
            history.failures[event.cause] += 1
        elif isinstance(event, RoutingChosen):
            history.usage.update(event.rows)


async def _now() -> float:
    return trio.current_time()
