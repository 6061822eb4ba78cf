"""LoRA adapters beside the experts of a Transformers model, at their servers: they learn what those of peft learn."""

from __future__ import annotations

import copy
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import labkit as lk
from labkit.__main__ import main
from labkit.integrations import transformers as lkt
from labkit.integrations.adapters import fresh_adapters
from labkit.integrations.layouts import expert_layers, weights_of
from tests.commands import run_until_signalled
from tests.mixtures import FAMILIES, tiny_mixture, tokens

# peft asks transformers 5.24 in the old way.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
RATE = 0.3
SGD = lk.BackendConfig(optimizer="sgd", lr=RATE)
CONFIG = {"r": 3, "lora_alpha": 12}


def lora_config(**options: Any) -> Any:
    from peft import LoraConfig  # its import takes seconds, which only these tests need

    return LoraConfig(**options)


def get_peft_model(model: Any, config: Any) -> Any:
    import peft

    return peft.get_peft_model(model, config)


def of_experts(name: str) -> bool:
    """Whether a parameter is a weight of experts."""
    return ".experts." in name and "lora" not in name


def with_peft(model: Any) -> Any:
    """The model with adapters of its experts by peft, which begin as those at servers do; the rest is trained."""
    layers = expert_layers(model)
    fresh = [
        [fresh_adapters(f"{model.config.model_type}.{number}.{e}", weights_of(layer.module, e), CONFIG["r"])
         for e in range(layer.count)]
        for number, layer in enumerate(layers)
    ]  # fmt: skip
    config = lora_config(**CONFIG, target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    adapted = get_peft_model(model, config)
    wrappers = [module for module in adapted.modules() if hasattr(module, "parameter_name")]
    for number, (layer, begin) in enumerate(zip(layers, fresh, strict=True)):
        own = [wrapper for wrapper in wrappers if wrapper.get_base_layer() is layer.module]
        assert len(own) == 2, number
        for wrapper in own:
            which = "up" if wrapper.parameter_name == "gate_up_proj" else "down"
            wrapper.lora_A["default"].weight.data = torch.cat([one[f"{which}_lora.a"] for one in begin])
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_(not of_experts(name.replace(".base_layer.", ".")))
    return adapted


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_at_servers_learn_what_those_of_peft_learn_here_which_can_load_them(family, tmp_path):
    model = tiny_mixture(family)
    local = with_peft(copy.deepcopy(model))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with lk.Swarm(name="mixture") as swarm:
        lora = local.peft_config["default"]
        lkt.serve_experts(swarm, model, servers=2, backups=0, backend=SGD, isolation="task", lora=lora)
        lkt.attach(model, swarm)
        for _ in range(3):
            ours, theirs = model(tokens(), labels=tokens()).loss, local(input_ids=tokens(), labels=tokens()).loss
            assert_close(ours, theirs)
            model.zero_grad(), local.zero_grad()
            ours.backward(), theirs.backward()
            wanted = {name.removeprefix("base_model.model."): p for name, p in local.named_parameters()}
            for name, parameter in model.named_parameters():  # the router's and the attention's among them
                assert_close(parameter.grad, wanted[name].grad, rtol=1e-4, atol=1e-6)
            adapters = [parameter for name, parameter in wanted.items() if "lora" in name]
            torch.optim.SGD(adapters, lr=RATE).step()  # what servers have done
        lkt.save_adapters(model, tmp_path / "adapters")
        now, merged = dict(lkt.detach(model).named_parameters()), dict(local.merge_and_unload().named_parameters())
        assert now.keys() == merged.keys() == before.keys()
        for name, parameter in merged.items():
            assert_close(now[name], parameter, rtol=1e-4, atol=1e-6)
            assert torch.equal(now[name], before[name]) != (of_experts(name) and "bias" not in name), (
                "weights of experts"
            )
        from peft import PeftModel

        loaded = PeftModel.from_pretrained(tiny_mixture(family), tmp_path / "adapters")
        again = tiny_mixture(family)
        lkt.serve_experts(swarm, again, backups=0, isolation="task", lora=tmp_path / "adapters", name="again")
        lkt.attach(again, swarm, name="again")
        for found in (loaded.merge_and_unload(), lkt.detach(again)):
            for name, parameter in found.named_parameters():
                if of_experts(name):
                    assert_close(parameter, now[name])


def test_peft_trains_the_attention_here_while_servers_train_adapters_of_the_experts():
    model = tiny_mixture("olmoe")
    with lk.Swarm(name="mixture") as swarm:
        lkt.serve_experts(swarm, model, backups=0, backend=SGD, isolation="task", lora=2)
        lkt.attach(model, swarm, train_experts=True)  # though peft freezes the router
        adapted = get_peft_model(model, lora_config(r=2, target_modules=["q_proj", "v_proj"]))
        optimizer, losses = torch.optim.Adam((p for p in adapted.parameters() if p.requires_grad), lr=0.01), []
        for _ in range(6):
            loss = adapted(input_ids=tokens(), labels=tokens()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0] - 0.05
        learnt = [updates for server in swarm.statistics().values() for updates in server.experts.values()]
        assert max(learnt) == 6
        whole = sum(p.numel() for p in tiny_mixture("olmoe").parameters())
        assert sum(p.numel() for p in lkt.detach(adapted.merge_and_unload()).parameters()) == whole


def test_adapters_of_half_precision_experts_are_float32_and_a_folder_gives_the_same_experts(tmp_path):
    model = tiny_mixture("olmoe", torch.bfloat16)
    model.save_pretrained(tmp_path)
    wanted = model(tokens()).logits
    with lk.Swarm(name="mixture") as swarm:
        lkt.serve_experts(swarm, tmp_path, backups=0, backend=SGD, isolation="task", lora=2)
        lkt.attach(model, swarm)
        assert_close(model(tokens()).logits, wanted, rtol=0.02, atol=0.02)
        before = {name: p.clone() for name, p in tiny_mixture("olmoe", torch.bfloat16).named_parameters()}
        for _ in range(3):
            model(tokens(), labels=tokens()).loss.backward()
        now = dict(lkt.detach(model).named_parameters())
        assert all(now[name].dtype == torch.bfloat16 for name in now)
        assert not any(torch.equal(now[name], before[name]) for name in now if of_experts(name))


def test_adapters_are_saved_only_where_servers_have_some(tmp_path):
    model = tiny_mixture("olmoe")
    with pytest.raises(ValueError, match="OlmoeForCausalLM is not attached to a swarm"):
        lkt.save_adapters(model, tmp_path)
    with lk.Swarm(name="mixture") as swarm:
        lkt.serve_experts(swarm, model, backups=0, isolation="task")
        lkt.attach(model, swarm)
        with pytest.raises(ValueError, match=r"olmoe\.0\.0 has no adapters: its servers train all of it"):
            lkt.save_adapters(model, tmp_path)
        for wrong, why in (
            (tmp_path, "is no folder of adapters, which has adapter_config.json"),
            (folder_of_adapters(tmp_path / "half", r=2, target_parameters=["experts.down_proj"]), "not beside both"),
            (folder_of_adapters(tmp_path / "ranks", rank_pattern={"q_proj": 3}), "not LoRA of one rank"),
        ):
            with pytest.raises(ValueError, match=why):
                lkt.serve_experts(swarm, tiny_mixture("olmoe"), isolation="task", name="other", lora=wrong)


def folder_of_adapters(folder: Path, **options: Any) -> Path:
    """A folder with adapters that peft has saved."""
    config = lora_config(target_modules=["q_proj"], **options)
    get_peft_model(tiny_mixture("olmoe"), config).save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def test_all_experts_of_a_grid_have_the_same_adapters():
    model = tiny_mixture("olmoe")
    with lk.Swarm(name="mixture") as swarm:
        lkt.serve_experts(swarm, model, experts=3, backups=0, isolation="task", lora=lora_config(**CONFIG))
        for other in (2, 3):  # with the same rank, but another scale
            with pytest.raises(ValueError, match=r"experts of the kind gated.*serve others in a grid of their own"):
                lkt.serve_experts(swarm, model, isolation="task", lora=other)
        lkt.serve_experts(swarm, model, backups=0, isolation="task")  # as those that are there
        assert swarm.grids()["olmoe"].options["lora"] == 3 and len(swarm.experts()) == 8
        lkt.serve_experts(swarm, model, experts=3, backups=0, isolation="task", name="plain")
        with pytest.raises(ValueError, match="served already have no adapters; give another name"):
            lkt.serve_experts(swarm, model, isolation="task", name="plain", lora=2)


def test_labkit_serve_serves_experts_with_adapters(tmp_path, capsys):
    tiny_mixture("olmoe").save_pretrained(tmp_path)
    arguments = ["serve", "--experts-of", str(tmp_path), "--lora", "2", "--backups", "0"]
    ranks = []
    status, printed = run_until_signalled(
        arguments, signal.SIGINT, lambda swarm: ranks.append(swarm.grids()["olmoe"].options["lora"])
    )
    assert (status, ranks) == (0, [2]), printed
    assert main(["serve", "--lora", "2"]) == 1
    assert "--lora is for --experts-of" in capsys.readouterr().err
    assert main([*arguments[:3], "--lora", str(tmp_path)]) == 1
    assert "is no folder of adapters" in capsys.readouterr().err


@pytest.mark.parametrize("lora", [0, True, 8.0, "8", {"r": 2, "lora_dropout": 0.1}, {"use_dora": True}])
def test_other_adapters_are_refused(lora):
    lora = lora_config(**lora) if isinstance(lora, dict) else lora
    with lk.Swarm(name="mixture") as swarm, pytest.raises(ValueError, match="lora"):
        lkt.serve_experts(swarm, tiny_mixture("olmoe"), isolation="task", lora=lora)
