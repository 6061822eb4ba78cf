"""What tests of whole swarms need: to wait for what happens by itself, and to look into a checkpoint."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import trio
from torch import Tensor

from labkit.server.checkpoints import load_expert

T = TypeVar("T")


def eventually(condition: Callable[[], T], timeout: float = 50.0) -> T:
    """Wait until `condition` is true and return it. Fails after `timeout` seconds, which a loaded machine may need."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)
    return value


async def soon(condition: Callable[[], Awaitable[object]], timeout: float = 50.0) -> None:
    """The same in a trio test."""
    with trio.fail_after(timeout):
        for _ in range(round(timeout * 100)):
            if await condition():
                return
            await trio.sleep(0.01)


def parameters(directory: Path, uid: str) -> dict[str, Tensor]:
    """An expert's parameters in its checkpoint."""
    state = load_expert(directory, uid)
    assert state is not None
    return {name.removeprefix("module."): tensor for name, tensor in state.items() if name.startswith("module.")}
