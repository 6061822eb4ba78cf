"""Calls over ZeroMQ: what only real sockets can show. What holds for any network is in test_wire.py."""

from __future__ import annotations

from contextlib import AsyncExitStack

import pytest
import torch
import trio
import zmq

from labkit.contact import Contact
from labkit.errors import BadReply, ConnectionLost, DeadlineExceeded, HandshakeFailed, RemoteFailure, VersionMismatch
from labkit.wire import frames as wire
from labkit.wire import rpc_client as client_module
from labkit.wire.rpc_types import RPCLimits
from labkit.wire.security import Identity
from labkit.wire.zmq_transport import open_network
from tests.nodes import calling, changed, server_and_client, serving


async def test_a_name_that_does_not_resolve_says_so() -> None:
    async with server_and_client() as (server, client):
        with pytest.raises(ConnectionLost, match="does not resolve"):
            await client.call(changed(server.contact, host="no-such-host.invalid"), "echo", timeout=10)


async def test_a_node_that_is_announced_beyond_loopback_encrypts_wherever_it_listens() -> None:
    async with open_network() as network, network.listen(Identity.generate(), announce="tunnel.example:4242") as far:
        assert (far.contact.endpoint, far.contact.secure) == ("tunnel.example:4242", True)
        with pytest.raises(ValueError, match="secure=False"):
            async with network.listen(Identity.generate(), announce="tunnel.example", secure=False):
                pass


@pytest.mark.parametrize("address", ["tcp://[::1]:*", "tcp://[::]:*"])
async def test_a_node_may_listen_on_ipv6(address: str) -> None:
    async with open_network() as network, serving(network, address=address) as server, calling(network) as client:
        reply = await client.call(changed(server.contact, host="::1"), "echo", "body", timeout=5)
        assert reply.body == "body"


async def test_what_a_peer_never_takes_is_given_up_and_the_link_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "LEAVING_TIMEOUT", 1.5)
    context = zmq.Context()
    frozen = context.socket(zmq.ROUTER)
    frozen.setsockopt(zmq.RCVHWM, 1)
    port = frozen.bind_to_random_port("tcp://127.0.0.1")
    async with open_network() as network, calling(network) as client:
        contact = Contact(Identity.generate().public_key, "127.0.0.1", port, secure=False)

        async def call() -> None:
            with pytest.raises(DeadlineExceeded):
                await client.call(contact, "echo", None, [torch.zeros(5_000_000)], timeout=0.2)

        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(call)
        assert client.budget.taken >= 20_000_000 and client.links == 1
        with trio.fail_after(10):
            while client.budget.taken or client.links:
                await trio.lowlevel.checkpoint()
    context.destroy(0)


def prelude(version: int = wire.VERSION, kind: int = 1, id: int = 7) -> bytes:
    return b"LK" + bytes([version, kind]) + id.to_bytes(8, "big")


REQUEST = [bytes(frame) for frame in wire.encode_request(7, "echo", 5, "body", [torch.ones(4)])]
GARBAGE: dict[
    str, tuple[str | None, list[wire.Frame]]
] = {  # name -> the code of the answer (None: dropped), the frames
    "no prelude": (None, [b"x"]),
    "empty": (None, [b""]),
    "not ours": (None, [b"GET / HTTP/1.1\r\n\r\n"]),
    "a cancellation of nothing": (None, [prelude(kind=4)]),
    "an answer to nothing": (None, wire.encode_reply(7, None)),
    "unknown kind": ("bad_request", [prelude(kind=99)]),
    "no header": ("bad_request", [prelude()]),
    "a header of noise": ("bad_request", [prelude() + bytes(range(256))]),
    "a tensor too short": ("bad_request", [REQUEST[0], b"\0" * 15]),
    "a tensor missing": ("bad_request", [REQUEST[0]]),
    "a tensor too many": ("bad_request", [*REQUEST, b"1234"]),
    "an unknown dtype": ("bad_request", [REQUEST[0].replace(b"float32", b"quark32"), REQUEST[1]]),
    "a negative shape": ("bad_request", [REQUEST[0].replace(b"\x91\x04", b"\x91\xfc"), REQUEST[1]]),
    "a body too deep": ("bad_request", [prelude() + b"\x94\xa4echo\x0a" + b"\x91" * 50_000 + b"\x01\x90"]),
    "an unknown method": ("unknown_method", wire.encode_request(7, "x" * 500, 5, None)),
    "another version": ("version", [prelude(version=9) + b"whatever it is that they send in version 9"]),
    "a header too large": ("too_large", [prelude() + b"\0" * 2_000_000]),
    "too many tensors": ("too_large", [REQUEST[0], *[b""] * 100]),
}


@pytest.mark.parametrize("name", GARBAGE)
async def test_garbage_on_a_real_socket_ends_in_a_typed_error_or_a_drop_and_the_node_serves_on(name: str) -> None:
    expected, garbage = GARBAGE[name]
    limits = RPCLimits(frames=wire.FrameLimits(header_bytes=1_000_000))
    async with server_and_client(limits=limits) as (server, client):
        with zmq.Context() as context, context.socket(zmq.DEALER) as attacker:
            attacker.linger = 0
            attacker.connect(f"tcp://{server.contact.endpoint}")
            attacker.send_multipart(garbage)
            attacker.send_multipart(wire.encode_request(8, "echo", 5, "a good one"))
            answers: dict[int, wire.Message] = {}
            while len(answers) < (1 if expected is None else 2):
                assert await trio.to_thread.run_sync(attacker.poll, 2000), f"no answer; so far {answers}"
                message = wire.decode(attacker.recv_multipart())
                answers[message.id] = message
        assert answers[8].kind is wire.Kind.REPLY
        if expected == "version":
            assert answers[7].kind is wire.Kind.VERSION
        elif expected is not None:
            header = answers[7].header
            assert isinstance(header, wire.ErrorHeader) and header.code == expected
        assert (await client.call(server.contact, "echo", "still there", timeout=5)).body == "still there"


async def test_a_frame_over_the_limit_is_cut_off_on_the_socket_and_the_node_serves_on() -> None:
    """The client's own check is not there to help, since the attacker is not our client."""
    async with open_network(wire.FrameLimits(message_bytes=100_000)) as network, serving(network) as server:
        with zmq.Context() as context, context.socket(zmq.DEALER) as attacker:
            attacker.linger = 0
            attacker.reconnect_ivl = -1
            monitor = attacker.get_monitor_socket(zmq.EVENT_DISCONNECTED)
            attacker.connect(f"tcp://{server.contact.endpoint}")
            attacker.send_multipart([prelude(), bytes(10_000_000)])
            assert await trio.to_thread.run_sync(monitor.poll, 1000), "the connection is not cut"
            assert not attacker.poll(0)
            attacker.disable_monitor()
            monitor.close()
        async with calling(network) as client:
            assert (await client.call(server.contact, "echo", "still there", timeout=5)).body == "still there"


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        ([prelude(version=9, kind=2, id=1)], VersionMismatch),
        ([prelude(version=9, kind=5, id=1)], VersionMismatch),
        ([prelude(kind=2, id=1) + b"noise"], BadReply),
        ([wire.encode_reply(1, None, [torch.ones(4)])[0]], BadReply),
        (wire.encode_error(1, "no such code", "text"), RemoteFailure),
    ],
)
async def test_garbage_in_an_answer_is_a_typed_error_at_once(reply: list[bytes], error: type[Exception]) -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as server:
        server.linger = 0
        port = server.bind_to_random_port("tcp://127.0.0.1")

        def answer() -> None:
            assert server.poll(2000)
            server.send_multipart([server.recv_multipart()[0], *reply])

        async with open_network() as network, calling(network) as client, trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, answer)
            with pytest.raises(error), trio.fail_after(2):
                await client.call(Contact(b"k" * 32, "127.0.0.1", port, secure=False), "echo", timeout=60)


async def test_something_that_is_not_zeromq_at_the_address_is_a_failed_handshake() -> None:
    async def shout(stream: trio.SocketStream) -> None:
        await stream.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    async with open_network() as network, calling(network) as client, trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, shout, 0)
        port = listeners[0].socket.getsockname()[1]
        with pytest.raises(HandshakeFailed), trio.fail_after(2):
            await client.call(Contact(b"k" * 32, "127.0.0.1", port, secure=False), "echo", timeout=60)
        nursery.cancel_scope.cancel()


async def test_a_node_has_no_more_links_than_the_system_has_files_for(monkeypatch) -> None:
    monkeypatch.setattr("labkit.wire.zmq_transport.open_files", lambda: 54)  # ten links, when all else has its own
    async with open_network() as network, calling(network) as client, AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(serving(network)) for _ in range(14)]
        for _ in range(2):
            for server in servers:
                assert (await client.call(server.contact, "echo", 1, timeout=5)).body == 1
        assert client.links == 10
