"""Relays, over real sockets: they pass on what is for hidden nodes, see no plain text, and have limits."""

from __future__ import annotations

import os
from contextlib import suppress
from functools import partial

import pytest
import torch
import trio

from labkit.errors import ConnectionLost, NotAdmitted, Overloaded, RequestRefused, RPCError, WrongServerKey
from labkit.relay import messages, reservation, server
from labkit.relay.limits import RelayLimits
from labkit.relay.listening import connect_to
from labkit.relay.messages import AskNeighbours, Attach, Bring, MessageReader, Reserve, Reserved
from labkit.relay.neighbours import Shortcuts
from labkit.relay.splice import CHUNK, splice
from labkit.wire.rpc_types import BULK
from labkit.wire.security import Admission, Identity
from labkit.wire.zmq_socket import HANDSHAKE_TIMEOUT, HEARTBEAT_PERIOD
from tests.nodes import calling, changed
from tests.relays import Relay, relaying
from tests.swarms import soon


async def reserve(relay: Relay, client, key: bytes) -> Reserved:
    reply = await client.call(relay.contact, messages.RESERVE, Reserve(key), returns=Reserved, timeout=5)
    assert isinstance(reply.body, Reserved)
    return reply.body


async def attach(relay: Relay, reserved: Reserved, secret: bytes | None = None) -> trio.SocketStream:
    stream = await connect_to(relay.contact.host, reserved.port, 5)
    proof = messages.proof_of_attach(secret or reserved.secret, reserved.id)
    await stream.send_all(messages.encode(Attach(reserved.id, proof)))
    return stream


async def is_closed(stream: trio.SocketStream) -> bool:
    """Whether the other side closes a connection; then it is closed here, too."""
    async with stream:
        try:
            with trio.fail_after(5):
                return await stream.receive_some(1) == b""
        except trio.BrokenResourceError:
            return True


# ---------------------------------------------------------------- what it is for


async def test_a_hidden_node_is_called_at_the_relay_under_its_own_key():
    async with relaying() as relay:
        hidden, other = await relay.hide(), await relay.hide()
        tensor = torch.randn(1 << 20)
        for node in (hidden, other):
            assert node.contact.port not in (node.own.port, relay.contact.port)
            reply = await relay.client.call(node.contact, "echo", "hello", [tensor], timeout=20, lane=BULK)
            assert reply.body == "hello" and torch.equal(reply.tensors[0], tensor)
        reply = await other.client.call(hidden.contact, "echo", "from one hidden node to another", timeout=20)
        assert reply.body == "from one hidden node to another"
        wrong = changed(hidden.contact, key=other.contact.key)
        with pytest.raises(WrongServerKey):
            await relay.client.call(wrong, "echo", timeout=20)
        assert {c.port for c in relay.server.clients} == {hidden.contact.port, other.contact.port}


async def test_a_relay_sees_none_of_the_plain_text():
    seen = bytearray()

    class Tap(trio.abc.HalfCloseableStream):
        """Passes everything on to a stream, and keeps what it has passed."""

        def __init__(self, stream):
            self.stream = stream

        async def receive_some(self, max_bytes=None):
            data = await self.stream.receive_some(max_bytes)
            seen.extend(data)
            return data

        async def send_all(self, data):
            await self.stream.send_all(data)

        async def wait_send_all_might_not_block(self):
            await self.stream.wait_send_all_might_not_block()

        async def send_eof(self):
            await self.stream.send_eof()

        async def aclose(self):
            await self.stream.aclose()

    async with relaying() as relay:
        hidden = await relay.hide()

        async def pass_on(stream):
            await splice(Tap(stream), Tap(await connect_to("127.0.0.1", hidden.contact.port, 5)))

        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        relay.nursery.start_soon(trio.serve_listeners, pass_on, [listener])
        tapped = changed(hidden.contact, port=listener.socket.getsockname()[1])
        secret = "what only the two of us know" * 100
        async with listener:
            assert (await relay.client.call(tapped, "echo", secret, timeout=20)).body == secret
        assert len(seen) > 2 * len(secret) and b"only the two" not in seen and b"echo" not in seen


async def test_the_relay_holds_no_more_than_a_chunk_while_a_fast_sender_meets_a_slow_reader():
    async with relaying() as relay:
        client = await relay.hide()
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")  # what the hidden node fetches callers for
        own = listener.socket.getsockname()[:2]
        client.scope.cancel()
        identity = Identity.generate()
        async with calling(relay.network, identity) as caller, trio.open_nursery() as nursery:
            address = await nursery.start(hold_for, caller, relay, own)
            sender = await connect_to(address.host, address.port, 5)
            reader = await listener.accept()
            sent, size, received = 0, 64 << 20, 0

            async def send():
                nonlocal sent
                while sent < size:
                    await sender.send_all(bytes(CHUNK))
                    sent += CHUNK

            nursery.start_soon(send)
            before = -1
            while sent > before:  # until it waits
                before = sent
                await trio.sleep(0.3)
            assert sent < size and 0 < relay.server.held.bytes <= CHUNK
            while received < size:
                received += len(await reader.receive_some(1 << 20))
            assert relay.server.held.most == CHUNK and relay.server.held.passed >= size
            for stream in (sender, reader, listener):
                await stream.aclose()
            nursery.cancel_scope.cancel()


async def hold_for(caller, relay, own, *, task_status):
    await reservation.hold_reservation(caller, relay.contact, caller.endpoint.contact, own, task_status=task_status)


# ---------------------------------------------------------------- whom it relays for


async def test_a_private_swarm_relays_for_its_members_only():
    member, stranger = Identity.generate(), Identity.generate()
    async with relaying(admission=Admission([member.public_key])) as relay:
        await relay.hide(member)
        async with calling(relay.network, stranger) as client:
            with pytest.raises(NotAdmitted):
                await reserve(relay, client, stranger.public_key)


async def test_nobody_takes_the_port_of_another_by_naming_its_key():
    async with relaying() as relay:
        hidden = await relay.hide()
        async with calling(relay.network, Identity.generate()) as thief:
            assert (await reserve(relay, thief, hidden.contact.key)).callers_port != hidden.contact.port
        assert (await relay.client.call(hidden.contact, "echo", 1, timeout=20)).body == 1


async def test_one_member_of_the_swarm_has_only_some_of_the_ports():
    async with relaying(RelayLimits(clients_per_member=2)) as relay, calling(relay.network) as client:
        keys = [Identity.generate().public_key for _ in range(3)]
        for key in keys[:2]:
            await reserve(relay, client, key)
        with pytest.raises(Overloaded, match="of this member of the swarm"):
            await reserve(relay, client, keys[2])
        await relay.hide()


async def test_nobody_attaches_or_fetches_a_caller_without_the_secret_nor_twice(monkeypatch):
    monkeypatch.setattr(server, "FETCH_TIMEOUT", 0.5)
    async with relaying() as relay, calling(relay.network, identity := Identity.generate()) as client:
        reserved = await reserve(relay, client, identity.public_key)
        assert await is_closed(await attach(relay, reserved, secret=bytes(32)))
        stream = await attach(relay, reserved)
        reader = MessageReader(stream)
        assert await reader.read(messages.FROM_RELAY) == messages.Attached()
        assert await is_closed(await attach(relay, reserved))  # the proof has served
        caller = await connect_to("127.0.0.1", reserved.callers_port, 5)
        while not isinstance(fetch := await reader.read(messages.FROM_RELAY), messages.Fetch):
            pass
        thief = await connect_to("127.0.0.1", reserved.port, 5)
        await thief.send_all(messages.encode(Bring(reserved.id, fetch.caller, bytes(32))))
        assert await is_closed(thief)
        assert await is_closed(caller)  # as nobody fetched it
        await stream.aclose()


@pytest.mark.parametrize("sent", [b"GET / HTTP/1.1\r\n\r\n", b"\xff\0\0\0\0\0\0\0\x01\x7f", b"\0\0", os.urandom(600)])
async def test_what_is_no_greeting_of_a_client_is_hung_up_on(sent):
    async with relaying() as relay:
        hidden = await relay.hide()
        stream = await connect_to("127.0.0.1", relay.server.port, 5)
        with suppress(trio.BrokenResourceError):  # it may be quick
            await stream.send_all(sent)
            await stream.send_eof()
        assert await is_closed(stream)
        assert (await relay.client.call(hidden.contact, "echo", 1, timeout=20)).body == 1


async def test_a_relay_tells_its_clients_of_those_in_the_same_network_and_nobody_else():
    async with relaying() as relay:
        one, two = await relay.hide(), await relay.hide()
        direct: dict[bytes, tuple[str, int]] = {}
        shortcuts = Shortcuts(one.client, one.contact.key, direct, one.client.renew)
        await shortcuts.look(relay.contact)
        assert direct == {two.contact.key: (two.own.host, two.own.port)}
        two.scope.cancel()
        await soon(lambda: is_left_out(shortcuts, relay, direct))
        with pytest.raises(RequestRefused, match="no such client"):
            key = relay.client.endpoint.contact.key
            await relay.client.call(relay.contact, messages.NEIGHBOURS, AskNeighbours(key), timeout=5)


async def is_left_out(shortcuts: Shortcuts, relay: Relay, direct) -> bool:
    await shortcuts.look(relay.contact)
    return not direct


# ---------------------------------------------------------------- limits


async def test_a_relay_with_as_many_clients_as_it_takes_says_so():
    async with relaying(RelayLimits(clients=1)) as relay:
        first = await relay.hide()
        async with calling(relay.network, identity := Identity.generate()) as client:
            with pytest.raises(Overloaded, match="has 1 client, as many as it takes"):
                await reserve(relay, client, identity.public_key)
            first.scope.cancel()
            await soon(lambda: free(relay))
            await reserve(relay, client, identity.public_key)


async def free(relay: Relay) -> bool:
    return relay.server.free > 0


@pytest.mark.parametrize(
    "limits", [RelayLimits(connections=2), RelayLimits(connections_per_client=2), RelayLimits(connections_per_caller=2)]
)
async def test_callers_over_a_limit_are_hung_up_on_and_those_before_go_on(limits):
    async with relaying(limits) as relay:
        hidden = await relay.hide()
        assert (await relay.client.call(hidden.contact, "echo", 1, timeout=20)).body == 1
        async with calling(relay.network) as second, calling(relay.network) as third:
            assert (await second.call(hidden.contact, "echo", 2, timeout=20)).body == 2
            with pytest.raises(RPCError):
                await third.call(hidden.contact, "echo", 3, timeout=3)
            assert (await relay.client.call(hidden.contact, "echo", 4, timeout=20)).body == 4
            second.forget(hidden.contact)
            await soon(lambda: called(third, hidden.contact))


async def test_a_relay_leaves_files_to_its_node_where_the_system_lets_it_open_few(monkeypatch):
    monkeypatch.setattr(server, "open_files", lambda: 7)
    async with relaying() as relay:
        hidden = await relay.hide()
        assert (await relay.client.call(hidden.contact, "echo", 1, timeout=20)).body == 1
        async with calling(relay.network) as second:
            with pytest.raises(RPCError):
                await second.call(hidden.contact, "echo", 2, timeout=3)
        assert (await relay.client.call(hidden.contact, "echo", 3, timeout=20)).body == 3


async def called(client, contact):
    try:
        return (await client.call(contact, "echo", 1, timeout=2)).body == 1
    except RPCError:
        return False


async def test_a_silent_connection_is_closed_and_one_of_labkit_is_never_silent_for_so_long():
    assert 3 * HEARTBEAT_PERIOD < RelayLimits().idle_timeout < reservation.IDLE_TIMEOUT
    async with relaying(RelayLimits(idle_timeout=0.3)) as relay:
        hidden = await relay.hide()
        silent = await connect_to("127.0.0.1", hidden.contact.port, 5)
        with trio.fail_after(HANDSHAKE_TIMEOUT):  # else ZeroMQ closes it, which has sent its greeting
            while not await is_over(silent):
                pass
        await soon(lambda: is_idle(relay))


async def is_over(stream: trio.SocketStream) -> bool:
    """Whether the other side has closed a connection; it may say something before."""
    if await stream.receive_some(100):
        return False
    await stream.aclose()
    return True


async def is_idle(relay: Relay) -> bool:
    return relay.server.connections == 0


async def test_two_clients_have_equal_shares_of_a_relay_however_many_connections_each_has():
    rate = 10e6
    async with relaying(RelayLimits(mb_per_s=rate / 1e6)) as relay:
        received = {"many": 0, "one": 0}

        async def flood(port: int) -> None:
            stream = await connect_to("127.0.0.1", port, 5)
            async with stream:
                while True:
                    await stream.send_all(bytes(CHUNK))

        async def swallow(name: str, stream: trio.SocketStream) -> None:
            async with stream:
                while data := await stream.receive_some(CHUNK):
                    received[name] += len(data)

        async def serve(name: str, connections: int) -> None:
            (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
            async with calling(relay.network) as caller, trio.open_nursery() as tasks:
                tasks.start_soon(trio.serve_listeners, partial(swallow, name), [listener])
                address = await tasks.start(hold_for, caller, relay, listener.socket.getsockname()[:2])
                for _ in range(connections):
                    tasks.start_soon(flood, address.port)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, "many", 20)
            nursery.start_soon(serve, "one", 1)
            await soon(lambda: all_begun(received))
            before, began = dict(received), trio.current_time()
            await trio.sleep(1.0)
            gained, seconds = {name: received[name] - before[name] for name in received}, trio.current_time() - began
            nursery.cancel_scope.cancel()
        assert gained["one"] > 0.3 * sum(gained.values())
        assert sum(gained.values()) < 2 * rate * seconds


async def all_begun(received: dict[str, int]) -> bool:
    return min(received.values()) > 0


# ---------------------------------------------------------------- ends


async def test_the_port_of_a_client_that_is_gone_is_closed_and_kept_for_it():
    async with relaying() as relay:
        hidden = await relay.hide()
        assert (await relay.client.call(hidden.contact, "echo", 1, timeout=20)).body == 1
        hidden.scope.cancel()
        await soon(lambda: refused(hidden.contact))
        assert relay.server.clients == [] and relay.server.connections == 0
        again = await relay.hide(hidden.identity)
        assert again.contact == hidden.contact


async def refused(contact) -> bool:
    try:
        stream = await connect_to(contact.host, contact.port, 1)
    except ConnectionLost:
        return True
    await stream.aclose()
    return False


async def test_a_client_that_is_silent_counts_as_gone(monkeypatch):
    monkeypatch.setattr(server, "SILENCE", 0.3)
    async with relaying() as relay, calling(relay.network, identity := Identity.generate()) as client:
        stream = await attach(relay, await reserve(relay, client, identity.public_key))
        with trio.fail_after(5):
            while await stream.receive_some(100):
                pass
        await soon(lambda: free_of_clients(relay))
        await stream.aclose()


async def free_of_clients(relay: Relay) -> bool:
    return relay.server.free == relay.server.limits.clients


async def test_a_relay_that_is_silent_counts_as_gone(monkeypatch):
    monkeypatch.setattr(reservation, "SILENCE", 0.3)
    async with relaying() as relay, calling(relay.network) as client:
        with pytest.raises(ConnectionLost, match="is gone"), trio.fail_after(10):
            await reservation.hold_reservation(client, relay.contact, client.endpoint.contact, ("127.0.0.1", 9))


async def test_a_port_that_nobody_attaches_to_is_given_back(monkeypatch):
    monkeypatch.setattr(server, "ATTACH_TIMEOUT", 0.2)
    async with relaying() as relay, calling(relay.network, identity := Identity.generate()) as client:
        reserved = await reserve(relay, client, identity.public_key)
        assert relay.server.free == relay.server.limits.clients - 1
        await soon(lambda: free_of_clients(relay))
        assert await refused(changed(relay.contact, port=reserved.callers_port))


@pytest.mark.parametrize(
    "options", [{"clients": 0}, {"mb_per_s": -1}, {"connections": float("nan")}, {"clients": True}]
)
def test_limits_are_numbers_above_0(options):
    with pytest.raises(ValueError, match="a number above 0"):
        RelayLimits(**options)
