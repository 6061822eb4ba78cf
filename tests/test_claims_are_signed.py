"""Whoever claims an expert signs that: nobody claims one for another node, or takes out what another one claims."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
import trio

from labkit.contact import Contact
from labkit.copies.servers import GridServers, ServerRecord
from labkit.dht.node import Entry
from labkit.directory.genuine import is_genuine, signed
from labkit.directory.index import Declared, Leaf, Marker, Withdrawn, entries_of, withdrawals_of
from labkit.node import Node, open_node
from labkit.simulation.network import open_simnet
from labkit.wire.security import Identity
from labkit.wire.signatures import verify

UID, OTHER = "ffn.0.1", "ffn.0.2"
SERVER, STRANGER = Identity(b"s" * 32), Identity(b"x" * 32)


def contact(identity: Identity, port: int = 5000) -> Contact:
    return Contact(identity.public_key, "127.0.0.1", port)


def leaf(epoch: int, at: Contact, by: Identity | None = SERVER, uid: str = UID, **changes: Any) -> Entry:
    """A declaration by somebody, with some fields of its leaf changed."""
    (entry, _) = entries_of({uid: Declared(epoch)}, at, 7, 30.0, 0, None if by is None else by.sign)
    changed = msgspec.structs.replace(msgspec.msgpack.decode(entry.value, type=Leaf), **changes)
    return Entry(entry.key, msgspec.msgpack.encode(changed), 30.0, entry.subkey, entry.sequence)


def withdrawal(epoch: int, by: Identity, key: bytes | None = None) -> Entry:
    return withdrawals_of({UID: epoch}, 30.0, by.public_key if key is None else key, by.sign)[0]


# ---------------------------------------------------------------- signatures


@pytest.mark.parametrize("seed", range(16))
def test_a_node_signs_with_the_key_that_it_is(seed):
    identity, text = Identity(bytes([seed]) * 32), b"an expert" * seed
    signature = identity.sign(text)
    assert len(signature) == 64 and signature == identity.sign(text)
    assert verify(identity.public_key, text, signature)
    assert not verify(identity.public_key, text + b".", signature)
    assert not verify(Identity(b"?" * 32).public_key, text, signature)
    for place in (0, 31, 32, 63):
        wrong = bytearray(signature)
        wrong[place] ^= 1
        assert not verify(identity.public_key, text, bytes(wrong))


@pytest.mark.parametrize("key", [b"", bytes(31), bytes(32), b"\xff" * 32, ((1 << 255) - 20).to_bytes(32, "little")])
@pytest.mark.parametrize("signature", [b"", bytes(64), b"\xff" * 64, bytes(65)])
def test_what_is_no_key_or_no_signature_proves_nothing(key, signature):
    assert not verify(key, b"an expert", signature)


# ---------------------------------------------------------------- what is believed


def believed(entry: Entry, sequence: int | None = None) -> bool:
    return is_genuine(entry.key, entry.subkey, entry.value, entry.sequence if sequence is None else sequence)


@pytest.mark.parametrize("epoch", [1, 2, 1 << 40])
def test_a_claim_by_the_server_itself_is_believed_and_no_other(epoch):
    here = contact(SERVER)
    assert believed(leaf(epoch, here))
    assert believed(leaf(epoch, here, stamp=99, copies=(b"12345678",)))  # which change from time to time
    assert not believed(leaf(epoch, here, by=None))
    assert not believed(leaf(epoch, here, by=STRANGER))
    assert not believed(leaf(epoch, here, contact=contact(SERVER, 5001)))  # another address
    assert not believed(leaf(epoch, here, contact=contact(STRANGER)))
    outbid = msgspec.structs.replace(msgspec.msgpack.decode(leaf(epoch, here).value, type=Leaf), epoch=epoch + 1)
    assert not is_genuine("expert:ffn.0", "1", msgspec.msgpack.encode(outbid), epoch + 1)
    moved = leaf(epoch, here)
    assert not is_genuine(moved.key, "2", moved.value, epoch)  # another expert


@pytest.mark.parametrize(("epoch", "sequence"), [(0, 1), (1, 0), (1, 2), (1, 1 << 40)])
def test_an_entry_is_of_the_epoch_that_it_claims(epoch, sequence):
    assert not believed(leaf(epoch, contact(SERVER)), sequence)
    assert not believed(withdrawal(epoch, SERVER), sequence)


def test_only_a_server_withdraws_what_it_has_claimed():
    assert believed(withdrawal(3, SERVER))
    assert not believed(withdrawal(3, STRANGER, key=SERVER.public_key))
    assert not believed(Entry("expert:ffn.0", msgspec.msgpack.encode(Withdrawn(3)), 30.0, "1", 3))


def test_in_the_first_epoch_experts_are_declared_as_ever_and_nothing_else_outranks_a_claim():
    assert believed(leaf(0, contact(SERVER), by=None))
    assert believed(Entry("expert:ffn.0", msgspec.msgpack.encode(Withdrawn()), 30.0, "1"))
    for value in (msgspec.msgpack.encode(Marker()), b"something new"):
        assert is_genuine("expert:ffn", "0.", value, 0)
        assert not is_genuine("expert:ffn", "0.", value, 1)
    assert is_genuine("anything", "else", b"at all", 7)


# ---------------------------------------------------------------- in a swarm


@asynccontextmanager
async def three(**options: Any) -> AsyncIterator[Sequence[Node]]:
    async with (
        open_simnet(1, **options) as network,
        open_node(network, SERVER) as server,
        open_node(network, STRANGER, join=[server.contact]) as stranger,
        open_node(network, Identity(b"r" * 32), join=[server.contact]) as reader,
    ):
        await trio.sleep(1)
        yield server, stranger, reader


async def test_a_stranger_does_not_get_a_claim_in_the_name_of_another_node_into_the_swarm(autojump_clock):
    async with three() as (server, stranger, reader):
        await server.directory.declare({UID: Declared(2)}, server.contact)
        forged = [
            leaf(9, server.contact, by=STRANGER),
            leaf(9, contact(SERVER, 9), by=STRANGER),
            leaf(9, stranger.contact, by=None),
            withdrawal(9, STRANGER, key=SERVER.public_key),
        ]
        for entry in forged:
            assert await stranger.dht.store_many([entry]) == [0]
        assert (await reader.directory.holders([UID]))[UID].epoch == 2
        assert (await reader.directory.holders([UID]))[UID].contact == server.contact


async def test_a_node_that_stores_all_that_it_is_given_deceives_nobody(autojump_clock):
    async with three() as (server, stranger, reader):
        stranger.dht.storage.is_genuine = lambda *_: True
        await server.directory.declare({UID: Declared(2)}, server.contact)
        assert await stranger.dht.store_many([leaf(9, server.contact, by=STRANGER)]) == [1]  # there alone
        info = (await reader.directory.find([UID]))[UID]
        assert info is not None and (info.epoch, info.contact) == (2, server.contact)


async def test_a_server_that_moves_or_leaves_signs_that_too(autojump_clock):
    async with three() as (server, _, reader):
        await server.directory.declare({UID: Declared(1), OTHER: Declared()}, server.contact)
        await server.directory.declare({UID: Declared(1)}, contact(SERVER, 6000))
        assert (await reader.directory.holders([UID]))[UID].contact.port == 6000
        await trio.sleep(1)
        await server.directory.withdraw({UID: Declared(1), OTHER: Declared()}, server.contact)
        assert await reader.directory.holders([UID, OTHER]) == {}


async def test_a_stranger_says_nothing_in_the_name_of_another_server(autojump_clock):
    async with three() as (server, stranger, reader):

        def own(node: Node, **changes: Any) -> GridServers:
            record = ServerRecord(server.contact, room=3, **changes)
            return GridServers(node.dht, "ffn", lambda: record, sign=node.directory.sign)

        async def seen() -> list[int]:
            looks = GridServers(reader.dht, "ffn", None)
            await looks.read()
            return [record.experts for record in looks.others.values()]

        await own(server, experts=2).round()
        assert await seen() == [2]
        await trio.sleep(1)
        await own(stranger, experts=0).round()  # later, so that it would count
        assert await seen() == [2]
        await own(server, experts=1).round()
        assert await seen() == [1]
        value, subkey = msgspec.msgpack.encode(ServerRecord(server.contact)), SERVER.public_key.hex()
        for wrong in (value, signed("servers:ffn", subkey, value, 1 << 62, STRANGER.sign)):
            assert await stranger.dht.store_many([Entry("servers:ffn", wrong, 30.0, subkey, 1 << 62)]) == [0]
