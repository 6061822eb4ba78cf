"""A server at a worker of a cluster, as the notebook sees it: a runner whose child is kept by a task of Dask.

The task is in `cluster_worker`. It says what happens there as events of Dask, under a topic of its own, and takes
orders by `Client.run`. What can fail on the way is told apart here, in words: no worker, another labkit, a worker that
does not reach the notebook or is not reached by it, a worker that is lost. Batches do not come this way.
"""

from __future__ import annotations

import logging
import math
import uuid
from collections import deque
from contextlib import suppress
from dataclasses import replace
from typing import Any

import msgspec
import trio

from labkit.contact import Contact
from labkit.errors import LabkitError, ServerFailed
from labkit.expert_protocol import clean_label
from labkit.faults import Faults
from labkit.joining import describe_unreachable
from labkit.launch.cluster import Cluster
from labkit.launch.placement import Placement
from labkit.launch.runners import ServerPlan
from labkit.launch.server_process import COMMAND_QUEUE, ChildRunner, child_config
from labkit.node import Node

logger = logging.getLogger(__name__)

RENEW_INTERVAL = 15.0  # seconds between two signs of life of the notebook; see `cluster_worker.LEASE`
LOOK_INTERVAL = 0.5  # seconds between two looks at whether the worker is still there
QUIET = 4.0  # seconds without a sign of life after which the scheduler is asked whether it still has the worker
SILENCE = 30.0  # and after which the worker is lost, whatever the scheduler says
RELAY_TIMEOUT = 5.0  # seconds that a server that is not reached has to find a relay
KILL_TIMEOUT = 3.0  # seconds to hear of the end of a server that was killed
HAND_OVER = (
    "a module of your own has to be where the workers run: client.upload_file(…) brings it there, and "
    "cloudpickle.register_pickle_by_value(module) hands what it defines over as code"
)
ANOTHER = "restart() brings the server back on another worker"
SIGNALLED = {-9: "SIGKILL, as by a host that is out of memory, or by hand"}


class ServerOnWorker(ChildRunner):
    """A server as a child process of a worker of a cluster.

    Args:
        cluster: Where it may run.
        node: The swarm's own node, which has to reach it.
        log: Where the lines go that the server writes.
    """

    def __init__(self, cluster: Cluster, node: Node, log: deque[str]) -> None:
        super().__init__(log)
        self.host = self.worker = ""
        self.pid: int | None = None
        self._cluster = cluster
        self._node = node
        self._scope = trio.CancelScope()
        self._over = trio.Event()  # the child has ended, or is lost
        self._task: Placement | None = None  # the task that keeps it
        self._contact: Contact | None = None  # where it says that it is reached
        self._moved = trio.lowlevel.ParkingLot()  # where a change of that is waited for
        self._code: int | None = None  # with which the child ended
        self._lost = self._note = ""  # why it is lost, if it is
        self._reason = ""  # why its worker has ended it, if that has
        self._killed = False
        self._heard = -math.inf

    async def run(self, plan: ServerPlan, faults: Faults, *, task_status: trio.TaskStatus[Contact]) -> None:
        """Start it at a worker and wait for its end. Raises `ServerFailed` if it does not come to serve."""
        try:
            with self._scope:
                await self._run(plan, faults, task_status)
        finally:
            self._end()

    async def _run(self, plan: ServerPlan, faults: Faults, task_status: trio.TaskStatus[Contact]) -> None:
        run, mailbox = uuid.uuid4().hex, self._cluster.mailbox
        task = self._task = Placement(self._cluster, run)
        token = trio.lowlevel.current_trio_token()

        def hear(message: dict[str, Any]) -> None:  # in a thread of Dask
            with suppress(trio.RunFinishedError):
                token.run_sync_soon(self._hear, message)

        mailbox.hearers[run] = hear
        try:
            async with trio.open_nursery() as nursery:
                await task.find(plan)
                self.host, self.worker, self._heard = task.host, task.worker, trio.current_time()
                nursery.start_soon(self._watch, task)
                await self._begin(plan, faults, task)
                self._commands, commands = trio.open_memory_channel[bytes](COMMAND_QUEUE)
                nursery.start_soon(self._carry_orders, commands)
                if plan.member_file is not None:
                    nursery.start_soon(self._carry_members, plan)
                await self._until(self._reported)
                task_status.started(await self._check_first(plan))
                await self._over.wait()
                nursery.cancel_scope.cancel()
            self._note = await self._memory_note()
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(KILL_TIMEOUT):
                await self._leave()
                await task.close()
            del mailbox.hearers[run]

    # ---------------------------------------------------------------- what the worker says

    def _hear(self, message: dict[str, Any]) -> None:
        """Take a message of a task that keeps this server."""
        assert self._task is not None
        if not self._task.hear(message):
            if self._task.is_begun_anew(message):
                self._lose()
            return
        what = message["what"]
        self._heard = trio.current_time()
        if what == "report":
            self._take_report(message["text"].encode())
        elif what == "output":
            for line in message["lines"]:
                self._take_output(line)
                logger.info("server on %s: %s", self.host, line)
        elif what == "started":
            self.pid = message["pid"]
        elif what == "failed":
            self._lose(f"it could not be started on {self.host}: {message['text']}")
        elif what == "ended":
            self._code, self._reason = message["code"], message["why"]
            self._over.set()

    def _lose(self, why: str = "") -> None:
        if not self._over.is_set():
            self._lost = why or f"its worker on {self.host} ({self.worker}) was lost; {ANOTHER}"
            self._cluster.note_lost(self.worker)
            self._over.set()

    async def _until(self, event: trio.Event) -> None:
        """Wait for an event, or for the end. Raises `ServerFailed` if that comes first."""
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                await self._over.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(watch)
            await event.wait()
            nursery.cancel_scope.cancel()
        if not event.is_set():
            self._note = await self._memory_note()
            raise ServerFailed(self._describe_end())

    # ---------------------------------------------------------------- its start

    async def _begin(self, plan: ServerPlan, faults: Faults, task: Placement) -> None:
        """Let the worker start the child."""
        server = plan.server
        if not server.label:
            server = replace(server, label=clean_label(self.host))
        if server.threads is None:
            workers = self._cluster.wanted(await self._cluster.all_workers())
            server = replace(server, threads=self._cluster.threads(task.nthreads, workers))
        if plan.member_file is not None:
            await self._order("members", _members(plan))
        config = child_config(replace(plan, server=server), faults, {})
        await self._order("serve", msgspec.json.encode(config).decode())

    async def _check_first(self, plan: ServerPlan) -> Contact:
        """Where it serves, if it does and can be reached from here."""
        report = self._first
        if report is None or report.ready is None:
            failed = (report.failed if report is not None else None) or self._describe_end()
            if report is None or report.error != "JoinError":
                raise ServerFailed(f"{failed}; {HAND_OVER}" if "cannot be imported" in failed else failed)
            raise ServerFailed(no_way_there(self.host, plan.join[0], failed))
        self.stop_timeout = report.stop_timeout
        own_key, contact, unreachable = self._node.identity.public_key, report.ready, ""
        while True:
            unreachable = await describe_unreachable(self._node.client, contact, own_key)
            if not unreachable:
                return contact
            with trio.move_on_after(RELAY_TIMEOUT):  # it may find a relay, and is called there then
                while self._contact == contact:
                    await self._moved.park()
            if self._contact is None or self._contact == contact:
                break
            contact = self._contact
        raise ServerFailed(
            f"this notebook cannot reach the server on {self.host} at {contact.endpoint}: {unreachable}. The way back "
            "works. Let the ports of servers through the firewall of that host (a range is enough: "
            'lk.Swarm(listen="tcp://0.0.0.0:31000-31099")), or let this swarm relay: lk.Swarm(listen=…, relay=True)'
        )

    def _note_contact(self, contact: Contact | None, direct: tuple[str, int] | None) -> None:
        self._contact = contact
        self._moved.unpark_all()

    # ---------------------------------------------------------------- while it serves

    async def _carry_orders(self, commands: trio.MemoryReceiveChannel[bytes]) -> None:
        """Carry commands to the child; where there are none, say now and then that the notebook is there."""
        while True:
            line: bytes | None = None
            with trio.move_on_after(RENEW_INTERVAL):
                line = await commands.receive()
            try:
                await self._order("renew" if line is None else "line", "" if line is None else line.decode())
            except ServerFailed as error:
                logger.debug("an order did not arrive: %s", error)  # `_watch` finds out what is wrong

    async def _carry_members(self, plan: ServerPlan) -> None:
        """Tell the worker which keys a private swarm admits, whenever they change."""
        known = _members(plan)
        while True:
            await trio.sleep(LOOK_INTERVAL)
            if (members := _members(plan)) != known:
                known = members
                with suppress(ServerFailed):
                    await self._order("members", members)

    async def _watch(self, task: Placement) -> None:
        """Notice that the worker is lost, also if it cannot say so."""
        while True:
            await trio.sleep(LOOK_INTERVAL)
            quiet = trio.current_time() - self._heard
            if self._cluster.closed:
                self._lose("its client of Dask was closed, and it has ended with that; serve anew: on=Client(cluster)")
            elif task.status in ("error", "cancelled", "lost") and quiet > LOOK_INTERVAL:
                self._lose(f"its task on {self.host} has ended: {await task.why_failed()}")
            elif quiet > SILENCE:
                self._lose(f"its worker on {self.host} ({self.worker}) has said nothing for {SILENCE:g} s; {ANOTHER}")
            elif quiet > QUIET:
                try:
                    workers = await self._cluster.all_workers()
                except ServerFailed as error:
                    self._lose(str(error))
                    return
                if self.worker not in workers:
                    self._lose()

    async def _order(self, order: str, text: str = "") -> None:
        if self._task is not None:
            await self._cluster.order(self._task.worker, self._task.attempt, order, text)

    # ---------------------------------------------------------------- its end

    async def _leave(self) -> None:
        """Let the worker kill the child, if that still runs, and hear of its end."""
        if self.worker and not self._over.is_set():
            with suppress(LabkitError):
                await self._order("kill")
                await self._over.wait()

    async def wait(self) -> str:
        await self._ended.wait()
        return self._reason if self._code == 0 and not self._lost else self._describe_end()

    def _describe_end(self) -> str:
        if self._lost:
            return self._lost + self._note
        if self._code in SIGNALLED and not self._killed:
            return f"its process on {self.host} was ended by {SIGNALLED[self._code]}{self._said()}"
        if self._reason:
            return self._reason
        return f"its process on {self.host} ended with code {self._code}{self._said()}"

    async def _memory_note(self) -> str:
        """What is to be said of a worker that was lost; Dask may have killed it for its memory."""
        if not self._lost:
            return ""
        with suppress(LabkitError, TypeError, KeyError):
            for _, event in await self._cluster.ask(self._cluster.client.get_events, "worker-restart-memory"):
                if event["worker"] == self.worker:
                    return (
                        f". Dask killed it, since it took {event['rss'] / 2**30:.1f} GiB, nearly all of its memory "
                        "limit. Only tasks beside the server count for that; run fewer there, or raise memory_limit"
                    )
        return ""

    def kill(self) -> None:
        self._killed = True
        self._scope.cancel()  # which `_run` answers with an order to kill


def _members(plan: ServerPlan) -> str:
    assert plan.member_file is not None
    try:
        return plan.member_file.read_text(encoding="utf-8")
    except OSError:
        return ""


def no_way_there(host: str, notebook: Contact, failed: str) -> str:
    """What to say when a worker does not reach the notebook."""
    why = failed.removeprefix(f"cannot join the swarm at {notebook.endpoint}: ")
    hint = (
        'This swarm listens on this machine only: begin it with lk.Swarm(listen="tcp://0.0.0.0:*")'
        if notebook.is_loopback
        else f"Let port {notebook.port} through the firewall of this machine; if the workers know it by another "
        'address, give that: lk.Swarm(listen="tcp://0.0.0.0:*", announce="HOST")'
    )
    return f"the worker on {host} cannot reach this notebook at {notebook.endpoint}: {why}. {hint}"
