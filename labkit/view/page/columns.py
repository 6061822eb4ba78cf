"""How a scene is written for a page: its tables as typed columns, the rest of it as JSON.

`frame_writer`, which decides what a page is sent next, and `recording`, which keeps whole moments, are built on this.
`frontend/src/store.ts` reads what is written here; `frontend/src/types.ts` has the format.
"""

# rows: one for each expert, or server, of a table

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from labkit.errors import CAUSES
from labkit.view.scene import MODES, SERIES, Curve, Floats, Layer, Mark, Scene, Servers, waits_lines

MAX_TEXT = 120  # characters of a name, an address, a mark; what is longer is cut
MAX_SIZES = 8  # dimensions of a grid
UNKNOWN_STEP = 65535  # NaN in a "scaled" column
MAX_STEP = 65534  # of a "scaled" column: value = step / MAX_STEP × max

Header = dict[str, Any]  # a message, as JSON has it
Values = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table, and how its rows are written."""

    table: str  # "experts" | "servers"
    name: str
    dtype: str  # as `Piece.dtype` in types.ts
    read: Callable[[Scene], Values]  # [rows] or [rows, width], as the scene has it
    width: int = 1  # values a row

    @property
    def row_bytes(self) -> int:
        """The bytes that a row takes."""
        return _WIRE[self.dtype].itemsize * self.width


_WIRE: dict[str, np.dtype[Any]] = {
    "u8": np.dtype("u1"),
    "u16": np.dtype("<u2"),
    "u32": np.dtype("<u4"),
    "i32": np.dtype("<i4"),
    "f32": np.dtype("<f4"),
    "scaled": np.dtype("<u2"),
}
SERVER_NUMBERS_WIDTH = 5 + 4 * 3 + len(CAUSES) + 2 + 1


def server_numbers(servers: Servers) -> Floats:
    """Returns the numbers of servers [rows, 27]: heard, experts, alive, calls, queue, latency (SPLIT × PERCENTILES),
    failed, injected, local index."""
    rows = len(servers.labels)
    numbers = np.empty((rows, SERVER_NUMBERS_WIDTH), np.float32)
    first: tuple[Values, ...] = (servers.heard, servers.experts, servers.alive, servers.calls, servers.queue)
    for column, values in enumerate(first):
        numbers[:, column] = values
    numbers[:, 5:17] = servers.latency.reshape(rows, 12)
    numbers[:, 17 : 17 + len(CAUSES)] = servers.failed
    numbers[:, -3:-1] = servers.injected
    numbers[:, -1] = servers.local
    return numbers


STATIC = (  # where an expert is; its server may change
    Column("experts", "layer", "u16", lambda scene: scene.experts.layer),
    Column("experts", "cell", "u32", lambda scene: scene.experts.cell),
    Column("experts", "server", "i32", lambda scene: scene.experts.server),
)
STATES = (
    Column("experts", "state", "u8", lambda scene: scene.experts.state),
    Column("experts", "adopted", "u8", lambda scene: scene.experts.adopted),
    Column("servers", "state", "u8", lambda scene: scene.servers.state),
)
SERVER_NUMBERS = Column(
    "servers", "numbers", "f32", lambda scene: server_numbers(scene.servers), width=SERVER_NUMBERS_WIDTH
)
SERVER_COPIES = Column(
    "servers", "copies", "f32", lambda scene: np.stack([scene.servers.copies, scene.servers.adopted], axis=1), width=2
)
SHADES = (  # the modes of the heat map
    Column("experts", "load", "scaled", lambda scene: scene.experts.load),
    Column("experts", "latency", "scaled", lambda scene: scene.experts.latency),
    Column("experts", "failures", "scaled", lambda scene: scene.experts.failures),
    Column("experts", "staleness", "scaled", lambda scene: scene.experts.staleness),
)
COUNTS = (
    Column("experts", "calls", "u32", lambda scene: scene.experts.calls),
    Column("experts", "failed", "u32", lambda scene: scene.experts.failed),
    Column("experts", "updates", "u32", lambda scene: scene.experts.updates),
)
COLUMNS = (*STATIC, *STATES, SERVER_NUMBERS, SERVER_COPIES, *SHADES, *COUNTS)
MOVING = tuple(column for column in COLUMNS if column.name not in ("layer", "cell"))  # an expert keeps its place
assert tuple(column.name for column in SHADES) == MODES


def write_rows(column: Column, values: Values) -> tuple[bytes, float | None]:
    """Returns rows as little-endian bytes; for a "scaled" column also its `max`, which all of these rows share."""
    wire = _WIRE[column.dtype]
    if column.dtype == "scaled":
        known = np.isfinite(values)
        top = float(values.max(initial=0.0, where=known))
        scale = MAX_STEP / top if top > 0 else 0.0
        steps = np.clip(np.rint(np.where(known, values, 0.0) * scale), 0, MAX_STEP)  # in float64: scale may be huge
        return np.where(known, steps, UNKNOWN_STEP).astype(wire).tobytes(), top
    if column.dtype != "f32":
        bounds = np.iinfo(wire)
        values = np.clip(values, bounds.min, bounds.max)
    return values.astype(wire).tobytes(), None


def write_piece(
    column: Column, values: Values, start: int, stop: int, buffers: list[bytes], size: int | None = None
) -> dict[str, Any]:
    """Write some rows of a column as a `Piece`.

    Args:
        column: The column.
        values: Its values, of all rows.
        start: The first row to write.
        stop: The row before which to stop.
        buffers: The bytes are appended here.
        size: Rows of the table, by default as many as there are values.

    Returns:
        The piece, without its bytes.
    """
    rows, top = write_rows(column, values[start:stop])
    piece: dict[str, Any] = {
        "table": column.table,
        "column": column.name,
        "size": len(values) if size is None else size,
        "start": start,
        "count": stop - start,
        "dtype": column.dtype,
        "width": column.width,
    }
    if top is not None:
        piece["max"] = top
    piece["buffer"] = len(buffers)
    buffers.append(rows)
    return piece


def write_opening(scene: Scene, *, reset: bool, control: bool) -> Header:
    """Returns what every frame begins with: time, swarm and headline. NaN becomes None, since JSON has no NaN."""
    headline = scene.headline
    return {
        "type": "frame",
        "reset": reset,
        "at": round(scene.at, 3),
        "wall": round(scene.wall, 3),
        "swarm": cut(scene.swarm),
        "open": scene.open,
        "source": scene.source,
        "can": {"control": control},
        "headline": {
            "running": headline.running,
            "steps": headline.steps,
            "total_steps": headline.total_steps,
            "loss": number(headline.loss),
            "samples": number(headline.samples),
            "calls": number(headline.calls),
            "bytes": number(headline.bytes),
            "in_flight": headline.in_flight,
            "staleness": number(headline.staleness),
            "experts": headline.experts,
            "experts_alive": headline.experts_alive,
            "servers": headline.servers,
            "servers_alive": headline.servers_alive,
            "answered": headline.answered,
            "failed": {cause: headline.failed[cause] for cause in CAUSES if headline.failed.get(cause)},
            "unanswered_rows": headline.unanswered_rows,
            "at_risk": number(headline.at_risk),
            "taken_over": headline.taken_over,
            "updates_lost": headline.updates_lost,
        },
        "pieces": [],
    }


def write_layer(layer: Layer) -> dict[str, Any]:
    """Returns a layer as JSON."""
    return {"name": cut(layer.name), "sizes": [int(size) for size in layer.sizes[:MAX_SIZES]]}


def write_server(servers: Servers, row: int) -> list[str]:
    """Returns label, address and word of a server."""
    return [cut(servers.labels[row]), cut(servers.addresses[row]), cut(servers.words[row])]


def write_servers(servers: Servers) -> list[list[str]]:
    """Returns label, address and word of all servers."""
    return [write_server(servers, row) for row in range(len(servers.labels))]


def write_mark(mark: Mark) -> list[Any]:
    """Returns a mark as JSON: when it happened, and its text."""
    return [round(mark.at, 3), cut(mark.text)]


def write_series(scene: Scene, skip: int, count: int, reset: bool, buffers: list[bytes]) -> dict[str, Any]:
    """Write `count` bins of the series after the first `skip`, as `Frame.series`; appends their bytes to `buffers`."""
    series = scene.series
    buffers.append(series.values[skip : skip + count].astype(_WIRE["f32"]).tobytes())
    return {
        "width": series.width,
        "first": series.first + skip,
        "count": count,
        "reset": reset,
        "buffer": len(buffers) - 1,
    }


BIN_BYTES = 4 * len(SERIES)
POINT_BYTES = 8
MAX_REACH_TEXT = 500  # characters of a sentence that says whether others reach a node
MAX_WAITS_TEXT = 240  # characters of a line that says what passes wait for


def write_curve(curve: Curve, number: int, start: int, count: int, buffers: list[bytes]) -> dict[str, Any]:
    """Write `count` points of a curve after the first `start`, as one of `Frame.curves`; appends their bytes."""
    points = np.stack([curve.at, curve.value], axis=1)[start : start + count]  # [count, 2]
    buffers.append(points.astype(_WIRE["f32"]).tobytes())
    return {"curve": number, "name": cut(curve.name), "start": start, "count": count, "buffer": len(buffers) - 1}


def write_waits(scene: Scene) -> list[str]:
    """Returns what passes wait for, a sentence for each layer and direction."""
    return [line[:MAX_WAITS_TEXT] for line in waits_lines(scene.waits)]


def write_reach(scene: Scene) -> list[str]:
    """Returns how safe the experts are, and whether others reach our node and servers, in sentences."""
    copies = [] if scene.copies is None else [scene.copies.words]
    return [line[:MAX_REACH_TEXT] for line in (*copies, *scene.reachability)]


def number(value: float, digits: int = 6) -> float | None:
    """Returns a number to so many significant digits; None if it is not finite."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def cut(text: str) -> str:
    """Returns a text, which a peer may have written, cut to `MAX_TEXT` characters."""
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"
