"""What an expert takes and gives, as far as that can be known before its first call.

A module may say it itself (`example_inputs`). Otherwise one row of the width of one of its first layers is tried. Plain
functions of modules and tensors; `server/expert_module` runs the module.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from labkit.expert_protocol import MAX_TENSORS, ExpertSchema, TensorSchema

ANY = -1  # a size of a schema where any will do
TRIED_LAYERS = 3  # of a module, when one row is tried
SMALLEST_IMAGE = 32  # pixels (or samples) that are tried where any number will do

Shape = tuple[int, ...]
_WIDTHS = {
    nn.LayerNorm: "normalized_shape", nn.RMSNorm: "normalized_shape", nn.BatchNorm1d: "num_features",
    nn.Linear: "in_features", nn.Bilinear: "in1_features", nn.MultiheadAttention: "embed_dim",
}  # fmt: skip
_CONVOLUTIONS = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}


def describe_tensors(tensors: Sequence[Tensor], keywords: Sequence[str] = ()) -> tuple[TensorSchema, ...]:
    """The schema of these tensors, [rows, ...] each, the last of which are handed over by keyword."""
    names = [""] * (len(tensors) - len(keywords)) + list(keywords)
    return tuple(TensorSchema(dtype_name(t.dtype), tuple(t.shape[1:]), n) for t, n in zip(tensors, names, strict=True))


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype as it goes over the wire, such as "float32"."""
    return str(dtype).removeprefix("torch.")


def dtype_called(name: str) -> torch.dtype | None:
    """The dtype with this name; None if torch has none."""
    dtype = getattr(torch, name, None)
    return dtype if isinstance(dtype, torch.dtype) else None


def in_words(inputs: Sequence[TensorSchema]) -> str:
    """A schema's inputs in words, for errors, such as "float32 [rows, any, 64]"."""
    return " and ".join(
        (f"{t.name}=" if t.name else "")
        + f"{t.dtype} [{', '.join(('rows', *('any' if size == ANY else str(size) for size in t.shape)))}]"
        for t in inputs
    )


def fits(wanted: Sequence[TensorSchema], given: Sequence[TensorSchema]) -> bool:
    """Whether inputs are what a schema says."""
    return len(wanted) == len(given) and all(
        (one.dtype, one.name, len(one.shape)) == (other.dtype, other.name, len(other.shape))
        and all(size in (ANY, actual) for size, actual in zip(one.shape, other.shape, strict=True))
        for one, other in zip(wanted, given, strict=True)
    )


def widened(one: ExpertSchema, other: ExpertSchema) -> ExpertSchema:
    """A schema that both fit: any size will do where they differ. The first one, if more than sizes differ."""
    if not (_alike(one.inputs, other.inputs) and _alike(one.outputs, other.outputs)):
        return one
    return ExpertSchema(_widened(one.inputs, other.inputs), _widened(one.outputs, other.outputs))


def _alike(one: Sequence[TensorSchema], other: Sequence[TensorSchema]) -> bool:
    return [(t.dtype, t.name, len(t.shape)) for t in one] == [(t.dtype, t.name, len(t.shape)) for t in other]


def _widened(one: Sequence[TensorSchema], other: Sequence[TensorSchema]) -> tuple[TensorSchema, ...]:
    return tuple(
        TensorSchema(t.dtype, tuple(a if a == b else ANY for a, b in zip(t.shape, u.shape, strict=True)), t.name)
        for t, u in zip(one, other, strict=True)
    )


# ---------------------------------------------------------------- what a module says, and what can be tried


def example_of(module: nn.Module) -> tuple[list[Tensor], tuple[str, ...]] | None:
    """The inputs that a module gives as an example of what it takes, and the names of the last; None without any.

    Raises `ValueError` if `example_inputs` is something else than tensors.
    """
    example: Any = getattr(module, "example_inputs", None)
    if example is None:
        return None
    named = dict(example) if isinstance(example, Mapping) else {}
    tensors = [example] if isinstance(example, Tensor) else list(named.values() if named else example)
    if not 1 <= len(tensors) <= MAX_TENSORS or not all(isinstance(t, Tensor) and t.ndim for t in tensors):
        raise ValueError("example_inputs: a tensor [rows, ...], a tuple of such, or a dictionary of such by keyword")
    return tensors, tuple(map(str, named))


def trials(module: nn.Module) -> Iterator[TensorSchema]:
    """What a module may take that says nothing of it: one input, of a width of one of its first layers."""
    lazy = any(is_lazy(t) for t in (*module.parameters(), *module.buffers()))  # it would take its shape from the trial
    if lazy or not _takes_one(module):
        return
    seen: dict[TensorSchema, None] = {}
    layers = (layer for layer in module.modules() if isinstance(layer, (nn.Embedding, *_WIDTHS, *_CONVOLUTIONS)))
    for layer, _ in zip(layers, range(TRIED_LAYERS), strict=False):
        for dtype in floating_dtypes(module) or [torch.float32]:
            for trial in _of_layer(layer, dtype_name(dtype)):
                if trial not in seen:
                    seen[trial] = None
                    yield trial


def _of_layer(layer: nn.Module, dtype: str) -> list[TensorSchema]:
    if isinstance(layer, nn.Embedding):
        return [TensorSchema("int64", (ANY,)), TensorSchema("int64", ())]
    for kind, dims in _CONVOLUTIONS.items():
        if isinstance(layer, kind):
            return [TensorSchema(dtype, (layer.in_channels, *[ANY] * dims))]
    width = next(getattr(layer, name) for kind, name in _WIDTHS.items() if isinstance(layer, kind))
    shape: Shape = (width,) if isinstance(width, int) else tuple(width)
    return [TensorSchema(dtype, shape), TensorSchema(dtype, (ANY, *shape))]


def rows_of(trial: TensorSchema, more: int, device: str) -> Tensor:
    """One row of a trial. Where any size will do, it is a small one, and `more`."""
    smallest = SMALLEST_IMAGE if trial.shape and trial.shape[0] != ANY else 1
    shape = [smallest + more if size == ANY else size for size in trial.shape]
    return torch.zeros(1, *shape, dtype=dtype_called(trial.dtype), device=device)


def floating_dtypes(module: nn.Module) -> list[torch.dtype]:
    """The floating-point dtypes of a module's parameters (or, without any, of its buffers), in order, each once."""
    for tensors in (module.parameters(), module.buffers()):
        if found := list(dict.fromkeys(t.dtype for t in tensors if t.is_floating_point())):
            return found
    return []


def signature_of(module: nn.Module) -> inspect.Signature | None:
    """How a module is called, if that can be known."""
    try:
        return inspect.signature(module.forward)
    except (TypeError, ValueError):
        return None


def _takes_one(module: nn.Module) -> bool:
    signature = signature_of(module)
    if signature is None:
        return False
    try:
        signature.bind(None)
    except TypeError:
        return False
    return True
