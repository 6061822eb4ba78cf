"""A network that falls apart, and is whole again: packets between two hosts are dropped for a while, unannounced."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from tests.network.waiting import until_answered
from tests.network.world import World
from tests.swarms import eventually

OPEN = "tcp://0.0.0.0:*"
UIDS = ["ffn.0", "ffn.1", "ffn.2", "ffn.3"]
TAKEN = 10.0  # seconds after which each side has all experts
AGREED = 15.0  # seconds after which each expert is served once again
CUT = """
table inet cut {
  chain in { type filter hook input priority -10; ip saddr ADDRESS drop; }
  chain out { type filter hook output priority -10; ip daddr ADDRESS drop; }
}
"""


@contextmanager
def cut_off(world: World, host: str, from_address: str) -> Iterator[None]:
    """In this block a host and an address do not hear each other."""
    world[host].nft(CUT.replace("ADDRESS", from_address))
    try:
        yield
    finally:
        world[host].nft("delete table inet cut")


def test_both_sides_go_on_with_all_experts_and_agree_on_who_serves_them_seconds_after_they_meet(on, world):
    public, laptop = on.notebook("public"), on.notebook("two_faced")
    laptop.join(public.start(listen=OPEN), listen=OPEN)
    public.serve(grid=[4], experts=2)
    laptop.serve(grid=[4])
    until_answered(laptop, UIDS)
    eventually(lambda: public.copied() == UIDS)
    with cut_off(world, "two_faced", "5.5.5.10"):
        began = time.monotonic()
        eventually(lambda: public.served() == UIDS == laptop.served())
        assert time.monotonic() < began + TAKEN
        for notebook in (public, laptop):
            until_answered(notebook, UIDS)
    began = time.monotonic()
    eventually(lambda: sorted(public.served() + laptop.served()) == UIDS)
    for notebook in (public, laptop):
        until_answered(notebook, UIDS)
    assert time.monotonic() < began + AGREED
