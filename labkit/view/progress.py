"""The progress bar of a run: loss, samples/s and experts alive, in a terminal or a notebook."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TextIO

from labkit.trainer import Run

PERIOD = 0.1  # seconds between two looks at the run


def show_progress(
    run: Run,
    experts_alive: Callable[[], int],
    *,
    label: str = "training",
    on_tick: Callable[[int], None] | None = None,
    file: TextIO | None = None,
) -> Run:
    """Show a progress bar until the run is over. Raises what ended it, if that was an error.

    `on_tick`: called with the number of steps done, some ten times a second.
    """
    from tqdm.auto import tqdm  # here, since in a notebook it brings widgets

    with tqdm(total=run.total_steps, desc=label, unit="step", file=file, dynamic_ncols=file is None) as bar:
        while run.running:
            _update(bar, run, experts_alive())
            if on_tick is not None:
                on_tick(run.steps)
            time.sleep(PERIOD)
        _update(bar, run, experts_alive())
    return run.wait()


def _update(bar: object, run: Run, alive: int) -> None:
    bar.update(run.steps - bar.n)  # type: ignore[attr-defined]
    shown = {"loss": f"{run.loss:.3f}", "samples/s": f"{run.samples_per_s:,.0f}", "experts": alive}
    bar.set_postfix(shown)  # type: ignore[attr-defined]
