"""A swarm with copies to which things happen: what must hold all the time, and in the end.

`python -m tests.recovery_trials 0 300` tries the schedules of these seeds, in virtual time, one after the other.
"""

from __future__ import annotations

import argparse
import logging
import math
import random
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import trio

from labkit.errors import LabkitError, RPCError
from labkit.events import Event, ExpertGivenUp, ExpertTakenOver
from labkit.expert_uid import grid_uids
from labkit.node import Node, open_node
from labkit.server.optimizer import BackendConfig
from labkit.simulation.virtual_clock import run_in_virtual_time
from labkit.wire.security import Identity
from tests.copied_swarms import CopiedSwarm, Server, X, copied_swarm

GRID = (2, 3)
UIDS = list(grid_uids("ffn", GRID))
SERVERS = 4
CALM = BackendConfig(optimizer="sgd", lr=1e-5)  # with which experts learn for long without growing
TWICE = 8.0  # seconds for which two servers of one partition may both serve an expert
STRANGERS = 25.0  # seconds in which two find each other in the DHT, after they were apart, of which neither calls the
# other: neither has taken anything over there, or who had is gone, or one has started elsewhere meanwhile
AGREED = 15.0  # seconds after everything has healed in which all agree
EXPIRED = 35.0  # the same where a server died in a divided network: what it declared in a higher epoch has to expire
LOOK = 0.25  # seconds between two looks
JUST_STARTED = 2.0  # seconds in which a server may not have heard those yet whose experts it has copies of
DECLARED = 11.0  # seconds in which it is declared, and then said, that an expert was taken over
ON_THE_WAY = 0.5  # seconds that an answer, or what a watcher hears, may take
STEPS = ("kill", "kill", "restart", "spare", "split", "split", "heal", "lossy", "slow")
PAUSES = (0.0, 0.3, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0)


class Step(NamedTuple):
    """What happens, after some seconds, and to which server (or, for a division, to which of them)."""

    after: float
    what: str
    which: int = 0


@dataclass(eq=False)
class Trial:
    """What is known while the steps happen."""

    swarm: CopiedSwarm
    backups: int
    far: Node  # a second node, which goes with the servers that are cut off
    uids: dict[Server, tuple[str, ...]] = field(default_factory=dict)
    cut: set[Server] = field(default_factory=set)
    updates: Counter[str] = field(default_factory=Counter)  # of each expert in the end
    forfeit: set[str] = field(default_factory=set)  # of which nobody had anything any more
    died_apart: bool = False  # whether a server died while the network was divided, or before it was met again
    healed: float = -math.inf  # when servers came together that were apart
    began_apart: bool = False  # whether one has started then
    strangers_met: float = -math.inf  # when servers came together that were apart, and do not call each other
    twice: dict[str, float] = field(default_factory=dict)  # experts that two serve, and since when
    learnt: dict[str, list[tuple[float, int]]] = field(default_factory=lambda: defaultdict(list))  # what was answered:
    # when, and how many updates the expert had
    started: dict[str, float] = field(default_factory=dict)  # endpoints of servers that were restarted, and when
    happened: list[tuple[float, Event]] = field(default_factory=list)  # take-overs and what was given up, and when

    @property
    def alive(self) -> list[Server]:
        return [server for server in self.swarm.servers if server.is_alive]

    async def do(self, step: Step) -> None:
        """Let a step happen."""
        alive, network = self.alive, self.swarm.network
        server = alive[step.which % len(alive)]
        if step.what == "kill" and len(alive) > 1:
            await self.kill(server)
        elif step.what == "restart":
            dead = [one for one in self.swarm.servers if not one.is_alive and one in self.uids]
            for one in dead[step.which % len(dead) :][:1] if dead else ():
                await self.restart(one)
        elif step.what == "spare" and len(alive) < SERVERS + 2:
            self.began_apart = self.began_apart or bool(self.cut)
            try:
                await self.swarm.serve(grid=GRID, backups=self.backups, backend=CALM)
            except* LabkitError:
                pass  # its calls were lost
        elif step.what == "split":
            if self.cut:  # who has started on one side may know nobody on the other
                self.strangers_met = math.inf if self.began_apart else trio.current_time()
                self.healed = trio.current_time()
            self.cut = {one for n, one in enumerate(alive) if step.which >> n & 1}
            network.partition([self.far.contact, *(one.contact for one in self.cut)])
        elif step.what == "heal":
            self.heal()
        elif step.what == "lossy":
            network.loss = 0.03
        elif step.what == "slow":
            network.slow_down(server.contact, 0.3)

    def heal(self) -> None:
        if self.began_apart or self.died_apart or self.strangers_met == math.inf:
            self.strangers_met = trio.current_time()
        if self.cut:
            self.healed = trio.current_time()
        self.cut, self.began_apart = set(), False
        self.swarm.network.heal()
        self.swarm.network.loss = 0.0
        for server in self.swarm.servers:
            self.swarm.network.slow_down(server.contact, 0.0)

    async def kill(self, server: Server) -> None:
        await server.kill()
        self.died_apart = self.died_apart or bool(self.cut) or trio.current_time() < self.healed + AGREED
        for uid in UIDS:
            if not any(uid in one.held or one.has_copy(uid) for one in self.alive):
                self.forfeit.add(uid)

    async def restart(self, server: Server) -> None:
        uids = self.uids.pop(server)
        self.began_apart = self.began_apart or bool(self.cut)
        try:
            again = await self.swarm.serve(
                uids,
                grid=GRID,
                identity=server.identity,
                copies_dir=str(server.copies),
                backups=self.backups,
                backend=CALM,
            )
            self.uids[again] = uids
            self.started[again.contact.endpoint] = trio.current_time()
        except* LabkitError:
            pass  # it is too early: the network is divided, or others have its experts

    async def train(self, node: Node, seed: int) -> None:
        """Call experts as they are found in the cache."""
        draw = random.Random(seed)
        while True:
            await trio.sleep(draw.uniform(0.2, 0.6))
            uid = draw.choice(UIDS)
            with suppress(LabkitError):
                info = (await node.directory.find([uid]))[uid]
                if info is not None:
                    updates = await self.swarm.call(info, "backward", [X, torch.ones_like(X)], node)
                    self.learnt[uid].append((trio.current_time(), updates))

    async def watch(self) -> None:
        """Fail when two servers of one partition serve an expert for too long."""
        while True:
            await trio.sleep(LOOK)
            now, double = trio.current_time(), set[str]()
            for side in (self.cut, set(self.alive) - self.cut):
                served = [uid for server in side if server.is_alive for uid in server.held]
                double |= {uid for uid in served if served.count(uid) > 1}
            self.twice = {uid: self.twice.get(uid, now) for uid in double}
            for uid, since in self.twice.items():
                assert now <= max(since + TWICE, self.strangers_met + STRANGERS), (
                    f"{uid} is served twice for {now - since:.1f} s"
                )

    async def until_agreed(self) -> None:
        """Wait until all agree. Experts may still be handed over now and then, so that this need not last."""
        end = trio.current_time() + (EXPIRED if self.died_apart else AGREED)
        while True:
            try:
                await self.check()
                return
            except AssertionError:
                if trio.current_time() > end:
                    raise
                await trio.sleep(LOOK)

    async def check(self) -> None:
        """Fail unless each expert is served once, and found and answering there."""
        for uid in UIDS:
            if uid in self.forfeit:
                continue
            servers = [server for server in self.alive if uid in server.held]
            assert len(servers) == 1, f"{uid} is served by {len(servers)} servers"
            for node in (self.swarm.node, self.far):
                info = (await node.directory.find([uid]))[uid]
                assert info is not None, f"{uid} is not found"
                assert info.contact == servers[0].contact, f"{uid} is found where it is not"
                try:
                    self.updates[uid] = await self.swarm.call(info, "forward", [X], node)
                except RPCError as error:
                    raise AssertionError(f"{uid} does not answer: {error}") from None

    def hear(self, event: Event) -> None:
        """Take note of an event of a server."""
        self.swarm.events.append(event)
        if isinstance(event, ExpertTakenOver | ExpertGivenUp):
            self.happened.append((trio.current_time(), event))

    def check_updates(self) -> None:
        """Fail if an expert has fewer updates than were answered, beyond those that were counted as lost.

        What was answered after a server was heard last is not known to whoever takes its experts over; who has just
        been restarted has not heard it at all. And nobody counts what a server learnt that died in a divided network.
        """
        unheard = {
            event.uid
            for at, event in self.happened
            if isinstance(event, ExpertTakenOver) and at - self.started.get(event.address, -math.inf) < JUST_STARTED
        }
        for uid in UIDS if not self.died_apart else ():
            if uid in self.forfeit | unheard or not self.learnt[uid]:
                continue
            counted = 0
            for at, event in self.happened:
                if isinstance(event, ExpertTakenOver | ExpertGivenUp) and event.uid == uid:
                    counted += event.lost_updates
                if isinstance(event, ExpertTakenOver) and event.uid == uid:
                    heard = at - event.seconds - ON_THE_WAY
                    counted += sum(heard < when <= at for when, _ in self.learnt[uid])
            most = max(updates for _, updates in self.learnt[uid])
            assert most <= self.updates[uid] + counted, (
                f"{uid} had {most} updates and has {self.updates[uid]}; {counted} are counted as lost"
            )


async def run_trial(folder: Path, steps: Sequence[Step], *, backups: int = 1, seed: int = 0) -> Trial:
    """Let steps happen to a swarm of four servers and six experts. Raises `AssertionError` if something is wrong."""
    random.seed(seed)
    async with copied_swarm(folder, latency=0.02) as swarm:
        async with open_node(swarm.network, Identity(b"\1" * 32), join=[swarm.node.contact]) as far:
            trial = Trial(swarm, backups, far)
            swarm.emit = trial.hear
            for server in await swarm.serve_grid(SERVERS, GRID, backups=backups, backend=CALM):
                trial.uids[server] = tuple(server.held)
            await swarm.until_copied(1, GRID)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trial.train, swarm.node, 1)
                nursery.start_soon(trial.train, far, 2)
                nursery.start_soon(trial.watch)
                for step in steps:
                    await trio.sleep(step.after)
                    await trial.do(step)
                trial.heal()
                await trial.until_agreed()
                nursery.cancel_scope.cancel()
            await trial.until_agreed()  # and nobody learns any more
            await trio.sleep(DECLARED)
            trial.check_updates()
    return trial


def try_out(steps: Sequence[Step], backups: int = 1, seed: int = 0) -> Trial:
    """Let steps happen, in virtual time. Raises what went wrong, such as `AssertionError`."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return run_in_virtual_time(partial(run_trial, Path(folder), steps, backups=backups, seed=seed))
        except BaseExceptionGroup as group:
            error: BaseException = group
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            raise error from None


def drawn(seed: int) -> tuple[list[Step], int]:
    """The steps, and the copies of each expert, of a seed."""
    draw = random.Random(seed)
    steps = [Step(draw.choice(PAUSES), draw.choice(STEPS), draw.randrange(16)) for _ in range(draw.randint(1, 7))]
    return steps, draw.choice([1, 1, 2])


def main() -> None:
    """Try seeds out, and say which of them have found something."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("first", type=int)
    parser.add_argument("end", type=int)
    options = parser.parse_args()
    logging.getLogger("labkit").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    found = 0
    for seed in range(options.first, options.end):
        steps, backups = drawn(seed)
        try:
            try_out(steps, backups, seed)
        except (AssertionError, LabkitError, trio.TooSlowError) as error:
            found += 1
            print(f"seed {seed}: {type(error).__name__}: {error}\n    backups={backups} {steps}", flush=True)
    print(f"{options.end - options.first} trials, {found} of which have found something")
    sys.exit(found > 0)


if __name__ == "__main__":
    main()
