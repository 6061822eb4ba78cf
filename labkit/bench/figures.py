"""What the benchmarks have in common: their figures, and how they are printed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

BETTER_IF_LESS = {"store_s": "store_s", "get_s": "get_s", "get_any_s": "get_s"}  # and which of the peer's it is beside
BETTER_IF_MORE = ("calls_per_s", "samples_per_s")
PEERS = (*BETTER_IF_MORE, *dict.fromkeys(BETTER_IF_LESS.values()))


def check_at_least(least: int, config: object, *names: str) -> None:
    """Raises `ValueError` for a field below."""
    for name in names:
        if getattr(config, name) < least:
            raise ValueError(f"{name}={getattr(config, name)}: at least {least}")


def milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    """Percentiles of some durations."""
    ordered = sorted(seconds)
    return {
        f"p{percent}_ms": round(1000 * ordered[min(len(ordered) - 1, len(ordered) * percent // 100)], 3)
        for percent in (50, 95, 99)
    }


def ratios_to(result: Mapping[str, Any], peer: Mapping[str, float]) -> dict[str, float]:
    """How many times better each figure is than the peer's. (A peer's get takes any copy, so it is beside both.)"""
    ratios = {name: result[name] / peer[name] for name in BETTER_IF_MORE if name in result and name in peer}
    ratios |= {
        name: peer[theirs] / result[name]
        for name, theirs in BETTER_IF_LESS.items()
        if name in result and theirs in peer
    }
    return {f"{name}_to_peer": round(ratio, 2) for name, ratio in ratios.items()}


def against_peer(result: Mapping[str, Any], path: str) -> dict[str, float]:
    """How many times better than the last line of what a peer's script printed. Raises `ValueError`."""
    try:
        peer = json.loads(Path(path).read_text().strip().splitlines()[-1])
        numbers = {name: float(peer[name]) for name in PEERS if name in peer}
    except (OSError, ValueError, IndexError, TypeError) as error:
        raise ValueError(f"peer_json={path}: not the output of a peer's script ({error})") from None
    ratios = ratios_to(result, numbers)
    if not ratios:
        raise ValueError(f"peer_json={path}: it has none of {', '.join(PEERS)}")
    return ratios


def show(result: Mapping[str, Any], *, as_json: bool) -> None:
    """Print it."""
    if as_json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {number:g}" for key, number in value.items())
        print(f"  {name:<24}{value}")
