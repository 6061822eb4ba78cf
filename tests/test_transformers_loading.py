"""A Transformers model is loaded without its experts, which are in a swarm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.testing import assert_close
from transformers import initialization as init

import labkit as lk
from labkit.integrations import transformers as lkt
from tests.mixtures import FAMILIES, save_quantized, tiny_mixture, tokens

MB = 1 << 20


def highest_rise(work: Callable[[], Any]) -> int:
    """By how many bytes the memory of this process rises at most above what it is now, while `work` goes on."""
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
    before = _status("VmRSS")
    result = work()
    highest = _status("VmHWM")
    del result
    return highest - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


def assert_same_numbers(model: Any, other: Any) -> None:
    ours, theirs = dict(model.named_parameters()), dict(other.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], parameter) for name, parameter in theirs.items())


@pytest.mark.parametrize("family", [*FAMILIES, "aria", "inkling2"])
def test_it_computes_and_learns_what_the_whole_one_does_and_its_experts_come_home(family, tmp_path):
    whole = tiny_mixture(family)
    whole.save_pretrained(tmp_path, max_shard_size="12KB")
    with lk.Swarm(name="mixture") as swarm:
        backend = lk.BackendConfig(lr=0.0)
        lkt.serve_experts(swarm, tmp_path, servers=2, backups=0, backend=backend, isolation="task")
        model = lkt.from_pretrained(tmp_path, swarm)
        assert type(model) is type(whole) and not model.training
        experts = sum(p.numel() for name, p in whole.named_parameters() if ".experts." in name)
        assert model.num_parameters() == whole.num_parameters() - experts
        ours, theirs = model(tokens(), labels=tokens()), whole(tokens(), labels=tokens())
        assert_close(ours.logits, theirs.logits, rtol=0, atol=1e-5)
        ours.loss.backward(), theirs.loss.backward()
        wanted = dict(whole.named_parameters())
        for name, parameter in model.named_parameters():
            assert_close(parameter.grad, wanted[name].grad, rtol=1e-4, atol=1e-6)
        assert_same_numbers(lkt.detach(model), whole)


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3"])
def test_what_is_quantized_in_its_folder_is_served_and_loaded_as_the_plain_numbers_that_it_stands_for(family, tmp_path):
    save_quantized(family, tmp_path)
    how = {"gpt_oss": transformers.Mxfp4Config, "deepseek_v3": transformers.FineGrainedFP8Config}[family]
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=how(dequantize=True))
    with lk.Swarm(name="mixture") as swarm:
        lkt.serve_experts(swarm, tmp_path, backups=0, isolation="task")
        model = lkt.from_pretrained(tmp_path, swarm)
        assert swarm.grids()[model.config.model_type].options["dtype"] == "bfloat16"
        assert_close(model(tokens()).logits, whole(tokens()).logits, rtol=0.05, atol=0.1)  # 16-bit sums
        assert_same_numbers(lkt.detach(model), whole)


def test_a_family_that_draws_numbers_for_experts_beside_its_router_draws_none(tmp_path, monkeypatch):
    whole = tiny_mixture("olmoe")
    whole.save_pretrained(tmp_path)
    draw = transformers.OlmoeModel._init_weights

    def draws_more(model: Any, module: Any) -> None:
        draw(model, module)
        if hasattr(module, "experts"):
            init.normal_(module.experts.gate_up_proj)

    monkeypatch.setattr(transformers.OlmoePreTrainedModel, "_init_weights", draws_more)
    with lk.Swarm(name="mixture") as swarm:
        lkt.serve_experts(swarm, tmp_path, backups=0, isolation="task")
        model = lkt.from_pretrained(tmp_path, swarm)
        assert_close(model(tokens()).logits, whole(tokens()).logits, rtol=0, atol=1e-5)
        assert all("experts." not in name for name, _ in model.named_parameters())


def test_at_no_moment_are_the_experts_in_this_process(tmp_path, forked_python):
    config = transformers.OlmoeConfig(
        vocab_size=64, hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=2,
        num_experts=32, num_experts_per_tok=2, pad_token_id=None, eos_token_id=None,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    experts = 2 * 32 * 3 * 128 * 512 * 4  # bytes
    with lk.Swarm(name="mixture") as swarm:
        lkt.serve_experts(swarm, tmp_path, backups=0, isolation="process")
        lkt.from_pretrained(tmp_path, swarm)  # what is imported and allocated once
        assert highest_rise(lambda: lkt.from_pretrained(tmp_path, swarm)) < 0.25 * experts
        assert highest_rise(lambda: transformers.AutoModelForCausalLM.from_pretrained(tmp_path)) > 0.9 * experts


def test_nothing_is_read_where_the_swarm_has_not_its_experts_or_the_model_has_none(tmp_path, monkeypatch):
    tiny_mixture("olmoe").save_pretrained(tmp_path / "olmoe")
    dense = transformers.LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    transformers.LlamaForCausalLM(dense).save_pretrained(tmp_path / "llama")
    monkeypatch.setattr(transformers.PreTrainedModel, "_load_pretrained_model", None)
    with lk.Swarm(name="mixture") as swarm:
        with pytest.raises(ValueError, match="the swarm has no grid 'olmoe'"):
            lkt.from_pretrained(tmp_path / "olmoe", swarm)
        with pytest.raises(ValueError, match="this LlamaForCausalLM has no experts that could be elsewhere"):
            lkt.from_pretrained(tmp_path / "llama", swarm)
        with pytest.raises(ValueError, match="llama, a LlamaForCausalLM, has no experts that could be served"):
            lkt.serve_experts(swarm, tmp_path / "llama")


def test_options_of_transformers_are_passed_on_and_nothing_is_said_of_what_was_left_out(tmp_path, caplog):
    tiny_mixture("mixtral", torch.bfloat16).save_pretrained(tmp_path)
    with lk.Swarm(name="mixture") as swarm:
        lkt.serve_experts(swarm, tmp_path, backups=0, isolation="task", name="mine")
        with caplog.at_level("WARNING"):
            model = lkt.from_pretrained(tmp_path, swarm, name="mine", attn_implementation="eager", dtype="auto")
        assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "eager"
        assert model(tokens()).logits.isfinite().all()
        assert caplog.text == ""
