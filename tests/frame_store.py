"""A page's memory, in Python: frames are applied as the front end applies them, and checked as they come."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from labkit.view.scene import SERIES

DTYPES = {"u8": "u1", "u16": "<u2", "u32": "<u4", "i32": "<i4", "f32": "<f4", "scaled": "<u2"}


class FrameStore:
    """What the frames so far have told. `columns[table, column]`: [rows] or [rows, width], NaN where nothing came."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.header: dict[str, Any] = {}
        self.layers: list[dict[str, Any]] = []
        self.text: list[tuple[str, str, str]] = []
        self.marks: list[tuple[float, str]] = []
        self.curves: list[tuple[str, np.ndarray]] = []  # name, [points, 2]
        self.waits: list[str] = []
        self.reach: list[str] = []
        self.width, self.first = 0.0, 0
        self.series = np.zeros((0, len(SERIES)), np.float32)
        self.columns: dict[tuple[str, str], np.ndarray] = {}
        self.sent: list[tuple[str, str, int, int]] = []  # pieces of the last frame: table, column, start, count
        self.bytes = 0  # of the last frame

    def apply(self, header: dict[str, Any], buffers: list[bytes]) -> None:
        text = json.dumps(header, allow_nan=False)
        header = json.loads(text)
        if header["reset"]:
            self.reset()
        self.header = header
        self.bytes = len(text) + sum(map(len, buffers))
        self.layers = header.get("layers", self.layers)
        if "server_text" in header:
            start, rows = header["server_text"]["start"], [tuple(row) for row in header["server_text"]["rows"]]
            assert start <= len(self.text), "rows of servers' text were left out"
            self.text[start : start + len(rows)] = rows
        self.marks += [(at, text) for at, text in header.get("marks", ())]
        used = set()
        if "series" in header:
            self._append(header["series"], buffers)
            used.add(header["series"]["buffer"])
        self.waits = header.get("waits", self.waits)
        self.reach = header.get("reach", self.reach)
        for curve in header.get("curves", ()):
            self._draw(curve, buffers[curve["buffer"]])
            used.add(curve["buffer"])
        self.sent = []
        for piece in header["pieces"]:
            self._place(piece, buffers[piece["buffer"]])
            used.add(piece["buffer"])
        assert used == set(range(len(buffers))), "a buffer that nothing is said about"

    def _append(self, series: dict[str, Any], buffers: list[bytes]) -> None:
        values = np.frombuffer(buffers[series["buffer"]], "<f4").reshape(series["count"], len(SERIES))
        if series["reset"]:
            self.width, self.first, self.series = series["width"], series["first"], values
            return
        assert (series["width"], series["first"]) == (self.width, self.first + len(self.series)), "bins were left out"
        self.series = np.concatenate([self.series, values])

    def _draw(self, curve: dict[str, Any], buffer: bytes) -> None:
        number, start = curve["curve"], curve["start"]
        assert number <= len(self.curves), "a curve was left out"
        known = self.curves[number][1] if number < len(self.curves) else np.empty((0, 2), np.float32)
        assert start <= len(known), "points were left out"
        points = np.frombuffer(buffer, "<f4").reshape(curve["count"], 2)
        self.curves[number : number + 1] = [(curve["name"], np.concatenate([known[:start], points]))]

    def _place(self, piece: dict[str, Any], buffer: bytes) -> None:
        key = piece["table"], piece["column"]
        start, stop = piece["start"], piece["start"] + piece["count"]
        assert 0 <= start < stop <= piece["size"]
        values = np.frombuffer(buffer, DTYPES[piece["dtype"]]).astype(np.float64)
        if piece["dtype"] == "scaled":
            values = np.where(values == 65535, np.nan, values / 65534 * piece["max"])
        shape = (piece["count"], piece["width"]) if piece["width"] > 1 else (piece["count"],)
        column = self.columns.get(key, np.empty((0, *shape[1:])))
        more = piece["size"] - len(column)
        assert more >= 0, "a table became shorter"
        if more:
            column = np.concatenate([column, np.full((more, *shape[1:]), np.nan)])
        column[start:stop] = values.reshape(shape)
        self.columns[key] = column
        self.sent.append((*key, start, piece["count"]))

    def column(self, table: str, name: str) -> np.ndarray:
        """A column as the page has it."""
        return self.columns[table, name]

    def names(self) -> set[str]:
        """The columns that the last frame held something of, as `experts.load`."""
        return {f"{table}.{column}" for table, column, _, _ in self.sent}
