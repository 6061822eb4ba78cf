"""Whether other machines reach a node: it asks others to call it back, and says what they found in one sentence.

A node behind a router or a firewall can call, and so can join and train, but nobody can call the experts that it
serves. So it asks a node that it joined, and another one, to call back at the contact that it announces (`node.reach`),
and is told besides from which address it was seen. No batch passes here.

Who answers cannot be used to find out about third parties. It calls back only with the key that the asker has proved by
its own handshake, so that a yes means that the asker is there; a no always comes after the same time, whatever was at
the address; and it does little of this at a time, for each asker and in all.

Order: what is known and how it is said, the answering side, the asking side.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

import msgspec
import trio

from labkit.contact import Contact, Invitation, endpoint_of, is_loopback
from labkit.dht.protocol import Ping, Pong
from labkit.errors import BadRequest, ConnectionLost, DeadlineExceeded, NotAdmitted, NoWay, Overloaded, RPCError
from labkit.wire.addresses import (
    announced_address,
    has_version_of,
    ipaddress_or_none,
    own_addresses,
    plain_ip,
    ports_of,
    split_address,
)
from labkit.wire.rpc_client import Client
from labkit.wire.rpc_types import AsyncMethod, Caller, Methods, Reply, Request
from labkit.wire.transport import Endpoint

CALL_BACK_TIME = 4.0  # seconds that a call back may take; a no takes as long
ASK_TIMEOUT = CALL_BACK_TIME + 3.0  # seconds that the asker waits for an answer
MAX_CALLS_BACK = 8  # at the same time; beyond, askers are sent away
ASK_PERIOD = 2.0  # seconds between two calls back for the same key
MAX_REMEMBERED = 1024  # keys that have asked lately


class Reach(StrEnum):
    """Whether other machines reach a node."""

    YES = "reachable"
    NO = "not reachable"
    HERE = "only from this machine"
    UNKNOWN = "not known yet"


@dataclass(frozen=True, slots=True)
class Vote:
    """What a node found that was asked to call back.

    Args:
        by: The node.
        reached: Whether it got an answer.
        seen: The IP address from which it saw the asker come.
        at: Which of the further addresses it called; empty if it was the first.
    """

    by: Contact
    reached: bool
    seen: str
    at: str = ""


@dataclass(frozen=True, slots=True)
class Reachability:
    """Whether other machines reach a node, as far as it is known.

    Args:
        state: The same in a word.
        contact: The node, as it announces itself.
        text: As a sentence, with what to try.
        votes: What the nodes found that were asked.
    """

    state: Reach
    contact: Contact
    text: str
    votes: Sequence[Vote] = ()

    @property
    def seen(self) -> str:
        """The IP address from which others saw the node come; empty if none was asked."""
        return next((vote.seen for vote in self.votes if vote.seen), "")


# ---------------------------------------------------------------- how it is said


def only_here(contact: Contact, listen: str, announce: str | None) -> Reachability:
    """What is to be said of a node whose address is a loopback one."""
    host = split_address(listen)[0]
    if announce is not None and contact.is_loopback:
        why = f"since announce={announce!r} is this machine itself; announce the address at which others reach it"
    elif is_loopback(host):
        why = 'since it listens there only; for others: listen="tcp://0.0.0.0:*"'
    elif ":" not in host and any(":" in address for address in own_addresses()):
        why = 'which has no IPv4 address; listen to IPv6, too: listen="tcp://[::]:*"'
    else:
        why = "which has no network address but loopback now; when it gets one, it is announced"
    return Reachability(Reach.HERE, contact, f"reached only from this machine, {why}")


def invite_to(contact: Contact, listen: str, announce: str | None, found: Reachability) -> Invitation:
    """Returns the invitation to a node, with a note on who cannot use it. `found`: who reaches it; else as above."""
    if found.state is Reach.NO and found.contact == contact:
        by = ", ".join(dict.fromkeys(vote.by.host for vote in found.votes if not vote.reached))
        return Invitation(
            contact,
            f"Only this machine's own network can use this invitation: {by} could not call back at {contact.endpoint}. "
            "That of any node that others reach leads to the same swarm",
        )
    host = split_address(listen)[0]
    if not contact.is_loopback or (announce is None and is_loopback(host)):
        return Invitation(contact)
    why = only_here(contact, listen, announce).text
    return Invitation(contact, f"This invitation is for the same machine only: the swarm is {why}")


def not_known(contact: Contact, *, trying: bool = False, silent: bool = False) -> Reachability:
    """What is to be said of a node that nobody has tried to reach.

    Args:
        contact: The node.
        trying: Whether others have just been asked to.
        silent: Whether those that were asked did not answer.
    """
    why = (
        "others are just trying" if trying else "nobody has answered who was asked to try" if silent
        else "there is no node on another machine yet that could try"
    )  # fmt: skip
    return Reachability(Reach.UNKNOWN, contact, f"whether others reach it is not known yet: {why}")


def judge(contact: Contact, votes: Sequence[Vote], listen: str, announce: str | None) -> Reachability:
    """What several nodes have found. A majority counts; where there is none, those that reached nothing.

    Args:
        contact: The node, as it announces itself.
        votes: What they found; at least one.
        listen: The address that the user gave to listen at.
        announce: The one to announce, if the user gave one.
    """
    yes = [vote for vote in votes if vote.reached]
    no = [vote for vote in votes if not vote.reached]
    names = [", ".join(dict.fromkeys(vote.by.host for vote in some)) for some in (yes, no)]
    if len(yes) > len(no):
        text = f"reachable: {names[0]} called back at {_called_at(contact, yes)}"
        return Reachability(Reach.YES, contact, text, votes)
    seen = next((vote.seen for vote in no if vote.seen), "")
    found = f"{names[1]} could not call back at {_called_at(contact, no)}" + (f", {names[0]} could" if yes else "")
    return Reachability(
        Reach.NO, contact, f"not reachable: {found}{_what_to_try(contact, seen, listen, announce)}", votes
    )


def _called_at(contact: Contact, votes: Sequence[Vote]) -> str:
    """Where these nodes called, if it was the same address, else the first one."""
    hosts = {vote.at or contact.host for vote in votes}
    found = [endpoint_of(*address) for address in contact.addresses if hosts == {address[0]}]
    return found[0] if found else contact.endpoint


def _what_to_try(contact: Contact, seen: str, listen: str, announce: str | None) -> str:
    """The end of the sentence about a node that is not reached."""
    base, ports = listen.rpartition(":")[0], ports_of(split_address(listen)[1])
    translated = bool(seen) and all(seen != host for host, _ in contact.addresses)
    came = f", and saw this machine as {seen}" if translated else ""
    a_range = f'listen="{base}:31000-31099"'
    if announce is not None:
        return (
            f"{came}. Is announce={announce!r} the address at which others reach this machine, and do routers and "
            f"firewalls let port {contact.port} through to where it listens?"
        ) + ("" if ports or announced_address(announce, "", 0)[1] else f" Start with some that they do: {a_range}")
    which = f"port {ports[0]}" if ports and len(ports) == 1 else f"ports {ports[0]} to {ports[-1]}" if ports else ""
    start = "" if ports else a_range
    if translated:
        given = f'{start}, announce="{seen}" (labkit serve --listen …, --announce …)'
        return (
            f"{came}: a router on the way, or the host of a container, translates addresses. Forward "
            f"{which or 'some ports'} of it to this machine, and start with "
            + (given if start else f'announce="{seen}" (labkit serve --announce …)')
        )
    what = (
        f"open {which} there" if which else f"open some ports there, and start with {start} (labkit serve --listen …)"
    )
    return f": a firewall, of this machine or on the way, does not let port {contact.port} through; {what}"


# ---------------------------------------------------------------- the answering side


class ReachRequest(msgspec.Struct, frozen=True, array_like=True):
    """Asks a node to call back."""

    contact: Contact


class ReachReply(msgspec.Struct, frozen=True, array_like=True):
    """Whether that worked, and the IP address from which the asker was seen.

    `at`: the address that was called; empty if the node has none of its IP version; None from nodes that do not say.
    """

    reached: bool
    seen: str
    at: Annotated[str, msgspec.Meta(max_length=255)] | None = None


class CallBack:
    """Calls others back that ask for it.

    Args:
        endpoint: Our own, from which they are called.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._under_way: set[bytes] = set()
        self._asked_at: dict[bytes, float] = {}  # by key, the oldest first

    @property
    def methods(self) -> Methods:
        """The method by name, for `serve_rpc`."""
        return {"node.reach": AsyncMethod(self.rpc_reach, ReachRequest)}

    async def rpc_reach(self, request: Request) -> Reply:
        """Connect to the asker anew at the contact that it gives, and say whether it answered there."""
        contact, seen = request.body.contact, plain_ip(request.peer.address)
        self._check(contact, request.peer.key, seen)
        started = trio.current_time()
        self._under_way.add(contact.key)
        try:
            reached, at = False, contact.host
            with trio.move_on_after(CALL_BACK_TIME):
                try:
                    at, port = await self._endpoint.find_way(contact)
                except ConnectionLost as error:
                    if isinstance(error, NoWay) and not has_version_of(host for host, _ in contact.addresses):
                        return Reply(ReachReply(False, seen, ""))  # which says nothing of others than this machine
                else:
                    reached = await reaches(self._endpoint, Contact(contact.key, at, port, contact.secure))
            if not reached:
                await trio.sleep_until(started + CALL_BACK_TIME)
        finally:
            self._under_way.discard(contact.key)
        return Reply(ReachReply(reached, seen, at))

    def _check(self, contact: Contact, proved: bytes | None, seen: str) -> None:
        """Refuse what somebody might ask who is after something else, and those who ask too much."""
        if not contact.is_safe or (contact.secure and proved != contact.key):
            raise BadRequest("only who has proved that key by its handshake is called back")
        for host in (plain_ip(host) for host, _ in contact.addresses):
            ip = ipaddress_or_none(host)
            if ip is not None and (ip.is_multicast or ip.is_unspecified):
                raise BadRequest(f"{host} is nobody's address")
            if is_loopback(host) and not is_loopback(seen):
                raise BadRequest(f"{host} is not called back for another machine")
        now = trio.current_time()
        if contact.key in self._under_way or now - self._asked_at.get(contact.key, -ASK_PERIOD) < ASK_PERIOD:
            raise Overloaded("you have just asked to be called back; try again later")
        if len(self._under_way) >= MAX_CALLS_BACK:
            raise Overloaded("too many others are being called back; try again later")
        self._asked_at.pop(contact.key, None)
        self._asked_at[contact.key] = now
        if len(self._asked_at) > MAX_REMEMBERED:
            del self._asked_at[next(iter(self._asked_at))]


async def reaches(endpoint: Endpoint, contact: Contact) -> bool:
    """Whether a node answers that holds its key, over a connection of its own: one that there is proves nothing."""
    client = Client(endpoint)
    try:
        reply = await client.call(contact, "dht.ping", Ping(None), returns=Pong, timeout=CALL_BACK_TIME)
        return bool(reply.body.key == contact.key)
    except NotAdmitted:
        return True  # it is there, and takes calls from those that it knows
    except (ConnectionLost, DeadlineExceeded):
        return False
    except RPCError:
        return contact.secure  # something answered, over a connection that has proved the key
    finally:
        client.forget(contact)


# ---------------------------------------------------------------- the asking side


async def ask(caller: Caller, helper: Contact, contact: Contact) -> Vote | None:
    """Ask a node to call back. Returns what it found; None if it did not answer, or cannot do that now.

    Nor does it count what a node found that is reached through a relay, and so sees us come from its own machine: it
    may be on our machine, or in our network. Nor what one found that has no address of our IP version.

    Args:
        caller: Makes the call.
        helper: The node to ask.
        contact: Where it is to call back: our own key, at the address in question.
    """
    try:
        reply = await caller.call(helper, "node.reach", ReachRequest(contact), returns=ReachReply, timeout=ASK_TIMEOUT)
    except RPCError:
        return None
    seen = reply.body.seen if ipaddress_or_none(reply.body.seen) is not None else ""
    at = reply.body.at
    if at == "" or (is_loopback(seen) and not helper.is_loopback):
        return None
    return Vote(helper, reply.body.reached, seen, at if at in {host for host, _ in contact.also} else "")


async def ask_others(
    caller: Caller, contact: Contact, joined: Sequence[Contact], known: Callable[[], Sequence[Contact]]
) -> list[Vote]:
    """Ask the node that was joined, and one other, whether they reach ours; if they disagree, a third.

    Args:
        caller: Makes the calls.
        contact: Our own, as it announces itself.
        joined: The nodes that were joined.
        known: Returns the nodes that are known now.

    Returns:
        What they found. Empty if there is nobody to ask, on another machine, or nobody has answered.
    """
    own = own_addresses()
    votes: list[Vote] = []
    asked = {contact.key}

    def candidates() -> list[Contact]:
        others = [one for one in known() if one.key not in asked and is_elsewhere(one, contact, own)]
        random.shuffle(others)  # not the same ones each time
        hosts = {vote.by.host for vote in votes}
        first = [one for one in joined if one.key not in asked and is_elsewhere(one, contact, own)]
        others.sort(key=lambda one: (one.host in hosts, is_near(one) is is_near(contact)))
        some = {one.key: one for one in (*first, *others)}.values()
        return sorted(some, key=lambda one: not share_version(one, contact))

    async def ask_one(helper: Contact) -> None:
        vote = await ask(caller, helper, contact)
        if vote is not None:
            votes.append(vote)

    for wanted in (2, 2, 3):
        if len(votes) >= wanted or (wanted == 3 and len({vote.reached for vote in votes}) < 2):
            continue
        helpers = candidates()
        if wanted == 3:  # another that could as little be reached otherwise counts for nothing
            near = {is_near(vote.by) for vote in votes if vote.reached}
            helpers = [one for one in helpers if near != {True} or not is_near(one)]
        async with trio.open_nursery() as nursery:
            for helper in helpers[: wanted - len(votes)]:
                asked.add(helper.key)
                nursery.start_soon(ask_one, helper)
    return votes


def is_elsewhere(other: Contact, contact: Contact, own: set[str]) -> bool:
    """Whether a node is on another machine than ours, as far as its address says.

    Args:
        other: The node.
        contact: Our own node.
        own: The addresses of this machine.
    """
    here = own.union(host for host, _ in contact.addresses)
    return not other.is_loopback and here.isdisjoint(host for host, _ in other.addresses)


def share_version(one: Contact, other: Contact) -> bool:
    """Whether two nodes may have an IP version in common. A name may lead to addresses of both."""
    kinds = [
        {ip.version for host, _ in contact.addresses if (ip := ipaddress_or_none(host))} or {4, 6}
        for contact in (one, other)
    ]
    return not kinds[0].isdisjoint(kinds[1])


def is_near(contact: Contact) -> bool:
    """Whether an address is one of a network that is not part of the internet."""
    ip = ipaddress_or_none(contact.host)
    return ip is not None and not ip.is_global
