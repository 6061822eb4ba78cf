"""The progress bar of a run: loss, samples/s and experts alive, in a terminal, a notebook or a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from labkit.errors import SwarmClosed
from labkit.training.run import Run

POLL_PERIOD = 0.1  # seconds between two looks at the run
LOG_PERIOD = 10.0  # seconds between two lines in a file or a pipe


def show_progress(
    run: Run,
    experts_alive: Callable[[], int],
    *,
    label: str = "training",
    on_tick: Callable[[int], None] | None = None,
    file: TextIO | None = None,
) -> Run:
    """Show a progress bar until the run is over. An interrupt ends the bar, not the run.

    Args:
        run: The run.
        experts_alive: Returns how many experts are alive, as `swarm.experts_alive` does.
        label: Stands before the bar.
        on_tick: Called with the number of steps done, some ten times a second.
        file: Where the bar is written, by default standard error.

    Returns:
        The run.

    Raises:
        Exception: The error that ended the run, if there was one.
    """
    from tqdm.auto import tqdm  # here, since in a notebook it brings widgets

    shown = 0.0
    with tqdm(total=run.total_steps, desc=label, unit="step", file=file, dynamic_ncols=True) as bar:
        period = POLL_PERIOD if _is_watched(bar, file) else LOG_PERIOD
        while run.running:
            if time.monotonic() >= shown + period:
                shown = time.monotonic()
                _show(bar, run, experts_alive)
            if on_tick is not None:
                on_tick(run.steps)
            time.sleep(POLL_PERIOD)
        _show(bar, run, experts_alive)
    return run.wait()


def _is_watched(bar: Any, file: TextIO | None) -> bool:
    """Whether the bar is a widget, or text that overwrites itself."""
    return hasattr(bar, "container") or (file or sys.stderr).isatty()


def _show(bar: Any, run: Run, experts_alive: Callable[[], int]) -> None:
    try:
        alive = str(experts_alive())
    except SwarmClosed:
        alive = "none, the swarm is closed"
    bar.set_postfix(
        {"loss": f"{run.loss:.3f}", "samples/s": f"{run.samples_per_s:,.0f}", "experts": alive}, refresh=False
    )
    bar.n = run.steps
    bar.refresh()
