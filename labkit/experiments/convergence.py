"""How far a mixture of experts gets where the network is slow and unreliable (paper, section 4.2), in virtual time.

Trainers are tasks that share one model; their way is the product's own: MoE layer, remote calls, a simulated network,
servers, backends. So the gate is trained, and the gradients of trunk and experts are as stale as the delays make them.
What differs from the authors' published emulation: that trains no gate, and delays no gradient of an expert; and it has
Adam's usual settings, where the runner's are chosen for stale gradients.
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
from labkit.errors import NoExperts, NotEnoughExperts, RPCError
from labkit.events import CallFailed, CallFinished, Event, RoutingChosen
from labkit.expert_uid import check_grid, grid_uids, spread
from labkit.server.layers import FeedForward
from labkit.server.optimizer import Adam, BackendConfig
from labkit.server.server import ServerConfig
from labkit.simulation.lockstep import Lockstep
from labkit.simulation.network import open_simnet
from labkit.simulation.swarm import SimulatedSwarm, open_simulated_swarm
from labkit.simulation.virtual_clock import run_in_virtual_time
from labkit.training.datasets import ClassificationData, batches
from labkit.training.shared_model import SharedModel
from labkit.training.staleness import UpdateRule
from labkit.training.trainer import SCHEDULES, evaluate, train_step

SWARM = "convergence"
SERVERS = 4  # of each layer
TIMEOUT = 12  # mean delays that a pass takes at most; half of it for the last experts: 0.25 % of answers are later
LEAST_TIMEOUT = 10.0  # seconds
EVALUATION_BATCH = 1000
MOST_LOSS = 0.9
HOPELESS = 1000  # batches in a row that had to be given up
WHOLE = {
    "layers": 1, "k_best": 1, "width": 1, "trainers": 1, "batch_size": 1, "updates": 1, "evaluate_every": 1,
    "accumulate": 1, "warmup": 0, "validation": 0,
}  # fmt: skip
"""Arguments that are whole numbers, and the least that each may be."""


@dataclass(frozen=True)
class ConvergenceConfig:
    """One run. `latency`: mean of the exponential delay of each call, seconds; `loss`: share of calls that fail, 0.9 at
    most. `evaluate_every`: updates from one evaluation to the next; there is one at the end of the run in any case.

    `model`: "dmoe", or "dense", whose trainers wait as long as those of a mixture would: once a layer and direction.
    `width`: of a row between layers; an expert is width -> 4 width -> 4 width -> width. A dense block is twice as wide.
    `lr`, `beta1`, `schedule`, `warmup` (in updates), `clip_grad_norm`, `age_power`: of the trunk and of experts, which
    make their share of the updates. `compensation`: of the trunk; see `UpdateRule`. `accumulate`: calls after which an
    expert updates. `validation`: training samples that are held out, by which the run is judged instead of the test
    set, for the choice of settings. `device`: of trunk and experts. Raises `ValueError`.
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
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_grid(self.grid)
        if self.model not in ("dmoe", "dense"):
            raise ValueError(f"model={self.model!r}: dmoe or dense")
        for name, least in WHOLE.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r}: a whole number of at least {least}")
        if not isinstance(self.seed, int):
            raise ValueError(f"seed={self.seed!r}: a whole number")
        for name in ("latency", "loss", "beta1", "age_power", "compensation"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ValueError(f"{name}={value!r}: a finite number of at least 0")
        if self.evaluate_every > self.updates:
            raise ValueError(f"evaluate_every={self.evaluate_every}: at most updates={self.updates}, the whole run")
        if self.k_best > math.prod(self.grid):
            raise ValueError(f"k_best={self.k_best}: the grid {self.grid} has {math.prod(self.grid)} experts")
        if self.loss > MOST_LOSS:
            raise ValueError(f"loss={self.loss}: a share of {MOST_LOSS} at most, or no batch gets through")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule={self.schedule!r}: one of {', '.join(SCHEDULES)}")
        if not _is_device(self.device):
            raise ValueError(f"device={self.device!r}: what torch calls a device, such as cpu or cuda")
        self.update_rule()
        if self.schedule == "linear" and self._expert_steps(self.warmup) >= max(1, self._expert_steps(self.updates)):
            raise ValueError(
                f"warmup={self.warmup}: too many of updates={self.updates}; an expert makes fewer steps "
                f"({self._expert_steps(self.updates)}), and would have none left after its warm-up"
            )
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
        """How experts are trained."""
        return BackendConfig(
            lr=self.lr, beta1=self.beta1, amsgrad=True, clip_grad_norm=self.clip_grad_norm, schedule=self.schedule,
            accumulate=self.accumulate, age_power=self.age_power, device=self.device,
            warmup_steps=self._expert_steps(self.warmup), total_steps=max(1, self._expert_steps(self.updates)),
        )  # fmt: skip

    def _expert_steps(self, updates: int) -> int:
        """How many steps an expert makes during so many updates of the trunk, if it is chosen as often as others."""
        share = min(1.0, self.batch_size * self.k_best / math.prod(self.grid)) / self.accumulate
        return round(updates * share)


def _is_device(name: object) -> bool:
    try:
        return isinstance(name, str) and bool(torch.device(name))
    except RuntimeError:
        return False


@dataclass
class History:
    """What came of a run. `points`: after so many updates and virtual seconds, the accuracy (on the test set, or what
    was held out) and the mean training loss since the point before. Staleness: how many updates were how many behind,
    of the trunk and of experts. `wall_s`: real seconds that the run took, where that was measured; histories are equal
    whatever it is."""

    points: list[tuple[int, float, float, float]] = field(default_factory=list)
    staleness: Counter[int] = field(default_factory=Counter)
    expert_staleness: Counter[int] = field(default_factory=Counter)
    usage: Counter[str] = field(default_factory=Counter)  # rows that were sent to each expert in training
    failures: Counter[str] = field(default_factory=Counter)  # calls by cause
    dropped: int = 0  # batches
    wall_s: float | None = field(default=None, compare=False)

    @property
    def accuracy(self) -> float:
        """The last one measured."""
        return self.points[-1][2]


def run(
    config: ConvergenceConfig, data: ClassificationData, progress: Callable[[int], None] = lambda updates: None
) -> History:
    """Train, as fast as the machine computes. `progress` is told how many updates there were. The same config and data
    give the same history on CPUs. Raises `ValueError` if more is held out than there is, if the device is not there, or
    if the run would hardly ever end, since so many calls fail."""
    if config.validation >= len(data.train_x):
        raise ValueError(f"validation={config.validation}: there are {len(data.train_x)} training samples in all")
    try:
        torch.empty(0, device=config.device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch is built without it
        raise ValueError(f"device={config.device!r}: torch cannot compute there: {error}") from error
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a batch is small
    torch.set_flush_denormal(True)  # as compute threads do
    try:
        history = run_in_virtual_time(_run, config, data, progress)
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(False)
    updates = sum(history.staleness.values())
    if updates < config.updates:
        raise ValueError(
            f"loss={config.loss}: {HOPELESS} batches in a row got too few answers, after {updates} updates of "
            f"{config.updates}; try a smaller loss, fewer layers or a smaller batch"
        )
    return history


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
        x, y = data.test_x, data.test_y
        if config.validation:
            x, y = data.train_x[training:], data.train_y[training:]
        self._judges = x.to(config.device), y.to(config.device)
        self._config = config
        self._history = history
        self._progress = progress
        self._lockstep = lockstep
        self._swarm = swarm
        self._model = make_model(config, data.dim, data.classes).to(config.device)
        optimizer = Adam(self._model.parameters(), lr=config.lr, betas=(float(config.beta1), 0.999), amsgrad=True)
        self._shared = SharedModel(self._model, optimizer, config.update_rule())
        generator = torch.Generator().manual_seed(config.seed)
        self._batches = batches(data.train_x[:training], data.train_y[:training], config.batch_size, generator)
        self._draw = random.Random(config.seed)  # delays of the dense model
        self._claimed = 0
        self._failed = 0  # batches in a row
        self._hopeless = False
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
        while self._claimed < config.updates and not self._hopeless:
            self._claimed += 1
            x, y = next(self._batches)
            batch = x.to(config.device), y.to(config.device)
            try:
                loss, staleness = train_step(self._shared, replica, batch, self._loss, 0.0)
            except (NotEnoughExperts, NoExperts, RPCError):
                self._claimed -= 1
                self._history.dropped += 1
                self._failed += 1
                self._hopeless = self._hopeless or self._failed >= HOPELESS
                continue
            self._failed = 0
            self._losses.append(loss)
            self._history.staleness[staleness] += 1
            self._progress(self._shared.updates)
            if self._shared.updates % config.evaluate_every == 0 or self._shared.updates == config.updates:
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
