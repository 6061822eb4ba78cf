"""The notebooks run from top to bottom in a real kernel, and are committed as they ran, with their pictures."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def texts(notebook: Any, mime: str = "text/plain") -> str:
    """All outputs of a notebook in one format, streams included."""
    found = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            found.append(output.get("text", "") if mime == "text/plain" else "")
            found.append(output.get("data", {}).get(mime, ""))
    return "\n".join(found)


def check_quickstart(notebook: Any, *, accuracy: float) -> None:
    html, plain = texts(notebook, "text/html"), texts(notebook)
    assert "grid ffn 4 × 4: 16 experts alive" in html
    assert "killed" in html
    assert "swarm &#x27;default&#x27;, closed" in html
    assert re.search(r"rows that no expert answered: 0\b", plain)
    measured = re.search(r"test accuracy ([0-9.]+) after", plain)
    assert measured is not None and float(measured[1]) >= accuracy
    assert "labkit://" in plain and 'listen="tcp://0.0.0.0:*"' in plain
    assert len(texts(notebook, "image/png").strip()) > 10_000


CHECKS = {"quickstart": check_quickstart}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_as_it_ran(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1)), "run it from top to bottom in a fresh kernel, and save it"
    assert "Traceback" not in texts(notebook)
    CHECKS[path.stem](notebook, accuracy=0.96)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LABKIT_STEPS", "60")
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    where = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=100, kernel_name="python3", resources=where).execute()
    CHECKS[path.stem](notebook, accuracy=0.5)
