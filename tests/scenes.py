"""Scenes for tests: plausible, of any size, and the same each time. `make_scene` is one moment; `play` is a run in
which a server dies and comes back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from labkit.errors import CAUSES
from labkit.expert_uid import grid_for, make_uid
from labkit.view.scene import SERIES, Experts, Headline, Layer, Mark, Scene, Series, Servers, State

MAX_BINS = 600
WALL = 1_700_000_000.0  # Unix time of a scene's start
BURST = 4.0  # seconds for which calls fail after a server died
REMOTE = 3  # each fourth server is one that was started elsewhere

Outage = tuple[int, float, float]  # server, died at, back at (infinity: not yet)


def make_scene(
    experts: int = 16,
    servers: int = 4,
    *,
    grid: Sequence[int] | None = None,
    layers: Sequence[str] = ("ffn",),
    at: float = 10.0,
    seed: int = 0,
    running: bool = True,
    dead_servers: Sequence[int] = (),
    source: str = "calls",
    outages: Sequence[Outage] | None = None,
) -> Scene:
    """A swarm `at` seconds after its start. `experts` are divided over `layers`, which all have the sizes of `grid`;
    by default that is just filled, and a larger one has unclaimed cells.

    Servers in `dead_servers` died 3 s ago. Without any, server 0 was away from 0.3 × `at` to 0.6 × `at`, so that
    there are marks, and failures in the series. `outages` says it all instead. Every seventh expert was never called:
    its numbers are NaN. The same arguments give the same scene, and the next moment's differs a little.
    """
    if outages is None:
        outages = [(server, max(at - 3.0, 0.0), math.inf) for server in dead_servers]
        if not outages and servers:
            outages = [(0, 0.3 * at, 0.6 * at)]
    dead = {server for server, died, back in outages if died <= at < back}
    share = -(-experts // len(layers))  # experts a layer
    sizes = tuple(grid) if grid is not None else grid_for(max(share, 1))
    assert math.prod(sizes) >= share, f"a grid of {sizes} has no room for {share} experts"
    table = _experts(experts, servers, list(layers), share, sizes, at, seed, dead)
    hosts = _servers(servers, table, at, seed, outages, dead)
    series = _series(at, seed, running, outages)
    last = dict(zip(SERIES, map(float, series.values[-1]), strict=True)) if len(series.values) else {}
    headline = Headline(
        running=running,
        steps=min(int(10 * at), 1000) if running else 0,
        total_steps=1000 if running else 0,
        loss=last.get("loss", math.nan),
        samples=last.get("samples", math.nan),
        calls=last.get("calls", math.nan),
        bytes=last.get("bytes", math.nan),
        in_flight=8 if running else 0,
        staleness=last.get("staleness", math.nan),
        experts=experts,
        experts_alive=int((table.state == State.ALIVE).sum()),
        servers=servers,
        servers_alive=servers - len(dead),
        answered=int(table.calls.sum()),
        failed={cause: int(n) for cause, n in zip(CAUSES, hosts.failed.sum(axis=0), strict=True) if n},
        unanswered_rows=2 * len(outages),
    )
    return Scene(
        at=at,
        wall=WALL + at,
        swarm="default",
        open=True,
        source=source,
        headline=headline,
        layers=[Layer(name, sizes) for name in layers],
        experts=table,
        servers=hosts,
        series=series,
        marks=_marks(outages, at),
    )


def play(
    count: int,
    experts: int = 16,
    servers: int = 4,
    *,
    step: float = 1.0,
    grid: Sequence[int] | None = None,
    seed: int = 0,
) -> Iterator[Scene]:
    """`count` scenes, `step` seconds apart: server 1 (or 0, if it is alone) dies at a third and is back at two."""
    outage = (min(1, servers - 1), count * step / 3, 2 * count * step / 3)
    for number in range(1, count + 1):
        yield make_scene(experts, servers, grid=grid, at=number * step, seed=seed, outages=[outage] if servers else [])


def _experts(
    count: int,
    servers: int,
    layers: Sequence[str],
    share: int,
    sizes: tuple[int, ...],
    at: float,
    seed: int,
    dead: set[int],
) -> Experts:
    rows = np.arange(count, dtype=np.int64)
    layer, place = rows // max(share, 1), rows % max(share, 1)
    # claimed cells are spread over a grid that has more of them
    cell = place * math.prod(sizes) // max(share, 1)
    coordinates = np.stack(np.unravel_index(cell, sizes), axis=1).tolist()
    server = rows % servers if servers else np.full(count, -1, np.int64)
    rng = np.random.default_rng(seed)
    base = rng.gamma(2.0, 40.0, count)  # rows/s
    wave = 1 + 0.3 * np.sin(at / 5 + rng.uniform(0, 6.28, count))
    gone = np.isin(server, list(dead))
    never = rows % 7 == 6
    state = np.where(gone, int(State.DEAD), np.where(rows % 13 == 12, int(State.SUSPECT), int(State.ALIVE)))
    failed = np.where(gone, 12, 0) + np.where(state == State.SUSPECT, 3, 0)

    def unknown(values: np.ndarray) -> np.ndarray:
        return np.where(never, np.nan, values).astype(np.float32)

    return Experts(
        uids=[make_uid(layers[number], where) for number, where in zip(layer.tolist(), coordinates, strict=True)],
        layer=layer,
        cell=cell,
        server=server,
        state=state.astype(np.int64),
        load=np.where(gone | never, 0.0, base * wave).astype(np.float32),
        latency=unknown(5 + rng.gamma(3.0, 4.0, count) * wave),
        failures=unknown(np.where(gone, 1.0, np.where(state == State.SUSPECT, 0.5, 0.0))),
        staleness=unknown(rng.gamma(2.0, 1.0, count) * wave),
        calls=np.where(never, 0, base * at / 10).astype(np.int64),
        failed=failed.astype(np.int64),
        updates=np.where(never, 0, base * at / 20).astype(np.int64),
        adopted=rows % 5 == 4,
    )


def _servers(count: int, experts: Experts, at: float, seed: int, outages: Sequence[Outage], dead: set[int]) -> Servers:
    rows = np.arange(count, dtype=np.int64)
    rng = np.random.default_rng(seed + 1)
    remote, gone = rows % 4 == REMOTE, np.isin(rows, list(dead))
    held = np.bincount(experts.server[experts.server >= 0], minlength=count)
    alive = np.bincount(experts.server[experts.state == State.ALIVE], minlength=count) if count else held
    died = {server: died for server, died, back in outages if server in dead}
    failed = np.zeros((count, len(CAUSES)), np.int64)
    for server, when, _ in outages:
        if when <= at:
            failed[server] += _burst_total()
    middle = 10 + rng.gamma(2.0, 4.0, (count, 1, 1)) * (1 + 0.2 * math.sin(at / 3))
    parts = np.array([1.0, 0.3, 0.5, 0.2]).reshape(1, 4, 1)  # of SPLIT
    tails = np.array([1.0, 2.5, 4.0]).reshape(1, 1, 3)  # of PERCENTILES
    latency = (middle * parts * tails).astype(np.float32)
    if count > 2:
        latency[2] = np.nan  # one that was never called
    return Servers(
        labels=[_address(row) if remote[row] else f"servers[{row}]" for row in rows.tolist()],
        addresses=[_address(row) for row in rows.tolist()],
        words=[
            ("silent" if remote[row] else "killed") if gone[row] else ("remote" if remote[row] else "running")
            for row in rows.tolist()
        ],
        local=np.where(remote, -1, rows),
        state=np.where(gone, int(State.DEAD), int(State.ALIVE)).astype(np.int64),
        heard=np.array([at - died[row] if row in died else 0.1 for row in rows.tolist()], np.float32),
        experts=held.astype(np.int64),
        alive=alive.astype(np.int64),
        calls=np.where(gone, 0.0, rng.uniform(20, 80, count)).astype(np.float32),
        queue=np.where(gone, np.nan, rng.integers(0, 6, count)).astype(np.float32),
        latency=latency,
        failed=failed,
        injected=np.zeros((count, 2), np.float32),
        copies=np.where(gone, np.nan, rows % 4 + 2).astype(np.float32),
        adopted=np.where(gone, np.nan, rows % 3).astype(np.float32),
    )


def _address(server: int) -> str:
    return f"tcp://10.0.{server // 250}.{server % 250 + 1}:{40_000 + server}"


def _burst_total() -> np.ndarray:
    return np.array([12 if cause == "lost" else 6 if cause == "timeout" else 0 for cause in CAUSES])


def _series(at: float, seed: int, running: bool, outages: Sequence[Outage]) -> Series:
    width = 1.0
    while at / width > MAX_BINS:
        width *= 2
    bins = int(at / width)
    t = (np.arange(bins) + 0.5) * width  # [bins], the middle of each
    noise = np.random.default_rng(seed + 2).normal(0, 0.05, MAX_BINS)[:bins]
    values = np.zeros((bins, len(SERIES)), np.float32)
    if running:
        columns = {
            "loss": 0.2 + 2.1 * np.exp(-t / 30) + 0.5 * noise,
            "samples": 2000 * (1 + noise),
            "calls": 150 * (1 + noise),
            "bytes": 3e6 * (1 + noise),
            "in_flight": 8 + 0 * t,
            "staleness": 2.0 + noise,
        }
        for name, column in columns.items():
            values[:, SERIES.index(name)] = column
    else:
        values[:, [SERIES.index("loss"), SERIES.index("staleness")]] = np.nan
    for _, died, _ in outages:
        for cause, total in zip(CAUSES, _burst_total(), strict=True):
            values[(died <= t) & (t < died + BURST), SERIES.index(cause)] += total * width / BURST
    return Series(width=width, first=0, values=values)


def _marks(outages: Sequence[Outage], at: float) -> list[Mark]:
    marks = [
        Mark(died, f"{_name(server)} {'lost' if server % 4 == REMOTE else 'killed'}") for server, died, _ in outages
    ]
    marks += [Mark(back, f"{_name(server)} back") for server, _, back in outages]
    return sorted((mark for mark in marks if mark.at <= at), key=lambda mark: mark.at)


def _name(server: int) -> str:
    return _address(server) if server % 4 == REMOTE else f"servers[{server}]"
