"""The progress bar of servers that start on a cluster, which takes a while: how many run, and on which hosts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from labkit.launch.handle import ServerHandle
from labkit.launch.order import ServeOrder

SHOW_AFTER = 1.0  # seconds after which a bar is shown
LOG_PERIOD = 10.0  # seconds between two lines in a file or a pipe


@contextmanager
def show_order(order: ServeOrder) -> Iterator[Callable[[], None] | None]:
    """Show how far an order to serve is, if that is at a cluster. Yields what `show_start` does, or None."""
    if order.cluster is None:
        yield None
        return
    with show_start(order.handles, order.servers) as show:
        yield show


@contextmanager
def show_start(
    handles: Sequence[ServerHandle], total: int, *, file: TextIO | None = None, delay: float = SHOW_AFTER,
    period: float | None = None,
) -> Iterator[Callable[[], None]]:  # fmt: skip
    """Show how servers start, for the length of the block.

    Args:
        handles: The servers, as soon as there are some.
        total: How many there will be.
        file: Where the bar is written, by default standard error.
        delay: Seconds after which it is shown.
        period: Seconds between two changes; by default as they suit the place.

    Yields:
        What to call now and then, in this thread.
    """
    from tqdm.auto import tqdm  # here, since in a notebook it brings widgets

    if period is None:
        period = 0.0 if (file or sys.stderr).isatty() or "ipykernel" in sys.modules else LOG_PERIOD
    with tqdm(
        total=total, desc="starting servers", unit="server", file=file, dynamic_ncols=True, delay=delay,
        mininterval=period,
    ) as bar:  # fmt: skip

        def show() -> None:
            running = [handle for handle in handles if handle.alive]
            hosts = sorted({handle.host for handle in running})
            if running:
                bar.set_postfix_str(f"on {', '.join(hosts[:3])}{' …' if len(hosts) > 3 else ''}", refresh=False)
            bar.update(len(running) - bar.n)

        yield show
        show()
