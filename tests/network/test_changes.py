"""The network changes under a running swarm: a laptop gets another address, a router forgets its connections."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from labkit.whereabouts import LOOK_PERIOD, SLEPT
from tests.network.waiting import until_answered, until_said
from tests.network.world import World

OPEN = "tcp://0.0.0.0:*"
NOTICE_TIME = 15.0  # seconds
LONG_SLEEP = SLEPT + LOOK_PERIOD + 1.0  # seconds


@contextmanager
def moved(world: World, host: str, before: str, after: str, via: str | None = None) -> Iterator[None]:
    """In this block a host has another address."""

    def change(old: str, new: str) -> None:
        world[host].ip("address", "del", old, "dev", "eth0")
        world[host].ip("address", "add", new, "dev", "eth0")
        if via is not None:
            world[host].ip("route", "replace", "default", "via", via)

    change(before, after)
    try:
        yield
    finally:
        change(after, before)


def test_a_host_with_a_new_address_is_back_without_a_restart(on, world):
    public, laptop = on.notebook("public"), on.notebook("two_faced")
    laptop.join(public.start(listen=OPEN), listen=OPEN)
    laptop.serve(grid=[2])
    until_answered(public, ["ffn.0", "ffn.1"])
    with moved(world, "two_faced", "5.5.5.11/24", "5.5.5.12/24"):
        assert until_answered(public, ["ffn.0", "ffn.1"], 60) < NOTICE_TIME
        until_said(laptop, "reachable: 5.5.5.10 called back at 5.5.5.12")


def test_so_is_one_behind_a_router(on, world):
    public, laptop = on.notebook("public"), on.notebook("one")
    laptop.join(public.start(listen=OPEN, relay=True), listen=OPEN)
    laptop.serve(grid=[2])
    until_said(laptop, "relayed by 5.5.5.10")
    until_answered(public, ["ffn.0", "ffn.1"])
    with moved(world, "one", "192.168.1.10/24", "192.168.1.11/24", via="192.168.1.1"):
        assert until_answered(public, ["ffn.0", "ffn.1"], 60) < NOTICE_TIME


def test_a_router_that_forgets_its_connections_costs_seconds_and_so_does_a_laptop_that_has_slept_meanwhile(on, world):
    public, deep, one = on.notebook("public"), on.notebook("deep"), on.notebook("one")
    invite = public.start(listen=OPEN, relay=True)
    for notebook, name in ((deep, "deep"), (one, "one")):
        notebook.join(invite, listen=OPEN)
        notebook.serve(grid=[1], name=name)
        until_said(notebook, "relayed by 5.5.5.10")
    until_answered(deep, ["deep.0", "one.0"])
    for router in ("router_three", "router_one"):
        world[router].forget()
    assert until_answered(deep, ["deep.0", "one.0"], 60) < NOTICE_TIME
    assert until_answered(public, ["deep.0", "one.0"], 60) < NOTICE_TIME
    with one.process.asleep():
        world["router_one"].forget()
        time.sleep(LONG_SLEEP)
    assert until_answered(deep, ["deep.0", "one.0"], 60) < NOTICE_TIME
    assert until_answered(one, ["deep.0", "one.0"], 60) < NOTICE_TIME
    until_said(one, "relayed by 5.5.5.10")
