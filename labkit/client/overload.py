"""Overload: when a server that has too much to do is asked again. Plain functions, the time passed in.

A server that says `Overloaded` is neither gone nor late: it computed nothing, and will have room again. It is asked
again after a pause that doubles each time, up to the middle of the pass. Then its rows go to others while there is
time.
"""

from __future__ import annotations

import zlib

FIRST_PAUSE = 0.05  # seconds; doubled each time
LONGEST_PAUSE = 1.0  # seconds
SPREAD = 0.5  # share by which a pause is shorter or longer, lest all callers come back at the same time
SHARE = 0.5  # of the time of a pass, or a call, in which an overloaded server is asked again


def pause_before(tries: int, since: float, now: float, deadline: float, uid: str) -> float | None:
    """The seconds until the server is asked again; None if that would be too late.

    Args:
        tries: How often it was asked.
        since: When it was asked first.
        now: The time.
        deadline: Of the pass, or of the call.
        uid: The expert. It and the time decide on the spread, so that a simulation can be repeated.
    """
    spread = 2 * (zlib.crc32(f"{uid} {tries} {now!r}".encode()) / (1 << 32)) - 1  # -1 to 1
    pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** (tries - 1)) * (1 + SPREAD * spread)
    return pause if now + pause <= since + SHARE * (deadline - since) else None
