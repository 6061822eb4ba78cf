"""A run as a file: JSON for pandas, and an HTML page that replays it offline with a time slider.

The page contains the bundle of `frontend/src/replay_page.ts` and the recording as data. It runs that one script and
nothing else: text that peers may have written is either data or escaped.
"""

# B: bins of time

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import importlib.metadata
import importlib.resources
import json
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from labkit.errors import CAUSES, LabkitError
from labkit.view.page.columns import (
    STATIC,
    Header,
    number,
    write_curve,
    write_layer,
    write_mark,
    write_opening,
    write_piece,
    write_reach,
    write_series,
    write_servers,
    write_waits,
)
from labkit.view.scene import PERCENTILES, SERIES, SPLIT, Curve, Experts, Scene, Series, Servers, State, Waits

STATIC_FILES = importlib.resources.files("labkit.view") / "static"

PAGE_TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
{style}
</style>
</head>
<body>
<main id="labkit-replay"></main>
<noscript>This recording is replayed by the script inside this page, and scripts are switched off.</noscript>
<script type="application/octet-stream" id="labkit-recording">{recording}</script>
<script type="module">{script}</script>
</body>
</html>
"""
REPLAY_POLICY = (
    "default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
)


def to_json(scene: Scene) -> bytes:
    """Export everything in a scene as JSON; what is not known is null.

    The keys are `labkit` (its version), `swarm`, `seconds` since the start, `wall` (Unix time), `source` and
    `headline`; `series`, with a list for each name and `t`, the seconds at which bins begin; `curves`, what was
    measured while training: by name, lists of `t`, `step` and `value`; and `experts`, `servers`, `marks` and `waits`
    (what passes wait for), lists of records; and `reachability`, sentences that say whether others reach our nodes;
    and `copies`, a sentence that says whether experts have copies elsewhere.

        frame = pandas.DataFrame(json.load(open("labkit-default.json"))["series"])
    """
    opening = write_opening(scene, reset=True, control=False)
    return json.dumps(
        {
            "labkit": importlib.metadata.version("labkit"),
            "swarm": scene.swarm,
            "seconds": opening["at"],
            "wall": opening["wall"],
            "source": scene.source,
            "headline": opening["headline"],
            "series": _series(scene.series),
            "curves": {curve.name: _curve(curve) for curve in scene.curves},
            "waits": [_waits(one) for one in scene.waits],
            "reachability": list(scene.reachability),
            "copies": None if scene.copies is None else scene.copies.words,
            "experts": _experts(scene),
            "servers": _servers(scene.servers),
            "marks": [{"t": round(mark.at, 3), "text": mark.text} for mark in scene.marks],
        },
        allow_nan=False,
    ).encode()


def to_html(scene: Scene, keyframes: Iterable[tuple[Header, list[bytes]]]) -> bytes:
    """Export an HTML page that replays the keyframes until `scene`, the last one.

    Args:
        scene: The last scene. It provides layers, series and marks.
        keyframes: Frames of whole columns, and the buffers of each.

    Raises:
        LabkitError: This copy of labkit has no bundled front end.
    """
    recording = {
        "static": _frame(*static_frame(scene)),
        "keyframes": [_frame(header, buffers) for header, buffers in keyframes],
        "swarm": scene.swarm,
        "seconds": round(scene.at, 3),
    }
    packed = gzip.compress(json.dumps(recording, allow_nan=False).encode(), compresslevel=6, mtime=0)
    # These words would end the script element. In a bundle they only occur within strings, where `<` may be escaped.
    script = re.sub(r"<(?=/script|!--)", r"\\x3c", _read("replay.js"), flags=re.IGNORECASE)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = PAGE_TEMPLATE.format(
        policy=REPLAY_POLICY.format(digest=digest),
        title=html.escape(f"labkit: swarm {scene.swarm}"),
        style=_read("dashboard.css").replace("</", r"<\/"),
        recording=base64.b64encode(packed).decode(),
        script=script,
    )
    return page.encode()


def static_frame(scene: Scene) -> tuple[Header, list[bytes]]:
    """The frame that a replay begins with: layers, servers' text, experts' places, the whole series and all marks."""
    header, buffers = write_opening(scene, reset=True, control=False), list[bytes]()
    header["layers"] = [write_layer(layer) for layer in scene.layers]
    header["server_text"] = {"start": 0, "rows": write_servers(scene.servers)}
    header["marks"] = [write_mark(mark) for mark in scene.marks]
    header["series"] = write_series(scene, 0, len(scene.series.values), True, buffers)
    header["curves"] = [write_curve(one, n, 0, len(one.at), buffers) for n, one in enumerate(scene.curves)]
    header["waits"], header["reach"] = write_waits(scene), write_reach(scene)
    for column in STATIC:
        values = column.read(scene)
        header["pieces"].append(write_piece(column, values, 0, len(values), buffers))
    return header, buffers


def _frame(header: Header, buffers: Iterable[bytes]) -> dict[str, Any]:
    return {"header": header, "buffers": [base64.b64encode(buffer).decode() for buffer in buffers]}


def _read(name: str) -> str:
    """Read a file of the front end, with newlines as a browser counts them."""
    try:
        return (STATIC_FILES / name).read_text(encoding="utf-8").replace("\r\n", "\n").replace("\r", "\n").strip()
    except FileNotFoundError:
        raise LabkitError(
            f"labkit/view/static/{name} is missing, so there is no page to export: run `make frontend` in labkit's "
            "repository, or install labkit from a release. PNG and JSON are exported without it"
        ) from None


def _series(series: Series) -> dict[str, list[float | None]]:
    starts = (series.first + np.arange(len(series.values))) * series.width  # [B]
    columns = {name: list(map(number, series.values[:, column].tolist())) for column, name in enumerate(SERIES)}
    return {"t": [round(start, 6) for start in starts.tolist()], **columns}


def _curve(curve: Curve) -> dict[str, list[float | None]]:
    return {
        "t": [round(at, 3) for at in curve.at.tolist()],
        "step": curve.step.tolist(),
        "value": list(map(number, curve.value.tolist())),
    }


def _waits(waits: Waits) -> dict[str, Any]:
    times = {name: number(getattr(waits, name)) for name in ("seconds", "waited", "patience")}
    late = [{"uid": uid, "server": server or None} for uid, server in waits.late]
    return {"layer": waits.layer, "direction": waits.direction, **times, "late": late}


def _experts(scene: Scene) -> list[dict[str, Any]]:
    experts: Experts = scene.experts
    labels = [*scene.servers.labels, None]  # server -1: not known
    columns = {
        "uid": experts.uids,
        "server": [labels[row] for row in experts.server.tolist()],
        "state": [State(state).name.lower() for state in experts.state.tolist()],
        "load": map(number, experts.load.tolist()),
        "latency_ms": map(number, experts.latency.tolist()),
        "failures": map(number, experts.failures.tolist()),
        "staleness": map(number, experts.staleness.tolist()),
        "calls": experts.calls.tolist(),
        "failed": experts.failed.tolist(),
        "updates": experts.updates.tolist(),
        "adopted": experts.adopted.tolist(),
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _servers(servers: Servers) -> list[dict[str, Any]]:
    percentiles = [f"p{percent}" for percent in PERCENTILES]
    return [
        {
            "label": servers.labels[row],
            "address": servers.addresses[row],
            "local": int(servers.local[row]) if servers.local[row] >= 0 else None,
            "state": State(int(servers.state[row])).name.lower(),
            "word": servers.words[row],
            "heard_seconds": number(float(servers.heard[row])),
            "experts": int(servers.experts[row]),
            "experts_alive": int(servers.alive[row]),
            "calls": number(float(servers.calls[row])),
            "queue": number(float(servers.queue[row])),
            "latency_ms": {
                part: dict(zip(percentiles, map(number, times), strict=True))
                for part, times in zip(SPLIT, servers.latency[row].tolist(), strict=True)
            },
            "failed": {
                cause: count for cause, count in zip(CAUSES, servers.failed[row].tolist(), strict=True) if count
            },
            "copies": number(float(servers.copies[row])),
            "adopted": number(float(servers.adopted[row])),
            "injected": dict(zip(("latency", "loss"), map(number, servers.injected[row].tolist()), strict=True)),
        }
        for row in range(len(servers.labels))
    ]
