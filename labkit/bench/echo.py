"""The limit of this machine's messages, with which benchmarks are compared: a bare ZeroMQ echo.

It runs between processes, with frames as large as labkit's. No labkit code is involved: blocking sockets, no event
loop, nothing encoded or checked. Nor is torch, so that these processes are quick to start.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import zmq

from labkit.bench.processes import ProcessGroup, all_at_once

HEADER_BYTES = 120  # about the size of the first frame of a call or an answer
WARM_UP_CALLS = 10
MIN_ECHO_SECONDS = 1.0  # a thousand small calls take less, and their rate would depend on chance
RoundTrip = tuple[list[int], int]  # bytes of each tensor that is sent, and how many of the tensors are sent back
CallsAndSeconds = tuple[int, float]  # how many calls a client made, and how long they took


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
        echoes = group.start("echo:serve_echo", *[{"secure": secure}] * servers)
        order = {
            "round_trips": round_trips,
            "calls": calls,
            "min_seconds": MIN_ECHO_SECONDS,
            "servers": [server.receive() for server in echoes],
        }
        for server in echoes:
            server.send()
        results = all_at_once(group.start("echo:call_echo", *[{**order, "clients": number} for number in clients]))
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
