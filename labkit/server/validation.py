"""Checks of requests to an expert: shapes, numbers of rows, finite numbers. Plain functions of tensors.

On a batch's way they run on both threads: the runtime checks shapes before it queues a request, the batch checks the
numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from labkit.errors import BadRequest, NonFiniteTensor

Schema = tuple[tuple[torch.dtype, tuple[int, ...]], ...]  # per tensor: dtype and the shape without its rows
HALF_PRECISION = (torch.float16, torch.bfloat16)


class CallOptions(NamedTuple):
    """What a request says besides its tensors; requests that differ in it are not merged. See `ExpertRequest`."""

    outputs: int = 1  # of the tensors of a backward pass, the gradients of outputs
    keywords: tuple[str, ...] = ()
    train: bool = True


NO_OPTIONS = CallOptions()


def checked_rows(uid: str, direction: str, tensors: Sequence[Tensor], options: CallOptions) -> int:
    """The number of rows of a request. Raises `BadRequest` if tensors of these shapes cannot be a request at all."""
    least = {"forward": 1, "backward": 1 + options.outputs}.get(direction)
    if least is None:
        raise BadRequest(f"direction {direction!r}: forward or backward")
    if len(tensors) < least:
        said = f"a {direction} pass takes at least {least} tensors, not {len(tensors)}"
        raise BadRequest(said + (f" (with {options.outputs} output gradients)" if options.outputs > 1 else ""))
    inputs = len(tensors) - (least - 1)
    if len(options.keywords) > inputs or len(set(options.keywords)) < len(options.keywords):
        raise BadRequest(
            f"{len(options.keywords)} keywords for {inputs} inputs of expert {uid}: each once, for an input"
        )
    rows = {t.shape[0] if t.ndim else 0 for t in tensors}
    if len(rows) > 1 or 0 in rows:
        shapes = ", ".join(str(list(t.shape)) for t in tensors)
        raise BadRequest(f"all tensors of a request have the same number of rows, at least one; got {shapes}")
    return tensors[0].shape[0]


def check_finite(tensors: Sequence[Tensor], what: str = "the request has a tensor") -> None:
    """Raise `NonFiniteTensor` if a floating-point tensor holds NaN or infinity."""
    for tensor in tensors:
        # A sum is finite only if all its terms are, and is thirty times faster than looking at each; a sum of finite
        # terms may overflow, though, so it is not the last word.
        if (
            (tensor.is_floating_point() or tensor.is_complex())
            and not _is_finite(tensor.detach().sum())
            and not bool(torch.isfinite(tensor).all())
        ):
            raise NonFiniteTensor(f"{what} with NaN or infinity (shape {list(tensor.shape)}); nothing was changed")


def rows_not_finite(tensors: Sequence[Tensor]) -> Tensor | None:
    """Bool [rows], which rows of floating-point tensors [rows, ...] hold NaN or infinity; None if none does."""
    bad = None
    for tensor in tensors:
        if tensor.is_floating_point() and not _is_finite(tensor.detach().sum()):
            these = ~torch.isfinite(tensor.detach()).flatten(1).all(1) if tensor.ndim > 1 else ~torch.isfinite(tensor)
            bad = these if bad is None else bad | these
    return bad if bad is not None and bool(bad.any()) else None


def squares_finite(tensors: Iterable[Tensor], *, kept: bool) -> bool:
    """Whether the squares of these tensors are finite: none has NaN, infinity, or numbers too large for an optimizer.

    `kept`: whether the optimizer keeps a mean of the squares in each tensor's own type, as Adam does. A mean that
    overflowed would stay infinite, and its parameter would never move again. In float16, which ends at 65504, that can
    happen if gradients stay at 256 or more. A single one of 300 adds only a thousandth of its square and need not harm:
    256 is a safe bound.
    """
    return all(_is_finite(_size(tensor.detach(), kept)) for tensor in tensors)


def norm_of(tensors: Iterable[Tensor]) -> float:
    """The norm of all the tensors together, in float32 for those in half precision: float16 ends at 65504."""
    sizes = (_norm(t.detach()) if t.dtype in HALF_PRECISION else t for t in tensors)
    return float(torch.nn.utils.get_total_norm(list(sizes)))


def _size(tensor: Tensor, kept: bool) -> Tensor:
    """A number that is finite if the squares are: their sum, or the norm, which is several times as slow."""
    size: Tensor
    if tensor.dtype in (torch.float32, torch.float64) and tensor.is_contiguous():
        size = torch.dot(tensor.view(-1), tensor.view(-1))
    elif tensor.dtype == torch.float16 and kept:  # squares in float16, and only their sum in a wider type
        size = tensor.square().sum(dtype=torch.float32)
    else:
        size = _norm(tensor)
    return size


def _norm(tensor: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=torch.float32 if tensor.dtype in HALF_PRECISION else None)
    return norm


def _is_finite(scalar: Tensor) -> bool:
    value = scalar.item()
    return math.isfinite(value.real) and math.isfinite(value.imag)


def schema_of(tensors: Sequence[Tensor]) -> Schema:
    """Dtype and trailing shape of each tensor. Requests of equal schema can be merged along their rows."""
    return tuple((t.dtype, tuple(t.shape[1:])) for t in tensors)


def describe(schema: Schema) -> str:
    """A schema in words, for errors."""
    shapes = (f"{str(dtype).removeprefix('torch.')} [{', '.join(('rows', *map(str, s)))}]" for dtype, s in schema)
    return " and ".join(shapes)
