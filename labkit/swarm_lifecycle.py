"""How a swarm of this process begins and ends: what it holds meanwhile, and which one is in its way.

Here is put together what a batch passes: the lab thread with one node, and the session in which layers call experts.
`Swarm` has besides what a notebook does with it.
"""

from __future__ import annotations

import atexit
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from labkit.client.expert_client import ExpertClient
from labkit.client.session import Session, close_session, open_session
from labkit.contact import Contact
from labkit.errors import JoinError, LabkitError, SwarmClosed
from labkit.events import Listeners
from labkit.faults import Faults
from labkit.interrupts import interrupts_wait
from labkit.joining import check_reachable
from labkit.launch.handle import ServerHandle, apply_faults, end_all
from labkit.launch.lab import Lab, run_lab
from labkit.launch.temporary_folder import TemporaryFolder, remove_abandoned
from labkit.node import Node, NodeConfig, check_config
from labkit.portal import Portal
from labkit.process_bound import ProcessBound
from labkit.relay.limits import RelayLimits
from labkit.server.layers import importing
from labkit.suggest import suggest_options
from labkit.view.collect.telemetry import Telemetry
from labkit.view.log.custom_loop import CustomLoop
from labkit.view.page.remote_service import RemoteService
from labkit.view.swarm_view import SwarmView
from labkit.wire.addresses import LOOPBACK, split_address
from labkit.wire.security import Identity, Members, parse_key

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT = 2.0  # seconds that `close` takes at most
CLEAN_STOP_TIME = 1.2  # seconds of these that servers have to save their experts
CLEAN_STOP_GRACE = 0.3  # seconds of these that the lab thread may be late with it

S = TypeVar("S", bound="SwarmLifecycle")

_open: dict[str, SwarmLifecycle] = {}


class SwarmLifecycle(ProcessBound):
    """The life of a `Swarm`, whose arguments these are.

    Attributes:
        name: Its name in this process.
        servers: The servers that were started here.
        telemetry: What its events have counted.
        listeners: Who hears of them.
        remote_service: Answers the pages of other processes.
        view: What shows it.
    """

    @suggest_options
    def __init__(
        self, name: str = "default", *, listen: str = LOOPBACK, announce: str | None = None, secure: bool | None = None,
        key: str | Path | Identity | None = None, members: Sequence[str] | None = None, node: NodeConfig | None = None,
        relay: bool | RelayLimits = False, _join: tuple[Contact, ...] = (),
    ) -> None:  # fmt: skip
        identity = key if isinstance(key, Identity) else Identity.generate() if key is None else Identity.load(key)
        if not isinstance(name, str):
            raise ValueError(f"name={name!r}: a text")
        if (module := importing()) is not None:
            raise LabkitError(
                f"the module {module!r} starts a swarm when it is imported, and whoever serves experts of it imports "
                "it; put that part of the module under: if __name__ == '__main__':"
            )
        self.name = name
        self.servers: list[ServerHandle] = []
        self.telemetry = Telemetry()
        self.listeners = Listeners()
        self.listeners.add(self.telemetry)
        self._custom_loop = CustomLoop(self.telemetry, self.listeners, name, closed=lambda: self.closed)
        self._faults = Faults()
        self.remote_service = RemoteService(lambda: getattr(self, "view", None))
        keys = None if members is None else [identity.public_key, *map(parse_key, members)]
        if not isinstance(relay, (bool, RelayLimits)):
            raise ValueError(f"relay={relay!r}: True, False, or a RelayLimits, such as lk.RelayLimits(clients=8)")
        node = node or NodeConfig()
        limits = relay if isinstance(relay, RelayLimits) else RelayLimits() if relay else node.relay
        self._node_config = replace(node, listen=listen, announce=announce, secure=secure, relay=limits)
        check_config(self._node_config, private=keys is not None)
        # The swarm of the same name goes on until this one is there, or cannot be because of it.
        before = _open.get(name)
        if before is not None and before._is_in_the_way(identity, self._node_config, _join):
            before.close()
        remove_abandoned()
        with interrupts_wait() as interruptible:
            self._folder = TemporaryFolder()
            try:
                self._begin(identity, keys, _join, interruptible)
                with interruptible():  # the one before stays if it is interrupted until here
                    pass
                if before is not None:
                    before.close()
                    with interruptible():
                        pass
                open_session(self._session)
                _open[name] = self
            except BaseException:
                if session := self.__dict__.get("_session"):
                    close_session(session)
                if portal := self.__dict__.get("_portal"):
                    portal.close()
                self._folder.cleanup()
                raise

    def _begin(
        self, identity: Identity, keys: list[bytes] | None, join: tuple[Contact, ...],
        interruptible: Callable[[], AbstractContextManager[None]],
    ) -> None:  # fmt: skip
        """Start the lab thread with a node in it, and let layers and the view find it."""
        self._members = Members(keys, Path(self._folder.name) / "members")
        self._members.admit()
        self._portal = Portal(self.name)
        with interruptible():  # to join may take long
            self._lab: Lab = self._portal.start(
                partial(
                    run_lab, self._portal, identity, self._node_config, join=join, methods=self.remote_service.methods,
                    admission=self._members.admission(), faults=self._faults, emit=self.listeners,
                )
            )  # fmt: skip
        self._node = self._lab.node
        experts = ExpertClient(self._node.client, self._node.directory, self.listeners)
        self._session = Session(self.name, self._portal, self._node.directory, experts, self.listeners)
        self.view = SwarmView(
            self.name, self._lab, self.servers, self.telemetry, self.listeners, in_flight=lambda: experts.in_flight,
            inject_faults=self._inject_faults,
        )  # fmt: skip

    def _is_in_the_way(self, identity: Identity, config: NodeConfig, join: Sequence[Contact]) -> bool:
        """Whether this swarm has to be closed before one of the same name can be: they share a key, or a port.

        Raises `JoinError` if the other would not come to be: it joins this very swarm, or cannot join.
        """
        if self.closed:
            return True
        own = {self._node.contact.key, *(server.contact.key for server in self.servers if server.contact is not None)}
        if any(contact.key in own for contact in join):
            raise JoinError(
                f"this invitation leads to the swarm {self.name!r} of this process, which would be closed, since the "
                "new one has its name; give another name=…, or none"
            )
        ports = {split_address(self._node_config.listen)[1], str(self._node.contact.port)} - {"*"}
        if identity.public_key != self._node.contact.key and split_address(config.listen)[1] not in ports:
            return False
        for contact in join[:1]:
            self._portal.call(check_reachable, self._node.client, contact, identity.public_key)
        return True

    def _inject_faults(self, latency: float | None = None, loss: float | None = None) -> Faults:
        if latency is not None or loss is not None:
            self._portal.check_open()
        self._faults.set(latency, loss)
        if latency is not None or loss is not None:
            self._portal.call(apply_faults, self.servers, latency, loss)
        return self._faults

    def peers(self) -> int:
        """Returns how many other nodes of the swarm this one knows: servers and notebooks."""
        return self._portal.call(self._count_peers)

    async def _count_peers(self) -> int:
        here = {server.plan.identity.public_key for server in self.servers}
        return sum(contact.key not in here for contact in self._node.dht.routing)

    @property
    def relaying(self) -> str:
        """Who relays for our node, or for how many nodes it relays; empty if neither."""
        node: Node = self._node
        return node.relaying.words

    @property
    def closed(self) -> bool:
        """Whether the swarm is closed."""
        return self._portal.closed

    def close(self) -> None:
        """Stop the servers started here, leave the swarm, and end its thread. Safe to repeat.

        Where servers of others go on in the same grids, experts are handed over to them. It takes
        two seconds at most. What is not handed over or saved in that time stays as it was copied
        or saved last; for large ones, call `server.stop()` before. An interrupt meanwhile is
        raised at the end. A forked process only forgets the swarm, which goes on where it was
        started.
        """
        with interrupts_wait():
            until = time.monotonic() + CLOSE_TIMEOUT
            self.view.end()  # its last scene shows the swarm as it was
            close_session(self._session)
            if _open.get(self.name) is self:
                del _open[self.name]
            if not self._portal.forked:
                self._end(until)

    def _end(self, until: float) -> None:
        try:
            # A little more than they have, and not for ever: a listener may block the lab thread.
            self._portal.call(end_all, list(self.servers), CLEAN_STOP_TIME, timeout=CLEAN_STOP_TIME + CLEAN_STOP_GRACE)
        except SwarmClosed:
            pass
        finally:
            if not self._portal.close(CLOSE_TIMEOUT - CLEAN_STOP_TIME - CLEAN_STOP_GRACE):
                logger.warning("the lab thread of swarm %r did not end in time", self.name)
            self.view.close(until - time.monotonic())
            self._folder.cleanup()

    def __enter__(self: S) -> S:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def close_all() -> None:
    """Close every swarm of this process."""
    with interrupts_wait():
        for swarm in list(_open.values()):
            swarm.close()


atexit.register(close_all)
