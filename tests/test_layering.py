"""The house has floors: imports point down, and no files import each other in a circle. Read from the imports.

A part is a package; a module that lies directly in `labkit/` or in `labkit/view/` is a part by itself. Each part has a
floor of its own, and may import what lies below it. A new part fails here until it is given a floor.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

import pytest

import labkit

ROOT = Path(labkit.__file__).parent

# From the ground up. A part imports parts that come before it; the two wings, `server` and `client`, are strangers.
FLOORS = [
    # words: no I/O, no async
    "errors", "suggest", "forks", "interrupts", "printable", "paths", "histogram", "faults", "contact", "events",
    "expert_uid", "process_bound", "tensor_files", "expert_file",
    # the network, the DHT, and the experts in it
    "wire", "dht", "expert_protocol", "directory", "joining", "reachability", "whereabouts", "relay", "node", "portal",
    # copies of experts at other servers
    "copies",
    # the two wings
    "server", "client",
    # training, in real and in virtual time
    "training", "simulation",
    # the notebook
    "launch", "view", "view.worker_thread", "view.scene", "view.outputs", "view.collect", "view.summary",
    "view.picture", "view.log", "view.page", "view.export", "view.recording", "view.progress", "view.starting",
    "view.swarm_view", "swarm_lifecycle", "swarm_layers", "swarm", "resuming",
    # other people's training loops
    "integrations",
    # what a user imports; it imports the others when they are used
    "__init__",
    # the command line
    "bench", "experiments", "cli", "__main__",
]  # fmt: skip
STRANGERS = {("server", "client"), ("client", "server")}
NOTHING_ELSE = {"faults": set[str](), "portal": {"errors", "forks"}}  # parts that import no more of labkit than this
PACKAGES_OF_PARTS = [["view"]]  # whose modules are parts, like those of labkit itself

# Who may import it: a module (`wire/zmq_socket.py`), or a whole folder (`view/page/`).
ONLY = {
    "zmq": {"wire/zmq_socket.py", "wire/zmq_reports.py", "wire/security.py", "bench/echo.py"},
    "ipywidgets": {"view/page/"},
    "anywidget": {"view/page/"},
    "IPython": {"view/page/"},
    "wandb": {"view/log/"},
    "transformers": {"integrations/", "bench/transformers.py"},
    "lightning": {"integrations/"},
    "pytorch_lightning": {"integrations/"},
    # Dask has a network of its own, to workers that the user has started.
    "distributed": {"launch/cluster.py", "launch/cluster_worker.py"},
    "dask": set[str](),
    "threading": {
        "portal.py",
        "server/executor.py",
        "server/user_code.py",
        "training/trainer_threads.py",
        "training/shared_model.py",
        "training/turns.py",
        "simulation/lockstep.py",
        "launch/parent.py",
        "interrupts.py",
        "launch/cluster_worker.py",
        "view/worker_thread.py",
        "view/outputs.py",
        "view/swarm_view.py",
        "view/picture/canvas.py",
        "view/log/custom_loop.py",
        "view/log/rows.py",
        "view/log/swarm_logging.py",
        "experiments/runner.py",
    },
    "_thread": set[str](),
    "multiprocessing": set[str](),  # a server process is spawned as `python -m labkit serve`
    "asyncio": set[str](),
    "pickle": set[str](),  # nothing that came from elsewhere may ever be unpickled
    "cloudpickle": {"launch/by_value.py"},  # but code for processes of one's own; see below
    "dill": set[str](),
    "marshal": set[str](),
    "shelve": set[str](),
}
LATE = [
    "ipywidgets", "anywidget", "wandb", "datasets", "sklearn", "scipy", "matplotlib", "IPython", "PIL", "pandas",
    "pyarrow", "transformers", "accelerate", "lightning", "cloudpickle", "distributed",
]  # fmt: skip

Files = Mapping[str, str]  # module ("wire/frames.py") -> source


@cache
def house() -> Files:
    """The modules of labkit."""
    paths = (path for path in ROOT.rglob("*.py") if "node_modules" not in path.parts)
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in sorted(paths)}


def part_of(module: str) -> str:
    """`wire/frames.py` -> `wire`, `swarm.py` -> `swarm`, `view/scene.py` -> `view.scene`."""
    *folders, file = module.split("/")
    if not folders or (folders in PACKAGES_OF_PARTS and file != "__init__.py"):
        return ".".join([*folders, file.removesuffix(".py")])
    return ".".join(folders)


@cache
def parsed(source: str) -> ast.Module:
    return ast.parse(source)


@cache
def imports(module: str, source: str) -> tuple[str, ...]:
    """Dotted names of all that a module imports, at its top, inside a function, or only for the type checker."""
    return tuple(_imports(module, source))


def _imports(module: str, source: str) -> Iterator[str]:
    package = ["labkit", *module.split("/")[:-1]]
    for node in ast.walk(parsed(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def imported_modules(module: str, files: Files) -> set[str]:
    """The modules among `files` that a module imports. (`from labkit import Swarm` imports `__init__.py`.)"""
    found = set()
    for name in imports(module, files[module]):
        top, *rest = name.split(".")
        if top == "labkit":
            ends = (len(rest) - cut for cut in range(len(rest) + 1))
            candidates = (path for end in ends for path in _paths(rest[:end]) if path in files)
            found.add(next(candidates, "__init__.py"))
    return found - {module}


def _paths(parts: Sequence[str]) -> tuple[str, str]:
    return "/".join(parts) + ".py", "/".join([*parts, "__init__.py"])


def problems(files: Files) -> list[str]:
    """What is wrong with the floors of these modules, in words."""
    said = [
        f"{module} belongs to the part {part_of(module)}, which has no floor: give it one in FLOORS"
        for module in files
        if part_of(module) not in FLOORS
    ]
    for module in files:
        part = part_of(module)
        others = {other: part_of(other) for other in imported_modules(module, files)}
        for other, theirs in sorted(others.items()):
            if {part, theirs} <= set(FLOORS) and FLOORS.index(theirs) > FLOORS.index(part):
                said.append(f"{module} imports {other}, which lies above it")
            if (part, theirs) in STRANGERS:
                said.append(f"{module} imports {other}, but {part} and {theirs} are strangers")
            if part in NOTHING_ELSE and theirs not in {part, *NOTHING_ELSE[part]}:
                said.append(
                    f"{module} imports {other}, but {part} may import only {sorted(NOTHING_ELSE[part]) or 'nothing'}"
                )
    return said + [f"these import each other in a circle: {' -> '.join(circle)}" for circle in circles(files)]


def circles(files: Files) -> list[list[str]]:
    """The groups of modules that reach each other by imports, each sorted (Tarjan's strongly connected components)."""
    arrows = {module: sorted(imported_modules(module, files)) for module in files}
    number, low = dict[str, int](), dict[str, int]()
    path, found = list[str](), list[list[str]]()

    def visit(module: str) -> None:
        number[module] = low[module] = len(number)
        path.append(module)
        for other in arrows[module]:
            if other not in number:
                visit(other)
            if other in path:
                low[module] = min(low[module], low[other])
        if low[module] == number[module]:
            start = path.index(module)
            group, path[start:] = path[start:], []
            if len(group) > 1:
                found.append(sorted(group))

    for module in arrows:
        if module not in number:
            visit(module)
    return found


def test_each_part_has_one_floor_and_every_floor_a_part():
    parts = {part_of(module) for module in house()}
    assert sorted(FLOORS) == sorted(parts)


def test_imports_point_down_and_no_files_import_each_other_in_a_circle():
    assert problems(house()) == []


@pytest.mark.parametrize(
    ("planted", "said"),
    [
        (
            {
                "wire/frames.py": "from labkit.wire.rpc_client import Client",
                "wire/rpc_client.py": "import labkit.wire.frames",
            },
            "these import each other in a circle: wire/frames.py -> wire/rpc_client.py",
        ),
        (
            {
                "dht/node.py": "from labkit.dht import peers",
                "dht/peers.py": "if TYPE_CHECKING:\n    from labkit.dht.node import DHTNode",
            },
            "these import each other in a circle: dht/node.py -> dht/peers.py",
        ),
        (
            {"wire/frames.py": "def f():\n    from labkit.swarm import Swarm", "swarm.py": ""},
            "wire/frames.py imports swarm.py, which lies above it",
        ),
        (
            {"view/scene.py": "from labkit.view.page.pages import Pages", "view/page/pages.py": ""},
            "view/scene.py imports view/page/pages.py, which lies above it",
        ),
        (
            {"client/moe.py": "from labkit.server.backend import ExpertBackend", "server/backend.py": ""},
            "client/moe.py imports server/backend.py, but client and server are strangers",
        ),
        ({"gossip.py": ""}, "gossip.py belongs to the part gossip, which has no floor: give it one in FLOORS"),
        ({"tube/pipe.py": ""}, "tube/pipe.py belongs to the part tube, which has no floor: give it one in FLOORS"),
        (
            {"portal.py": "import labkit.events", "events.py": ""},
            "portal.py imports events.py, but portal may import only ['errors', 'forks']",
        ),
    ],
)  # fmt: skip
def test_a_planted_fault_is_found_and_told(planted, said):
    assert problems(planted) == [said]


@pytest.mark.parametrize("library", ONLY)
def test_a_guarded_library_is_imported_only_where_it_may_be(library):
    users = [m for m, source in house().items() if any(name.split(".")[0] == library for name in imports(m, source))]
    allowed = ONLY[library]
    assert [user for user in users if user not in allowed and user[: user.rfind("/") + 1] not in allowed] == []


def test_nothing_in_the_house_needs_an_integration():
    others = [module for module in house() if part_of(module) != "integrations"]
    users = [module for module in others if "integrations" in map(part_of, imported_modules(module, house()))]
    assert users == [
        "bench/transformers.py",
        "cli/serve.py",
    ]  # which measures one; for --experts-of, when that is given


def test_no_public_class_shares_its_name_with_another():
    homes: dict[str, list[str]] = {}
    for module, source in house().items():
        for node in parsed(source).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(module)
    assert {name: modules for name, modules in homes.items() if len(modules) > 1} == {}


def test_no_module_has_over_400_lines():
    lengths = {module: source.count("\n") for module, source in house().items()}
    assert {module: length for module, length in lengths.items() if length > 400} == {}


def test_nobody_calls_torch_load_or_save_which_pickle():
    users = [
        f"{module}:{node.lineno}"
        for module, source in house().items()
        for node in ast.walk(parsed(source))
        if isinstance(node, ast.Attribute) and node.attr in ("load", "save") and ast.unparse(node.value) == "torch"
    ]
    assert users == []


def test_code_is_handed_to_processes_of_ones_own_alone_and_nothing_from_the_network_is_ever_unpickled():
    """Only a child reads code, of its standard input: what its own parent wrote."""
    users = {module for module in house() if "launch/by_value.py" in imported_modules(module, house())}
    assert users == {"launch/planning.py", "launch/order.py", "launch/server_process.py", "launch/child.py",
                     "launch/placement.py"}  # fmt: skip
    readers = {
        module
        for module in users
        for node in ast.walk(parsed(house()[module]))
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "by_value.read"
    }
    assert readers == {"launch/child.py"}
    named = {
        module
        for module, source in house().items()
        for name in imports(module, source)
        if name.startswith("labkit.launch.by_value.") and name.rpartition(".")[2] in ("read", "write")
    }
    assert named == set(), "its functions are called by their full names, so that this test finds them"
    # The child, which reads, hears of the network only behind `serve_experts`, and reads before that begins.
    child = house()["launch/child.py"]
    assert child.count("by_value.read") == 2 and child.index("_with_code(msgspec") < child.index("trio.run(_serve")


def test_a_worker_of_a_cluster_loads_no_torch():
    code = "import sys, labkit.launch.cluster_worker; print('torch' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60).stdout
    assert output.split() == [b"False"]


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
