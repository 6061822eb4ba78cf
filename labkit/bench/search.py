"""`labkit bench search`: the search for experts in a simulated swarm, measured and printed."""

from __future__ import annotations

import json
import sys

from labkit.experiments.expert_search import SearchConfig, measure

__all__ = ["SearchConfig", "bench_search"]


def bench_search(config: SearchConfig, *, as_json: bool) -> None:
    """`labkit bench search`: measure, and print it."""
    print(f"building a swarm of {config.nodes} nodes, and searching it {config.searches} times …", file=sys.stderr)
    result = measure(config)
    if as_json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {number:g}" for key, number in value.items())
        print(f"  {name:<18}{value}")
