"""What tests of the notebooks need: to run one in a real kernel, and to read what its cells put out."""

from __future__ import annotations

import re
import struct
import tempfile
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
STEPS = 40  # of a run in a test
SNAPSHOT = (1200, 800)  # pixels
PNG = b"\x89PNG\r\n\x1a\n"
PATH = re.compile(r"(?<![\w.:/])/(?:work|home|root|tmp|mnt|var|usr|opt|Users|content)/\S*")


@pytest.fixture
def short_runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Few steps, no key of anybody's, and temporary files in one place, which goes with the test."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        monkeypatch.setenv("LABKIT_STEPS", str(STEPS))
        monkeypatch.setenv("TMPDIR", folder)
        for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR"):
            monkeypatch.delenv(name, raising=False)
        yield


def read(path: Path) -> Any:
    """A notebook as it is committed."""
    return nbformat.read(path, as_version=4)


def run(path: Path) -> Any:
    """The notebook as it is after a run from top to bottom in a new kernel. Raises what a cell raised."""
    notebook = read(path)
    for cell in code_cells(notebook):
        cell.outputs = []
    where = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=150, kernel_name="python3", resources=where).execute()
    return notebook


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
