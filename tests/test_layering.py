"""The house has floors: imports point down, or sideways within one part. Read from the imports themselves.

A module belongs to a part: its package (`wire`, `dht`, …) or, at the top level, itself. A new part fails this test
until it is given a floor here.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "labkit"

FLOORS: list[set[str]] = [
    {"errors", "events", "contact", "expert_uid", "histogram", "resources"},  # words: no I/O, no async
    {"wire", "faults"},
    {"dht", "directory", "joining", "node"},  # node: an endpoint, a DHT node and a directory in one
    {"portal", "pulse"},  # below the wings, since the MoE layer's autograd function enters the lab thread through it
    {"server", "client"},
    {"run", "trainer", "shared_model", "update_rule", "streams", "data", "experiments"},
    {
        "swarm",
        "swarm_view",
        "remote_view",
        "viewers",
        "polling",
        "planning",
        "handles",
        "lives",
        "child",
        "census",
        "view",
    },  # the notebook
    {
        "serving",
        "demo",
        "watch",
        "page_server",
        "bench",
        "__main__",
        "__init__",
    },  # the command line, and what is imported from outside
]
STRANGERS = [("server", "client"), ("client", "server")]
LEAVES = {
    "faults": set[str](),
    "portal": {"errors"},
    "data": {"errors"},
}  # parts that import no more of labkit than this

# Who may import it: a module (`wire/sockets.py`), or a whole package (`view/`).
ONLY = {
    "zmq": {"wire/sockets.py", "wire/making.py", "wire/security.py", "bench/echo.py"},
    "ipywidgets": {"view/"},
    "anywidget": {"view/"},
    "IPython": {"view/"},
    "wandb": {"view/loggers.py"},
    "threading": {
        "portal.py",
        "server/compute.py",
        "experiments/lockstep.py",
        "experiments/parent.py",
        "experiments/runner.py",
        "run.py",
        "shared_model.py",
        "swarm_view.py",
        "pulse.py",
        "view/figures.py",
        "view/log_to.py",
        "view/outputs.py",
        "view/rows.py",
        "child.py",
        "page_server.py",
        "bench/worker.py",
    },  # child, page_server, worker: read their orders
    "_thread": set[str](),
    "multiprocessing": set[str](),  # a server process is spawned as `python -m labkit serve`
    "asyncio": set[str](),
    "pickle": set[str](),  # nothing that came from elsewhere may ever be unpickled
    "cloudpickle": set[str](),
    "dill": set[str](),
    "marshal": set[str](),
    "shelve": set[str](),
}
LATE = ["ipywidgets", "anywidget", "wandb", "datasets", "sklearn", "scipy", "matplotlib", "IPython", "PIL", "pandas"]

MODULES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py") if "node_modules" not in path.parts)


def part_of(module: str) -> str:
    """`wire/rpc.py` -> `wire`, `swarm.py` -> `swarm`."""
    return module.split("/")[0].removesuffix(".py")


def floor_of(part: str) -> int:
    return next(number for number, parts in enumerate(FLOORS) if part in parts)


@cache
def tree(module: str) -> ast.Module:
    return ast.parse((ROOT / module).read_text(encoding="utf-8"))


def imports(module: str) -> Iterator[str]:
    """Absolute dotted names of all that `module` imports, at its top or inside a function."""
    package = ["labkit", *module.split("/")[:-1]]
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{source}.{alias.name}" for alias in node.names)


def imported_parts(module: str) -> set[str]:
    """The parts of labkit that `module` imports, other than its own."""
    found = set()
    for name in imports(module):
        top, *rest = name.split(".")
        if top == "labkit":
            known = rest and ((ROOT / f"{rest[0]}.py").exists() or (ROOT / rest[0]).is_dir())
            found.add(rest[0] if known else "__init__")  # `from labkit import Swarm` imports labkit itself
    return found - {part_of(module)}


def test_every_part_has_a_floor():
    placed = set().union(*FLOORS)
    assert sum(map(len, FLOORS)) == len(placed), "a part stands on two floors"
    assert {part_of(module) for module in MODULES} <= placed


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down_or_sideways(module):
    part = part_of(module)
    imported = imported_parts(module)
    assert [other for other in imported if floor_of(other) > floor_of(part)] == []
    assert [other for other in imported if (part, other) in STRANGERS] == []
    assert imported <= LEAVES.get(part, imported)


@pytest.mark.parametrize("library", ONLY)
def test_a_guarded_library_is_imported_only_where_it_may_be(library):
    users = [module for module in MODULES if any(name.split(".")[0] == library for name in imports(module))]
    allowed = ONLY[library]
    assert [user for user in users if user not in allowed and f"{part_of(user)}/" not in allowed] == []


def test_nobody_calls_torch_load_or_save_which_pickle():
    users = [
        f"{module}:{node.lineno}"
        for module in MODULES
        for node in ast.walk(tree(module))
        if isinstance(node, ast.Attribute) and node.attr in ("load", "save") and ast.unparse(node.value) == "torch"
    ]
    assert users == []


def test_importing_labkit_is_quick_and_brings_no_widgets_and_no_data_sets_nor_do_the_digits():
    code = (
        "import json, sys, time, torch; before = time.perf_counter(); import labkit; "
        "duration = time.perf_counter() - before; labkit.load('digits'); "
        "print(json.dumps([duration, [name.split('.')[0] for name in sys.modules]]))"
    )
    seconds = []
    for _ in range(3):  # the best of three, since a machine may have other things to do; mostly one is enough
        output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60).stdout
        duration, loaded = json.loads(output)
        assert [name for name in LATE if name in loaded] == []
        seconds.append(duration)
        if duration < 0.5:
            break
    assert min(seconds) < 0.5
