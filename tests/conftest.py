"""What every test has: one compute thread for torch, a home folder of the suite's, reproducible property tests, and a
check that nothing is left."""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import settings

import tests.quick_imports  # noqa: F401  # before anything of Jupyter's
from tests.forked_python import template

GRACE = 2.0  # seconds: what `close()` may take
ELSEWHERE = (
    "IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "MPLCONFIGDIR", "XDG_CACHE_HOME",
    "XDG_CONFIG_HOME", "XDG_DATA_HOME",
)  # fmt: skip  # what can lead Jupyter, IPython and matplotlib out of the home folder

LONGEST = (
    "test_notebooks", "test_moe", "test_swarm", "test_ends", "test_servers", "test_transformers_experts",
    "test_dashboard_kernel", "test_readme", "test_resuming", "test_child_python", "test_bench", "test_recovery",
    "test_promises", "test_snapshot", "test_integrations", "test_demo", "test_leaving", "test_lora",
    "test_transformers_loading", "test_patience", "test_places", "test_forks", "test_kernel", "test_colab_kernel",
)  # fmt: skip  # that take the longest: they begin first, so that none of them is left over at the end

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job begins with interrupts ignored
settings.register_profile("labkit", deadline=None, derandomize=True, database=None, max_examples=60)
settings.load_profile("labkit")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long come first."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The suite's tensors are small, and its machine may have two cores."""
    import torch  # not by the process that only hands out the tests

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The user's home may be read-only, or have settings that change what Jupyter, IPython and matplotlib do."""
    home = str(tmp_path_factory.mktemp("home"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", home)
        patch.setenv("USERPROFILE", home)  # on Windows
        for name in ELSEWHERE:
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="session")
def forking_popen() -> Iterator[type[subprocess.Popen[Any]]]:
    with template() as popen:
        yield popen


@pytest.fixture
def forked_python(forking_popen: type[subprocess.Popen[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that are not about how a process of Python starts: each is forked from one that has imported torch."""
    monkeypatch.setattr(subprocess, "Popen", forking_popen)


def _threads() -> set[threading.Thread]:
    """Threads that have to end: those that keep a process alive, and ours whether they do or not."""
    return {t for t in threading.enumerate() if not t.daemon or t.name.startswith("labkit-")}


def _children() -> set[psutil.Process]:
    """Those of this process. For each of thousands of tests, psutil would look at every process of the machine."""
    pids = _child_pids()
    while pids != (pids := _child_pids()):
        pass  # one that ends while they are listed may hide another
    if pids is None:
        return set(psutil.Process().children())
    found = set[psutil.Process]()
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            found.add(psutil.Process(pid))
    return found


def _child_pids() -> list[int] | None:
    """What Linux says of each of our threads; None on another system."""
    lists = list[str]()
    for path in Path("/proc/self/task").glob("*/children"):
        with suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended, and left them to another one
            lists.append(path.read_text(encoding="ascii"))
    return sorted(map(int, " ".join(lists).split())) if lists else None


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Fails a test that leaves a thread or a child process behind. What wider fixtures hold open was there before."""
    threads, children = _threads(), _children()
    yield
    left_threads = _threads() - threads
    for thread in left_threads:
        while thread.ident is None and thread in threading.enumerate():  # it is being started
            time.sleep(0.001)
        thread.join(GRACE)
    _, left_processes = psutil.wait_procs(_children() - children, timeout=GRACE)
    left = [thread.name for thread in left_threads if thread.is_alive()]
    left += [" ".join(process.cmdline()) for process in left_processes if not _is_python_helper(process)]
    assert not left, f"the test left running: {left}"


def _is_python_helper(process: psutil.Process) -> bool:
    # Python's own resource tracker starts with the first semaphore somebody makes, and lives as long as we do.
    return "resource_tracker" in " ".join(process.cmdline())
