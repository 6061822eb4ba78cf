"""The limits of this machine, with which benchmarks are compared: plain PyTorch, and a bare ZeroMQ echo.

`experts_limit` and `moe_limit` measure the arithmetic: experts in plain PyTorch, in one process without a network. They
have as many threads, as large batches and the same optimizer as the servers, and flush denormal numbers as the servers
do. A backward pass computes the outputs again, as theirs does, since a server keeps nothing between calls.

`echo_limit` and `fan_out_limit` measure the messages: an echo between processes, of frames as large as labkit's. No
labkit code is involved: blocking sockets, no event loop, nothing encoded or checked.
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
from labkit.bench.report import EXPERT_KINDS
from labkit.server.layers import make_expert
from labkit.server.optimizer import BackendConfig, make_optimizer

HEADER_BYTES = 120  # about the size of the first frame of a call or an answer
WARM_UP_CALLS = 10
MIN_ECHO_SECONDS = 1.0  # a thousand small calls take less, and their rate would depend on chance
RoundTrip = tuple[list[int], int]  # bytes of each tensor that is sent, and how many of the tensors are sent back
CallsAndSeconds = tuple[int, float]  # how many calls a client made, and how long they took


# ---------------------------------------------------------------- arithmetic: plain PyTorch


def experts_limit(**order: Any) -> float:
    """Measure experts that are called in turn, in rows per second.

    Args:
        **order: `kind` and `hidden` of the experts, their number `experts`, `rows` per call, `calls`, `backward`
            (whether a call is a forward and a backward pass) and `threads`.
    """
    with ProcessGroup() as group:
        (seconds,) = all_at_once(group.start("limits:call_experts", order))
    return float(order["calls"] * order["rows"] / seconds)


def moe_limit(**order: Any) -> tuple[float, float]:
    """Measure a forward and a backward pass of a mixture of experts, each in seconds: medians over the passes.

    Args:
        **order: The fields of a `MoEConfig`, and `threads`.
    """
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
    """The worker of `experts_limit`: computes one batch after the other."""
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
    """The worker of `moe_limit`: passes batches through a layer whose experts it holds itself."""
    torch.set_num_threads(order["threads"])
    torch.set_flush_denormal(True)
    side, hidden, k = order["side"], order["hidden"], order["k_best"]
    experts = [_Expert(EXPERT_KINDS[order["expert"]], hidden) for _ in range(side * side)]
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


# ---------------------------------------------------------------- messages: a ZeroMQ echo


def echo_limit(round_trips: Sequence[RoundTrip], *, clients: Sequence[int], calls: int, secure: bool = False) -> float:
    """Measure calls per second to one server, of all clients together.

    Args:
        round_trips: What a call consists of, one after the other.
        clients: The number of clients in each process.
        calls: The least number of calls per client.
        secure: Whether connections are encrypted.
    """
    results = echo(round_trips, clients=clients, calls=calls, secure=secure)
    return sum(calls / seconds for calls, seconds in results)


def fan_out_limit(servers: int, size: int, calls: int, *, secure: bool = False) -> float:
    """Measure the mean time, in seconds, to send a message to all servers at once and to receive all their answers.

    Args:
        servers: The number of servers, a process each.
        size: Bytes of the message.
        calls: The least number of times that this is done.
        secure: Whether connections are encrypted.
    """
    ((calls, seconds),) = echo([([size], 1)], servers=servers, calls=calls, secure=secure)
    return seconds / calls


def echo(
    round_trips: Sequence[RoundTrip],
    *,
    servers: int = 1,
    clients: Sequence[int] = (1,),
    calls: int,
    secure: bool = False,
) -> list[CallsAndSeconds]:
    """Run an echo. All clients begin at the same time and go on for `MIN_ECHO_SECONDS` and `calls` calls at least.

    Returns:
        The number of calls and the seconds of each client.
    """
    with ProcessGroup() as group:
        echoes = group.start("limits:serve_echo", *[{"secure": secure}] * servers)
        order = {
            "round_trips": round_trips,
            "calls": calls,
            "min_seconds": MIN_ECHO_SECONDS,
            "servers": [server.receive() for server in echoes],
        }
        for server in echoes:
            server.send()
        results = all_at_once(group.start("limits:call_echo", *[{**order, "clients": number} for number in clients]))
    return [(calls, seconds) for process in results for calls, seconds in process]


def serve_echo(order: dict[str, Any]) -> Generator[Any, Any, None]:
    """The worker of a server: answers each message with as many of its frames as the first one asks for."""
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
    """The worker of some clients, each with its own connections and, while it is timed, its own thread."""
    round_trips = [
        [bytes([wanted]) + bytes(HEADER_BYTES - 1), *map(bytes, sizes)] for sizes, wanted in order["round_trips"]
    ]
    with zmq.Context() as context, ThreadPoolExecutor(order["clients"]) as pool:
        clients = [[_connect(context, *server) for server in order["servers"]] for _ in range(order["clients"])]
        for sockets in clients:
            _make_calls(round_trips, WARM_UP_CALLS, 0.0, sockets)
        yield None
        yield list(pool.map(partial(_make_calls, round_trips, order["calls"], order["min_seconds"]), clients))
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


def _make_calls(
    round_trips: Sequence[Sequence[bytes]], calls: int, min_seconds: float, sockets: Sequence[zmq.Socket[bytes]]
) -> CallsAndSeconds:
    """Send to all servers and wait for all answers, `calls` times and for `min_seconds` at least."""
    made, seconds, started = 0, 0.0, time.perf_counter()
    while made < calls or seconds < min_seconds:
        for frames in round_trips:
            for socket in sockets:
                socket.send_multipart(frames, copy=False)
            for socket in sockets:
                socket.recv_multipart(copy=False)
        made += 1
        seconds = time.perf_counter() - started
    return made, seconds
