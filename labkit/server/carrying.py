"""A server's part in copies: its experts are packed for others, and it carries on those of others.

Beside a batch's way: `copies.keeper` decides what is copied, claimed and handed over; `server/holdings` has the experts
that are served.

Order: the experts as copies see them, then what `server/serving` does with copies, from start to end.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import msgspec
import trio
from torch import Tensor

from labkit.contact import Contact
from labkit.copies.checking import check_copy
from labkit.copies.experts import Pack, PackedExpert, Plain
from labkit.copies.keeper import CopyKeeper
from labkit.copies.messages import CopyHead
from labkit.dht.node import DHTNode
from labkit.directory import Directory
from labkit.errors import CheckpointError, LabkitError, RemoteFailure, UnknownExpert
from labkit.events import Emit, Event, ExpertTakenOver
from labkit.expert_file import pack_expert, read_expert
from labkit.expert_uid import ExpertInfo
from labkit.server.backend import ExpertBackend
from labkit.server.building import build_in_thread
from labkit.server.layers import kind_name
from labkit.server.leaving import stop_timeout
from labkit.server.optimizer import BackendConfig
from labkit.server.pulse import Pulse
from labkit.server.server import ExpertServer
from labkit.server.statistics import MAX_TAKEOVERS, CopyStatistics, RecentHandOver, RecentTakeOver
from labkit.whereabouts import sleepless_clock
from labkit.wire.rpc_client import Client
from labkit.wire.rpc_types import Methods

HAND_OVER_SHARE = 0.5  # of the time that a clean stop may take, for handing over; what is handed over is not saved
COPY_ROOM = 1 << 20  # bytes of a copy that are not its parameters, at most
HURRIED_TIME = 0.7  # the same where a whole swarm is closed, within two seconds
ABOVE_CLAIMS = 2  # by which an epoch is above that of whoever claims the expert from a copy at the same moment
TAKE_BACK_PERIOD = 5.0  # seconds between two looks whether others serve what was left to them
TAKE_BACK_TIME = 30.0  # seconds that they have, if they have a copy
T = TypeVar("T")

logger = logging.getLogger(__name__)


class CarriedExperts:
    """The experts of one server: see `copies.experts.ServedExperts`."""

    def __init__(self, server: ExpertServer) -> None:
        self.began: dict[str, int] = {}  # updates of experts when they were carried on from a copy
        self._server = server
        self._template: tuple[BackendConfig, ExpertBackend] | None = None  # with whose shapes copies are compared

    @property
    def held(self) -> Mapping[str, int]:
        """The experts that are served, with their epochs."""
        return self._server.holdings.held

    @property
    def largest_copy(self) -> int:
        """Bytes of a copy at most: thrice those of an expert of this kind with the two moments of Adam."""
        return COPY_ROOM + 3 * 3 * self._server.parameter_bytes

    def updates(self, uid: str) -> int:
        """Optimizer steps that an expert has made."""
        return self._server.runtime.backends[uid].updates

    async def pack(self, uid: str) -> PackedExpert:
        """Returns an expert's state, taken between two batches."""
        runtime = self._server.runtime
        backend = runtime.backends.get(uid)
        if backend is None:
            raise UnknownExpert(f"this server does not hold expert {uid!r}")
        state = await runtime.snapshot(uid)
        return await self._pack(uid, backend, lambda: state)

    async def _pack(self, uid: str, backend: ExpertBackend, take: Callable[[], dict[str, Tensor]]) -> PackedExpert:
        def pack() -> tuple[bytearray, str, int]:
            state = take()
            return *pack_expert(uid, state, kind=backend.kind), int(state["counter.updates"])

        try:
            data, crc32, updates = await self._run(pack)
        except (TypeError, ValueError, RuntimeError, MemoryError) as error:
            raise RemoteFailure(f"{uid} cannot be copied: {error}") from None
        return PackedExpert(data, updates, crc32, backend.kind[:1000], asdict(backend.config))

    def check(self, head: CopyHead, path: Path) -> None:
        """Check the file of a copy. Raises `CheckpointError` if this server could not carry it on."""
        trained = self._trained(head.backend)
        if self._template is None or self._template[0] != trained:
            self._template = trained, self._server.make_blank(head.uid, trained, to_look_at=True)
        template = self._template[1]
        if head.kind.rpartition(":")[2] != template.kind.rpartition(":")[2]:
            raise CheckpointError(f"{head.uid} is of kind {head.kind!r}, and this server has {template.kind!r}")
        template.check_state(check_copy(head, path))

    async def adopt(self, uid: str, path: Path, backend: Mapping[str, Plain], epoch: int) -> None:
        """Carry an expert on from the file of a copy, and serve it from now on."""
        server = self._server

        def build() -> ExpertBackend:
            made = server.make_blank(uid, self._trained(backend))
            made.load_state(read_expert(path, uid, made.kind)[0])
            return made

        try:
            made = await build_in_thread(build, in_thread=server.in_thread)
            server.holdings.add(uid, made, epoch)
            self.began[uid] = made.updates
        except (OSError, ValueError, RuntimeError, MemoryError) as error:
            raise RemoteFailure(f"{uid} cannot be carried on: {error}") from None

    def is_kept(self, uid: str) -> bool:
        """Whether an expert is not to be given away only to make loads even."""
        return self._server.holdings.is_kept(uid)

    async def hold(self, uid: str) -> None:
        """Let requests of an expert wait. Returns when no batch of it is being computed any more."""
        self._server.holdings.hold(uid)
        await self._server.holdings.settle_expert(uid)

    def release(self, uid: str) -> None:
        """Let them go on."""
        self._server.holdings.release(uid)

    def give_up(self, uid: str, to: Contact | None, epoch: int) -> Pack | None:
        """Serve an expert no more. Returns what takes its state as it was; None if it was not served."""
        backend = self._server.holdings.give_up(uid, to, epoch)

        async def pack() -> PackedExpert:
            assert backend is not None
            await self._server.runtime.settle_expert(uid)
            return await self._pack(uid, backend, backend.state)

        return None if backend is None else pack

    def moved(self, uid: str) -> tuple[Contact, int] | None:
        """Where an expert is that was given up, and its epoch there, if that is known."""
        return self._server.holdings.moved(uid)

    def raise_epoch(self, uid: str, epoch: int) -> None:
        """Serve an expert with a higher epoch than so far."""
        self._server.holdings.raise_epoch(uid, epoch)

    def name_copies(self, copies: Mapping[str, tuple[bytes, ...]], *, at_once: bool) -> None:
        """Let it be declared who has copies."""
        self._server.holdings.name_copies(copies, at_once=at_once)

    def _trained(self, said: Mapping[str, Plain]) -> BackendConfig:
        """How an expert from elsewhere is trained: as it was, on the device of this server."""
        own = self._server.config.backend
        known = {field.name for field in fields(BackendConfig)} - {"device", "max_batch_size"}
        kept: dict[str, Any] = {name: value for name, value in said.items() if name in known}
        try:
            return replace(own, **kept)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"the copy says how its expert is trained, and that is wrong: {error}") from None

    async def _run(self, function: Callable[[], T]) -> T:
        if self._server.in_thread:
            return await trio.to_thread.run_sync(function)
        await trio.lowlevel.checkpoint()
        return function()


class Carrying:
    """What a server does with copies, if it takes part in them; if not, nothing.

    Args:
        server: The server.
        emit: Gets the events of copies.
    """

    def __init__(self, server: ExpertServer, emit: Emit) -> None:
        self.keeper: CopyKeeper | None = None
        self._server = server
        self._experts = CarriedExperts(server)
        self._emit = emit
        self._takeovers = deque[tuple[float, ExpertTakenOver]](maxlen=MAX_TAKEOVERS)  # with the time on trio's clock
        self._handovers = deque[tuple[float, RecentHandOver]](maxlen=MAX_TAKEOVERS)
        config = server.config
        self._takes_part = config.carries
        self._temporary: TemporaryDirectory[str] | None = None
        self._left: dict[str, int] = {}  # experts that were left to others at the start, and their epochs
        self._clock = sleepless_clock if server.in_thread else trio.current_time

    def methods(self, client: Client, dht: DHTNode, directory: Directory) -> Methods:
        """The methods of the server, of which some are about copies."""
        server, config = self._server, self._server.config
        if not self._takes_part:
            return server.methods
        if config.copies_dir is None:
            self._temporary = TemporaryDirectory(prefix="labkit-copies-")
        self.keeper = keeper = CopyKeeper(
            client, dht, directory, self._experts, grid=config.name, kind=kind_name(config.kind),
            backups=config.backups, is_spare=lambda: config.spare or len(server.holdings.held) < len(config.uids),
            folder=Path(self._temporary.name if self._temporary else config.copies_dir or ""), own=lambda: dht.contact,
            emit=self._note, on_taken=self._note_taken, in_thread=server.in_thread,
        )  # fmt: skip
        server.holdings.on_outdated = lambda uid, epoch: keeper.meeting.suspect(uid)
        server.copies = self.statistics
        return {**server.methods, **keeper.methods}

    async def leave_to_others(self, unowned: Collection[str], refused: Exception | None) -> None:
        """Before the first declaration: give up what others have by now, or are about to take over from a copy.

        What was saved here and is newer than every copy is not given up.

        Args:
            unowned: The experts whose checkpoints another server owns, which thus are not served here.
            refused: Why that is so.

        Raises:
            Exception: What `refused` is, if no other server of this swarm has these.
        """
        if self.keeper is None:
            return
        held = dict(self._server.holdings.held)
        found = await self.keeper.carried_by_others([*held, *unowned])
        if refused is not None and not (found.served | found.copied.keys()).issuperset(unowned):
            raise refused
        for uid in held:
            copy, epoch = found.copied.get(uid), found.epochs.get(uid, 0)
            if uid in found.served or (copy is not None and copy.updates >= self._experts.updates(uid)):
                self._server.holdings.give_up(uid)
                self._left[uid] = epoch
            elif copy is not None:  # nobody has what our checkpoint has
                logger.info("the checkpoint of %s is newer than all of its copies: it is served here", uid)
                self._server.holdings.raise_epoch(uid, epoch + ABOVE_CLAIMS)

    async def _take_back(self) -> None:
        """Serve again what was left to others, if none of them serves it after all."""
        keeper, holdings = self.keeper, self._server.holdings
        began = trio.current_time()
        while keeper is not None and self._left and not keeper.leaving:
            await trio.sleep(TAKE_BACK_PERIOD)
            try:
                found = await keeper.carried_by_others(self._left)
            except LabkitError as error:
                logger.debug("%s", error)
                continue
            for uid, epoch in list(self._left.items()):
                if uid in found.served or uid in holdings.held:
                    del self._left[uid]
                elif uid not in found.copied or trio.current_time() - began > TAKE_BACK_TIME:
                    logger.warning("nobody serves %s, which was left to others: it is served here again", uid)
                    with suppress(ValueError):  # it was taken over here meanwhile
                        await self._server.adopt(uid, max(epoch, found.epochs.get(uid, 0)) + 1)
                    keeper.meeting.suspect(uid)
                    self._left.pop(uid, None)

    async def on_rivals(self, others: Mapping[str, ExpertInfo]) -> Collection[str]:
        """Settle with servers that have declared experts of ours, too, who goes on with them."""
        return () if self.keeper is None else await self.keeper.meeting.resolve(others)

    def give_up(self, uid: str, info: ExpertInfo, *, was_served: bool) -> None:
        """Serve an expert no more that another server has declared. What it was here is kept, if it was called."""
        if self.keeper is not None and was_served:
            self.keeper.meeting.give_way(uid, info.contact, info.epoch)
        else:
            self._server.holdings.give_up(uid, info.contact, info.epoch)

    def lost_updates(self, uid: str, info: ExpertInfo) -> int:
        """How many updates of an expert are lost if the other server keeps it, which has said nothing itself."""
        backend = self._server.runtime.backends.get(uid)
        return 0 if backend is None else max(0, backend.updates - self._copied(uid))

    def _copied(self, uid: str) -> int:
        copied = 0 if self.keeper is None else self.keeper.copying.copied_updates(uid)
        return max(copied, self._experts.began.get(uid, 0))

    def statistics(self) -> CopyStatistics | None:
        """How the server takes part in copies; None if it does not."""
        if self.keeper is None:
            return None
        keeper, held, began_with = self.keeper, self._server.holdings.held, self._server.config.uids
        at_risk, now = len(keeper.copying.at_risk()) if keeper.backups else 0, trio.current_time()
        said = CopyStatistics(
            keeper.backups, keeper.kept, len(held) - at_risk if keeper.backups else 0, at_risk, self._period(),
            keeper.copying.sent_bytes,
        )  # fmt: skip
        said.adopted = list(held.keys() - set(began_with))
        said.takeovers = [
            RecentTakeOver(e.uid, e.before, e.epoch, e.lost_updates, e.seconds, max(0.0, now - at))
            for at, e in self._takeovers
        ]
        said.handovers = [msgspec.structs.replace(one, ago=max(0.0, now - at)) for at, one in self._handovers]
        return said

    def _period(self) -> float:
        """Seconds between two copies of an expert that learns: as many as copies of all of them take, ten at least."""
        if self.keeper is None or not self.keeper.backups:
            return 0.0
        backends = self._server.runtime.backends  # all of one kind
        size = next(iter(backends.values())).state_bytes * len(backends) if backends else 0
        return max(self.keeper.copying.period, self.keeper.backups * size / self.keeper.copying.rate)

    def _note_taken(self, uid: str, before: Contact, epoch: int) -> None:
        self._handovers.append((trio.current_time(), RecentHandOver(uid, before.endpoint, epoch, 0.0)))

    def _note(self, event: Event) -> None:
        if isinstance(event, ExpertTakenOver):
            self._takeovers.append((trio.current_time(), event))
        self._emit(event)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Copy, watch and take over until cancelled."""
        try:
            if self.keeper is not None:
                async with trio.open_nursery() as nursery:
                    pulse = Pulse(self.keeper.look_around, self._clock)
                    self._server.holdings.pulse = pulse
                    nursery.start_soon(pulse.run)
                    nursery.start_soon(self._take_back)
                    await self.keeper.run(task_status=task_status)
            task_status.started()
        finally:
            if self._temporary is not None:
                self._temporary.cleanup()

    async def hand_over(self, hurry: trio.Event) -> None:
        """Hand experts over at a clean stop; `hurry`: set while, or before, this runs, if there is little time."""
        if self.keeper is None:
            return
        async with trio.open_nursery() as nursery:

            async def end_soon() -> None:
                await hurry.wait()
                await trio.sleep(HURRIED_TIME)
                nursery.cancel_scope.cancel()

            nursery.start_soon(end_soon)
            with trio.move_on_after(HAND_OVER_SHARE * stop_timeout(self._server.runtime.backends.values())):
                await self.keeper.leave()
            nursery.cancel_scope.cancel()
