"""Places: which experts of a grid a caller of `Swarm.serve` gets, and that nobody else gets them meanwhile.

This comes before any batch. A place is free if no server that is alive has declared its expert, and nobody claims it.
`hold_places` keeps a claim (see `directory/claims`) for the length of a block, in which servers are started that then
declare the experts.
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import Enum
from functools import partial
from random import Random
from typing import Any

import trio

from labkit.contact import Contact
from labkit.directory.claims import Claim, Claims, ClaimState
from labkit.directory.declarations import of_others
from labkit.directory.grids import GridInfo
from labkit.errors import ExpertsTaken, LabkitError
from labkit.expert_uid import ExpertInfo, check_grid, check_inside, grid_for, grid_uids, split_uid
from labkit.joining import is_alive
from labkit.launch.planning import Fit
from labkit.node import Node

logger = logging.getLogger(__name__)

DEFAULT_EXPERTS = 16  # of a new grid, if nothing says how many
MAX_PLACES = 1 << 20  # of a grid whose free places are looked for
QUICK_PLACES = 4096  # that are looked through in the lab thread
CLAIM_TIMEOUT = 90.0  # seconds until places are held; claims of somebody who hangs end in less
BELIEVED = 3.0  # seconds for which it is believed that a node is alive, or gone
LOOK_AGAIN = (0.05, 1.0)  # seconds between two looks at claims that are not decided: the first pause, and the longest
RELEASE_TIMEOUT = 2.0  # seconds that a claim's end may take; if it fails, the claim expires by itself


class Spare(Enum):
    """Whether a server may come without places."""

    NO = "no"
    IF_FULL = "if the grid is full"
    YES = "yes"


def spare_wish(spare: bool, backups: int, uids: Sequence[str] | None) -> Spare:
    """Whether servers may come without places: on request, or where copies are kept and any place would do."""
    if spare:
        return Spare.YES
    return Spare.IF_FULL if backups and uids is None else Spare.NO


@dataclass(frozen=True)
class Wish:
    """The places that a caller wants.

    Args:
        name: The grid.
        grid: Its sizes; by default as the swarm says, or large enough.
        experts: How many free places; by default all.
        uids: Which places instead.
        spare: Whether to take no places at all, or none if none is free.

    Raises:
        ValueError: Both a number and places are given, or the number is none.
    """

    name: str
    grid: Sequence[int] | None = None
    experts: int | None = None
    uids: Sequence[str] | None = None
    spare: Spare = Spare.NO

    def __post_init__(self) -> None:
        if self.uids is not None and self.experts is not None:
            raise ValueError("give either uids=… or experts=…")
        if self.spare is Spare.YES and (self.uids is not None or self.experts is not None):
            raise ValueError("spare=True: a spare server begins without experts; leave out uids and experts")
        if self.experts is not None and (not isinstance(self.experts, int) or self.experts < 1):
            raise ValueError(f"experts={self.experts!r}: a number of experts, at least one")


@dataclass(frozen=True)
class Places:
    """Places that are held.

    Args:
        sizes: The sizes of their grid.
        uids: The experts.
        options: The options of the experts, as `Fit` returned them.
    """

    sizes: tuple[int, ...]
    uids: list[str]
    options: dict[str, Any]


@asynccontextmanager
async def hold_places(node: Node, wish: Wish, kind: str, fit: Fit) -> AsyncIterator[Places]:
    """Choose places of a grid and hold them for the length of the block.

    1. Say that we choose. 2. Read what is claimed and what is declared, in this order, since a claim ends only when its
    experts are declared. 3. Ask for places, with a number above all that were seen. 4. Wait for those who were choosing
    then; whoever asked for one of our places before us gets it. 5. Look whether the places are still not declared. 6.
    Hold them. Who loses places chooses others, if it wants any that are free.

    Args:
        node: A node of the swarm.
        wish: The places that are wanted.
        kind: The kind of the experts, for the others who claim.
        fit: Returns the options of the experts, from what the swarm says of the grid.

    Raises:
        ExpertsTaken: There are not as many free places, or the places that are wanted are taken.
        ValueError: The wish does not fit the grid, or the options do not.
        LabkitError: It is not decided in time who gets the places.
    """
    ttl = node.directory.config.ttl
    claims = Claims(node.dht, lambda: node.contact, wish.name, ttl, node.dht.config.k)
    claimer = _Claimer(node, wish, kind, fit, claims)
    try:
        with trio.move_on_after(CLAIM_TIMEOUT) as limit:
            places = await claimer.choose()
        if limit.cancelled_caught:
            raise LabkitError(
                f"others choose places of the grid {wish.name!r}, too, and it was not decided within "
                f"{CLAIM_TIMEOUT:g} s who gets which; try again"
            )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_renew, claims, claimer.own, ttl / 3)
            yield places
            nursery.cancel_scope.cancel()
    finally:
        if claimer.own.attempt:
            with trio.move_on_after(RELEASE_TIMEOUT, shield=True):
                await claims.write(claims.new(ClaimState.OVER, claimer.own.attempt, claimer.own.number))


async def _renew(claims: Claims, own: Claim, period: float) -> None:
    while True:
        await trio.sleep(period)
        await claims.renew(own)


class _Lost(Exception):
    """Others were before us; choose again."""


class _Claimer:
    """Walks through the states of a claim. `own` is the claim as it was written last."""

    def __init__(self, node: Node, wish: Wish, kind: str, fit: Fit, claims: Claims) -> None:
        self.own = claims.new(ClaimState.CHOOSING, 0)
        self._node = node
        self._wish = wish
        self._kind = kind
        self._fit = fit
        self._claims = claims
        self._asked: dict[Contact, tuple[float, bool]] = {}  # nodes, when they were asked, and whether they answered
        self._random = Random(claims.ticket)

    async def choose(self) -> Places:
        """Returns the places when they are held."""
        pause = LOOK_AGAIN[0]
        for attempt in range(1, 1 << 20):
            try:
                return await self._try(attempt)
            except _Lost:
                await trio.sleep(pause * self._random.uniform(0.5, 1.5))
                pause = min(2 * pause, LOOK_AGAIN[1])
        raise AssertionError("unreachable: the caller has a deadline")

    async def _try(self, attempt: int) -> Places:
        node, wish, claims = self._node, self._wish, self._claims
        wanted = 0 if wish.experts is None else wish.experts
        started = trio.current_time()
        await self._write(claims.new(ClaimState.CHOOSING, attempt, wanted=wanted))  # 1
        others = await self._read()  # 2
        known, taken = await self._served()
        held = [claim for claim in others if claim.state is ClaimState.HOLDING]
        if known is None and held:  # a grid that somebody is about to serve
            known = min(held, key=lambda claim: (claim.number, claim.ticket)).grid
        options = self._fit(known)
        sizes = _sizes(known, wish)
        if known is not None and known.sizes != sizes:
            raise ValueError(
                f"the grid {wish.name!r} of this swarm has the sizes {known.sizes}, not {sizes}; serve another with "
                "name=…"
            )
        if wish.spare is Spare.YES and known is None:
            raise ValueError(f"the swarm has no grid {wish.name!r} for a spare server to help with; name=… names one")
        places = [] if wish.spare is Spare.YES else await self._pick(sizes, taken, others)
        number = 1 + max((claim.number for claim in others), default=0)
        grid = _describe(sizes, self._kind, options)
        await self._write(claims.new(ClaimState.ASKING, attempt, number, wanted, places, grid))  # 3
        await self._decide()  # 4
        if await self._of_others(await node.directory.holders(places)):  # 5
            raise _Lost
        if trio.current_time() - started > node.directory.config.ttl / 2:
            raise _Lost  # our claim may have ended before others have read it
        await self._write(claims.new(ClaimState.HOLDING, attempt, number, wanted, places, grid))  # 6
        return Places(sizes, places, options)

    async def _write(self, claim: Claim) -> None:
        self.own = claim
        if not await self._claims.write(claim):
            logger.warning(
                "the claim of places in the grid %s was stored nowhere: somebody else may take the same",
                self._wish.name,
            )

    async def _read(self) -> list[Claim]:
        """The claims of others whose nodes are alive."""
        claims = (await self._claims.read()).values()
        async with trio.open_nursery() as nursery:
            for contact in {claim.contact for claim in claims if claim.contact.key != self._node.contact.key}:
                nursery.start_soon(self._is_alive, contact)
        gone = {contact for contact, (_, alive) in self._asked.items() if not alive}
        return [claim for claim in claims if claim.contact not in gone]

    async def _of_others(self, experts: Mapping[str, ExpertInfo]) -> dict[str, Contact]:
        """Where those of these experts are that other nodes hold which are alive."""
        held, gone = await of_others(experts, self._node.contact.key, self._is_alive)
        lost = {info.contact: info for info in experts.values() if info.contact in gone}
        for info in lost.values():
            self._node.directory.report_failure(info, "lost", "it did not answer when a place was looked for")
        return {uid: info.contact for uid, info in held.items()}

    async def _is_alive(self, contact: Contact) -> bool:
        asked_at, alive = self._asked.get(contact, (-math.inf, False))
        if trio.current_time() > asked_at + BELIEVED:
            alive = await is_alive(self._node.client, contact)
            self._asked[contact] = trio.current_time(), alive
        return alive

    async def _served(self) -> tuple[GridInfo | None, dict[str, Contact]]:
        """What the swarm says of the grid, and where its experts are served now."""
        wish, directory = self._wish, self._node.directory
        known = (await directory.grids()).get(wish.name)
        experts = await directory.holders(wish.uids or ())
        if known is not None:
            experts |= await directory.holders_below(wish.name, len(known.sizes))
        taken = await self._of_others(experts)
        if known is None:
            return None, taken
        if not taken and wish.grid is not None and check_grid(wish.grid) != known.sizes:
            known = None  # a grid that nobody serves any more is free for another shape
        return known, taken

    async def _pick(self, sizes: tuple[int, ...], taken: Mapping[str, Contact], others: Iterable[Claim]) -> list[str]:
        """Choose places that are free, and that nobody else chooses, as far as that can be seen now."""
        wish = self._wish
        decided = {uid: c.contact for c in others if c.state is ClaimState.HOLDING for uid in c.places}
        if wish.uids is not None:
            check_inside(wish.uids, sizes)
            self._refuse_taken(wish.uids, taken, decided)
            return list(wish.uids)
        places = math.prod(sizes)
        if places > MAX_PLACES:
            raise ValueError(f"a grid of {places} places is too large to look for free ones; say which with uids=…")
        look = partial(_free_places, wish.name, sizes, taken.keys() | decided.keys())
        free = look() if places <= QUICK_PLACES else await trio.to_thread.run_sync(look)  # may take seconds
        wanted = len(free) if wish.experts is None else wish.experts
        if not free and wish.spare is Spare.IF_FULL:
            return []
        if not 1 <= wanted <= len(free):
            misfit = f"so {wanted} more experts do not fit" if wish.experts else "so there is none to take"
            raise ExpertsTaken(
                f"the grid {wish.name!r} {sizes} has {len(free)} free places of {places}, {misfit}; start the swarm "
                "with a larger grid, or serve another one with name=…"
            )
        asked = {uid for claim in others if claim.state is ClaimState.ASKING for uid in claim.places}
        rest = [uid for uid in free if uid not in asked]
        if len(rest) < wanted:
            return free[:wanted]  # not decided yet: whoever was first gets them
        # Those who choose at this moment do not see each other's choice, and so each leaves room for those before it.
        before = sum(c.wanted for c in others if c.state is ClaimState.CHOOSING and c.ticket < self._claims.ticket)
        start = before if before + wanted <= len(rest) else 0
        return rest[start : start + wanted]

    def _refuse_taken(self, uids: Sequence[str], taken: Mapping[str, Contact], decided: Mapping[str, Contact]) -> None:
        """Raise `ExpertsTaken` if somebody serves one of these experts, or is about to."""
        for places, word in ((taken, "is served at {} already"), (decided, "is about to be served by {}")):
            if clash := [uid for uid in uids if uid in places]:
                more = f" (and {len(clash) - 1} more of these)" if len(clash) > 1 else ""
                where = word.format(places[clash[0]].endpoint)
                raise ExpertsTaken(
                    f"{clash[0]} {where}{more}, and an expert has one server; take free places with experts=…, or stop "
                    "that server first"
                )

    async def _decide(self) -> None:
        """Wait until it is decided whether our places are ours. Raises `_Lost` if they are not."""
        own, pause = self.own, LOOK_AGAIN[0]
        others = await self._read()
        # Who begins to choose from now on sees our number, and takes a larger one.
        undecided = {claim.ticket: claim.attempt for claim in others if claim.state is ClaimState.CHOOSING}
        while True:
            if any(claim.places and claim.before(own) and claim.clashes_with(own) for claim in others):
                raise _Lost
            choosing = {c.ticket: c.attempt for c in others if c.state is ClaimState.CHOOSING}
            undecided = {t: attempt for t, attempt in undecided.items() if choosing.get(t) == attempt}
            if not undecided:
                return
            await trio.sleep(pause * self._random.uniform(0.5, 1.0))
            pause = min(2 * pause, LOOK_AGAIN[1])
            others = await self._read()


def _describe(sizes: tuple[int, ...], kind: str, options: Mapping[str, Any]) -> GridInfo:
    """The grid as a claim tells it; of the options those that are short."""
    plain: dict[str, bool | int | float | str | None] = {
        key: value
        for key, value in options.items()
        if isinstance(value, (bool, int, float)) or (isinstance(value, str) and len(value) <= 200)
    }
    return GridInfo(sizes, kind if len(kind) <= 200 else "", plain if len(plain) <= 32 else {})


def _free_places(name: str, sizes: tuple[int, ...], taken: set[str]) -> list[str]:
    """The places that are not taken, along the diagonals, so that a part of a grid has experts in every row."""

    def diagonal(uid: str) -> int:
        *before, last = split_uid(uid)[1]
        return (last - sum(before)) % sizes[-1]

    return sorted((uid for uid in grid_uids(name, sizes) if uid not in taken), key=diagonal)


def _sizes(known: GridInfo | None, wish: Wish) -> tuple[int, ...]:
    """The sizes of a grid: as the caller gives them, as the swarm knows them, or large enough for the experts."""
    if wish.grid is not None:
        return check_grid(wish.grid)
    if known is not None:
        return check_grid(known.sizes)
    if wish.uids:
        coordinates = [split_uid(uid)[1] for uid in wish.uids]
        if len(set(map(len, coordinates))) > 1:
            raise ValueError("uids: all of one grid have the same number of coordinates")
        return tuple(1 + max(column) for column in zip(*coordinates, strict=True))
    return grid_for(DEFAULT_EXPERTS if wish.experts is None else wish.experts)
