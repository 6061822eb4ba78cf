"""Joining a swarm: through which nodes, and what each of the ways in which it can fail says."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import trio
import zmq

from labkit import joining
from labkit.contact import Contact
from labkit.errors import InviteError, JoinError, LabkitError
from labkit.node import NodeConfig, open_node
from labkit.portal import unwrap
from labkit.swarm import Swarm
from labkit.wire.frames import Frame, Kind
from labkit.wire.security import Identity, key_text
from labkit.wire.transport import Peer
from labkit.wire.zmq_transport import open_network
from tests.ports import free_ports

KEY = Identity.generate().public_key


def invitation(port: int, *, host: str = "127.0.0.1", key: bytes = KEY, secure: bool = True) -> str:
    return Contact(key, host, port, secure).invitation()


def why_not(invite: str, **options: Any) -> str:
    """Returns the error of `Swarm.join`, which has to name the address and to come in time."""
    started = time.monotonic()
    with pytest.raises(JoinError) as caught:
        Swarm.join(invite, **options)
    assert time.monotonic() - started < 10
    assert Contact.from_invitation(invite).endpoint in str(caught.value)
    assert not any(thread.name.startswith("labkit-lab-joined") for thread in threading.enumerate())
    return str(caught.value)


@pytest.fixture
def plain() -> Iterator[Swarm]:
    with Swarm("plain") as swarm:
        yield swarm


@pytest.fixture
def encrypted() -> Iterator[Swarm]:
    with Swarm("encrypted", secure=True) as swarm:
        yield swarm


@pytest.fixture
def impatient(monkeypatch) -> None:
    """Shorten the timeout, so that a test does not wait for as long as a person would."""
    assert joining.JOIN_TIMEOUT < 10
    monkeypatch.setattr(joining, "JOIN_TIMEOUT", 1.0)


@contextmanager
def listener(greeting: bytes | None = None) -> Iterator[int]:
    """Something at a port that is not labkit: it says `greeting` and hangs up, or (None) accepts and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return  # closed
                with connection:
                    connection.sendall(greeting or b"")

        thread = threading.Thread(target=answer, daemon=True)
        if greeting is not None:
            thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
    if greeting is not None:
        thread.join()


# ---------------------------------------------------------------- it works


def test_a_joined_swarm_uses_the_experts_of_the_first_and_leaves_it_alone(plain):
    plain.serve("nop", grid=(2, 2), isolation="task")
    with Swarm.join(plain.invite()) as joined:
        assert sorted(joined.experts()) == ["nop.0.0", "nop.0.1", "nop.1.0", "nop.1.1"]
        x = torch.ones(3, 4)
        assert joined.expert("nop.0.1")(x).equal(x)
        assert joined.moe(4, name="nop")(x).shape == (3, 4)
    assert not plain.closed
    assert plain.expert("nop.0.1")(torch.ones(1, 4)).shape == (1, 4)


def test_experts_served_by_one_who_joined_are_found_by_all_at_once(plain):
    with Swarm.join(plain.invite()) as one, Swarm.join(one.invite(), name="another") as another:
        one.serve("nop", grid=(1, 2), isolation="task")
        for swarm in (one, another, plain):
            assert sorted(swarm.experts()) == ["nop.0.0", "nop.0.1"]


def test_an_encrypted_swarm_is_joined_with_encryption(encrypted):
    assert "?plain" not in encrypted.invite()
    with Swarm.join(encrypted.invite()) as joined:
        assert "?plain" not in joined.invite()
        joined.serve("nop", grid=(1, 1), isolation="task")
        assert encrypted.expert("nop.0.0")(torch.ones(1, 4)).shape == (1, 4)


def test_a_swarm_that_listens_wide_is_encrypted_and_says_an_address_that_others_reach():
    with Swarm("wide", listen="tcp://0.0.0.0:*") as wide:
        contact = Contact.from_invitation(wide.invite())
        assert contact.secure
        assert contact.host != "0.0.0.0"
        wide.serve("nop", grid=(1, 1), isolation="task")
        with Swarm.join(wide.invite()) as joined:
            assert Contact.from_invitation(joined.invite()).host == contact.host  # it listens wide, too
            assert joined.expert("nop.0.0")(torch.ones(1, 4)).shape == (1, 4)


def test_an_announced_address_is_what_the_invitation_says():
    with Swarm("routed", listen="tcp://0.0.0.0:*", announce="lab.example.org:4000") as routed:
        assert Contact.from_invitation(routed.invite()).endpoint == "lab.example.org:4000"
        assert routed.invite().note == ""


def test_an_invitation_to_a_loopback_swarm_says_so_and_how_to_listen_wider(plain):
    note = plain.invite().note
    assert "same machine only" in note
    assert 'listen="tcp://0.0.0.0:*"' in note
    assert "announce=" in note


# ---------------------------------------------------------------- private swarms


def test_a_private_swarm_says_which_key_to_admit_and_admits_it_from_then_on():
    identity = Identity.generate()
    with Swarm("private", members=[]) as private:
        private.serve("nop", grid=(1, 1), isolation="task")
        text = why_not(private.invite(), key=identity)
        assert "private" in text
        assert key_text(identity.public_key) in text
        assert "labkit keygen" in text
        private.admit(key_text(identity.public_key))
        with Swarm.join(private.invite(), key=identity) as joined:
            x = torch.ones(2, 4)
            assert joined.expert("nop.0.0")(x).equal(x)  # its server admits whom the swarm admits


def test_a_member_serves_experts_in_a_private_swarm():
    identity = Identity.generate()
    with (
        Swarm("private", members=[key_text(identity.public_key)]) as private,
        Swarm.join(private.invite(), key=identity) as member,
    ):
        member.serve("nop", grid=(1, 1), isolation="task")
        assert private.expert("nop.0.0")(torch.ones(1, 4)).shape == (1, 4)


def test_an_open_swarm_admits_nobody_in_particular(plain):
    with pytest.raises(ValueError, match="open"):
        plain.admit(key_text(KEY))
    with pytest.raises(ValueError, match="not a public key"), Swarm("private", members=["me"]):
        pass


def test_a_private_swarm_cannot_be_unencrypted():
    with pytest.raises(ValueError, match="secure=False"):
        Swarm("private", members=[], secure=False)


# ---------------------------------------------------------------- it fails, and says why


def test_a_name_that_does_not_resolve(monkeypatch):
    def getaddrinfo(*args: object, **kwargs: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    text = why_not(invitation(4000, host="no-such-host.example"))
    assert "no-such-host.example does not resolve" in text
    assert "spelling" in text


def test_a_port_where_nothing_listens():
    text = why_not(invitation(free_ports()))
    assert "nothing listens there" in text
    assert "fresh invitation" in text
    assert "same machine only" in text  # perhaps the invitation was carried to another machine


def test_an_address_that_does_not_answer(impatient):
    with socket.socket() as full, socket.socket() as first, socket.socket() as second:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for filler in (first, second):  # then further connections are dropped, as by a firewall
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        text = why_not(invitation(full.getsockname()[1]))
    assert "nothing answered within" in text
    assert "firewall" in text


@pytest.mark.parametrize("secure", [True, False])
def test_a_port_that_accepts_and_says_nothing(impatient, secure):
    with listener() as port:
        text = why_not(invitation(port, secure=secure))
    assert "said nothing" in text
    assert "suspended" in text


@pytest.mark.parametrize("secure", [True, False])
@pytest.mark.parametrize("greeting", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n" + b"x" * 100])
def test_a_port_where_something_else_listens(secure, greeting):
    with listener(greeting) as port:
        text = why_not(invitation(port, secure=secure))
    assert "does not speak ZeroMQ" in text
    assert "check the port" in text


def test_a_zeromq_socket_that_is_not_labkit(impatient):
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        port = router.bind_to_random_port("tcp://127.0.0.1")
        text = why_not(invitation(port, secure=False))
    assert "ZeroMQ is there, but no answer came" in text
    assert "another program's" in text


@pytest.mark.parametrize("how", ["plain", "encrypted"])
def test_another_node_than_the_one_that_invited(how, request):
    swarm = request.getfixturevalue(how)
    here = Contact.from_invitation(swarm.invite())
    text = why_not(invitation(here.port, key=KEY, secure=here.secure))
    assert "does not hold the key of this invitation" in text
    assert "restarted" in text


def test_only_one_side_encrypts(plain, encrypted):
    here = Contact.from_invitation(plain.invite())
    assert "it does not encrypt" in why_not(invitation(here.port, key=here.key, secure=True))
    there = Contact.from_invitation(encrypted.invite())
    assert "it encrypts" in why_not(invitation(there.port, key=there.key, secure=False))


async def test_a_node_that_speaks_another_version():
    identity = Identity.generate()
    async with open_network() as network, network.listen(identity) as endpoint, trio.open_nursery() as nursery:

        def from_the_future(peer: Peer, frames: Sequence[Frame]) -> None:
            endpoint.send_nowait(peer, [b"LK" + bytes([9, Kind.VERSION]) + bytes(frames[0])[4:12]])

        nursery.start_soon(endpoint.serve, from_the_future)
        text = await trio.to_thread.run_sync(why_not, endpoint.contact.invitation())
        nursery.cancel_scope.cancel()
    assert "speaks version 9" in text
    assert "same labkit on both sides" in text


@pytest.mark.parametrize("text", ["", "http://127.0.0.1:80", "labkit://", None, 4000])
def test_what_is_no_invitation_at_all(text):
    with pytest.raises(InviteError, match="an invitation looks like"):
        Swarm.join(text)


def test_an_invitation_that_was_not_copied_whole(encrypted):
    invite = encrypted.invite()
    with pytest.raises(InviteError, match="copy it whole"):
        Swarm.join("labkit://" + invite[20:])
    with pytest.raises(InviteError):
        Swarm.join(invite.rpartition(":")[0])


def test_the_port_to_listen_on_is_taken(plain):
    port = Contact.from_invitation(plain.invite()).port
    with pytest.raises(LabkitError, match=f"cannot listen on tcp://127.0.0.1:{port}.*in use"):
        Swarm("second", listen=f"tcp://127.0.0.1:{port}")


# ---------------------------------------------------------------- a wrong address of our own


@pytest.mark.parametrize(
    ("announce", "why"),
    [
        ("tcp://203.0.113.5:4000", "without tcp://"),
        ("labkit://key@203.0.113.5:4000", "without labkit://"),
        ("host:65536", "between 1 and 65535"),
        ("host:0", "between 1 and 65535"),
        ("host:http", "HOST or HOST:PORT"),
        ("host:", "HOST or HOST:PORT"),
        (":4000", "HOST or HOST:PORT"),
        ("", "HOST or HOST:PORT"),
        ("two hosts:4000", "HOST or HOST:PORT"),
        ("203.0.113.5:4000:4001", "an IPv6 address as"),
        ("0.0.0.0:4000", "others cannot call that"),
        (4000, "HOST or HOST:PORT"),
    ],
)
def test_what_cannot_be_announced_is_refused_before_anything_is_closed_or_started(plain, announce, why):
    with pytest.raises(ValueError, match="announce=") as caught:
        Swarm("plain", announce=announce)
    assert why in str(caught.value) and repr(announce) in str(caught.value)
    assert not plain.closed


@pytest.fixture
def without_names(monkeypatch) -> None:
    """No name resolves, and none is looked up; addresses are what they are."""
    resolve = socket.getaddrinfo

    def getaddrinfo(host: Any, *args: Any, **options: Any) -> Any:
        if str(host).startswith("no-such-host"):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return resolve(host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


def test_a_swarm_that_announces_a_wrong_address_says_so_when_it_serves(plain, without_names):
    def why_not_served(announce: str) -> str:
        with Swarm("announced", announce=announce) as swarm, pytest.raises(ValueError) as caught:
            swarm.serve("nop", grid=(1, 1), isolation="task")
        assert not swarm.servers
        assert f"announce={announce!r}" in str(caught.value) and "invitation" not in str(caught.value)
        return str(caught.value)

    assert "nothing listens there" in why_not_served("127.0.0.1:1")
    here = Contact.from_invitation(plain.invite())
    assert "another node answers there" in why_not_served(here.endpoint)
    assert "no-such-host.example does not resolve" in why_not_served("no-such-host.example:4000")


async def nobody_answers(address: str, contact: Contact) -> trio.SocketStream:
    return await trio.sleep_forever()


def test_an_announced_address_that_this_machine_does_not_reach_is_believed_as_routers_need_not_lead_back(
    monkeypatch, caplog
):
    monkeypatch.setattr(joining, "JOIN_TIMEOUT", 0.2)
    monkeypatch.setattr(joining, "_connect", nobody_answers)
    with Swarm("routed", announce="203.0.113.77:4000") as swarm:
        (server,) = swarm.serve("nop", grid=(1, 1), isolation="task")
        assert "Not every router leads back" in caplog.text and "203.0.113.77:4000" in caplog.text
        assert server.contact is not None and server.contact.host == "203.0.113.77"
        assert swarm.expert("nop.0.0")(torch.ones(1, 4)).shape == (1, 4)  # here it is called where it listens
        caplog.clear()
        swarm.serve("nop", name="more", grid=(1, 1), isolation="task")
        assert "leads back" not in caplog.text  # it was said once


def test_who_joins_a_swarm_that_announces_a_wrong_address_reads_of_that_too():
    with Swarm("announced", announce="127.0.0.1:1") as swarm:
        assert "announce=…" in why_not(swarm.invite())


@pytest.mark.parametrize(
    ("listen", "why"),
    [("tcp://192.0.2.1:4000", "no such address"), ("tcp://no-such-host.example:4000", "does not resolve")],
)
def test_where_one_cannot_listen_the_address_and_the_cause_are_named(without_names, listen, why):
    with pytest.raises(LabkitError, match=f"cannot listen on {listen}.*{why}"):
        Swarm("nowhere", listen=listen)


# ---------------------------------------------------------------- several addresses


async def test_of_several_nodes_one_that_answers_is_enough():
    async with open_network() as network:
        open_quietly = partial(open_node, network, config=NodeConfig())
        async with open_quietly(Identity.generate()) as first:
            gone = replace_port(first.contact, 1)
            async with open_quietly(Identity.generate(), join=[gone, first.contact]) as second:
                assert second.contact.node_id in first.dht.routing
            with pytest.raises(ExceptionGroup) as caught:
                async with open_quietly(Identity.generate(), join=[gone, replace_port(first.contact, 2)]):
                    pass
            assert ":1: nothing listens" in str(unwrap(caught.value))


def replace_port(contact: Contact, port: int) -> Contact:
    return Contact(contact.key, contact.host, port, contact.secure)
