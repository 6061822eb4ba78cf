"""What the benchmarks have in common: their figures, the comparison with a peer library, and their kinds of experts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from labkit.paths import user_path

BETTER_IF_LESS = {  # our figure -> the peer's figure that it is compared with
    "store_s": "store_s", "get_s": "get_s", "get_any_s": "get_s", "forward_s": "forward_s", "backward_s": "backward_s",
}  # fmt: skip
BETTER_IF_MORE = ("calls_per_s", "samples_per_s")
PEER_FIGURES = {  # benchmark -> figures that a peer's script prints
    "rpc": BETTER_IF_MORE, "moe": ("samples_per_s", "forward_s", "backward_s"), "dht": ("store_s", "get_s"),
}  # fmt: skip
DURATION_OPTIONS = {"calls", "passes", "rounds"}  # they change how precisely something is measured, but not what
PEER_KIND_NAMES = {"ffn2": "ffn", "ffn": None}  # our kind -> the peer's, whose `ffn` is a third of ours
PEER_DEFAULTS: dict[str, dict[str, Any]] = {  # benchmark -> options that the peer always has and does not print
    "rpc": {"codec": "none", "servers": 1, "relay": False},
    "moe": {"expert": "ffn"},
}


# ---------------------------------------------------------------- figures


def check_at_least(least: int, config: object, *names: str) -> None:
    """Raise `ValueError` if one of a config's fields is below `least`."""
    for name in names:
        if getattr(config, name) < least:
            raise ValueError(f"{name}={getattr(config, name)}: at least {least}")


def milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    """Returns percentiles of durations, in milliseconds: `p50_ms`, `p95_ms`, `p99_ms`."""
    ordered = sorted(seconds)
    return {
        f"p{percent}_ms": round(1000 * ordered[min(len(ordered) - 1, len(ordered) * percent // 100)], 3)
        for percent in (50, 95, 99)
    }


def ratios_to(result: Mapping[str, Any], peer: Mapping[str, float]) -> dict[str, float]:
    """Returns how many times better each figure is than the peer's, unless one of the two is 0.

    A peer's get accepts any copy of a value, so both of our gets are compared with it.
    """
    pairs = {name: (result[name], peer[name]) for name in BETTER_IF_MORE if name in result and name in peer}
    pairs |= {
        name: (peer[theirs], result[name])
        for name, theirs in BETTER_IF_LESS.items()
        if name in result and theirs in peer
    }
    return {f"{name}_to_peer": round(more / less, 2) for name, (more, less) in pairs.items() if more > 0 and less > 0}


def read_peer(path: str, bench: str, options: Mapping[str, Any]) -> dict[str, float]:
    """Read the figures of a peer from the last line of its script's output.

    Args:
        path: The file with the output.
        bench: The benchmark, such as "rpc".
        options: Our options of that benchmark.

    Raises:
        ValueError: The file has no figures, or its `work` is not what the benchmark does with these options.
    """
    try:
        peer = json.loads(user_path(path, "peer_json").read_text().strip().splitlines()[-1])
        figures = {name: float(peer[name]) for name in PEER_FIGURES[bench] if name in peer}
        work = {**PEER_DEFAULTS.get(bench, {}), **peer.get("work", {})}
    except (OSError, ValueError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"peer_json={path}: not the output of a peer's script ({error})") from None
    if not figures:
        raise ValueError(f"peer_json={path}: it has none of {', '.join(PEER_FIGURES[bench])}")
    for name, ours in options.items():
        if name in work and name not in DURATION_OPTIONS and work[name] != PEER_KIND_NAMES.get(ours, ours):
            hint = "; what is ffn there is ffn2 here" if name == "expert" else ""
            raise ValueError(
                f"peer_json={path}: the peer was measured with {name}={work[name]}, and here it is {name}={ours}; "
                f"measure both with the same{hint}"
            )
    return figures


def show(result: Mapping[str, Any], *, as_json: bool) -> None:
    """Print a result, as JSON or as a table."""
    if as_json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        if isinstance(value, dict):
            some = (f"{key} {one:g}" if isinstance(one, float) else f"{key} {one}" for key, one in value.items())
            value = ", ".join(some)
        print(f"  {name:<28}{value}")


# ---------------------------------------------------------------- kinds of experts


EXPERT_KINDS = {"nop": "nop", "ffn": "ffn", "ffn2": "labkit.bench.report:TwoLayers"}


class TwoLayers(nn.Module):
    """The expert that the peer calls `ffn`. Ours is the paper's, with three times the parameters and arithmetic.

    [rows, hidden] -> the same: hidden -> 4 * hidden -> hidden with GELU, a residual, and LayerNorm.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.inner = nn.Linear(hidden, 4 * hidden)
        self.outer = nn.Linear(4 * hidden, hidden)
        self.norm = nn.LayerNorm(hidden, eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.norm(x + self.outer(functional.gelu(self.inner(x), approximate="tanh")))
        return output
