"""An expert server: a node that holds experts, answers calls to them, declares them in the DHT and saves them.

On a batch's way: `wire/rpc_server` hands a request to `rpc_forward` or `rpc_backward`, which queue it with the runtime
and respond when its batch has been computed.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Sequence
from functools import partial

import torch
import trio

from labkit.contact import Contact
from labkit.directory.grids import GridInfo, keep_grid_declared
from labkit.errors import DeadlineExceeded, RPCError, UnknownExpert
from labkit.events import Emit, ignore
from labkit.expert_protocol import (
    BACKWARD,
    FORWARD,
    SCHEMA,
    STATISTICS,
    Direction,
    ExpertReply,
    ExpertRequest,
    ExpertSchema,
)
from labkit.expert_uid import split_uid
from labkit.faults import Faults
from labkit.joining import is_alive
from labkit.node import NodeConfig, open_node
from labkit.server.backend import ANSWER_LIMIT, ExpertBackend
from labkit.server.checkpoints import Progress, keep_checkpoints, restore, save_all
from labkit.server.config import ServerConfig
from labkit.server.hardware import check_device
from labkit.server.layers import kind_name, make_expert
from labkit.server.leaving import Traffic, leave, stop_timeout
from labkit.server.loading import LoadOrder, carry_out_loads
from labkit.server.ownership import FolderClaim, own_checkpoints
from labkit.server.runtime import Executor, QueuedRequest, Result, Runtime
from labkit.server.snapshots import Snapshots
from labkit.server.statistics import ServerStatistics
from labkit.server.validation import CallOptions
from labkit.wire.rpc_types import AsyncMethod, CallbackMethod, Methods, Reply, Request, RespondFn, SyncMethod
from labkit.wire.security import Admission, Identity
from labkit.wire.timers import Timers
from labkit.wire.transport import Network

logger = logging.getLogger(__name__)

SETTLE_TIMEOUT = 20.0  # seconds that a clean stop waits for the batch that is being computed
TRIAL_TIMEOUT = 2.0  # seconds in which an expert that does not say what it takes is tried
HEADER_ROOM = 1 << 16  # bytes of an answer that are not its tensors, at most


class ExpertServer:
    """The experts of one server and the methods by which they are called.

    Args:
        config: What the server holds.
        faults: The delays and losses to inject; none by default.
        emit: Gets a `BatchProcessed` for each batch.
        executor: Where to compute; None for a thread per device.
        timers: The network's, for injected delays.
        answer_limit: Bytes that all outputs of a request may have.
    """

    def __init__(
        self,
        config: ServerConfig,
        faults: Faults | None = None,
        emit: Emit = ignore,
        executor: Executor | None = None,
        *,
        timers: Timers,
        answer_limit: int = ANSWER_LIMIT,
    ) -> None:
        self.config = config
        self._answer_limit = answer_limit
        self._timers = timers
        self.faults = faults or Faults()
        self.traffic = Traffic()
        self.relay: Callable[[], Contact | None] = lambda: None  # returns the relay through which it is reached
        check_device(config.backend.device)
        backends: dict[str, ExpertBackend] = {}
        for uid in config.uids:
            backends[uid] = self._make_backend(uid)
            first = backends[config.uids[0]].expert
            if uid == config.uids[0]:
                first.find_schema(TRIAL_TIMEOUT if executor is None else None)
            else:  # all are of one kind
                backends[uid].expert.schema, backends[uid].expert.guesses = first.schema, first.guesses
        self.runtime = Runtime(
            backends, emit=emit, executor=executor, max_queue_rows=config.max_queue_rows, threads=config.threads
        )
        self.methods: Methods = {
            FORWARD: CallbackMethod(self.rpc_forward, ExpertRequest),
            BACKWARD: CallbackMethod(self.rpc_backward, ExpertRequest),
            SCHEMA: SyncMethod(self.rpc_schema, ExpertRequest),
            STATISTICS: AsyncMethod(self.rpc_statistics),
            **Snapshots(self.runtime, timers).methods,
        }

    def _make_backend(self, uid: str) -> ExpertBackend:
        config = self.config
        device = torch.device(config.backend.device)
        gpus = [device] if device.type == "cuda" else []  # a factory may draw there
        with torch.random.fork_rng(devices=gpus, enabled=config.seed is not None, device_type="cuda"):
            if config.seed is not None:
                seed = zlib.crc32(f"{config.seed} {uid}".encode())
                torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would rewind all devices, for good
                for gpu in gpus:
                    with torch.cuda.device(gpu):
                        torch.cuda.manual_seed(seed)
            module = make_expert(config.kind, **config.options)
        backend = ExpertBackend(uid, module, config.backend, kind=kind_name(config.kind))
        backend.answer_limit = self._answer_limit
        if config.checkpoint_dir is not None:
            restore(config.checkpoint_dir, backend)
        return backend

    def rpc_forward(self, request: Request, respond: RespondFn) -> Callable[[], object]:
        """Answer with the outputs [rows, ...] for inputs [rows, ...]."""
        return self._compute("forward", request, respond)

    def rpc_backward(self, request: Request, respond: RespondFn) -> Callable[[], object]:
        """Answer with the input gradients for inputs and output gradients.

        The expert takes an optimizer step, unless the request says that it is not to train.
        """
        return self._compute("backward", request, respond)

    def _compute(self, direction: Direction, request: Request, respond: RespondFn) -> Callable[[], object]:
        """1. Delay the request, or lose it, as injected faults say; 2. queue it with the runtime; 3. answer."""
        body: ExpertRequest = request.body
        queued: list[QueuedRequest] = []
        ended = False

        def enqueue() -> None:  # 2
            if ended:
                return
            try:
                queued.append(
                    self.runtime.put(
                        body.uid, direction, request.tensors, request.deadline, on_result, body.forward_updates,
                        CallOptions(body.outputs, body.keywords, body.train),
                    )
                )  # fmt: skip
            except RPCError as error:
                end(answered=False)
                respond(error)

        def end(answered: bool) -> None:
            nonlocal ended
            if not ended:
                ended = True
                self.traffic.end(body.uid, direction, answered)

        def on_result(result: Result | Exception) -> None:  # 3
            if self.runtime.stopped:
                return  # so is the whole server, and the caller learns it when the connection breaks
            end(answered=not isinstance(result, Exception))
            if isinstance(result, Exception):
                respond(result)
            else:
                leaving = self.traffic.leaving
                reply = ExpertReply(result.queue_seconds, result.compute_seconds, result.updates, leaving)
                respond(Reply(reply, result.tensors))

        def forget() -> None:
            end(answered=False)
            for task in queued:
                self.runtime.discard(task)

        delay, lost = self.faults.draw()  # 1
        if lost:
            self._timers.at(request.deadline, respond, DeadlineExceeded("lost, as faults are injected here"))
            ended = True
        else:
            self.traffic.arrive(body.uid, direction, request.peer)
            self._timers.after(delay, enqueue)
        return forget

    def rpc_schema(self, request: Request) -> Reply:
        """What an expert takes and gives; None if that is not known yet."""
        backend = self.runtime.backends.get(request.body.uid)
        if backend is None:
            raise UnknownExpert(f"this server does not hold expert {request.body.uid!r}; look it up again")
        return Reply(backend.schema)

    def schema(self) -> ExpertSchema | None:
        """What the experts take and give, as far as a trial or a call has shown it."""
        schemas = (backend.schema for backend in self.runtime.backends.values())
        return next((schema for schema in schemas if schema is not None), None)

    async def rpc_statistics(self, request: Request) -> Reply:
        """How the server is doing."""
        return Reply(self.statistics())

    def statistics(self) -> ServerStatistics:
        """How the server is doing."""
        statistics = self.runtime.statistics()
        statistics.latency, statistics.loss = self.faults.latency, self.faults.loss
        statistics.label, relay = self.config.label, self.relay()
        statistics.relay = "" if relay is None else relay.endpoint
        return statistics


async def serve_experts(
    network: Network,
    identity: Identity,
    config: ServerConfig,
    node_config: NodeConfig | None = None,
    *,
    join: Sequence[Contact] = (),
    admission: Admission | None = None,
    faults: Faults | None = None,
    emit: Emit = ignore,
    stop: trio.Event | None = None,
    hurry: trio.Event | None = None,
    executor: Executor | None = None,
    allow: Callable[[float], object] | None = None,
    orders: trio.MemoryReceiveChannel[LoadOrder] | None = None,
    task_status: trio.TaskStatus[Contact] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Run an expert server until `stop` is set (a clean stop: every expert is saved) or until cancelled (a crash).

    1. build the experts, or load them; 2. start the runtime; 3. join the swarm; 4. declare the experts: from then on
    they can be found, and only then the server counts as started; 5. declare again and save, until the stop; 6. leave:
    go on answering until nobody calls any more (`server/leaving`).

    Args:
        network: Where the server's node listens.
        identity: The node's key pair.
        config: What the server holds.
        node_config: How the node listens.
        join: Nodes of the swarm to join; none for a swarm of its own.
        admission: Who may connect; None for everybody.
        faults: The delays and losses to inject; none by default.
        emit: Gets the events of the server and its node.
        stop: Set it for a clean stop.
        hurry: Set it, too, if a clean stop has to be over within a second.
        executor: Where to compute. In a simulation that is `InlineCompute`, with which nothing leaves this thread.
        allow: Called before the server counts as started, with the seconds that a clean stop may take (`stop_timeout`).
        orders: Where orders to load experts come from, if any may.
        task_status: Started with the node's contact.

    Raises:
        FolderTaken: Another server saves one of these experts in the same folder.
    """
    async with own_checkpoints(config.checkpoint_dir, config.uids, in_thread=executor is None) as claim:
        await _serve_owned(
            network, identity, config, node_config, claim, join=join, admission=admission, faults=faults, emit=emit,
            stop=trio.Event() if stop is None else stop, hurry=trio.Event() if hurry is None else hurry,
            executor=executor, allow=allow, orders=orders, task_status=task_status,
        )  # fmt: skip


async def _serve_owned(
    network: Network, identity: Identity, config: ServerConfig, node_config: NodeConfig | None, claim: FolderClaim, *,
    join: Sequence[Contact], admission: Admission | None, faults: Faults | None, emit: Emit, stop: trio.Event,
    hurry: trio.Event, executor: Executor | None, allow: Callable[[float], object] | None,
    orders: trio.MemoryReceiveChannel[LoadOrder] | None, task_status: trio.TaskStatus[Contact],
) -> None:  # fmt: skip
    """Do it all, with the experts' checkpoints owned."""
    message_bytes = (node_config or NodeConfig()).limits.frames.message_bytes
    limit = message_bytes - min(HEADER_ROOM, message_bytes // 4)
    make = partial(ExpertServer, config, faults, emit, executor, timers=network.timers, answer_limit=limit)
    server = await _build(make, executor)  # 1
    if allow is not None:
        allow(stop_timeout(server.runtime.backends.values()))
    saved: dict[str, Progress] = {}
    async with trio.open_nursery() as nursery:
        await nursery.start(server.runtime.run)  # 2
        async with open_node(  # 3
            network, identity, node_config, join=join, methods=server.methods, admission=admission, emit=emit
        ) as node:
            server.relay = lambda: node.relaying.relay
            async with trio.open_nursery() as keepers:
                if config.grid is not None:
                    name, _ = split_uid(config.uids[0])
                    info = partial(grid_info, server)
                    await keepers.start(keep_grid_declared, node.dht, name, info, node.directory.config.ttl)
                keep_declared = partial(node.directory.keep_declared, is_alive=partial(is_alive, node.client))
                await keepers.start(keep_declared, config.uids, node.contact)  # 4
                if config.checkpoint_dir is not None:
                    await keepers.start(
                        keep_checkpoints,
                        server.runtime,
                        config.checkpoint_dir,
                        config.checkpoint_period,
                        saved,
                        config.checkpoint_keep,
                    )
                if orders is not None:
                    keepers.start_soon(
                        carry_out_loads, server.runtime, orders, config.checkpoint_dir, saved, config.checkpoint_keep
                    )
                task_status.started(node.contact)
                await stop.wait()  # 5
                claim.leave()
                keepers.cancel_scope.cancel()
            await leave(server.traffic, node.directory, config.uids, node.contact, hurry)  # 6
        with trio.move_on_after(SETTLE_TIMEOUT):  # a batch that takes long must not keep all experts from being saved
            await server.runtime.settle()
        nursery.cancel_scope.cancel()
    if config.checkpoint_dir is not None:
        await save_all(server.runtime, config.checkpoint_dir, saved, config.checkpoint_keep)


async def _build(make: Callable[[], ExpertServer], executor: Executor | None) -> ExpertServer:
    """Build or load the experts in a thread: that can take seconds, and the network has to go on.

    With an `executor` there is no thread, since time is virtual and would not stand still for one.

    One server is built at a time, since a process has one torch generator, which a seed sets anew and which is put back
    afterwards. Other threads may draw from it meanwhile: see `ServerConfig.seed`.
    """
    if executor is not None:
        await trio.lowlevel.checkpoint()
        return make()
    try:
        limiter = _one_at_a_time.get()
    except LookupError:
        limiter = trio.CapacityLimiter(1)
        _one_at_a_time.set(limiter)
    return await trio.to_thread.run_sync(make, limiter=limiter)


_one_at_a_time: trio.lowlevel.RunVar[trio.CapacityLimiter] = trio.lowlevel.RunVar("building experts")


def grid_info(server: ExpertServer) -> GridInfo:
    """The record of a server's grid that is declared; of the options only those that are plain text or numbers."""
    config = server.config
    plain: dict[str, bool | int | float | str | None] = {
        key: value for key, value in config.options.items() if isinstance(value, (bool, int, float, str))
    }
    return GridInfo(config.grid or (), config.kind if isinstance(config.kind, str) else "", plain, server.schema())
