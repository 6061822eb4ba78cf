"""Calls over any network, the real one and the one in memory: what they return, and how each failure ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from labkit.contact import Contact
from labkit.errors import (
    BadReply,
    BadRequest,
    ConnectionLost,
    DeadlineExceeded,
    MessageTooLarge,
    NotAdmitted,
    Overloaded,
    RemoteFailure,
    RPCError,
    SecurityMismatch,
    UnknownMethod,
    VersionMismatch,
    WrongServerKey,
)
from labkit.simulation.network import open_simnet
from labkit.wire import frames
from labkit.wire.frames import Frame, FrameLimits, Kind
from labkit.wire.rpc_client import Call, Client
from labkit.wire.rpc_types import (
    BULK,
    AsyncMethod,
    CallbackMethod,
    Methods,
    Reply,
    Request,
    RespondFn,
    RPCLimits,
    SyncMethod,
)
from labkit.wire.security import Admission, Identity
from labkit.wire.transport import Peer, await_all
from labkit.wire.zmq_transport import open_network
from tests.nodes import Wire, calling, changed, echo, server_and_client, serving


@pytest.fixture(params=[open_network, open_simnet], ids=["zeromq", "memory"])
def wire(request: pytest.FixtureRequest) -> Wire:
    opener: Wire = request.param
    return opener


@pytest.mark.parametrize("secure", [False, True])
async def test_a_call_brings_back_body_and_tensors(wire: Wire, secure: bool) -> None:
    tensors = [torch.randn(300, 100), torch.arange(5), torch.tensor(2.5), torch.zeros(0, 3, dtype=torch.bfloat16)]
    async with server_and_client(wire, secure=secure) as (server, client):
        reply = await client.call(server.contact, "echo", {"a": [1, b"x"]}, tensors, timeout=5, lane=BULK)
    assert reply.body == {"a": [1, b"x"]}
    for sent, returned in zip(tensors, reply.tensors, strict=True):
        assert returned.dtype == sent.dtype
        assert torch.equal(returned, sent)
    assert reply.bytes > 2 * 300 * 100 * 4


async def test_answers_come_back_out_of_order(wire: Wire) -> None:
    release, order = trio.Event(), []

    async def slow_first(request: Request) -> Reply:
        if request.body == 1:
            await release.wait()
        return Reply(request.body)

    async with (
        server_and_client(wire, {"m": AsyncMethod(slow_first, int)}) as (server, client),
        trio.open_nursery() as nursery,
    ):

        async def ask(number: int) -> None:
            order.append((await client.call(server.contact, "m", number, timeout=5)).body)

        nursery.start_soon(ask, 1)
        await trio.testing.wait_all_tasks_blocked()
        await ask(2)
        release.set()
    assert order == [2, 1]


async def test_the_first_call_over_a_new_connection_is_never_left_waiting(wire: Wire) -> None:
    """A new connection may become ready at any moment, also between a send that was too early and the wait for it."""
    async with wire() as network, serving(network) as server:
        for number in range(150):
            async with calling(network) as client:
                assert (await client.call(server.contact, "echo", number, timeout=3)).body == number


async def test_a_thousand_calls_at_once_are_all_answered(wire: Wire) -> None:
    answers = []
    async with server_and_client(wire) as (server, client), trio.open_nursery() as nursery:

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
    wire: Wire, method: str, body: object, error: type[Exception]
) -> None:
    async def add(request: Request) -> Reply:
        raise ZeroDivisionError("a bug")

    async with server_and_client(wire, {"add": AsyncMethod(add, int), "echo": AsyncMethod(echo, object)}) as (
        server,
        client,
    ):
        with pytest.raises(error):
            await client.call(server.contact, method, body, timeout=5)
        assert (await client.call(server.contact, "echo", "next", timeout=5)).body == "next"


@pytest.mark.parametrize(
    ("method", "body", "error"),
    [("quick", "text", BadRequest), ("quick", 0, RemoteFailure), ("quick", -1, Overloaded)],
)
async def test_a_sync_method_is_answered_without_a_task_and_fails_as_others_do(
    wire: Wire, method: str, body: object, error: type[Exception]
) -> None:
    tasks: set[trio.lowlevel.Task] = set()

    def quick(request: Request) -> Reply:
        tasks.add(trio.lowlevel.current_task())
        if request.body < 0:
            raise Overloaded("not now")
        return Reply(10 // request.body, request.tensors)

    async with server_and_client(wire, {"quick": SyncMethod(quick, int)}) as (server, client):
        for number in range(1, 6):
            reply = await client.call(server.contact, "quick", number, [torch.ones(number)], timeout=5)
            assert reply.body == 10 // number and torch.equal(reply.tensors[0], torch.ones(number))
        with pytest.raises(error):
            await client.call(server.contact, method, body, timeout=5)
        assert len(tasks) == 1


async def test_the_answers_of_a_sync_method_wait_for_a_peer_that_does_not_read(wire: Wire) -> None:
    """Many large answers at once: more than a connection holds."""
    big = torch.zeros(300_000)

    async with (
        server_and_client(wire, {"big": SyncMethod(lambda request: Reply(None, [big]))}) as (server, client),
        trio.open_nursery() as nursery,
    ):

        async def ask() -> None:
            reply = await client.call(server.contact, "big", timeout=50, lane=BULK)
            assert torch.equal(reply.tensors[0], big)

        for _ in range(200):
            nursery.start_soon(ask)


async def test_an_answer_of_another_type_is_a_bad_reply(wire: Wire) -> None:
    async with server_and_client(wire) as (server, client):
        with pytest.raises(BadReply):
            await client.call(server.contact, "echo", "text", returns=int, timeout=5)


async def test_a_call_ends_at_its_deadline_and_the_server_drops_the_work(wire: Wire) -> None:
    ended = trio.Event()

    async def forever(request: Request) -> Reply:
        try:
            await trio.sleep_forever()
        finally:
            ended.set()

    async with server_and_client(wire, {"m": AsyncMethod(forever), "echo": AsyncMethod(echo, object)}) as (
        server,
        client,
    ):
        await client.call(server.contact, "echo", timeout=5)  # so that there is a connection
        with pytest.raises(DeadlineExceeded, match=r"gave no answer to m within 0\.3 s"), trio.fail_after(5):
            await client.call(server.contact, "m", timeout=0.3)
        with trio.fail_after(5):
            await ended.wait()


async def test_the_server_drops_the_work_at_the_deadline_also_if_it_does_not_hear_of_its_end(
    wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Call, "_tell_cancelled", lambda call: None)
    left: list[float] = []
    ended = trio.Event()

    async def forever(request: Request) -> Reply:
        left.append(request.deadline - trio.current_time())
        try:
            await trio.sleep_forever()
        finally:
            ended.set()
        raise AssertionError

    async with server_and_client(wire, {"m": AsyncMethod(forever), "echo": AsyncMethod(echo, object)}) as (
        server,
        client,
    ):
        await client.call(server.contact, "echo", timeout=5)  # so that there is a connection
        with pytest.raises(DeadlineExceeded):
            await client.call(server.contact, "m", timeout=0.3)
        with trio.fail_after(5):
            await ended.wait()
        assert 0.2 < left[0] <= 0.3


async def test_the_work_for_a_caller_that_vanishes_ends_at_its_deadline(wire: Wire) -> None:
    started, ended = trio.Event(), trio.Event()

    async def forever(request: Request) -> Reply:
        started.set()
        try:
            await trio.sleep_forever()
        finally:
            ended.set()
        raise AssertionError

    async with (
        wire() as network,
        serving(network, {"m": AsyncMethod(forever), "echo": AsyncMethod(echo, object)}) as server,
    ):
        async with calling(network) as client:
            client.begin(server.contact, "m", done=lambda outcome: None, timeout=1)
            with trio.fail_after(5):
                await started.wait()
        with trio.fail_after(5):
            await ended.wait()
        async with calling(network) as other:
            assert (await other.call(server.contact, "echo", 1, timeout=5)).body == 1


async def test_a_cancelled_call_tells_the_server_so(wire: Wire) -> None:
    started, ended = trio.Event(), trio.Event()

    async def forever(request: Request) -> Reply:
        started.set()
        try:
            await trio.sleep_forever()
        finally:
            ended.set()

    async with server_and_client(wire, {"m": AsyncMethod(forever)}) as (server, client), trio.open_nursery() as nursery:
        nursery.start_soon(lambda: client.call(server.contact, "m", timeout=60))
        await started.wait()
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True), trio.fail_after(2):
            await ended.wait()


async def test_a_server_that_goes_away_fails_the_waiting_call_at_once(wire: Wire) -> None:
    started = trio.Event()

    async def forever(request: Request) -> Reply:
        started.set()
        await trio.sleep_forever()
        raise AssertionError

    async with wire() as network, calling(network) as client, trio.open_nursery() as nursery:
        stop = trio.Event()

        async def serve(task_status: trio.TaskStatus[Contact]) -> None:
            async with serving(network, {"m": AsyncMethod(forever)}) as server:
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


async def test_a_server_that_is_back_at_its_address_is_called_again(wire: Wire) -> None:
    me = Identity.generate()
    async with wire() as network, calling(network) as client:
        async with serving(network, identity=me) as server:
            contact = server.contact
            assert (await client.call(contact, "echo", 1, timeout=5)).body == 1
        with pytest.raises(ConnectionLost):
            await client.call(contact, "echo", 2, timeout=5)
        async with serving(network, identity=me, address=f"tcp://{contact.endpoint}"):
            assert (await client.call(contact, "echo", 3, timeout=5)).body == 3


async def test_a_call_that_begins_while_its_node_closes_is_a_lost_connection(wire: Wire) -> None:
    async with wire() as network, serving(network) as server:
        async with network.listen(Identity.generate()) as endpoint:
            client = Client(endpoint)
        with pytest.raises(ConnectionLost, match="this node is closing"):
            await client.call(server.contact, "echo", timeout=5)


async def test_a_wrong_server_key_is_a_typed_error_within_a_second(wire: Wire) -> None:
    async with server_and_client(wire, secure=True) as (server, client):
        impostor = changed(server.contact, key=Identity.generate().public_key)
        with pytest.raises(WrongServerKey), trio.fail_after(1):
            await client.call(impostor, "echo", timeout=60)
        assert (await client.call(server.contact, "echo", 1, timeout=5)).body == 1


@pytest.mark.parametrize("secure", [False, True])
async def test_one_side_encrypting_alone_is_a_typed_error_within_a_second(wire: Wire, secure: bool) -> None:
    async with server_and_client(wire, secure=secure) as (server, client):
        with pytest.raises(SecurityMismatch), trio.fail_after(1):
            await client.call(changed(server.contact, secure=not secure), "echo", timeout=60)
        assert (await client.call(server.contact, "echo", 1, timeout=5)).body == 1


async def test_a_private_swarm_admits_the_keys_on_its_list_only(wire: Wire) -> None:
    friend, stranger = Identity.generate(), Identity.generate()
    async with (
        wire() as network,
        serving(network, admission=Admission([friend.public_key])) as server,
        calling(network, friend) as admitted,
        calling(network, stranger) as refused,
    ):
        with pytest.raises(NotAdmitted), trio.fail_after(1):
            await refused.call(server.contact, "echo", 1, timeout=60)
        assert (await admitted.call(server.contact, "echo", 1, timeout=5)).body == 1


async def test_over_curve_the_handler_sees_the_key_that_the_caller_proved(wire: Wire) -> None:
    seen = []

    async def who(request: Request) -> Reply:
        seen.append(request.peer.key)
        return Reply()

    me = Identity.generate()
    async with wire() as network, calling(network, me) as client:
        for secure in (True, False):
            async with serving(network, {"who": AsyncMethod(who)}, secure=secure) as server:
                await client.call(server.contact, "who", timeout=5)
    assert seen == [me.public_key, None]


async def test_a_full_server_refuses_at_once_and_serves_again(wire: Wire) -> None:
    holding, release = trio.Event(), trio.Event()

    async def hold(request: Request) -> Reply:
        holding.set()
        await release.wait()
        return Reply(request.body)

    methods, limits = {"m": AsyncMethod(hold, int)}, RPCLimits(requests=1)
    async with server_and_client(wire, methods, limits=limits) as (server, client):
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


async def test_one_peer_cannot_have_all_places_and_sync_methods_need_none(wire: Wire) -> None:
    async def hold(request: Request) -> Reply:
        await trio.sleep_forever()
        raise AssertionError

    methods: Methods = {"m": AsyncMethod(hold), "quick": SyncMethod(lambda request: Reply("at once"))}
    async with (
        wire() as network,
        serving(network, methods, limits=RPCLimits(requests=8)) as server,
        calling(network) as greedy,
        calling(network) as other,
        trio.open_nursery() as nursery,
    ):
        refused: list[Client] = []

        async def ask(client: Client) -> None:
            try:
                await client.call(server.contact, "m", timeout=60)
            except Overloaded:
                refused.append(client)

        for client in (*[greedy] * 8, other):
            nursery.start_soon(ask, client)
            assert (await client.call(server.contact, "quick", timeout=5)).body == "at once"
        with trio.fail_after(5):
            while not refused:
                await trio.lowlevel.checkpoint()
        assert (await other.call(server.contact, "quick", timeout=5)).body == "at once"
        assert refused == [greedy]
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("codec", ["none", "blockwise8"])
async def test_bytes_over_the_budget_wait_their_turn(wire: Wire, codec: str) -> None:
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
        wire() as network,
        serving(network, {"m": AsyncMethod(hold)}) as server,
        calling(network, limits=RPCLimits(bytes_per_peer=250_000)) as client,
    ):

        async def ask() -> None:
            nonlocal answered
            await client.call(server.contact, "m", None, [torch.zeros(25_000)], timeout=20, codec=codec)
            answered += 1

        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(ask)
            await two_run.wait()
            assert answered == 0
            release.set()
    assert (most, answered) == (2, 8)


async def test_a_server_has_room_for_what_tensors_are_when_they_are_decoded(wire: Wire) -> None:
    holding, release = trio.Event(), trio.Event()

    async def hold(request: Request) -> Reply:
        holding.set()
        await release.wait()
        return Reply()

    limits = RPCLimits(bytes_per_peer=150_000)
    async with (
        server_and_client(wire, {"m": AsyncMethod(hold)}, limits=limits) as (server, client),
        trio.open_nursery() as nursery,
    ):

        async def ask() -> None:  # 100,000 bytes, of which 25,400 are sent
            await client.call(server.contact, "m", None, [torch.zeros(25_000)], timeout=20, codec="blockwise8")

        nursery.start_soon(ask)
        with trio.fail_after(5):
            await holding.wait()
            with pytest.raises(Overloaded):
                await ask()
        release.set()


async def test_a_call_without_a_task_tells_its_outcome_once_and_a_cancelled_one_tells_none(wire: Wire) -> None:
    outcomes: list[Reply | RPCError] = []
    cancelled = trio.Event()

    async def echo_or_wait(request: Request) -> Reply:
        if request.body == "wait":
            try:
                await trio.sleep_forever()
            finally:
                cancelled.set()
        return Reply(request.body)

    async with server_and_client(wire, {"m": AsyncMethod(echo_or_wait, str)}) as (server, client):
        await client.call(server.contact, "m", "connect", timeout=5)
        client.begin(server.contact, "m", "a", done=outcomes.append, timeout=5)
        client.begin(server.contact, "m", "b", done=outcomes.append, returns=int, timeout=5)
        client.begin(server.contact, "m", "wait", done=outcomes.append, timeout=0.1)
        waiting = client.begin(server.contact, "m", "wait", done=outcomes.append, timeout=60)
        with trio.fail_after(5):
            while len(outcomes) < 3:
                await trio.lowlevel.checkpoint()
            waiting.cancel()
            waiting.cancel()
            await cancelled.wait()
        assert client.budget.taken == 0
    assert [reply.body for reply in outcomes if isinstance(reply, Reply)] == ["a"]
    assert {type(outcome) for outcome in outcomes} == {Reply, BadReply, DeadlineExceeded} and len(outcomes) == 3


async def test_thousands_of_calls_that_wait_for_each_others_bytes_all_get_their_turn(wire: Wire) -> None:
    release = trio.Event()

    async def wait(request: Request) -> Reply:
        await release.wait()
        return Reply(request.body)

    # In memory an echo is back before it is known to be sent, and lets the next one go.
    quick = SyncMethod(lambda request: Reply(request.body), object)
    async with wire() as network, serving(network, {"echo": quick, "wait": AsyncMethod(wait, object)}) as server:
        async with calling(network, limits=RPCLimits(bytes_per_peer=1)) as client:
            bodies: list[int] = []
            all_there = trio.Event()

            def on_reply(reply: Reply | RPCError) -> None:
                bodies.append(reply.body if isinstance(reply, Reply) else -1)
                if len(bodies) == 3000:
                    all_there.set()

            await client.call(server.contact, "echo", "connect", timeout=5)
            client.begin(server.contact, "wait", 0, done=on_reply, timeout=30)
            for number in range(1, 3000):
                client.begin(server.contact, "echo", number, done=on_reply, timeout=30)
            assert not bodies
            release.set()
            with trio.fail_after(30):
                await all_there.wait()
            assert sorted(bodies) == list(range(3000))


async def test_an_answer_that_cannot_be_read_fails_its_call_and_no_other(wire: Wire, monkeypatch) -> None:
    def trip(specs: object, payload: object) -> list[torch.Tensor]:
        raise RuntimeError("an odd tensor")

    async with server_and_client(wire) as (server, client):
        assert (await client.call(server.contact, "echo", 1, timeout=5)).body == 1
        with monkeypatch.context() as patch:
            patch.setattr("labkit.wire.frames.decode_tensors", trip)
            with pytest.raises((BadReply, RemoteFailure), match="an odd tensor"):
                await client.call(server.contact, "echo", 2, timeout=5)
        assert (await client.call(server.contact, "echo", 3, timeout=5)).body == 3
        assert client.links == 1


@pytest.mark.parametrize("codec", ["none", "blockwise8"])
async def test_a_message_over_the_limit_is_refused_before_it_is_sent(wire: Wire, codec: str) -> None:
    limits = RPCLimits(frames=FrameLimits(message_bytes=10_000))
    async with wire() as network, serving(network) as server, calling(network, limits=limits) as client:
        with pytest.raises(MessageTooLarge):
            await client.call(server.contact, "echo", None, [torch.zeros(5000)], timeout=5, codec=codec)


# ---------------------------------------------------------------- peers that speak another version of the protocol

OLD, NEW = 1, 3
REQUEST_OF_OLD = b"LK\x01\x01" + (7).to_bytes(8, "big") + b"\x94\xa4echo\xcd\x13\x88\xa4body\x90"
"""How version 1 calls `echo` with "body": prelude (magic, version, kind, id), then method, ms, body and tensors."""


async def test_an_old_peer_that_calls_is_told_which_version_we_speak(wire: Wire) -> None:
    assert frames.VERSION == NEW
    answered, answers = trio.Event(), list[bytes]()

    def on_message(message: Sequence[Frame]) -> None:
        answers.extend(bytes(frame) for frame in message)
        answered.set()

    async with wire() as network, serving(network) as server, network.listen(Identity.generate()) as old:
        link = old.connect(server.contact, on_message, lambda error: None)
        if link.send_nowait([REQUEST_OF_OLD]) is None:
            link.when_ready(lambda: link.send_nowait([REQUEST_OF_OLD]))
        with trio.fail_after(5):
            await answered.wait()
    assert answers == [b"LK" + bytes([NEW, Kind.VERSION]) + REQUEST_OF_OLD[4:12]]


@pytest.mark.parametrize(("ours", "theirs"), [(OLD, NEW), (NEW, OLD)])
async def test_whoever_calls_a_peer_of_another_version_reads_which_each_speaks_and_what_to_do(
    wire: Wire, monkeypatch: pytest.MonkeyPatch, ours: int, theirs: int
) -> None:
    monkeypatch.setattr(frames, "VERSION", ours)
    async with (
        wire() as network,
        network.listen(Identity.generate()) as other,
        calling(network) as client,
        trio.open_nursery() as nursery,
    ):

        def on_request(peer: Peer, request: Sequence[Frame]) -> None:
            prelude = bytes(request[0])[:12]
            assert prelude[:4] == b"LK" + bytes([ours, Kind.REQUEST])
            other.send_nowait(peer, [b"LK" + bytes([theirs, Kind.VERSION]) + prelude[4:]])

        nursery.start_soon(other.serve, on_request)
        with pytest.raises(VersionMismatch) as caught, trio.fail_after(5):
            await client.call(other.contact, "echo", "body", timeout=60)
        nursery.cancel_scope.cancel()
    assert str(caught.value) == (
        f"{other.contact.endpoint} speaks version {theirs} of labkit's protocol, we speak {ours}; "
        "install the same labkit on both sides"
    )


# ---------------------------------------------------------------- methods that call back: those of experts


async def test_a_callback_method_is_answered_when_its_handler_responds(wire: Wire) -> None:
    waiting: list[tuple[Request, RespondFn]] = []
    all_wait = trio.Event()

    def handler(request: Request, respond: RespondFn) -> Callable[[], object]:
        waiting.append((request, respond))
        if len(waiting) == 3:
            all_wait.set()
        return lambda: None

    bodies: list[int] = []
    async with (
        server_and_client(wire, {"m": CallbackMethod(handler, int)}) as (server, client),
        trio.open_nursery() as nursery,
    ):

        async def ask(number: int) -> None:
            sent = torch.full((number,), float(number))
            reply = await client.call(server.contact, "m", number, [sent], timeout=5)
            assert torch.equal(reply.tensors[0], 2 * sent)
            bodies.append(reply.body)

        for number in range(3):
            nursery.start_soon(ask, number)
        with trio.fail_after(5):
            await all_wait.wait()
        for request, respond in waiting:
            respond(Reply(request.body, [2 * request.tensors[0]]))
    assert sorted(bodies) == [0, 1, 2]


@pytest.mark.parametrize(
    ("body", "error"),
    [("text", BadRequest), (0, RemoteFailure), (1, Overloaded), (2, RemoteFailure)],
)
async def test_a_callback_method_fails_as_others_do(wire: Wire, body: object, error: type[Exception]) -> None:
    def handler(request: Request, respond: RespondFn) -> Callable[[], object]:
        if request.body == 0:
            raise ZeroDivisionError("a bug")
        respond(
            Overloaded("not now") if request.body == 1 else KeyError("a bug") if request.body == 2 else Reply("well")
        )
        return lambda: None

    async with server_and_client(wire, {"m": CallbackMethod(handler, int)}, limits=RPCLimits(requests=1)) as (
        server,
        client,
    ):
        with pytest.raises(error):
            await client.call(server.contact, "m", body, timeout=5)
        assert (await client.call(server.contact, "m", 3, timeout=5)).body == "well"


async def test_a_callback_method_learns_that_its_caller_gave_up_and_no_answer_is_sent_too_late(
    wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    responds: list[RespondFn] = []
    begun, given_up = trio.Event(), trio.Event()

    def handler(request: Request, respond: RespondFn) -> Callable[[], object]:
        responds.append(respond)
        begun.set()
        return given_up.set

    outcomes: list[Reply | RPCError] = []
    methods: Methods = {"m": CallbackMethod(handler), "echo": AsyncMethod(echo, object)}
    async with server_and_client(wire, methods, limits=RPCLimits(requests=1)) as (server, client):
        call = client.begin(server.contact, "m", done=outcomes.append, timeout=60)
        with trio.fail_after(5):
            await begun.wait()
            call.cancel()
            await given_up.wait()
        responds[0](Reply("for nobody"))
        monkeypatch.setattr(Call, "_tell_cancelled", lambda call: None)
        with pytest.raises(DeadlineExceeded):
            await client.call(server.contact, "m", timeout=0.3)
        await trio.sleep(0.1)  # the server began it later
        sent: list[object] = []

        def send(peer: object, frames: object) -> bool:
            sent.append(frames)
            return True

        monkeypatch.setattr(server, "send_nowait", send)
        responds[1](Reply("too late"))
        monkeypatch.undo()
        assert not sent and not outcomes
        assert (await client.call(server.contact, "echo", "next", timeout=5)).body == "next"  # there is room for it


class Begun:
    """Something that was begun, and calls back when it is told to."""

    def __init__(self, begun: list[Begun], done: Callable[[int], None]) -> None:
        self.done = done
        self.cancelled = False
        begun.append(self)

    def cancel(self) -> None:
        self.cancelled = True


async def test_several_callbacks_are_awaited_in_one_task_and_cancelled_together(autojump_clock: MockClock) -> None:
    begun: list[Begun] = []
    results: list[list[int]] = []

    async def wait() -> None:
        results.append(await await_all([partial(Begun, begun) for _ in range(3)]))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await wait_all_tasks_blocked()
        for index in (2, 0, 1):
            assert not results
            begun[index].done(index)
    assert results == [[0, 1, 2]]
    begun.clear()
    with trio.move_on_after(1):
        await wait()
    assert [one.cancelled for one in begun] == [True] * 3
    assert await await_all([]) == []
