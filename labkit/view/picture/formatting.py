"""Numbers as text, in pictures as in the widget (`frontend/src/format.ts`): NaN, which is not known, is "–"."""

from __future__ import annotations

import math
from collections.abc import Mapping

NOTHING_KNOWN = "–"

CAUSE_WORDS = {"lost": "lost connection", "bad_reply": "bad reply"}  # shown instead of these `errors.CAUSES`


def whole(value: float) -> str:
    """A whole number: 4,120."""
    return f"{value:,.0f}" if math.isfinite(value) else NOTHING_KNOWN


def figures(value: float) -> str:
    """About three significant figures: 0.012, 0.412, 4.12, 41.2, 412, 4,120."""
    if not math.isfinite(value):
        return NOTHING_KNOWN
    size = abs(value)
    if size == 0 or size >= 99.95:
        return whole(value)
    if size < 1e-4:
        return f"{value:.1e}"
    return f"{value:.{1 if size >= 9.995 else 2 if size >= 0.9995 else 3 if size >= 0.01 else 4}f}"


def rate(value: float) -> str:
    """A rate to two significant figures: 88, 7.4, 0.25."""
    if not math.isfinite(value):
        return NOTHING_KNOWN
    if value >= 9.95 or value == 0:
        return whole(value)
    return f"{value:.{1 if value >= 0.995 else 2}f}"


def amount(value: float) -> tuple[str, str]:
    """A number of bytes and its unit: ("3.02", "MB")."""
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "KB")):
        if value >= size * 0.9995 and math.isfinite(value):
            return figures(value / size), unit
    return whole(value), "B"


def age(seconds: float) -> str:
    """A duration: 0.3 s, 12 s, 3 min, 2 h."""
    if not math.isfinite(seconds):
        return NOTHING_KNOWN
    if seconds < 9.95:
        return f"{max(0.0, seconds):.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def clock(seconds: float) -> str:
    """A time since the start: 0:07, 12:05, 1:02:05."""
    total = max(0, int(seconds))
    hours, minutes, rest = total // 3600, total // 60 % 60, total % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def failures(failed: Mapping[str, int]) -> str:
    """Failures in all and by cause, the most frequent first: 3 (lost 2, timeout 1)."""
    some = sorted(((cause, n) for cause, n in failed.items() if n > 0), key=lambda item: -item[1])
    if not some:
        return "0"
    causes = ", ".join(f"{cause.replace('_', ' ')} {whole(n)}" for cause, n in some)
    return f"{whole(sum(n for _, n in some))} ({causes})"
