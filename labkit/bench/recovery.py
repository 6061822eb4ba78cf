"""Recovery: what a swarm keeps of its training while its servers leave for good, in virtual time, with the same code.

The same swarm is run once more without failures, to compare: for some minutes, since it makes as many updates in each.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from labkit.bench.processes import peak_rss_mb
from labkit.bench.recovery_run import RecoveryConfig, count_in_virtual_time

__all__ = ["RecoveryConfig", "measure"]


def measure(config: RecoveryConfig) -> dict[str, Any]:
    """Train with failures, and without.

    Returns:
        What `--json` prints. `kept` are updates that are part of the experts at the end.
    """
    started = time.perf_counter()
    steady, failing = (count_in_virtual_time(config, fails) for fails in (False, True))
    kept = steady.kept * failing.minutes / steady.minutes
    return {
        **asdict(config),
        "minutes": round(failing.minutes, 2),
        "servers_left": failing.left,
        "effective_ratio": round(failing.kept / max(1.0, kept), 4),
        "kept": failing.kept,
        "kept_without_failures": round(kept),
        "minutes_without_failures": round(steady.minutes, 2),
        "updates_lost": max(0, failing.made - failing.kept),
        "experts_taken_over": failing.taken_over,
        "experts_lost": failing.lost,
        "seconds_without": _percentiles(failing.gaps),
        "failed_calls": failing.failed_calls,
        "calls": failing.calls,
        "copies_to_training_bytes": round(steady.copy_bytes / max(1, steady.training_bytes), 4),
        "copy_mb": round(steady.copy_bytes / 1e6, 1),
        "training_mb": round(steady.training_bytes / 1e6, 1),
        "wall_s": round(time.perf_counter() - started, 1),
        "peak_rss_mb": peak_rss_mb(),
    }


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    ordered = sorted(seconds) or [0.0]
    some = {f"p{p}": ordered[min(len(ordered) - 1, len(ordered) * p // 100)] for p in (50, 95)}
    return {name: round(value, 2) for name, value in {**some, "max": ordered[-1]}.items()}
