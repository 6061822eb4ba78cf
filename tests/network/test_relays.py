"""Hosts that take no connections: experts on all of them are reached from all of them, through a relay."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from tests.network.waiting import until_answered, until_said

HIDDEN = ["one", "two", "deep", "firewalled"]
RELAYED = "it takes no connections itself: relayed by"
OPEN = "tcp://0.0.0.0:*"
WIDE = "tcp://[::]:*"  # of IPv4 and IPv6
RECOVERY_TIME = 10.0  # seconds in which a hidden node is back after its relay has gone


def test_trainers_on_each_host_reach_experts_on_all(on):
    public = on.notebook("public")
    invite = public.start(listen=WIDE, relay=True)
    notebooks = {"public": public} | {host: on.notebook(host) for host in [*HIDDEN, "two_faced", "six"]}

    def begin(host: str) -> None:
        if host != "public":
            notebooks[host].join(invite)
        notebooks[host].serve(grid=[1], name=host)

    with ThreadPoolExecutor() as pool:
        list(pool.map(begin, notebooks))
    experts = sorted(f"{host}.0" for host in notebooks)
    for host, notebook in notebooks.items():
        until_answered(notebook, experts, 20)
        if host == "six" or host in HIDDEN:
            until_said(notebook, RELAYED if host in HIDDEN else "reachable: 2a00:5::10 called back at [2a00:5::40]")
    until_said(notebooks["six"], "nodes to which it has no way itself it calls through the relay [2a00:5::10]")


def test_without_a_relay_of_both_ip_versions_it_is_said_what_is_missing_and_with_one_all_reach_all(on):
    public, six, four, relay = (on.notebook(host) for host in ("public", "six", "two_faced", "public"))
    invite = public.start(listen=WIDE)
    for notebook, name in ((six, "six"), (four, "four")):
        notebook.join(invite)
        notebook.serve(grid=[1], name=name)
    until_answered(public, ["four.0", "six.0"])
    assert "5.5.5.11 has only an IPv4 address, and this machine has none; a relay that has" in six.call()["four.0"]
    assert "2a00:5::40 has only an IPv6 address, and this machine has none" in four.call()["six.0"]
    for notebook in (six, four):
        until_said(notebook, "this machine has none; a relay that has both would connect them: labkit relay --join")
    relay.join(invite, relay=True)
    for notebook in (six, four):
        until_answered(notebook, ["four.0", "six.0"], 30)


def test_a_relay_with_a_leg_in_each_of_two_networks_connects_their_hosts(on):
    public, between, inner = (on.notebook(host) for host in ("public", "two_faced", "inner"))
    between.join(public.start(listen=WIDE), relay=True)
    inner.join(between.invite())
    for notebook, name in ((public, "public"), (inner, "inner")):
        notebook.serve(grid=[1], name=name)
    for notebook in (public, between, inner):
        until_answered(notebook, ["inner.0", "public.0"])
    until_said(inner, "it takes no connections itself: relayed by 5.5.5.11")
    until_said(inner, "to which it has no way itself it calls through the relay 5.5.5.11")


def test_who_joins_a_node_of_another_ip_version_reads_that(on):
    six, four = on.notebook("six"), on.notebook("two_faced")
    invite = six.start(listen=WIDE)
    said = four.process.ask(["join", {"invite": invite}])["error"]
    assert "there is no way there: 2a00:5::40 has only an IPv6 address, and this machine has none" in said


def test_when_a_relay_dies_its_clients_take_another(on):
    public, other, one, two = (on.notebook(host) for host in ("public", "two_faced", "one", "two"))
    invite = public.start(listen=OPEN, relay=True)
    one.join(invite, listen=OPEN)
    one.serve(grid=[1])
    two.join(invite, listen=OPEN)
    other.join(invite, listen=OPEN, relay=True)
    for notebook in (one, two):
        until_said(notebook, "it takes no connections itself: relayed by 5.5.5.10")
    until_answered(two, ["ffn.0"], 20)
    public.process.kill()
    assert until_answered(two, ["ffn.0"], 60) < RECOVERY_TIME
    for notebook in (one, two):
        until_said(notebook, "it takes no connections itself: relayed by 5.5.5.11")
