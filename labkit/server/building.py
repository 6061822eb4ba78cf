"""Experts are built here, or loaded: at the start of a server, and when it takes another server's expert over.

It comes before any batch. Building can take seconds, so that it is done in a thread, by one server of a process at a
time.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from copy import deepcopy
from typing import TypeVar

import torch
import trio

from labkit.server.backend import ANSWER_LIMIT, ExpertBackend
from labkit.server.checkpoints import restore
from labkit.server.config import ServerConfig
from labkit.server.layers import kind_name, make_expert
from labkit.server.optimizer import BackendConfig

T = TypeVar("T")


def build_expert(
    config: ServerConfig, uid: str, *, answer_limit: int = ANSWER_LIMIT, folder: str | None = None
) -> ExpertBackend:
    """Make an expert of a server.

    Args:
        config: What the server holds.
        uid: The expert.
        answer_limit: Bytes that all outputs of a request may have.
        folder: Where its checkpoint is, to carry on from; None to begin afresh.

    Raises:
        CheckpointError: The checkpoint does not fit.
    """
    device = torch.device(config.backend.device)
    gpus = [device] if device.type == "cuda" else []  # a factory may draw there
    with torch.random.fork_rng(devices=gpus, enabled=config.seed is not None, device_type="cuda"):
        if config.seed is not None:
            seed = zlib.crc32(f"{config.seed} {uid}".encode())
            torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would rewind all devices, for good
            for gpu in gpus:
                with torch.cuda.device(gpu):
                    torch.cuda.manual_seed(seed)
        module = make_expert(config.kind, **config.options)
    backend = ExpertBackend(uid, module, config.backend, kind=kind_name(config.kind))
    backend.answer_limit = answer_limit
    if folder is not None:
        restore(folder, backend)
    return backend


def build_like(pattern: ExpertBackend, uid: str, trained: BackendConfig, *, copied: bool = True) -> ExpertBackend:
    """Make an expert from another one of its kind, whose state is to be loaded, or which is to be looked at.

    It draws no random numbers, unlike a factory: a notebook beside the server goes on with its own.

    Args:
        pattern: The other one.
        uid: The expert.
        trained: How it is trained.
        copied: Whether it gets a module of its own. Raises what copying raises, if such modules cannot be copied.
    """
    backend = ExpertBackend(uid, deepcopy(pattern.module) if copied else pattern.module, trained, kind=pattern.kind)
    backend.answer_limit = pattern.answer_limit
    share_schema(backend, pattern, None)
    return backend


def share_schema(backend: ExpertBackend, other: ExpertBackend | None, timeout: float | None) -> None:
    """Let an expert know what it takes and gives, from another one of its kind, or else by a trial.

    `timeout`: seconds for the trial; None for a trial without a thread.
    """
    if other is None:
        backend.expert.find_schema(timeout)
    else:
        backend.expert.schema, backend.expert.guesses = other.expert.schema, other.expert.guesses


async def build_in_thread(make: Callable[[], T], *, in_thread: bool = True) -> T:
    """Do it in a thread: that can take seconds, and the network has to go on.

    Where time is virtual it may not (`in_thread`), since time would not stand still for a thread.

    One server builds at a time, since a process has one torch generator, which a seed sets anew and which is put back
    afterwards. Other threads may draw from it meanwhile: see `ServerConfig.seed`.
    """
    if not in_thread:
        await trio.lowlevel.checkpoint()
        return make()
    try:
        limiter = _one_at_a_time.get()
    except LookupError:
        limiter = trio.CapacityLimiter(1)
        _one_at_a_time.set(limiter)
    return await trio.to_thread.run_sync(make, limiter=limiter)


_one_at_a_time: trio.lowlevel.RunVar[trio.CapacityLimiter] = trio.lowlevel.RunVar("building experts")
