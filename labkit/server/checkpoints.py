"""Checkpoints: an expert's state outside its server, so that another participant can carry it on (paper, Persistence).

Beside a batch's way: `Runtime.snapshot` takes states between batches, and worker threads write them. Each expert has
one safetensors file, `<uid>.safetensors`, which is replaced atomically: a crash leaves the old file or the new one.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import trio
from torch import Tensor

from labkit.errors import CheckpointError, LabkitError, RemoteFailure, RPCError
from labkit.expert_file import DamagedCheckpoint, metadata_of, read_expert
from labkit.expert_uid import split_uid
from labkit.paths import user_path
from labkit.server.backend import ExpertBackend
from labkit.server.ownership import FolderClaim
from labkit.server.runtime import Runtime
from labkit.tensor_files import link_file, write_tensors

logger = logging.getLogger(__name__)

SHORTEST_PERIOD, LONGEST_PERIOD = 10.0, 600.0  # seconds between two saves of all experts, unless the user says how many
SECONDS_PER_GB = 100.0  # so that saves, which copy 1 GB in some two CPU-seconds, take about a fiftieth of the time


Progress = tuple[int, int]  # how far an expert has learnt: see `_progress`


def save_expert(
    directory: str | os.PathLike[str], uid: str, state: Mapping[str, Tensor], *, kind: str = "", keep: int = 1
) -> Path:
    """Write an expert's state to its file. When this returns, the state is on disk.

    Whoever may read the directory may read the file. Its group may write to the file if it may write to the directory
    and others may not.

    Args:
        directory: Where to; it is made if need be.
        uid: The expert.
        state: Its tensors. They are not copied: leave them unchanged meanwhile.
        kind: What the expert is; `load_expert` compares it.
        keep: Checkpoints to keep, this one included. If more than one, each has a second name, `<uid>~<updates>`.

    Returns:
        The path of the file.

    Raises:
        OSError: It could not be written. The file that was there before is untouched.
        ValueError: `uid` is not an expert's uid.
    """
    path = _path(directory, uid)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, state, metadata_of(uid, kind))
    if keep > 1:
        _keep(path, int(state["counter.updates"]), keep)
    return path


def _keep(path: Path, updates: int, keep: int) -> None:
    """Give a checkpoint its second name, and remove the oldest beyond `keep`."""
    try:
        link_file(path, path.with_name(f"{path.stem}~{updates}{path.suffix}"))
        for oldest in older_checkpoints(path.parent, path.stem)[keep:]:
            oldest.unlink(missing_ok=True)
    except OSError as error:  # the checkpoint itself is saved
        logger.warning("no more than the last checkpoint of %s can be kept: %s", path.stem, error)


def older_checkpoints(directory: str | os.PathLike[str], uid: str) -> list[Path]:
    """The checkpoints of an expert that were kept, the newest first; that is the last one, by its second name."""
    path = _path(directory, uid)
    found = path.parent.glob(f"{uid}~*.safetensors")
    return sorted(found, key=lambda file: file.stat().st_mtime_ns, reverse=True)


def load_expert(directory: str | os.PathLike[str], uid: str, *, kind: str = "") -> dict[str, Tensor] | None:
    """Read an expert's saved state. Changes nothing on disk, since a server may be saving it.

    Args:
        directory: Where from.
        uid: The expert.
        kind: What the expert has to be; any kind will do if it is empty.

    Returns:
        The state, exact to the bit, or None if there is no checkpoint.

    Raises:
        DamagedCheckpoint: The file is damaged.
        CheckpointError: The file is not labkit's, or of another expert or kind.
        ValueError: `uid` is not an expert's uid.
    """
    path = _path(directory, uid)
    return read_expert(path, uid, kind)[0] if path.exists() else None


def restore(directory: str | os.PathLike[str], backend: ExpertBackend) -> bool:
    """Carry on from the expert's checkpoint, if there is one. Returns whether there was.

    Call it before the runtime runs.

    Removes what a crashed save of this expert left, and leaves other experts' files alone: servers may share a
    directory, but not an expert.

    If the file is damaged, and older ones were kept, the newest of them that is whole takes its place; the log says so.

    Raises `CheckpointError`, which names the file and, where the state doesn't fit, the tensor.
    """
    for stray in Path(directory).glob(f".{backend.uid}~*.tmp"):
        shutil.rmtree(stray, ignore_errors=True)
    path = _path(directory, backend.uid)
    try:
        state = load_expert(directory, backend.uid, kind=backend.kind)
    except DamagedCheckpoint as damage:
        path, state = _newest_whole(directory, backend, damage)
    if state is None:
        return False
    try:
        backend.load_state(state)
    except CheckpointError as error:
        raise CheckpointError(f"{path} does not fit: {error}") from None
    return True


def _newest_whole(
    directory: str | os.PathLike[str], backend: ExpertBackend, damage: DamagedCheckpoint
) -> tuple[Path, dict[str, Tensor]]:
    for path in older_checkpoints(directory, backend.uid):
        try:
            state, _ = read_expert(path, backend.uid, backend.kind)
        except DamagedCheckpoint:
            continue  # the last one, by its second name, or another
        logger.warning("%s; expert %s carries on from %s instead", damage, backend.uid, path.name)
        return path, state
    raise damage


async def keep_checkpoints(
    runtime: Runtime,
    directory: str | os.PathLike[str],
    period: float | None = None,
    saved: dict[str, Progress] | None = None,
    keep: int = 1,
    claim: FolderClaim | None = None,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Save the experts that have been updated since their last save, again and again, until cancelled.

    A save that fails, for whatever reason (a full disk, no memory), is logged and tried again in the next period. It
    stops neither the server nor the saves of other experts.

    Args:
        runtime: Holds the experts.
        directory: Where to save them.
        period: Seconds between two rounds; None for `usual_period`.
        saved: Filled in with how far each expert had learnt when it was saved, for `save_all`.
        keep: Checkpoints of each expert to keep.
        claim: Says which experts are saved there; None for all.
    """
    saved = {} if saved is None else saved
    claim = FolderClaim() if claim is None else claim
    updates = {uid: backend.updates for uid, backend in runtime.backends.items()}  # when they were saved, or loaded
    task_status.started()
    while True:
        pause = usual_period(runtime.backends.values()) if period is None else period
        await trio.sleep(pause)
        for gone in updates.keys() - runtime.backends.keys():  # if it comes back, it has learnt elsewhere
            del updates[gone]
            saved.pop(gone, None)
        for uid, backend in list(runtime.backends.items()):
            if backend.updates == updates.get(uid) or not claim.owns(uid) or runtime.backends.get(uid) is not backend:
                continue
            try:
                async with claim.busy:  # so that it is not given back meanwhile
                    saved[uid] = await _save(runtime, directory, uid, keep)
                updates[uid] = saved[uid][0]
            except Exception as error:
                logger.warning(
                    "%s; trying again in %g s",
                    _not_saved(uid, directory, error),
                    pause,
                    exc_info=_needs_traceback(error),
                )


def usual_period(backends: Iterable[ExpertBackend]) -> float:
    """Seconds between two saves of these experts.

    They are a hundred for each GB of the experts and their optimizers, at least ten, and at most ten minutes.
    """
    size = sum(backend.state_bytes for backend in backends) / 1e9
    return min(max(SHORTEST_PERIOD, SECONDS_PER_GB * size), LONGEST_PERIOD)


async def save_all(
    runtime: Runtime,
    directory: str | os.PathLike[str],
    saved: Mapping[str, Progress] | None = None,
    keep: int = 1,
    claim: FolderClaim | None = None,
) -> None:
    """Save every expert that has learnt something since it was saved. This ends a clean stop, after the runtime.

    Shield it from cancellation there. All experts are tried, even if some cannot be saved.

    Args:
        runtime: Holds the experts.
        directory: Where to save them.
        saved: What `keep_checkpoints` noted. Without it all experts are saved, which takes longer.
        keep: Checkpoints of each expert to keep.
        claim: Says which experts are saved there; None for all.

    Raises:
        RemoteFailure: Says what happened to the first expert that could not be saved.
    """
    failure = ""
    for uid, backend in runtime.backends.items():
        now = _progress(backend, backend.updates, backend.rows_processed)
        if saved is not None and saved.get(uid) == now and _path(directory, uid).exists():
            continue
        if claim is not None and not claim.owns(uid):
            logger.warning("expert %s is not saved to %s: another server saves it there", uid, directory)
            continue
        try:
            await _save(runtime, directory, uid, keep)
        except Exception as error:
            words = _not_saved(uid, directory, error)
            logger.warning("%s", words, exc_info=_needs_traceback(error))
            failure = failure or words  # not the error, whose traceback holds a copy of the expert
    if failure:
        raise RemoteFailure(failure)


def _not_saved(uid: str, directory: str | os.PathLike[str], error: Exception) -> str:
    said = str(error) if str(error) and not _needs_traceback(error) else repr(error)
    return f"expert {uid} was not saved to {directory}: {said}"


def _needs_traceback(error: Exception) -> bool:
    """Whether it takes a traceback to understand the error."""
    return not isinstance(error, (OSError, RPCError))


async def _save(runtime: Runtime, directory: str | os.PathLike[str], uid: str, keep: int) -> Progress:
    backend = runtime.backends[uid]
    state = await runtime.snapshot(uid)
    await trio.to_thread.run_sync(
        lambda: save_expert(directory, uid, state, kind=backend.kind, keep=keep)
    )  # cancelling waits for the disk
    return _progress(backend, int(state["counter.updates"]), int(state["counter.rows"]))


def _progress(backend: ExpertBackend, updates: int, rows: int) -> Progress:
    """What changes when an expert learns: its updates, and its rows where gradients wait for the next update.

    Elsewhere rows do not count, since forward passes add to them, too.
    """
    return updates, rows if backend.config.accumulate > 1 else 0


def _path(directory: str | os.PathLike[str], uid: str) -> Path:
    split_uid(uid)  # a uid has no separators, no two dots in a row, and nothing else that leads out of the directory
    return Path(directory) / f"{uid}.safetensors"


def checkpoint_directory(path: str | Path | None) -> str | None:
    """The path of a directory for checkpoints, made if need be. Raises `LabkitError` if it cannot be written to."""
    if path is None:
        return None
    directory = user_path(path, "checkpoint_dir")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not os.access(directory, os.W_OK):
            raise PermissionError(0, "it cannot be written to")
    except OSError as error:
        raise LabkitError(f"no checkpoints can be kept in {directory}: {error.strerror}") from None
    return str(directory)
