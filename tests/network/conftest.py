"""The small internet of `world`, made once for all network tests, which `make test-network` runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.network.within import MARK
from tests.network.world import Processes, World, processes


@pytest.fixture(scope="session")
def world() -> World:
    if MARK not in os.environ:
        pytest.exit("The network tests need a network of their own: make test-network", returncode=1)
    return World()


@pytest.fixture
def on(world: World, tmp_path: Path) -> Iterator[Processes]:
    """Runs processes on hosts."""
    with processes(world, tmp_path) as running:
        yield running
