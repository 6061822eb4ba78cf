"""The experts of Transformers models in a swarm: such a model computes, learns and writes what the local one does."""

from __future__ import annotations

import copy
import pickle
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import transformers
import trio
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import labkit as lk
from labkit.__main__ import main
from labkit.client import following
from labkit.errors import LabkitError, NotEnoughExperts
from labkit.events import CallFinished, ExpertTakenOver
from labkit.integrations import attaching
from labkit.integrations import transformers as lkt
from labkit.integrations.model_folders import ModelFolder
from labkit.launch.handle import ServerHandle
from labkit.server.snapshots import fetch_snapshot
from tests.commands import run_until_signalled
from tests.mixtures import FAMILIES, tiny_mixture, tokens
from tests.swarms import eventually

E = TypeVar("E")
RATE = 0.1
SGD = lk.BackendConfig(optimizer="sgd", lr=RATE)


@contextmanager
def attached(model: Any, *, servers: int = 1, backups: int = 0, **options: Any) -> Iterator[lk.Swarm]:
    """A swarm with the experts of a model, which is attached to it."""
    with lk.Swarm(name="mixture") as swarm:
        lkt.serve_experts(swarm, model, servers=servers, backups=backups, backend=SGD, isolation="task")
        lkt.attach(model, swarm, **options)
        yield swarm


def has_copies(swarm: lk.Swarm, *servers: ServerHandle) -> bool:
    """Whether each expert has a copy at one of these servers, or is served there."""
    keys = [server.contact.key for server in servers if server.contact is not None]
    return all(
        info.contact.key in keys or any(key[:8] in info.copies for key in keys) for info in swarm.experts().values()
    )


def written(model: Any, length: int = 6, after: Mapping[int, Callable[[], object]] | None = None) -> list[int]:
    """What a model writes, greedily. `after`: what happens after so many tokens."""
    text: torch.Tensor = model.generate(
        tokens(1), max_new_tokens=length, do_sample=False, streamer=Happenings(after or {})
    )
    return text[0].tolist()


class Happenings:
    """Does something after some tokens."""

    def __init__(self, after: Mapping[int, Callable[[], object]]) -> None:
        self.after, self.count = after, -1  # the prompt comes first

    def put(self, value: torch.Tensor) -> None:
        self.count += 1
        self.after.get(self.count, int)()

    def end(self) -> None:
        pass


def heard(swarm: lk.Swarm, kind: type[E]) -> list[E]:
    """The events of this kind from now on."""
    events: list[E] = []
    swarm.on_event(lambda event: events.append(event) if isinstance(event, kind) else None)
    return events


# ---------------------------------------------------------------- the same as locally


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_with_its_experts_in_a_swarm_computes_learns_and_writes_what_the_local_one_does(family):
    model = tiny_mixture(family)
    local = copy.deepcopy(model)
    whole = model.get_memory_footprint()
    with attached(model, servers=2):
        assert model.get_memory_footprint() < 0.7 * whole
        assert written(model) == written(local)
        ours, theirs = model(tokens(), labels=tokens()), local(tokens(), labels=tokens())
        assert_close(ours.logits, theirs.logits, rtol=0, atol=1e-5)
        ours.loss.backward(), theirs.loss.backward()
        wanted = dict(local.named_parameters())
        for name, parameter in model.named_parameters():  # the router's and the attention's among them
            assert_close(parameter.grad, wanted[name].grad, rtol=1e-4, atol=1e-6)
        experts = [parameter for name, parameter in wanted.items() if ".experts." in name]
        torch.optim.SGD(experts, lr=RATE).step()  # what their servers have done
        lkt.detach(model)
        now = dict(model.named_parameters())
        assert now.keys() == wanted.keys()
        for name, parameter in wanted.items():
            assert_close(now[name], parameter, rtol=1e-4, atol=1e-6)


def test_a_model_in_bfloat16_sends_numbers_of_that_type_and_gives_the_same():
    model = tiny_mixture("olmoe", torch.bfloat16)
    local = copy.deepcopy(model)
    local.set_experts_implementation("batched_mm")  # which sums up in the same order
    with attached(model) as swarm:
        calls = heard(swarm, CallFinished)
        assert torch.equal(model(tokens()).logits, local(tokens()).logits)
        assert written(model) == written(local)
        of_16_rows = max(calls, key=lambda call: call.rows)
        assert of_16_rows.bytes < of_16_rows.rows * 16 * 4 + 500


def test_what_a_router_leaves_out_is_nobodys_and_has_no_gradient():
    model = tiny_mixture("mixtral")
    local = copy.deepcopy(model)
    with attached(model):
        results = []
        for each in (model, local):
            experts = each.model.layers[0].mlp.experts
            x = torch.randn(3, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
            weights = torch.tensor([[0.5, 0.5], [0.7, 0.0], [0.0, 0.0]], requires_grad=True)
            experts.config._experts_implementation = "labkit" if each is model else "eager"
            output = experts(x, torch.tensor([[0, 3], [2, 4], [4, 4]]), weights)  # expert 4 of 4 is none
            output.square().sum().backward()
            results.append((output, x.grad, weights.grad))
        assert_close(*results)
        assert output[2].abs().sum() == 0


def test_copies_of_an_attached_model_call_the_same_experts():
    model = tiny_mixture("olmoe")
    with attached(model):
        wanted = model(tokens()).logits
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(tokens()).logits, wanted)
            assert "olmoe.0.* of the swarm 'mixture'" in repr(other), "where its experts are"
        assert "of the swarm" not in repr(lkt.detach(model))


def test_a_model_that_shares_its_configuration_with_an_attached_one_goes_on_with_its_own_experts():
    model = tiny_mixture("olmoe")
    local = type(model)(model.config).eval()
    wanted = local(tokens()).logits
    with attached(model):
        assert_close(local(tokens()).logits, wanted)


# ---------------------------------------------------------------- servers that are gone


def test_a_killed_server_does_not_change_what_a_model_writes_nor_its_gradients_where_there_are_copies(monkeypatch):
    monkeypatch.setattr(following, "FOLLOW_TIME", 50.0)  # on a busy machine a take-over takes longer
    model = tiny_mixture("olmoe")
    local = copy.deepcopy(model)
    with attached(model, servers=3, backups=1, train_experts=False, timeout=60.0) as swarm:
        first, second, third = swarm.servers
        taken_over = heard(swarm, ExpertTakenOver)
        eventually(lambda: has_copies(swarm, second, third))
        assert written(model, 8, after={3: first.kill}) == written(local, 8)
        assert taken_over
        eventually(lambda: has_copies(swarm, third))
        loss, wanted = model(tokens(), labels=tokens()).loss, local(tokens(), labels=tokens()).loss
        second.kill()  # between forward and backward
        loss.backward(), wanted.backward()
        gradients = {name: parameter.grad for name, parameter in local.named_parameters()}
        for name, parameter in model.named_parameters():
            assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6)


def test_without_copies_a_pass_that_needs_a_lost_expert_says_which_and_what_to_try():
    model = tiny_mixture("olmoe")
    with attached(model, servers=2) as swarm:
        before = written(model)
        lost = sorted(uid for uid, info in swarm.experts().items() if info.contact == swarm.servers[0].contact)
        with pytest.raises(NotEnoughExperts, match=rf"got no answer of an expert.*Failed: olmoe.*{lost[0][-1]}: lost"):
            written(model, after={1: swarm.servers[0].kill})
        with pytest.raises(LabkitError, match=r"rows need olmoe\.0.*no live server has.*missing='renormalize'"):
            written(model)
        swarm.servers[0].restart()
        assert written(model) == before


def test_weights_are_divided_among_those_that_answered_if_the_user_says_so():
    model = tiny_mixture("mixtral")
    local = copy.deepcopy(model)
    with attached(model, servers=4, missing="renormalize") as swarm:
        gone = [uid for uid, info in swarm.experts().items() if info.contact == swarm.servers[0].contact]
        lost = int(next(uid for uid in gone if uid.startswith("mixtral.0.")).rpartition(".")[2])
        swarm.servers[0].kill()
        x = torch.randn(2, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        others = [e for e in range(4) if e != lost][:2]
        index = torch.tensor([[others[0], lost], others])
        weights = torch.tensor([[0.6, 0.2], [0.5, 0.5]], requires_grad=True)
        output = model.model.layers[0].mlp.experts(x, index, weights)
        experts = local.model.layers[0].mlp.experts
        one, two = torch.tensor([[others[0]], [others[0]]]), torch.tensor([[others[1]], [others[1]]])
        whole = torch.ones(2, 1)
        assert_close(output[0], 0.8 * experts(x, one, whole)[0])
        assert_close(output[1], (0.5 * experts(x, one, whole) + 0.5 * experts(x, two, whole))[1])
        output.sum().backward()
        assert x.grad is not None and x.grad.isfinite().all()
        with pytest.raises(LabkitError, match=rf"1 of 1 rows need mixtral\.0\.{lost}, which no live server has"):
            model.model.layers[0].mlp.experts(x[:1], torch.tensor([[lost]]), torch.ones(1, 1))


# ---------------------------------------------------------------- training


def test_experts_learn_as_their_router_does_unless_one_says_otherwise():
    def updates(freeze: bool, train_experts: bool | None) -> int:
        model = tiny_mixture("olmoe")
        with attached(model, train_experts=train_experts) as swarm:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(not (freeze and ".mlp." in name))
            model(tokens(), labels=tokens()).loss.backward()
            return sum(sum(server.experts.values()) for server in swarm.statistics().values())

    assert updates(freeze=False, train_experts=None) > 0
    assert updates(freeze=True, train_experts=None) == 0
    assert updates(freeze=False, train_experts=False) == 0
    assert updates(freeze=True, train_experts=True) > 0


def test_a_trainer_of_hugging_face_trains_the_model_here_and_the_experts_there(tmp_path):
    model = tiny_mixture("olmoe")
    rows = [{"input_ids": row, "labels": row} for row in tokens(16)]
    with attached(model) as swarm:
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=6, per_device_train_batch_size=8, learning_rate=1e-2, logging_steps=1,
            report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True, seed=0,
        )  # fmt: skip
        trainer = transformers.Trainer(
            model, arguments, train_dataset=rows, callbacks=[lkt.TransformersCallback(swarm)]
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert losses[-1] < losses[0]
        learnt = [updates for server in swarm.statistics().values() for updates in server.experts.values()]
        assert max(learnt) == 6


def test_a_trainer_goes_on_from_what_it_saved_with_the_experts_where_they_are(tmp_path):
    model = tiny_mixture("olmoe")
    rows = [{"input_ids": row, "labels": row} for row in tokens(16)]

    def trainer(model: Any, steps: int) -> transformers.Trainer:
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=steps, per_device_train_batch_size=8, learning_rate=1e-2, logging_steps=1,
            report_to=[], save_steps=2, disable_tqdm=True, use_cpu=True, seed=0,
        )  # fmt: skip
        return transformers.Trainer(model, arguments, train_dataset=rows)

    with attached(model) as swarm:
        trainer(model, 2).train()
        wanted = model.eval()(tokens()).logits
        again = lkt.from_pretrained(tmp_path / "checkpoint-2", swarm)
        assert_close(again(tokens()).logits, wanted)
        second = trainer(again, 4)
        second.train(resume_from_checkpoint=True)
        assert [entry["step"] for entry in second.state.log_history if "loss" in entry] == [1, 2, 3, 4]
        learnt = [updates for server in swarm.statistics().values() for updates in server.experts.values()]
        assert max(learnt) == 4


def test_fit_trains_it_and_a_run_that_was_saved_goes_on_with_the_same_experts(tmp_path):
    model = tiny_mixture("olmoe")
    rows = [{"input_ids": tokens(4, seed=seed), "labels": tokens(4, seed=seed)} for seed in range(4)]
    with attached(model) as swarm:
        run = lk.fit(model, rows, steps=4, trainers=1, lr=1e-2)
        run.wait()
        run.save(tmp_path)
        saved = written(run.model)
    again = tiny_mixture("olmoe")
    with attached(again) as swarm:
        assert written(again) != saved
        resumed = lk.resume(tmp_path, again, swarm, rows)
        resumed.wait()
        assert written(resumed.model) == saved


# ---------------------------------------------------------------- saved and loaded, and used in other ways


def test_what_was_detached_is_saved_and_loaded_as_any_model_of_transformers(tmp_path):
    model = tiny_mixture("gpt_oss")
    with attached(model) as swarm:
        model(tokens(), labels=tokens()).loss.backward()  # the experts learn
        learnt = written(model)
        with pytest.raises(ValueError, match="detach"):
            lkt.attach(model, swarm)
        lkt.detach(model).save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert written(loaded) == learnt
    assert loaded.get_experts_implementation() == model.get_experts_implementation()


@pytest.mark.parametrize("leave", ["stop", "kill"])
def test_experts_come_home_though_a_server_leaves_while_they_are_read(leave, monkeypatch):
    model = tiny_mixture("olmoe")
    before, left = written(model), list[str]()
    with attached(model, servers=2, backups=1) as swarm:
        eventually(lambda: all(info.copies for info in swarm.experts().values()))

        async def fetch_later(caller: Any, contact: Any, uid: str, folder: Path) -> Any:
            (server,) = (server for server in swarm.servers if server.contact == contact)
            if not left:
                left.append(uid)
                await trio.to_thread.run_sync(getattr(server, leave))
            return await fetch_snapshot(caller, contact, uid, folder)

        monkeypatch.setattr(attaching, "fetch_snapshot", fetch_later)
        lkt.detach(model)
    assert left and written(model) == before


def test_experts_that_were_saved_go_on_from_there_when_they_are_served_again(tmp_path):
    model, again = tiny_mixture("olmoe"), tiny_mixture("olmoe")
    with lk.Swarm(name="mixture") as swarm:
        lkt.serve_experts(swarm, model, backend=SGD, isolation="task", checkpoint_dir=tmp_path)
        lkt.attach(model, swarm)
        model(tokens(), labels=tokens()).loss.backward()
        learnt = model(tokens()).logits
    with lk.Swarm(name="mixture") as swarm:
        lkt.serve_experts(swarm, again, backend=SGD, isolation="task", checkpoint_dir=tmp_path)
        assert_close(lkt.attach(again, swarm)(tokens()).logits, learnt)


def test_checkpointed_gradients_give_the_same():
    model = tiny_mixture("qwen3_moe")
    local = copy.deepcopy(model)
    with attached(model, train_experts=False):
        model.activation_checkpointing_enable()
        model.train()(tokens(), labels=tokens()).loss.backward()
        local.train()(tokens(), labels=tokens()).loss.backward()
        wanted = dict(local.named_parameters())
        for name, parameter in model.named_parameters():
            assert_close(parameter.grad, wanted[name].grad, rtol=1e-4, atol=1e-6)


# w1 to w3, by names, all in one tensor, that under other names, and with gate and up in turns
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "granitemoe", "aria", "inkling2"])
def test_servers_read_their_own_experts_from_a_folder_and_no_others(family, tmp_path, monkeypatch):
    model = tiny_mixture(family)
    model.save_pretrained(tmp_path, max_shard_size="12KB")
    read, weights = list[str](), ModelFolder.weights

    def watched(folder: ModelFolder, layer: int, e: int) -> dict[str, torch.Tensor]:
        read.append(f"{model.config.model_type}.{layer}.{e}")
        return weights(folder, layer, e)

    monkeypatch.setattr(ModelFolder, "weights", watched)
    with lk.Swarm(name="mixture") as swarm:
        for experts in (3, None):
            lkt.serve_experts(swarm, tmp_path, experts=experts, isolation="task", backups=0)
            assert sorted(swarm.experts()) == sorted(read)
        wanted = model(tokens()).logits
        assert_close(lkt.attach(model, swarm)(tokens()).logits, wanted, rtol=0, atol=1e-5)


def test_a_folder_without_some_of_its_experts_is_refused_and_no_other_takes_their_place(tmp_path):
    tiny_mixture("olmoe").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.experts.2.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"of 3 of the 4 experts at model\.layers\.1\.mlp\.experts; a file may be missing"
    ):
        ModelFolder(tmp_path)


def test_labkit_serve_serves_experts_of_a_model_that_was_saved(tmp_path, capsys):
    tiny_mixture("olmoe").save_pretrained(tmp_path)
    arguments = ["serve", "--experts-of", str(tmp_path), "--experts", "5", "--backups", "0"]

    def look(swarm: lk.Swarm) -> None:
        assert len(swarm.experts()) == 5
        assert swarm.grids()["olmoe"].sizes == (2, 4)

    status, printed = run_until_signalled(arguments, signal.SIGINT, look)
    assert status == 0, printed
    assert main([*arguments, "--grid", "4"]) == 1
    assert "leave --grid out" in capsys.readouterr().err


# ---------------------------------------------------------------- what is refused


def test_a_model_without_experts_and_a_swarm_without_them_are_refused_in_words():
    with lk.Swarm(name="mixture") as swarm:
        with pytest.raises(ValueError, match="Linear has no experts that could be called elsewhere"):
            lkt.serve_experts(swarm, torch.nn.Linear(2, 2))
        with pytest.raises(ValueError, match=r"no grid 'olmoe' \(it has no grid at all\); serve it"):
            lkt.attach(tiny_mixture("olmoe"), swarm)
        swarm.serve("ffn", name="olmoe", hidden=16, grid=(2, 4), isolation="task", backups=0)
        with pytest.raises(ValueError, match=r"experts of the kind 'ffn'.*give another name"):
            lkt.attach(tiny_mixture("olmoe"), swarm)
        with pytest.raises(ValueError, match=r"missing='ignore'.*raise"):
            lkt.attach(tiny_mixture("olmoe"), swarm, missing="ignore")
