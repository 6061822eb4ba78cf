"""Tiny mixture models of Transformers with random weights, none of which is downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

FAMILIES = ("mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss")
VOCABULARY = 64
_WIDE = {"intermediate_size": 24, "num_experts_per_tok": 2}
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, **_WIDE}),
    "qwen3_moe": ("Qwen3MoeConfig", {"num_experts": 4, "moe_intermediate_size": 20, "head_dim": 8, **_WIDE}),
    "olmoe": ("OlmoeConfig", {"num_experts": 4, **_WIDE}),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            "n_routed_experts": 4, "moe_intermediate_size": 20, "n_group": 2, "topk_group": 1, "n_shared_experts": 1,
            "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4, "v_head_dim": 8, **_WIDE,
        },
    ),
    "aria": ("AriaTextConfig", {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1, **_WIDE}),
    "inkling2": (
        "Inkling2TextConfig",
        {
            "n_routed_experts": 4, "moe_intermediate_size": 20, "head_dim": 8, "unpadded_vocab_size": VOCABULARY,
            "sliding_window": 8, **_WIDE,
        },
    ),
    "granitemoe": ("GraniteMoeConfig", {"num_local_experts": 4, **_WIDE}),
    "gpt_oss": (
        "GptOssConfig",
        {
            "num_local_experts": 4, "head_dim": 8, "sliding_window": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, **_WIDE,
        },
    ),
}  # fmt: skip


def tiny_mixture(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A causal language model of one of `FAMILIES`, or one that has its experts in files in a way of its own.

    It has two layers of four experts each; DeepSeek's first has none.
    """
    name, options = _CONFIGS[family]
    usual: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": None,
    }  # fmt: skip
    config = getattr(transformers, name)(**usual | options | changes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 or "bias" in name:  # biases and experts begin at 0, or are not initialised at all
                parameter.normal_(0, 0.3, generator=generator)
    return model.to(dtype).eval()


def save_quantized(family: str, folder: Path) -> None:
    """Save a model as the hub has it: the experts of "gpt_oss" in MXFP4, those of "deepseek_v3" in FP8."""
    mixture = tiny_mixture(family, torch.bfloat16, hidden_size=64, intermediate_size=32, moe_intermediate_size=32)
    mixture.save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors, generator = load_file(file), torch.Generator().manual_seed(1)
    how = {"quant_method": "mxfp4"} if family == "gpt_oss" else {"quant_method": "fp8", "weight_block_size": [128, 128]}
    for name in [name for name in tensors if ".experts." in name and "bias" not in name]:
        weight = tensors.pop(name)
        if family == "gpt_oss":
            shape = weight.shape[0], weight.shape[2], weight.shape[1] // 32  # experts, outputs, groups of inputs
            codes = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
            exponents = torch.randint(120, 128, shape, dtype=torch.uint8, generator=generator)
            tensors |= {f"{name}_blocks": codes, f"{name}_scales": exponents}
        else:
            scale = weight.float().abs().max() / 400
            tensors |= {name: (weight / scale).to(torch.float8_e4m3fn), f"{name}_scale_inv": scale.reshape(1, 1)}
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": how}))


def tokens(rows: int = 2, length: int = 8, seed: int = 0) -> torch.Tensor:
    """Token ids [rows, length]."""
    return torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
