"""Routes: which experts the rows of a forward pass go to, and who takes the rows of those that fail.

On a batch's way: `client/dispatch` asks here, and what follows is the same for all. A layer of our own finds experts by
its grid scores (`Searched`); a model whose own router has chosen brings them along (`client/chosen`).
"""

# n: rows of the batch; k: k_best, the slots of a row; short: rows that lack answers

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import trio
from torch import Tensor

from labkit.client.beam_search import Routing, beam_search, empty_routing
from labkit.client.dispatch_config import DispatchConfig
from labkit.client.gather import Gathering, RowGroup, requests_for
from labkit.client.refusals import alike
from labkit.client.session import Session
from labkit.directory.views import WithBackingOff, WithoutExperts
from labkit.errors import NoExperts, NotEnoughExperts
from labkit.events import RoutingChosen, RowsUnanswered
from labkit.expert_uid import ExpertInfo

logger = logging.getLogger(__name__)

MAX_ALIKE = 8  # experts that refuse rows for the same reason, after which no further ones are asked


@dataclass(frozen=True)
class Quorum:
    """How many answers rows need.

    Args:
        needed: [n], how many answers each row waits for.
        least: [n], with fewer than so many it is short of answers.
        short: What that is called in an error.
    """

    needed: Tensor
    least: Tensor
    short: str

    @classmethod
    def of(cls, n: int, k_min: int) -> Quorum:
        """Returns that of `n` rows which need `k_min` answers each."""
        each = torch.full((n,), k_min)
        return cls(each, each, f"fewer than k_min={k_min} answers")


@dataclass(frozen=True)
class Dispatched:
    """A forward pass: which expert was asked for each slot, its place in the grid, and whether it answered.

    `name` is the grid's. `updates` are the optimizer steps that the experts had made when they answered, by uid.
    """

    name: str
    experts: list[ExpertInfo]  # each once
    choice: Tensor  # int64 [n, k], index into `experts`, -1 where no expert was left to ask
    coordinates: Tensor  # int64 [n, k, dims]
    answered: Tensor  # bool [n, k]
    quorum: Quorum
    updates: dict[str, int] = field(default_factory=dict)


class Routes(Protocol):
    """Where the rows of a forward pass go.

    Attributes:
        name: The grid.
        k: The slots of a row.
        quorum: How many answers rows need.
    """

    name: str
    k: int
    quorum: Quorum

    async def find(self, deadline: float) -> Routing:
        """Returns the experts to ask first. Raises `NoExperts`, `NotEnoughExperts`."""

    async def replace(
        self, sent: Dispatched, gathering: Gathering, short: Tensor, free: Tensor, deadline: float
    ) -> list[RowGroup]:
        """Returns further requests for rows that can't have enough answers any more; none if nobody is left.

        Args:
            sent: The pass; the experts that are asked now are entered there, too.
            gathering: Its answers and failures so far.
            short: These rows.
            free: Bool [n, k], slots that have neither been answered nor may still be.
            deadline: Of the pass, on trio's clock.
        """


class Searched:
    """Routes to the best live experts of a grid, by beam search over grid scores. Others replace those that fail.

    Args:
        session: The swarm.
        config: How many experts to ask.
        name: The grid.
        grid_scores: One tensor [n, size] for each dimension of the grid.
    """

    def __init__(self, session: Session, config: DispatchConfig, name: str, grid_scores: Sequence[Tensor]) -> None:
        self.name, self.k = name, config.k_best
        self.quorum = Quorum.of(len(grid_scores[0]), config.k_min)
        self._session, self._config, self._scores = session, config, grid_scores

    async def find(self, deadline: float) -> Routing:
        """See `Routes.find`."""
        return await _find_experts(self._session, self._config, self.name, self._scores, deadline)

    async def replace(
        self, sent: Dispatched, gathering: Gathering, short: Tensor, free: Tensor, deadline: float
    ) -> list[RowGroup]:
        """See `Routes.replace`: these rows go to the next best experts."""
        failed = gathering.failed
        if len(failed) >= MAX_ALIKE and not sent.updates and alike(failed, places_of(sent.experts)):
            return []  # the rest of a large grid would refuse these rows, too
        others = WithoutExperts(self._session.directory, failed.keys() - gathering.partial)
        most = self.k + len(gathering.partial)  # of which a row may have asked so many in vain
        with trio.move_on_at(deadline):
            found = await beam_search(others, self.name, [scores[short] for scores in self._scores], most)
            return tell_of(self._session, self.name, requests_for(sent.experts, _refill(sent, found, short, free)))
        return []


def tell_of(session: Session, name: str, requests: list[RowGroup]) -> list[RowGroup]:
    """Emit the event of requests that are about to be made. Returns them."""
    if requests:
        rows = {request.expert.uid: len(request.rows) for request in requests}
        session.emit(RoutingChosen(prefix=name, rows=rows))
    return requests


def places_of(experts: Sequence[ExpertInfo]) -> dict[str, ExpertInfo]:
    """These experts by uid."""
    return {info.uid: info for info in experts}


async def _find_experts(
    session: Session, config: DispatchConfig, name: str, grid_scores: Sequence[Tensor], deadline: float
) -> Routing:
    """Beam search, until the deadline. Where too few experts are left, those on back-off are considered, too.

    Raises `NoExperts` if none was found, or `NotEnoughExperts` if some row has fewer than `k_min` live experts. If some
    row has fewer than `k_best`, that is logged once. All say what was looked up, and where. A search that takes too
    long finds no experts, which is an error unless `allow_zero_outputs` is set.
    """
    n, k = len(grid_scores[0]), config.k_best
    where = f"{name!r} could not be looked up in time"
    routing: Routing | None = None
    with trio.move_on_at(deadline):
        try:
            routing = await beam_search(session.directory, name, grid_scores, k)
        except ValueError as error:
            raise ValueError(
                f"the gate of the grid {name!r} gave no usable scores: {error}; is the input finite?"
            ) from None
        if n and int((routing.choice >= 0).sum(1).min()) < config.k_min:
            routing = await beam_search(WithBackingOff(session.directory), name, grid_scores, k)
        if n and not routing.experts:
            # Asking the DHT for the reason may find experts that were declared since the cache was filled.
            where = await session.directory.explain(name)
            routing = await beam_search(session.directory, name, grid_scores, k)
    if routing is None and config.allow_zero_outputs:
        return empty_routing(n, k, len(grid_scores))
    if routing is None or (n and not routing.experts):
        nobody = NoExperts(
            f"no live expert of the grid {name!r}: {where}; serve some with swarm.serve(name={name!r}, …) or "
            "`labkit serve`, or try again when its servers are back"
        )
        nobody.recoverable = routing is None or session.directory.may_hold(name, len(grid_scores))
        raise nobody
    alive = (routing.choice >= 0).sum(1)  # [n]
    fewest = int(alive.min()) if n else k
    too_few = fewest < config.k_min and not config.allow_zero_outputs
    first_time = fewest < k and session.first_time(f"fewer than k_best {name}")
    if too_few or first_time:
        with trio.move_on_at(deadline):
            where = await session.directory.explain(name)
    if too_few:
        rows = int((alive < config.k_min).sum())
        session.emit(RowsUnanswered(prefix=name, direction="forward", rows=rows))
        short = NotEnoughExperts(
            f"{rows} of {n} rows find fewer than k_min={config.k_min} live experts in the grid {name!r}: {where}"
        )
        short.recoverable = session.directory.may_hold(name, len(grid_scores), config.k_min)
        raise short
    if first_time:
        logger.warning("k_best=%d, but some rows find only %d live experts in the grid %r (%s)", k, fewest, name, where)
    return routing


def _refill(sent: Dispatched, found: Routing, short: Tensor, free: Tensor) -> Tensor:
    """Put the experts of `found` (rows: `short`) into the `free` [n, k] slots. Returns only those choices, [n, k]."""
    # 1. Number them as in `sent`. An expert that is there already is asked once more, but gets one backward request.
    numbers = {info.uid: number for number, info in enumerate(sent.experts)}
    for info in found.experts:
        number = numbers.setdefault(info.uid, len(sent.experts))
        sent.experts[number : number + 1] = [info]
    index = torch.tensor([numbers[info.uid] for info in found.experts] + [-1])
    offers = index[found.choice]  # [short, k]
    # 2. Leave out the experts that the row has asked already.
    fresh = (offers >= 0) & ~(offers[:, :, None] == sent.choice[short][:, None, :]).any(2)
    # 3. The first offer goes to the first free slot, and so on.
    offer = torch.argsort(~fresh, dim=1, stable=True)
    slot = torch.argsort(~free[short], dim=1, stable=True)
    pairs = torch.minimum(fresh.sum(1), free[short].sum(1))  # [short]
    row, nth = torch.nonzero(torch.arange(free.shape[1]) < pairs[:, None], as_tuple=True)
    offer, slot, at = offer[row, nth], slot[row, nth], short[row]
    added = torch.full_like(sent.choice, -1)
    added[at, slot] = sent.choice[at, slot] = offers[row, offer]
    sent.coordinates[at, slot] = found.coordinates[row, offer]
    return added
