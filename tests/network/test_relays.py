"""Hosts that take no connections: experts on all of them are reached from all of them, through a relay."""

from __future__ import annotations

from tests.network.waiting import until_answered, until_said

HIDDEN = ["one", "two", "deep", "firewalled"]
REACHABLE = ["public", "two_faced"]
OPEN = "tcp://0.0.0.0:*"
RECOVERY_TIME = 10.0  # seconds in which a hidden node is back after its relay has gone


def test_trainers_on_each_host_reach_experts_on_all(on):
    public = on.notebook("public")
    invite = public.start(listen=OPEN, relay=True)
    notebooks = {"public": public} | {host: on.notebook(host) for host in [*HIDDEN, *REACHABLE] if host != "public"}
    for host, notebook in notebooks.items():
        if host != "public":
            notebook.join(invite, listen=OPEN)
        notebook.serve(grid=[1], name=host)
    experts = sorted(f"{host}.0" for host in notebooks)
    for host, notebook in notebooks.items():
        until_answered(notebook, experts, 20)
        until_said(notebook, "it takes no connections itself: relayed by" if host in HIDDEN else "reachable: 5.5.5.1")


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
