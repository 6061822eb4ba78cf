"""The limits of this machine, beside which benchmarks are measured: plain PyTorch, and a bare ZeroMQ echo.

1. Arithmetic: that of experts in plain PyTorch, in one process without a network. As many threads, as large batches and
the same optimizer as the servers have, without denormal numbers, as there; a backward pass computes the outputs again,
as theirs does, since nothing is kept between calls.
2. Echo: between processes, of the messages that labkit sends. No labkit code is in its way: blocking sockets, no event
loop, nothing encoded or checked.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from statistics import median
from typing import Any

import torch
import zmq
from torch import Tensor, nn

from labkit.bench.processes import ProcessGroup, all_at_once
from labkit.bench.report import KINDS
from labkit.server.layers import make_expert
from labkit.server.optimizer import BackendConfig, make_optimizer


def experts_limit(**order: Any) -> float:
    """Rows per second of `experts` experts of a kind, called in turn, with `rows` rows a call, `calls` times."""
    with ProcessGroup() as group:
        (seconds,) = all_at_once(group.start("limits:call_experts", order))
    return float(order["calls"] * order["rows"] / seconds)


def moe_limit(**order: Any) -> tuple[float, float]:
    """Seconds of a forward and of a backward pass of a mixture of experts, medians of `passes`."""
    with ProcessGroup() as group:
        ((forward, backward),) = all_at_once(group.start("limits:pass_moe", order))
    return forward, backward


class _Expert:
    """A module and its optimizer."""

    def __init__(self, kind: str, hidden: int) -> None:
        self.module = make_expert(kind, hidden=hidden)
        self.optimizer = make_optimizer(list(self.module.parameters()), BackendConfig())

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            output: Tensor = self.module(x)
            return output

    def backward(self, x: Tensor, grad: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        self.module(x).backward(grad)
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        assert x.grad is not None
        return x.grad


def call_experts(order: dict[str, Any]) -> Generator[Any, Any, None]:
    """A worker that computes one batch after the other."""
    torch.set_num_threads(order["threads"])
    torch.set_flush_denormal(True)
    experts = [_Expert(order["kind"], order["hidden"]) for _ in range(order["experts"])]
    x = torch.randn(round(order["rows"]), order["hidden"])

    def once(expert: _Expert) -> None:
        y = expert.forward(x)
        if order["backward"]:
            expert.backward(x, torch.ones_like(y))

    for expert in experts:
        once(expert)
    yield None
    started = time.perf_counter()
    for number in range(order["calls"]):
        once(experts[number % len(experts)])
    yield time.perf_counter() - started


def pass_moe(order: dict[str, Any]) -> Generator[Any, Any, None]:
    """A worker that passes a batch through a layer whose experts it holds itself."""
    torch.set_num_threads(order["threads"])
    torch.set_flush_denormal(True)
    side, hidden, k = order["side"], order["hidden"], order["k_best"]
    experts = [_Expert(KINDS[order["expert"]], hidden) for _ in range(side * side)]
    gate = nn.Linear(hidden, 2 * side)
    x = torch.randn(order["batch"], hidden, requires_grad=True)

    def once() -> tuple[float, float]:
        started = time.perf_counter()
        first, second = gate(x).split(side, dim=1)
        scores = (first[:, :, None] + second[:, None, :]).flatten(1)  # [batch, side * side]
        best, choice = scores.topk(k)
        outputs = torch.zeros(len(x), k, hidden)
        places = [torch.nonzero(choice == number, as_tuple=True) for number in range(len(experts))]
        for expert, (rows, slots) in zip(experts, places, strict=True):
            if len(rows):
                outputs[rows, slots] = expert.forward(x[rows])
        outputs.requires_grad_()
        y = torch.einsum("nk,nkh->nh", best.softmax(1), outputs)
        middle = time.perf_counter()
        y.sum().backward()  # type: ignore[no-untyped-call]
        assert outputs.grad is not None and x.grad is not None
        for expert, (rows, slots) in zip(experts, places, strict=True):
            if len(rows):
                x.grad.index_add_(0, rows, expert.backward(x[rows], outputs.grad[rows, slots]))
        x.grad = None
        return middle - started, time.perf_counter() - middle

    once()
    yield None
    passes = [once() for _ in range(order["passes"])]
    yield [median(seconds) for seconds in zip(*passes, strict=True)]


HEAD = 120  # bytes: of the first frame of a call or an answer, about
WARM_UP = 10  # calls
LEAST = 1.0  # seconds that a client goes on: a thousand small calls take less, and chance decides how fast they are
Exchange = tuple[list[int], int]  # sizes of the tensors that are sent, and how many of them come back
Told = tuple[int, float]  # of a client: calls that it made, and in how many seconds


def echo_limit(exchanges: Sequence[Exchange], *, clients: Sequence[int], calls: int, secure: bool = False) -> float:
    """Calls per second of all clients, where a call is these exchanges, one after the other, with one server.

    `clients`: how many each process has. `calls`: of each client, at the least.
    """
    told = echo(exchanges, clients=clients, calls=calls, secure=secure)
    return sum(calls / seconds for calls, seconds in told)


def fan_out_limit(servers: int, size: int, calls: int, *, secure: bool = False) -> float:
    """Seconds that it takes to send a message of `size` bytes to so many processes and to hear from all; the mean."""
    ((calls, seconds),) = echo([([size], 1)], servers=servers, calls=calls, secure=secure)
    return seconds / calls


def echo(
    exchanges: Sequence[Exchange], *, servers: int = 1, clients: Sequence[int] = (1,), calls: int, secure: bool = False
) -> list[Told]:
    """What each client did. All begin at the same time, and go on for a second, or for longer if it has `calls` to
    make."""
    with ProcessGroup() as group:
        echoes = group.start("limits:serve_echo", *[{"secure": secure}] * servers)
        order = {
            "exchanges": exchanges,
            "calls": calls,
            "least": LEAST,
            "servers": [server.hear() for server in echoes],
        }
        for server in echoes:
            server.tell()
        told = all_at_once(group.start("limits:call_echo", *[{**order, "clients": number} for number in clients]))
    return [(calls, seconds) for process in told for calls, seconds in process]


def serve_echo(order: dict[str, Any]) -> Generator[Any, Any, None]:
    """A worker that answers each message with as many of its frames as it asks for."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        key = None
        if order["secure"]:
            public, secret = zmq.curve_keypair()
            socket.curve_server, socket.curve_secretkey, key = True, secret, public.decode()
        port = socket.bind_to_random_port("tcp://127.0.0.1")
        yield port, key
        while True:
            route, head, *tensors = socket.recv_multipart(copy=False)
            wanted = head.buffer[0]
            socket.send_multipart([route, head, *tensors[:wanted]], copy=False)


def call_echo(order: dict[str, Any]) -> Generator[Any, Any, None]:
    """A worker of clients, each with connections, and while it is timed a thread, of its own."""
    exchanges = [[bytes([wanted]) + bytes(HEAD - 1), *map(bytes, sizes)] for sizes, wanted in order["exchanges"]]
    with zmq.Context() as context, ThreadPoolExecutor(order["clients"]) as pool:
        clients = [[_connect(context, *server) for server in order["servers"]] for _ in range(order["clients"])]
        for sockets in clients:
            _several(exchanges, WARM_UP, 0.0, sockets)
        yield None
        yield list(pool.map(partial(_several, exchanges, order["calls"], order["least"]), clients))
        for sockets in clients:
            for socket in sockets:
                socket.close()


def _connect(context: zmq.Context[zmq.Socket[bytes]], port: int, key: str | None) -> zmq.Socket[bytes]:
    socket = context.socket(zmq.DEALER)
    socket.linger = 0
    if key is not None:
        socket.curve_serverkey = key.encode()
        socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()
    socket.connect(f"tcp://127.0.0.1:{port}")
    return socket


def _several(
    exchanges: Sequence[Sequence[bytes]], calls: int, least: float, sockets: Sequence[zmq.Socket[bytes]]
) -> Told:
    """Send to all servers and wait for all their answers, again and again: so often and so long, at the least."""
    made, seconds, started = 0, 0.0, time.perf_counter()
    while made < calls or seconds < least:
        for frames in exchanges:
            for socket in sockets:
                socket.send_multipart(frames, copy=False)
            for socket in sockets:
                socket.recv_multipart(copy=False)
        made += 1
        seconds = time.perf_counter() - started
    return made, seconds
