"""The expert grids as a heat map of load: the layout of its cells, and drawing them on a sheet.

`snapshot` draws it as a part of the dashboard, and `swarm_logging` logs it by itself. Other people choose the sizes of
grids, so any grid is drawn as at most `MAX_DRAWN_CELLS` cells, and never laid out in full.
"""

# n: cells to draw

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from labkit.view.picture.canvas import DIM, INK, Sheet, cividis, shorten, text_width
from labkit.view.picture.formatting import rate, whole
from labkit.view.scene import Bools, Doubles, Experts, Ints, Layer, Scene, State

MAX_DRAWN_CELLS = 4_096  # per layer
MAX_PLANES = 64  # two-dimensional slices of a grid with three dimensions or more
MAX_LAYERS = 4  # that are drawn side by side; if there are more, all of them are drawn as rows
MAX_LAYER_ROWS = 64
MAX_ASPECT = 16  # longer grids are wrapped into several lines
MAX_CELL_SIZE = 60  # pixels
WORST_FIRST = (State.DEAD, State.SUSPECT, State.STARTING, State.ALIVE)
UNKNOWN_COLOR = (0.925, 0.925, 0.925, 1.0)
EDGE_COLOR, HATCH_COLOR = "#bdbdbd", "#8a3b00"
LEGEND = (
    ("dead", math.nan, State.DEAD),
    ("suspect", 0.5, State.SUSPECT),
    ("unclaimed", math.nan, State.UNCLAIMED),
    ("not known", math.nan, State.ALIVE),
)


@dataclass(frozen=True, slots=True)
class Cells:
    """A layer's cells as they are drawn: `planes` grids of `rows` × `columns`."""

    planes: int
    rows: int
    columns: int
    bin: str  # what a cell stands for, if that is more than one place of the grid
    plane: Ints  # [n]
    row: Ints  # [n]
    column: Ints  # [n]
    load: Doubles  # [n], rows/s, mean of its experts; NaN: not known
    state: Ints  # [n], the most frequent `State` of its experts, or the worse of two that are equally frequent
    adopted: Bools  # [n], whether one of its experts came from another server


def lay_out(experts: Experts, number: int, layer: Layer) -> Cells:
    """Lay out the cells of one layer. A grid too long or with too many planes becomes one line that is wrapped."""
    mine = np.flatnonzero(experts.layer == number)
    cell, sizes = experts.cell[mine], layer.sizes
    high, wide = (sizes[-2], sizes[-1]) if len(sizes) > 1 else (1, sizes[0])
    planes = math.prod(sizes[:-2])
    if planes > MAX_PLANES or max(high, wide) > MAX_ASPECT * min(high, wide):
        total = min(math.prod(sizes), 2**62)  # cells beyond have no number
        factor = -(-total // MAX_DRAWN_CELLS)
        drawn = -(-total // factor)
        columns = min(drawn, max(MAX_ASPECT, math.isqrt(drawn - 1) + 1))
        planes, rows, place = 1, -(-drawn // columns), cell // factor
        what = "" if factor == 1 else f"{whole(factor)} places"
    else:
        factor = 1
        while planes * -(-high // factor) * -(-wide // factor) > MAX_DRAWN_CELLS:
            factor += max(1, factor // 8)
        rows, columns = -(-high // factor), -(-wide // factor)
        drawn = planes * rows * columns
        row, column = cell // wide % high // factor, cell % wide // factor
        place = (cell // (wide * high) * rows + row) * columns + column
        what = "" if factor == 1 else f"{factor} × {factor} places"
    load, state = _gather(place, experts.load[mine].astype(np.float64), experts.state[mine], drawn)
    adopted = np.zeros(drawn, dtype=np.bool_)
    some = place[experts.adopted[mine]]
    adopted[some[(some >= 0) & (some < drawn)]] = True
    there = np.arange(drawn)
    plane, row, column = there // (rows * columns), there // columns % rows, there % columns
    return Cells(planes, rows, columns, what, plane, row, column, load, state, adopted)


def _gather(place: Ints, load: Doubles, state: Ints, drawn: int) -> tuple[Doubles, Ints]:
    """Returns the load [n] and state [n] of each cell, from those of its experts."""
    inside = (place >= 0) & (place < drawn)
    place, load, state = place[inside], load[inside], state[inside]
    known = np.isfinite(load)
    count = np.bincount(place[known], minlength=drawn)
    total = np.bincount(place[known], weights=load[known], minlength=drawn)
    votes = np.stack([np.bincount(place[state == each], minlength=drawn) for each in WORST_FIRST])
    most = np.array(WORST_FIRST)[votes.argmax(axis=0)]
    return np.where(count > 0, total / np.maximum(count, 1), np.nan), np.where(votes.any(axis=0), most, State.UNCLAIMED)


def lay_out_layers(experts: Experts, layers: Sequence[Layer]) -> Cells:
    """Lay out the cells of several layers at once: a row for each layer, of its experts in their order."""
    sizes = np.array([min(math.prod(layer.sizes), 2**62) for layer in layers])
    widest = int(sizes.max())
    factor = -(-widest // (MAX_DRAWN_CELLS // len(layers)))
    columns = -(-widest // factor)
    mine = experts.layer < len(layers)
    layer, column = experts.layer[mine], experts.cell[mine] // factor
    place = np.where(column < columns, layer * columns + column, -1)
    drawn = len(layers) * columns
    load, state = _gather(place, experts.load[mine].astype(np.float64), experts.state[mine], drawn)
    adopted = np.zeros(drawn, dtype=np.bool_)
    adopted[place[(place >= 0) & experts.adopted[mine]]] = True
    there = np.arange(drawn)
    row, column = there // columns, there % columns
    real = column < -(-sizes // factor)[row]  # a layer may have fewer experts than others
    what = "" if factor == 1 else f"{whole(factor)} places"
    return Cells(
        1, len(layers), columns, what, np.zeros(int(real.sum()), np.int64), row[real], column[real], load[real],
        state[real], adopted[real],
    )  # fmt: skip


def draw_layers(sheet: Sheet, scene: Scene, x: float, y: float, width: float, height: float) -> None:
    """Draw all layers, with a legend below them: a few side by side as grids, more of them as rows of experts."""
    count, legend, gap = len(scene.layers), 44, 14
    if not count:
        sheet.text(x, y + 30, "No expert has been seen yet.", color=DIM, size=12)
        return
    if count > MAX_LAYERS:
        _draw_rows(sheet, scene, x, y, width, height - legend - 8)
    across = 1 if count == 1 else 2
    w, h = (width - gap * (across - 1)) / across, (height - legend) / -(-count // across)
    for number in range(count if count <= MAX_LAYERS else 0):
        _draw_layer(sheet, scene, number, x + number % across * (w + gap), y + number // across * h, w, h - 8)
    left = count - MAX_LAYER_ROWS
    _draw_legend(sheet, x, y + height - legend + 12, f"and {left} more layers" if left > 0 else "")


def _draw_rows(sheet: Sheet, scene: Scene, x: float, y: float, width: float, height: float) -> None:
    """Draw layers as rows, with their names on the left."""
    layers = scene.layers[:MAX_LAYER_ROWS]
    cells = lay_out_layers(scene.experts, layers)
    top = _most(cells.load)
    sheet.text(x, y + 12, f"{len(layers)} layers × experts", size=12, bold=True)
    sheet.text(x, y + 27, _of_load(top, cells), size=10.5, color=DIM)
    y, height = y + 34, height - 34
    high = min(height / cells.rows, MAX_CELL_SIZE / 2)
    size = 9.5
    step = math.ceil(size / high)  # each so many rows have their name
    names = ["" if number % step else shorten(layer.name, 20) for number, layer in enumerate(layers)]
    indent = max(text_width(name, size) for name in names) + 6
    wide = min((width - indent) / cells.columns, MAX_CELL_SIZE)
    high, wide = (math.floor(side) if side >= 4 else side for side in (high, wide))
    gap = 1 if min(high, wide) >= 5 else 0
    n = len(cells.row)
    px, py = x + indent + cells.column * wide, y + cells.row * high
    boxes = np.stack([px, py, np.full(n, wide - gap), np.full(n, high - gap)], 1)
    _draw_cells(sheet, cells.load, cells.state, boxes, top)
    _draw_corners(sheet, boxes[cells.adopted])
    for number, name in enumerate(names):
        if name:
            sheet.text(x, y + number * high + high / 2 + size / 3, name, size=size, color=DIM)


def _most(load: Doubles) -> float:
    return float(np.nanmax(load, initial=0.0)) if np.isfinite(load).any() else math.nan


def _of_load(top: float, cells: Cells) -> str:
    of = f"load, 0 to {rate(top)} rows/s" if top > 0 else "no load yet"
    return of + (f"; a cell: {cells.bin}" if cells.bin else "")


def _draw_layer(sheet: Sheet, scene: Scene, number: int, x: float, y: float, width: float, height: float) -> None:
    layer = scene.layers[number]
    cells = lay_out(scene.experts, number, layer)
    top = _most(cells.load)
    title = f"{layer.name} {' × '.join(map(str, layer.sizes))}"
    sheet.text(x, y + 12, shorten(title, int(width / 7.2)), size=12, bold=True)
    sheet.text(x, y + 27, shorten(_of_load(top, cells), int(width / 6)), size=10.5, color=DIM)
    y, height = y + 34, height - 34
    label = 13 if cells.planes > 1 else 0  # pixels, for the number of each plane

    def side(across: int) -> float:
        """Pixels of a cell with `across` planes side by side."""
        down = -(-cells.planes // across)
        return min(
            (width - 10 * (across - 1)) / across / cells.columns,
            (height / down - label - 4) / cells.rows,
            MAX_CELL_SIZE,
        )

    across = max(range(1, cells.planes + 1), key=side)
    size = max(side(across), 0.5)
    size = math.floor(size) if size >= 4 else size
    px = x + cells.plane % across * (cells.columns * size + 10) + cells.column * size
    py = y + cells.plane // across * (cells.rows * size + label + 4) + label + cells.row * size
    gap = 1 if size >= 5 else 0
    boxes = np.stack([px, py, np.full(len(px), size - gap), np.full(len(px), size - gap)], 1)
    _draw_cells(sheet, cells.load, cells.state, boxes, top)
    _draw_corners(sheet, boxes[cells.adopted])
    for plane in range(cells.planes if label else 0):
        where = np.unravel_index(plane, layer.sizes[:-2])
        corner = boxes[plane * cells.rows * cells.columns]
        name = shorten(f"{'.'.join(str(int(c)) for c in where)}.*", max(3, int(cells.columns * size / 6)))
        sheet.text(corner[0], corner[1] - 3, name, size=9.5, color=DIM)


def _draw_cells(sheet: Sheet, load: Doubles, state: Ints, boxes: Doubles, top: float) -> None:
    dead, free = state == State.DEAD, state == State.UNCLAIMED
    filled = ~dead & ~free
    thin = 0.72 if boxes[0, 2:].min() >= 4 else 0.4
    if filled.any():
        known = np.isfinite(load)
        colors = cividis(np.where(known, load, 0) / (top if top > 0 else 1))
        colors[~known] = UNKNOWN_COLOR
        sheet.boxes(boxes[filled], colors[filled])
    if free.any():
        sheet.boxes(_inside(boxes[free]), "none", edge=EDGE_COLOR, width=thin)
    if dead.any():
        sheet.boxes(_inside(boxes[dead]), "white", edge=HATCH_COLOR, width=thin)
        sheet.hatch(boxes[dead], HATCH_COLOR, thin)
    doubtful = np.isin(state, (State.SUSPECT, State.STARTING))
    if doubtful.any():
        _draw_dots(sheet, boxes[doubtful])


def _draw_corners(sheet: Sheet, boxes: Doubles) -> None:
    """Mark cells of adopted experts: a white square in a corner, which can be seen on any fill."""
    if len(boxes):
        side = boxes[0, 2:].min()
        size = np.full((len(boxes), 2), max(side / 4, min(side / 2, 3.0), 1.0))
        sheet.boxes(np.concatenate([boxes[:, :2], size], axis=1), "white", edge=INK, width=0.5)


def _draw_dots(sheet: Sheet, boxes: Doubles) -> None:
    """Draw a black dot within a white one, which can be seen on any fill."""
    middle = boxes[:, :2] + boxes[:, 2:] / 2
    size = float(np.clip(boxes[0, 2:].min() / 3, 1.5, 8))
    sheet.line(middle[:, 0], middle[:, 1], color="white", width=size, dots=True)
    sheet.line(middle[:, 0], middle[:, 1], color=INK, width=0.6 * size, dots=True)


def _inside(boxes: Doubles) -> Doubles:
    """Returns the boxes made half a pixel smaller on each side, so that their edges stay within."""
    smaller: Doubles = boxes + np.array([0.5, 0.5, -1.0, -1.0])
    return smaller


def _draw_legend(sheet: Sheet, x: float, y: float, more: str) -> None:
    shares = np.linspace(0, 1, 48)
    bar = np.stack([x + shares * 94, np.full(48, y), np.full(48, 2.2), np.full(48, 10)], 1)
    sheet.boxes(bar, cividis(shares))
    sheet.text(x, y + 23, "no load", size=10, color=DIM)
    sheet.text(x + 97, y + 23, "most", size=10, color=DIM, align="right")
    at = x + 116
    for word, load, state in LEGEND:
        box = np.array([[at, y - 1, 12.0, 12.0]])
        _draw_cells(sheet, np.array([load]), np.array([int(state)]), box, 1.0)
        sheet.text(at + 17, y + 9, word, size=10.5)
        at += 17 + text_width(word, 10.5) + 14
    box = np.array([[x + 116, y + 15, 12.0, 12.0]])
    sheet.boxes(box, UNKNOWN_COLOR)
    _draw_corners(sheet, box)
    sheet.text(x + 133, y + 25, "adopted", size=10.5)
    sheet.text(x + 200, y + 25, more, size=10, color=DIM)


def draw_heat_map(scene: Scene) -> bytes:
    """Draw the heat map alone and return it as a PNG of 640 × 640 pixels."""
    sheet = Sheet(640, 640)
    draw_layers(sheet, scene, 16, 12, 608, 612)
    return sheet.png()
