"""Resuming a run that was saved: `lk.resume` puts its experts into the servers of a swarm, and goes on training.

Before any batch: everything is checked first, then experts are loaded, then the run begins as `lk.fit` begins one.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from labkit.client.in_models import grids_of
from labkit.client.session import Session, find_session
from labkit.errors import CheckpointError, LabkitError, RPCError, UnknownExpert
from labkit.expert_uid import ExpertInfo, split_uid
from labkit.interrupts import interrupts_wait
from labkit.launch.handle import ServerHandle, load_all
from labkit.launch.planning import grid_name
from labkit.server.optimizer import BackendConfig
from labkit.server.snapshots import fetch_head, release
from labkit.suggest import suggest_options
from labkit.training import losses
from labkit.training.active_runs import data_saved_with
from labkit.training.forward import LossFunction
from labkit.training.metrics import Metrics
from labkit.training.optimizers import NAMED as NAMED_OPTIMIZERS
from labkit.training.optimizers import OptimizerFactory, ScheduleFactory
from labkit.training.run import Run
from labkit.training.run_folder import EXPERTS, SavedGrid, SavedRun, read_moment
from labkit.training.saving import code_name, find_experts
from labkit.training.trainer import TrainConfig
from labkit.training.validation import OnStep

if TYPE_CHECKING:
    from labkit.swarm import Swarm

logger = logging.getLogger(__name__)

LOAD_TIMEOUT = 300.0  # seconds that servers have to check, and to load, what was saved
ATTEMPTS = 3  # to find the servers of all experts, which may move to others meanwhile
NAMED = 3  # experts that an error names


@suggest_options
def resume(
    folder: str | os.PathLike[str],
    model: nn.Module,
    swarm: Swarm,
    data: Any = None,
    *,
    loss: LossFunction | None = None,
    optimizer: str | OptimizerFactory | None = None,
    schedule: ScheduleFactory | None = None,
    validate: Any = None,
    metrics: Metrics | None = None,
    on_step: OnStep | None = None,
    steps: int | None = None,
    epochs: float | None = None,
    trainers: int | None = None,
    every: int | None = None,
    patience: int | None = None,
    keep_best: str | os.PathLike[str] | None = None,
    max_failures: int | None = None,
) -> Run:
    """Go on with a run that `run.save` saved, here or elsewhere. Returns at once, like `lk.fit`.

    The model gets its parameters, the run its optimizer, its place in the data and its random
    numbers, and the experts in the swarm's servers get their states. With one trainer, and if
    no answer is lost or late (`k_min=k_best` waits for all), it goes on as if it had never
    been interrupted. (Experts with `train_mode=True` draw other random numbers, and torch
    rounds in other ways where servers, or the trainer, have another number of its threads:
    `swarm.serve(…, threads=1)` gives each the same, however many there are.)

    The swarm has to serve the grid, with as many servers as you like. States are loaded into
    servers that this notebook has started. Others load them when they start:
    `labkit serve --checkpoint-dir ckpt/experts`. If anything does not fit, nothing changes.

    Example:
        swarm.serve("ffn", hidden=256, grid=(4, 4), servers=2)
        model = nn.Sequential(nn.Linear(784, 256), swarm.moe(256), nn.Linear(256, 10))
        run = lk.resume("ckpt/", model, swarm, data)

    Args:
        folder: What `run.save` wrote.
        model: A model of the same form, whose layers call grids of the same names and sizes.
        swarm: The swarm that serves them now; the model's layers call it from then on.
        data: The data of the run, as for `lk.fit`. Only the place in them was saved. Default:
            those of the run that was saved there, if it is a run of this process.
        loss: The loss of the run; one of your own has to be given again.
        optimizer: Its optimizer; one that is not Adam, AdamW or SGD has to be given again.
        schedule: Its schedule, which has to be given again if it was a function.
        validate: Validation data, as for `lk.fit`. They are not saved.
        metrics: What to measure besides, as for `lk.fit`. It is not saved.
        on_step: Called after each step, as for `lk.fit`. It is not saved.
        steps: Batches to train on in all, those before included. Default: as for the run.
        epochs: How often to go through the data in all. Default: as for the run.
        trainers: Batches in flight at the same time. Default: as for the run.
        every: Steps from one validation to the next. Default: as for the run.
        patience: Validations without an improvement after which the run stops. Default: as
            for the run.
        keep_best: A folder for the best state, as for `lk.fit`. It is not saved.
        max_failures: The run ends when so many batches in a row have failed. Default: as for
            the run.

    Returns:
        The run, which goes on.

    Raises:
        CheckpointError: The folder holds no such run, or the model, the swarm or its servers
            do not fit it. The text says what to do.
        ValueError: An option is wrong, data are needed, or they are not those of the run.
        SwarmClosed: The swarm is closed.
    """
    if not isinstance(model, nn.Module) or isinstance(swarm, nn.Module):
        raise ValueError(
            "lk.resume takes a folder, a model and a swarm, in this order: lk.resume(folder, model, swarm)"
        )
    moment, saved, tensors, state = read_moment(folder)
    # 1. Check what can be checked without changing anything.
    changes = {
        "steps": steps, "epochs": epochs, "trainers": trainers, "every": every, "patience": patience,
        "max_failures": max_failures, "schedule": schedule,
    }  # fmt: skip
    if validate is None:
        saved.config |= {"every": None, "patience": None}  # which are about validations
    config = _config(saved, {name: value for name, value in changes.items() if value is not None})
    data = _known_data(moment) if data is None else data
    loss, optimizer = _given_again(saved, loss, optimizer, validate)
    _check_model(saved, model, tensors)
    session = find_session(swarm.name)

    def locate() -> dict[ServerHandle, list[str]]:
        found: dict[str, ExpertInfo] = session.run(find_experts, session, model)
        at: dict[ServerHandle, list[str]] = session.run(_check_experts, saved, moment, found, swarm.servers, session)
        return at

    ours = locate()
    before, random = {name: _copy(value) for name, value in model.state_dict().items()}, torch.get_rng_state()
    callers = {layer: layer.swarm for layer in model.modules() if isinstance(getattr(layer, "swarm", None), str)}
    swarm.attach(model)

    def load(run: Run) -> None:  # 3. Servers check all experts, and then load them.
        _check_optimizer(saved, run)
        if run.steps > run.total_steps:
            raise ValueError(
                f"the run has done {run.steps} steps before it was saved, and steps and epochs count them, too: more "
                f"than these {run.total_steps} are needed"
            )
        drawn, at = torch.get_rng_state(), ours
        loaded = partial(load_all, folder=str(moment / EXPERTS), timeout=LOAD_TIMEOUT)
        for more in reversed(range(ATTEMPTS)):
            try:
                with interruptible():
                    session.run(partial(loaded, list(at.items()), check_only=True))
                session.run(partial(loaded, list(at.items()), check_only=False))
                break
            except LabkitError:
                before, at = at, locate()
                if not more or at == before:
                    raise  # that it moved to another server meanwhile is not why
        torch.set_rng_state(drawn)  # whatever else went on here meanwhile

    state["model"] = tensors
    run: Run | None = None
    try:
        with interrupts_wait() as interruptible:  # the model, and the experts of all servers, or nothing
            run = Run(  # 2. It takes its own state over.
                model, data, config, loss, optimizer, validate=validate, metrics=metrics, on_step=on_step,
                keep_best=keep_best, _resume_from=state, _before_start=load,
            )  # fmt: skip
        return run
    except BaseException as error:
        if run is not None:  # an interrupt that came when all was loaded
            run.stop()
            raise
        model.load_state_dict(before)
        torch.set_rng_state(random)
        for layer, name in callers.items():
            layer.swarm = name
        if isinstance(error, (KeyError, TypeError, RuntimeError, AttributeError)):
            raise CheckpointError(f"{moment.parent} does not fit this model, optimizer or data: {error}") from error
        raise


# ---------------------------------------------------------------- the run


def _known_data(moment: Path) -> Any:
    """The data of the run that was saved there, if it is one of this process. Raises `ValueError` if not."""
    data = data_saved_with(moment.name)
    if data is None:
        raise ValueError(
            f"give the data again: lk.resume(folder, model, swarm, data). {moment.parent} has the place of the run in "
            "its data, and not the data themselves, and it is no run of this process, which would still have them"
        )
    return data


def _config(saved: SavedRun, changes: Mapping[str, Any]) -> TrainConfig:
    """The run's options, with changes. Raises `CheckpointError` for what this version does not know."""
    options = dict(saved.config)
    if "steps" in changes or "epochs" in changes:
        options |= {"steps": None, "epochs": None}
    if "schedule" not in {**options, **changes}:
        before = saved.given.get("schedule")
        raise CheckpointError(f"the run was saved with schedule={before}, and code is not saved: give it again")
    unknown = sorted(set(options) - set(TrainConfig.__dataclass_fields__))
    if unknown:
        raise CheckpointError(f"the run was saved by another version of labkit: it has the options {unknown}")
    return TrainConfig(**options | dict(changes))


def _given_again(
    saved: SavedRun, loss: LossFunction | None, optimizer: str | OptimizerFactory | None, validate: Any
) -> tuple[LossFunction | None, str | OptimizerFactory | None]:
    """The loss and the optimizer of the run: those that are given, or ours of that name."""
    before = saved.given.get("loss", "")
    if loss is None and before:
        home, _, name = before.rpartition(".")
        loss = getattr(losses, name, None) if home == losses.__name__ else None
        if loss is None:
            raise CheckpointError(f"the run was saved with loss={before}, and code is not saved: give it again, loss=…")
    elif code_name(loss) != before:
        logger.warning("the run was saved with loss=%s and goes on with %s", before or "its own", code_name(loss))
    usual = saved.given.get("optimizer", "").lower()
    if validate is None and saved.given.get("validate"):
        logger.warning("the run was validated, and goes on without: give the validation data again, validate=…")
    return loss, usual if optimizer is None and usual in NAMED_OPTIMIZERS else optimizer


def _check_optimizer(saved: SavedRun, run: Run) -> None:
    before, now = saved.given.get("optimizer", ""), run.optimizer_name
    if before != now:
        raise CheckpointError(
            f"the run was saved with the optimizer {before or 'none'}, and this is {now or 'none'}: give the same one, "
            "optimizer=…"
        )


def _check_model(saved: SavedRun, model: nn.Module, tensors: Mapping[str, Any]) -> None:
    here = model.state_dict()
    missing, more = sorted(set(here) - set(tensors)), sorted(set(tensors) - set(here))
    if missing or more:
        sides = ((more, "what was saved"), (missing, "this model"))
        said = [f"{_some(names)} only in {where}" for names, where in sides if names]
        raise CheckpointError(f"this is another model than the one that was saved: {' and '.join(said)}")
    for name, value in here.items():
        other = tensors[name]
        if isinstance(value, Tensor) and isinstance(other, Tensor):
            if nn.parameter.is_lazy(value) or (value.shape, value.dtype) == (other.shape, other.dtype):
                continue
            raise CheckpointError(
                f"{name} of this model is {value.dtype} {list(value.shape)}, and what was saved is {other.dtype} "
                f"{list(other.shape)}"
            )
    for name, sizes in grids_of(model).items():
        before = saved.grids.get(name)
        if before is None:
            raise CheckpointError(
                f"this model calls the grid {name!r}, and that of the run called {', '.join(saved.grids) or 'none'}"
            )
        if before.sizes and before.sizes != sizes:
            raise CheckpointError(f"the grid {name!r} had the sizes {before.sizes}, and this model's has {sizes}")


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


# ---------------------------------------------------------------- the experts


async def _check_experts(
    saved: SavedRun, moment: Path, found: Mapping[str, ExpertInfo], servers: Iterable[ServerHandle], session: Session
) -> dict[ServerHandle, list[str]]:
    """Whether all experts that were saved are served, and by whom.

    Returns:
        The servers that this notebook started, each with the experts to load there. At all others the experts are as
        they were saved already.

    Raises:
        CheckpointError: Experts are not served, or are others at servers that others started.
    """
    missing = sorted(set(saved.experts) - set(found))
    if missing:
        name = split_uid(missing[0])[0]
        none = not any(split_uid(uid)[0] == name for uid in found)
        grid = saved.grids.get(name, SavedGrid(()))
        what = f"nobody serves the grid {name!r} in this swarm" if none else f"nobody serves {_some(missing)}"
        raise CheckpointError(f"{what}; serve it first:\n    {serve_line(name, grid, () if none else missing)}")
    if more := sorted(set(found) - set(saved.experts)):
        logger.warning("%d experts were not saved and stay as they are: %s", len(more), _some(more))
    local = {server.contact: server for server in servers if server.alive}
    ours: dict[ServerHandle, list[str]] = {}
    seen: set[str] = set()
    for uid in sorted(saved.experts):
        server, name = local.get(found[uid].contact), split_uid(uid)[0]
        if server is not None:
            ours.setdefault(server, []).append(uid)
        if server is None or name not in seen:
            await _compare(saved, moment, found[uid], session, foreign=server is None)
            seen.add(name)
    return ours


async def _compare(saved: SavedRun, moment: Path, info: ExpertInfo, session: Session, *, foreign: bool) -> None:
    """Compare how an expert is trained and, at somebody else's server, its state with what was saved."""
    caller, uid = session.experts.caller, info.uid
    try:
        try:
            head = await fetch_head(caller, info.contact, uid)
        except UnknownExpert:  # another server has it by now
            info = (await session.directory.holders([uid])).get(uid, info)
            head = await fetch_head(caller, info.contact, uid)
        await release(caller, info.contact, head)
    except RPCError as error:
        raise CheckpointError(f"{uid} at {info.contact.endpoint} cannot be asked how it is: {error}") from None
    if foreign and head.crc32 != saved.experts[uid].crc32:
        raise CheckpointError(
            f"{uid} is served at {info.contact.endpoint} by a server that was not started here, and has another state "
            f"than was saved ({head.updates} updates instead of {saved.experts[uid].updates}). Only who started it can "
            f"change it: start it anew from the saved experts, labkit serve --checkpoint-dir {moment.parent / EXPERTS} "
            "…, or stop it and serve these experts here"
        )
    before = saved.grids.get(split_uid(uid)[0], SavedGrid(())).backend
    differ = [f"{name}={value!r}, not {before[name]!r}" for name, value in head.backend.items()
              if name in before and before[name] != value and name not in ("device", "fused")]  # fmt: skip
    if differ:
        logger.warning("experts of the grid %r are trained in another way than in the run: %s", split_uid(uid)[0],
                       "; ".join(differ))  # fmt: skip


def serve_line(name: str, grid: SavedGrid, uids: Iterable[str] = ()) -> str:
    """The call that serves a grid as it was when it was saved."""
    parts = [repr(grid.kind) if grid.kind else "…"]
    parts += [f"{key}={value!r}" for key, value in grid.options.items() if key.isidentifier()]
    parts.append(f"uids={list(uids)!r}" if uids else f"grid={tuple(grid.sizes)!r}")
    try:
        if grid_name(grid.kind or "…", None, None) != name:
            parts.append(f"name={name!r}")
    except ValueError:
        parts.append(f"name={name!r}")
    usual = BackendConfig()
    known = {key: value for key, value in grid.backend.items() if hasattr(usual, key)}
    changed = [f"{key}={value!r}" for key, value in known.items() if getattr(usual, key) != value]
    if changed:
        parts.append(f"backend=lk.BackendConfig({', '.join(changed)})")
    return f"swarm.serve({', '.join(parts)})"


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
