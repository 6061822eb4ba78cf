"""What the benchmarks have in common: their figures, and how they are printed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

BETTER_IF_LESS = {  # and which of the peer's it is beside
    "store_s": "store_s", "get_s": "get_s", "get_any_s": "get_s", "forward_s": "forward_s", "backward_s": "backward_s",
}  # fmt: skip
BETTER_IF_MORE = ("calls_per_s", "samples_per_s")
PEERS = {  # of a benchmark, the peer's
    "rpc": BETTER_IF_MORE, "moe": ("samples_per_s", "forward_s", "backward_s"), "dht": ("store_s", "get_s"),
}  # fmt: skip
HOW_LONG = {"calls", "passes", "rounds"}  # options that change how well something is measured, not what
CALLED = {"ffn2": "ffn", "ffn": None}  # by the peer, whose `ffn` is a third of ours
UNSAID: dict[str, dict[str, Any]] = {
    "rpc": {"codec": "none", "servers": 1},
    "moe": {"expert": "ffn"},
}  # by the peer of what it always does


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
    """How many times better each figure is than the peer's, but where one is 0. (A peer's get takes any copy, so it is
    beside both.)"""
    pairs = {name: (result[name], peer[name]) for name in BETTER_IF_MORE if name in result and name in peer}
    pairs |= {
        name: (peer[theirs], result[name])
        for name, theirs in BETTER_IF_LESS.items()
        if name in result and theirs in peer
    }
    return {f"{name}_to_peer": round(more / less, 2) for name, (more, less) in pairs.items() if more > 0 and less > 0}


def read_peer(path: str, bench: str, options: Mapping[str, Any]) -> dict[str, float]:
    """The figures in the last line of what a peer's script printed. Raises `ValueError`, also if its `work` is not what
    `bench` does with these options."""
    try:
        peer = json.loads(Path(path).read_text().strip().splitlines()[-1])
        figures = {name: float(peer[name]) for name in PEERS[bench] if name in peer}
        work = {**UNSAID.get(bench, {}), **peer.get("work", {})}
    except (OSError, ValueError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"peer_json={path}: not the output of a peer's script ({error})") from None
    if not figures:
        raise ValueError(f"peer_json={path}: it has none of {', '.join(PEERS[bench])}")
    for name, ours in options.items():
        if name in work and name not in HOW_LONG and work[name] != CALLED.get(ours, ours):
            hint = "; what is ffn there is ffn2 here" if name == "expert" else ""
            raise ValueError(
                f"peer_json={path}: the peer was measured with {name}={work[name]}, and here it is {name}={ours}; "
                f"measure both with the same{hint}"
            )
    return figures


def show(result: Mapping[str, Any], *, as_json: bool) -> None:
    """Print it."""
    if as_json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        if isinstance(value, dict):
            some = (f"{key} {one:g}" if isinstance(one, float) else f"{key} {one}" for key, one in value.items())
            value = ", ".join(some)
        print(f"  {name:<28}{value}")


KINDS = {"nop": "nop", "ffn": "ffn", "ffn2": "labkit.bench.report:TwoLayers"}


class TwoLayers(nn.Module):
    """What the peer calls `ffn`: a third of the parameters, and of the arithmetic, of ours, which is the paper's.

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
