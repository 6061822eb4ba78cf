"""A run is saved at one moment, experts and all, and goes on in a swarm of other servers as if nothing had happened."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import labkit as lk
from labkit.client.session import Session
from labkit.errors import CheckpointError
from labkit.expert_uid import ExpertInfo
from labkit.launch.handle import ServerHandle
from labkit.launch.states import ServerEvent
from labkit.server.checkpoints import load_expert
from labkit.swarm import Swarm
from labkit.training import saving
from labkit.training.active_runs import runs
from labkit.training.run_folder import MANIFEST, read_moment

pytestmark = pytest.mark.usefixtures("forked_python")

X = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
Y = (X.sum(1) > 0).long()
ADAM = lk.BackendConfig(lr=0.01, accumulate=3, schedule="linear", total_steps=100)
HOW: dict[str, Any] = {"hidden": 8, "grid": (2, 2), "isolation": "task", "backend": ADAM}
TRAIN: dict[str, Any] = {"trainers": 1, "batch_size": 8, "schedule": "linear", "warmup": 1, "lr": 0.01}


def model(swarm: Swarm, **options: Any) -> nn.Module:
    all_answers: dict[str, Any] = {"k_best": 2, "k_min": 2, "forward_timeout": 60, "backward_timeout": 60}
    moe = swarm.moe(8, grid=(2, 2), jitter=0.1, **all_answers, **options)  # on a busy machine, too
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), moe, nn.Linear(8, 2))


def saved_in(folder: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """The checksums of the experts, and the model."""
    _, run, tensors, _ = read_moment(folder)
    return {uid: expert.crc32 for uid, expert in run.experts.items()}, tensors


def assert_same_run(one: Path, other: Path) -> None:
    assert saved_in(one)[0] == saved_in(other)[0]
    mine, theirs = saved_in(one)[1], saved_in(other)[1]
    assert mine.keys() == theirs.keys()
    assert [name for name, value in mine.items() if not torch.equal(value, theirs[name])] == []


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 30 steps that was saved in the middle (`ckpt`), went on, and was saved at its end (`whole`)."""
    folder = tmp_path_factory.mktemp("saved")
    with Swarm("straight") as swarm:
        swarm.serve("ffn", servers=1, **HOW)
        torch.manual_seed(1)

        def save(step: Any) -> None:
            if step.step == 11:  # in the middle of the second epoch
                step.run.save(folder / "ckpt")

        run = lk.fit(model(swarm), (X, Y), steps=30, on_step=save, **TRAIN)
        losses = [step.loss for step in run.wait().history]
        run.save(folder / "whole")
    (folder / "losses").write_text(json.dumps(losses))
    return folder


def resume_elsewhere(saved: Path, ended: Path, servers: int, isolation: str) -> None:
    """Resume the run in a new swarm, and save it at its end."""
    with Swarm("other") as swarm:
        swarm.serve("ffn", servers=servers, **HOW | {"isolation": isolation})
        run = lk.resume(saved / "ckpt", model(swarm), swarm, (X, Y)).wait()
        run.save(ended)
    assert run.steps == 30
    assert [step.loss for step in run.history] == json.loads((saved / "losses").read_text())
    assert_same_run(ended, saved / "whole")


def test_a_run_that_is_resumed_by_other_servers_equals_the_one_that_was_never_interrupted(saved, tmp_path):
    resume_elsewhere(saved, tmp_path / "ended", 3, "task")


def test_so_does_one_that_is_resumed_in_another_process_with_servers_in_processes_of_their_own(saved, tmp_path):
    code = (
        "import sys, torch; from pathlib import Path; from tests.test_resuming import resume_elsewhere; "
        "torch.set_num_threads(1); resume_elsewhere(Path(sys.argv[1]), Path(sys.argv[2]), 2, 'process')"
    )
    command = [sys.executable, "-c", code, str(saved), str(tmp_path / "ended")]
    subprocess.run(command, check=True, timeout=100, cwd=Path(__file__).parent.parent)


def test_what_is_saved_in_the_middle_has_gradients_that_wait_and_the_state_of_adam(saved):
    moment, run, _, _ = read_moment(saved / "ckpt")
    states = [load_expert(moment / "experts", uid) or {} for uid in run.experts]
    names = {name.partition(".")[0] for state in states for name in state}
    assert names == {"module", "optimizer", "counter", "pending"}
    assert run.grids["ffn"].sizes == (2, 2) and run.grids["ffn"].backend["lr"] == 0.01


def test_servers_can_start_from_the_experts_of_a_saved_run_wherever_they_are(saved, tmp_path):
    shutil.copytree(saved / "ckpt", tmp_path / "ckpt")
    with Swarm("first") as elsewhere, Swarm.join(elsewhere.invite(), name="second") as swarm:
        elsewhere.serve("ffn", **HOW, checkpoint_dir=tmp_path / "ckpt" / "experts")
        run = lk.resume(tmp_path / "ckpt", model(swarm), swarm, (X, Y)).wait()
        run.save(tmp_path / "ended")  # whoever started the servers
    assert_same_run(tmp_path / "ended", saved / "whole")


def test_a_server_that_is_killed_after_a_resume_carries_on_from_what_was_loaded(saved):
    with Swarm("killed") as swarm:
        (server,) = swarm.serve("ffn", **HOW, checkpoint_period=1000)
        updates = {uid: expert.updates for uid, expert in read_moment(saved / "ckpt")[1].experts.items()}
        lk.resume(saved / "ckpt", model(swarm), swarm, (X, Y), steps=read_moment(saved / "ckpt")[3]["steps"]).wait()
        server.kill()
        server.restart()
        assert server.statistics().experts == updates


def test_experts_that_move_to_another_server_meanwhile_are_loaded_there(saved, tmp_path, monkeypatch):
    with Swarm("moving") as swarm:
        leaving, staying = swarm.serve("ffn", servers=2, **HOW)
        load = staying.lifecycle.load

        async def load_while_the_other_leaves(folder: str, uids: Sequence[str], check_only: bool) -> None:
            if leaving.alive:
                await leaving.lifecycle.order(ServerEvent.STOP)  # and hands its experts over
            await load(folder, uids, check_only)

        monkeypatch.setattr(staying.lifecycle, "load", load_while_the_other_leaves)
        lk.resume(saved / "ckpt", model(swarm), swarm, (X, Y)).wait().save(tmp_path / "ended")
    assert_same_run(tmp_path / "ended", saved / "whole")


# ---------------------------------------------------------------- what does not fit changes nothing


@pytest.fixture(scope="module")
def fresh() -> Iterator[Swarm]:
    with Swarm("fresh") as swarm:
        swarm.serve("ffn", **HOW)
        swarm.serve("ffn", hidden=6, grid=(2, 2), name="narrow", isolation="task", backend=ADAM)
        yield swarm


def state_of(swarm: Swarm, net: nn.Module) -> list[torch.Tensor]:
    outputs = [swarm.expert(uid)(torch.ones(1, 8)) for uid in swarm.experts() if uid.startswith("ffn")]
    return [*outputs, *(value.clone() for value in net.state_dict().values()), torch.get_rng_state()]


def another(swarm: Swarm) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), swarm.moe(8, grid=(2, 2), k_best=2), nn.Linear(8, 2))


def wider(swarm: Swarm) -> nn.Module:
    net = model(swarm)
    return nn.Sequential(*list(net.children())[:-1], nn.Linear(8, 3))


def of_another_grid(swarm: Swarm) -> nn.Module:
    net = model(swarm)
    for layer in net.modules():
        if isinstance(layer, lk.MixtureOfExperts):
            layer.name = "narrow"
    return net


@pytest.mark.parametrize(
    ("make", "options", "said"),
    [
        (another, {}, r"another model .*: .* only in what was saved and .* only in this model"),
        (
            wider,
            {},
            r"4\.weight of this model is torch\.float32 \[3, 8\], and what was saved is .* \[2, 8\]",
        ),
        (of_another_grid, {}, "this model calls the grid 'narrow', and that of the run called ffn"),
        (model, {"optimizer": lambda p: torch.optim.Adam(list(p)[:2])}, "group"),
        (model, {"optimizer": "sgd"}, "saved with the optimizer Adam, and this is SGD: give the same one"),
        (model, {"steps": 0}, "steps=0: a whole number"),
        (model, {"steps": 7}, "the run has done 11 steps before it was saved"),
        (model, {"data": (X[:20], Y[:20])}, "these have 3 batches an epoch, and those of the run that was saved had 7"),
        (model, {"data": [(X, Y)] * 7}, "shuffled in another way"),
    ],
)
def test_a_run_that_does_not_fit_is_refused_in_words_and_changes_nothing(fresh, saved, make, options, said):
    net = make(fresh)
    before = state_of(fresh, net)
    with pytest.raises((CheckpointError, ValueError), match=said):
        lk.resume(saved / "ckpt", net, fresh, **{"data": (X, Y), **options})
    assert all(map(torch.equal, state_of(fresh, net), before))


def test_experts_of_another_size_are_refused_by_their_servers_before_any_of_them_loads(saved):
    with Swarm("sizes") as swarm:
        swarm.serve("ffn", **HOW | {"grid": (2, 2)}, uids=["ffn.0.0", "ffn.0.1", "ffn.1.0"])
        swarm.serve(lambda: nn.Linear(8, 8), name="ffn", uids=["ffn.1.1"], grid=(2, 2), isolation="task")
        net = model(swarm)
        before = state_of(swarm, net)
        with pytest.raises(CheckpointError, match=r"the server of ffn\.1\.1 did not load what was saved: .*kind"):
            lk.resume(saved / "ckpt", net, swarm, (X, Y))
        assert all(map(torch.equal, state_of(swarm, net), before))


@pytest.mark.parametrize(("moment", "loaded"), [("check", set()), ("load", {0, 1})])
def test_an_interrupt_while_servers_load_leaves_all_as_they_were_or_all_loaded(saved, moment, loaded):
    done = set()

    def interrupted(server: ServerHandle, number: int) -> Any:
        load = server.lifecycle.load

        async def interrupt_and_load(folder: str, uids: Sequence[str], check_only: bool) -> None:
            if number == 0 and check_only == (moment == "check"):
                os.kill(os.getpid(), signal.SIGINT)  # of which the main thread hears
            await load(folder, uids, check_only)
            if not check_only:
                done.add(number)

        return interrupt_and_load

    with Swarm("interrupted") as swarm:
        swarm.serve("ffn", servers=2, **HOW)
        for number, server in enumerate(swarm.servers):
            server.lifecycle.load = interrupted(server, number)  # type: ignore[method-assign]
        net = model(swarm)
        before = state_of(swarm, net)
        with pytest.raises(KeyboardInterrupt):
            lk.resume(saved / "ckpt", net, swarm, (X, Y))
        assert done == loaded
        assert loaded or all(map(torch.equal, state_of(swarm, net), before))
        assert not any(run.running for run in runs)


def test_a_grid_that_nobody_serves_comes_with_the_line_that_serves_it(saved):
    with Swarm("empty") as swarm:
        net = model(swarm)
        with pytest.raises(
            CheckpointError, match=r"nobody serves the grid 'ffn' in this swarm; serve it first"
        ) as caught:
            lk.resume(saved / "ckpt", net, swarm, (X, Y))
        line = str(caught.value).splitlines()[-1].strip()
        assert line.startswith("swarm.serve('ffn', hidden=8, grid=(2, 2), backend=lk.BackendConfig(lr=0.01, ")
        line = line.replace("swarm.serve(", "swarm.serve(isolation='task', kind=")
        exec(line, {"swarm": swarm, "lk": lk})  # the line is Python, and does what it says
        lk.resume(saved / "ckpt", net, swarm, (X, Y)).stop()


def test_experts_that_are_missing_are_named(saved):
    with Swarm("half") as swarm:
        swarm.serve("ffn", **HOW, uids=["ffn.0.0", "ffn.0.1", "ffn.1.0"])
        with pytest.raises(CheckpointError, match=r"nobody serves ffn\.1\.1; serve it first:\n.*uids=\['ffn\.1\.1'\]"):
            lk.resume(saved / "ckpt", model(swarm), swarm, (X, Y))


def test_experts_at_servers_of_others_cannot_be_overwritten_and_the_error_says_who_can(saved):
    with Swarm("theirs") as theirs, Swarm.join(theirs.invite(), name="mine") as swarm:
        theirs.serve("ffn", **HOW)
        with pytest.raises(CheckpointError, match=r"not started here, .*labkit serve --checkpoint-dir .*ckpt/experts"):
            lk.resume(saved / "ckpt", model(swarm), swarm, (X, Y))


def test_the_data_need_not_be_given_again_where_the_run_is_still_known(tmp_path, fresh):
    run = lk.fit(model(fresh), (X, Y), steps=10, **TRAIN).wait()
    run.save(tmp_path / "ckpt")
    resumed = lk.resume(tmp_path / "ckpt", model(fresh), fresh, steps=12).wait()
    assert resumed.steps == 12 and len(resumed.history) == 12
    del run, resumed
    gc.collect()
    with pytest.raises(ValueError, match=r"give the data again: lk.resume\(folder, model, swarm, data\)"):
        lk.resume(tmp_path / "ckpt", model(fresh), fresh)


def test_a_run_that_was_validated_goes_on_without_where_no_validation_data_are_given(tmp_path, fresh, caplog):
    options = {"validate": (X, Y), "every": 2, "patience": 50, **TRAIN}
    lk.fit(model(fresh), (X, Y), steps=4, **options).wait().save(tmp_path)
    resumed = lk.resume(tmp_path, model(fresh), fresh, (X, Y), steps=6).wait()
    assert resumed.steps == 6 and resumed.validations == []
    assert "give the validation data again, validate=…" in caplog.text
    again = lk.resume(tmp_path, model(fresh), fresh, (X, Y), steps=6, validate=(X, Y)).wait()
    assert [validation.step for validation in again.validations] == [2, 4, 6]


def test_the_best_state_is_kept_with_its_experts_and_can_be_resumed(tmp_path, fresh):
    scripted = iter([0.5, 0.3, 0.4, 0.2, 0.6, 0.7])

    def loss(outputs, y):
        real = nn.functional.cross_entropy(outputs, y)
        return real if torch.is_grad_enabled() else real * 0 + next(scripted)

    seen = {}

    def look(step):
        if step.metrics:
            seen[step.step] = json.loads((tmp_path / "best" / MANIFEST).read_text())["step"]

    options = {"loss": loss, "validate": (X[:8], Y[:8]), "every": 2, "keep_best": tmp_path / "best"}
    run = lk.fit(model(fresh), (X, Y), steps=10, on_step=look, **options, **TRAIN).wait()
    assert seen == {2: 2, 4: 4, 6: 4, 8: 8, 10: 8}, "of losses 0.5, 0.3, 0.4, 0.2 and 0.6"
    best = saved_in(tmp_path / "best")[0]
    assert len(best) == 4
    again = lk.resume(tmp_path / "best", model(fresh), fresh, (X, Y), steps=8, loss=loss).wait()
    assert again.steps == 8
    again.save(tmp_path / "again")
    assert saved_in(tmp_path / "again")[0] == best, "the experts of step 8, though they had gone on to step 10"
    later = lk.resume(tmp_path / "best", model(fresh), fresh, (X, Y), steps=10, on_step=look, **options).wait()
    assert later.steps == run.steps == 10 and seen[10] == 8, "0.7 is no better than what had been"


def test_where_the_best_state_cannot_be_kept_the_run_goes_on_and_the_log_says_so(tmp_path, fresh, caplog):
    (tmp_path / "file").write_text("")
    keep = {"validate": (X, Y), "keep_best": tmp_path / "file" / "best"}
    assert lk.fit(model(fresh), (X, Y), steps=2, **keep, **TRAIN).wait().steps == 2
    assert "the best state so far was not kept" in caplog.text
    with pytest.raises(ValueError, match="keep_best: these are about validations"):
        lk.fit(model(fresh), (X, Y), steps=2, keep_best=tmp_path, **TRAIN)


def test_a_model_and_a_swarm_in_the_wrong_order_are_told_so(tmp_path, fresh):
    with pytest.raises(ValueError, match=r"in this order: lk.resume\(folder, model, swarm\)"):
        lk.resume(tmp_path, fresh, model(fresh), (X, Y))  # type: ignore[arg-type]


def test_code_that_was_given_has_to_be_given_again(tmp_path, fresh):
    def halved(outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs, y) / 2

    net = model(fresh)
    lk.fit(net, (X, Y), loss=halved, steps=2, **TRAIN).wait().save(tmp_path)
    with pytest.raises(CheckpointError, match=r"saved with loss=.*halved, and code is not saved: give it again"):
        lk.resume(tmp_path, net, fresh, (X, Y))
    run = lk.resume(tmp_path, net, fresh, (X, Y), loss=halved, steps=4).wait()
    assert run.steps == 4


OPTIONS: dict[str, dict[str, Any]] = {
    "a loss of labkit": {"loss": lk.losses.next_token},
    "AdamW": {"optimizer": "adamw"},
    "SGD with momentum": {"optimizer": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)},
    "accumulation": {"accumulate": 3},
    "patience": {"validate": (X, Y), "every": 2, "patience": 50, "metrics": "accuracy"},
    "a schedule": {"schedule": lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 2, 6], 0.5)},
    "delay compensation": {"compensation": 0.1, "clip_grad_norm": 1.0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_whatever_a_run_was_made_with_it_goes_on_exactly(tmp_path, options):
    """In the same swarm: first the whole, then again from the middle."""
    net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    x, y = (X, X.argmax(1, keepdim=True).expand(-1, 3) % 2) if "loss" in options else (X, Y)
    if "loss" in options:
        net.append(nn.Unflatten(1, (1, 2))).append(Repeat())
    usual: dict[str, Any] = {"trainers": 1, "batch_size": 8, "lr": 0.01}
    again = {name: options[name] for name in ("schedule", "validate", "metrics") if name in options}

    def save(step: Any) -> None:
        if step.step == 5:
            step.run.save(tmp_path / "ckpt")

    whole = lk.fit(net, (x, y), steps=12, on_step=save, **usual, **options).wait()
    whole.save(tmp_path / "whole")
    with Swarm("none") as swarm:
        resumed = lk.resume(tmp_path / "ckpt", net, swarm, (x, y), **again).wait()
    resumed.save(tmp_path / "resumed")
    assert [step.loss for step in resumed.history] == [step.loss for step in whole.history]
    assert_same_run(tmp_path / "resumed", tmp_path / "whole")
    assert resumed.validations == whole.validations
    assert (resumed.best is None) == (whole.best is None)


class Repeat(nn.Module):
    """[rows, 1, classes] -> [rows, 3, classes]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.expand(-1, 3, -1)


def test_a_schedule_that_was_code_has_to_be_given_again(tmp_path, fresh):
    def halving(optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)

    net = model(fresh)
    lk.fit(net, (X, Y), steps=2, schedule=halving, trainers=1).wait().save(tmp_path)
    with pytest.raises(CheckpointError, match=r"saved with schedule=.*halving, and code is not saved: give it again"):
        lk.resume(tmp_path, net, fresh, (X, Y))


# ---------------------------------------------------------------- the folder


def test_a_crash_in_the_middle_of_a_save_leaves_what_was_saved_before(tmp_path, fresh, monkeypatch):
    run = lk.fit(model(fresh), (X, Y), steps=2, **TRAIN).wait()
    run.save(tmp_path)
    before, listed = saved_in(tmp_path), sorted(path.name for path in tmp_path.iterdir())
    replace = os.replace

    def crash(source: Any, target: Any) -> None:
        if Path(target).name == MANIFEST:
            raise OSError("the power went")
        replace(source, target)

    again = lk.fit(run.model, (X, Y), steps=2, **TRAIN).wait()
    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(CheckpointError, match=r"not saved to .*the power went; what was saved before is as it was"):
        again.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == listed
    assert saved_in(tmp_path)[0] == before[0]
    monkeypatch.undo()
    (tmp_path / "step-9-00000000").mkdir()  # what a killed process left
    (tmp_path / "mine.txt").touch()
    again.save(tmp_path)
    assert saved_in(tmp_path)[0] != before[0]
    assert len(list(tmp_path.glob("step-*"))) == 1 and (tmp_path / "mine.txt").exists()


def test_an_expert_that_another_server_has_by_now_is_saved_from_there(tmp_path, fresh, monkeypatch):
    async def find_too_early(session: Session, net: nn.Module) -> dict[str, ExpertInfo]:
        found = await find_experts(session, net)
        return {uid: replace(info, contact=fresh.servers[-1].contact) for uid, info in found.items()}

    run = lk.fit(model(fresh), (X, Y), steps=3, **TRAIN).wait()
    find_experts = saving.find_experts
    monkeypatch.setattr(saving, "find_experts", find_too_early)
    run.save(tmp_path / "ckpt")
    assert len(saved_in(tmp_path / "ckpt")[0]) == 4


def test_a_run_is_saved_where_it_was_meant_to_be_when_save_was_called(tmp_path, fresh, monkeypatch):
    run = lk.fit(model(fresh), (X, Y), steps=2, **TRAIN).wait()
    monkeypatch.chdir(tmp_path)
    paused = type(run).paused

    def move_and_pause(*arguments: Any) -> Any:
        os.chdir("/")
        return paused(*arguments)

    monkeypatch.setattr(type(run), "paused", move_and_pause)
    assert run.save("ckpt") == tmp_path / "ckpt"
    assert (tmp_path / "ckpt" / MANIFEST).exists()


def test_a_server_that_saves_to_the_experts_of_the_folder_is_left_alone(tmp_path):
    with Swarm("own") as swarm:
        (server,) = swarm.serve("ffn", **HOW, checkpoint_dir=tmp_path / "experts", checkpoint_period=1000)
        run = lk.fit(model(swarm), (X, Y), steps=3, **TRAIN).wait()
        run.save(tmp_path)
        assert list((tmp_path / "experts").glob("*.safetensors")) == []
        server.stop()
    for uid, crc32 in saved_in(tmp_path)[0].items():
        assert crc32 and load_expert(tmp_path / "experts", uid) is not None


def test_an_expert_that_is_lost_is_left_out_with_a_warning(tmp_path, caplog):
    with Swarm("lossy") as swarm:
        servers = swarm.serve("ffn", servers=2, backups=0, **HOW)
        run = lk.fit(model(swarm), (X, Y), steps=2, **TRAIN).wait()
        servers[0].kill()
        run.save(tmp_path)
    assert sorted(saved_in(tmp_path)[0]) == sorted(servers[1].uids)
    assert "2 of 4 experts could not be read and are not part of what was saved" in caplog.text


def test_a_state_that_only_code_could_bring_back_is_refused_by_name(tmp_path, fresh):
    class Strange(torch.optim.SGD):
        def state_dict(self) -> dict[str, Any]:
            return super().state_dict() | {"mine": object}

    run = lk.fit(model(fresh), (X, Y), optimizer=lambda p: Strange(p, lr=0.1), steps=2, **TRAIN).wait()
    with pytest.raises(ValueError, match=r"state\.shared\.optimizer\.mine is a builtins\.type, which cannot be saved"):
        run.save(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: shutil.rmtree(folder), "there is no saved run in .*run.save"),
        (lambda folder: (folder / MANIFEST).write_text("{"), "cannot be read as part of a saved run"),
        (lambda folder: change(folder, format="labkit run 9"), "saved as 'labkit run 9', .* reads 'labkit run 1'"),
        (lambda folder: change(folder, moment="../../elsewhere"), "is damaged: it names"),
        (lambda folder: flip(next(folder.glob("step-*/model.safetensors"))), "is damaged .its checksum differs"),
        (
            lambda folder: next(folder.glob("step-*/state.safetensors")).unlink(),
            "cannot be read as part of a saved run",
        ),
        (lambda folder: flip(next(folder.glob("step-*/experts/ffn.1.1.safetensors"))), "did not load .* is damaged"),
        (lambda folder: next(folder.glob("step-*/experts/ffn.1.1.safetensors")).unlink(), "no checkpoint of ffn.1.1"),
    ],
)
def test_a_folder_that_is_damaged_or_of_another_version_is_refused_in_words(saved, tmp_path, fresh, damage, said):
    shutil.copytree(saved / "ckpt", tmp_path / "ckpt")
    damage(tmp_path / "ckpt")
    net = model(fresh)
    before = state_of(fresh, net)
    with pytest.raises(CheckpointError, match=said):
        lk.resume(tmp_path / "ckpt", net, fresh, (X, Y))
    assert all(map(torch.equal, state_of(fresh, net), before))


def change(folder: Path, **fields: str) -> None:
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | fields))


def flip(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def test_nothing_in_a_saved_run_is_pickled(saved):
    suffixes = {path.suffix for path in (saved / "ckpt").rglob("*") if path.is_file()}
    assert suffixes == {".json", ".safetensors"}
    for path in (saved / "ckpt").rglob("*.safetensors"):
        assert not path.read_bytes().startswith((b"\x80", b"PK"))
