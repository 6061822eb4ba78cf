"""Calls over real sockets: what comes back, and how each way of failing ends."""

from __future__ import annotations

import pytest
import torch
import trio
import zmq

from labkit.contact import Contact
from labkit.errors import (
    BadReply,
    BadRequest,
    ConnectionLost,
    DeadlineExceeded,
    HandshakeFailed,
    MessageTooLarge,
    NotAdmitted,
    Overloaded,
    RemoteFailure,
    SecurityMismatch,
    UnknownMethod,
    VersionMismatch,
    WrongServerKey,
)
from labkit.wire import frames as wire
from labkit.wire.client import Client
from labkit.wire.rpc import BULK, Method, Reply, Request, RPCLimits
from labkit.wire.security import Admission, Identity
from labkit.wire.zeromq import open_network
from tests.nodes import calling, echo, server_and_client, serving


def changed(contact: Contact, **changes: object) -> Contact:
    fields = {name: getattr(contact, name) for name in ("key", "host", "port", "secure")}
    return Contact(**{**fields, **changes})


@pytest.mark.parametrize("secure", [False, True])
async def test_a_call_brings_back_body_and_tensors(secure: bool) -> None:
    tensors = [torch.randn(300, 100), torch.arange(5), torch.tensor(2.5), torch.zeros(0, 3, dtype=torch.bfloat16)]
    async with server_and_client(secure=secure) as (server, client):
        reply = await client.call(server.contact, "echo", {"a": [1, b"x"]}, tensors, timeout=5, lane=BULK)
    assert reply.body == {"a": [1, b"x"]}
    for sent, returned in zip(tensors, reply.tensors, strict=True):
        assert returned.dtype == sent.dtype
        assert torch.equal(returned, sent)
    assert reply.bytes > 2 * 300 * 100 * 4


async def test_answers_come_back_out_of_order() -> None:
    release, order = trio.Event(), []

    async def slow_first(request: Request) -> Reply:
        if request.body == 1:
            await release.wait()
        return Reply(request.body)

    async with server_and_client({"m": Method(slow_first, int)}) as (server, client), trio.open_nursery() as nursery:

        async def ask(number: int) -> None:
            order.append((await client.call(server.contact, "m", number, timeout=5)).body)

        nursery.start_soon(ask, 1)
        await trio.testing.wait_all_tasks_blocked()
        await ask(2)
        release.set()
    assert order == [2, 1]


async def test_the_first_call_over_a_new_connection_is_never_left_waiting() -> None:
    """A new connection is ready at any moment: between a send that finds it is not, and the wait for it, too."""
    async with open_network() as network, serving(network) as server:
        for number in range(150):
            async with calling(network) as client:
                assert (await client.call(server.contact, "echo", number, timeout=3)).body == number


async def test_a_thousand_calls_at_once_are_all_answered() -> None:
    answers = []
    async with server_and_client() as (server, client), trio.open_nursery() as nursery:

        async def ask(number: int) -> None:
            answers.append((await client.call(server.contact, "echo", number, timeout=20)).body)

        for number in range(1000):
            nursery.start_soon(ask, number)
    assert sorted(answers) == list(range(1000))


@pytest.mark.parametrize(
    ("method", "body", "error"),
    [("none such", None, UnknownMethod), ("add", "text", BadRequest), ("add", 1, RemoteFailure)],
)
async def test_the_caller_gets_the_error_that_the_server_raised(
    method: str, body: object, error: type[Exception]
) -> None:
    async def add(request: Request) -> Reply:
        raise ZeroDivisionError("a bug")

    async with server_and_client({"add": Method(add, int), "echo": Method(echo, object)}) as (server, client):
        with pytest.raises(error):
            await client.call(server.contact, method, body, timeout=5)
        assert (await client.call(server.contact, "echo", "next", timeout=5)).body == "next"


async def test_an_answer_of_another_type_is_a_bad_reply() -> None:
    async with server_and_client() as (server, client):
        with pytest.raises(BadReply):
            await client.call(server.contact, "echo", "text", returns=int, timeout=5)


async def test_a_call_ends_at_its_deadline_and_the_server_drops_the_work() -> None:
    ended = trio.Event()

    async def forever(request: Request) -> Reply:
        try:
            await trio.sleep_forever()
        finally:
            ended.set()

    async with server_and_client({"m": Method(forever), "echo": Method(echo, object)}) as (server, client):
        await client.call(server.contact, "echo", timeout=5)  # so that there is a connection
        with pytest.raises(DeadlineExceeded, match=r"gave no answer to m within 0\.3 s"), trio.fail_after(5):
            await client.call(server.contact, "m", timeout=0.3)
        with trio.fail_after(5):
            await ended.wait()


async def test_a_cancelled_call_tells_the_server_so() -> None:
    started, ended = trio.Event(), trio.Event()

    async def forever(request: Request) -> Reply:
        started.set()
        try:
            await trio.sleep_forever()
        finally:
            ended.set()

    async with server_and_client({"m": Method(forever)}) as (server, client), trio.open_nursery() as nursery:
        nursery.start_soon(lambda: client.call(server.contact, "m", timeout=60))
        await started.wait()
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True), trio.fail_after(2):
            await ended.wait()


async def test_a_server_that_goes_away_fails_the_waiting_call_at_once() -> None:
    started = trio.Event()

    async def forever(request: Request) -> Reply:
        started.set()
        await trio.sleep_forever()
        raise AssertionError

    async with open_network() as network, calling(network) as client, trio.open_nursery() as nursery:
        stop = trio.Event()

        async def serve(task_status: trio.TaskStatus[Contact]) -> None:
            async with serving(network, {"m": Method(forever)}) as server:
                task_status.started(server.contact)
                await stop.wait()

        contact = await nursery.start(serve)

        async def stop_when_started() -> None:
            await started.wait()
            stop.set()

        nursery.start_soon(stop_when_started)
        with pytest.raises(ConnectionLost), trio.fail_after(2):
            await client.call(contact, "m", timeout=60)
        with pytest.raises(ConnectionLost, match="refused"), trio.fail_after(2):
            await client.call(contact, "m", timeout=60)


async def test_a_call_that_begins_while_its_node_closes_is_a_lost_connection() -> None:
    async with open_network() as network, serving(network) as server, network.listen(Identity.generate()) as endpoint:
        client = Client(endpoint)
        async with trio.open_nursery() as nursery:
            await nursery.start(client.run)
            nursery.cancel_scope.cancel()
        with pytest.raises(ConnectionLost, match="this node is closing"):
            await client.call(server.contact, "echo", timeout=5)


async def test_a_name_that_does_not_resolve_says_so() -> None:
    async with server_and_client() as (server, client):
        with pytest.raises(ConnectionLost, match="does not resolve"):
            await client.call(changed(server.contact, host="no-such-host.invalid"), "echo", timeout=10)


async def test_a_wrong_server_key_is_a_typed_error_within_a_second() -> None:
    async with server_and_client(secure=True) as (server, client):
        impostor = changed(server.contact, key=Identity.generate().public_key)
        with pytest.raises(WrongServerKey), trio.fail_after(1):
            await client.call(impostor, "echo", timeout=60)
        assert (await client.call(server.contact, "echo", 1, timeout=5)).body == 1


@pytest.mark.parametrize("secure", [False, True])
async def test_one_side_encrypting_alone_is_a_typed_error_within_a_second(secure: bool) -> None:
    async with server_and_client(secure=secure) as (server, client):
        with pytest.raises(SecurityMismatch), trio.fail_after(1):
            await client.call(changed(server.contact, secure=not secure), "echo", timeout=60)
        assert (await client.call(server.contact, "echo", 1, timeout=5)).body == 1


async def test_a_private_swarm_admits_the_keys_on_its_list_only() -> None:
    friend, stranger = Identity.generate(), Identity.generate()
    async with (
        open_network() as network,
        serving(network, admission=Admission([friend.public_key])) as server,
        calling(network, friend) as admitted,
        calling(network, stranger) as refused,
    ):
        with pytest.raises(NotAdmitted), trio.fail_after(1):
            await refused.call(server.contact, "echo", 1, timeout=60)
        assert (await admitted.call(server.contact, "echo", 1, timeout=5)).body == 1


async def test_over_curve_the_handler_sees_the_key_that_the_caller_proved() -> None:
    seen = []

    async def who(request: Request) -> Reply:
        seen.append(request.peer.key)
        return Reply()

    me = Identity.generate()
    async with open_network() as network, calling(network, me) as client:
        for secure in (True, False):
            async with serving(network, {"who": Method(who)}, secure=secure) as server:
                await client.call(server.contact, "who", timeout=5)
    assert seen == [me.public_key, None]


async def test_a_full_server_refuses_at_once_and_serves_again() -> None:
    holding, release = trio.Event(), trio.Event()

    async def hold(request: Request) -> Reply:
        holding.set()
        await release.wait()
        return Reply(request.body)

    methods, limits = {"m": Method(hold, int)}, RPCLimits(requests=1)
    async with server_and_client(methods, limits=limits) as (server, client):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: client.call(server.contact, "m", 1, timeout=10))
            await holding.wait()
            with pytest.raises(Overloaded), trio.fail_after(1):
                await client.call(server.contact, "m", 2, timeout=60)
            release.set()
        with trio.fail_after(5):
            while True:  # the answer to the first may be here a moment before the server has put it away
                try:
                    assert (await client.call(server.contact, "m", 3, timeout=5)).body == 3
                    break
                except Overloaded:
                    await trio.lowlevel.checkpoint()


async def test_bytes_over_the_budget_wait_their_turn() -> None:
    most, running, answered = 0, 0, 0
    two_run, release = trio.Event(), trio.Event()

    async def hold(request: Request) -> Reply:
        nonlocal most, running
        running += 1
        most = max(most, running)
        if running == 2:
            two_run.set()
        await release.wait()
        running -= 1
        return Reply()

    async with (
        open_network() as network,
        serving(network, {"m": Method(hold)}) as server,
        calling(network, limits=RPCLimits(bytes_per_peer=250_000)) as client,
    ):

        async def ask() -> None:
            nonlocal answered
            await client.call(server.contact, "m", None, [torch.zeros(25_000)], timeout=20)
            answered += 1

        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(ask)
            await two_run.wait()
            assert answered == 0
            release.set()
    assert (most, answered) == (2, 8)


async def test_a_message_over_the_limit_is_refused_before_it_is_sent() -> None:
    limits = RPCLimits(frames=wire.FrameLimits(message_bytes=10_000))
    async with open_network() as network, serving(network) as server, calling(network, limits=limits) as client:
        with pytest.raises(MessageTooLarge):
            await client.call(server.contact, "echo", None, [torch.zeros(5000)], timeout=5)


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
