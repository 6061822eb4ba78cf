"""The dashboard as one picture, drawn in Python from the same scene as the widget, for places without a front end.

`swarm.snapshot()` shows what `draw` returns, and a dashboard leaves it behind in the saved notebook. The same scene
gives the same bytes.
"""

# B: bins of time

from __future__ import annotations

import datetime
from collections.abc import Sequence

import numpy as np

from labkit.errors import CAUSES
from labkit.view.picture.canvas import DIM, FAINT, INK, Align, Picture, Sheet, clip, shorten, text_width
from labkit.view.picture.formatting import (
    CAUSE_WORDS,
    NOTHING_KNOWN,
    age,
    amount,
    clock,
    failures,
    figures,
    rate,
    whole,
)
from labkit.view.picture.heat_map import draw_layers
from labkit.view.scene import PERCENTILES, SERIES, SPLIT, Doubles, Scene, Servers, State, waits_lines

__all__ = ["Picture", "draw"]

WIDTH, HEIGHT = 1200, 800  # pixels
CURVES_HEIGHT = 180  # pixels more, where there are learning curves
SHOWN_CURVES = 6
MARGIN = 20  # pixels
SHOWN_SERVERS = 12
SHOWN_MARKS = 3  # the last marks, with their text
LINED_MARKS = 40  # the last marks, as lines in the timeline
MAX_BARS = 110
CAUSE_COLORS = {
    "timeout": "#E69F00", "refused": "#56B4E9", "overloaded": "#009E73", "lost": "#D55E00", "bad_reply": "#CC79A7",
    "cancelled": "#999999", "failed": "#000000",
}  # fmt: skip
LINE_COLOR = "#0072B2"
BAD_COLOR = "#B23C00"
STATE_SIGNS = {State.ALIVE: "●", State.SUSPECT: "◐", State.STARTING: "◌", State.DEAD: "✕", State.UNCLAIMED: "·"}


def draw(scene: Scene) -> bytes:
    """Draw the dashboard on white, in colours that colour-blind people can tell apart.

    Returns:
        A PNG of 1200 × 800 pixels; 1200 × 980 with learning curves.

    Raises:
        ImportError: Matplotlib is not installed.
    """
    sheet = Sheet(WIDTH, HEIGHT + (CURVES_HEIGHT if scene.curves else 0))
    _draw_title(sheet, scene)
    _draw_numbers(sheet, scene, 52)
    sheet.line([MARGIN, WIDTH - MARGIN], [104, 104], color=FAINT)
    _title(sheet, MARGIN, 126, "Routing")
    draw_layers(sheet, scene, MARGIN, 132, 400, 398)
    _draw_servers(sheet, scene.servers, 446, 126)
    _draw_sentences(sheet, scene, 446, 538)
    sheet.line([MARGIN, WIDTH - MARGIN], [546, 546], color=FAINT)
    _draw_charts(sheet, scene, 568)
    _draw_curves(sheet, scene, 782)
    return sheet.png()


def _draw_sentences(sheet: Sheet, scene: Scene, x: float, y: float) -> None:
    """Draw how safe the experts are, and what passes wait for; the last line at `y`."""
    lines = [*([] if scene.copies is None else [scene.copies.words]), *waits_lines(scene.waits)[:2]]
    room = 3 if len(scene.servers.labels) <= SHOWN_SERVERS else 2
    for number, line in enumerate(reversed(lines[:room])):
        sheet.text(x, y - 16 * number, clip(line, 118), size=11)


def _title(sheet: Sheet, x: float, y: float, text: str) -> None:
    sheet.text(x, y, text, size=13, bold=True)


# ---------------------------------------------------------------- the headline


def _draw_title(sheet: Sheet, scene: Scene) -> None:
    head = scene.headline
    name = f"swarm {shorten(scene.swarm, 32)}"
    sheet.text(MARGIN, 30, name, size=17, bold=True)
    state = "closed" if not scene.open else "training" if head.running or head.logging else "open, nothing trains"
    sheet.text(
        MARGIN + text_width(name, 17, bold=True) + 16, 30, state, size=13, color=INK if scene.open else BAD_COLOR
    )
    when = datetime.datetime.fromtimestamp(scene.wall, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    source = "counted from this process's calls" if scene.source == "calls" else "as the servers report"
    sheet.text(
        WIDTH - MARGIN, 30, f"{clock(scene.at)} after the start, at {when}; {source}", color=DIM, align="right"
    )  # fmt: skip


def _draw_numbers(sheet: Sheet, scene: Scene, y: float) -> None:
    head = scene.headline
    traffic, unit = amount(head.bytes)
    failed = sum(head.failed.values())
    failing = (whole(failed), f"failed, of {whole(head.answered + failed)} calls", failed > 0)
    if scene.source == "servers":  # this process made no calls, and knows of no failures
        failing = (NOTHING_KNOWN, f"failed; {whole(head.answered)} answered", False)
    risk = head.at_risk > 0  # not for NaN
    experts = f"experts, {whole(head.at_risk)} at risk" if risk else "experts"
    tiles: Sequence[tuple[str, str, bool]] = (
        (f"{whole(head.experts_alive)} of {whole(head.experts)}", experts, risk or head.experts_alive < head.experts),
        (f"{whole(head.servers_alive)} of {whole(head.servers)}", "servers", head.servers_alive < head.servers),
        (whole(head.steps) if head.total_steps or head.steps else "–", _of_steps(head.total_steps), False),
        (figures(head.loss), "loss", False),
        (rate(head.samples), "samples/s", False),
        (rate(head.calls), "calls/s", False),
        (traffic, f"{unit}/s", False),
        (whole(head.in_flight), "in flight", False),
        (rate(head.staleness), "staleness", False),
        failing,
    )
    x = float(MARGIN)
    for (value, label, bad), width in zip(tiles, (160, 130, *(97,) * 7, 190), strict=True):
        size = min(17.0, 17 * (width - 8) / text_width(value, 17, bold=True))
        sheet.text(x, y + 16, value, size=size, bold=True, color=BAD_COLOR if bad else INK)
        sheet.text(x, y + 34, label, size=11, color=DIM)
        x += width


def _of_steps(total: int) -> str:
    return f"steps of {whole(total)}" if 0 < total < 1_000_000 else "steps"


# ---------------------------------------------------------------- servers

# Of each column: its left or right edge, its title and the alignment.
TABLE_COLUMNS: Sequence[tuple[int, str, Align]] = (
    (16, "server", "left"), (155, "state", "left"), (230, "heard", "right"), (294, "experts", "right"),
    (332, "copies", "right"), (378, "adopted", "right"), (418, "calls/s", "right"), (455, "queue", "right"),
    (495, "p50 ms", "right"), (525, "p95", "right"), (555, "p99", "right"), (565, "queue·comp·net", "left"),
    (655, "failures", "left"),
)  # fmt: skip


def _draw_servers(sheet: Sheet, servers: Servers, x: float, y: float) -> None:
    _title(sheet, x, y, "Servers, worst first")
    order = servers.worst_first()
    if not order:
        sheet.text(x, y + 30, "No server has been seen yet.", color=DIM, size=12)
        return
    y += 24
    for at, name, align in TABLE_COLUMNS:
        sheet.text(x + at, y, name, size=10, color=DIM, align=align)
    sheet.line([x, WIDTH - MARGIN], [y + 5, y + 5], color=FAINT)
    for i in order[:SHOWN_SERVERS]:
        y += 27
        _draw_server(sheet, servers, i, x, y)
    rest = order[SHOWN_SERVERS:]
    if rest:
        alive = int((servers.state[rest] == State.ALIVE).sum())
        left = f"and {whole(len(rest))} more, {'all' if alive == len(rest) else whole(alive)} of them alive"
        sheet.text(x, y + 27, left, color=DIM)


def _draw_server(sheet: Sheet, servers: Servers, i: int, x: float, y: float) -> None:
    state = State(int(servers.state[i]))
    bad = state in (State.DEAD, State.SUSPECT)
    held, alive = int(servers.experts[i]), int(servers.alive[i])
    p50, p95, p99 = (rate(float(servers.latency[i, 0, q])) for q in range(len(PERCENTILES)))
    split = "·".join(rate(float(servers.latency[i, part, 0])) for part in range(1, len(SPLIT)))
    failed = {cause: int(n) for cause, n in zip(CAUSES, servers.failed[i], strict=True)}
    word = servers.words[i]
    known = (
        shorten(servers.labels[i], 20), shorten(word, 11), age(float(servers.heard[i])),
        whole(held) if alive == held else f"{whole(alive)} of {whole(held)}", whole(float(servers.copies[i])),
        whole(float(servers.adopted[i])), rate(float(servers.calls[i])), rate(float(servers.queue[i])), p50, p95, p99,
        split if split != "–·–·–" else "–",
    )  # fmt: skip
    sheet.text(x, y, STATE_SIGNS[state], size=12, color=BAD_COLOR if bad else INK)
    for (at, name, align), text in zip(TABLE_COLUMNS[:-1], known, strict=True):
        sheet.text(
            x + at, y, text, size=10.5 if name != "server" else 11, align=align, bold=name == "server" and bad,
            color=BAD_COLOR if bad and name == "state" else INK,
        )  # fmt: skip
    total, _, causes = failures(failed).partition(" ")
    sheet.text(x + TABLE_COLUMNS[-1][0], y - 5 if causes else y, total, size=10.5)
    if causes:
        sheet.text(x + TABLE_COLUMNS[-1][0], y + 7, clip(causes.strip("()"), 17), size=9, color=DIM)


# ---------------------------------------------------------------- time


def _draw_charts(sheet: Sheet, scene: Scene, y: float) -> None:
    """Draw four lines and the failures, all over the same time."""
    series, height = scene.series, 118.0
    values = series.values.astype(np.float64)
    start = series.first * series.width
    middles = start + (np.arange(len(values), dtype=np.float64) + 0.5) * series.width  # [B]
    span = (start, max(scene.at, start + len(values) * series.width, start + 1e-3))
    wide, gap = 148.0, 26.0
    x = float(MARGIN)
    for name, title in (
        ("loss", "Loss"), ("samples", "Samples/s"), ("calls", "Calls/s"), ("staleness", "Staleness, updates"),
    ):  # fmt: skip
        _title(sheet, x, y + 10, title)
        column = values[:, SERIES.index(name)]
        _draw_line(sheet, middles, column, span, (x, y + 28, wide, height))
        x += wide + gap
    _draw_failures(sheet, scene, span, (x + 4, y, WIDTH - MARGIN - x - 4, height))


def _draw_curves(sheet: Sheet, scene: Scene, y: float) -> None:
    """Draw the first learning curves, and say how many more there are. A curve fills its box from top to bottom."""
    series = scene.series
    start = series.first * series.width
    span = (start, max(scene.at, start + 1e-3))
    x, wide, gap = float(MARGIN), 170.0, 26.0
    for curve in scene.curves[:SHOWN_CURVES]:
        known = curve.value[np.isfinite(curve.value)]
        last = f" {figures(float(known[-1]))}" if len(known) else ""
        _title(sheet, x, y + 10, f"{shorten(curve.name, 24 - len(last))}{last}")
        _draw_line(sheet, curve.at, curve.value, span, (x, y + 28, wide, 100.0), zero=False)
        x += wide + gap
    rest = len(scene.curves) - SHOWN_CURVES
    if rest > 0:
        sheet.text(WIDTH - MARGIN, y + 170, f"and {rest} more", color=DIM, align="right")


def _draw_line(
    sheet: Sheet, t: Doubles, values: Doubles, span: tuple[float, float], box: tuple[float, float, float, float],
    zero: bool = True,
) -> None:  # fmt: skip
    x, y, width, height = box
    known = np.where(np.isfinite(values), values, np.nan)
    if not np.isfinite(known).any():
        _draw_frame(sheet, box, span, "")
        sheet.text(x + width / 2, y + height / 2, "nothing known", color=DIM, align="center")
        return
    low, top = float(np.nanmin(known)), float(np.nanmax(known))
    low = min(0.0, low) if zero else low
    _draw_frame(sheet, box, span, figures(top) if top > 0 or not zero else "", "0" if low == 0 else figures(low))
    top = top if top > low else low + 1.0
    px = x + (t - span[0]) / (span[1] - span[0]) * width
    py = y + (top - known) / (top - low) * height
    sheet.line(px, py, color=LINE_COLOR, width=1.5)
    alone = np.isfinite(py) & ~np.isfinite(np.r_[np.nan, py[:-1]]) & ~np.isfinite(np.r_[py[1:], np.nan])
    if alone.any():  # a point without neighbours makes no line
        sheet.line(px[alone], py[alone], color=LINE_COLOR, width=4, dots=True)


def _draw_frame(
    sheet: Sheet, box: tuple[float, float, float, float], span: tuple[float, float], top: str, low: str = "0"
) -> None:
    x, y, width, height = box
    sheet.line([x, x + width], [y, y], color=FAINT, width=0.7)
    sheet.line([x, x + width], [y + height, y + height], color=DIM, width=0.9)
    sheet.text(x, y - 4, top, size=10, color=DIM)
    sheet.text(x + width, y + height - 4, low if low != "0" else "", size=10, color=DIM, align="right")
    sheet.text(x, y + height + 14, clock(span[0]), size=10, color=DIM)
    sheet.text(x + width, y + height + 14, clock(span[1]), size=10, color=DIM, align="right")


def _draw_failures(
    sheet: Sheet, scene: Scene, span: tuple[float, float], box: tuple[float, float, float, float]
) -> None:
    """Draw failed calls as bars stacked by cause, and marks as vertical lines."""
    x, y, width, height = box
    _title(sheet, x, y + 10, "Failures by cause")
    _draw_causes(sheet, scene, x + 138, y + 10, x + width)
    plot = (x, y + 28, width, height)
    series = scene.series
    counts = np.nan_to_num(series.values[:, SERIES.index(CAUSES[0]) :].astype(np.float64))  # [B, causes]
    per_bar = max(1, -(-len(counts) // MAX_BARS))
    edges = np.arange(0, len(counts), per_bar)
    bars = np.add.reduceat(counts, edges) if len(counts) else counts
    top = float(bars.sum(axis=1).max()) if len(bars) else 0.0
    seconds = age(per_bar * series.width)
    _draw_frame(sheet, plot, span, f"{whole(top)} in {seconds}" if top > 0 else "")
    if top > 0:
        scale = width / (span[1] - span[0])
        px = x + (series.first * series.width + edges * series.width - span[0]) * scale
        bar = max(per_bar * series.width * scale - 1, 1.0)
        stack = np.cumsum(bars, axis=1) / top * height  # pixels above the ground
        for number, cause in enumerate(CAUSES):
            some = bars[:, number] > 0
            if some.any():
                high, wide = bars[some, number] / top * height, np.full(int(some.sum()), bar)
                up = plot[1] + height - stack[some, number]
                sheet.boxes(np.stack([px[some], up, wide, high], 1), CAUSE_COLORS[cause])
    elif not scene.headline.failed:
        nothing = "no call has failed" if scene.source == "calls" else "no call was made from here"
        sheet.text(x + width / 2, plot[1] + height / 2, nothing, color=DIM, align="center")
    _draw_marks(sheet, scene, span, plot)


def _draw_causes(sheet: Sheet, scene: Scene, x: float, y: float, end: float) -> None:
    """Draw the legend: the causes that have occurred, with their colours and counts since the start."""
    for cause in CAUSES:
        count = scene.headline.failed.get(cause, 0)
        word = f"{CAUSE_WORDS.get(cause, cause)} {whole(count)}"
        if not count:
            continue
        if x + 15 + text_width(word, 10.5) > end:
            sheet.text(x, y, "…", color=DIM)
            return
        sheet.boxes([[x, y - 9, 10, 10]], CAUSE_COLORS[cause])
        sheet.text(x + 14, y, word, size=10.5)
        x += 14 + text_width(word, 10.5) + 8


def _draw_marks(sheet: Sheet, scene: Scene, span: tuple[float, float], box: tuple[float, float, float, float]) -> None:
    x, y, width, height = box
    seen = [mark for mark in scene.marks if span[0] <= mark.at <= span[1]][-LINED_MARKS:]
    for mark in seen:
        at = x + (mark.at - span[0]) / (span[1] - span[0]) * width
        sheet.line([at, at], [y, y + height], color=INK, width=0.8, dashed=True)
        sheet.text(at, y + 1, "▼", size=9, align="center")
    for number, mark in enumerate(seen[-SHOWN_MARKS:]):
        sheet.text(x, y + height + 31 + 14 * number, f"▼ {clock(mark.at)} {clip(mark.text, 76)}", size=10.5)
