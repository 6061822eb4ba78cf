"""Meeting: two servers that both serve an expert find out which of them goes on with it. The other gives it up.

That happens after a network was divided, or when a server was frozen and woke up: others have taken its experts over
meanwhile. The higher `(epoch, updates)` stays; but if the one of the higher epoch goes on from the copy in reserve, the
one with more updates: a part of the network that lacks a newer copy costs nobody else what was learnt. A server meets
another one

1. whose experts it has taken over, or was given: it calls there, more and more seldom, until it is answered, or that
   server is known to be dead;
2. of which a call, a copy or a watcher has told it;
3. that has declared one of its experts, too;
4. that has copies of its own experts, when it wakes up itself.

Who says what is proved by the connection. Anybody in the swarm may declare an expert: more proof would not help.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType

import trio

from labkit.contact import Contact
from labkit.copies.experts import ServedExperts
from labkit.copies.leftovers import Leftover
from labkit.copies.messages import MAX_WATCHED, MEET, Meet, ServedState
from labkit.directory import Directory
from labkit.errors import ConnectionLost, DeadlineExceeded, LabkitError, Overloaded, RequestRefused, RPCError
from labkit.events import Emit, ExpertGivenUp
from labkit.expert_uid import ExpertInfo
from labkit.wire.rpc_types import Caller, Reply, Request

logger = logging.getLogger(__name__)

MEET_TIME = 1.0  # seconds in which the other one has to answer
REMIND_PERIOD = 1.0  # seconds between two calls to a server whose experts were taken over, at first
REMIND_LEAST = 30.0  # the same at last
REMIND_SHARE = 0.02  # of the time for which it has been silent: so long is the next call put off
REMIND_TIME = 1800.0  # seconds for which one that is silent is called
REFUSALS = 5  # connections in a row that are refused, or break, by which it is known to be dead
MAX_SUSPECTS = 4096  # experts that are looked up
NONE: Mapping[str, int] = MappingProxyType({})


class Meeting:
    """Settles who serves an expert. `run` has to run.

    Args:
        caller: Makes the calls.
        directory: There it is looked up who else serves an expert, and declared anew what stays here.
        experts: The experts that are served here.
        own: Returns our own contact.
        emit: Gets an `ExpertGivenUp` for each expert that is given up.
        find_back: Called when a server is met after a while: the DHT is to call those again that it had lost.
        keep: Called with each expert that is given up, whose state is still here.

    Attributes:
        giving: Experts that are being handed over, about which nothing is settled meanwhile.
    """

    def __init__(
        self, caller: Caller, directory: Directory, experts: ServedExperts, own: Callable[[], Contact], emit: Emit,
        find_back: Callable[[], object] = lambda: None, keep: Callable[[Leftover], object] = lambda one: None,
    ) -> None:  # fmt: skip
        self.giving: set[str] = set()
        self._caller = caller
        self._directory = directory
        self._experts = experts
        self._own = own
        self._emit = emit
        self._find_back = find_back
        self._keep = keep
        self._since: dict[str, int] = {}  # how far experts that were taken over had come, as far as we know
        self._reserve: dict[str, int] = {}  # those that go on from a copy in reserve, and how far that had come
        self._suspects: dict[str, Contact | None] = {}
        self._to_remind: dict[Contact, set[str]] = {}
        self._away: set[Contact] = set()  # those of them that had gone, and have not handed over what they had
        self._wake = trio.Event()

    # ------------------------------------------------------------ what is noted, at once

    def took_over(self, gone: Contact, updates: Mapping[str, int], reserve: Mapping[str, int] = NONE) -> None:
        """Tell a server, as soon as it answers again, that its experts are served here now.

        Args:
            gone: The server.
            updates: Its experts, and how far each had come as far as that is known here.
            reserve: Those of them that go on from a copy in reserve, and how far that had come.
        """
        self._away.add(gone)
        self._note(gone, updates, reserve)

    def was_given(self, before: Contact, uid: str, updates: int) -> None:
        """Tell the server that has given an expert to this one that it is served here, should it not have heard so."""
        self._note(before, {uid: updates})

    def _note(self, before: Contact, updates: Mapping[str, int], reserve: Mapping[str, int] = NONE) -> None:
        held = self._experts.held
        self._since = {uid: since for uid, since in self._since.items() if uid in held} | dict(updates)
        self._reserve = {uid: since for uid, since in self._reserve.items() if uid in held} | dict(reserve)
        self._to_remind.setdefault(before, set()).update(updates)
        self._wake.set()

    def suspect(self, uid: str, at: Contact | None = None) -> None:
        """Find out soon whether another server has an expert of ours in a higher epoch. `at`: which one, if known."""
        if uid in self._experts.held and len(self._suspects) < MAX_SUSPECTS:
            self._suspects[uid] = at or self._suspects.get(uid)
            self._wake.set()

    # ------------------------------------------------------------ what is done about it

    async def run(self) -> None:
        """Meet whoever is to be met, until cancelled."""
        async with trio.open_nursery() as nursery:
            reminded: set[Contact] = set()

            async def remind(gone: Contact) -> None:
                await self._remind(gone)
                reminded.discard(gone)

            while True:
                await self._wake.wait()
                self._wake = trio.Event()
                for gone in self._to_remind.keys() - reminded:
                    reminded.add(gone)
                    nursery.start_soon(remind, gone)
                suspects, self._suspects = self._suspects, {}
                if suspects:
                    await self.look(suspects)

    async def look(self, suspects: Mapping[str, Contact | None]) -> None:
        """Meet those who may serve experts of ours, too: those that are named, and those that declare them."""
        at: dict[Contact, set[str]] = {}
        for uid, contact in suspects.items():
            if contact is not None:
                at.setdefault(contact, set()).add(uid)
        try:
            for uid, info in (await self._directory.holders(suspects)).items():
                at.setdefault(info.contact, set()).add(uid)
        except LabkitError as error:
            logger.debug("%s", error)
        await self.meet_all(at)

    async def meet_all(self, at: Mapping[Contact, Iterable[str]]) -> tuple[set[str], set[str]]:
        """Meet several servers at the same time. Returns the experts of those that have answered, and are silent."""
        settled: set[str] = set()
        silent: set[str] = set()

        async def meet(contact: Contact, uids: Sequence[str]) -> None:
            try:
                await self.meet(contact, uids)
                settled.update(uids)
            except (ConnectionLost, DeadlineExceeded) as error:
                silent.update(uids)
                logger.debug("%s is silent: %s", contact.endpoint, error)
            except RPCError as error:
                logger.debug("%s was not met: %s", contact.endpoint, error)

        async with trio.open_nursery() as nursery:
            for contact, uids in at.items():
                if contact.key != self._own().key:
                    nursery.start_soon(meet, contact, list(uids))
        return settled, silent

    async def meet(self, contact: Contact, uids: Sequence[str], *, follow: bool = False) -> bool:
        """Settle with another server who serves these experts of ours. Raises `RPCError` if it does not answer.

        Returns whether there was anything to say: nothing is said of experts that are being handed over. `follow`:
        whether to meet those, too, to whom it has given some of them.
        """
        said = False
        for start in range(0, len(uids), MAX_WATCHED):
            states = [state for uid in uids[start : start + MAX_WATCHED] if (state := self._state(uid)) is not None]
            if not states:
                continue
            reply = await self._caller.call(
                contact, MEET, Meet(self._own(), states), returns=list[ServedState | None], timeout=MEET_TIME
            )
            said = True
            for sent, theirs in zip(states, reply.body, strict=False):
                if theirs is None or theirs.uid != sent.uid:
                    continue
                if theirs.at is None:
                    self._settle(theirs, contact)
                elif follow and theirs.at.is_safe and theirs.at.key not in (contact.key, self._own().key):
                    self.suspect(sent.uid, theirs.at)
        return said

    def rpc_meet(self, request: Request) -> Reply:
        """Another server says which experts it serves. Answers with those of them that stay here.

        And with those that were served here in no lower epoch, which the other one is to go beyond, and with those that
        were given to a third one, which it is to meet.
        """
        body: Meet = request.body
        if request.peer.key not in (None, body.by.key):
            raise RequestRefused("only who serves an expert says so")
        if any(state.uid in self.giving for state in body.experts):
            raise Overloaded("an expert is being handed over; ask again")
        held = len(self._experts.held)
        ended: dict[str, ServedState] = {}
        for state in body.experts:
            ours = self._state(state.uid)
            self._settle(state, body.by)
            if ours is not None and ours.epoch >= state.epoch and state.uid not in self._experts.held:
                ended[state.uid] = ours
            elif ours is None and (moved := self._experts.moved(state.uid)) is not None:
                ended[state.uid] = ServedState(state.uid, moved[1], 0, at=moved[0])
        if len(self._experts.held) < held:
            self._reunited()
        return Reply([self._state(state.uid) or ended.get(state.uid) for state in body.experts])

    def _state(self, uid: str) -> ServedState | None:
        epoch = self._experts.held.get(uid)
        if epoch is None or uid in self.giving:
            return None
        return ServedState(uid, epoch, self._experts.updates(uid), self._since.get(uid, 0), uid in self._reserve)

    def _settle(self, theirs: ServedState, at: Contact) -> None:
        """Give an expert up, or let it stay here in an epoch that is above theirs."""
        ours = self._state(theirs.uid)
        if ours is None:
            return
        by_updates = theirs.reserve if theirs.epoch > ours.epoch else ours.reserve

        def rank(state: ServedState, key: bytes) -> tuple[int, int, int, bytes]:
            return (0 if by_updates else state.epoch), state.updates, state.epoch, key

        if rank(theirs, at.key) > rank(ours, self._own().key):
            epoch = theirs.epoch if theirs.epoch >= ours.epoch else ours.epoch + 1
            self.give_up(theirs.uid, at, epoch, max(theirs.since, self._reserve.get(ours.uid, 0)))
        else:
            if theirs.epoch >= ours.epoch:
                self._experts.raise_epoch(ours.uid, theirs.epoch + 1)
            self._directory.declare_anew(ours.uid)  # where the other one is, it was not seen

    def give_up(self, uid: str, to: Contact, epoch: int, since: int = 0) -> None:
        """Serve an expert no more, and say so.

        Args:
            uid: The expert.
            to: Who serves it.
            epoch: In which epoch.
            since: How many of our updates are counted already: as lost, or as those that the other one has.
        """
        lost, own = max(0, self._experts.updates(uid) - since), self._own().endpoint
        logger.warning("%s gives %s up: %s serves it, too; %d updates are lost", own, uid, to.endpoint, lost)
        self.give_way(uid, to, epoch)
        self._since.pop(uid, None)
        self._reserve.pop(uid, None)
        self._emit(ExpertGivenUp(uid=uid, address=own, to=to.endpoint, lost_updates=lost))

    def give_way(self, uid: str, to: Contact, epoch: int) -> None:
        """Serve an expert no more, since another server does in this epoch, and keep what it was here."""
        ours = self._experts.held.get(uid, 0)
        pack = self._experts.give_up(uid, to, epoch)
        if pack is not None:
            self._keep(Leftover(uid, min(ours, max(0, epoch - 1)), to, epoch, pack))

    async def resolve(self, others: Mapping[str, ExpertInfo]) -> set[str]:
        """Meet the servers that have declared experts of ours, too. Returns those about which it is settled now.

        Who is silent has no say in our epoch, or it would take an expert along that nobody gets an answer from. And who
        answers that it does not serve an expert, whatever is declared in its name, has none in any epoch.
        """
        at: dict[Contact, set[str]] = {}
        for uid, info in others.items():
            at.setdefault(info.contact, set()).add(uid)
        settled, silent = await self.meet_all(at)
        for uid, info in others.items():
            ours = self._experts.held.get(uid)
            if ours is not None and ((uid in silent and info.epoch <= ours) or (uid in settled and info.epoch > ours)):
                self._experts.raise_epoch(uid, info.epoch + 1)
                settled.add(uid)
        return settled

    def _reunited(self) -> None:
        """The network was divided, or one of us was away: let all others know where we are, and what we serve."""
        self._find_back()
        self._directory.declare_anew()

    async def _remind(self, gone: Contact) -> None:
        """Call a server that had experts of ours, until it has answered, or is known to be dead."""
        refused, began = 0, trio.current_time()
        try:
            while uids := [uid for uid in self._to_remind[gone] if uid in self._experts.held]:
                try:
                    if await self.meet(gone, uids, follow=True):
                        if gone in self._away:
                            self._reunited()
                        return
                except ConnectionLost:
                    refused += 1
                    if refused >= REFUSALS:
                        return
                except RPCError:
                    refused = 0
                silent = trio.current_time() - began
                if silent > REMIND_TIME:
                    return
                await trio.sleep(min(max(REMIND_PERIOD, REMIND_SHARE * silent), REMIND_LEAST))
        finally:
            self._to_remind.pop(gone, None)
            self._away.discard(gone)
