"""What tests of the notebooks need: to run one in a real kernel, and to read what its cells put out.

`python -m tests.notebook_runs NOTEBOOK` runs one at full size and saves it, as it is to be committed.

`NotebookRuns` runs those of `TOGETHER` with few steps, for their tests, which wait for that: a child process, since it
has an event loop, and kernels, of its own.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import struct
import subprocess
import sys
from base64 import b64decode
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

from labkit.launch.parent import watch_parent

ROOT = Path(__file__).parent.parent
NOTEBOOKS = [*sorted((ROOT / "notebooks").glob("*.ipynb")), *sorted((ROOT / "tutorials").glob("*.ipynb"))]
LONG = ("00_", "02_", "05_", "06_", "07_", "08_", "09_", "throughput")  # many servers, a second kernel, measurements
APART = [path for path in NOTEBOOKS if path.name.startswith(LONG)]  # which `make test-network` runs
TOGETHER = [path for path in NOTEBOOKS if path not in APART]
STEPS = 28  # of a run in a test
SIDE_BY_SIDE = 2
RUN_ALL = """
import asyncio, pathlib, sys, tests.quick_imports, tests.notebook_runs
asyncio.run(tests.notebook_runs.run_all(pathlib.Path(sys.argv[1])))
"""
FORK = f"""
import sys
if "tests.forked_python" not in sys.modules:
    sys.path.append({str(ROOT)!r})
    import tests.forked_python
    tests.forked_python.fork_from_now_on()
    sys.path.remove({str(ROOT)!r})
"""  # what a kernel runs first, so that its servers start at once
CELL_TIMEOUT = 150  # seconds, with few steps
WHOLE_CELL_TIMEOUT = 1800  # at full size
PROBLEMS = "problems.json"  # what went wrong, by the name of the notebook
SNAPSHOTS = ((1200, 800), (1200, 980))  # pixels; the larger ones have learning curves
BAR = re.compile(r"\d+%\|.*\| \d+/\d+ \[")  # what is left of a progress bar, which is a widget
PNG = b"\x89PNG\r\n\x1a\n"
PATH = re.compile(r"(?<![\w.:/])/(?:work|home|root|tmp|mnt|var|usr|opt|Users|content)/\S*")


class NotebookRuns:
    """All notebooks, run by a child process that ends when this process does. They are in `folder` as they ran."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._process = subprocess.Popen(
            [sys.executable, "-c", RUN_ALL, str(folder)], cwd=ROOT, stdin=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    def problems(self) -> dict[str, str]:
        """Wait for them. What went wrong with each, by name; empty for those that ran."""
        assert self._process.wait() == 0
        problems: dict[str, str] = json.loads((self.folder / PROBLEMS).read_text(encoding="utf-8"))
        return problems

    def end(self) -> None:
        """Wait for nothing, and leave nothing."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


async def run_all(folder: Path) -> None:
    """Run them with few steps, several side by side, and write what they put out, and what went wrong, into `folder`.

    Most of what it would take to run each in a kernel of its own is imports. So a kernel runs one notebook after the
    other, and forgets all names in between; after one that failed it is restarted. Its servers are forked (see
    `forked_python`). It has no key of anybody's, and a folder for temporary files. The end of standard input means that
    nobody waits for them any more.
    """
    problems: dict[str, str] = {}
    left = iter(TOGETHER)

    async def run_some(number: int) -> None:
        """Run what is left, one after the other."""
        temporary = folder / f"files-{number}"
        temporary.mkdir()
        others = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
        kernel = AsyncKernelManager(kernel_name="python3")
        await kernel.start_kernel(env={**others, "LABKIT_STEPS": str(STEPS), "TMPDIR": str(temporary)})
        try:
            for path in left:
                problems[path.name] = ""
                try:
                    await run(path, folder / path.name, kernel=kernel)
                except Exception as error:
                    problems[path.name] = str(error)
                    await kernel.restart_kernel(now=True)
        finally:
            await kernel.shutdown_kernel()

    watch_parent()  # when this process exits, the kernels notice, and end with their servers
    await asyncio.gather(*map(run_some, range(SIDE_BY_SIDE)))
    (folder / PROBLEMS).write_text(json.dumps(problems), encoding="utf-8")


def read(path: Path) -> Any:
    """A notebook as it is committed."""
    return nbformat.read(path, as_version=4)


async def run(path: Path, to: Path, timeout: int = CELL_TIMEOUT, kernel: AsyncKernelManager | None = None) -> None:
    """Run a notebook from top to bottom, and keep its outputs. Raises what a cell raised.

    Without widgets, of which a reader would only see that they are not there, and without progress bars.

    Args:
        path: The notebook.
        to: Where it is written as it ran.
        timeout: Seconds that a cell may take.
        kernel: One that may have run others; by default a new one.
    """
    notebook = read(path)
    for cell in code_cells(notebook):
        cell.outputs = []
    where = {"metadata": {"path": str(path.parent)}}
    how: dict[str, Any] = {"timeout": timeout, "kernel_name": "python3", "record_timing": False}
    how["interrupt_on_timeout"] = True  # so that the traceback shows where it was
    client = NotebookClient(notebook, km=kernel, resources=where, store_widget_state=False, **how)
    if kernel is None:
        await client.async_execute()
    else:
        client.kc = kernel.client()
        client.kc.start_channels()
        try:
            await client.kc.wait_for_ready(timeout)
            # A process that is spawned asks `__main__` for its `__spec__`, which is forgotten, too.
            fresh = f"%reset -f\n__spec__ = None\n__import__('os').chdir({str(path.parent)!r})"
            await client.kc.execute_interactive(FORK + fresh)
            await client.async_execute()
        finally:
            client.kc.stop_channels()
    for cell in code_cells(notebook):
        cell.outputs = [o for o in cell.outputs if not BAR.search(o.get("data", {}).get("text/plain", ""))]
        for output in cell.outputs:
            output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
    nbformat.write(notebook, to)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(notebook: Any, mime: str = "text/plain") -> str:
    """All outputs of a notebook in one format, streams included."""
    found = []
    for cell in code_cells(notebook):
        for output in cell.outputs:
            found.append(output.get("text", "") if mime == "text/plain" else "")
            found.append(output.get("data", {}).get(mime, ""))
    return "\n".join(found)


def numbers(pattern: str, text: str) -> list[float]:
    """What the one group of `pattern` matches, as numbers; at least one."""
    found = [float(number.replace(",", "")) for number in re.findall(pattern, text)]
    assert found, f"nothing like {pattern!r} in {text}"
    return found


def pictures(notebook: Any) -> list[bytes]:
    """The PNGs among the outputs."""
    found = (output.get("data", {}).get("image/png") for cell in code_cells(notebook) for output in cell.outputs)
    return [b64decode(png) for png in found if png]


def snapshots(notebook: Any) -> list[bytes]:
    """Those of them that show a dashboard, none of which is empty."""
    shown = [png for png in pictures(notebook) if png_size(png) in SNAPSHOTS]
    assert all(len(png) > 20_000 for png in shown)
    return shown


def png_size(png: bytes) -> tuple[int, int]:
    """Width and height in pixels."""
    assert png.startswith(PNG)
    width, height = struct.unpack(">II", png[16:24])
    return width, height


def check_committed(notebook: Any) -> None:
    """It was run from top to bottom in a fresh kernel, without an error, and says nothing of the machine."""
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1)), "run it from top to bottom in a fresh kernel, and save it"
    assert "widgets" not in notebook.metadata, "save it without the state of its widgets"
    for cell in code_cells(notebook):
        for output in cell.outputs:
            assert output.output_type != "error"
            own = output.get("text", "").startswith(("k_best=", "the server of "))  # what labkit itself says
            assert output.get("name") != "stderr" or own, output.text
    said = "\n".join(texts(notebook, mime) for mime in ("text/plain", "text/html"))
    assert "Traceback" not in said
    assert not PATH.findall(said)


if __name__ == "__main__":
    asyncio.run(run(Path(sys.argv[1]).absolute(), Path(sys.argv[-1]).absolute(), WHOLE_CELL_TIMEOUT))
