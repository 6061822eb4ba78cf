"""What passes wait for: the last passes of each layer, summed up for a scene, a summary or a row of a logger."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from labkit.view.collect.telemetry import Telemetry
from labkit.view.scene import Waits

LATELY = 30.0  # seconds
SHOWN_LATE = 3  # experts
MAX_SHOWN = 8  # layers × directions
MIN_LATE_SHARE = 0.02  # of the passes, in which an expert that is named was given up


def waits_of(telemetry: Telemetry, now: float, server_of: Callable[[str], str] = lambda uid: "") -> tuple[Waits, ...]:
    """Returns what passes waited for lately, by layer and direction.

    Args:
        telemetry: Has counted the passes.
        now: Monotonic seconds.
        server_of: Returns the label of an expert's server; "" if it is not known.
    """
    found: list[Waits] = []
    for layer, direction in sorted(list(telemetry.passes), key=lambda kind: (kind[0], kind[1] != "forward")):
        passes = [one for one in telemetry.passes[layer, direction].copy() if one.at >= now - LATELY]
        if not passes or len(found) >= MAX_SHOWN:
            continue
        count, late = len(passes), Counter(uid for one in passes for uid in one.late)
        most = [(uid, server_of(uid)) for uid, times in late.most_common(SHOWN_LATE) if times >= MIN_LATE_SHARE * count]
        seconds, waited = sum(one.seconds for one in passes) / count, sum(one.waited for one in passes) / count
        patience = max(one.patience for one in passes)  # 0 where there was nothing to wait for
        found.append(Waits(layer, direction, seconds, waited, patience, tuple(most)))
    return tuple(found)
