"""Frames for one page: scenes in, frames out, each with what the page has not been sent yet, within a budget.

A page's numbers may be a few frames old, but a frame never grows with the swarm. `pages` decides when a page gets a
frame; `columns` writes its pieces; `frontend/src/types.ts` has the format.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from labkit.view.page.columns import (
    BIN_BYTES,
    COLUMNS,
    POINT_BYTES,
    SHADES,
    STATES,
    STATIC,
    Column,
    Header,
    Values,
    write_curve,
    write_layer,
    write_mark,
    write_opening,
    write_piece,
    write_reach,
    write_series,
    write_server,
    write_waits,
)
from labkit.view.scene import ALL_LAYERS, Mark, Scene

FRAME_BUDGET = 60_000  # bytes of a frame: its header as JSON, and its buffers
MIN_FRAME_BUDGET = 20_000  # bytes: room for the longest texts, and for something beside them
PIECE_OVERHEAD = 220  # bytes of JSON that a piece takes at most, or any other part beside its rows
BLOCK_BYTES = 2048  # of a column that go together

Row = TypeVar("Row")

# The block with the highest age × weight goes first: in the end all go, those that the page looks at soonest.
NEW_EXPERT_WEIGHT = 1000  # without its place it cannot be drawn
STATE_WEIGHT = 20
SHOWN_MODE_WEIGHT = 16  # the mode of the heat map that the page looks at
SERVER_WEIGHT = 8
OTHER_LAYER_STATE_WEIGHT = 4  # a state in a layer that the page does not look at
OTHER_MODE_WEIGHT = 2
TOTAL_WEIGHT = 1


class FrameWriter:
    """Makes the frames for one page. If a frame may not have reached the page, go on with a new writer.

    Args:
        budget: Bytes that a frame takes at most, in all. Raises `ValueError` if no frame fits into it.
    """

    def __init__(self, budget: int = FRAME_BUDGET) -> None:
        if budget < MIN_FRAME_BUDGET:
            raise ValueError(f"budget={budget}: a frame needs {MIN_FRAME_BUDGET} bytes at least")
        self._budget = budget
        self._forget()

    def _forget(self) -> None:
        self._fresh = True
        self._layers: list[dict[str, Any]] = []
        self._text: list[tuple[str, str, str]] = []
        self._text_row = 0  # where text goes on
        self._marks: set[Mark] = set()
        self._width, self._next_bin = 0.0, 0  # of the series
        self._curves: dict[int, tuple[int, int]] = {}  # by number: version, and how many points were sent
        self._waits: list[str] = []
        self._reach: list[str] = []
        self._columns = [_Sent(column) for column in COLUMNS]

    def frame(self, scene: Scene, *, layer: int, mode: str, control: bool) -> tuple[Header, list[bytes]]:
        """Returns what the page is to be sent now: a `Frame` without its `seq`, and its buffers.

        The writer's first frame has `reset`, and so has one after a table became shorter.

        Args:
            scene: The swarm as it looks now.
            layer: Number of the layer that the page looks at, whose cells come first, or `ALL_LAYERS`.
            mode: What its heat map shows, which comes first too.
            control: Whether its buttons work.
        """
        if any(sent.rows > _rows(scene, sent.column) for sent in self._columns):
            self._forget()
        header = write_opening(scene, reset=self._fresh, control=control)
        buffers: list[bytes] = []
        # 1. what is always whole
        room = self._budget - _size(header) - PIECE_OVERHEAD
        room -= self._write_layers(scene, header, room // 2)
        room -= self._write_marks(scene, header, room // 4)
        room -= self._write_waits(scene, header)
        room -= self._write_reach(scene, header)
        # 2. what has been added
        room -= self._write_series(scene, header, buffers, room * 3 // 5)
        room -= self._write_text(scene, header, room // 2 if self._fresh else room // 3)
        room -= self._write_curves(scene, header, buffers, room // 3)
        # 3. columns, the most urgent blocks first
        self._write_columns(scene, header, buffers, room, layer, mode)
        self._fresh = False
        return header, buffers

    def _write_layers(self, scene: Scene, header: Header, room: int) -> int:
        """Write all layers when one is new; those without room are never sent. Returns the bytes that they take."""
        layers = [write_layer(layer) for layer in scene.layers]
        if layers == self._layers and not self._fresh:
            return 0
        self._layers = layers
        header["layers"], taken = _as_many(layers, room)
        return taken

    def _write_marks(self, scene: Scene, header: Header, room: int) -> int:
        self._marks &= set(scene.marks)  # no more than the scene has
        new = [mark for mark in scene.marks if mark not in self._marks]
        if not new:
            return 0
        rows, taken = _as_many([write_mark(mark) for mark in new], room)
        self._marks.update(new[: len(rows)])
        header["marks"] = rows
        return taken

    def _write_waits(self, scene: Scene, header: Header) -> int:
        lines = write_waits(scene)
        if lines == self._waits:
            return 0
        self._waits = header["waits"] = lines
        return _size(lines) + PIECE_OVERHEAD

    def _write_reach(self, scene: Scene, header: Header) -> int:
        lines = write_reach(scene)
        if lines == self._reach:
            return 0
        self._reach = header["reach"] = lines
        return _size(lines) + PIECE_OVERHEAD

    def _write_curves(self, scene: Scene, header: Header, buffers: list[bytes], room: int) -> int:
        """The points since the last frame, and all of a curve whose points were merged, as far as there is room."""
        taken, written = 0, list[Header]()
        for number, curve in enumerate(scene.curves):
            version, sent = self._curves.get(number, (curve.version, 0))
            start = sent if version == curve.version else 0
            cost = PIECE_OVERHEAD + _size(curve.name)
            count = min(len(curve.at) - start, (room - taken - cost) // POINT_BYTES)
            if count <= 0 or number > len(self._curves):  # a page takes them in their order
                continue
            written.append(write_curve(curve, number, start, count, buffers))
            self._curves[number] = curve.version, start + count
            taken += cost + count * POINT_BYTES
        if written:
            header["curves"] = written
        return taken

    def _write_series(self, scene: Scene, header: Header, buffers: list[bytes], room: int) -> int:
        """The bins since the last frame; when those do not follow on what was sent, or are too many, the last ones."""
        series, bins = scene.series, len(scene.series.values)
        skip = self._next_bin - series.first
        new, fit = bins - skip, max(room - PIECE_OVERHEAD, 0) // BIN_BYTES
        reset = series.width != self._width or not 0 <= skip <= bins or new > fit
        if reset:
            skip, new = max(bins - fit, 0), min(bins, fit)
        if not new and not (reset and self._width):
            return 0
        self._width, self._next_bin = series.width, series.first + bins
        header["series"] = write_series(scene, skip, new, reset, buffers)
        return PIECE_OVERHEAD + new * BIN_BYTES

    def _write_text(self, scene: Scene, header: Header, room: int) -> int:
        """Write the texts of servers, from one that has changed to the last that has, or as many as there is room for.

        The next frame goes on after them, so that words that change all the time do not hold up others.
        """
        servers = scene.servers
        text = list(zip(servers.labels, servers.addresses, servers.words, strict=True))
        if text == self._text:
            return 0
        known = len(self._text)
        changed = [row for row, words in enumerate(text) if row >= known or words != self._text[row]]
        start = next((row for row in changed if row >= self._text_row), changed[0])
        end = changed[-1] + 1
        rows, taken = _as_many((write_server(servers, row) for row in range(start, end)), room)
        self._text_row = start + len(rows)
        self._text[start : self._text_row] = text[start : self._text_row]
        if rows:
            header["server_text"] = {"start": start, "rows": rows}
        return taken

    def _write_columns(
        self, scene: Scene, header: Header, buffers: list[bytes], room: int, layer: int, mode: str
    ) -> None:
        in_layer = (scene.experts.layer == layer) | (layer == ALL_LAYERS)
        urgency = [sent.look(_values(scene, sent.column)) * _weights(sent, in_layer, mode) for sent in self._columns]
        lengths = [len(blocks) for blocks in urgency]
        column_of = np.repeat(np.arange(len(lengths)), lengths)
        block_of = np.concatenate([np.arange(length) for length in lengths])
        everything = np.concatenate(urgency)
        chosen: list[set[int]] = [set() for _ in lengths]
        order = np.argsort(-everything, kind="stable")  # ties: in the order of COLUMNS
        for place in order[: np.count_nonzero(everything)].tolist():
            if room < PIECE_OVERHEAD:
                break
            number, block = int(column_of[place]), int(block_of[place])
            mine = chosen[number]
            cost = self._columns[number].block_bytes(block)
            if block - 1 not in mine and block + 1 not in mine:
                cost += PIECE_OVERHEAD  # it starts a piece of its own
            if cost <= room:
                room -= cost
                mine.add(block)
        for sent, blocks in zip(self._columns, chosen, strict=True):
            for start, stop in sent.take(blocks):
                header["pieces"].append(write_piece(sent.column, sent.values, start, stop, buffers))


class _Sent:
    """A column as the page has it. Rows are compared and sent in blocks of about `BLOCK_BYTES`."""

    def __init__(self, column: Column) -> None:
        self.column = column
        self.step = max(BLOCK_BYTES // column.row_bytes, 1)  # rows a block
        self.values: Values = np.empty(0)  # [rows] or [rows, width], as of now
        self._sent: Values = np.empty(0)
        self.new = np.empty(0, bool)  # [blocks], has rows that were never sent
        self._age = np.empty(0, np.int64)  # [blocks], for how many frames it has differed from what was sent

    @property
    def rows(self) -> int:
        return len(self.values)

    def look(self, values: Values) -> npt.NDArray[np.int64]:
        """Take the column as it is now. Returns for each block for how many frames the page has been without it."""
        if len(values) != len(self._sent):
            self._grow(values)
        self.values = values
        if not len(values):
            return self._age
        other = _bits(values) != _bits(self._sent)  # [rows] or [rows, width]; by bits, so that NaN equals NaN
        if other.ndim == 2:
            other = other.any(axis=1)
        changed = np.logical_or.reduceat(other, np.arange(0, len(values), self.step))  # [blocks]
        self._age = np.where(changed | self.new, self._age + 1, 0)
        return self._age

    def _grow(self, values: Values) -> None:
        known, rows = len(self._sent), len(values)
        blocks = -(-rows // self.step)
        more = blocks - len(self.new)
        self._sent = np.concatenate([self._sent, values[known:]]) if known else values.copy()
        self.new = np.concatenate([self.new, np.zeros(more, bool)])
        self.new[known // self.step :] = True
        self._age = np.concatenate([self._age, np.zeros(more, np.int64)])

    def block_bytes(self, block: int) -> int:
        """Returns the bytes that the rows of a block take."""
        return (min((block + 1) * self.step, len(self.values)) - block * self.step) * self.column.row_bytes

    def take(self, blocks: set[int]) -> list[tuple[int, int]]:
        """Take note that these blocks are sent now. Returns them as runs of rows."""
        runs: list[tuple[int, int]] = []
        for block in sorted(blocks):
            start, stop = block * self.step, min((block + 1) * self.step, len(self.values))
            self._sent[start:stop] = self.values[start:stop]
            self._age[block], self.new[block] = 0, False
            if runs and runs[-1][1] == start:
                runs[-1] = runs[-1][0], stop
            else:
                runs.append((start, stop))
        return runs


def _weights(sent: _Sent, in_layer: npt.NDArray[np.bool_], mode: str) -> npt.NDArray[np.int64]:
    """Returns how much the age of each block matters [blocks]. `in_layer`: experts in the layer looked at [experts]."""
    column, blocks = sent.column, len(sent.new)
    if column in STATIC:
        return np.where(sent.new, NEW_EXPERT_WEIGHT, STATE_WEIGHT)
    if column.table == "servers":
        return np.full(blocks, STATE_WEIGHT if column in STATES else SERVER_WEIGHT)
    if blocks and (column in STATES or column.name == mode):
        here = np.logical_or.reduceat(in_layer, np.arange(0, len(in_layer), sent.step))  # [blocks]
        return (
            np.where(here, STATE_WEIGHT, OTHER_LAYER_STATE_WEIGHT)
            if column in STATES
            else np.where(here, SHOWN_MODE_WEIGHT, OTHER_MODE_WEIGHT)
        )
    return np.full(blocks, OTHER_MODE_WEIGHT if column in SHADES else TOTAL_WEIGHT)


def _as_many(rows: Iterable[Row], room: int) -> tuple[list[Row], int]:
    """Returns the first rows, as many as there is room for as JSON, and the bytes that they take."""
    taken, fitting = PIECE_OVERHEAD, list[Row]()
    for row in rows:
        taken += _size(row) + 2
        if taken > room:
            return fitting, taken - _size(row) - 2
        fitting.append(row)
    return fitting, taken


def _values(scene: Scene, column: Column) -> Values:
    return np.ascontiguousarray(column.read(scene))


def _rows(scene: Scene, column: Column) -> int:
    return len(scene.experts.uids if column.table == "experts" else scene.servers.labels)


def _bits(values: Values) -> Values:
    return values.view(np.int32) if values.dtype == np.float32 else values


def _size(value: Any) -> int:
    """Returns the bytes of a value as JSON."""
    return len(json.dumps(value))
