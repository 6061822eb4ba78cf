"""What the gate of a layer over sequences decides on: one vector for each sequence.

On a batch's way: `client/moe` asks here before its gate, and sends the sequences themselves to the experts. All is
plain autograd, so the gate's gradient reaches each position exactly.
"""

# n: sequences; seq: positions of each; dim: of a position

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from labkit.suggest import one_of

MASK = "mask"  # the further input that says which positions are there
Pool = str | Callable[..., Tensor]


def mean(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean [n, dim] over the positions of x [n, seq, dim]; over those only that a mask [n, seq] says are there.

    It is 0 for a sequence of padding alone. What stands at padding, even NaN, plays no part and gets no gradient.
    """
    wide = x if x.dtype == torch.float64 else x.float()  # a sum may overflow in half precision
    if mask is None:
        return wide.mean(1).to(x.dtype)
    there = _there(mask, x)[:, :, None]
    total = wide.masked_fill(~there, 0).sum(1)
    return (total / there.sum(1).clamp(min=1)).to(x.dtype)


def first(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """The first position [n, dim] of x [n, seq, dim]; the first one that a mask [n, seq] says is there."""
    if mask is None:
        return x[:, 0]
    place = _there(mask, x).byte().argmax(1)  # (of several largest the first; and 0 where none is there)
    return x[torch.arange(len(x), device=x.device), place]


def _there(mask: Tensor, x: Tensor) -> Tensor:
    """A mask as bool [n, seq], beside x. Raises `ValueError` if it is none."""
    if mask.shape != x.shape[:2] or mask.is_floating_point() or mask.is_complex():
        raise ValueError(
            f"mask={_words(mask)}: a gate that takes the mean of sequences, or their first position, takes a mask "
            f"[..., seq] of bools or whole numbers, true where a position is there and no padding; for masks of "
            "another kind give pool=…, a function of x and mask"
        )
    return mask.to(x.device) != 0


POOLS: dict[str, Callable[..., Tensor]] = {"mean": mean, "first": first}


def check_pool(pool: Any) -> Pool:
    """The same. Raises `ValueError` for what cannot make one vector of a sequence."""
    if isinstance(pool, str) and pool not in POOLS:
        raise ValueError(one_of("pool", pool, POOLS) + "; or a function of x [n, seq, dim] that returns [n, dim]")
    if not isinstance(pool, str) and (not callable(pool) or isinstance(pool, type)):
        raise ValueError(f"pool={pool!r}: {', '.join(POOLS)}, or a function of x [n, seq, dim] that returns [n, dim]")
    return pool


def pool_name(pool: Pool) -> str:
    """What a pool is called, for people."""
    return pool if isinstance(pool, str) else getattr(pool, "__name__", type(pool).__name__)


def pooled(pool: Pool, x: Tensor, further: Mapping[str, Tensor]) -> Tensor:
    """What the gate decides on.

    Args:
        pool: A name of `POOLS`, or a function of x and of those further inputs that it has parameters for.
        x: Sequences [n, seq, dim].
        further: Further inputs [n, ...], by keyword.

    Returns:
        One vector for each sequence, [n, dim].

    Raises:
        ValueError: The function returned something else, or a mask does not fit.
    """
    function = POOLS[pool] if isinstance(pool, str) else pool
    vectors = function(x, **{name: tensor for name, tensor in further.items() if _takes(function, name)})
    wanted = (x.shape[0], x.shape[2])
    if not isinstance(vectors, Tensor) or tuple(vectors.shape) != wanted or not vectors.is_floating_point():
        got = _words(vectors) if isinstance(vectors, Tensor) else type(vectors).__name__
        raise ValueError(
            f"pool={pool_name(pool)} returned {got} for sequences {list(x.shape)}; the gate decides on one vector for "
            f"each of them: {list(wanted)}"
        )
    return vectors


def _takes(function: Callable[..., Tensor], name: str) -> bool:
    """Whether a function has a parameter of this name, or takes any, after its first one."""
    try:
        signature = inspect.signature(function.forward if isinstance(function, nn.Module) else function)
    except (TypeError, ValueError):  # one written in C
        return False
    others = list(signature.parameters.values())[1:]
    named = {other.name for other in others if other.kind in (other.POSITIONAL_OR_KEYWORD, other.KEYWORD_ONLY)}
    return name in named or any(other.kind is other.VAR_KEYWORD for other in others)


def _words(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
