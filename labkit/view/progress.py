"""The progress bar of a run: loss, samples/s and experts alive, in a terminal, a notebook or a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from labkit.errors import SwarmClosed
from labkit.training.run import Run

PERIOD = 0.1  # seconds between two looks at the run
LOG_PERIOD = 10.0  # seconds between two lines where nobody watches: a file, a pipe


def show_progress(
    run: Run,
    experts_alive: Callable[[], int],
    *,
    label: str = "training",
    on_tick: Callable[[int], None] | None = None,
    file: TextIO | None = None,
) -> Run:
    """Show a progress bar until the run is over. Raises what ended it, if that was an error.

    `on_tick`: called with the number of steps done, some ten times a second. An interrupt ends the bar, not the run.
    """
    from tqdm.auto import tqdm  # here, since in a notebook it brings widgets

    shown = 0.0
    with tqdm(total=run.total_steps, desc=label, unit="step", file=file, dynamic_ncols=True) as bar:
        period = PERIOD if _is_watched(bar, file) else LOG_PERIOD
        while run.running:
            if time.monotonic() >= shown + period:
                shown = time.monotonic()
                _show(bar, run, experts_alive)
            if on_tick is not None:
                on_tick(run.steps)
            time.sleep(PERIOD)
        _show(bar, run, experts_alive)
    return run.wait()


def _is_watched(bar: Any, file: TextIO | None) -> bool:
    """Whether it is a widget, or text that overwrites itself."""
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
