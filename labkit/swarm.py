"""The swarm: what a notebook holds. It starts or joins one, serves experts in it, and makes layers that call them.

One lab thread runs all of its network; the methods here may be called from any other thread and block until they are
done.
"""

from __future__ import annotations

import atexit
import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio
from torch import nn

from labkit.client.expert import RemoteExpert
from labkit.client.expert_client import ExpertClient
from labkit.client.moe import MixtureOfExperts
from labkit.client.session import Session, close_session, open_session
from labkit.contact import Contact, Invitation
from labkit.directory.grids import GridInfo
from labkit.errors import RPCError, SwarmClosed
from labkit.events import Emit, Listeners
from labkit.expert_uid import ExpertInfo, check_grid, split_uid
from labkit.faults import Faults
from labkit.launch.handle import Lab, ServerHandle, begin_all, end_all
from labkit.launch.planning import (
    check_all_places,
    choose_places,
    dispatch_config,
    fit_options,
    grid_name,
    isolate,
    known_sizes,
    plan_servers,
)
from labkit.node import NodeConfig, open_node
from labkit.portal import Portal
from labkit.server.layers import Factory
from labkit.server.optimizer import BackendConfig
from labkit.server.server import ServerConfig, checkpoint_directory
from labkit.server.statistics import ServerStatistics
from labkit.view.collect.inventory import ask_everybody
from labkit.view.collect.telemetry import Telemetry
from labkit.view.page.remote_service import Viewers
from labkit.view.summary import Census, SwarmSummary, all_experts, all_grids, summarize, take_census
from labkit.view.swarm_view import SwarmView
from labkit.wire.security import Identity, Members, parse_key
from labkit.wire.transport import LOOPBACK
from labkit.wire.zmq_transport import open_network

if TYPE_CHECKING:
    from labkit.view.log.swarm_logging import Logging
    from labkit.view.page.dashboard import Dashboard
    from labkit.view.picture.snapshot import Picture

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT = 2.0  # seconds that `close` takes at most
CLEAN_STOP_TIME = 1.2  # seconds of those that servers have to save their experts

_open: dict[str, Swarm] = {}


class Swarm:
    """Start a swarm: a lab thread with one node. `Swarm.join(invite)` joins one instead.

    `name`: a swarm of the same name in this process is closed first, so a cell may run twice. `listen`, `announce`,
    `secure`: see `ZmqNetwork.listen`; the default listens on loopback only and does not encrypt. `key`: the file of a
    key that stays the same (made by `labkit keygen`); by default it is new each time. `members`: public keys; makes the
    swarm private. Use it as a context manager, or `close()` it; at exit it is closed anyway.
    """

    def __init__(
        self,
        name: str = "default",
        *,
        listen: str = LOOPBACK,
        announce: str | None = None,
        secure: bool | None = None,
        key: str | Path | Identity | None = None,
        members: Sequence[str] | None = None,
        node: NodeConfig | None = None,
        _join: tuple[Contact, ...] = (),
    ) -> None:
        identity = key if isinstance(key, Identity) else Identity.generate() if key is None else Identity.load(key)
        self.name = name
        self.servers: list[ServerHandle] = []
        self.telemetry = Telemetry()
        self.listeners = Listeners()
        self.listeners.add(self.telemetry)
        self._faults = Faults()
        self.viewers = Viewers(lambda: getattr(self, "view", None))
        keys = None if members is None else [identity.public_key, *map(parse_key, members)]
        self._node_config = replace(node or NodeConfig(), listen=listen, announce=announce, secure=secure)
        if name in _open:
            _open[name].close()
        self._folder = tempfile.TemporaryDirectory(prefix="labkit-", ignore_cleanup_errors=True)
        self._members = Members(keys, Path(self._folder.name) / "members")
        self._members.admit()
        self._portal = Portal(name)
        try:
            self._lab: Lab = self._portal.start(self._run, identity, _join)
        except BaseException:
            self._portal.close()
            self._folder.cleanup()
            raise
        self._node = self._lab.node
        experts = ExpertClient(self._node.client, self._node.directory, self.listeners)
        self._session = Session(name, self._portal, self._node.directory, experts, self.listeners)
        open_session(self._session)
        self.view = SwarmView(self, self._lab, lambda: experts.in_flight)
        _open[name] = self

    @classmethod
    def join(cls, invite: str, *, name: str | None = None, **options: Any) -> Swarm:
        """Join the swarm of an invitation. `options` as for `Swarm`.

        Raises `InviteError` for a text that is none, `JoinError` within 10 seconds if it cannot be joined: it says for
        which address, why, and what to try.
        """
        contact = Contact.from_invitation(invite)
        if contact.secure and not contact.is_loopback and "listen" not in options:
            options["listen"] = "tcp://0.0.0.0:*"  # what is to be called back from another machine
        elif contact.secure:
            options.setdefault("secure", True)
        return cls(name or f"joined {contact.endpoint}", _join=(contact,), **options)

    async def _run(self, identity: Identity, join: tuple[Contact, ...], *, task_status: trio.TaskStatus[Lab]) -> None:
        """The life of the swarm's node, in the lab thread."""
        config, admission, methods = self._node_config, self._members.admission(), self.viewers.methods
        async with (
            open_network(config.limits.frames) as network,
            open_node(
                network, identity, config, join=join, methods=methods, admission=admission, emit=self.listeners
            ) as node,
            trio.open_nursery() as nursery,
        ):
            task_status.started(Lab(self._portal, nursery, network, node, self._faults, self.listeners))
            await trio.sleep_forever()

    # ------------------------------------------------------------ serving

    def serve(
        self,
        kind: str | Factory = "ffn",
        *,
        grid: Sequence[int] | None = None,
        experts: int | None = None,
        servers: int = 1,
        name: str | None = None,
        uids: Sequence[str] | None = None,
        isolation: str | None = None,
        checkpoint_dir: str | Path | None = None,
        checkpoint_period: float | None = None,
        backend: BackendConfig | None = None,
        threads: int | None = None,
        seed: int | None = None,
        **options: Any,
    ) -> list[ServerHandle]:
        """Start local expert servers and return when their experts can be found; they are in `swarm.servers` too.

        `kind`: "ffn", "transformer", "nop", a name given to `register_expert`, or any factory of an `nn.Module`, with
        its `options` (`hidden=256`). `grid`: the grid to serve in (by default that of the running swarm, or one of
        `experts`); `experts`: how many of its free places to take, all by default, or `uids`: which. `isolation`:
        "process", or "task" for one in this process; by default a process wherever a process can import the kind, else
        a task; a name that only this process knows needs "task". `checkpoint_dir`: where experts are loaded from and
        saved to; by default a folder that goes with the swarm. `checkpoint_period`: every how many seconds; by
        default ten, or more where saves would take over a fiftieth of the time. `backend`: optimizer and limits.
        `threads`: torch's, in each server; by default the servers here share this process's number. `seed`: makes an
        expert's fresh parameters a function of it and of the uid; of experts in this process only if nothing else draws
        numbers from torch while they are made. Raises `ValueError`, `ServerFailed`.
        """
        if backend is not None and not isinstance(backend, BackendConfig):
            raise ValueError(f"backend={backend!r}: a BackendConfig, such as lk.BackendConfig(lr=1e-3)")
        name = grid_name(kind, name, uids)
        known = self.grids().get(name)
        given, options = options, fit_options(kind, options, name, known)
        isolation, kind = isolate(isolation, kind, options)
        sizes, chosen = self._portal.call(choose_places, self._node, name, known, grid, experts, uids)
        if options != given and experts is None and uids is None:
            check_all_places(kind, options, name, len(chosen))
        directory = checkpoint_directory(checkpoint_dir or Path(self._folder.name) / "checkpoints")
        config = ServerConfig(
            uids=tuple(chosen), grid=sizes, kind=kind, options=options, backend=backend or BackendConfig(),
            checkpoint_dir=directory, checkpoint_period=checkpoint_period, threads=threads, seed=seed,
        )  # fmt: skip
        plans = plan_servers(
            config, servers, self._node_config, self._node.contact, member_file=self._members.file,
            lasting=checkpoint_dir is not None, beside=sum(server.alive for server in self.servers),
        )  # fmt: skip
        self._members.admit(*(plan.identity.public_key for plan in plans))
        handles = [ServerHandle(self._lab, plan, isolation) for plan in plans]
        self._portal.call(begin_all, handles)
        self.servers += handles
        return handles

    def faults(self, latency: float | None = None, loss: float | None = None) -> Faults:
        """Inject faults into all servers started here, from now on, and into those started later. `server.faults` is
        for one of them.

        `latency`: mean in seconds of an exponentially distributed delay before each call; `loss`: share of calls that
        get no answer. What is left out stays as it is. Returns what holds now. Raises `ValueError`.
        """
        self._faults.set(latency, loss)
        if latency is not None or loss is not None:
            self._portal.call(self._apply_faults, latency, loss)
        return self._faults

    async def _apply_faults(self, latency: float | None, loss: float | None) -> None:
        for server in self.servers:
            await server.apply_faults(latency, loss)

    def statistics(self, timeout: float = 5.0) -> dict[str, ServerStatistics]:
        """How all servers of the swarm are doing, wherever they were started, by address.

        They are looked up anew, so one that has just joined is among them, and this swarm's layers know its experts
        from here on. Those that give no answer, or no sensible one, within `timeout` seconds are missing.
        """
        return self._portal.call(ask_everybody, self._node, self.servers, timeout)

    # ------------------------------------------------------------ layers

    def moe(
        self,
        dim: int,
        grid: Sequence[int] | None = None,
        name: str = "ffn",
        *,
        routing: str = "softmax",
        jitter: float = 0.0,
        grid_dropout: float = 0.0,
        **dispatch: Any,
    ) -> MixtureOfExperts:
        """A layer [..., dim] -> [..., dim] over the grid `name` of this swarm. See `MixtureOfExperts`.

        `grid`: its sizes, by default those that its servers declare. `dispatch`: `k_best`, `k_min`, timeouts, and what
        else `DispatchConfig` has. Raises `ValueError`.
        """
        grids = self.grids()
        sizes = check_grid(grid) if grid is not None else known_sizes(grids, name)
        if name in grids and grids[name].sizes != sizes and any(split_uid(uid)[0] == name for uid in self.experts()):
            raise ValueError(f"grid={sizes}: the grid {name!r} has the sizes {grids[name].sizes}; leave grid=… out")
        return MixtureOfExperts(
            dim, sizes, name, swarm=self.name, routing=routing, jitter=jitter, grid_dropout=grid_dropout,
            dispatch=dispatch_config(sizes, dispatch),
        )  # fmt: skip

    def expert(self, uid: str, *, timeout: float = 10.0, codec: str = "none") -> RemoteExpert:
        """One expert as a module: [rows, ...] -> [rows, ...]."""
        return RemoteExpert(uid, self.name, timeout=timeout, codec=codec)

    def attach(self, model: nn.Module) -> nn.Module:
        """Let the MoE layers of a model that was loaded or copied from elsewhere call this swarm's experts."""
        for module in model.modules():
            if isinstance(module, (MixtureOfExperts, RemoteExpert)):
                module.swarm = self.name
        return model

    # ------------------------------------------------------------ looking

    def grids(self) -> dict[str, GridInfo]:
        """The grids that are served in this swarm, by name."""
        return self._portal.call(all_grids, self._node)

    def experts(self) -> dict[str, ExpertInfo]:
        """All experts that are alive, by uid, of all grids."""
        return self._portal.call(all_experts, self._node, self.grids())

    def experts_alive(self) -> int:
        """How many experts the directory offers, without asking the network."""
        return self._portal.call(self._count_known)

    async def _count_known(self) -> int:
        return len(self._node.directory.known())

    def on_event(self, listener: Emit) -> Callable[[], None]:
        """Hear every event of this process; called in the thread where it happens. Returns a function that ends it."""
        return self.listeners.add(listener)

    def invite(self) -> Invitation:
        """The invitation to this swarm: `labkit://<public key>@host:port`."""
        return Invitation(self._node.contact)

    def admit(self, key: str) -> None:
        """Let the holder of this public key into a private swarm, from now on. Raises `ValueError`."""
        if not self._members.admit(parse_key(key)):
            raise ValueError("this swarm is open: everybody who has the invitation may join")

    def dashboard(self) -> Dashboard:
        """The live view of this swarm, a widget; always the same one, wherever it is shown, until it is closed."""
        return self.view.dashboard()

    def snapshot(self, path: str | Path | None = None) -> Picture:
        """The dashboard as it looks now, as a picture. `path`: where to save it as a PNG, too."""
        return self.view.picture(path)

    def log_to(self, logger: Any, period: float = 1.0) -> Logging:
        """Log training and, every `period` seconds, the swarm, until `.stop()` or `close`. `logger`: see `Logging`."""
        return self.view.log_to(logger, period)

    def summary(self) -> SwarmSummary:
        """Servers, experts, calls and failures as they are now."""
        census: Census | None = None
        try:
            census = self._portal.call(take_census, self._node)
        except (SwarmClosed, RPCError):
            pass
        return summarize(self.name, self._node, self.servers, census, self.telemetry)

    def __repr__(self) -> str:
        return self.summary().text()

    def _repr_html_(self) -> str:
        return self.summary().html()

    # ------------------------------------------------------------ ending

    @property
    def closed(self) -> bool:
        """Whether it is closed."""
        return self._portal.closed

    def close(self) -> None:
        """Stop the servers started here, leave the swarm and end the lab thread: within two seconds. Safe to repeat.

        What servers cannot save in that time stays as it was saved last; `server.stop()` before waits for large ones.
        """
        until = time.monotonic() + CLOSE_TIMEOUT
        self.view.end()  # its last scene shows the swarm as it was
        close_session(self._session)
        if _open.get(self.name) is self:
            del _open[self.name]
        try:
            # A little more than they have, and not for ever: a listener may be blocking the lab thread.
            self._portal.call(end_all, list(self.servers), CLEAN_STOP_TIME, timeout=CLEAN_STOP_TIME + 0.3)
        except SwarmClosed:
            pass
        finally:  # also when somebody cannot wait
            if not self._portal.close(CLOSE_TIMEOUT - CLEAN_STOP_TIME - 0.3):
                logger.warning("the lab thread of swarm %r did not end in time", self.name)
            self.view.close(until - time.monotonic())
            self._folder.cleanup()

    def __enter__(self) -> Swarm:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def close_all() -> None:
    """Close every swarm of this process."""
    for swarm in list(_open.values()):
        swarm.close()


atexit.register(close_all)
