"""A swarm at one moment, as text and as HTML: the rich repr of `swarm`, made from a census of what there is."""

from __future__ import annotations

import html
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice

import trio

from labkit.contact import Contact
from labkit.directory.grids import GridInfo
from labkit.errors import RPCError
from labkit.expert_uid import ExpertInfo, split_uid
from labkit.launch.handle import ServerHandle
from labkit.node import Node
from labkit.server.statistics import CopyStatistics, call_statistics
from labkit.view.collect.inventory import reachability_lines
from labkit.view.collect.telemetry import Calls, Telemetry
from labkit.view.collect.waiting import waits_of
from labkit.view.scene import copies_of, waits_lines

STYLE = """
<style>
.labkit-swarm table { border-collapse: collapse; margin: .4em 0; font-variant-numeric: tabular-nums; }
.labkit-swarm th, .labkit-swarm td { padding: .15em .7em; text-align: left; border: 0; }
.labkit-swarm th { border-bottom: 1px solid currentColor; font-weight: 600; }
.labkit-swarm td.number, .labkit-swarm th.number { text-align: right; }
.labkit-swarm .gone { opacity: .65; }
</style>"""

SERVER_STATE_SIGNS = {
    "running": "●",
    "remote": "○",
    "starting": "◌",
}  # a state has a sign and a word, not only a colour
ENDED_SIGN = "✕"
COLUMN_NAMES = ("server", "state", "address", "experts", "adopted", "calls", "mean", "failures")
NUMBER_COLUMNS = {"experts", "adopted", "calls", "mean"}
OWN_TIMEOUT = 0.5  # seconds in which a server started here says how its experts are copied
CENSUS_TIMEOUT = 2.0  # seconds, since a repr must not hang
MAX_ASKED = 64  # servers that are asked for their labels


@dataclass(frozen=True, slots=True)
class ServerRow:
    """One server.

    `experts_alive`: how many of its `experts` the directory offers. `adopted`: how many it did not begin with.
    """

    label: str
    state: str
    address: str
    experts: int
    experts_alive: int
    calls: int
    mean_ms: float
    failed: dict[str, int]
    adopted: int = 0


@dataclass(frozen=True, slots=True)
class SwarmSummary:
    """A swarm at one moment."""

    name: str
    state: str
    address: str
    encrypted: bool
    grids: dict[str, tuple[tuple[int, ...], int]]  # name -> sizes, experts alive
    servers: Sequence[ServerRow]
    calls: int
    failed: dict[str, int]
    waits: Sequence[str] = ()  # what passes wait for, in sentences
    reachability: Sequence[str] = ()  # whether others reach it, in sentences
    copies: str = ""  # whether experts have copies elsewhere, in a sentence; empty if no server makes any

    def text(self) -> str:
        """As plain text, a line for each server."""
        lines = [self._headline()]
        if self.servers:
            rows = [("", *self._columns), *(self._cells(row) for row in self.servers)]
            widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
            lines += ["  ".join(map(_justify, ("", *self._columns), row, widths)).rstrip() for row in rows]
        lines += self._feet
        return "\n".join(lines)

    def html(self) -> str:
        """As HTML, for a notebook."""

        def line(tag: str, cells: Sequence[str], css: str = "") -> str:
            number = ' class="number"'
            marked = (
                f"<{tag}{number if name in NUMBER_COLUMNS else ''}>{html.escape(cell)}</{tag}>"
                for name, cell in zip(self._columns, cells, strict=True)
            )
            return f"<tr{css}>{''.join(marked)}</tr>"

        rows = []
        for row in self.servers:
            sign, label, state, *rest = self._cells(row)
            rows.append(
                line(
                    "td", (label, f"{sign} {state}", *rest), "" if row.state in SERVER_STATE_SIGNS else ' class="gone"'
                )
            )
        table = (
            f"<table><thead>{line('th', self._columns)}</thead><tbody>{''.join(rows)}</tbody></table>" if rows else ""
        )
        head = html.escape(self._headline())
        foot = "<br>".join(map(html.escape, self._feet))
        return f'{STYLE}<div class="labkit-swarm"><strong>{head}</strong>{table}<div>{foot}</div></div>'

    @property
    def _columns(self) -> tuple[str, ...]:
        some = any(row.adopted for row in self.servers)
        return tuple(name for name in COLUMN_NAMES if some or name != "adopted")

    @property
    def _feet(self) -> list[str]:
        return [self._footline(), *([self.copies] if self.copies else []), *self.reachability, *self.waits]

    def _headline(self) -> str:
        where = f" at {self.address}{' (encrypted)' if self.encrypted else ''}" if self.address else ""
        return f"swarm {self.name!r}, {self.state}{where}"

    def _footline(self) -> str:
        grids = [
            f"grid {name} {' × '.join(map(str, sizes))}: {alive} experts alive"
            for name, (sizes, alive) in sorted(self.grids.items())
        ]
        calls = f"{self.calls:,} calls answered, {_failures(self.failed)}"
        return "; ".join([*(grids or ["no grid"]), calls])

    def _cells(self, row: ServerRow) -> tuple[str, ...]:
        alive = f"{row.experts_alive} of {row.experts}" if row.experts_alive != row.experts else str(row.experts)
        mean = f"{row.mean_ms:.1f} ms" if row.calls else "–"
        sign = SERVER_STATE_SIGNS.get(row.state, ENDED_SIGN)
        adopted = (str(row.adopted),) if "adopted" in self._columns else ()
        return sign, row.label, row.state, row.address, alive, *adopted, f"{row.calls:,}", mean, _failures(row.failed)


def _justify(column: str, cell: str, width: int) -> str:
    return cell.rjust(width) if column in NUMBER_COLUMNS else cell.ljust(width)


def _failures(failed: dict[str, int]) -> str:
    if not failed:
        return "no failures"
    total = sum(failed.values())
    causes = ", ".join(f"{cause} {count}" for cause, count in sorted(failed.items(), key=lambda item: -item[1]))
    return f"{total} failed ({causes})"


@dataclass
class Census:
    """What there is in a swarm.

    Args:
        grids: The grids, by name.
        experts: All experts that are alive, by uid.
        labels: The names that owners give their servers, by address, where there are any.
        relays: Who relays for servers that take no connections, by their address.
        copies: What servers say of copies, by their address, those that take part.
    """

    grids: dict[str, GridInfo] = field(default_factory=dict)
    experts: dict[str, ExpertInfo] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    relays: dict[str, str] = field(default_factory=dict)
    copies: dict[str, CopyStatistics] = field(default_factory=dict)


async def take_census(node: Node, servers: Sequence[ServerHandle] = ()) -> Census:
    """Look up all grids and experts, and ask servers for their labels and copies, for at most two seconds.

    If that is too short, return what is cached here.

    Args:
        node: Our node in the swarm.
        servers: The servers started here.
    """
    census = Census()
    with trio.move_on_after(CENSUS_TIMEOUT) as limit:
        census.grids = await node.directory.grids()
        census.experts = await node.directory.experts_of(census.grids)
        here = {server.contact: server for server in servers if server.alive and server.contact is not None}
        # What has come to a server here is known before the directory looks again.
        held = {uid: contact for contact, server in here.items() for uid in server.uids}
        late = [uid for uid, contact in held.items() if uid not in census.experts or not _is_at(census, uid, contact)]
        if late:
            await node.directory.refresh(late)
            census.experts = await node.directory.experts_of(census.grids)
        await _ask_servers(node, here, census)
    if limit.cancelled_caught and not census.experts:
        census.experts = node.directory.known()
    return census


def _is_at(census: Census, uid: str, contact: Contact) -> bool:
    return census.experts[uid].contact == contact


async def _ask_servers(node: Node, here: Collection[Contact], census: Census) -> None:
    """Ask servers here, and others that have experts, what they say of themselves."""

    async def ask(contact: Contact) -> None:
        timeout = OWN_TIMEOUT if contact in here else CENSUS_TIMEOUT
        try:
            said = await call_statistics(node.client, contact, timeout)
        except RPCError:
            return  # nothing is known now
        if said.copies is not None:
            census.copies[contact.endpoint] = said.copies
        if said.label and contact not in here and not said.label.startswith("servers["):
            census.labels[contact.endpoint] = said.label
        if said.relay:
            census.relays[contact.endpoint] = said.relay

    others = {info.contact for info in census.experts.values()} - set(here)
    async with trio.open_nursery() as nursery:
        for contact in islice(chain(here, others), MAX_ASKED):
            nursery.start_soon(ask, contact)


def summarize(
    name: str, node: Node, servers: Sequence[ServerHandle], census: Census | None, telemetry: Telemetry
) -> SwarmSummary:
    """Returns the summary of a swarm, with a row for each server.

    Args:
        name: The swarm's name.
        node: Its node in this process.
        servers: The servers started here.
        census: What there is in the swarm; None if the swarm is closed.
        telemetry: The calls that were made here.
    """
    total = telemetry.total
    if census is None:
        return SwarmSummary(name, "closed", "", False, {}, [], total.finished, dict(total.failed))
    by_address: dict[str, list[str]] = {}
    for uid, info in census.experts.items():
        by_address.setdefault(info.contact.endpoint, []).append(uid)
    rows = []
    for number, server in enumerate(servers):
        address = server.contact.endpoint if server.contact is not None else ""
        declared = by_address.pop(address, [])  # which outlives it for a while
        offered = len(declared) if server.alive else 0
        label = f"servers[{number}] {server.label}".rstrip()
        rows.append(_row(telemetry, label, server.state, address, len(server.uids), offered))
    for address, uids in sorted(by_address.items()):
        label = census.labels.get(address, "elsewhere")
        rows.append(_row(telemetry, label, "remote", address, len(uids), len(uids)))
    alive = [split_uid(uid)[0] for uid in census.experts]
    grids = {grid: (info.sizes, alive.count(grid)) for grid, info in census.grids.items()}
    for index, row in enumerate(rows):
        if row.address in census.relays:
            row = replace(row, address=f"{row.address} (relayed by {census.relays[row.address]})")
        said = census.copies.get(rows[index].address)
        rows[index] = row if said is None else replace(row, adopted=len(said.adopted))
    copies = copies_of(census.copies.values())
    contact = node.contact
    waits = waits_lines(waits_of(telemetry, time.monotonic()))
    return SwarmSummary(
        name, "open", contact.endpoint, contact.secure, grids, rows, total.finished, dict(total.failed), waits,
        reachability_lines(node, servers), "" if copies is None else copies.words,
    )  # fmt: skip


def _row(telemetry: Telemetry, label: str, state: str, address: str, experts: int, alive: int) -> ServerRow:
    calls = telemetry.by_address.get(address, Calls())
    return ServerRow(
        label, state, address, experts, alive, calls.finished, 1000 * calls.mean_seconds, dict(calls.failed)
    )
