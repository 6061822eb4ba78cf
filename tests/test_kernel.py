"""labkit where people use it: in a Jupyter kernel, in IPython's shell and in a plain script, interrupts included."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager

TIMEOUT = 55.0  # seconds; starting a kernel and importing torch takes most of it

SWARM = """
import time, torch, labkit as lk
from torch import nn
torch.manual_seed(0)
swarm = lk.Swarm()
swarm.serve("ffn", hidden=8, grid=(2, 2), servers=2, isolation="task")
model = nn.Sequential(nn.Linear(4, 8), swarm.moe(8, k_best=2), nn.Linear(8, 2))
x = torch.randn(64, 4)
y = (x.sum(1) > 0).long()
"""
# Says so when the cell's own thread is inside a function of this name. An interrupt before that may hit `print` itself,
# at one of the instructions that have no line, and then IPython 9 fails to show the traceback, and reports no error.
SAY_WHEN_IN = """
import sys, threading
def say_when_in(function):
    cell = threading.get_ident()
    def say():
        while sys._current_frames()[cell].f_code.co_qualname != function:
            time.sleep(0.001)
        print("now in", function)
    threading.Thread(target=say).start()
"""
FIT = "run = lk.fit(model, (x, y), steps=100_000, batch_size=16, trainers=4)"


SCRIPT = (
    SWARM
    + FIT
    + """
import os, signal, threading
from IPython.terminal.interactiveshell import TerminalInteractiveShell

def interrupt_soon():
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()

try:
    interrupt_soon()
    run.wait()
except KeyboardInterrupt:
    print("script: interrupted,", "running" if run.running else "ended")
swarm.close()
print("script:", repr(run.wait(5)))

shell = TerminalInteractiveShell.instance()
shell.history_manager.enabled = False
shell.push({"interrupt_soon": interrupt_soon})
assert shell.run_cell(SWARM + FIT).success
assert isinstance(shell.run_cell("interrupt_soon(); run.wait()").error_in_exec, KeyboardInterrupt)
print("shell: interrupted,", "running" if shell.run_cell("run.running").result else "ended")
shell.run_cell("swarm")
"""
)


@dataclass
class Output:
    """What a cell showed. `error`: the name of the exception that ended it."""

    text: str = ""
    result: dict[str, str] = field(default_factory=dict)
    error: str | None = None
    traceback: str = ""


class Notebook:
    """A kernel that runs one cell after the other."""

    def __init__(self, manager: KernelManager, client: BlockingKernelClient) -> None:
        self.manager = manager
        self.client = client

    def run(self, code: str, interrupt_in: str | None = None) -> Output:
        """Run a cell. `interrupt_in`: the kernel is interrupted when the cell is in the function of that name."""
        output = Output()
        if interrupt_in is not None:
            code = f"{SAY_WHEN_IN}say_when_in({interrupt_in!r}); {code}"

        def listen(message: dict[str, Any]) -> None:
            nonlocal interrupt_in
            kind, content = message["msg_type"], message["content"]
            if kind == "stream":
                output.text += content["text"]
                if interrupt_in is not None and f"now in {interrupt_in}" in output.text:
                    self.manager.interrupt_kernel()
                    interrupt_in = None
            elif kind in ("execute_result", "display_data"):
                output.result = content["data"]
            elif kind == "error":
                output.error, output.traceback = content["ename"], "\n".join(content["traceback"])

        self.client.execute_interactive(textwrap.dedent(code), timeout=TIMEOUT, output_hook=listen)
        return output

    def value(self, expression: str) -> Any:
        """What an expression is in the kernel."""
        output = self.run(expression)
        assert output.error is None, output.traceback
        return eval(output.result["text/plain"])


def files_of_frames(traceback: str) -> list[Path]:
    """The file of each frame that IPython shows, which writes `~` for the home folder."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", traceback)  # without its colours
    return [Path(file).expanduser() for file in re.findall(r"^File (.+):\d+, in ", text, re.MULTILINE)]


@pytest.fixture(scope="module")
def script(tmp_path_factory) -> Iterator[subprocess.Popen[str]]:
    """Runs from the start, beside the kernel, since both import torch first."""
    folder = tmp_path_factory.mktemp("script")
    (folder / "script.py").write_text(f"SWARM, FIT = {SWARM!r}, {FIT!r}\n{SCRIPT}")
    process = subprocess.Popen(
        [sys.executable, folder / "script.py"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "IPYTHONDIR": str(folder)},
    )  # fmt: skip
    with process:
        yield process
        process.kill()


@pytest.fixture(scope="module")
def notebook(script, tmp_path_factory) -> Iterator[Notebook]:
    manager = KernelManager(kernel_name="python3")
    manager.shutdown_wait_time = TIMEOUT  # after half of which it sends a signal
    manager.start_kernel(env={**os.environ, "IPYTHONDIR": str(tmp_path_factory.mktemp("ipython"))})
    client = manager.blocking_client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=TIMEOUT)
        notebook = Notebook(manager, client)
        started = notebook.run(SWARM)
        assert started.error is None, started.traceback
        yield notebook
    finally:
        client.stop_channels()
        if manager.has_kernel:
            manager.shutdown_kernel(now=True)


def test_the_swarm_shows_itself_as_a_table(notebook):
    assert notebook.run("out = model(x)").error is None
    shown = notebook.run("swarm").result
    assert "servers[1]" in shown["text/html"] and "grid ffn 2 × 2: 4 experts alive" in shown["text/html"]
    assert "● running" in shown["text/html"] and "calls answered" in shown["text/html"]
    assert shown["text/plain"].startswith("swarm 'default', open at ")


def test_a_run_goes_on_between_cells_and_an_interrupt_of_wait_does_not_end_it(notebook):
    assert notebook.run(FIT).error is None
    waited = notebook.run("run.wait()", interrupt_in="Trainers.join")
    assert waited.error == "KeyboardInterrupt"
    before = notebook.value("run.steps")
    assert notebook.run(f"while run.steps < {before + 3}: run.wait(0.01)").error is None
    assert notebook.value("run.running")
    assert notebook.run("run.stop()").result["text/plain"].startswith("<run stopped: ")


def test_a_run_that_fails_while_another_cell_runs_says_so_under_the_cell_that_started_it(notebook):
    wait_and_fail = "import threading; go = threading.Event(); fail = lambda step: go.wait(30) and 1 / 0"
    started_in = notebook.client.execute(f"{wait_and_fail}; run = lk.fit(model, (x, y), steps=9, on_step=fail)")
    notebook.client.execute("go.set()\nwhile run.running: time.sleep(0.01)")
    text = ""
    while "the run failed" not in text:
        message = notebook.client.get_iopub_msg(timeout=TIMEOUT)
        text = message["content"].get("text", "")
    assert message["parent_header"]["msg_id"] == started_in


def test_an_interrupt_ends_the_call_of_its_cell_only(notebook):
    assert notebook.run("swarm.faults(latency=1000.0)").error is None
    held = notebook.run("model(x)", interrupt_in="_Call.wait")
    assert held.error == "KeyboardInterrupt"
    assert notebook.run("swarm.faults(latency=0.0)").error is None
    assert notebook.value("list(model(x).shape)") == [64, 2]
    assert notebook.value("[server.state for server in swarm.servers]") == ["running", "running"]


def test_an_error_comes_with_a_short_traceback(notebook):
    output = notebook.run("swarm.serve('ffn', hidden=8, grid=(3, 3))")
    assert output.error == "ValueError"
    package = Path(notebook.value("lk.__file__")).parent
    ours = [file for file in files_of_frames(output.traceback) if file.is_relative_to(package)]
    assert 1 <= len(ours) < 8 and "Group" not in output.traceback


def test_the_cells_run_twice(notebook):
    assert notebook.run("old = swarm").error is None
    for _ in range(2):
        again = notebook.run(SWARM + FIT)
        assert again.error is None, again.traceback
    assert notebook.value("old.closed and not swarm.closed")
    assert (
        notebook.value("sum(thread.name.startswith('labkit-lab') for thread in __import__('threading').enumerate())")
        == 1
    )
    assert notebook.run("while run.steps < 3: run.wait(0.01)").error is None


def test_a_kernel_that_is_shut_down_while_it_trains_ends_cleanly(notebook):
    process = notebook.manager.provisioner.process
    notebook.manager.shutdown_kernel()
    assert process.poll() == 0


def test_a_plain_script_and_the_shell_of_ipython_work_the_same_way(script):
    output, errors = script.communicate(timeout=TIMEOUT)
    assert script.returncode == 0, errors
    for line in (
        "script: interrupted, running",
        "script: <run stopped",
        "shell: interrupted, running",
        "4 experts alive",
    ):
        assert line in output
    assert "Traceback" not in errors
