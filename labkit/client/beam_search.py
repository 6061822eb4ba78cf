"""Beam search: for each row of a batch the k best live experts of a grid, without a list of all experts.

On a batch's way this comes after the gating scores of `client/moe` and before the calls of `client/expert`. An expert's
score is the sum of its coordinates' grid scores (product keys; paper, section 3.2), so a search that walks the prefix
index one dimension at a time, keeping the best prefixes of each row, asks the DHT for few records.

The result *equals* the exhaustive search over the live experts. A plain beam does not ensure that: a prefix may score
well and have hardly any live experts, while a prefix that was discarded for it has many. So each row carries a
certificate, an upper bound on the score of everything that it discarded, and searches again with a beam twice as wide
until its k-th score is no less. In a full grid the first pass is always enough: if a level discards a prefix, it keeps
k others that score no less; each of those extends by the best coordinates of the remaining dimensions to an expert that
scores no less than any below the discarded one; so there are k such experts, and each later level discards one only for
others that are as good. What the certificate costs is thus paid where experts are missing.
"""

# rows: of the batch; k: k_best; w: beam width; size: of one grid dimension; P: prefixes in some row's beam
# All scores are float64 here, so that sums of float32 scores neither round nor overflow in a way that matters.

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
import trio
from torch import Tensor

from labkit.directory import Children
from labkit.expert_uid import MAX_DIMENSIONS, ExpertInfo, check_name, make_uid

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_MAX_SCORE = 1e300  # sums of so few cannot overflow
_CANDIDATES_PER_CHUNK = 1 << 22  # scored at a time (32 MB)
_MAX_SELECTED_SINGLY = 16  # up to here, taking the best one by one is faster than sorting


class Prefixes(Protocol):
    """Where the search looks: a `Directory`, or a view of one (`directory/views`)."""

    def cached(self, prefixes: Iterable[str]) -> dict[str, Children]:
        """See `Directory.cached`."""

    async def children(self, prefixes: Iterable[str]) -> dict[str, Children]:
        """See `Directory.children`."""


@dataclass(frozen=True)
class Routing:
    """Which experts get which rows, in each row by falling score.

    Where fewer than k are alive, the slots left over have -1 in `choice`, 0 in `coordinates`, -inf in `scores`.
    """

    experts: list[ExpertInfo]  # those that some row chose, by coordinates
    choice: Tensor  # int64 [rows, k_best], index into `experts`
    coordinates: Tensor  # int64 [rows, k_best, dims]
    scores: Tensor  # float64 [rows, k_best], without a gradient


async def beam_search(directory: Prefixes, name: str, grid_scores: Sequence[Tensor], k_best: int) -> Routing:
    """Find the `k_best` live experts with the highest scores, for each row.

    Equal scores are told apart in the same way each time (by low coordinates first, within a beam). Experts whose
    coordinates are at or beyond `size` are ignored.

    Args:
        directory: Where to look for experts.
        name: The grid.
        grid_scores: One float tensor [rows, size] for each dimension, on any device; -inf excludes a coordinate.
        k_best: Experts to find for each row.

    Returns:
        The routing. Its `experts` are empty if no expert is alive, or if there are no rows.

    Raises:
        ValueError: Scores are NaN, +inf or absurdly large, shapes are wrong, or k_best < 1.
    """
    await trio.lowlevel.checkpoint()
    grids = _check(name, grid_scores, k_best)
    rows, dims = len(grids[0]), len(grids)
    coordinates = np.zeros((rows, k_best, dims), dtype=np.int64)
    scores = np.full((rows, k_best), -np.inf)
    seen: dict[str, Children] = {}  # one search sees one state of the directory

    width, open_rows = k_best, np.arange(rows)
    while len(open_rows):
        # 1. Search with this width, 2. keep the rows that are certified, 3. search again for the others.
        found, places, bound = await _search(directory, name, [g[open_rows] for g in grids], k_best, width, seen)
        done = found[:, -1] >= bound if found.shape[1] == k_best else bound == -np.inf
        scores[open_rows[done], : found.shape[1]] = found[done]
        coordinates[open_rows[done], : found.shape[1]] = places[done]
        open_rows, width = open_rows[~done], 2 * width

    # 4. Number the experts that were chosen.
    alive = scores > -np.inf
    coordinates[~alive] = 0
    unique, index = _unique_rows(coordinates[alive])
    choice = np.full((rows, k_best), -1, dtype=np.int64)
    choice[alive] = index
    experts = [seen[make_uid(name, place[:-1])].experts[place[-1]] for place in unique.tolist()]
    return Routing(experts, torch.from_numpy(choice), torch.from_numpy(coordinates), torch.from_numpy(scores))


def empty_routing(rows: int, k_best: int, dims: int) -> Routing:
    """The routing where no expert was found."""
    return Routing(
        [], torch.full((rows, k_best), -1), torch.zeros((rows, k_best, dims), dtype=torch.int64),
        torch.full((rows, k_best), -torch.inf, dtype=torch.float64),
    )  # fmt: skip


def group_rows(choice: Tensor) -> list[tuple[int, Tensor, Tensor]]:
    """Group the rows of `choice` [rows, k_best] by the expert that they chose; -1 is no expert.

    Returns for each expert, by rising index: its index, the rows that chose it, rising, and for each of these rows the
    slot in which it did.
    """
    flat = choice.reshape(-1)
    places = torch.nonzero(flat >= 0).squeeze(1)  # [chosen]
    by_expert, order = torch.sort(flat[places], stable=True)
    experts, counts = torch.unique_consecutive(by_expert, return_counts=True)
    sizes, at = counts.tolist(), places[order]
    rows, slots = torch.split(at // choice.shape[1], sizes), torch.split(at % choice.shape[1], sizes)
    return list(zip(experts.tolist(), rows, slots, strict=True))


async def _search(
    directory: Prefixes, name: str, grids: Sequence[Floats], k_best: int, width: int, seen: dict[str, Children]
) -> tuple[Floats, Ints, Floats]:
    """Search once: scores [rows, <=k], coordinates [rows, <=k, dims], and a bound [rows] on what was discarded."""
    rows = len(grids[0])
    beam = np.zeros((rows, 1))  # [rows, w], score of each prefix of the beam
    at = np.zeros((rows, 1), dtype=np.int64)  # [rows, w], which one of `prefixes` it is
    places = np.zeros((rows, 1, 0), dtype=np.int64)  # [rows, w, level]
    bound = np.full(rows, -np.inf)
    prefixes = [name]
    for level, grid in enumerate(grids):
        last, size = level == len(grids) - 1, grid.shape[1]
        # 1. Which children do the beam's prefixes have? One bulk look-up for all rows.
        missing = [prefix for prefix in prefixes if prefix not in seen]
        seen |= directory.cached(missing)
        if missing := [prefix for prefix in missing if prefix not in seen]:
            seen |= await directory.children(missing)
        alive = np.stack([seen[prefix].mask(size, last) for prefix in prefixes])  # [P, size]
        # 2. Keep the best of them. The one after those bounds all others.
        keep = k_best if last else width
        best, index = _extend(beam, at, grid, alive, keep if last else keep + 1)
        if not last and best.shape[1] > keep:
            # Rounding is monotone, so sums in the order of the scores themselves cannot be below what they bound.
            rest = best[:, keep]
            for other in grids[level + 1 :]:
                rest = rest + other.max(axis=1)
            bound = np.maximum(bound, rest)
        beam, index = best[:, :keep], index[:, :keep]  # [rows, w]
        slot, coordinate = np.divmod(index, size)
        places = np.concatenate([np.take_along_axis(places, slot[..., None], 1), coordinate[..., None]], axis=2)
        # 3. Number the prefixes of the next level.
        if not last:
            living = beam > -np.inf
            code = np.take_along_axis(at, slot, 1) * size + coordinate
            codes, inverse = np.unique(code[living], return_inverse=True)
            if not len(codes):
                return np.zeros((rows, 0)), np.zeros((rows, 0, len(grids)), dtype=np.int64), bound
            at = np.zeros_like(index)
            at[living] = inverse
            prefixes = [f"{prefixes[c // size]}.{c % size}" for c in codes.tolist()]
    return beam, places, bound


def _extend(beam: Floats, at: Ints, grid: Floats, alive: npt.NDArray[np.bool_], count: int) -> tuple[Floats, Ints]:
    """The best `count` children of each row's beam, by falling score, ties by slot and coordinate.

    `beam`, `at`: [rows, w]; `grid`: [rows, size]; `alive`: [P, size]. Returns scores and places in [w * size].
    """
    rows, size = grid.shape
    candidates = beam.shape[1] * size
    count = min(count, candidates)
    best, index = np.empty((rows, count)), np.empty((rows, count), dtype=np.int64)
    step = max(1, _CANDIDATES_PER_CHUNK // candidates)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        scores = beam[part, :, None] + grid[part, None, :]  # [rows, w, size]
        scores[~alive[at[part]]] = -np.inf
        best[part], index[part] = _top(scores.reshape(len(scores), candidates), count)
    return best, index


def _top(scores: Floats, count: int) -> tuple[Floats, Ints]:
    """The highest `count` of each row of `scores` [rows, n], and their places; ties in order. Overwrites `scores`."""
    if count > _MAX_SELECTED_SINGLY:
        order = np.argsort(-scores, axis=1, kind="stable")[:, :count]
        return np.take_along_axis(scores, order, 1), order
    best, index = np.empty((len(scores), count)), np.empty((len(scores), count), dtype=np.int64)
    every = np.arange(len(scores))
    for n in range(count):
        index[:, n] = scores.argmax(axis=1)
        best[:, n] = scores[every, index[:, n]]
        scores[every, index[:, n]] = -np.inf
    return best, index


def _unique_rows(coordinates: Ints) -> tuple[Ints, Ints]:
    """The different rows of `coordinates` [n, dims], sorted, and for each row which of them it is."""
    code = np.zeros(len(coordinates), dtype=np.int64)
    for column in coordinates.T:  # numbered anew at each dimension, so that no product of sizes can overflow
        code = np.unique(code * (column.max(initial=0) + 1) + column, return_inverse=True)[1]
    first = np.unique(code, return_index=True)[1]
    return coordinates[first], code


def _check(name: str, grid_scores: Sequence[Tensor], k_best: int) -> list[Floats]:
    """The scores as float64 arrays [rows, size]. Raises `ValueError` if they cannot be used."""
    check_name(name)
    if k_best < 1:
        raise ValueError(f"k_best={k_best}: at least 1")
    shapes = [tuple(scores.shape) for scores in grid_scores]
    even = all(len(shape) == 2 and shape[0] == shapes[0][0] and shape[1] > 0 for shape in shapes)
    if not 1 <= len(shapes) <= MAX_DIMENSIONS or not even:
        raise ValueError(f"grid_scores={shapes}: one tensor [rows, size] for each of 1 to {MAX_DIMENSIONS} dimensions")
    grids: list[Floats] = [scores.detach().to("cpu", torch.float64).numpy() for scores in grid_scores]
    for dimension, grid in enumerate(grids):
        if np.isnan(grid).any():
            raise ValueError(f"grid_scores[{dimension}] has NaN in {int(np.isnan(grid).any(axis=1).sum())} rows")
        if (grid > _MAX_SCORE).any() or ((grid < -_MAX_SCORE) & (grid > -np.inf)).any():
            raise ValueError(f"grid_scores[{dimension}] has infinite or absurdly large scores")
    return grids
