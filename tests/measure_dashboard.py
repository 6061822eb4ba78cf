"""What the dashboard costs the training beside it: `python -m tests.measure_dashboard [--crowd 200]`. Not a test.

A kernel trains over four server processes. Round after round it does so with no dashboard, with one that nobody looks
at, and with one that a page looks at, in an order that changes; the page is played over the kernel's own sockets, and
acknowledges each frame. `--settle` seconds lie between opening a dashboard, which asks all servers once, and measuring
what it costs from then on. Each round gives two ratios of samples/s, and two of the CPU time of a step: that of the
kernel and the four servers, without the page and the crowd. Printed are their means, of the middle four fifths since a
busy machine gives wild ones, and the range that holds the true mean with 95 % probability. At last the training stops,
and what each process computes then, as a share of one core, is what it computes for the dashboard.

`--times N`: all that a dashboard does again and again is done N times as often, and what it costs is divided by N. On a
machine whose speed changes by a tenth from one moment to the next, a cost of one per cent cannot be seen otherwise.

`--crowd N`: beside it N further servers of 50 experts each, as the dashboard sees them: nodes with keys and addresses
of their own, declared in the DHT and asked for their statistics, which change. One process answers for all of them, and
there are no experts behind it, since two cores could not compute for 10,000.

What README says was measured with `--times 8`, on two cores without a GPU, server processes and trainers together. 16
experts on four servers, 12 paired rounds: training is 0.7 % slower with nobody looking, when the run is only recorded
(95 %: between 0.3 % faster and 1.4 % slower), and 1.2 % slower with a page that takes its four frames a second (0.0 to
2.5 %). The same with `--crowd 200`, 23 paired rounds: 0.1 % slower with nobody looking (0.4 % faster to 0.6 % slower)
and 1.5 % with a page (1.0 to 2.0 %), what the page and the crowd compute on the same cores included. Frames have up to
58 KB there, one every two seconds; each server is asked every 35 seconds, and every 100 with nobody looking.
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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean

import psutil

from tests.front_end import WIDGET, FrontEnd, Page, open_kernel

SWARM = """
import time, torch, labkit as lk
from torch import nn
swarm = lk.Swarm()
swarm.serve("ffn", hidden=64, grid=(4, 4), servers=4, isolation="process", threads=1, seed=0)
data = lk.load("digits")
model = nn.Sequential(nn.Linear(data.dim, 64), swarm.moe(64, k_best=4), nn.Linear(64, data.classes))
run = lk.fit(model, data, steps=10_000_000, batch_size=64, trainers=4)
"""
FASTER = """
from labkit.view import outputs, recording, swarm_view
from labkit.view.collect import inventory, sampler
from labkit.view.page import pages
for module, names in (
    (pages, "FRAME_PERIOD MAX_FRAME_PERIOD"), (inventory, "FIND_PERIOD"), (recording, "KEYFRAME_SPACING"),
    (sampler, "HISTOGRAM_PERIOD"),
    (swarm_view, "RECORDING_PERIOD MAX_RECORDING_PERIOD SCENE_MAX_AGE RECORDED_SCENE_MAX_AGE"),
):
    for name in names.split():
        setattr(module, name, getattr(module, name) / TIMES)
pages.FRAME_CORE_SHARE *= TIMES
outputs.SCENE_CORE_SHARE *= TIMES
inventory.SERVERS_PER_SECOND *= TIMES
inventory.EXPERTS_PER_SECOND *= TIMES
"""
KINDS = ("none", "closed", "open")
HERE = "(run.steps, time.monotonic())"
SETTLE, REST = 6.0, 20.0  # seconds


def cpu_seconds(process: psutil.Process) -> float:
    """What this process and its children have computed."""
    times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return float(sum(time.user + time.system for time in times))


def speed(kernel: FrontEnd, process: psutil.Process, seconds: float) -> tuple[float, float, float]:
    """Steps per second of the next seconds, how many seconds those were, and CPU seconds a step."""
    computed = cpu_seconds(process)
    before, started = kernel.value(HERE)
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        try:
            kernel.until(lambda: time.monotonic() >= deadline, left + 0.1)  # takes what the kernel sends meanwhile
        except AssertionError:
            break
    computed = cpu_seconds(process) - computed
    after, ended = kernel.value(HERE)
    return (after - before) / (ended - started), ended - started, computed / (after - before)


@contextmanager
def shown(kernel: FrontEnd, kind: str) -> Iterator[Page | None]:
    """Nothing, or a dashboard, or one with a page that looks at it."""
    page = None
    if kind != "none":
        comm = kernel.run("dashboard = swarm.dashboard()\ndashboard").bundle[WIDGET]["model_id"]
        if kind == "open":
            page = kernel.page(comm)
            page.look(fresh=True)
    try:
        yield page
    finally:
        if page is not None:
            page.look(False)
        if kind != "none":
            kernel.run("dashboard.close()")


def measure(
    kernel: FrontEnd, process: psutil.Process, rounds: int, seconds: float, settle: float, times: float
) -> dict[str, object]:
    ratios: dict[str, list[float]] = {"closed": [], "open": []}
    costs: dict[str, list[float]] = {"closed": [], "open": []}
    frames: list[float] = []
    sizes: list[int] = []
    for number in range(rounds):
        speeds, cost = {}, {}
        for kind in random.sample(KINDS, len(KINDS)):
            with shown(kernel, kind) as page:
                wait(kernel, page, settle)
                seen = len(page.frames) if page is not None else 0
                speeds[kind], took, cost[kind] = speed(kernel, process, seconds)
                if page is not None:
                    frames.append((len(page.frames) - seen) / took)
                    sizes += [len(json.dumps(h)) + sum(map(len, b)) for _, h, b in page.frames[seen:]]
        for kind in ratios:
            ratios[kind].append(speeds[kind] / speeds["none"])
            costs[kind].append(cost["none"] / cost[kind])
        words = ", ".join(f"{k} {v:.1f}/s {1000 * cost[k]:.2f} ms" for k, v in speeds.items())
        print(f"round {number}: {words}", file=sys.stderr, flush=True)
    result: dict[str, object] = {
        "rounds": rounds,
        "seconds": seconds,
        "settle": settle,
        "times": times,
        "frames_per_s": round(fmean(frames), 2),
        "largest_frame": max(sizes),
    }
    for kind in ratios:
        for name, found in (f"slower_{kind}", ratios[kind]), (f"more_cpu_{kind}", costs[kind]):
            shares = slower(found), *interval(found)
            mean, *between = (round(share / times, 5) for share in shares)
            result[name] = {"mean": mean, "between": between}
    return result


def at_rest(
    kernel: FrontEnd, process: psutil.Process, crowd: subprocess.Popen[str] | None
) -> dict[str, dict[str, float]]:
    """What each process computes while nothing is trained, as a share of one core."""
    kernel.run("run.stop()")
    processes = {"kernel": process, "page": psutil.Process()}
    if crowd is not None:
        processes["crowd"] = psutil.Process(crowd.pid)
    shares = {}
    for kind in KINDS:
        with shown(kernel, kind) as page:
            wait(kernel, page, SETTLE)
            before = {name: own_seconds(process) for name, process in processes.items()}
            wait(kernel, page, REST)
            shares[kind] = {name: round((own_seconds(p) - before[name]) / REST, 4) for name, p in processes.items()}
    return shares


def wait(kernel: FrontEnd, page: Page | None, seconds: float) -> None:
    """Take what the kernel sends meanwhile, and say now and then that the page is still looked at."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        if page is not None:
            page.look()
        until = time.monotonic() + min(left, 2.0)
        try:
            kernel.until(lambda until=until: time.monotonic() >= until, min(left, 2.0) + 0.1)  # type: ignore[misc]
        except AssertionError:
            continue


def own_seconds(process: psutil.Process) -> float:
    """What this process has computed, without its children."""
    times = process.cpu_times()
    return float(times.user + times.system)


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
    parser.add_argument("--settle", type=float, default=0.5, help="seconds between opening and measuring")
    parser.add_argument("--times", type=float, default=1.0, help="as often as it is otherwise")
    parser.add_argument("--crowd", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, open_kernel(Path(folder)) as kernel:
        kernel.run(f"TIMES = {options.times}" + FASTER + SWARM)
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
            process = psutil.Process(kernel.value("__import__('os').getpid()"))
            result = measure(kernel, process, options.rounds, options.seconds, options.settle, options.times)
            print(json.dumps({**result, "cores_at_rest": at_rest(kernel, process, crowd)}, indent=1))
        finally:
            if crowd is not None:
                crowd.kill()
            kernel.run("swarm.close()")


if __name__ == "__main__":
    main()
