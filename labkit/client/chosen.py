"""Experts that somebody else has chosen: a model's own router, which a layer of labkit does not have.

On a batch's way: `integrations` calls `ChosenExperts` with rows and the numbers of their experts; `client/dispatch`
sends the rows as it sends those of a layer. No beam search: who was chosen is asked, and nobody can take its place but
the server that carries it on from a copy.
"""

# n: rows; k: slots of a row, one for each expert that was chosen for it; dim: of a row

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
import trio
from torch import Tensor

from labkit.client import following
from labkit.client.beam_search import Routing
from labkit.client.dispatch import dispatch_along
from labkit.client.dispatch_config import DispatchConfig
from labkit.client.expert_client import for_the_wire
from labkit.client.frozen import stand_ins
from labkit.client.gather import Gathering, RowGroup, requests_for
from labkit.client.inputs import check_finite
from labkit.client.passing import Passing, differentiable
from labkit.client.routes import Dispatched, Quorum, tell_of
from labkit.client.session import Session, find_session
from labkit.directory.views import WithBackingOff
from labkit.errors import NoExperts, NotEnoughExperts
from labkit.events import RowsUnanswered
from labkit.expert_uid import ExpertInfo
from labkit.suggest import one_of

MISSING = ("raise", "renormalize")
MAX_NAMED = 4  # experts that an error names
CODECS_OF = {torch.float16: "float16", torch.bfloat16: "bfloat16"}  # which change no number of that type


@dataclass(frozen=True)
class ChosenExperts:
    """The experts of one layer of a model, which its router chooses by number.

    Args:
        name: The name of the grid of all experts of the model.
        layer: The first coordinate of these: expert 17 is `<name>.<layer>.17`.
        grid: Sizes of the grid: layers, and experts in each.
        swarm: Name of the swarm, which has to be open when they are called.
        missing: What happens if an expert is gone: "raise" an error, or "renormalize": go on with those that answered.
        train: Whether backward passes train the experts; None for those that compute gradients of the router.
        timeout: Seconds that a pass may take, forward or backward.
        codec: How tensors are compressed on the wire; None for the type of the rows, which changes no number.

    Raises:
        ValueError: A value cannot be used.
    """

    name: str
    layer: int
    grid: tuple[int, int]
    swarm: str = "default"
    missing: str = "raise"
    train: bool | None = None
    timeout: float = 10.0
    codec: str | None = None

    def __post_init__(self) -> None:
        if self.missing not in MISSING:
            raise ValueError(one_of("missing", self.missing, MISSING))
        if self.train not in (None, True, False):
            raise ValueError(f"train_experts={self.train!r}: True, False, or None for as the router is trained")
        self._config(1, torch.float32)

    @property
    def prefix(self) -> str:
        """What the uids of these experts begin with."""
        return f"{self.name}.{self.layer}"

    def _config(self, k: int, dtype: torch.dtype) -> DispatchConfig:
        codec = CODECS_OF.get(dtype, "none") if self.codec is None else self.codec
        return DispatchConfig(k, k, forward_timeout=self.timeout, backward_timeout=self.timeout, codec=codec)

    def __call__(self, rows: Tensor, index: Tensor, router: Iterable[Tensor] = ()) -> tuple[Tensor, Tensor]:
        """Send rows to their experts.

        Args:
            rows: [n, dim].
            index: Integers [n, k], the numbers of each row's experts, none twice; -1 is none.
            router: The parameters that decide whether the experts are trained.

        Returns:
            The experts' outputs [n, k, dim], of the rows' device and dtype, as functions of the rows, and zero where
                there is no answer; and where there is one, bool [n, k].

        Raises:
            NoExperts: None of them is served.
            NotEnoughExperts: One of them is gone, or with "renormalize" all that were chosen for a row.
            NonFiniteTensor: There is NaN or infinity in the rows.
            SwarmClosed: The swarm is not open in this process.
        """
        session, config = find_session(self.swarm), self._config(max(1, index.shape[1]), rows.dtype)
        local = for_the_wire(rows)
        check_finite(self.prefix, "rows", [local])
        routes = _Chosen(session, self, index.detach().to("cpu", torch.int64))
        sent, outputs = session.run(dispatch_along, session, config, routes, [local], [tuple(rows.shape[1:])])
        passing = Passing(session, config, sent, (), self.train)
        if self.train is None:
            passing.gate = stand_ins(router)
        (outputs_of,) = differentiable(passing, outputs, [rows])
        return outputs_of.to(rows.dtype), sent.answered.to(rows.device)


class _Chosen:
    """Routes to experts that have been chosen: see `routes.Routes`.

    Where one is missing of which there is a copy, whoever carries it on from there is waited for.

    Args:
        session: The swarm.
        layer: Whose experts they are.
        index: Int64 [n, k] on the CPU, their numbers; -1 is none.
    """

    def __init__(self, session: Session, layer: ChosenExperts, index: Tensor) -> None:
        self.name, self.k = layer.name, index.shape[1]
        self._raises = layer.missing == "raise"
        chosen = (index >= 0).sum(1)  # [n]
        if self._raises:
            self.quorum = Quorum(chosen, chosen, "no answer of an expert that was chosen for them")
        else:
            self.quorum = Quorum(chosen, chosen.clamp(max=1), "no answer of any expert that was chosen for them")
        self._session, self._prefix, self._index = session, layer.prefix, index
        self._asked: list[RowGroup] = []

    async def find(self, deadline: float) -> Routing:
        """See `Routes.find`."""
        n, k = self._index.shape
        wanted = torch.unique(self._index[self._index >= 0])
        found = await self._find_live(wanted.tolist(), deadline) if len(wanted) else {}
        experts = list(found.values())
        places = torch.full((int(wanted.max()) + 2 if len(wanted) else 1,), -1)  # of each number; the last for none
        places[torch.tensor(list(found), dtype=torch.int64)] = torch.arange(len(experts))
        choice = places[self._index]
        short = (choice >= 0).sum(1) < self.quorum.least
        if short.any():
            raise await self._nobody(short, choice, deadline)
        self._asked = requests_for(experts, choice)
        return Routing(experts, choice, self._index.clamp(min=0)[:, :, None], torch.zeros((n, k), dtype=torch.float64))

    async def _find_live(self, numbers: list[int], deadline: float) -> dict[int, ExpertInfo]:
        """Those of the experts that are alive. One that others may carry on is waited for, once for some seconds."""
        directory, prefix = self._session.directory, self._prefix
        view = WithBackingOff(directory)
        found: Mapping[int, ExpertInfo] = {}
        with trio.move_on_at(deadline):
            children = view.cached([prefix]) or await view.children([prefix])
            found = children[prefix].experts
            while lacking := [number for number in numbers if number not in found]:
                now = trio.current_time()
                until = max(self._hope(number, now) for number in lacking)
                if now > until:
                    break
                children = await directory.look_up([prefix])
                found = (view.cached([prefix]) or children)[prefix].experts
                if now < until and any(number not in found for number in lacking):
                    await trio.sleep(following.LOOK_AGAIN)
        if self._session.absent:
            for number in found:
                self._session.absent.pop(f"{prefix}.{number}", None)
        return {number: found[number] for number in numbers if number in found}

    def _hope(self, number: int, now: float) -> float:
        """Until when it makes sense to look for an expert that is not served."""
        uid = f"{self._prefix}.{number}"
        last = self._session.directory.suspended([self._prefix]).get(uid)
        at = None if last is None else last.contact
        since, place = self._session.absent.get(uid, (now, at))
        if at is not None and place != at:  # it was at another server meanwhile, which is gone, too
            since = now
        self._session.absent[uid] = since, at or place
        return since + (following.FOLLOW_TIME if last is not None and last.copies else 0.0)

    async def _nobody(self, short: Tensor, choice: Tensor, deadline: float) -> NoExperts | NotEnoughExperts:
        """The error where experts that are needed are not served."""
        where = f"{self._prefix!r} could not be looked up in time"
        with trio.move_on_at(deadline):
            where = await self._session.directory.explain(self._prefix)
        gone = torch.unique(self._index[short][(choice[short] < 0) & (self._index[short] >= 0)]).tolist()
        named = ", ".join(f"{self._prefix}.{number}" for number in gone[:MAX_NAMED])
        more = f" and {len(gone) - MAX_NAMED} more" if len(gone) > MAX_NAMED else ""
        self._session.emit(RowsUnanswered(prefix=self.name, direction="forward", rows=int(short.sum())))
        text = f"{int(short.sum())} of {len(short)} rows need {named}{more}, which no live server has: {where}; "
        if self._raises:
            text += "serve what is gone again, keep copies (backups=1), or attach with missing='renormalize'"
        else:
            text += "serve what is gone again, or keep copies (backups=1)"
        return (NotEnoughExperts if (choice >= 0).any() else NoExperts)(text)

    async def replace(
        self, sent: Dispatched, gathering: Gathering, short: Tensor, free: Tensor, deadline: float
    ) -> list[RowGroup]:
        """See `Routes.replace`: the same rows go to the servers that carry on the experts which were lost."""
        again = await following.carried_on(self._session.directory, self._asked, gathering.failed, short, deadline)
        now = {request.expert.uid: request.expert for request in again}
        sent.experts[:] = [now.get(info.uid, info) for info in sent.experts]
        self._asked = [replace(each, expert=now.get(each.expert.uid, each.expert)) for each in self._asked]
        return tell_of(self._session, self.name, again)
