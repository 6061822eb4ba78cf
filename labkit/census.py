"""The census of a swarm: its grids and experts at one moment, and how calls to them went. What its rich repr shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import trio

from labkit.directory.grids import GridInfo, find_grids
from labkit.expert_uid import ExpertInfo, split_uid
from labkit.handles import ServerHandle
from labkit.node import Node
from labkit.view.summary import ServerRow, SwarmSummary
from labkit.view.telemetry import Calls, Telemetry

CENSUS_TIMEOUT = 2.0  # seconds; a repr must not hang


@dataclass
class Census:
    """Grids by name, and the experts of all of them that are alive, by uid."""

    grids: dict[str, GridInfo] = field(default_factory=dict)
    experts: dict[str, ExpertInfo] = field(default_factory=dict)


async def all_grids(node: Node) -> dict[str, GridInfo]:
    """The grids that are declared in the swarm of `node`, by name."""
    return await find_grids(node.dht, node.directory.config.timeout)


async def all_experts(node: Node, grids: Mapping[str, GridInfo]) -> dict[str, ExpertInfo]:
    """All experts of these grids that are alive, by uid."""
    found = {}
    for name, grid in grids.items():
        for info in await node.directory.all_experts(name, len(grid.sizes)):
            found[info.uid] = info
    return found


async def take_census(node: Node) -> Census:
    """Look at everything, for two seconds at most; after that, what is known here has to do."""
    census = Census()
    with trio.move_on_after(CENSUS_TIMEOUT):
        census.grids = await all_grids(node)
        census.experts = await all_experts(node, census.grids)
        return census
    census.experts = node.directory.known()
    return census


def summarize(
    name: str, node: Node, servers: Sequence[ServerHandle], census: Census | None, telemetry: Telemetry
) -> SwarmSummary:
    """The census as rows, one for each server; None for a swarm that is closed."""
    total = telemetry.total
    if census is None:
        return SwarmSummary(name, "closed", "", False, {}, [], total.finished, dict(total.failed))
    by_address: dict[str, list[str]] = {}
    for uid, info in census.experts.items():
        by_address.setdefault(info.contact.endpoint, []).append(uid)
    rows = []
    for number, server in enumerate(servers):
        address = server.contact.endpoint if server.contact is not None else ""
        declared = by_address.pop(address, [])  # for a while longer than it lives
        offered = len(declared) if server.alive else 0
        rows.append(_row(telemetry, f"servers[{number}]", server.state, address, len(server.uids), offered))
    for address, uids in sorted(by_address.items()):
        rows.append(_row(telemetry, "elsewhere", "remote", address, len(uids), len(uids)))
    alive = [split_uid(uid)[0] for uid in census.experts]
    grids = {grid: (info.sizes, alive.count(grid)) for grid, info in census.grids.items()}
    contact = node.contact
    return SwarmSummary(name, "open", contact.endpoint, contact.secure, grids, rows, total.finished, dict(total.failed))


def _row(telemetry: Telemetry, label: str, state: str, address: str, experts: int, alive: int) -> ServerRow:
    calls = telemetry.by_address.get(address, Calls())
    return ServerRow(
        label, state, address, experts, alive, calls.finished, 1000 * calls.mean_seconds, dict(calls.failed)
    )
