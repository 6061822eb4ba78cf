"""One ZeroMQ socket under trio: no wake-up is missed, and cancelling loses nothing."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Sequence

import pytest
import trio
import zmq

from labkit.contact import Contact
from labkit.errors import ConnectionLost, NotAdmitted
from labkit.swarm import Swarm
from labkit.wire import zmq_transport as zeromq
from labkit.wire.frames import Frame
from labkit.wire.security import Identity
from labkit.wire.zmq_socket import Socket, UnsentFrames, ZmqMessage, make_context, make_dealer, make_router
from labkit.wire.zmq_transport import open_network
from tests.nodes import calling, serving


@pytest.fixture
async def pair(nursery: trio.Nursery) -> AsyncIterator[tuple[Socket, Socket]]:
    """Yields a ROUTER, and a DEALER that is connected to it."""
    context = make_context()
    identity = Identity.generate()
    router, host, port = make_router(context, "127.0.0.1", None, identity, secure=False, domain=b"", max_frame=1 << 26)
    dealer, monitor = make_dealer(context, host, port, identity, None, 1 << 26)
    nursery.start_soon(router.run)
    nursery.start_soon(dealer.run)
    yield router, dealer
    for socket in (router, dealer, monitor):
        socket.close()
    context.term()


async def texts(socket: Socket, count: int) -> list[bytes]:
    found: list[bytes] = []
    with trio.fail_after(10):
        while len(found) < count:
            found += [message[-1].bytes for message in await socket.receive()]
    return found


async def test_a_burst_costs_one_wake_up(pair: tuple[Socket, Socket]) -> None:
    router, dealer = pair
    for number in range(50):
        await dealer.send([b"%d" % number])
    assert await texts(router, 50) == [b"%d" % number for number in range(50)]


async def test_cancelling_a_receive_loses_no_message(pair: tuple[Socket, Socket]) -> None:
    router, dealer = pair
    received: list[bytes] = []

    async def receive_and_be_cancelled() -> None:
        """Receive and be cancelled at all possible moments: before, while and after a message arrives."""
        deadline = 0.0
        while len(received) < 200:
            with trio.move_on_after(deadline):
                received.extend(message[-1].bytes for message in await router.receive())
            deadline = 0.0003 if deadline == 0.0 else 0.0

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive_and_be_cancelled)
            for number in range(200):
                await dealer.send([b"%d" % number])
                await trio.lowlevel.checkpoint()
    assert received == [b"%d" % number for number in range(200)]


async def test_sending_and_receiving_at_once_misses_no_edge(pair: tuple[Socket, Socket]) -> None:
    """Sends swallow the edges that receivers wait for, so both sides send at the same time, a thousand times."""
    router, dealer = pair
    await dealer.send([b"hello"])
    with trio.fail_after(5):
        route = (await router.receive())[0][0].bytes

    async def talk(socket: Socket, head: list[bytes]) -> None:
        for number in range(1000):
            await socket.send([*head, b"%d" % number])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(talk, router, [route])
        nursery.start_soon(talk, dealer, [])
        for socket in (router, dealer):
            assert await texts(socket, 1000) == [b"%d" % number for number in range(1000)]


async def test_a_callback_on_a_socket_misses_no_edge_either(pair: tuple[Socket, Socket]) -> None:
    """Half of the messages are answered as they arrive, while others send, too."""
    router, dealer = pair
    received: dict[Socket, list[bytes]] = {router: [], dealer: []}
    answered, all_received = trio.Event(), trio.Event()

    def on_request(message: ZmqMessage) -> None:
        received[router].append(message[-1].bytes)
        if len(received[router]) == 1000:  # perhaps after the last answer, which is to the message before
            all_received.set()
        if len(received[router]) % 2:
            router.send_nowait([message[0].bytes, b"answer"])

    def on_answer(message: ZmqMessage) -> None:
        received[dealer].append(message[-1].bytes)
        if len(received[dealer]) == 500:
            answered.set()

    router.on_message, dealer.on_message = on_request, on_answer
    with trio.fail_after(20):
        for number in range(1000):
            await dealer.send([b"%d" % number])
        await answered.wait()
        await all_received.wait()
    assert received == {router: [b"%d" % number for number in range(1000)], dealer: [b"answer"] * 500}


async def test_what_had_arrived_when_a_socket_fails_is_still_delivered(pair: tuple[Socket, Socket]) -> None:
    router, dealer = pair
    received: list[bytes] = []
    await dealer.send([b"last words"])
    with trio.fail_after(5):
        while not router._events & zmq.POLLIN:
            await trio.lowlevel.checkpoint()
    router.on_message = lambda message: received.append(message[-1].bytes)
    router.fail(ConnectionLost("over"))
    assert received == [b"last words"]


async def test_what_had_arrived_when_the_socket_fails_is_still_received(pair: tuple[Socket, Socket]) -> None:
    router, dealer = pair
    await dealer.send([b"first"])
    assert await texts(router, 1) == [b"first"]
    await dealer.send([b"last words"])
    with trio.fail_after(5):
        while not (burst := router.receive_nowait()):
            await trio.lowlevel.checkpoint()
        assert burst[0][-1].bytes == b"last words"
    router.fail(ConnectionLost("over"))
    with pytest.raises(ConnectionLost, match="over"):
        await router.receive()


async def test_failing_wakes_who_waits(pair: tuple[Socket, Socket]) -> None:
    router, _ = pair

    async def expect_the_end() -> None:
        with pytest.raises(ConnectionLost):
            await router.receive()

    with trio.fail_after(2):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(expect_the_end)
            await trio.testing.wait_all_tasks_blocked()
            router.fail(ConnectionLost("over"))


@pytest.mark.parametrize("rest", [[], [b"a small one"]])
async def test_large_frames_are_tracked_until_the_peer_has_them(pair: tuple[Socket, Socket], rest: list[bytes]) -> None:
    router, dealer = pair
    for _ in range(2):  # more than the system buffers
        unsent = await dealer.send([bytes(30_000_000), *rest])
    assert unsent.bytes == 30_000_000 + sum(map(len, rest)) and not unsent.done
    assert len((await texts(router, 2))[1]) == len([bytes(30_000_000), *rest][-1])
    with trio.fail_after(5):
        while not unsent.done:
            await trio.lowlevel.checkpoint()


async def test_who_waits_for_a_peer_that_does_not_read_lets_others_have_their_turn(
    pair: tuple[Socket, Socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    router, dealer = pair
    await dealer.send([b"hello"])
    [[route, _]] = await router.receive()
    full_since = trio.current_time()
    while trio.current_time() < full_since + 0.2:  # until there has been no room for a while
        if router.send_nowait([route.bytes, bytes(50_000)]) is not None:
            full_since = trio.current_time()
        await trio.lowlevel.checkpoint()
    attempts = 0
    send_nowait = router.send_nowait

    def counted(frames: Sequence[Frame]) -> UnsentFrames | None:
        nonlocal attempts
        attempts += 1
        return send_nowait(frames)

    monkeypatch.setattr(router, "send_nowait", counted)
    with trio.move_on_after(0.5) as scope:
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(router.send, [route.bytes, bytes(50_000)])
    assert scope.cancelled_caught and 20 < attempts < 20 * 30
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(router.send, [route.bytes, b"the last"])
            while (await texts(dealer, 1))[-1] != b"the last":
                pass


def test_a_connection_is_watched_though_a_closed_one_had_the_same_file_descriptor():
    context = make_context()
    being_closed = context.socket(zmq.PAIR)
    for descriptor in range(1000):  # pyzmq's own names, as sockets that are still being closed hold them
        being_closed.bind(f"inproc://monitor.s-{descriptor}")
    for socket in make_dealer(context, "127.0.0.1", 1, Identity.generate(), None, 1 << 26):
        socket.close()
    being_closed.close()
    context.term()


def test_connections_that_are_refused_hold_up_no_other():
    with Swarm("private", members=[]) as private:  # in a thread of its own, so that it refuses just as we close

        async def knock(contact: Contact) -> None:
            async with open_network() as network, serving(network) as server:
                for number in range(50):
                    async with calling(network) as client:
                        with pytest.raises(NotAdmitted):
                            await client.call(contact, "echo", timeout=5)
                        assert (await client.call(server.contact, "echo", number, timeout=5)).body == number

        trio.run(knock, Contact.from_invitation(private.invite()))


@pytest.mark.parametrize("sockets_left", [0, 1])
def test_where_no_socket_is_left_a_connection_is_lost_and_none_leaks(sockets_left):
    context = make_context()
    context.set(zmq.MAX_SOCKETS, 2)
    held = [context.socket(zmq.PAIR) for _ in range(2 - sockets_left)]
    with pytest.raises(ConnectionLost, match=r"no socket is left to connect to 127.0.0.1:1: "):
        make_dealer(context, "127.0.0.1", 1, Identity.generate(), None, 1 << 26)
    for socket in held:
        socket.close()
    context.term()  # which would wait for a socket that is open


async def test_a_library_that_does_not_end_its_thread_does_not_hold_the_network_up(monkeypatch, caplog):
    caplog.set_level("INFO")
    ended = threading.Event()
    monkeypatch.setattr(zeromq, "TERM_TIMEOUT", 0.1)
    monkeypatch.setattr(zmq.Context, "term", lambda context: ended.wait(30))
    async with zeromq.open_network() as network:
        pass
    assert "did not end" in caplog.text
    ended.set()
    monkeypatch.undo()
    network.context.term()
