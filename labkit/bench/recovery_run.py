"""One run of `labkit bench recovery`: a swarm trains in virtual time, and its servers leave, or not.

Servers, nodes and calls are those that run over ZeroMQ; the network between them is simulated in memory, and experts
are small. Servers leave without a word, half of them so that connections break, and half silently, as a machine that
loses its power; another server comes for each. It takes places of the grid that nobody serves any more, if there are
any, and is a spare otherwise.
"""

from __future__ import annotations

import logging
import math
import os
import random
import sys
import time
from collections.abc import Collection, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import trio
from torch import Tensor

from labkit.bench.report import check_at_least
from labkit.client.expert_client import ExpertClient, Outcome
from labkit.contact import Contact
from labkit.errors import LabkitError, RPCError
from labkit.events import CallFinished, CopyStored, Event, ExpertTakenOver
from labkit.expert_uid import ExpertInfo, grid_uids, spread
from labkit.node import Node, open_node
from labkit.server.config import ServerConfig
from labkit.server.executor import InlineCompute
from labkit.server.optimizer import BackendConfig
from labkit.server.serving import serve_experts
from labkit.simulation.network import SimNetwork, open_simnet
from labkit.simulation.virtual_clock import run_in_virtual_time
from labkit.wire.security import Identity

GRID_NAME = "ffn"
ROWS = 4  # of a call
CALL_TIMEOUT = 3.0  # seconds
TRAINERS_PER_NODE = 16
STEADY_MINUTES = 5.0  # of the run without failures, at most
LEARNING_RATE = 1e-6  # so small that experts whose outputs are always pushed one way stay finite for hours
SETTLE = 30.0  # seconds after the training in which those that are gone are replaced
COMING = 5.0  # seconds after which another server comes for one that has left
LOOK_AGAIN = 30.0  # seconds after which a place of the grid that was free is free for good
COUNTING = 120.0  # seconds in which the experts that are served have to say how far they have come
COUNTED_AT_ONCE = 8  # of them are asked at the same time
WARM_UP = 20.0  # seconds that the swarm has for its first copies
USUAL = {"servers": 12, "experts": 120, "trainers": 8, "minutes": 10.0}
FULL = {"servers": 100, "experts": 1000, "trainers": 64, "minutes": 120.0}
LONG = 100  # servers times minutes of a run that says how far it is
CLOCK_PERIOD = 5.0  # virtual seconds between two looks at the real clock
TICK = 0.001  # seconds: see `SimNetwork`
GC_THRESHOLDS = (200_000, 50, 1000)  # for `gc.set_threshold`


@dataclass(frozen=True)
class RecoveryConfig:
    """What `labkit bench recovery` measures.

    Args:
        servers: Servers at any time; 0 for 12, or those of `full`.
        experts: Experts in all, spread over them; 0 for 120, or those of `full`.
        minutes: Of training, in virtual time; 0 for 10, or those of `full`.
        life: Mean life of a server in minutes.
        trainers: Trainers; 0 for 8, or those of `full`.
        step_s: Seconds that a trainer computes itself in a step.
        k_best: Experts that each step calls, forward and backward.
        hidden: Width of the experts; they have 24 * hidden^2 parameters.
        rtt_ms: Round trip, in milliseconds.
        upload: What each node sends at most, in Mbit/s.
        backups: Copies of each expert at other servers.
        seed: Of everything random.
        at_most: Real minutes after which the training ends in any case; 0 for none. The result says how long it was.
        full: Whether to take 100 servers, 1,000 experts, 64 trainers and two hours where nothing else is said.

    Raises:
        ValueError: A value is not possible.
    """

    servers: int = 0
    experts: int = 0
    minutes: float = 0.0
    life: float = 10.0
    trainers: int = 0
    step_s: float = 2.0
    k_best: int = 4
    hidden: int = 8
    rtt_ms: float = 100.0
    upload: float = 20.0
    backups: int = 1
    seed: int = 0
    at_most: float = 0.0
    full: bool = False

    def __post_init__(self) -> None:
        for name, value in (FULL if self.full else USUAL).items():
            if getattr(self, name) == 0:
                object.__setattr__(self, name, value)
        check_at_least(2, self, "servers")
        check_at_least(1, self, "trainers", "k_best", "hidden", "backups")
        for name in ("minutes", "life", "rtt_ms", "upload", "step_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: more than 0")
        if not self.at_most >= 0:
            raise ValueError(f"at_most={self.at_most}: real minutes, or 0")
        if self.experts < max(self.servers, self.k_best):
            raise ValueError(f"experts={self.experts}: at least one for each server, and at least k_best")

    @property
    def grid(self) -> tuple[int, int]:
        """The grid, as square as can be."""
        rows = next(n for n in range(math.isqrt(self.experts), 0, -1) if self.experts % n == 0)
        return rows, self.experts // rows


def count_in_virtual_time(config: RecoveryConfig, failing: bool) -> Counts:
    """Train with failures or without, in this process."""
    level, threads = logging.getLogger("labkit").level, torch.get_num_threads()
    logging.getLogger("labkit").setLevel(logging.ERROR)  # that servers leave is what is measured
    torch.set_num_threads(1)  # experts are small
    in_memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    try:
        with TemporaryDirectory(prefix="labkit-bench-", dir=in_memory) as folder:
            return run_in_virtual_time(_run, config, failing, Path(folder), collect_after=GC_THRESHOLDS)
    finally:
        torch.set_num_threads(threads)
        logging.getLogger("labkit").setLevel(level)


@dataclass(eq=False)
class _Server:
    """A server of the run."""

    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    contact: Contact | None = None
    held: Collection[str] = ()


@dataclass
class Counts:
    """What is counted in a run."""

    minutes: float = 0.0  # of training
    made: int = 0  # updates that were answered
    kept: int = 0  # those that are part of the experts at the end
    left: int = 0
    lost: int = 0
    taken_over: int = 0
    calls: int = 0
    failed_calls: int = 0
    copies: int = 0
    copy_bytes: int = 0
    training_bytes: int = 0
    gaps: list[float] = field(default_factory=list)  # seconds for which an expert was not served


@dataclass(eq=False)
class _Run:
    """One run."""

    config: RecoveryConfig
    network: SimNetwork
    folder: Path
    draw: random.Random
    counts: Counts = field(default_factory=Counts)
    servers: set[_Server] = field(default_factory=set)
    first: list[Contact] = field(default_factory=list)  # of a node that stays
    updates: dict[str, int] = field(default_factory=dict)  # the highest count that an expert's answers have had
    without: dict[str, float] = field(default_factory=dict)  # experts that nobody serves, and since when
    counting: bool = False

    # ------------------------------------------------------------ what is counted

    def hear(self, event: Event) -> None:
        """Count what servers say."""
        if not self.counting:
            return
        if isinstance(event, CopyStored):
            self.counts.copies += 1
        elif isinstance(event, ExpertTakenOver):
            self.counts.taken_over += 1

    def hear_calls(self, event: Event) -> None:
        """Count what trainers say."""
        if isinstance(event, CallFinished) and self.counting:
            self.counts.training_bytes += event.bytes
            if event.direction == "backward":
                self.counts.made += 1

    def note(self) -> None:
        """See which experts are served now."""
        if not self.counting:
            return
        now = trio.current_time()
        served = {uid for server in self.servers for uid in server.held}
        for uid in self.without.keys() & served:
            self.counts.gaps.append(now - self.without.pop(uid))
        for uid in self.uids - served - self.without.keys():
            self.without[uid] = now

    @cached_property
    def uids(self) -> set[str]:
        """All experts of the grid."""
        return set(grid_uids(GRID_NAME, self.config.grid))

    # ------------------------------------------------------------ servers

    async def serve(self, nursery: trio.Nursery, uids: Sequence[str]) -> _Server:
        """Start a server; a spare one without experts."""
        server, config = _Server(), self.config
        server_config = ServerConfig(
            uids=tuple(uids), grid=config.grid, options={"hidden": config.hidden}, backups=config.backups,
            spare=not uids, backend=BackendConfig(optimizer="sgd", lr=LEARNING_RATE), name=GRID_NAME, seed=config.seed,
            copies_dir=str(self.folder / self.draw.randbytes(8).hex()),
        )  # fmt: skip

        def on_held(held: Collection[str]) -> None:
            server.held = held
            self.note()

        async def run(*, task_status: trio.TaskStatus[Contact]) -> None:
            try:
                with server.scope:
                    await serve_experts(
                        self.network, Identity(self.draw.randbytes(32)), server_config, join=self.first, emit=self.hear,
                        executor=InlineCompute(), on_held=on_held, task_status=task_status,
                    )  # fmt: skip
            finally:
                self.servers.discard(server)
                server.held = ()
                self.note()

        self.servers.add(server)
        server.contact = await nursery.start(run)
        return server

    async def live(self, nursery: trio.Nursery, server: _Server) -> None:
        """Let a server live, leave for good, and another one come, again and again."""
        while True:
            await trio.sleep(self.draw.expovariate(1 / (60 * self.config.life)))
            self.counts.left += 1
            if self.draw.random() < 0.5:  # silently, as it seems to the others
                assert server.contact is not None
                self.network.unplug(server.contact)
            server.scope.cancel()
            await trio.sleep(COMING)
            while True:
                uids = self.free()
                try:
                    server = await self.serve(nursery, uids)
                    self.counts.lost += len(uids)
                    break
                except* LabkitError:  # others have come first
                    pass
                await trio.sleep(COMING)

    def free(self) -> list[str]:
        """Takes the places of the grid that nobody serves any more: their experts are lost, and begin anew."""
        now = trio.current_time()
        free = sorted(uid for uid, since in self.without.items() if now - since > LOOK_AGAIN)
        return free[: self.config.experts // self.config.servers]

    # ------------------------------------------------------------ at the end

    async def count(self, node: Node) -> int:
        """Returns the updates that all experts have made which are served now.

        Each is asked until it has answered, since many calls at once go through one uplink, and some would be too late.
        """
        client = ExpertClient(node.client, node.directory)
        x = [torch.ones(1, self.config.hidden)]
        self.updates.clear()
        with trio.move_on_after(COUNTING):
            while left := sorted({uid for server in self.servers for uid in server.held} - self.updates.keys()):
                held = await node.directory.holders(left)
                for start in range(0, len(left), COUNTED_AT_ONCE):
                    some = [held[uid] for uid in left[start : start + COUNTED_AT_ONCE] if uid in held]
                    await self.call(client, "forward", some, x)
                await trio.sleep(1)
        return sum(self.updates.values())

    def copy_size(self) -> int:
        """Returns the bytes of a copy."""
        sizes = [path.stat().st_size for path in self.folder.glob("*/*.safetensors")]
        return max(sizes, default=0)

    # ------------------------------------------------------------ trainers

    async def train(self, node: Node, seed: int) -> None:
        """Call a few experts, forward and backward, again and again, as a layer does."""
        draw, config = random.Random(seed), self.config
        client = ExpertClient(node.client, node.directory, self.hear_calls)
        uids = sorted(self.uids)
        x = torch.ones(ROWS, config.hidden)
        while True:
            await trio.sleep(config.step_s * draw.uniform(0.5, 1.5))
            found = await node.directory.find(draw.sample(uids, min(len(uids), 4 * config.k_best)))
            experts = [info for info in found.values() if info is not None][: config.k_best]
            answered = await self.call(client, "forward", experts, [x])
            await self.call(client, "backward", answered, [x, x])

    async def call(
        self, client: ExpertClient, direction: str, experts: Sequence[ExpertInfo], tensors: Sequence[Tensor]
    ) -> list[ExpertInfo]:
        """Call experts at the same time. Returns those that have answered."""
        answered: list[ExpertInfo] = []
        left, ended = len(experts), trio.Event()

        def done(info: ExpertInfo, outcome: Outcome) -> None:
            nonlocal left
            left -= 1
            self.counts.calls += self.counting
            if isinstance(outcome, RPCError):
                self.counts.failed_calls += self.counting
            else:
                answered.append(info)
                self.updates[info.uid] = outcome.updates
            if not left:
                ended.set()

        for info in experts:
            if direction == "forward":
                client.forward(info, tensors, [(self.config.hidden,)], partial(done, info), timeout=CALL_TIMEOUT)
            else:
                client.backward(info, tensors[:1], tensors[1:], partial(done, info), timeout=CALL_TIMEOUT)
        if experts:
            await ended.wait()
        return answered


async def _watch_the_clock(config: RecoveryConfig, minutes: float, *, say: bool) -> None:
    """Returns after so many virtual minutes, or earlier if the real ones are over."""
    began, real, said = trio.current_time(), time.perf_counter(), 0
    end = began + 60 * minutes
    while (now := trio.current_time()) < end:
        virtual, passed = (now - began) / 60, time.perf_counter() - real
        if config.at_most and passed > 60 * config.at_most:
            return
        if say and 10 * virtual / minutes >= said + 1:
            said = int(10 * virtual / minutes)
            print(f"{virtual:.1f} of {minutes:g} virtual minutes took {passed:.0f} s", file=sys.stderr, flush=True)
        await trio.sleep_until(min(now + CLOCK_PERIOD, end))


async def _run(config: RecoveryConfig, failing: bool, folder: Path) -> Counts:
    """Train for a while, with or without failures."""
    minutes = config.minutes if failing else min(config.minutes, STEADY_MINUTES)
    seconds = config.rtt_ms / 2000
    options = {"latency": seconds, "uplink": config.upload * 1e6 / 8, "handshake": 2.0, "tick": TICK}
    async with open_simnet(config.seed, **options) as network, trio.open_nursery() as nursery:
        run = _Run(config, network, folder, random.Random(config.seed))
        async with AsyncExitStack() as stack:
            nodes: list[Node] = []
            for _ in range(max(1, math.ceil(config.trainers / TRAINERS_PER_NODE))):
                node = await stack.enter_async_context(
                    open_node(network, Identity(run.draw.randbytes(32)), join=run.first)
                )
                nodes.append(node)
                run.first = run.first or [node.contact]
            servers = [
                await run.serve(nursery, uids) for uids in spread(grid_uids(GRID_NAME, config.grid), config.servers)
            ]
            await trio.sleep(WARM_UP)
            run.counting = True
            async with trio.open_nursery() as busy:
                for number in range(config.trainers):
                    busy.start_soon(run.train, nodes[number % len(nodes)], number)
                for server in servers if failing else ():
                    busy.start_soon(run.live, nursery, server)
                began, counts = trio.current_time(), run.counts
                await _watch_the_clock(config, minutes, say=failing and config.servers * minutes >= LONG)
                counts.minutes = (trio.current_time() - began) / 60
                busy.cancel_scope.cancel()
            counts.gaps += [trio.current_time() - since for since in run.without.values()]
            run.counting = False
            await trio.sleep(SETTLE)
            counts.kept = await run.count(nodes[0])
            counts.copy_bytes = counts.copies * run.copy_size()
        network.over = True
        nursery.cancel_scope.cancel()
    return counts
