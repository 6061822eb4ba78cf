"""How the layer routes rows, step by step, without calling an expert: for teaching, plots and tests.

It takes the way of a batch (`moe`, `dispatch`, `beam_search`) and notes what is looked up on it.
"""

# Legend. n: rows; k: k_best; size: of one grid dimension.

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from labkit.client.beam_search import Prefixes, Routing, beam_search
from labkit.client.moe import MixtureOfExperts
from labkit.client.routes import Dispatched, Quorum
from labkit.client.session import Session, find_session
from labkit.directory import Children


@dataclass(frozen=True)
class SearchTrace:
    """How the experts of some rows were found. `trace_search` makes one.

    Args:
        layer: The layer whose rows they are.
        grid_scores: What its gate said: [n, size] for each dimension of the grid.
        lookups: The prefixes that were looked up, one dictionary a step, with their live children.
        routing: The experts that were found, in each row by falling score.
    """

    layer: MixtureOfExperts
    grid_scores: list[Tensor]
    lookups: list[dict[str, Children]]
    routing: Routing

    def uids(self, row: int = 0) -> list[str]:
        """The experts of one row, the best one first."""
        return [self.routing.experts[place].uid for place in self.routing.choice[row].tolist() if place >= 0]

    def weights(self, missing: Collection[str] = ()) -> Tensor:
        """The weights [n, k] of the experts in the layer's mean, if those in `missing` (uids) do not answer."""
        answers = torch.tensor([expert.uid not in missing for expert in self.routing.experts] + [False])
        choice = self.routing.choice  # [n, k]; -1 picks the last, where there is no expert
        quorum = Quorum.of(len(choice), self.layer.dispatch.k_min)
        sent = Dispatched(
            self.layer.name, self.routing.experts, choice, self.routing.coordinates, answers[choice], quorum
        )
        return self.layer.weights(self.grid_scores, sent).detach()


def trace_search(layer: MixtureOfExperts, x: Tensor, **further: Tensor) -> SearchTrace:
    """Find the experts of some rows as the layer does, and note how. No expert is called.

    Example:
        trace = trace_search(layer, torch.randn(1, 64))
        trace.uids(), trace.lookups, trace.weights(missing=["ffn.0.3"])

    Args:
        layer: A layer of an open swarm.
        x: Rows [n, dim]; or sequences [n, seq, dim], for a layer that sends such.
        **further: The inputs beside sequences, by keyword: a mask counts.

    Returns:
        The trace of their search.

    Raises:
        SwarmClosed: The swarm is not open in this process.
    """
    with torch.no_grad():
        scores = layer.grid_scores(x, **further)
    return find_session(layer.swarm).run(_trace, find_session(layer.swarm), layer, scores)


async def _trace(session: Session, layer: MixtureOfExperts, scores: Sequence[Tensor]) -> SearchTrace:
    watched = _Watched(session.directory)
    routing = await beam_search(watched, layer.name, scores, layer.dispatch.k_best)
    return SearchTrace(layer, list(scores), watched.lookups, routing)


class _Watched:
    """A directory that notes which prefixes are looked up in it, step by step."""

    def __init__(self, directory: Prefixes) -> None:
        self._directory = directory
        self.lookups: list[dict[str, Children]] = []

    def cached(self, prefixes: Iterable[str]) -> dict[str, Children]:
        """Nothing: so that each step is one call of `children`."""
        return {}

    async def children(self, prefixes: Iterable[str]) -> dict[str, Children]:
        """See `Directory.children`."""
        self.lookups.append(await self._directory.children(prefixes))
        return self.lookups[-1]
