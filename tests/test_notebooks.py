"""The notebooks run from top to bottom in a real kernel, and are committed as they ran, with their pictures.

The tutorials have a module of their own, `test_tutorials`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.notebook_runs import (
    ROOT,
    check_committed,
    code_cells,
    numbers,
    pictures,
    read,
    run,
    short_runs,
    snapshots,
    texts,
)

__all__ = ["short_runs"]

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def check_quickstart(notebook: Any, *, accuracy: float) -> None:
    html, plain = texts(notebook, "text/html"), texts(notebook)
    assert "grid ffn 4 × 4: 16 experts alive" in html
    assert "killed" in html
    assert "swarm &#x27;default&#x27;, closed" in html
    assert numbers(r"rows that no expert answered: (\d+)", plain) == [0]
    assert numbers(r"test accuracy ([0-9.]+) after", plain)[-1] >= accuracy
    assert "labkit://" in plain and 'listen="tcp://0.0.0.0:*"' in plain
    assert len(snapshots(notebook)) >= 1, "of the dashboard"
    assert len(pictures(notebook)) > len(snapshots(notebook)), "and the curves"


CHECKS = {"quickstart": check_quickstart}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_as_it_ran(path: Path) -> None:
    notebook = read(path)
    check_committed(notebook)
    assert any("swarm.dashboard()" in cell.source for cell in code_cells(notebook))
    CHECKS[path.stem](notebook, accuracy=0.96)


@pytest.mark.timeout(180)
@pytest.mark.usefixtures("short_runs")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path: Path) -> None:
    CHECKS[path.stem](run(path), accuracy=0.5)
