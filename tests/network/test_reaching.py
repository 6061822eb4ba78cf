"""Experts on one host, trainers on another: who reaches whom, and what is said where somebody does not."""

from __future__ import annotations

from labkit.contact import Contact
from tests.network.waiting import until_said

OPEN = "tcp://0.0.0.0:*"
WIDE = "tcp://[::]:*"  # of IPv4 and IPv6
HOSTS = ["public", "two_faced", "one", "two", "deep", "firewalled", "six"]
BOTH = {"ffn.0": "", "ffn.1": ""}


FORWARDS = """
add chain ip nat pre { type nat hook prerouting priority -100; }
add rule ip nat pre iifname "wan" tcp dport 31000-31099 dnat to 192.168.1.10
insert rule ip nat forward iifname "wan" ct status dnat accept
"""  # from outside only: a host behind it does not come back to itself by the router's address


def announced(invite: str) -> str:
    return Contact.from_invitation(invite).host


def test_everybody_reaches_a_public_host(on):
    public = on.notebook("public")
    invite = public.start(listen=WIDE)
    public.serve(grid=[2])
    contact = Contact.from_invitation(invite)
    assert {host for host, _ in contact.addresses} == {"5.5.5.10", "2a00:5::10"}
    notebooks = {host: on.notebook(host) for host in HOSTS if host != "public"}
    for host, notebook in notebooks.items():
        notebook.join(invite)
        assert notebook.call() == BOTH, host


def test_a_host_of_a_network_without_a_way_out_is_reached_from_that_network(on):
    inner, between = on.notebook("inner"), on.notebook("two_faced")
    invite = inner.start(listen=OPEN)
    assert announced(invite) == "10.9.0.2"
    inner.serve(grid=[2])
    between.join(invite, listen=OPEN)
    assert announced(between.invite()) == "10.9.0.1"  # of the interface on this side, and not that of the internet
    assert between.call() == BOTH
    between.serve(grid=[2], name="other")
    assert inner.call() == {**BOTH, "other.0": "", "other.1": ""}


def test_a_host_with_two_interfaces_announces_the_one_by_which_it_joins(on):
    public, between = on.notebook("public"), on.notebook("two_faced")
    between.join(public.start(listen=OPEN), listen=OPEN)
    assert announced(between.invite()) == "5.5.5.11"


def test_a_host_that_has_only_ipv6_is_reached_and_reaches_one_that_has_it(on):
    six, public = on.notebook("six"), on.notebook("public")
    invite = six.start(listen="tcp://[::]:*")
    assert announced(invite) == "2a00:5::40"
    six.serve(grid=[2])
    public.join(invite, listen="tcp://[::]:*")
    assert public.call() == BOTH
    public.serve(grid=[2], name="other")
    assert six.call() == {**BOTH, "other.0": "", "other.1": ""}


def test_a_firewall_lets_a_range_of_ports_through(on):
    firewalled, public = on.notebook("firewalled"), on.notebook("public")
    invite = firewalled.start(listen="tcp://0.0.0.0:31000-31099")
    firewalled.serve(grid=[2], isolation="process", servers=2)
    public.join(invite)
    assert public.call() == BOTH


def test_a_router_that_forwards_a_range_of_ports_is_enough_even_if_it_does_not_lead_back(on, world):
    router = world["router_one"]
    before = router.rules()
    router.nft(FORWARDS)
    try:
        public, one = on.notebook("public"), on.notebook("one")
        one.join(public.start(listen=OPEN), listen="tcp://0.0.0.0:31000-31099", announce="5.5.5.21")
        one.serve(grid=[2], isolation="process", servers=2)
        assert one.call() == BOTH  # here they are called where they listen
        assert public.call() == BOTH
        until_said(one, "reachable: 5.5.5.10 called back at 5.5.5.21:31000")
        assert "relayed" not in one.look()
    finally:
        router.nft(f"flush ruleset\n{before}")
