"""What is said of who is reached, and how: in the swarm's repr, in the view, as events, and by `labkit serve`."""

from __future__ import annotations

from tests.network.waiting import until_said

OPEN = "tcp://0.0.0.0:*"
SERVE = ("--grid", "1", "--hidden", "4", "--name")


def test_what_is_wrong_with_an_address_is_said_at_once(on):
    notebook, other = on.notebook("public"), on.notebook("public")
    notebook.start()
    said = 'reached only from this machine, since it listens there only; for others: listen="tcp://0.0.0.0:*"'
    until_said(notebook, said)
    assert notebook.told()["view"] == [said]
    notebook.start(listen="tcp://0.0.0.0:31000")
    said = notebook.refused("serve", grid=[2], hidden=4, servers=2)
    assert "listen='tcp://0.0.0.0:31000' is the one port of the swarm's own node, and 2 servers need one each" in said
    assert "start the swarm with a range of at least 3 ports, such as listen='tcp://0.0.0.0:31000-31002'" in said
    other.start(listen="tcp://0.0.0.0:31000-31001")
    assert "has 2 ports, and 2 servers need one each" in other.refused("serve", grid=[2], hidden=4, servers=2)
    said = notebook.refused("start", name="another", listen="tcp://0.0.0.0:31000-31001")
    assert "31000-31001: all 2 ports are in use, by other programs, or by nodes and servers of this machine" in said


def test_a_host_that_takes_no_connections_is_told_so_where_there_is_no_relay(on):
    public, one = on.notebook("public"), on.notebook("one")
    invite = public.start(listen=OPEN)
    served = on.labkit("two", "serve", "--join", invite, *SERVE, "two")
    one.join(invite, listen=OPEN)
    until_said(one, f"not reachable: 5.5.5.10 could not call back at {one.address()}, and saw this machine as 5.5.5.21")
    until_said(one, "no relay takes connections for this node (5.5.5.10")
    told, [reach, relay] = one.told(), one.told()["view"]
    assert ": a router on the way, or the host of a container, translates addresses. Forward some ports of it" in reach
    assert 'start with listen="tcp://0.0.0.0:31000-31099", announce="5.5.5.21" (labkit serve --listen …' in reach
    assert "is no relay). " in relay and "labkit relay --join INVITE there, or labkit serve --relay" in relay
    assert {f"ReachabilityChanged: {reach}", f"RelayChanged: {relay}"} <= set(told["news"])
    assert told["relaying"] == relay and "Only this machine's own network can use this invitation" in told["note"]
    served.until(
        "not reachable: 5.5.5.10 could not call back at 192.168.1.10:",
        "no relay takes connections for this node (5.5.5.10", "Only this machine's own network can use this invitation",
    )  # fmt: skip


def test_who_relays_for_whom_is_said_and_why_a_relay_does_not_and_that_it_is_gone(on):
    public, one, deep, closed = (on.notebook(host) for host in ("public", "one", "deep", "docker"))
    invite = public.start(listen=OPEN)
    relay = on.labkit("two_faced", "relay", "--join", invite, "--clients", "3")
    relay.until("relaying until Ctrl-C")
    closed.join(invite, listen=OPEN, relay=True, members=[])  # relays for nobody else
    one.join(invite, listen=OPEN)
    served = on.labkit("two", "serve", "--join", invite, *SERVE, "two")
    until_said(one, "it takes no connections itself: relayed by 5.5.5.11:")
    told = one.told()
    relayed = told["relaying"]
    address = relayed.removeprefix("it takes no connections itself: relayed by ")
    assert relayed in told["view"] and f"AddressChanged: relayed by {address}" in told["news"]
    served.until(f"relayed by {address}")
    until_said(public, f"(relayed by {address})")
    assert public.told()["relays"] == [address]

    deep.join(invite, listen=OPEN)
    until_said(deep, f"{address}: this relay has 3 clients, as many as it takes")
    until_said(deep, "is a private swarm and does not admit our key")

    relay.kill()
    until_said(one, f"{address} refused the connection")
    until_said(one, "not reachable: 5.5.5.10 could not call back at 5.5.5.11:")
    told = one.told()
    assert "reachable" not in told["view"][1] and told["relaying"] == told["view"][1]
    assert any(news.startswith("RelayChanged: the relay ") and address in news for news in told["news"])
    assert f"RelayChanged: {told['relaying']}" in told["news"]
    served.until(
        f"the relay {address} is gone", "no relay takes connections for this node",
        "not reachable: 5.5.5.10 could not call back at 5.5.5.11:",
    )  # fmt: skip
