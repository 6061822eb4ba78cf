"""An expert server's answers: calls to its experts, what they take, how it is doing. `server/serving` runs it.

On a batch's way: `wire/rpc_server` hands a request to `rpc_forward` or `rpc_backward`, which queue it with the runtime
and respond when its batch has been computed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from labkit.contact import Contact
from labkit.errors import DeadlineExceeded, Overloaded, RPCError, UnknownExpert
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
from labkit.faults import Faults
from labkit.server.backend import ANSWER_LIMIT, ExpertBackend
from labkit.server.building import build_expert, build_in_thread, build_like, share_schema
from labkit.server.config import ServerConfig
from labkit.server.device import State
from labkit.server.hardware import check_device
from labkit.server.holdings import GivenUp, Holdings, Waiting
from labkit.server.leaving import Traffic
from labkit.server.optimizer import BackendConfig
from labkit.server.runtime import Executor, QueuedRequest, Result, Runtime
from labkit.server.snapshots import Snapshots
from labkit.server.statistics import CopyStatistics, ServerStatistics
from labkit.server.validation import CallOptions
from labkit.wire.rpc_types import AsyncMethod, CallbackMethod, Methods, Reply, Request, RespondFn, SyncMethod
from labkit.wire.timers import Timers

logger = logging.getLogger(__name__)

TRIAL_TIMEOUT = 2.0  # seconds in which an expert that does not say what it takes is tried


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
        self.copies: Callable[[], CopyStatistics | None] = lambda: None  # returns how it takes part in copies
        check_device(config.backend.device)
        self.in_thread = executor is None  # whether threads may be used
        backends = dict[str, ExpertBackend]()
        for uid in config.uids:
            backends[uid] = self.make_backend(uid, next(iter(backends.values()), None))
        some = next(iter(backends.values()), None)
        self._pattern = self._make_pattern(some) if config.carries else None
        self.parameter_bytes = max((b.parameter_bytes for b in (some, self._pattern) if b is not None), default=0)
        self.runtime = Runtime(
            backends, emit=emit, executor=executor, max_queue_rows=config.max_queue_rows, threads=config.threads
        )
        self.holdings = Holdings(self.runtime, dict.fromkeys(config.uids, 0), timers)
        self.methods: Methods = {
            FORWARD: CallbackMethod(self.rpc_forward, ExpertRequest),
            BACKWARD: CallbackMethod(self.rpc_backward, ExpertRequest),
            SCHEMA: SyncMethod(self.rpc_schema, ExpertRequest),
            STATISTICS: AsyncMethod(self.rpc_statistics),
            **Snapshots(self.runtime, timers, self.holdings.check_readable).methods,
        }

    def make_backend(
        self, uid: str, like: ExpertBackend | None, *, restored: bool = True, trained: BackendConfig | None = None
    ) -> ExpertBackend:
        """Build one more expert of this server's kind, and carry on from its checkpoint, if there is one.

        Args:
            uid: The expert.
            like: Another one, which takes and gives the same; None to try what it takes.
            restored: Whether to look for a checkpoint.
            trained: How it is trained; by default as this server's config says.

        Raises:
            CheckpointError: The checkpoint does not fit.
        """
        folder = self.config.checkpoint_dir if restored else None
        config = self.config if trained is None else replace(self.config, backend=trained)
        backend = build_expert(config, uid, answer_limit=self._answer_limit, folder=folder)
        share_schema(backend, like, TRIAL_TIMEOUT if self.in_thread else None)
        return backend

    def _make_pattern(self, like: ExpertBackend | None) -> ExpertBackend | None:
        """Make an expert from which those are made later that others hand over. None if such ones are not copied."""
        trained = replace(self.config.backend, device="cpu")
        if like is None:
            return self.make_backend(self.config.name, None, restored=False, trained=trained)
        try:
            return build_like(like, like.uid, trained)
        except Exception as error:  # of a module that somebody else has written
            logger.debug("experts of this kind are built anew, since they cannot be copied: %r", error)
            return None

    def make_blank(self, uid: str, trained: BackendConfig, *, to_look_at: bool = False) -> ExpertBackend:
        """Build one more expert of this server's kind, whose state is about to be loaded.

        Args:
            uid: The expert.
            trained: How it is trained.
            to_look_at: Whether it is only compared with others, on the CPU, and takes no memory if possible.
        """
        if to_look_at:
            trained = replace(trained, device="cpu")
        if self._pattern is not None:
            return build_like(self._pattern, uid, trained, copied=not to_look_at)
        like = next(iter(self.runtime.backends.values()), None)
        return self.make_backend(uid, like, restored=False, trained=trained)

    async def adopt(self, uid: str, epoch: int, state: State | None = None) -> ExpertBackend:
        """Serve one more expert from now on.

        Args:
            uid: The expert.
            epoch: Its epoch here.
            state: What it has learnt; None for its checkpoint or, without one, to begin afresh.

        Raises:
            CheckpointError: The state does not fit, and nothing has changed.
            ValueError: It is served here already.
        """

        like = next(iter(self.runtime.backends.values()), None)

        def make() -> ExpertBackend:
            backend = self.make_backend(uid, like, restored=state is None)
            if state is not None:
                backend.load_state(state)
            return backend

        backend = await build_in_thread(make, in_thread=self.in_thread)
        self.holdings.add(uid, backend, epoch)
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
        call = _ExpertCall(self, direction, request, respond)
        delay, lost = self.faults.draw()  # 1
        if lost:
            self._timers.at(request.deadline, respond, DeadlineExceeded("lost, as faults are injected here"))
            call.ended = True
        else:
            self.traffic.arrive(request.body.uid, direction, request.peer)
            self._timers.after(delay, call.enqueue)
        return call.forget

    def rpc_schema(self, request: Request) -> Reply:
        """What an expert takes and gives; None if that is not known yet."""
        uid = request.body.uid
        backend = self.runtime.backends.get(uid)
        if backend is None and self.holdings.moved(uid) is None:
            raise UnknownExpert(f"this server does not hold expert {uid!r}; look it up again")
        return Reply(self.schema() if backend is None else backend.schema)  # (all are of one kind)

    def schema(self) -> ExpertSchema | None:
        """What the experts take and give, as far as a trial or a call has shown it."""
        schemas = (backend.schema for backend in self.runtime.backends.values())
        return next((schema for schema in schemas if schema is not None), self.holdings.last_schema)

    async def rpc_statistics(self, request: Request) -> Reply:
        """How the server is doing."""
        return Reply(self.statistics())

    def statistics(self) -> ServerStatistics:
        """How the server is doing."""
        statistics = self.runtime.statistics()
        statistics.latency, statistics.loss = self.faults.latency, self.faults.loss
        statistics.label, relay = self.config.label, self.relay()
        statistics.relay = "" if relay is None else relay.endpoint
        statistics.copies = self.copies()
        return statistics


class _ExpertCall:
    """A request to an expert, until it is answered, or given up. What it refers to is let go of then.

    An expert that was given up is answered for, too: it has moved. One that is on hold is waited for.
    """

    __slots__ = ("_direction", "_queued", "_request", "_respond", "_server", "_waiting", "ended")

    def __init__(self, server: ExpertServer, direction: Direction, request: Request, respond: RespondFn) -> None:
        self.ended = False
        self._server = server
        self._direction = direction
        self._request = request
        self._respond: RespondFn | None = respond
        self._queued: list[QueuedRequest] = []
        self._waiting: Waiting | None = None

    def enqueue(self, refusal: Overloaded | None = None) -> None:  # 2
        """Queue it, or wait while its expert is on hold. With a `refusal`, answer with that."""
        if self.ended:
            return
        server, request, self._waiting = self._server, self._request, None
        body: ExpertRequest = request.body
        try:
            if refusal is not None:
                raise refusal
            moved = server.holdings.check(body.uid, body.epoch)
            if moved is None:
                self._waiting = server.holdings.wait(body.uid, self.enqueue, request.deadline)
                if self._waiting is None:
                    options = CallOptions(body.outputs, body.keywords, body.train)
                    queued = server.runtime.put(
                        body.uid, self._direction, request.tensors, request.deadline, self._on_result,
                        body.forward_updates, options,
                    )  # fmt: skip
                    if not self.ended:  # in a simulation it may be answered by now
                        self._queued.append(queued)
                return
        except RPCError as error:
            self._answer(error)
            return
        self._answer(Reply(ExpertReply(0.0, 0.0, 0, epoch=moved.epoch, moved=moved.to)), computed=False)

    def _on_result(self, result: Result | Exception) -> None:  # 3
        server, uid = self._server, self._request.body.uid
        if server.runtime.stopped:
            return  # so is the whole server, and the caller learns it when the connection breaks
        if isinstance(result, GivenUp):
            self._queued.clear()
            self.enqueue()
        elif isinstance(result, Exception):
            self._answer(result)
        else:
            leaving, epoch = server.traffic.leaving, server.holdings.held.get(uid, 0)
            reply = ExpertReply(result.queue_seconds, result.compute_seconds, result.updates, leaving, epoch)
            self._answer(Reply(reply, result.tensors))

    def forget(self) -> None:
        """Let it be: its caller has given up."""
        waiting, queued = self._waiting, [*self._queued]
        self._end(answered=False)
        if waiting is not None:
            waiting.cancel()
        for task in queued:
            self._server.runtime.discard(task)

    def _answer(self, outcome: Reply | Exception, *, computed: bool = True) -> None:
        respond = self._respond
        self._end(answered=computed and not isinstance(outcome, Exception))
        if respond is not None:
            respond(outcome)

    def _end(self, answered: bool) -> None:
        self._respond, self._waiting = None, None
        self._queued.clear()
        if not self.ended:
            self.ended = True
            self._server.traffic.end(self._request.body.uid, self._direction, answered)
