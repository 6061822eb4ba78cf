"""Do the runs of an experiment: `python -m labkit.experiments.runner SIZE`, such as `quick` or `language-small`.

As many runs as there are cores go on at the same time. Each is a child process that writes one file at its end. Runs
whose files exist are not repeated, so a runner that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from labkit.experiments import language_model
from labkit.experiments.convergence import ConvergenceConfig, History, run
from labkit.experiments.language_model import LanguageModelConfig
from labkit.experiments.results import config_of, load, save
from labkit.launch.child_python import child_environment, child_folder, python_command
from labkit.launch.parent import watch_parent
from labkit.paths import user_path
from labkit.training.datasets import load as load_data

PROGRESS_STEP = 32  # updates from one line of progress to the next
LANGUAGE = "language-"  # how the sizes of the language model begin
SEEDS = (1337, 1338, 1339)
GRIDS = {16: (4, 4), 64: (8, 8)}
# For stale gradients: small steps without momentum that fall to 0. The authors have the same `accumulate`.
RECOMMENDED: dict[str, Any] = {"lr": 1e-4, "beta1": 0.0, "schedule": "linear", "accumulate": 4}
QUICK = ConvergenceConfig(grid=GRIDS[16], batch_size=16, updates=6 * 1024, width=64, latency=1.0, **RECOMMENDED)
AUTHORS = ConvergenceConfig(grid=GRIDS[64], batch_size=4, updates=20 * 1024, width=64, latency=1.0, **RECOMMENDED)
PAPER = replace(AUTHORS, width=512)
# What each option gains on its own, beside a smaller learning rate. A third of `quick`'s updates suffice to see it.
# These runs are evaluated on training images that are held out, since settings are chosen by them.
AWARE_BASE = replace(
    QUICK, updates=2 * 1024, evaluate_every=512, loss=0.1, beta1=0.9, schedule="constant", accumulate=1, validation=5000
)
AWARE: dict[str, dict[str, Any]] = {
    "as-fresh": {"lr": 1e-3},
    "small-steps": {},
    "warm-up": {"warmup": 512},
    "clipping": {"clip_grad_norm": 1.0},
    "age": {"age_power": 0.5},
    "compensation": {"compensation": 0.1},
    "no-momentum": {"beta1": 0.0},
    "decay": {"schedule": "linear"},
    "accumulation": {"accumulate": 4},
}
# The last three together, with several learning rates.
AWARE |= {
    f"together-{lr:g}": {"lr": lr, "beta1": 0.0, "schedule": "linear", "accumulate": 4} for lr in (1e-4, 2e-4, 4e-4)
}
# The same choice for the dense network.
AWARE |= {
    f"dense-{lr:g}-{word}": {"model": "dense", "loss": 0.0, "lr": lr, "beta1": beta1, "schedule": "linear"}
    for lr in (1e-4, 3e-4, 1e-3)
    for word, beta1 in (("momentum", 0.9), ("no-momentum", 0.0))
}


def plan(size: str, seeds: Iterable[int] = SEEDS) -> dict[str, ConvergenceConfig]:
    """List the runs of a size.

    Args:
        size: "quick"; "authors", as in their published code; "paper", with wider layers; or "aware", which compares
            options for stale gradients; or "language-" and a size of `language_model.plan`.
        seeds: Each run is listed with each of these seeds.

    Returns:
        The configs by the names of their files.

    Raises:
        ValueError: There is no such size.
    """
    runs: dict[str, ConvergenceConfig] = {}
    if size.startswith(LANGUAGE):
        return {**language_model.plan(size.removeprefix(LANGUAGE), seeds)}
    if size not in ("quick", "authors", "paper", "aware"):
        raise ValueError(f"size={size!r}: quick, authors, paper or aware")
    base = {"quick": QUICK, "authors": AUTHORS, "paper": PAPER, "aware": AWARE_BASE}[size]
    for seed in seeds:
        one = replace(base, seed=seed)
        if size == "aware":
            runs |= {f"aware-{name}-{seed}": replace(one, **options) for name, options in AWARE.items()}
            continue
        runs[f"{size}-failing-{seed}"] = replace(one, loss=0.1)
        runs[f"{size}-fresh-{seed}"] = replace(one, latency=0.0, trainers=1)
        runs[f"{size}-dense-{seed}"] = replace(one, model="dense")
        runs[f"{size}-delayed-100ms-{seed}"] = replace(one, latency=0.1)
        if size != "quick":
            runs[f"{size}-delayed-{seed}"] = one
            runs[f"{size}-failing-16-experts-{seed}"] = replace(one, loss=0.1, grid=GRIDS[16])
    return runs


def run_all(
    runs: Mapping[str, ConvergenceConfig],
    folder: Path,
    *,
    dataset: str = "mnist",
    data_dir: Path | None = None,
    processes: int | None = None,
) -> None:
    """Do the runs that are not in a folder yet, and show a progress bar.

    Args:
        runs: The runs by name.
        folder: Where the files are written, `NAME.parquet` each.
        dataset: The images to train on, by name.
        data_dir: Where they are kept, by default where `labkit.load` keeps them; or the text of a language model.
        processes: Runs at the same time; by default as many as there are cores.

    Raises:
        RuntimeError: A run failed.
    """
    from tqdm.auto import tqdm

    folder = user_path(folder, "folder")
    data_dir = None if data_dir is None else user_path(data_dir, "data_dir")
    missing = {name: config for name, config in runs.items() if not is_done(folder / f"{name}.parquet", config)}
    waiting: SimpleQueue[str] = SimpleQueue()
    for name in missing:
        waiting.put(name)
    problems: list[str] = []
    children: set[subprocess.Popen[str]] = set()
    bar = tqdm(total=sum(config.updates for config in missing.values()), unit=" updates", smoothing=0.05)

    def work() -> None:
        while not problems:
            try:
                name = waiting.get_nowait()
            except Empty:
                return
            try:
                do(name)
            except Exception as error:  # of any kind: an error that ends a thread would not be reported
                problems.append(f"the run {name} failed: {error}")

    def do(name: str) -> None:
        order = [json.dumps(asdict(missing[name])), str(folder / f"{name}.parquet"), dataset, str(data_dir or "")]
        with subprocess.Popen(
            python_command("labkit.experiments.runner", "--one", *order), stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True, env=child_environment(), cwd=child_folder(),
        ) as child:  # fmt: skip
            children.add(child)
            try:
                assert child.stdout is not None
                for line in child.stdout:
                    if not line.strip().isdecimal():
                        raise RuntimeError(f"it printed {line.strip()!r}, where a number of updates was expected")
                    bar.update(int(line))
                child.wait()
            except BaseException:
                child.kill()
                raise
            finally:
                children.discard(child)
        if child.returncode:
            raise RuntimeError(f"exit code {child.returncode}; what it wrote above says why")

    workers = [threading.Thread(target=work, daemon=True) for _ in range(processes or os.cpu_count() or 1)]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        for child in list(children):
            child.kill()
        bar.close()
    if problems:
        raise RuntimeError("; ".join(problems))


def is_done(path: Path, config: ConvergenceConfig) -> bool:
    """Returns whether the file exists and holds the run of this config."""
    try:
        return load(path)[0] == config
    except (OSError, ValueError, TypeError, KeyError):
        return False


def run_one(fields: str, path: str, dataset: str, data_dir: str) -> None:
    """Run a child of `run_all`: do one run, save it and print the progress, as numbers of updates."""
    watch_parent()
    config = config_of(json.loads(fields))
    reported = 0

    def progress(updates: int) -> None:
        nonlocal reported
        if updates - reported >= PROGRESS_STEP or updates == config.updates:
            print(updates - reported, flush=True)
            reported = updates

    do: Callable[[], History]
    if isinstance(config, LanguageModelConfig):
        do = partial(language_model.run, config, config.load(data_dir or None), progress)
    else:
        do = partial(run, config, load_data(dataset, data_dir or None), progress)
    began = time.perf_counter()
    history = do()
    history.wall_s = time.perf_counter() - began
    save(Path(path), config, history)


def main() -> None:
    """`python -m labkit.experiments.runner SIZE`, and what its children run."""
    if sys.argv[1:2] == ["--one"]:
        return run_one(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "size",
        choices=["quick", "authors", "paper", "aware", *(LANGUAGE + size for size in language_model.SIZES)],
        help="quick: small grids; authors: the published code's sizes; paper: the paper's; "
        "aware: compare options for stale gradients; language-…: the language model",
    )
    parser.add_argument(
        "--out", type=Path, help="folder of the files (notebooks/convergence, or notebooks/language_model)"
    )
    parser.add_argument("--dataset", default="mnist", help="images to train on (%(default)s)")
    parser.add_argument("--data-dir", type=Path, help="folder in which the data are kept; or the text")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="do each run with each of these seeds")
    parser.add_argument("--only", default="", help="do only runs with this in their name")
    parser.add_argument("--device", default="cpu", help="where trunk and experts compute, such as cuda (%(default)s)")
    options = parser.parse_args()
    of_language = options.size.startswith(LANGUAGE)
    listed = plan(options.size, options.seeds)
    runs = {name: replace(config, device=options.device) for name, config in listed.items() if options.only in name}
    out = options.out or Path("notebooks") / ("language_model" if of_language else "convergence")
    run_all(runs, out, dataset=options.dataset, data_dir=options.data_dir)


if __name__ == "__main__":
    main()
