"""Ports that are free, and stay so until a test listens there.

The system gives out ports of a range of its own, to whoever asks for any, and to each connection: one of those that was
free a moment ago may be taken by now. So these are below that range, and each process begins somewhere else.
"""

from __future__ import annotations

import itertools
import os
import socket

FIRST, LAST = 10_000, 19_999
_next = itertools.count(os.getpid() * 61)


def free_ports(count: int = 1) -> int:
    """Returns the first of so many free ports in a row."""
    for number in itertools.islice(_next, LAST - FIRST):
        first = FIRST + number * count % (LAST - FIRST - count)
        sockets = [socket.socket() for _ in range(count)]
        try:
            for offset, one in enumerate(sockets):
                one.bind(("0.0.0.0", first + offset))
            return first
        except OSError:
            continue
        finally:
            for one in sockets:
                one.close()
    raise AssertionError("no ports are free")
