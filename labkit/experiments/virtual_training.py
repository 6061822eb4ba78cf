"""One run in virtual time: trainers that share a model, whose batches go the same way as in a real swarm.

MoE layer, remote calls, network (here a simulated one), servers, backends: each is what ships. So the gate is trained,
and the gradients of trunk and experts are as stale as the delays make them. What is trained on, and what is measured,
is a `TrainingTask` of an experiment.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
import trio
from torch import Tensor, nn

from labkit.errors import NoExperts, NotEnoughExperts, RPCError
from labkit.events import CallFailed, CallFinished, Event, RoutingChosen
from labkit.experiments.convergence_config import ConvergenceConfig
from labkit.expert_uid import grid_uids, spread
from labkit.server.config import ServerConfig
from labkit.server.optimizer import Adam
from labkit.simulation.lockstep import Lockstep
from labkit.simulation.network import open_simnet
from labkit.simulation.swarm import SimulatedSwarm, open_simulated_swarm
from labkit.simulation.virtual_clock import run_in_virtual_time
from labkit.training.shared_model import SharedModel
from labkit.training.trainer import train_step

SWARM_NAME = "convergence"
SERVERS_PER_LAYER = 4
MAX_FAILED_BATCHES = 1000  # in a row, after which the run is given up


class TrainingTask(Protocol):
    """What a run trains, on what, and how it is measured.

    Attributes:
        model: The model, where it computes.
        batches: Batches (x, y) without end.
    """

    model: nn.Module
    batches: Iterator[tuple[Tensor, Tensor]]

    def loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        """The mean loss of a batch."""

    def measure(self) -> float:
        """Evaluate the model."""


@dataclass
class History:
    """The result of a run.

    Attributes:
        points: A tuple for each evaluation: updates, virtual seconds, what was measured (accuracy, or for text the
            validation loss) and the mean training loss since the evaluation before.
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
    def measured(self) -> float:
        """What the last evaluation measured."""
        return self.points[-1][2]

    @property
    def accuracy(self) -> float:
        """Accuracy at the last evaluation, of an experiment that measures it."""
        return self.measured


def run_task(
    config: ConvergenceConfig,
    make_task: Callable[[], TrainingTask],
    progress: Callable[[int], None] = lambda updates: None,
) -> History:
    """Do a run, as fast as this machine computes. On CPUs the same config and task give the same history.

    Args:
        config: The run.
        make_task: Makes what it trains.
        progress: Called with the number of updates, after each update.

    Raises:
        ValueError: The device is not available, or so many calls fail that the run would hardly ever end.
    """
    try:
        torch.empty(0, device=config.device)
    except (RuntimeError, AssertionError) as error:  # AssertionError where torch is built without the device
        raise ValueError(f"device={config.device!r}: torch cannot compute there: {error}") from error
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a batch is small
    torch.set_flush_denormal(True)  # as compute threads do
    try:
        history = run_in_virtual_time(_run, config, make_task, progress)
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


async def _run(
    config: ConvergenceConfig, make_task: Callable[[], TrainingTask], progress: Callable[[int], None]
) -> History:
    history = History()
    if config.model == "dense":
        lockstep = Lockstep()
        await _Training(config, make_task, history, progress, lockstep, None).run()
        return history
    training: list[_Training] = []

    def listen(event: Event) -> None:
        if training:
            training[0].on_event(event)

    async with (
        open_simnet(config.seed) as network,
        open_simulated_swarm(network, list(_servers(config)), seed=config.seed, name=SWARM_NAME, emit=listen) as swarm,
    ):
        training.append(_Training(config, make_task, history, progress, swarm.lockstep, swarm))
        await training[0].run()
    return history


def _servers(config: ConvergenceConfig) -> Iterator[ServerConfig]:
    backend, (kind, options) = config.backend(), config.expert()
    for layer in range(config.layers):
        uids = list(grid_uids(f"layer{layer}", config.grid))
        for held in spread(uids, min(SERVERS_PER_LAYER, len(uids))):
            yield ServerConfig(held, config.grid, kind, options, backend=backend, seed=config.seed, threads=1)


class _Training:
    """The trainers of one run and what they share. They run in turn, so nothing needs a lock."""

    def __init__(
        self, config: ConvergenceConfig, make_task: Callable[[], TrainingTask], history: History,
        progress: Callable[[int], None], lockstep: Lockstep, swarm: SimulatedSwarm | None,
    ) -> None:  # fmt: skip
        self._config = config
        self._history = history
        self._progress = progress
        self._lockstep = lockstep
        self._swarm = swarm
        self._task = make_task()
        optimizer = Adam(self._task.model.parameters(), lr=config.lr, betas=(float(config.beta1), 0.999), amsgrad=True)
        self._shared = SharedModel(self._task.model, optimizer, config.update_rule())
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
            x, y = next(self._task.batches)
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
        return self._task.loss(outputs, y)

    def _evaluate(self) -> None:
        """Evaluate over the network without delays and failures, so that no virtual time passes meanwhile."""
        config, updates, losses = self._config, self._shared.updates, self._losses
        self._losses, self._evaluating = [], True
        if self._swarm is not None:
            self._swarm.set_faults(0.0, 0.0)
        measured = self._task.measure()
        if self._swarm is not None:
            self._swarm.set_faults(config.latency, config.loss)
        self._evaluating = False
        self._history.points.append((updates, self._lockstep.call(_now), measured, sum(losses) / len(losses)))

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
