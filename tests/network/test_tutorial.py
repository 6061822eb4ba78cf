"""The tutorial about clusters runs, with few steps."""

from __future__ import annotations

import asyncio

import pytest

from tests.notebook_runs import ON_A_CLUSTER, STEPS, read, run
from tests.test_notebooks import CHECKS


@pytest.mark.timeout(300)
def test_the_tutorial_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.setenv("LABKIT_STEPS", str(STEPS))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    asyncio.run(run(ON_A_CLUSTER, tmp_path / ON_A_CLUSTER.name))
    CHECKS[ON_A_CLUSTER.stem](read(tmp_path / ON_A_CLUSTER.name), False)
