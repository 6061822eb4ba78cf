"""A swarm whose servers keep copies of each other's experts, on a simulated network."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import trio

from labkit.client.expert_client import ExpertClient
from labkit.contact import Contact
from labkit.copies.servers import KEY_PREFIX
from labkit.events import Emit, Event, ignore
from labkit.expert_uid import ExpertInfo, grid_uids, spread
from labkit.node import Node, open_node
from labkit.server.config import ServerConfig
from labkit.server.executor import InlineCompute
from labkit.server.optimizer import BackendConfig
from labkit.server.serving import serve_experts
from labkit.simulation.network import SimNetwork, open_simnet
from labkit.wire.security import Identity

E = TypeVar("E", bound=Event)
X = torch.linspace(-1, 1, 12).reshape(3, 4)


@dataclass(eq=False)
class Server:
    """A server, as a test sees it."""

    contact: Contact
    identity: Identity
    scope: trio.CancelScope
    ending: trio.Event
    ended: trio.Event
    held: Collection[str]  # the experts that it serves now
    copies: Path  # where it keeps copies

    @property
    def is_alive(self) -> bool:
        return not self.ended.is_set()

    def has_copy(self, uid: str) -> bool:
        return any(self.copies.glob(f"{uid}~*.json"))

    async def kill(self) -> None:
        self.scope.cancel()
        await self.ended.wait()

    async def stop(self) -> None:
        self.ending.set()
        await self.ended.wait()


@dataclass(eq=False)
class CopiedSwarm:
    """What a test does with the swarm."""

    network: SimNetwork
    node: Node
    nursery: trio.Nursery
    folder: Path
    servers: list[Server] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    emit: Emit = ignore
    draw: random.Random = field(default_factory=lambda: random.Random(1))

    def __post_init__(self) -> None:
        self.emit = self.events.append

    async def serve(
        self,
        uids: Sequence[str] = (),
        *,
        grid: Sequence[int] = (2, 2),
        identity: Identity | None = None,
        **options: Any,
    ) -> Server:
        """Start a server; a spare one if it gets no experts."""
        identity = identity or Identity(self.draw.randbytes(32))
        usual: dict[str, Any] = {
            "uids": tuple(uids), "grid": tuple(grid), "options": {"hidden": 4}, "backups": 1, "spare": not uids,
            "backend": BackendConfig(optimizer="sgd", lr=0.1), "name": "ffn",
            "copies_dir": str(self.folder / f"{len(self.servers)}"),
        }  # fmt: skip
        config = ServerConfig(**usual | options)
        held: Collection[str] = ()

        def on_held(now: Collection[str]) -> None:
            nonlocal held
            held = now

        scope, ending, ended = trio.CancelScope(), trio.Event(), trio.Event()

        async def run(*, task_status: trio.TaskStatus[Contact]) -> None:
            with scope:
                await serve_experts(
                    self.network, identity, config, join=[self.node.contact], emit=self.emit, stop=ending,
                    executor=InlineCompute(), on_held=on_held, task_status=task_status,
                )  # fmt: skip
            ended.set()

        contact = await self.nursery.start(run)
        server = Server(contact, identity, scope, ending, ended, held, Path(str(config.copies_dir)))
        self.servers.append(server)
        return server

    async def serve_grid(self, servers: int, grid: Sequence[int] = (2, 2), **options: Any) -> list[Server]:
        """Start servers that share a grid."""
        return [await self.serve(uids, grid=grid, **options) for uids in spread(grid_uids("ffn", grid), servers)]

    async def holders(self, grid: Sequence[int] = (2, 2)) -> dict[str, ExpertInfo]:
        """Where the experts of the grid are declared."""
        return await self.node.directory.holders_below("ffn", len(grid))

    async def train(self, uid: str, steps: int = 1, x: torch.Tensor = X) -> int:
        """Let an expert learn, wherever it is. Returns how many updates it has."""
        updates = 0
        for _ in range(steps):
            info = (await self.node.directory.holders([uid]))[uid]
            updates = await self.call(info, "backward", [x, torch.ones_like(x)])
        return updates

    async def call(
        self, info: ExpertInfo, direction: str, tensors: Sequence[torch.Tensor], node: Node | None = None
    ) -> int:
        """Call an expert as a layer does. Returns how many updates it has. Raises `RPCError`."""
        node = node or self.node
        client, done, answers = ExpertClient(node.client, node.directory), trio.Event(), list[Any]()

        def take(outcome: Any) -> None:
            answers.append(outcome)
            done.set()

        if direction == "backward":
            client.backward(info, tensors[:1], tensors[1:], take, timeout=5.0)
        else:
            client.forward(info, tensors, [(4,)], take, timeout=5.0)
        await done.wait()
        if isinstance(answers[0], Exception):
            raise answers[0]
        return int(answers[0].updates)

    def said(self, kind: type[E]) -> list[E]:
        """The events of one kind so far."""
        return [event for event in self.events if isinstance(event, kind)]

    async def until(self, condition: Callable[[], Awaitable[object]], timeout: float = 30.0) -> float:
        """Wait until something holds. Returns the virtual seconds that it took."""
        began = trio.current_time()
        with trio.fail_after(timeout):
            while not await condition():  # noqa: ASYNC110, virtual time
                await trio.sleep(0.1)
        return trio.current_time() - began

    async def serve_with_a_copy_in_reserve(self, uid: str, updates: int) -> list[Server]:
        """Serve a grid at four servers, and let an expert make so many updates, of which the copy in reserve lacks two.

        Returns:
            Those with the expert: its own, its backup, and the one with the copy in reserve.
        """
        await self.serve_grid(4)
        await self.train(uid, updates - 2)
        await self.until_copied(2)
        await trio.sleep(20)
        await self.train(uid, 2)
        await trio.sleep(15)  # enough for the backup
        info = (await self.holders())[uid]
        keys = [info.contact.key[:KEY_PREFIX], *info.copies]
        assert len(keys) == 3
        return [server for key in keys for server in self.servers if server.contact.key[:KEY_PREFIX] == key]

    async def until_copied(self, copies: int = 1, grid: Sequence[int] = (2, 2)) -> float:
        """Wait until all experts are declared with copies."""

        async def copied() -> bool:
            found = await self.holders(grid)
            return len(found) == len(list(grid_uids("ffn", grid))) and all(
                len(info.copies) >= copies for info in found.values()
            )

        return await self.until(copied)


@asynccontextmanager
async def copied_swarm(folder: Path, **network: Any) -> AsyncIterator[CopiedSwarm]:
    """A swarm without servers, and a node that calls them; all of it ends with the block."""
    async with open_simnet(1, **network) as net, trio.open_nursery() as nursery:
        async with open_node(net, Identity(bytes(32))) as node:
            yield CopiedSwarm(net, node, nursery, folder)
        nursery.cancel_scope.cancel()
