"""`labkit bench all`: runs every benchmark several times, beside its limit and beside a peer library.

Each measurement becomes a line of a file, with the time of its end. So a run that was stopped can go on, and a notebook
can redraw what was measured (`medians`). A peer's scripts run with a Python of their own, and print their result as
JSON on the last line.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from labkit.bench.report import check_at_least, ratios_to
from labkit.errors import LabkitError
from labkit.launch.child_python import OWN_GROUP, child_environment, python_command
from labkit.paths import user_path

MEASUREMENT_TIMEOUT = 1200.0  # seconds; the latency benchmark takes six minutes
PEER_TIMEOUT = 180.0  # seconds of one run of a peer's script


@dataclass(frozen=True)
class SuiteRow:
    """One line of the table.

    Args:
        name: Its name.
        options: The arguments of `labkit bench`.
        peer: One of the peer's scripts and its options; or the name of another row, to be compared with the result of
            that row's script; or empty.
    """

    name: str
    options: str
    peer: str = ""


ROWS = (
    SuiteRow("rpc nop, batch 1", "rpc", "hivemind_rpc.py --expert nop --batch 1 --clients 2 --calls 500"),
    SuiteRow(
        "rpc nop, batch 512", "rpc --batch 512 --calls 200",
        "hivemind_rpc.py --expert nop --batch 512 --clients 2 --calls 50",
    ),
    SuiteRow("rpc nop, batch 1, secure", "rpc --secure", "rpc nop, batch 1"),
    SuiteRow("rpc nop, batch 512, secure", "rpc --batch 512 --calls 100 --secure", "rpc nop, batch 512"),
    SuiteRow("rpc nop, batch 512, secure, float16", "rpc --batch 512 --calls 100 --secure --codec float16"),
    SuiteRow("rpc nop, batch 1, through a relay", "rpc --relay"),
    SuiteRow("rpc nop, batch 512, through a relay", "rpc --batch 512 --calls 100 --relay"),
    SuiteRow("rpc ffn, batch 256, forward", "rpc --expert ffn --batch 256 --calls 32"),
    SuiteRow("rpc ffn, batch 256, forward and backward", "rpc --expert ffn --batch 256 --calls 32 --backward"),
    SuiteRow(
        "rpc ffn2, batch 256, forward", "rpc --expert ffn2 --batch 256 --calls 32",
        "hivemind_rpc.py --expert ffn --batch 256 --clients 2 --calls 32",
    ),
    SuiteRow(
        "rpc ffn2, batch 256, forward and backward", "rpc --expert ffn2 --batch 256 --calls 32 --backward",
        "hivemind_rpc.py --expert ffn --batch 256 --clients 2 --calls 32 --backward",
    ),
    SuiteRow("moe ffn, batch 64", "moe --batch 64"),
    SuiteRow("moe ffn, batch 512", "moe --batch 512"),
    SuiteRow("moe ffn2, batch 64", "moe --expert ffn2 --batch 64", "hivemind_moe.py --batch 64 --hidden 256"),
    SuiteRow(
        "moe ffn2, batch 512", "moe --expert ffn2 --batch 512",
        "hivemind_moe.py --batch 512 --hidden 256 --passes 1",
    ),
    SuiteRow("moe ffn2, batch 512, secure", "moe --expert ffn2 --batch 512 --secure", "moe ffn2, batch 512"),
    SuiteRow("dht, 8 peers", "dht", "hivemind_dht.py --peers 8 --rounds 20"),
    SuiteRow("dht, 8 peers, secure", "dht --secure", "dht, 8 peers"),
    SuiteRow("rpc nop, 128 clients", "rpc --clients 128 --calls 100"),
    SuiteRow("rpc nop, 128 clients, batch 512", "rpc --batch 512 --clients 128 --calls 10"),
    SuiteRow("rpc ffn, 128 clients", "rpc --expert ffn --hidden 256 --batch 16 --clients 128 --calls 10 --backward"),
    *(SuiteRow(f"rpc nop, {n} servers", f"rpc --servers {n} --experts 8") for n in (1, 2, 4, 8)),
    *(SuiteRow(f"rpc nop, {n:,} experts", f"rpc --experts {n}") for n in (16, 256, 4096)),
    *(SuiteRow(f"latency {block}", f"latency --block {block} --seconds 15") for block in ("ffn", "transformer")),
)  # fmt: skip


@dataclass(frozen=True)
class SuiteConfig:
    """What `labkit bench all` does.

    Args:
        out: The file to which results are appended.
        runs: How often each row is measured.
        peer_scripts: The folder with the peer's scripts. By default no peer is measured.
        peer_python: The Python in whose environment the peer is installed.
        only: Measure only rows with this in their name.

    Raises:
        ValueError: A folder does not exist, or `runs` is below 1.
    """

    out: str
    runs: int = 5
    peer_scripts: str | None = None
    peer_python: str = sys.executable
    only: str = ""

    def __post_init__(self) -> None:
        check_at_least(1, self, "runs")
        object.__setattr__(self, "out", str(user_path(self.out, "out")))
        if self.peer_scripts is not None:
            object.__setattr__(self, "peer_scripts", str(user_path(self.peer_scripts, "peer_scripts")))
        if "/" in self.peer_python or os.sep in self.peer_python:  # else it is found in PATH
            object.__setattr__(self, "peer_python", str(user_path(self.peer_python, "peer_python")))
        if self.peer_scripts is not None and not Path(self.peer_scripts).is_dir():
            raise ValueError(f"peer_scripts={self.peer_scripts}: there is no such folder")
        if not Path(self.out).parent.is_dir():
            raise ValueError(f"out={self.out}: there is no folder {Path(self.out).parent}")


def measure(config: SuiteConfig, rows: Sequence[SuiteRow] = ROWS) -> dict[str, Any]:
    """Do the measurements that are not in the file yet. If one of the peer's fails, this is printed and it is left out.

    Returns:
        The medians of each row, by its name.

    Raises:
        LabkitError: A measurement of labkit's failed.
        ValueError: No row has `config.only` in its name.
    """
    path = Path(config.out)
    wanted = [row for row in rows if config.only in row.name]
    if not wanted:
        names = "; ".join(row.name for row in rows)
        raise ValueError(f"only={config.only}: no row has this in its name. There are: {names}")
    for run in range(config.runs):
        for row in wanted:
            for who, command in _commands(row, config):
                done = sum(line["row"] == row.name and line["who"] == who for line in _lines(path))
                if done > run:
                    continue
                print(f"run {run + 1} of {config.runs}: {row.name}, {who}", file=sys.stderr, flush=True)
                try:
                    result = _result(command, MEASUREMENT_TIMEOUT if who == "labkit" else PEER_TIMEOUT)
                except LabkitError as error:
                    if who == "labkit":
                        raise
                    print(f"left out: {error}", file=sys.stderr, flush=True)
                    continue
                with path.open("a") as file:
                    now = datetime.now(UTC).isoformat(timespec="seconds")
                    print(json.dumps({"row": row.name, "who": who, "at": now, **result}), file=file)
    return {line["row"]: {k: v for k, v in line.items() if k != "row"} for line in medians(path, rows)}


def _commands(row: SuiteRow, config: SuiteConfig) -> Iterator[tuple[str, list[str]]]:
    yield "labkit", python_command("labkit.__main__", "bench", *row.options.split(), "--json")
    if config.peer_scripts is not None and ".py" in row.peer:
        script, *options = row.peer.split()
        yield "peer", [config.peer_python, str(Path(config.peer_scripts) / script), *options]


def _result(command: Sequence[str], timeout: float) -> dict[str, Any]:
    """Run a command and return the JSON on its last line."""
    said = ""
    try:
        output, errors = _run(command, timeout)
        said = (errors.strip().splitlines() or [""])[-1]
        result: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    except (OSError, ValueError, IndexError, subprocess.TimeoutExpired) as error:
        raise LabkitError(f"{' '.join(command)} printed no result as its last line ({said or error})") from error
    return result


def _run(command: Sequence[str], timeout: float) -> tuple[str, str]:
    """Run a command and return its output and its errors. Then, or after the timeout, kill all that it started."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=child_environment(), **OWN_GROUP,
    )  # fmt: skip
    with process:
        try:
            return process.communicate(timeout=timeout)
        finally:
            if os.name == "posix":
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.kill()


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def medians(path: Path, rows: Sequence[SuiteRow] = ROWS) -> list[dict[str, Any]]:
    """Read the results back.

    Args:
        path: The file of results.
        rows: The rows of the table, in their order.

    Returns:
        A dictionary for each row that was measured: The medians of its figures, the number of `runs`, and the smallest
        and largest share of the limit (`of_limit_range`). Where the peer was measured too, also `peer_runs`, and how
        many times better each rate or time is than the peer's (`…_to_peer`).
    """
    lines, table = _lines(path), list[dict[str, Any]]()
    for row in rows:
        ours, peers = (_median(lines, name, who) for name, who in ((row.name, "labkit"), (_peer_row(row), "peer")))
        if not ours:
            continue
        beside = {"peer_runs": peers["runs"], **ratios_to(ours, peers)} if peers else {}
        table.append({"row": row.name, **ours, **beside})
    return table


def _peer_row(row: SuiteRow) -> str:
    return row.name if ".py" in row.peer else row.peer


def _median(lines: Sequence[dict[str, Any]], name: str, who: str) -> dict[str, Any]:
    some = [line for line in lines if line["row"] == name and line["who"] == who]
    if not some:
        return {}
    figures = {key: _middle([line[key] for line in some]) for key in some[0]}
    known: dict[str, Any] = {key: value for key, value in figures.items() if value is not None}
    if "of_limit" in known:
        shares = [line["of_limit"] for line in some]
        known["of_limit_range"] = [min(shares), max(shares)]
    return {**known, "runs": len(some)}


def _middle(values: Sequence[Any]) -> Any:
    """Returns the median of numbers, or element by element of lists of them; None for other values."""
    if all(type(value) in (int, float) for value in values):
        return median(values)
    if all(type(value) is list and len(value) == len(values[0]) for value in values):
        columns = [_middle(column) for column in zip(*values, strict=True)]
        return None if None in columns else columns
    return None
