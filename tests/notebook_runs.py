"""What tests of the notebooks need: to run one in a real kernel, and to read what its cells put out.

`python -m tests.notebook_runs NOTEBOOK` runs one at full size and saves it, as it is to be committed.
"""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
from base64 import b64decode
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
STEPS = 28  # of a run in a test
SIDE_BY_SIDE = 3
SNAPSHOT = (1200, 800)  # pixels
PNG = b"\x89PNG\r\n\x1a\n"
PATH = re.compile(r"(?<![\w.:/])/(?:work|home|root|tmp|mnt|var|usr|opt|Users|content)/\S*")


def run_all(paths: Sequence[Path], folder: Path) -> dict[Path, str]:
    """Run notebooks with few steps, several side by side. What they put out is in `folder`; returns what went wrong.

    Each has a process of its own, no key of anybody's, and a folder for temporary files.
    """

    def run_one(path: Path) -> str:
        temporary = folder / f"{path.stem}-files"
        temporary.mkdir()
        environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
        done = subprocess.run(
            [sys.executable, "-m", "tests.notebook_runs", str(path), str(folder / path.name)], cwd=ROOT,
            capture_output=True, text=True, env={**environment, "LABKIT_STEPS": str(STEPS), "TMPDIR": str(temporary)},
        )  # fmt: skip
        return "" if done.returncode == 0 else done.stderr

    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        return dict(zip(paths, pool.map(run_one, paths), strict=True))


def read(path: Path) -> Any:
    """A notebook as it is committed."""
    return nbformat.read(path, as_version=4)


def run(path: Path, to: Path) -> None:
    """Run a notebook from top to bottom in a new kernel, and keep its outputs. Raises what a cell raised.

    Without widgets, of which a reader would only see that they are not there.
    """
    notebook = read(path)
    for cell in code_cells(notebook):
        cell.outputs = []
    where = {"metadata": {"path": str(path.parent)}}
    how: dict[str, Any] = {"timeout": 150, "kernel_name": "python3", "record_timing": False}
    NotebookClient(notebook, resources=where, store_widget_state=False, **how).execute()
    for cell in code_cells(notebook):
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
    shown = [png for png in pictures(notebook) if png_size(png) == SNAPSHOT]
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
            assert output.get("name") != "stderr" or output.text.startswith("k_best="), output.text  # labkit's own
    said = "\n".join(texts(notebook, mime) for mime in ("text/plain", "text/html"))
    assert "Traceback" not in said
    assert not PATH.findall(said)


if __name__ == "__main__":
    run(Path(sys.argv[1]).absolute(), Path(sys.argv[-1]).absolute())
