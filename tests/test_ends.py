"""However a process with a swarm ends, it ends within seconds, saves what it promised, and leaves nothing behind.

Real processes, signals and terminals. What forked children may do is in `test_forks`.
"""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from labkit.server.checkpoints import load_expert
from tests.forked_python import PLAIN
from tests.swarms import eventually

pytestmark = pytest.mark.usefixtures("forked_python")

START_TIME, END_TIME = 60.0, 30.0  # seconds; the first is mostly an import of torch, on a machine that is busy


class Process:
    """A process of labkit whose temporary files are in a folder of its own, and what it has said."""

    def __init__(self, process: subprocess.Popen[bytes], temporary: Path, output: int) -> None:
        self.process = process
        self.temporary = temporary
        self.said = b""
        self._output = output

    def until(self, words: bytes) -> None:
        """Read what it says until these words come."""
        deadline = time.monotonic() + START_TIME
        while words not in self.said:
            assert time.monotonic() < deadline and self._read(1.0), self.said

    def _read(self, timeout: float) -> bool:
        if select.select([self._output], [], [], timeout)[0]:
            try:
                data = os.read(self._output, 1 << 16)
            except OSError:  # of a terminal whose last process has ended
                data = b""
            self.said += data
            return data != b""
        return True

    def children(self) -> list[psutil.Process]:
        found: list[psutil.Process] = psutil.Process(self.process.pid).children(recursive=True)
        return found

    def check_end(self, *, status: int | None = None, children: list[psutil.Process] | None = None) -> None:
        """It ends in time, with this status, and neither it nor its children leave anything."""
        deadline = time.monotonic() + END_TIME
        while self.process.poll() is None:
            assert time.monotonic() < deadline, f"it did not end: {self.said!r}"
            if not self._read(0.1):
                self.process.wait(END_TIME)
        if status is not None:
            assert self.process.returncode == status, self.said
        _, alive = psutil.wait_procs(children or [], timeout=END_TIME)
        assert alive == []
        eventually(lambda: not list(self.temporary.iterdir()), END_TIME)


@contextmanager
def started(
    arguments: list[str], temporary: Path, *, terminal: bool = False, afresh: bool = False
) -> Iterator[Process]:
    """`afresh`: also if others are forked."""
    temporary.mkdir()
    environment = {**os.environ, "TMPDIR": str(temporary), "PYTHONUNBUFFERED": "1"}
    ours, theirs = pty.openpty() if terminal else os.pipe()
    try:
        process = (PLAIN if afresh else subprocess.Popen)(
            [sys.executable, *arguments], stdin=theirs if terminal else subprocess.DEVNULL, stdout=theirs,
            stderr=theirs, env=environment, start_new_session=True,
        )  # fmt: skip
    finally:
        os.close(theirs)
    try:
        yield Process(process, temporary, ours)
    finally:
        process.kill()
        process.wait()
        os.close(ours)


# ---------------------------------------------------------------- a terminal that serves

SERVE = ["-m", "labkit", "serve", "--grid", "1", "--hidden", "4", "--checkpoint-dir"]
TAUGHT = """
import signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # it is ignored where the tests run under nohup
from labkit.__main__ import main
from labkit.cli import serve
begun = serve.Swarm.serve
def taught(swarm, *arguments, **options):
    servers = begun(swarm, *arguments, **options)
    import torch
    swarm.expert("ffn.0")(torch.ones(1, 4)).sum().backward()
    return servers
serve.Swarm.serve = taught
sys.exit(main())
"""  # `labkit serve`, with an expert that has learnt something which is not saved yet


AT_IMPORT = """
find = builtins.__import__
def interrupted(name, *rest):
    if name == "torch":
        os.kill(os.getpid(), signal.SIGINT)
    return find(name, *rest)
builtins.__import__ = interrupted
"""  # Ctrl-C at the moment in which torch is imported


def test_sighup_ends_labkit_serve_when_its_experts_are_saved(tmp_path):
    with started(["-c", TAUGHT, *SERVE[2:], str(tmp_path / "experts")], tmp_path / "files") as serving:
        serving.until(b"serving until")
        serving.process.send_signal(signal.SIGHUP)
        serving.check_end(status=0)
    state = load_expert(tmp_path / "experts", "ffn.0")
    assert state is not None and state["counter.updates"] == 1


def test_so_does_closing_its_terminal_where_nothing_can_be_written_any_more(tmp_path):
    code = f"import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n{TAUGHT}"
    with started(["-c", code, *SERVE[2:], str(tmp_path / "experts")], tmp_path / "files", terminal=True) as serving:
        serving.until(b"serving until")
        os.close(serving._output)
        serving._output = os.open(os.devnull, os.O_RDONLY)
        serving.process.wait(END_TIME)
        serving.check_end(status=0)
    state = load_expert(tmp_path / "experts", "ffn.0")
    assert state is not None and state["counter.updates"] == 1


@pytest.mark.parametrize("words", [b"", b"serving until"], ids=["while it starts", "while it serves"])
def test_a_reader_of_its_output_that_goes_away_ends_it_too(tmp_path, words):
    with started(["-c", TAUGHT, *SERVE[2:], str(tmp_path / "experts")], tmp_path / "files") as serving:
        serving.until(words)
        os.close(serving._output)
        serving._output = os.open(os.devnull, os.O_RDONLY)
        serving.process.wait(END_TIME if words else START_TIME)
        serving.check_end(status=0)
    state = load_expert(tmp_path / "experts", "ffn.0")
    assert state is not None and state["counter.updates"] == 1


def test_an_interrupt_before_it_has_begun_to_serve_ends_it_in_a_word_and_another_one_is_not_heard(tmp_path):
    code = (
        f"import atexit, builtins, os, signal\n{AT_IMPORT}\nimport sys\nfrom labkit.__main__ import main\n"
        "atexit.register(os.kill, os.getpid(), signal.SIGINT)\nsys.exit(main())"
    )
    with started(["-c", code, "serve"], tmp_path / "files", afresh=True) as serving:
        serving.check_end(status=130)
    assert serving.said == b"stopped\n"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
def test_the_demo_leaves_nothing_when_a_signal_ends_it(tmp_path, name):
    command = ["-m", "labkit", "demo", "--steps", "1000000", "--servers", "1", "--kill", "0"]
    with started(command, tmp_path / "files") as demo:
        demo.until(b"step/s, loss")
        children = demo.children()
        assert len(children) == 1
        demo.process.send_signal(getattr(signal, name))
        demo.check_end(status=-signal.SIGKILL if name == "SIGKILL" else 130, children=children)


# ---------------------------------------------------------------- scripts

SCRIPT = """
import atexit, os, signal, sys, threading, time, torch, labkit as lk
from torch import nn
torch.set_num_threads(1)
swarm = lk.Swarm()
swarm.serve("ffn", hidden=4, grid=(1,), isolation=sys.argv[2], checkpoint_dir=sys.argv[1])
swarm.expert("ffn.0")(torch.ones(1, 4)).sum().backward()
dashboard = swarm.dashboard()
log = swarm.log_to(lk.JsonlLogger(sys.argv[1] + "/log"), period=0.1)
model = nn.Sequential(swarm.moe(4, k_best=1, name="ffn"), nn.Linear(4, 2))
run = lk.fit(model, (torch.randn(64, 4), torch.randint(2, (64,))), steps=1_000_000, trainers=2)
while run.steps < 3:
    time.sleep(0.01)

def interrupt_twice():
    for _ in range(2):
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

class Late:
    def __del__(self, ends=(dashboard.close, dashboard.__del__, log.stop, swarm.close)):
        for end in ends:
            end()

print("ready", flush=True)
"""
# Where the server of what is to be saved runs: a task can save while Python ends, a process whatever becomes of us.
ENDS = {
    "its last line": ("task", ""),
    "an exception at import": ("task", "sys.path[:0] = [sys.argv[1]]; import bad"),
    "two interrupts": ("task", "threading.Thread(target=interrupt_twice, daemon=True).start(); run.wait()"),
    "a finalizer at the very end": ("task", "sys.modules['late'] = Late()"),
    "os._exit": ("process", "os._exit(0)"),
    "SIGTERM": ("process", "os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)"),
}


@pytest.mark.parametrize("end", ENDS)
def test_a_script_with_all_that_labkit_has_ends_and_its_servers_have_saved(tmp_path, end):
    isolation, code = ENDS[end]
    (tmp_path / "experts").mkdir()
    (tmp_path / "experts" / "bad.py").write_text("1 / 0")
    (tmp_path / "script.py").write_text(SCRIPT + code)
    with started([str(tmp_path / "script.py"), str(tmp_path / "experts"), isolation], tmp_path / "files") as script:
        script.until(b"ready")
        script.check_end()
    if end != "two interrupts":  # the second one does not wait for what the first has begun
        state = eventually(lambda: load_expert(tmp_path / "experts", "ffn.0"), END_TIME)
        assert state is not None and state["counter.updates"] >= 1
        assert b"Exception ignored" not in script.said


def test_ipython_in_a_terminal_ends_with_a_dashboard_that_was_shown(tmp_path):
    command = ["-m", "IPython", "--no-banner", "--simple-prompt", "--no-confirm-exit"]
    with started(command, tmp_path / "files", terminal=True) as shell:
        shell.until(b"In [1]: ")
        for line in (
            "import labkit as lk; swarm = lk.Swarm(); _ = swarm.serve('nop', grid=(1,), isolation='task')",
            "swarm.dashboard()",
            "Late = type('Late', (), {'__del__': lambda self, end=swarm.dashboard().__del__: end()})",
            "import sys; sys.modules['late'] = Late()  # so that the widget's finalizer is called very late",
            "print('all', 'shown')",
        ):
            os.write(shell._output, line.encode() + b"\n")
        shell.until(b"all shown")
        os.write(shell._output, b"exit()\n")
        shell.check_end(status=0)


# ---------------------------------------------------------------- outputs


def says(arguments: list[str], **environment: str) -> bytes:
    """What a command prints that has such an environment, and ends without a fault."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, timeout=110)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_output_that_does_not_know_all_letters_does_not_hinder_the_demo():
    demo = ["-m", "labkit", "demo", "--servers", "1", "--steps", "9", "--kill", "0"]
    assert b"test accuracy" in says(demo, PYTHONIOENCODING="cp1252", NO_COLOR="1", TERM="dumb", COLUMNS="20")


def test_nor_a_script_that_prints_a_swarm():
    code = (
        "import labkit as lk\nwith lk.Swarm() as swarm:\n"
        "    swarm.serve('nop', grid=(2, 2), isolation='task'); print(swarm, swarm.servers)"
    )
    assert b"grid nop 2 ? 2" in says(["-c", code], LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
