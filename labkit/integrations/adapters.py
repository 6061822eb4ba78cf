"""LoRA adapters beside the experts of a Transformers model, at their servers (Hu et al. 2021).

An expert of the kind "gated" has them where it is asked to (`server/gated`). Here they begin, and become part of the
weights again. As with `peft`, A is drawn and B is 0; `peft` itself is not needed.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

UNKNOWN = ("lora_dropout", "use_dora", "lora_bias")  # what adapters at servers do not have


def lora_options(lora: Any, running: Mapping[str, Any] | None) -> dict[str, Any]:
    """The options of the kind "gated" for `serve_experts(…, lora=…)`; empty without adapters.

    Args:
        lora: A rank, or a `peft.LoraConfig`; None for as they are already, or without.
        running: The options of experts that are already in the same grid; None if there are none.

    Raises:
        ValueError: It is neither, or asks for what is not known here, or the others have no adapters.
    """
    if lora is None:
        return {name: value for name, value in (running or {}).items() if name in ("lora", "lora_scale")}
    if running is not None and not running.get("lora"):
        raise ValueError("lora: the experts of this grid that are served already have no adapters; give another name=…")
    if isinstance(lora, int) and not isinstance(lora, bool) and lora >= 1:
        return {"lora": lora, "lora_scale": 1.0}
    rank, alpha = getattr(lora, "r", None), getattr(lora, "lora_alpha", None)
    if not isinstance(rank, int) or not isinstance(alpha, int | float):
        raise ValueError(
            f"lora={lora!r}: the rank of the adapters, a whole number of at least 1, a peft.LoraConfig, or the folder "
            "of some that were saved"
        )
    if asked := [name for name in UNKNOWN if getattr(lora, name, False)]:
        raise ValueError(f"lora: adapters of experts have no {' and no '.join(asked)}; leave it out of the LoraConfig")
    return {"lora": rank, "lora_scale": alpha / (math.sqrt(rank) if getattr(lora, "use_rslora", False) else rank)}


def fresh_adapters(uid: str, weights: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The adapters that an expert with these weights begins with, by name; the same for the same uid."""
    generator = torch.Generator().manual_seed(zlib.crc32(uid.encode()))
    found = {}
    for layer in ("up", "down"):
        weight = weights[f"{layer}.weight"]  # [out, in]
        dtype = torch.promote_types(weight.dtype, torch.float32)
        a = torch.empty(rank, weight.shape[1], dtype=dtype)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        found[f"{layer}_lora.a"], found[f"{layer}_lora.b"] = a, torch.zeros(weight.shape[0], rank, dtype=dtype)
    return found


def merged(weights: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The parameters of an expert, with its adapters, if it has any, added to its weights, times `scale`."""
    found = {name: tensor for name, tensor in weights.items() if "_lora." not in name}
    for layer in ("up", "down"):
        if f"{layer}_lora.a" in weights:
            a, b = (weights[f"{layer}_lora.{name}"] for name in ("a", "b"))
            weight = found[f"{layer}.weight"]
            found[f"{layer}.weight"] = (weight.to(a.dtype) + scale * (b @ a)).to(weight.dtype)
    return found
