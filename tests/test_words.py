"""The words everything else is built of: contacts and invitations, expert uids, events, errors."""

from __future__ import annotations

import inspect
import logging
import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from labkit import errors, events, expert_uid
from labkit.contact import ID_BITS, Contact, is_loopback, node_id_of
from labkit.errors import InviteError, LabkitError, RPCError
from labkit.events import Event, Listeners, StepFailed
from tests.nodes import changed

KEY = bytes(range(32))
hosts = st.sampled_from(["127.0.0.1", "localhost", "10.0.0.7", "lab.example.org", "::1", "2001:db8::5"])
texts = st.binary(max_size=60).map(lambda raw: raw.decode("latin-1"))
contacts = st.builds(Contact, st.binary(min_size=32, max_size=32), hosts, st.integers(1, 65535))
coordinates = st.lists(st.integers(0, expert_uid.MAX_COORDINATE), min_size=1, max_size=expert_uid.MAX_DIMENSIONS)
names = st.from_regex(r"[A-Za-z][A-Za-z0-9_-]{0,20}", fullmatch=True)


# ---------------------------------------------------------------- contacts and invitations


@given(contacts)
def test_an_invitation_reads_back_as_the_contact_it_came_from(contact):
    assert Contact.from_invitation(contact.invitation()) == contact
    assert Contact.from_invitation(f"  {contact.invitation()}\n") == contact


def test_a_plain_contact_says_so_in_its_invitation_and_only_works_on_loopback():
    here = Contact(KEY, "127.0.0.1", 4000, secure=False)
    assert here.invitation().endswith("@127.0.0.1:4000?plain")
    assert Contact.from_invitation(here.invitation()) == here
    with pytest.raises(InviteError, match="unencrypted"):
        Contact.from_invitation(Contact(KEY, "10.0.0.7", 4000, secure=False).invitation())


@pytest.mark.parametrize("host", ["\x1b]0;owned\x07", "a\u202eb", "a b", "", "a/b", "x" * 256])
def test_a_host_has_nothing_in_it_that_a_terminal_would_obey(host):
    with pytest.raises(ValueError, match="not a host"):
        Contact(KEY, host, 4000)
    assert Contact(KEY, "münchen.example", 4000).host == "münchen.example"


def test_an_ipv6_host_stands_in_brackets():
    assert Contact(KEY, "2001:db8::5", 4000).endpoint == "[2001:db8::5]:4000"


@given(texts | texts.map("labkit://".__add__) | texts.map(lambda text: f"labkit://{text}@10.0.0.7:4000"))
def test_any_other_text_is_refused_as_no_invitation(text):
    with pytest.raises(InviteError):
        Contact.from_invitation(text)


@pytest.mark.parametrize("cut", [1, 5, 20, 43])
def test_an_invitation_that_was_not_copied_whole_is_refused(cut):
    invitation = Contact(KEY, "10.0.0.7", 4000).invitation()
    with pytest.raises(InviteError):
        Contact.from_invitation("labkit://" + invitation.removeprefix("labkit://")[cut:])
    with pytest.raises(InviteError):
        Contact.from_invitation(invitation[: -cut - 4])


@pytest.mark.parametrize("bad", [(b"short", "h", 1), (KEY, "", 1), (KEY, "a b", 1), (KEY, "a/b", 1), (KEY, "a@b", 1),
                                 (KEY, "h" * 256, 1), (KEY, "h", 0), (KEY, "h", 65536)])  # fmt: skip
def test_an_impossible_contact_is_refused_when_made_and_when_received(bad):
    with pytest.raises(ValueError):
        Contact(*bad)
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode([*bad, True]), type=Contact)


SIX = ("2001:db8::5", 4001)


def test_a_contact_of_several_addresses_survives_as_text_and_on_the_wire_and_shows_the_first():
    contact = Contact(KEY, "203.0.113.5", 4000, also=(SIX, ("10.0.0.7", 4000)))
    assert contact.invitation().endswith("@203.0.113.5:4000,[2001:db8::5]:4001,10.0.0.7:4000")
    assert Contact.from_invitation(contact.invitation()) == contact
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(contact), type=Contact) == contact
    assert msgspec.json.decode(msgspec.json.encode(contact), type=Contact) == contact
    assert contact.endpoint == "203.0.113.5:4000" and contact.addresses[1] == SIX and hash(contact)
    assert Contact(KEY, "lab.example", 1, also=(SIX,)).invitation().endswith("@lab.example:1,[2001:db8::5]:4001")
    assert Contact(KEY, "203.0.113.5", 4000).invitation().endswith("@203.0.113.5:4000")


def test_contacts_of_before_there_were_several_addresses_are_read_and_read_those_of_now():
    class OldContact(msgspec.Struct, frozen=True, array_like=True):
        key: bytes
        host: str
        port: int
        secure: bool = True

    old, new = OldContact(KEY, "203.0.113.5", 4000), Contact(KEY, "203.0.113.5", 4000, also=(SIX,))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(old), type=Contact) == changed(new)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(new), type=OldContact) == old


@pytest.mark.parametrize(
    "also",
    [
        [("127.0.0.1", 1)], [("::1", 1)], [SIX, ("localhost", 1)],  # another kind than the first
        [("lab.example", 1)], [("", 1)], [("10.0.0.7 ", 1)],  # no IP address
        [("0.0.0.0", 1)], [("::", 1)], [("224.0.0.1", 1)], [("ff02::1", 1)], [("fe80::1", 1)], [("169.254.1.1", 1)],
        [("2001:db8::5%eth0", 1)], [("::ffff:127.0.0.1", 1)], [("::ffff:10.0.0.7", 1)],  # not written plainly
        [("10.0.0.7", 0)], [("10.0.0.7", 65536)], [SIX] * 5,
    ],
)  # fmt: skip
@pytest.mark.parametrize("secure", [True, False])
def test_further_addresses_that_others_could_not_or_should_not_call_are_refused(also, secure):
    with pytest.raises(ValueError):
        Contact(KEY, "203.0.113.5", 4000, secure, tuple(also))
    with pytest.raises(msgspec.ValidationError):
        encoded = msgspec.msgpack.encode([KEY, "203.0.113.5", 4000, secure, also])
        msgspec.msgpack.decode(encoded, type=Contact)
    text = Contact(KEY, "203.0.113.5", 4000, secure).invitation().partition("?")
    with pytest.raises(InviteError):
        Contact.from_invitation(text[0] + "," + ",".join(f"[{h}]:{p}" for h, p in also) + "".join(text[1:]))


def test_nothing_unsafe_hides_among_further_addresses():
    here = Contact(KEY, "127.0.0.1", 4000, secure=False, also=(("::1", 4000),))
    assert here.is_safe and here.is_loopback
    for beyond in (SIX, ("10.0.0.7", 1), ("8.8.8.8", 1)):
        with pytest.raises(ValueError, match="loopback ones, or none"):
            Contact(KEY, "127.0.0.1", 4000, False, (beyond,))
    there = Contact(KEY, "10.0.0.7", 4000, secure=False, also=(SIX,))
    assert not there.is_safe and not there.is_loopback


def test_a_node_id_has_160_bits_and_follows_from_the_key_alone():
    here, there = Contact(KEY, "127.0.0.1", 1), Contact(KEY, "10.0.0.7", 2)
    assert here.node_id == there.node_id == node_id_of(KEY)
    assert 0 <= here.node_id < 2**ID_BITS
    assert node_id_of(bytes(32)) != node_id_of(KEY)


def test_loopback_is_told_from_other_hosts():
    assert all(map(is_loopback, ["127.0.0.1", "127.8.9.1", "::1", "localhost"]))
    assert not any(map(is_loopback, ["10.0.0.7", "0.0.0.0", "localhost.example.org", "", "2001:db8::5"]))


# ---------------------------------------------------------------- expert uids


@given(names, coordinates)
def test_a_uid_splits_into_what_it_was_made_of(name, coords):
    uid = expert_uid.make_uid(name, coords)
    assert expert_uid.split_uid(uid) == (name, tuple(coords))
    assert expert_uid.parent(uid) == (uid[: uid.rindex(".")], coords[-1])


NO_UIDS = [
    "", "ffn", "ffn.", ".1", "ffn.-1", "ffn.01", "ffn.1.", "ffn..1", "1.2", "ffn.1\n", "ffn.٣", "a b.1",
    "ffn." + ".".join("1" * 9), "ffn.9999999", "x" * 65 + ".1",
]  # fmt: skip


@pytest.mark.parametrize("text", NO_UIDS)
def test_a_text_that_is_no_uid_is_refused(text):
    with pytest.raises(ValueError):
        expert_uid.split_uid(text)


def test_a_grid_lists_its_experts_last_coordinate_fastest():
    assert list(expert_uid.grid_uids("ffn", (2, 2))) == ["ffn.0.0", "ffn.0.1", "ffn.1.0", "ffn.1.1"]
    assert list(expert_uid.grid_uids("ffn", [1])) == ["ffn.0"]


@pytest.mark.parametrize("grid", [(), (0,), (4, -1), (1,) * 9, (2**21,)])
def test_an_impossible_grid_is_refused(grid):
    with pytest.raises(ValueError, match="grid"):
        expert_uid.check_grid(grid)


@pytest.mark.parametrize("name", ["", "a.b", "1a", "a b", "é", "x" * 65])
def test_an_impossible_grid_name_is_refused(name):
    with pytest.raises(ValueError, match="grid name"):
        expert_uid.check_name(name)


@given(st.integers(1, 5000))
def test_the_grid_for_a_number_of_experts_holds_exactly_so_many_and_is_nearest_to_a_square(count):
    rows, columns = expert_uid.grid_for(count)
    assert rows * columns == count
    assert rows <= columns
    assert not any(count % other == 0 for other in range(rows + 1, math.isqrt(count) + 1))


# ---------------------------------------------------------------- events


def test_every_listener_hears_every_event_until_it_stops():
    heard: list[tuple[str, Event]] = []
    listeners = Listeners()
    stop = listeners.add(lambda event: heard.append(("first", event)))
    listeners.add(lambda event: heard.append(("second", event)))
    one, two = StepFailed(samples=1, detail="one"), StepFailed(samples=2, detail="two")
    listeners(one)
    stop()
    listeners(two)
    assert heard == [("first", one), ("second", one), ("second", two)]


def test_a_listener_that_fails_is_logged_and_removed_and_the_others_still_hear(caplog):
    heard: list[Event] = []
    calls = 0

    def broken(event: Event) -> None:
        nonlocal calls
        calls += 1
        raise RuntimeError("a broken widget")

    listeners = Listeners()
    listeners.add(broken)
    listeners.add(heard.append)
    with caplog.at_level(logging.ERROR):
        listeners(StepFailed(samples=1, detail=""))
        listeners(StepFailed(samples=1, detail=""))
    assert (calls, len(heard), len(caplog.records)) == (1, 2, 1)
    assert "a broken widget" in caplog.text


def test_a_listener_may_stop_itself_while_it_listens():
    heard: list[Event] = []
    listeners = Listeners()

    def once(event: Event) -> None:
        heard.append(event)
        stop()

    stop = listeners.add(once)
    listeners(StepFailed(samples=1, detail=""))
    listeners(StepFailed(samples=1, detail=""))
    assert len(heard) == 1


def test_events_are_frozen_stamped_in_order_and_need_no_listener():
    first, second = StepFailed(samples=1, detail=""), StepFailed(samples=1, detail="")
    assert first.at <= second.at
    with pytest.raises(AttributeError):
        first.samples = 2  # type: ignore[misc]
    Listeners()(first)
    events.ignore(first)


# ---------------------------------------------------------------- errors

FAMILY = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if cls.__module__ == errors.__name__]


def test_everything_raised_on_purpose_is_a_labkit_error():
    assert all(issubclass(cls, LabkitError) for cls in FAMILY)


def test_every_failed_call_has_a_cause_that_is_counted_and_a_code_that_comes_back_as_itself():
    for cls in FAMILY:
        if issubclass(cls, RPCError):
            assert cls.cause in errors.CAUSES
            if cls is not RPCError:
                assert issubclass(cls, errors.BY_CODE[cls.code])
    assert all(cls.code == code for code, cls in errors.BY_CODE.items())
