"""The limit of the wire on this machine: a bare ZeroMQ echo between processes, of the messages that labkit sends.

No labkit code is in its way: blocking sockets, no event loop, nothing encoded or checked.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from typing import Any

import zmq

from labkit.bench.crew import Crew, all_at_once

HEAD = 120  # bytes: of the first frame of a call or an answer, about
Exchange = tuple[list[int], int]  # sizes of the tensors that are sent, and how many of them come back


def echo_limit(exchanges: Sequence[Exchange], *, clients: int, calls: int, secure: bool = False) -> float:
    """Calls per second, where a call is these exchanges, one after the other. As many clients as there are processes,
    and one server."""
    with Crew() as crew:
        (server,) = crew.hire("echo:serve", {"secure": secure})
        order = {"exchanges": exchanges, "calls": calls, "server": [server.hear()]}
        server.tell()
        seconds = max(all_at_once(crew.hire("echo:call", *[order] * clients)))
    return clients * calls / float(seconds)


def fan_out_limit(servers: int, size: int, calls: int) -> float:
    """Seconds that it takes to send a message of `size` bytes to so many processes and to hear from all; the mean."""
    with Crew() as crew:
        echoes = crew.hire("echo:serve", *[{"secure": False}] * servers)
        order = {"exchanges": [([size], 1)], "calls": calls, "server": [echo.hear() for echo in echoes]}
        for echo in echoes:
            echo.tell()
        (seconds,) = all_at_once(crew.hire("echo:call", order))
        return float(seconds) / calls


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
    """A worker that sends, and waits for the answers of all servers, again and again."""
    with zmq.Context() as context:
        sockets = []
        for port, key in order["server"]:
            socket = context.socket(zmq.DEALER)
            socket.linger = 0
            if key is not None:
                socket.curve_serverkey = key.encode()
                socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()
            socket.connect(f"tcp://127.0.0.1:{port}")
            sockets.append(socket)
        exchanges = [[bytes([wanted]) + bytes(HEAD - 1), *map(bytes, sizes)] for sizes, wanted in order["exchanges"]]

        def once() -> None:
            for frames in exchanges:
                for socket in sockets:
                    socket.send_multipart(frames, copy=False)
                for socket in sockets:
                    socket.recv_multipart(copy=False)

        for _ in range(10):
            once()
        yield None
        started = time.perf_counter()
        for _ in range(order["calls"]):
            once()
        yield time.perf_counter() - started
        for socket in sockets:
            socket.close()
