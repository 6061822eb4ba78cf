"""Two streams joined: bytes pass with back-pressure, ends are told, and many clients have fair shares."""

from __future__ import annotations

import pytest
import trio
from trio.testing import lockstep_stream_pair, memory_stream_pair

from labkit.relay import messages
from labkit.relay.messages import BadRelayMessage, Bring, MessageReader
from labkit.relay.splice import CHUNK, Held, splice
from labkit.relay.turns import FairTurns


def in_virtual_time(function, *args):
    return trio.run(function, *args, clock=trio.testing.MockClock(autojump_threshold=0))


async def socket_pair() -> tuple[trio.SocketStream, trio.SocketStream]:
    """Both ends of a TCP connection."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        one = await trio.open_tcp_stream(*listener.socket.getsockname())
        return one, await listener.accept()


async def memory_pair() -> tuple[trio.StapledStream, trio.StapledStream]:
    return memory_stream_pair()


async def lockstep_pair() -> tuple[trio.StapledStream, trio.StapledStream]:
    return lockstep_stream_pair()


KINDS = [socket_pair, memory_pair, lockstep_pair]


async def read_all(stream: trio.abc.ReceiveStream) -> bytes:
    return b"".join([part async for part in stream])


@pytest.mark.parametrize("pair", KINDS)
def test_both_sides_receive_what_the_other_sends_and_that_it_has_ended(pair):
    async def main():
        (left, a), (b, right) = await pair(), await pair()
        held, said = Held(), {}

        async def talk(name, stream, text):
            await stream.send_all(text)
            await stream.send_eof()
            said[name] = await read_all(stream)

        async with left, right, trio.open_nursery() as nursery:
            nursery.start_soon(lambda: splice(a, b, held=held, first=b"before "))
            nursery.start_soon(talk, "left", left, b"ping" * CHUNK)
            nursery.start_soon(talk, "right", right, b"pong")
        assert said == {"left": b"pong", "right": b"before " + b"ping" * CHUNK}
        assert held.bytes == 0 and held.passed == 4 * CHUNK + len(b"before pong")

    trio.run(main)


@pytest.mark.parametrize("pair", [socket_pair, lockstep_pair])
def test_a_fast_sender_waits_for_a_slow_reader_and_no_more_than_a_chunk_is_held(pair):
    async def main():
        (sender, a), (b, reader) = await pair(), await pair()
        held, sent, received = Held(), 0, 0
        size = 64 << 20

        async def send():
            nonlocal sent
            while sent < size:
                await sender.send_all(bytes(1 << 16))
                sent += 1 << 16
            await sender.send_eof()

        async with sender, reader, trio.open_nursery() as nursery:
            nursery.start_soon(lambda: splice(a, b, held=held))
            nursery.start_soon(send)
            with trio.move_on_after(1):
                before = -1
                while sent > before:  # until it waits
                    before = sent
                    await trio.sleep(0.1)
            assert sent < size / 2, "what the system buffers, and no more"
            assert held.most <= CHUNK
            while received < size:
                received += len(await reader.receive_some(1 << 20))
            await reader.send_eof()
        assert held.most <= CHUNK and held.passed == size

    trio.run(main)


@pytest.mark.parametrize("pair", KINDS)
def test_a_side_that_breaks_ends_the_other(pair):
    async def main():
        (left, a), (b, right) = await pair(), await pair()
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(splice, a, b)
                await trio.testing.wait_all_tasks_blocked(0.01)
                await trio.aclose_forcefully(left)
                await trio.aclose_forcefully(right)

    trio.run(main)


def test_silence_and_a_reader_that_takes_nothing_end_both_sides():
    async def main(pair):
        (left, a), (b, right) = await pair(), await pair()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: splice(a, b, idle_timeout=60))
            for _ in range(5):
                await trio.sleep(50)
                await left.send_all(b"still here")
                assert await right.receive_some(100) == b"still here"
            started = trio.current_time()
            if pair is lockstep_pair:
                nursery.start_soon(swallow, left.send_all, bytes(2 * CHUNK))  # and `right` reads nothing
        assert trio.current_time() - started == pytest.approx(60, abs=2)
        if pair is memory_pair:
            assert await right.receive_some(100) == b""

    async def swallow(function, *args):
        with pytest.raises(trio.BrokenResourceError):
            await function(*args)

    in_virtual_time(main, memory_pair)
    in_virtual_time(main, lockstep_pair)


# ---------------------------------------------------------------- turns


@pytest.mark.parametrize("rate", [float("inf"), 1e6])
def test_a_client_with_many_connections_gets_no_more_than_one_with_a_single_connection(rate):
    async def main():
        turns, passed = FairTurns(rate), {"many": 0, "one": 0}
        shares = {name: turns.share() for name in passed}

        async def connection(name, size):
            while True:
                await trio.lowlevel.checkpoint()  # to read it
                await shares[name].turn(size)
                passed[name] += size

        async with trio.open_nursery() as nursery:
            nursery.start_soon(turns.run)
            for _ in range(50):
                nursery.start_soon(connection, "many", CHUNK)
            nursery.start_soon(connection, "one", CHUNK)
            while sum(passed.values()) < 200 * CHUNK:
                await trio.sleep(0.5) if rate < 1e9 else await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        assert passed["one"] > 0.45 * passed["many"]  # it has to read a chunk before it can ask for the next turn

    in_virtual_time(main)


def test_a_client_that_was_silent_has_saved_nothing_up_and_one_alone_has_all():
    async def main():
        turns, passed = FairTurns(1e6), {"first": 0, "second": 0}

        async def connection(name):
            share = turns.share()
            while True:
                await share.turn(CHUNK)
                passed[name] += CHUNK

        async with trio.open_nursery() as nursery:
            nursery.start_soon(turns.run)
            nursery.start_soon(connection, "first")
            await trio.sleep(10)
            assert passed["first"] == pytest.approx(10e6, rel=0.05)
            nursery.start_soon(connection, "second")
            await trio.sleep(10)
            nursery.cancel_scope.cancel()
        assert passed["first"] == pytest.approx(15e6, rel=0.05)
        assert passed["second"] == pytest.approx(5e6, rel=0.05)

    in_virtual_time(main)


def test_who_gives_up_waiting_for_a_turn_holds_nobody_up():
    async def main():
        turns = FairTurns(1e6)
        share, other = turns.share(), turns.share()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(turns.run)
            started = trio.current_time()
            await share.turn(10_000_000)
            with trio.move_on_after(1) as limit:
                await share.turn(CHUNK)
            assert limit.cancelled_caught
            await other.turn(CHUNK)
            assert trio.current_time() - started == pytest.approx(10, abs=0.5)
            nursery.cancel_scope.cancel()

    in_virtual_time(main)


# ---------------------------------------------------------------- messages

BRING = Bring(b"r" * 16, b"c" * 16, b"p" * 32)


def test_a_message_arrives_whole_and_what_follows_it_is_kept():
    async def main():
        ours, theirs = memory_stream_pair()
        await theirs.send_all(messages.encode(BRING) + b"\xff bytes of the caller")
        reader = MessageReader(ours)
        assert await reader.read(messages.HELLO) == BRING
        assert reader.rest == b"\xff bytes of the caller"

    trio.run(main)


def test_an_end_before_a_message_is_no_message():
    async def main():
        ours, theirs = memory_stream_pair()
        await theirs.aclose()
        assert await MessageReader(ours).read(messages.HELLO) is None

    trio.run(main)


@pytest.mark.parametrize(
    "sent",
    [
        b"\xff\xff" + bytes(300),  # too long
        b"\0\0",  # nothing
        b"\0\x05hello",  # no msgpack of ours
        messages.encode(BRING)[:-1],  # cut off
        b"\0",
        messages.encode(messages.StillHere()),  # a message that is not said here
        messages.encode(Bring(b"short", b"c" * 16, b"p" * 32)),
    ],
)
def test_what_is_no_message_is_refused(sent):
    async def main():
        ours, theirs = memory_stream_pair()
        await theirs.send_all(sent)
        await theirs.aclose()
        with pytest.raises(BadRelayMessage):
            await MessageReader(ours).read(messages.HELLO)

    trio.run(main)
