"""What the dashboard costs the training beside it: `python -m tests.measure_dashboard [--crowd 200]`. Not a test.

A kernel trains over four server processes. Round after round it does so with no dashboard, with one that nobody looks
at, and with one that a page looks at, in an order that changes; the page is played over the kernel's own sockets, and
acknowledges each frame. Each round gives two ratios of samples/s. Printed are their means, of the middle four fifths
since a busy machine gives wild ones, and the range that holds the true mean with 95 % probability.

`--crowd N`: beside it N further servers of 50 experts each, as the dashboard sees them: nodes with keys and addresses
of their own, declared in the DHT and asked for their statistics, which change. One process answers for all of them, and
there are no experts behind it, since two cores could not compute for 10,000.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean

from tests.front_end import WIDGET, FrontEnd, open_kernel

SWARM = """
import time, torch, labkit as lk
from torch import nn
swarm = lk.Swarm()
swarm.serve("ffn", hidden=64, grid=(4, 4), servers=4, isolation="process", threads=1, seed=0)
data = lk.load("digits")
model = nn.Sequential(nn.Linear(data.dim, 64), swarm.moe(64, k_best=4), nn.Linear(64, data.classes))
run = lk.fit(model, data, steps=10_000_000, batch_size=64, trainers=4)
"""
KINDS = ("none", "closed", "open")


def speed(kernel: FrontEnd, seconds: float) -> tuple[float, float]:
    """Steps per second of the next seconds, and how many those were."""
    before, started = kernel.value("(run.steps, time.monotonic())")
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        try:
            kernel.until(lambda: time.monotonic() >= deadline, left + 0.1)  # takes what the kernel sends meanwhile
        except AssertionError:
            break
    after, ended = kernel.value("(run.steps, time.monotonic())")
    return (after - before) / (ended - started), ended - started


def measure(kernel: FrontEnd, rounds: int, seconds: float) -> dict[str, object]:
    ratios: dict[str, list[float]] = {"closed": [], "open": []}
    frames: list[float] = []
    sizes: list[int] = []
    for number in range(rounds):
        found = {}
        for kind in random.sample(KINDS, len(KINDS)):
            page = None
            if kind != "none":
                comm = kernel.run("dashboard = swarm.dashboard()\ndashboard").bundle[WIDGET]["model_id"]
                if kind == "open":
                    page = kernel.page(comm)
                    page.look(fresh=True)
            speed(kernel, 0.5)  # settles
            if page is not None:
                page.look()
            seen = len(page.frames) if page is not None else 0
            found[kind], took = speed(kernel, seconds)
            if page is not None:
                frames.append((len(page.frames) - seen) / took)
                sizes += [len(json.dumps(h)) + sum(map(len, b)) for _, h, b in page.frames[seen:]]
                page.look(False)
            if kind != "none":
                kernel.run("dashboard.close()")
        for kind, values in ratios.items():
            values.append(found[kind] / found["none"])
        print(f"round {number}: " + ", ".join(f"{k} {v:.1f}" for k, v in found.items()), file=sys.stderr, flush=True)
    result: dict[str, object] = {
        "rounds": rounds,
        "seconds": seconds,
        "frames_per_s": round(fmean(frames), 2),
        "largest_frame": max(sizes),
    }
    for kind, values in ratios.items():
        result[f"slower_{kind}"] = {"mean": slower(values), "between": interval(values)}
    return result


def slower(ratios: list[float]) -> float:
    """By what share it is slower: one less the geometric mean of the middle four fifths of the ratios."""
    logs = sorted(map(math.log, ratios))
    cut = len(logs) // 10
    return round(1 - math.exp(fmean(logs[cut : len(logs) - cut])), 4)


def interval(ratios: list[float], draws: int = 4000) -> tuple[float, float]:
    """Where that lies with 95 % probability, by the bootstrap."""
    means = sorted(slower(random.choices(ratios, k=len(ratios))) for _ in range(draws))
    return means[draws // 40], means[-draws // 40]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--crowd", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, open_kernel(Path(folder)) as kernel:
        kernel.run(SWARM)
        crowd = None
        try:
            if options.crowd:
                invite = kernel.value("str(swarm.invite())")
                crowd = subprocess.Popen(
                    [sys.executable, "-m", "tests.crowd", invite, str(options.crowd)],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                )  # fmt: skip
                assert crowd.stdout is not None and crowd.stdout.readline() == "ready\n"
                print("the crowd is there", file=sys.stderr)
            print(json.dumps(measure(kernel, options.rounds, options.seconds), indent=1))
        finally:
            if crowd is not None:
                crowd.kill()
            kernel.run("swarm.close()")


if __name__ == "__main__":
    main()
