"""Checking: whether a file that has arrived is a sound state of the expert that it is said to be."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable
from pathlib import Path

import torch
from torch import Tensor

from labkit.copies.messages import CopyHead
from labkit.errors import CheckpointError
from labkit.expert_file import DamagedCheckpoint, read_expert

UPDATES = "counter.updates"  # the tensor of a state that counts the expert's optimizer steps
NUMBERS_AT_ONCE = 1 << 22  # numbers that are looked at together


def check_copy(head: CopyHead, path: Path, *, may_be_infinite: Container[str] = ()) -> dict[str, Tensor]:
    """Check a copy's file: its form, whose it is, its kind, its checksum, its updates, and that it is finite.

    Blocks for as long as it takes to read the file, and holds all of it in memory.

    Args:
        head: What it is said to be.
        path: The file.
        may_be_infinite: Names of tensors that may hold infinity, though not NaN, as the mask of an attention does.

    Returns:
        The state, for further checks, such as `ExpertBackend.check_state`.

    Raises:
        CheckpointError: It is something else, or not finite.
    """
    try:
        state, crc32 = read_expert(path, head.uid, head.kind)
    except DamagedCheckpoint:  # the path is nobody else's affair
        raise DamagedCheckpoint(f"the copy of {head.uid} is damaged") from None
    except CheckpointError:
        raise CheckpointError(f"this is no copy of {head.uid} of kind {head.kind!r}") from None
    updates = state.get(UPDATES)
    if crc32 != head.crc32 or updates is None or updates.shape != () or int(updates) != head.updates:
        raise CheckpointError(f"this is another copy of {head.uid} than was said")
    if _is_plainly_finite(state.values()):
        return state
    for name, tensor in state.items():
        if not _is_sound(tensor, finite=name not in may_be_infinite):
            raise CheckpointError(f"the copy of {head.uid} is not finite: {name} holds NaN or infinity")
    return state


def _is_plainly_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no tensor has anything but finite numbers. False, too, where one look at all of them cannot tell."""
    floats = [tensor for tensor in tensors if tensor.is_floating_point() or tensor.is_complex()]
    if any(tensor.dtype not in (torch.float32, torch.float64) for tensor in floats):
        return False
    return math.isfinite(torch.nn.utils.get_total_norm(floats))


def _is_sound(tensor: Tensor, *, finite: bool) -> bool:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    flat = tensor.reshape(-1)
    for start in range(0, len(flat), NUMBERS_AT_ONCE):
        some = flat[start : start + NUMBERS_AT_ONCE]
        numbers = some.float() if some.element_size() == 1 else some  # of float8 torch cannot tell
        if not bool(torch.isfinite(numbers).all() if finite else not torch.isnan(numbers).any()):
            return False
    return True
