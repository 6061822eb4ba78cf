"""`labkit demo`: all of labkit in a minute. Train over live servers, kill some of them, and bring them back.

1. Start expert servers as processes. Each keeps copies of others' experts.
2. Train a small classifier with one MoE layer.
3. After a third of the steps, kill servers with SIGKILL. The others take their experts over from the copies.
4. After two thirds, bring them back, as spare servers that are given experts again.
5. Print how it went.
"""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import nn

from labkit.cli.watch import check_installed, open_page
from labkit.client.moe import MixtureOfExperts
from labkit.events import Event, ExpertTakenOver
from labkit.expert_uid import grid_for
from labkit.server.config import MAX_BACKUPS
from labkit.server.optimizer import BackendConfig
from labkit.swarm import Swarm
from labkit.training.datasets import ClassificationData, load
from labkit.training.fit import fit
from labkit.training.run import Run
from labkit.training.trainer import evaluate
from labkit.view.progress import show_progress

HIDDEN = 64  # width of the model and its experts
CHECKPOINT_PERIOD = 2.0  # seconds
COPY_TIME = 10.0  # seconds that servers have to make the first copies before some are killed
BACK_TIME = 10.0  # seconds that experts have to be served again, and servers that were brought back to be given some
MAX_SEED = 1 << 63  # of torch's generators


@dataclass(frozen=True)
class DemoConfig:
    """What to demonstrate: the options of `labkit demo`. Raises `ValueError`.

    Attributes:
        dataset: Name of the data set: digits, mnist, or one of the Hugging Face Hub.
        data_dir: Folder with the parquet files of the data set.
        servers: Expert servers to start.
        experts: Experts in all.
        k_best: Experts that each row is sent to.
        trainers: Batches in flight at the same time.
        steps: Training steps; `None` for the recipe's.
        kill: Servers to kill and to bring back.
        seed: Of the random numbers.
    """

    dataset: str = "digits"
    data_dir: str | None = None
    servers: int = 4
    experts: int = 16
    k_best: int = 4
    trainers: int = 4
    steps: int | None = None
    kill: int = 1
    seed: int = 0

    @property
    def backups(self) -> int:
        """Copies of each expert: one survives, whichever servers are killed."""
        return min(max(1, self.kill), MAX_BACKUPS)

    def __post_init__(self) -> None:
        for name in ("servers", "experts", "k_best", "trainers", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value}: at least 1")
        if not 0 <= self.seed < MAX_SEED:
            raise ValueError(f"--seed {self.seed}: from 0 to 2**63 - 1")
        if self.data_dir is not None and self.dataset == "digits":
            raise ValueError("--data-dir: the data set digits reads no files; name another one with --dataset")
        if self.servers > self.experts:
            raise ValueError(f"--servers {self.servers}: at most one for each of the {self.experts} experts")
        if self.k_best > self.experts:
            raise ValueError(f"--k-best {self.k_best}: at most the number of experts, {self.experts}")
        if not 0 <= self.kill < max(2, self.servers):
            raise ValueError(f"--kill {self.kill}: fewer than there are servers ({self.servers})")


@dataclass(frozen=True)
class Recipe:
    """How to train on a data set."""

    steps: int = 3000
    batch_size: int = 128
    noise: float = 0.0  # standard deviation of the noise on the inputs while training


RECIPES = {"digits": Recipe(steps=500, batch_size=64, noise=0.5)}  # 1,437 rows: noise keeps it from learning by heart


class Classifier(nn.Module):
    """rows [batch, dim] -> class scores [batch, classes]: a linear map, one MoE layer with a residual, a head."""

    def __init__(self, dim: int, hidden: int, classes: int, moe: MixtureOfExperts, noise: float) -> None:
        super().__init__()
        self.noise = noise
        self.stem = nn.Sequential(nn.Linear(dim, hidden), nn.LayerNorm(hidden))
        self.moe = moe
        self.head = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and self.noise:
            x = x + self.noise * torch.randn_like(x)
        x = self.stem(x)
        scores: torch.Tensor = self.head(x + self.moe(x))
        return scores


@dataclass
class _Killer:
    """Kills servers after a third of the steps, and restarts them after two thirds."""

    swarm: Swarm
    total: int
    count: int
    alive_min: int
    killed: list[int] = field(default_factory=list)
    orphans: set[str] = field(default_factory=set)  # the experts of those that were killed
    taken_over: deque[ExpertTakenOver] = field(default_factory=deque)
    restarted: bool = False

    def note(self, event: Event) -> None:
        """Note experts that are taken over."""
        if isinstance(event, ExpertTakenOver):
            self.taken_over.append(event)

    def __call__(self, steps: int) -> None:
        """Do what is due after so many steps. Called about ten times a second."""
        if not self.killed and self.count and steps >= self.total / 3:
            for number in range(len(self.swarm.servers))[-self.count :]:
                self.orphans.update(self.swarm.servers[number].uids)
                self.swarm.servers[number].kill()
                self.killed.append(number)
        if self.killed and not self.restarted and steps >= 2 * self.total / 3:
            self.restarted = True
            for number in self.killed:
                self.swarm.servers[number].restart(wait=False)
        self.alive_min = min(self.alive_min, self.swarm.experts_alive())

    def wait_until_back(self) -> None:
        """Wait until the servers that were restarted run and have experts, or have failed to start."""
        servers = [self.swarm.servers[number] for number in self.killed]
        while any(server.state == "starting" for server in servers):
            time.sleep(0.05)
        until = time.monotonic() + BACK_TIME
        while any(server.alive and not server.uids for server in servers) and time.monotonic() < until:
            time.sleep(0.05)


def demo(config: DemoConfig, *, as_json: bool = False, page: bool = False, browser: bool = True) -> dict[str, Any]:
    """Run the demonstration and print how it went.

    Args:
        config: What to demonstrate.
        as_json: Print the result as a JSON object on the last line, too.
        page: Show the dashboard as a web page; in a terminal it stays until Ctrl-C.
        browser: Open a browser for the page.

    Returns:
        How it went, as a dictionary.

    Raises:
        DataNotFound: The data set is not here.
        LabkitError: labkit was installed without what the page needs, or servers did not start.
    """
    if page:
        check_installed()
    started = time.monotonic()
    data = load(config.dataset, config.data_dir, seed=config.seed)
    torch.manual_seed(config.seed)
    recipe = RECIPES.get(config.dataset, Recipe())
    steps = config.steps or recipe.steps
    print(f"starting {config.servers} servers with {config.experts} experts …", file=sys.stderr)
    with ExitStack() as stack:
        swarm = stack.enter_context(Swarm("demo"))
        swarm.serve(  # 1
            "ffn", hidden=HIDDEN, grid=grid_for(config.experts), servers=config.servers, isolation="process",
            threads=1, seed=config.seed, checkpoint_period=CHECKPOINT_PERIOD, backups=config.backups,
            backend=BackendConfig(clip_grad_norm=1.0, schedule="linear", total_steps=steps + 1),
        )  # fmt: skip
        model = Classifier(data.dim, HIDDEN, data.classes, swarm.moe(HIDDEN, k_best=config.k_best), recipe.noise)
        if page:
            started += _show_page(stack, swarm, browser)
        swarm.experts()  # reads the directory, so that those alive can be counted
        killer = _Killer(swarm, steps, config.kill, swarm.experts_alive())
        swarm.on_event(killer.note)
        if config.kill:
            _wait_for_copies(swarm, config.experts * min(config.backups, config.servers - 1))
        run = fit(  # 2
            model, data, steps=steps, batch_size=recipe.batch_size, trainers=config.trainers, schedule="linear",
            balance=0.01, seed=config.seed,
        )  # fmt: skip
        show_progress(run, swarm.experts_alive, label=config.dataset, on_tick=killer, file=sys.stderr)  # 3, 4
        killer.wait_until_back()
        accuracy = evaluate(model, data.test_x, data.test_y)
        result = _result(swarm, data, run, killer, accuracy, time.monotonic() - started)
        print(_table(result, swarm), flush=True)  # 5
        if page and sys.stdout.isatty():
            _wait_for_ctrl_c()
    if as_json:
        print(json.dumps(result))
    return result


def _wait_for_copies(swarm: Swarm, copies: int) -> None:
    """Wait a few seconds until there are so many copies: a short training may come to its third before."""
    until = time.monotonic() + COPY_TIME
    while time.monotonic() < until:
        if sum(one.copies.kept for one in swarm.statistics().values() if one.copies is not None) >= copies:
            return
        time.sleep(0.1)


def _show_page(stack: ExitStack, swarm: Swarm, browser: bool) -> float:
    """Open the dashboard's page, which closes with the stack. Returns the seconds that it took."""
    before = time.monotonic()
    page = stack.enter_context(open_page(swarm.invite(), swarm.remote_service.secret))
    print(f"dashboard: {page.url}", flush=True)
    if browser:
        page.open_browser()
    return time.monotonic() - before


def _wait_for_ctrl_c() -> None:
    print("\nthe dashboard stays; press Ctrl-C to end", file=sys.stderr)
    try:
        while True:
            time.sleep(1.0)
    except KeyboardInterrupt:
        pass


def _result(
    swarm: Swarm, data: ClassificationData, run: Run, killer: _Killer, accuracy: float, seconds: float
) -> dict[str, Any]:
    calls = swarm.telemetry.total
    seconds_without = [event.seconds for event in killer.taken_over]
    return {
        "dataset": data.name,
        "accuracy": round(accuracy, 4),
        "steps": run.steps,
        "seconds": round(seconds, 1),
        "samples_per_s": round(run.samples_per_s, 1),
        "servers": {
            "started": len(swarm.servers),
            "killed": len(killer.killed),
            "alive": sum(server.alive for server in swarm.servers),
        },
        "experts": sum(len(server.uids) for server in swarm.servers),
        "experts_alive_min": killer.alive_min,
        "experts_taken_over": len(killer.taken_over),
        "updates_lost": sum(event.lost_updates for event in killer.taken_over),
        "seconds_without": {
            "median": round(median(seconds_without), 2) if seconds_without else 0.0,
            "max": round(max(seconds_without, default=0.0), 2),
        },
        "calls": calls.finished + calls.failed.total(),
        "calls_failed": dict(calls.failed),
        "no_answer_rows": swarm.telemetry.unanswered_rows,
    }


def _taken_over(result: dict[str, Any]) -> str:
    """What became of the experts of servers that were killed, in words."""
    if not result["experts_taken_over"]:
        return "none"
    without, lost = result["seconds_without"], result["updates_lost"]
    return (
        f"{result['experts_taken_over']} of them by other servers, after {without['median']:.1f} s (longest "
        f"{without['max']:.1f} s); {lost:,} updates lost"
    )


def _table(result: dict[str, Any], swarm: Swarm) -> str:
    """The result as a table for people."""
    servers, failed = result["servers"], result["calls_failed"]
    causes = f" ({', '.join(f'{cause} {count}' for cause, count in failed.items())})" if failed else ""
    rows = {
        "test accuracy": f"{result['accuracy']:.4f} on {result['dataset']}",
        "steps": f"{result['steps']:,} in {result['seconds']:.1f} s, start-up included",
        "throughput": f"{result['samples_per_s']:,.0f} samples/s while training",
        "servers": f"{servers['started']} started, {servers['killed']} killed, {servers['alive']} alive at the end",
        "experts": f"{result['experts']}, {result['experts_alive_min']} alive at the worst",
        "taken over": _taken_over(result),
        "calls": f"{result['calls']:,}, {sum(failed.values())} failed{causes}",
        "rows without an answer": str(result["no_answer_rows"]),
    }
    width = max(map(len, rows))
    lines = [f"  {name.ljust(width)}  {value}" for name, value in rows.items()]
    return "\n".join(["", repr(swarm), "", *lines])
