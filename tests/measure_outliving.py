"""How experts outlive their servers, at length: `python -m tests.measure_outliving [kills] [cost]`. Not a test.

`kills`: eight server processes with 32 experts and four copies of each, since four servers are killed with SIGKILL at
once while two trainers train on the digits, never to come back; then two of the four that are left, then one. For each
round: seconds until all 32 experts serve again, the longest time that one was not served, the updates that were lost,
and those of the worst expert in seconds of its training. At the end: rows without an answer, failed batches, and the
accuracy beside that of a run of as many steps in which nothing is killed.

`cost`: the same training over four server processes with copies and without, in turns, in an order that changes: the
mean ratio of samples/s, of the middle four fifths, and the range that holds the true mean with 95 % probability.

Both print JSON, a line each.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from contextlib import ExitStack
from statistics import fmean, stdev
from typing import Any

import torch
from torch import nn

import labkit as lk
from labkit.events import Event, ExpertTakenOver
from labkit.swarm import Swarm
from tests.network.test_outliving import all_copied
from tests.swarms import eventually

STEPS = 1500  # of the run in which servers are killed
KILL_AT = (0.4, 0.6, 0.8)  # of these steps


def classifier(swarm: Swarm, data: Any) -> nn.Module:
    moe = swarm.moe(64, k_best=4)
    return nn.Sequential(nn.Linear(data.dim, 64), nn.LayerNorm(64), moe, nn.LayerNorm(64), nn.Linear(64, data.classes))


def train_while_killing(kill: bool, steps: int) -> dict[str, Any]:
    """Train over eight servers, of which seven are killed on the way if `kill`."""
    data, rounds, events = lk.load("digits"), list[dict[str, Any]](), list[Event]()
    torch.manual_seed(0)
    with Swarm("measured") as swarm:
        swarm.on_event(lambda event: events.append(event) if isinstance(event, ExpertTakenOver) else None)
        swarm.serve("ffn", hidden=64, grid=(4, 8), servers=8, threads=1, seed=0, backups=4)
        run, left = lk.fit(classifier(swarm, data), data, steps=steps, batch_size=64, trainers=2), list(swarm.servers)
        for share in KILL_AT if kill else ():
            eventually(lambda share=share: run.steps >= share * steps, 600)  # type: ignore[misc]
            eventually(lambda copies=len(left) // 2: all_copied(swarm, copies))  # type: ignore[misc]  # noqa: B008
            half, before = len(left) // 2, sum(sum(s.statistics().experts.values()) for s in left)
            rate = before / 32 / run.seconds  # updates of an expert in a second
            killed, left = left[:half], left[half:]
            orphans = sum(len(server.uids) for server in killed)
            events.clear()
            at = time.monotonic()
            for server in killed:
                server.kill(wait=False)
            eventually(lambda left=left: sum(len(server.uids) for server in left) == 32)  # type: ignore[misc]
            seconds = time.monotonic() - at
            eventually(lambda orphans=orphans: len(events) >= orphans)  # type: ignore[misc]
            lost = [event.lost_updates for event in events if isinstance(event, ExpertTakenOver)]
            rounds.append(
                {
                    "killed": half, "experts": orphans, "all_again_after": round(seconds, 2), "updates_lost": sum(lost),
                    "worst_loss_seconds": round(max(lost) / rate, 1),
                    "longest_without": round(max(e.seconds for e in events if isinstance(e, ExpertTakenOver)), 2),
                }
            )  # fmt: skip
        run.wait()
        return {
            "killed": 7 if kill else 0, "rounds": rounds, "experts": len(swarm.experts()), "steps": run.steps,
            "accuracy": round(run.evaluate(data.test_x, data.test_y), 4), "failed_batches": run.failed_batches,
            "rows_without_an_answer": swarm.telemetry.unanswered_rows,
        }  # fmt: skip


def measure_cost(rounds: int, seconds: float) -> dict[str, Any]:
    """Compare samples/s with and without copies, in turns."""
    data, ratios = lk.load("digits"), list[float]()
    with ExitStack() as stack:
        swarms = {backups: stack.enter_context(Swarm(f"with {backups}")) for backups in (0, 1)}
        for backups, swarm in swarms.items():
            swarm.serve("ffn", hidden=64, grid=(4, 4), servers=4, threads=1, seed=0, backups=backups)

        def speed(backups: int) -> float:
            swarm = swarms[backups]
            run = lk.fit(classifier(swarm, data), data, steps=10_000_000, batch_size=64, trainers=4)
            eventually(lambda: run.steps > 20)
            steps, at = run.steps, time.monotonic()
            time.sleep(seconds)
            rate = (run.steps - steps) / (time.monotonic() - at)
            run.stop()
            return rate

        for _ in range(rounds):
            order = [0, 1]
            random.shuffle(order)
            rates = {backups: speed(backups) for backups in order}
            ratios.append(rates[1] / rates[0])
            print(json.dumps({"with / without": round(ratios[-1], 4)}), flush=True)
    ratios.sort()
    middle = ratios[len(ratios) // 10 : len(ratios) - len(ratios) // 10]
    spread = 1.96 * stdev(middle) / math.sqrt(len(middle)) if len(middle) > 1 else math.nan
    return {"rounds": rounds, "ratio": round(fmean(middle), 4), "95 %": round(spread, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["kills", "cost"], help="kills, cost, or both")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=25.0)
    options = parser.parse_args()
    if "kills" in options.what:
        print(json.dumps(train_while_killing(False, options.steps)), flush=True)
        print(json.dumps(train_while_killing(True, options.steps)), flush=True)
    if "cost" in options.what:
        print(json.dumps(measure_cost(options.rounds, options.seconds)), flush=True)


if __name__ == "__main__":
    main()
