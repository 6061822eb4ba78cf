"""The notebooks and tutorials that take long run from top to bottom, with few steps."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.notebook_runs import APART, STEPS, read, run
from tests.test_notebooks import CHECKS


@pytest.mark.timeout(300)
@pytest.mark.parametrize("path", APART, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path: Path, tmp_path, monkeypatch):
    monkeypatch.setenv("LABKIT_STEPS", str(STEPS))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    asyncio.run(run(path, tmp_path / path.name))
    CHECKS[path.stem](read(tmp_path / path.name), False)
