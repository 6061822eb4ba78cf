"""What is wrong with inputs or gradients is said here, to their caller, before anything is sent.

On a batch's way: `client/moe` and `client/expert` look at their tensors here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from labkit.errors import NonFiniteTensor


def check_tensors(who: str, inputs: Sequence[Any], keywords: Mapping[str, Any]) -> None:
    """Raise `TypeError` unless all inputs are tensors, and `ValueError` for one without a dimension."""
    named = [(f"input {place + 1}", value) for place, value in enumerate(inputs)]
    for name, value in [*named, *((f"{key}=…", value) for key, value in keywords.items())]:
        if value is None:
            raise TypeError(f"{who} was given None as {name}: experts take tensors only, so leave it out")
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{who} was given {type(value).__name__} as {name}: experts take tensors, with a row for each row"
            )
        if value.ndim == 0:
            raise ValueError(
                f"{who} was given one number as {name}: experts take a row for each row, such as "
                f"torch.full((rows, 1), {value.item():.4g})"
            )


def check_finite(name: str, what: str, tensors: Sequence[Tensor], sent: Tensor | None = None) -> None:
    """Raise `NonFiniteTensor` for what experts would refuse, before it costs other rows of their requests.

    Args:
        name: The grid, or an expert.
        what: What the tensors are, in words.
        tensors: Each [n, ...].
        sent: Bool, which of their first dimensions are sent at all; None for all.
    """
    for place, tensor in enumerate(tensors):
        if not tensor.is_floating_point() or math.isfinite(tensor.sum()):  # a finite sum has finite terms
            continue
        bad = ~tensor.isfinite()
        if sent is not None:
            bad[~sent] = False
        rows = bad.reshape(len(tensor), -1).any(1).nonzero()[:, 0].tolist()
        if rows:
            which = f"row {rows[0]}" if len(rows) == 1 else f"{len(rows)} rows, the first of them row {rows[0]}"
            raise NonFiniteTensor(
                f"{what} for {name!r}: number {place + 1} of {len(tensors)}, of shape {list(tensor.shape)}, has NaN or "
                f"infinity in {which}. Nothing was sent, since experts would refuse it"
            )
