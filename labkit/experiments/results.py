"""Results of experiments on disk, which a notebook redraws without measuring again.

1. Convergence and the language model: one parquet file per run, with its config and its history (`save`, `load`,
   `load_all`).
2. Expert search: a file with a line of JSON per measurement; each is made in a child process (`measure_all`).
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from labkit.experiments.convergence import ConvergenceConfig, History
from labkit.experiments.expert_search import SearchConfig, measure
from labkit.experiments.language_model import LanguageModelConfig
from labkit.launch.child_python import child_environment, child_folder, python_command
from labkit.launch.parent import watch_parent
from labkit.paths import user_path

COUNTS_BY_STALENESS = ("staleness", "expert_staleness")  # counters of a `History`
COUNTS_BY_NAME = ("usage", "failures")

# ---------------------------------------------------------------- convergence: a file per run

# The table is long: `series` names what a row is about, `x` and `y` are its numbers, `label` its name if it has one.
# Its metadata are `config`, and `made`, which the oldest files lack: how long the run took, and with which versions.


def save(path: Path, config: ConvergenceConfig, history: History) -> None:
    """Write a run to a file, atomically. Its folder is created if it does not exist."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows: list[tuple[str, float, float, str]] = [("dropped", 0.0, float(history.dropped), "")]
    for updates, seconds, measured, loss in history.points:
        rows.append(("seconds", updates, seconds, ""))
        rows.append((_measured(config), updates, measured, ""))
        rows.append(("loss", updates, loss, ""))
    for name in COUNTS_BY_STALENESS:
        rows += [(name, value, count, "") for value, count in sorted(getattr(history, name).items())]
    for name in COUNTS_BY_NAME:
        rows += [(name, 0.0, count, label) for label, count in sorted(getattr(history, name).items())]
    series, x, y, label = zip(*rows, strict=True)
    table = pa.table({"series": series, "x": pa.array(x, pa.float64()), "y": pa.array(y, pa.float64()), "label": label})
    made = {
        "wall_s": history.wall_s,
        "labkit": importlib.metadata.version("labkit"),
        "torch": torch.__version__,
        "cpus": os.cpu_count(),
    }
    table = table.replace_schema_metadata({"config": json.dumps(asdict(config)), "made": json.dumps(made)})
    path = user_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".new")
    pq.write_table(table, unfinished, compression="zstd")
    unfinished.replace(path)


def load(path: Path) -> tuple[ConvergenceConfig, History]:
    """Read a run.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file is not a run of the convergence experiment.
    """
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    metadata = table.schema.metadata or {}
    fields = json.loads(metadata.get(b"config", b"null"))
    if not isinstance(fields, dict):
        raise ValueError(f"{path} is not a run of the convergence experiment")
    config = config_of(fields)
    made = json.loads(metadata.get(b"made", b"{}"))
    history, points = History(wall_s=made.get("wall_s")), dict[float, dict[str, float]]()
    for row in table.to_pylist():
        series, x, y = row["series"], row["x"], row["y"]
        if series == "dropped":
            history.dropped = int(y)
        elif series in COUNTS_BY_STALENESS:
            getattr(history, series)[int(x)] = int(y)
        elif series in COUNTS_BY_NAME:
            getattr(history, series)[row["label"]] = int(y)
        else:
            points.setdefault(x, {})[series] = y
    for updates, point in points.items():
        history.points.append((int(updates), point["seconds"], point[_measured(config)], point["loss"]))
    return config, history


def config_of(fields: dict[str, Any]) -> ConvergenceConfig:
    """Make the config of either experiment of its fields, as read from JSON. Raises what the config's class does."""
    return (LanguageModelConfig if "context" in fields else ConvergenceConfig).of(fields)


def _measured(config: ConvergenceConfig) -> str:
    """What the evaluations of an experiment measure."""
    return "validation loss" if isinstance(config, LanguageModelConfig) else "accuracy"


def load_all(folder: Path) -> dict[str, dict[int, tuple[ConvergenceConfig, History]]]:
    """Read all runs in a folder.

    Returns:
        name -> seed -> config and history. Runs that differ only by their seed share a name.
    """
    runs: dict[str, dict[int, tuple[ConvergenceConfig, History]]] = {}
    for path in sorted(user_path(folder, "folder").glob("*.parquet")):
        config, history = load(path)
        runs.setdefault(path.stem.removesuffix(f"-{config.seed}"), {})[config.seed] = config, history
    return runs


# ---------------------------------------------------------------- expert search: a line per measurement


def measure_all(configs: Sequence[SearchConfig], path: Path) -> list[dict[str, Any]]:
    """Measure searches, except for those whose results are in a file already.

    Args:
        configs: The searches.
        path: The file, to which each new result is appended as a line of JSON.

    Returns:
        What `expert_search.measure` returns for each config.

    Raises:
        RuntimeError: A measurement failed.
    """
    path = user_path(path)
    lines = path.read_text().splitlines() if path.exists() else []
    known = [json.loads(line) for line in lines]
    results = []
    for config in configs:
        fields = json.loads(json.dumps(asdict(config)))
        found = next((result for result in known if fields.items() <= result.items()), None)
        if found is None:
            found = _measure_in_child(fields)
            with path.open("a") as file:
                print(json.dumps(found), file=file)
        results.append(found)
    return results


def _measure_in_child(fields: dict[str, Any]) -> dict[str, Any]:
    """Measure in a process of its own, so that its memory and its time do not depend on what ran before."""
    with subprocess.Popen(
        python_command("labkit.experiments.results", json.dumps(fields)), stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True, env=child_environment(), cwd=child_folder(),
    ) as child:  # fmt: skip
        try:
            assert child.stdout is not None
            said = child.stdout.read()
            child.wait()
        except BaseException:
            child.kill()
            raise
    if not said:
        raise RuntimeError(f"the measurement of {fields} failed with exit code {child.returncode}")
    found: dict[str, Any] = json.loads(said)
    return found


def main() -> None:
    """Run a child of `measure_all`. Its argument is the configuration."""
    watch_parent()
    fields = json.loads(sys.argv[1])
    print(json.dumps(measure(SearchConfig(**fields | {"grid": tuple(fields["grid"])}))))
