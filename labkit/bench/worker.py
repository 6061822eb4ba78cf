"""A process of a benchmark: what `crew.Crew` starts. It takes orders on its standard input, one JSON value a line.

A role is a generator: it is made with its first order, what it yields is printed, and what it is sent is the next
order. So the first thing that it yields says that it is ready. When the parent is gone, it ends.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
from collections.abc import Callable, Generator
from queue import SimpleQueue
from typing import Any

Role = Callable[[Any], Generator[Any, Any, None]]

TIME_LIMIT = 900.0  # seconds; a benchmark that takes longer hangs


def main() -> None:
    """`python -m labkit.bench.worker MODULE:ROLE`."""
    orders: SimpleQueue[Any] = SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            orders.put(json.loads(line))
        os._exit(1)

    threading.Thread(target=read, daemon=True).start()
    last_resort = threading.Timer(TIME_LIMIT, os._exit, [1])
    last_resort.daemon = True
    last_resort.start()
    module, _, name = sys.argv[1].partition(":")
    role: Role = getattr(importlib.import_module(f"labkit.bench.{module}"), name)
    steps = role(orders.get())
    order = None
    try:
        while True:
            print(json.dumps(steps.send(order)), flush=True)
            order = orders.get()
    except StopIteration:
        pass


if __name__ == "__main__":
    main()
