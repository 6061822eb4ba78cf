"""The folder that a run is saved to: what lies where, how it is replaced as a whole, and how it is read.

Beside a batch's way: `saving` fills it, and `labkit.resuming` reads it.

    ckpt/
        manifest.json            which save counts; replaced last, so that a crash leaves the save before
        step-120-0a1b2c3d/       everything, at one moment
            run.json             options, grids, experts, and what of the state is no tensor
            model.safetensors    the model's own parameters and buffers, under their names
            state.safetensors    the tensors of the optimizer, the data, the random generators, …
            experts/             a checkpoint for each expert
        experts/                 the same checkpoints, for servers that start with them (`checkpoint_dir`)

Nothing in it is pickled. One at a time saves to a folder.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from labkit.errors import CheckpointError
from labkit.paths import user_path
from labkit.server.ownership import FolderTaken, claim_checkpoints
from labkit.tensor_files import link_file, read_tensors, replacing, sync_directory, write_tensors
from labkit.training.serialization import flatten, unflatten

FORMAT = "labkit run 1"
MANIFEST, RUN, MODEL, STATE, EXPERTS = "manifest.json", "run.json", "model.safetensors", "state.safetensors", "experts"
MOMENT = re.compile(r"step-\d{1,15}-[0-9a-f]{8}")
MAX_JSON = 256 << 20  # bytes of a JSON file that is read


class Manifest(msgspec.Struct):
    """Which save of a folder counts, and who wrote it."""

    format: str
    moment: str  # the name of its folder
    step: int
    saved: str  # local time
    labkit: str  # version
    torch: str  # version


class SavedGrid(msgspec.Struct):
    """A grid whose experts were saved.

    Args:
        sizes: Of the grid.
        kind: Of its experts, if that is known.
        options: Of its experts, as far as they are plain.
        backend: How the experts were trained: fields of `BackendConfig`.
    """

    sizes: tuple[int, ...]
    kind: str = ""
    options: dict[str, bool | int | float | str | None] = {}
    backend: dict[str, bool | int | float | str | None] = {}


class SavedExpert(msgspec.Struct):
    """An expert that was saved: its optimizer steps, and the checksum of its state."""

    updates: int
    crc32: str


class SavedRun(msgspec.Struct):
    """What `run.json` holds.

    Args:
        config: The run's options, fields of `TrainConfig`.
        given: What was given as code and has to be given again, such as the loss, by its name.
        grids: By name.
        experts: By uid.
        model: The plain part of the model's state.
        state: The plain part of the rest.
    """

    config: dict[str, Any]
    given: dict[str, str]
    grids: dict[str, SavedGrid]
    experts: dict[str, SavedExpert]
    model: Any = None
    state: Any = None


@contextmanager
def new_moment(folder: str | os.PathLike[str], step: int) -> Iterator[Path]:
    """A folder for everything that is saved. At the end of the block it counts; if the block raises, it is removed.

    Args:
        folder: The run's folder, made if need be.
        step: Steps that the run has done.

    Raises:
        FolderTaken: Another process is saving a run there.
        CheckpointError: The folder cannot be written to.
    """
    root = user_path(folder, "folder")
    claim = claim_checkpoints(root, ["a run"])
    moment = root / f"step-{step}-{secrets.token_hex(4)}"
    try:
        (moment / EXPERTS).mkdir(parents=True)
        yield moment
        saved = datetime.now().astimezone().isoformat(" ", "seconds")
        manifest = Manifest(FORMAT, moment.name, step, saved, _version(), str(torch.__version__))
        sync_directory(moment / EXPERTS)
        sync_directory(moment)
        _write_json(root / MANIFEST, msgspec.to_builtins(manifest))
    except OSError as error:
        shutil.rmtree(moment, ignore_errors=True)
        reason = error.strerror or str(error)
        raise CheckpointError(
            f"the run was not saved to {root}: {reason}; what was saved before is as it was"
        ) from error
    except BaseException:
        shutil.rmtree(moment, ignore_errors=True)
        raise
    else:
        for other in root.iterdir():  # of earlier saves, and of those that crashed
            if MOMENT.fullmatch(other.name) and other != moment:
                shutil.rmtree(other, ignore_errors=True)
        _offer_experts(moment / EXPERTS, root / EXPERTS)
    finally:
        claim.release()


def _offer_experts(saved: Path, offered: Path) -> None:
    """Put the experts' checkpoints where servers look for them, unless a server saves to that place by itself."""
    files = sorted(saved.glob("*.safetensors"))
    with suppress(FolderTaken, CheckpointError, OSError):  # they are saved all the same, and `resume` does without
        claim = claim_checkpoints(offered, [file.name.removesuffix(".safetensors") for file in files])
        try:
            for file in files:
                link_file(file, offered / file.name)
        finally:
            claim.release()


def write_moment(moment: Path, run: SavedRun, model: Mapping[str, Any], state: Any) -> None:
    """Write all but the experts.

    Args:
        moment: The folder of `new_moment`.
        run: What is known; its `model` and `state` are filled in.
        model: The model's `state_dict`.
        state: The rest of the run's state.

    Raises:
        ValueError: Something in it cannot be written; the text says what.
        OSError: The files could not be written.
    """
    extra = {name: value for name, value in model.items() if not isinstance(value, Tensor)}
    plain, tensors = flatten(extra, "model")
    run.model, (run.state, others) = plain, flatten(state, "state")
    write_tensors(moment / MODEL, {name: value for name, value in model.items() if isinstance(value, Tensor)}, {})
    write_tensors(moment / STATE, {**tensors, **others}, {})
    _write_json(moment / RUN, msgspec.to_builtins(run))


def read_moment(folder: str | os.PathLike[str]) -> tuple[Path, SavedRun, dict[str, Any], Any]:
    """Read what was saved last, but not the experts.

    Returns:
        The folder of the moment, what is known, the model's `state_dict`, and the rest of the run's state.

    Raises:
        CheckpointError: There is no saved run, or it is damaged, or of another version.
    """
    root = user_path(folder, "folder")
    if not (root / MANIFEST).exists():
        raise CheckpointError(f"there is no saved run in {root}: it has no {MANIFEST}; run.save(…) makes one")
    manifest: Manifest = _read_json(root / MANIFEST, Manifest)
    if manifest.format != FORMAT:
        raise CheckpointError(
            f"{root} was saved as {manifest.format[:80]!r}, by labkit {manifest.labkit[:80]}; this one reads {FORMAT!r}"
        )
    if not MOMENT.fullmatch(manifest.moment):
        raise CheckpointError(f"{root / MANIFEST} is damaged: it names {manifest.moment[:80]!r}")
    moment = root / manifest.moment
    run: SavedRun = _read_json(moment / RUN, SavedRun)
    tensors = _read_tensors(moment / STATE)
    try:
        model = {**_read_tensors(moment / MODEL), **unflatten(run.model, tensors)}
        state = unflatten(run.state, tensors)
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{moment} is damaged: {error}") from None
    return moment, run, model, state


def _version() -> str:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("labkit")
    return "?"  # it is not installed


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors, _, whole = read_tensors(path)
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read as part of a saved run: {error}") from None
    if not whole:
        raise CheckpointError(f"{path} is damaged (its checksum differs)")
    return tensors


def _write_json(path: Path, value: Any) -> None:
    """Replace a JSON file atomically."""
    with replacing(path) as aside, open(aside, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    sync_directory(path.parent)


def _read_json(path: Path, form: type) -> Any:
    try:
        if path.stat().st_size > MAX_JSON:
            raise ValueError("it is far too large")
        return msgspec.json.decode(path.read_bytes(), type=form)
    except (OSError, ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise CheckpointError(f"{path} cannot be read as part of a saved run: {error}") from None
