"""Many servers, as a dashboard sees them: `python -m tests.crowd INVITE SERVERS`, until its standard input ends.

Each is a node with a key and an address of its own, whose experts are in the DHT and whose statistics change. There are
no experts behind them: two cores could not compute for ten thousand.
"""

from __future__ import annotations

import os
import sys
import time

import trio

from labkit.contact import Contact
from labkit.directory import DirectoryConfig
from labkit.directory.grids import GridInfo, keep_grid_declared
from labkit.expert_uid import grid_uids, spread
from labkit.histogram import BUCKETS
from labkit.node import NodeConfig, open_node
from labkit.server.statistics import ServerStatistics
from labkit.wire.rpc_server import serve_rpc
from labkit.wire.rpc_types import Reply, Request, SyncMethod
from labkit.wire.security import Identity
from labkit.wire.zmq_transport import open_network

NAME = "crowd"
EXPERTS = 50  # of a server
CONFIG = NodeConfig(directory=DirectoryConfig(ttl=900.0))  # one node declares for all


def busy(uids: tuple[str, ...], started: float) -> ServerStatistics:
    """Each expert answers ten requests a second."""
    calls, times = int(10 * (time.monotonic() - started)), [0] * BUCKETS
    times[BUCKETS // 2] = calls * len(uids)
    count = [calls] * len(uids)
    return ServerStatistics(
        experts=dict.fromkeys(uids, calls), queued_requests=1, queued_rows=8, batches=calls, rows=8 * calls,
        busy_seconds=0.0, overloaded=0, expired=0, latency=0.0, loss=0.0, uptime=time.monotonic() - started,
        expert_rows=[8 * calls] * len(uids), expert_requests=count, expert_seconds=[0.01 * calls] * len(uids),
        total_times=times, queue_times=times, compute_times=times,
    )  # fmt: skip


async def main(invite: str, servers: int) -> None:
    grid, started = (EXPERTS, servers), time.monotonic()
    async with (
        open_network() as network,
        open_node(network, Identity.generate(), CONFIG, join=[Contact.from_invitation(invite)]) as node,
        trio.open_nursery() as nursery,
    ):

        async def serve(uids: tuple[str, ...], task_status: trio.TaskStatus[Contact]) -> None:
            def statistics(request: Request) -> Reply:
                return Reply(busy(uids, started))

            async with network.listen(Identity.generate()) as endpoint, trio.open_nursery() as own:
                await own.start(serve_rpc, endpoint, {"server.statistics": SyncMethod(statistics)})
                task_status.started(endpoint.contact)

        ttl = CONFIG.directory.ttl
        await nursery.start(keep_grid_declared, node.dht, NAME, GridInfo(grid, "nop"), ttl)
        for uids in spread(grid_uids(NAME, grid), servers):
            contact = await nursery.start(serve, uids)
            await nursery.start(node.directory.keep_declared, uids, contact)
        print("ready", flush=True)
        await trio.to_thread.run_sync(lambda: os.read(0, 1), abandon_on_cancel=True)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main, sys.argv[1], int(sys.argv[2]))
