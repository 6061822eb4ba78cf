"""What a relay costs: calls to one server, directly and through a relay, in turn and between the same processes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from statistics import median

import pytest
import torch

import labkit as lk
from labkit.bench.processes import ProcessGroup
from labkit.node import NodeConfig

CALLERS = 2
ROUNDS = 3  # of which the middle one counts: what else the machine does slows single ones down, or the direct calls
GROUPS = 4  # of rounds, of which one is to be undisturbed
SECONDS = 0.5  # of each half of a round
HIDDEN = 1024


@pytest.fixture(scope="module")
def ways() -> Iterator[tuple[lk.RemoteExpert, lk.RemoteExpert]]:
    """One expert of a server process that takes no connections: as its notebook calls it, and as others do."""
    with ExitStack() as stack:
        (relay,) = stack.enter_context(ProcessGroup()).start("rpc:relay_others", None)
        invite = relay.receive()
        notebook = stack.enter_context(lk.Swarm.join(invite, name="notebook", node=NodeConfig(hidden=True)))
        elsewhere = stack.enter_context(lk.Swarm.join(invite, name="elsewhere"))
        (server,) = notebook.serve("nop", hidden=HIDDEN, grid=(1,), isolation="process")
        assert server.contact is not None
        key = server.contact.key
        assert key in notebook._lab.network.direct and key not in elsewhere._lab.network.direct
        assert server.contact.secure, "both ways are encrypted"
        yield notebook.expert(server.uids[0]), elsewhere.expert(server.uids[0])


def calls_per_s(expert: lk.RemoteExpert, x: torch.Tensor) -> float:
    started = time.perf_counter()

    def call_again_and_again(_: int) -> int:
        calls = 0
        while time.perf_counter() < started + SECONDS:
            expert(x)
            calls += 1
        return calls

    with ThreadPoolExecutor(CALLERS) as pool:
        calls = sum(pool.map(call_again_and_again, range(CALLERS)))
    return calls / (time.perf_counter() - started)


@pytest.mark.parametrize("rows", [1, 512], ids=["small", "2 MB"])
def test_through_a_relay_there_is_at_least_half_of_the_direct_throughput(ways, rows):
    directly, relayed = ways
    x = torch.randn(rows, HIDDEN)
    for expert in ways:
        calls_per_s(expert, x)  # to warm up
    shares: list[float] = []
    while len(shares) < GROUPS and max(shares, default=0.0) < 0.5:
        shares.append(median(share_of_direct(directly, relayed, x) for _ in range(ROUNDS)))
    assert shares[-1] >= 0.5, shares


def share_of_direct(directly: lk.RemoteExpert, relayed: lk.RemoteExpert, x: torch.Tensor) -> float:
    """In turn, since the machine's speed changes from second to second."""
    before, through, after = (calls_per_s(expert, x) for expert in (directly, relayed, directly))
    return 2 * through / (before + after)
