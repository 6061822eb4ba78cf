"""How well a mixture of experts trains over a slow and unreliable network (paper, section 4.2), in virtual time.

The trainers of a run share one model, and each batch goes the same way as in a real swarm: MoE layer, remote calls,
network (here a simulated one), servers, backends. So the gate is trained, and the gradients of trunk and experts are as
stale as the delays make them. The authors' published emulation differs: it trains no gate, does not delay the experts'
gradients, and uses Adam's usual settings, while the runner's are chosen for stale gradients.
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
from labkit.server.config import ServerConfig
from labkit.server.layers import FeedForward
from labkit.server.optimizer import Adam, BackendConfig
from labkit.simulation.lockstep import Lockstep
from labkit.simulation.network import open_simnet
from labkit.simulation.swarm import SimulatedSwarm, open_simulated_swarm
from labkit.simulation.virtual_clock import run_in_virtual_time
from labkit.training.datasets import ClassificationData, batches
from labkit.training.shared_model import SharedModel
from labkit.training.staleness import UpdateRule
from labkit.training.trainer import SCHEDULES, evaluate, train_step

SWARM_NAME = "convergence"
SERVERS_PER_LAYER = 4
TIMEOUT_IN_DELAYS = 12  # timeout of a pass in mean delays; half of it once k_min have answered: 0.25 % are later
MIN_TIMEOUT = 10.0  # seconds
EVALUATION_BATCH = 1000  # samples
MAX_LOSS = 0.9  # share of calls
MAX_FAILED_BATCHES = 1000  # in a row, after which the run is given up
INTEGER_MINIMUMS = {
    "layers": 1, "k_best": 1, "width": 1, "trainers": 1, "batch_size": 1, "updates": 1, "evaluate_every": 1,
    "accumulate": 1, "warmup": 0, "validation": 0,
}  # fmt: skip
"""Fields of a config that are whole numbers, and the minimum of each."""


@dataclass(frozen=True)
class ConvergenceConfig:
    """One run. The settings of the optimizer hold for the trunk and for the experts, which make their share of updates.

    Args:
        model: "dmoe", or "dense": a network without experts, whose trainers wait as long as those of a mixture, once
            per layer and direction.
        grid: Size of each layer's grid of experts in each dimension.
        layers: Layers of experts, or dense blocks.
        k_best: Experts per row.
        width: Width of a row between layers. An expert is width -> 4 width -> 4 width -> width; a dense block is twice
            as wide.
        trainers: Trainers at the same time.
        batch_size: Samples per batch.
        updates: Updates of the trunk, after which the run ends.
        evaluate_every: Updates from one evaluation to the next; there is always one at the end.
        latency: Mean of the exponential delay of a call, in virtual seconds.
        loss: Share of calls that fail, at most 0.9.
        lr: Learning rate.
        beta1: Adam's decay of the first moment.
        accumulate: Backward calls from one update of an expert to the next.
        schedule: "constant", or "linear" for a learning rate that falls to 0.
        warmup: Updates during which the learning rate rises.
        clip_grad_norm: Largest norm of a gradient; None for no clipping.
        age_power: Steps are multiplied by (1 + staleness) ** -age_power; see `UpdateRule`.
        compensation: How strongly stale gradients of the trunk are corrected (DC-ASGD); see `UpdateRule`.
        validation: Training samples that are held out. The run is evaluated on them instead of the test set, for the
            choice of settings.
        seed: Of everything random.
        device: Where trunk and experts compute, such as "cpu" or "cuda".

    Raises:
        ValueError: A value is not possible.
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
        for name, least in INTEGER_MINIMUMS.items():
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
        if self.loss > MAX_LOSS:
            raise ValueError(f"loss={self.loss}: a share of {MAX_LOSS} at most, or no batch gets through")
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
        """Make a config of its fields as read from JSON."""
        return cls(**{**fields, "grid": tuple(fields["grid"])})

    def update_rule(self) -> UpdateRule:
        """How the trunk is updated."""
        decay_over = self.updates if self.schedule == "linear" else 0
        return UpdateRule(self.warmup, decay_over, self.clip_grad_norm, self.age_power, self.compensation)

    def backend(self) -> BackendConfig:
        """How experts are updated."""
        return BackendConfig(
            lr=self.lr, beta1=self.beta1, amsgrad=True, clip_grad_norm=self.clip_grad_norm, schedule=self.schedule,
            accumulate=self.accumulate, age_power=self.age_power, device=self.device,
            warmup_steps=self._expert_steps(self.warmup), total_steps=max(1, self._expert_steps(self.updates)),
        )  # fmt: skip

    def _expert_steps(self, updates: int) -> int:
        """Steps of an expert during `updates` updates of the trunk, if all experts are chosen equally often."""
        share = min(1.0, self.batch_size * self.k_best / math.prod(self.grid)) / self.accumulate
        return round(updates * share)


def _is_device(name: object) -> bool:
    try:
        return isinstance(name, str) and bool(torch.device(name))
    except RuntimeError:
        return False


@dataclass
class History:
    """The result of a run.

    Attributes:
        points: A tuple for each evaluation: updates, virtual seconds, accuracy (on the test set or what was held out)
            and the mean training loss since the evaluation before.
        staleness: For each staleness, how many updates of the trunk had it.
        expert_staleness: For each staleness, how many backward calls of experts had it.
        usage: Rows sent to each expert in training, by uid.
        failures: Failed calls by cause.
        dropped: Batches that were given up.
        wall_s: Real seconds that the run took, if measured. It does not count when histories are compared.
    """

    points: list[tuple[int, float, float, float]] = field(default_factory=list)
    staleness: Counter[int] = field(default_factory=Counter)
    expert_staleness: Counter[int] = field(default_factory=Counter)
    usage: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    dropped: int = 0
    wall_s: float | None = field(default=None, compare=False)

    @property
    def accuracy(self) -> float:
        """Accuracy at the last evaluation."""
        return self.points[-1][2]


def run(
    config: ConvergenceConfig, data: ClassificationData, progress: Callable[[int], None] = lambda updates: None
) -> History:
    """Do a run, as fast as this machine computes. On CPUs the same config and data give the same history.

    Args:
        config: The run.
        data: What to train on.
        progress: Called with the number of updates, after each update.

    Raises:
        ValueError: More samples are held out than there are, the device is not available, or so many calls fail that
            the run would hardly ever end.
    """
    if config.validation >= len(data.train_x):
        raise ValueError(f"validation={config.validation}: there are {len(data.train_x)} training samples in all")
    try:
        torch.empty(0, device=config.device)
    except (RuntimeError, AssertionError) as error:  # AssertionError where torch is built without the device
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
            f"loss={config.loss}: {MAX_FAILED_BATCHES} batches in a row got too few answers, after {updates} updates "
            f"of {config.updates}; try a smaller loss, fewer layers or a smaller batch"
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
            training[0].on_event(event)

    async with (
        open_simnet(config.seed) as network,
        open_simulated_swarm(network, list(_servers(config)), seed=config.seed, name=SWARM_NAME, emit=listen) as swarm,
    ):
        training.append(_Training(config, data, history, progress, swarm.lockstep, swarm))
        await training[0].run()
    return history


def _servers(config: ConvergenceConfig) -> Iterator[ServerConfig]:
    backend = config.backend()
    for layer in range(config.layers):
        uids = list(grid_uids(f"layer{layer}", config.grid))
        for held in spread(uids, min(SERVERS_PER_LAYER, len(uids))):
            yield ServerConfig(
                held, config.grid, options={"hidden": config.width}, backend=backend, seed=config.seed, threads=1
            )


def make_model(config: ConvergenceConfig, dim: int, classes: int) -> nn.Module:
    """Make the trunk with its layers of experts, or the dense network."""
    torch.manual_seed(config.seed)
    if config.model == "dense":
        width = 2 * config.width
        blocks: list[nn.Module] = [FeedForward(width) for _ in range(config.layers)]
    else:
        width = config.width
        wait = max(MIN_TIMEOUT, TIMEOUT_IN_DELAYS * config.latency)
        dispatch = DispatchConfig(
            k_best=config.k_best, forward_timeout=wait, backward_timeout=wait, timeout_after_k_min=wait / 2
        )
        blocks = [
            MixtureOfExperts(width, config.grid, f"layer{layer}", swarm=SWARM_NAME, dispatch=dispatch)
            for layer in range(config.layers)
        ]
    return nn.Sequential(nn.Linear(dim, width), *blocks, nn.LayerNorm(width), nn.Linear(width, classes))


class _Training:
    """The trainers of one run and what they share. They run in turn, so nothing needs a lock."""

    def __init__(
        self, config: ConvergenceConfig, data: ClassificationData, history: History, progress: Callable[[int], None],
        lockstep: Lockstep, swarm: SimulatedSwarm | None,
    ) -> None:  # fmt: skip
        training = len(data.train_x) - config.validation
        x, y = data.test_x, data.test_y
        if config.validation:
            x, y = data.train_x[training:], data.train_y[training:]
        self._evaluation_data = x.to(config.device), y.to(config.device)
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
        self._given_up = False
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
        while self._claimed < config.updates and not self._given_up:
            self._claimed += 1
            x, y = next(self._batches)
            batch = x.to(config.device), y.to(config.device)
            try:
                loss, staleness = train_step(self._shared, replica, batch, self._loss, 0.0)
            except (NotEnoughExperts, NoExperts, RPCError):
                self._claimed -= 1
                self._history.dropped += 1
                self._failed += 1
                self._given_up = self._given_up or self._failed >= MAX_FAILED_BATCHES
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
        """Evaluate over the network without delays and failures, so that no virtual time passes meanwhile."""
        config, updates, losses = self._config, self._shared.updates, self._losses
        self._losses, self._evaluating = [], True
        if self._swarm is not None:
            self._swarm.set_faults(0.0, 0.0)
        accuracy = evaluate(self._model, *self._evaluation_data, batch_size=EVALUATION_BATCH)
        if self._swarm is not None:
            self._swarm.set_faults(config.latency, config.loss)
        self._evaluating = False
        self._history.points.append((updates, self._lockstep.call(_now), accuracy, sum(losses) / len(losses)))

    def on_event(self, event: Event) -> None:
        """Count calls and routing, except during evaluations."""
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
