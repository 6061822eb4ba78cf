"""Saving a run: the trunk, and every expert that its model calls, at one moment, into one folder.

Beside a batch's way: `Run.save` comes here while no trainer is in the middle of a step. Experts are read from their
servers, wherever those are (`server/snapshots`); `run_folder` knows what lies where.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import trio
from torch import nn

from labkit.client.following import read_where_it_is
from labkit.client.in_models import grids_of, single_experts_of
from labkit.client.session import Session
from labkit.contact import Contact
from labkit.directory.grids import GridInfo
from labkit.errors import CheckpointError, RPCError
from labkit.expert_protocol import SnapshotHead
from labkit.expert_uid import ExpertInfo, grid_uids, split_uid
from labkit.server.snapshots import MAX_SNAPSHOTS, fetch_snapshot
from labkit.training.run_folder import EXPERTS, SavedExpert, SavedGrid, SavedRun, new_moment, write_moment
from labkit.training.trainer import TrainConfig

logger = logging.getLogger(__name__)

AT_ONCE = 16  # experts that are read at the same time
AT_ONCE_OF_ONE = MAX_SNAPSHOTS // 2  # of one server, which may be asked by others, too
MAX_PLACES = 1 << 16  # of a grid that is looked up anew; larger ones are saved as far as they are known


def save_run(
    folder: Path,
    state: Mapping[str, Any],
    config: TrainConfig,
    given: Mapping[str, str],
    model: nn.Module,
    sessions: Sequence[Session],
) -> Path:
    """Save a run, and the experts of its model. No trainer of the run may be in the middle of a step.

    Args:
        folder: Where to; an absolute path.
        state: What `Run.state_dict` returned.
        config: The run's options.
        given: What was given as code or data, by name, with a name for it.
        model: The model; its layers say which experts.
        sessions: The swarms that it calls.

    Returns:
        The folder of this moment in it.

    Raises:
        CheckpointError: It could not be saved; an earlier save in the folder is as it was.
        ValueError: A part of the state cannot be written, or the model calls several swarms.
    """
    if len(sessions) > 1:
        names = ", ".join(session.name for session in sessions)
        raise ValueError(f"this model calls experts of several swarms ({names}); a run of one swarm can be saved")
    step = int(state["steps"])
    rest = {name: value for name, value in state.items() if name != "model"}
    options = {name: value for name in TrainConfig.__dataclass_fields__ if not callable(value := getattr(config, name))}
    run = SavedRun(options, dict(given), {}, {})
    with new_moment(folder, step) as moment:
        write_moment(moment, run, state["model"], rest)  # first, since it may be refused
        if sessions:
            run.grids, run.experts = sessions[0].run(_fetch_all, sessions[0], model, moment / EXPERTS)
            write_moment(moment, run, state["model"], rest)
    return moment


class Saved(Protocol):
    """A run, which can be saved."""

    def save(self, folder: Path) -> Path:
        """Save it."""


def save_best(run: Saved, folder: Path) -> None:
    """Save the run that is the best so far. If that fails, as on a full disk, the log says so, and the run goes on."""
    try:
        run.save(folder)
    except CheckpointError as error:
        logger.warning("the best state so far was not kept: %s", error)


def code_name(function: object) -> str:
    """The name of a loss that was given, by which it can be told from others: code is not saved."""
    if function in (None, nn.functional.cross_entropy):
        return ""  # the usual one
    kind = function if hasattr(function, "__qualname__") else type(function)
    return f"{getattr(kind, '__module__', '?')}.{getattr(kind, '__qualname__', '?')}"


async def find_experts(session: Session, model: nn.Module) -> dict[str, ExpertInfo]:
    """The experts that a model's layers may call and that are alive, by uid, looked up anew."""
    found: dict[str, ExpertInfo] = {}
    directory = session.directory
    for name, sizes in grids_of(model).items():
        if math.prod(sizes) <= MAX_PLACES:
            await directory.refresh(grid_uids(name, sizes))
        found |= {info.uid: info for info in await directory.all_experts(name, len(sizes))}
    single = single_experts_of(model)
    found |= {uid: info for uid, info in (await directory.find(single)).items() if info is not None}
    return found


async def _fetch_all(
    session: Session, model: nn.Module, folder: Path
) -> tuple[dict[str, SavedGrid], dict[str, SavedExpert]]:
    """Read all experts of a model into a folder. One that is gone is left out, and the log says so."""
    found = await find_experts(session, model)
    wanted = bool(grids_of(model)) or bool(single_experts_of(model))
    if wanted and not found:
        raise CheckpointError("the run was not saved: none of the experts that its model calls is alive")
    declared = await session.directory.grids()
    saved: dict[str, SavedExpert] = {}
    grids = {name: _saved_grid(name, declared, sizes) for name, sizes in grids_of(model).items()}
    lost: dict[str, RPCError] = {}
    failed: list[OSError] = []
    all_servers = trio.CapacityLimiter(AT_ONCE)
    one_server: dict[Contact, trio.CapacityLimiter] = {}

    async def read(info: ExpertInfo) -> SnapshotHead:
        return await fetch_snapshot(session.experts.caller, info.contact, info.uid, folder)

    async def fetch(info: ExpertInfo) -> None:
        async with one_server.setdefault(info.contact, trio.CapacityLimiter(AT_ONCE_OF_ONE)), all_servers:
            try:
                head = await read_where_it_is(session.directory, info, read)
            except RPCError as error:
                lost[info.uid] = error
                (folder / f"{info.uid}.safetensors").unlink(missing_ok=True)
                return
            except OSError as error:
                failed.append(error)
                nursery.cancel_scope.cancel()
                return
        saved[info.uid] = SavedExpert(head.updates, head.crc32)
        name = split_uid(info.uid)[0]
        grid = grids.setdefault(name, _saved_grid(name, declared, ()))
        grid.backend = grid.backend or dict(head.backend)

    async with trio.open_nursery() as nursery:
        for info in found.values():
            nursery.start_soon(fetch, info)
    if failed:
        raise failed[0]
    if lost:
        uid, error = min(lost.items())
        if not saved:
            raise CheckpointError(f"the run was not saved: no expert could be read; {uid}: {error}") from None
        logger.warning(
            "%d of %d experts could not be read and are not part of what was saved: %s … (%s)",
            len(lost), len(found), uid, error,
        )  # fmt: skip
    return grids, saved


def _saved_grid(name: str, declared: Mapping[str, GridInfo], sizes: tuple[int, ...]) -> SavedGrid:
    known = declared.get(name, GridInfo(()))
    return SavedGrid(sizes or known.sizes, known.kind, dict(known.options))
