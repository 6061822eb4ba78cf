"""The limit of the wire on this machine: a bare ZeroMQ echo between processes, of the messages that labkit sends.

No labkit code is in its way: blocking sockets, no event loop, nothing encoded or checked.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import zmq

from labkit.bench.crew import Crew, all_at_once

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
    with Crew() as crew:
        echoes = crew.hire("echo:serve", *[{"secure": secure}] * servers)
        order = {
            "exchanges": exchanges,
            "calls": calls,
            "least": LEAST,
            "servers": [server.hear() for server in echoes],
        }
        for server in echoes:
            server.tell()
        told = all_at_once(crew.hire("echo:call", *[{**order, "clients": number} for number in clients]))
    return [(calls, seconds) for process in told for calls, seconds in process]


def serve(order: dict[str, Any]) -> Generator[Any, Any, None]:
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


def call(order: dict[str, Any]) -> Generator[Any, Any, None]:
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
