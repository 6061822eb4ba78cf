"""Transformers models that are offloaded to memory or disk: their experts are served, called, and come home."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.testing import assert_close

import labkit as lk
from labkit.integrations import transformers as lkt
from tests.mixtures import tiny_mixture, tokens

CPU = torch.device("cpu")


def cpu_offload(model: Any) -> Any:
    import accelerate  # takes a second, which only these tests need

    return accelerate.cpu_offload(model, execution_device=CPU)


def kept_in_memory(folder: Path) -> Any:
    return cpu_offload(transformers.AutoModelForCausalLM.from_pretrained(folder))


def kept_on_disk(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, device_map={"": "disk"}, offload_folder=folder / "kept"
    )


@pytest.mark.parametrize("offloaded", [kept_in_memory, kept_on_disk])
def test_experts_of_an_offloaded_model_are_served_and_come_home_as_they_are_by_then(offloaded, tmp_path):
    local = tiny_mixture("gpt_oss")
    local.save_pretrained(tmp_path)
    model = offloaded(tmp_path)
    assert all(parameter.is_meta for parameter in model.parameters())
    with lk.Swarm(name="mixture") as swarm:
        lkt.serve_experts(swarm, model, servers=2, backups=0, isolation="task")
        lkt.attach(model, swarm)
        assert_close(model(tokens()).logits, local(tokens()).logits, rtol=0, atol=1e-5)
        trainer = lkt.attach(local, swarm)
        trainer(tokens(), labels=tokens()).loss.backward()  # the experts learn
        learnt = trainer(tokens()).logits
        assert_close(model(tokens()).logits, learnt, rtol=0, atol=1e-5)
        lkt.detach(model)
        assert_close(model(tokens()).logits, learnt, rtol=0, atol=1e-5)
        experts = [parameter for name, parameter in model.named_parameters() if ".experts." in name]
        assert experts and all(parameter.device == CPU for parameter in experts)
    assert_close(model(tokens()).logits, learnt, rtol=0, atol=1e-5)


def test_an_attached_model_is_offloaded_and_a_model_is_loaded_onto_the_disk_without_its_experts(tmp_path):
    local = tiny_mixture("qwen3_moe")
    local.save_pretrained(tmp_path)
    wanted = local(tokens()).logits
    with lk.Swarm(name="mixture") as swarm:
        lkt.serve_experts(swarm, tmp_path, backups=0, isolation="task")
        in_memory = cpu_offload(lkt.attach(copy.deepcopy(local), swarm))
        on_disk = lkt.from_pretrained(tmp_path, swarm, device_map={"": "disk"}, offload_folder=tmp_path / "kept")
        for model in (in_memory, on_disk):
            assert all(parameter.is_meta for parameter in model.parameters())
            assert_close(model(tokens()).logits, wanted, rtol=0, atol=1e-5)
            assert_close(lkt.detach(model)(tokens()).logits, wanted, rtol=0, atol=1e-5)


def test_experts_without_numbers_are_refused_in_words():
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(tiny_mixture("olmoe").config)
    with lk.Swarm(name="mixture") as swarm, pytest.raises(ValueError, match=r"has no numbers, only a shape.*folder"):
        lkt.serve_experts(swarm, model, isolation="task")
