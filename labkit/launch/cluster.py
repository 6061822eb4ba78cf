"""A cluster as a notebook sees it: the client of Dask that it was given, and which of its workers servers may run at.

Dask has started the workers, over SSH, SLURM, Kubernetes or on this machine; labkit has no code for that. Here stands
which worker is next, whether the workers have the same labkit, and how Dask is asked from the lab thread. What keeps
one server is in `cluster_runner`. No batch passes here.
"""

from __future__ import annotations

import math
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import trio

from labkit.errors import ServerFailed
from labkit.launch.cluster_worker import TASK, keep_server, take_order

T = TypeVar("T")

ANSWER_TIMEOUT = 20.0  # seconds in which Dask's scheduler and its workers answer
LOST_FOR = 60.0  # seconds for which a worker that was lost is the last choice
MOST_CALLS = 200  # of Dask at the same time, each in a thread
MOST_NAMED = 8  # hosts that an error names
# What a worker is asked first, in words that need no labkit there.
PROBE = "(__import__('labkit').__version__, '%d.%d' % __import__('sys').version_info[:2])"
HOW = "a Client of Dask, as in: from dask.distributed import Client; swarm.serve(…, on=Client(cluster))"

Workers = Mapping[str, Mapping[str, Any]]  # address -> what the scheduler says of the worker


class Room:
    """What the servers that were started from here hold of the workers of one cluster.

    Attributes:
        servers: How many servers each worker has, by address.
        held: What they hold of its resources, by its address and the name of the resource.
    """

    def __init__(self) -> None:
        self.servers: Counter[str] = Counter()
        self.held: Counter[tuple[str, str]] = Counter()

    def fits(self, address: str, resources: Mapping[str, float], offered: Mapping[str, float]) -> bool:
        """Whether a worker that offers these resources has as many left."""
        return all(offered.get(name, 0) - self.held[address, name] >= much for name, much in resources.items())

    def take(self, address: str, resources: Mapping[str, float], times: int = 1) -> None:
        """Note that a server is at this worker."""
        self.servers[address] += times
        for name, much in resources.items():
            self.held[address, name] += times * much  # type: ignore[assignment]  # a counter counts parts, too

    def give_back(self, address: str, resources: Mapping[str, float]) -> None:
        """Note that it is not there any more."""
        self.take(address, resources, -1)


class Mailbox:
    """Delivers what workers say as events of Dask, of which the scheduler keeps the last thousand for each topic.

    Attributes:
        topic: The one topic of a client.
        hearers: Who hears of which run.
    """

    def __init__(self) -> None:
        self.topic = f"labkit-{uuid.uuid4().hex}"
        self.hearers: dict[str, Callable[[dict[str, Any]], object]] = {}

    def deliver(self, event: tuple[float, dict[str, Any]]) -> None:
        """Deliver one message; in a thread of Dask."""
        hear = self.hearers.get(event[1]["run"])
        if hear is not None:
            hear(event[1])


_rooms: dict[str, Room] = {}  # by the address of the scheduler
_mailboxes: WeakKeyDictionary[Any, Mailbox] = WeakKeyDictionary()  # by the client


class Cluster:
    """The workers of a cluster at which servers may run.

    Args:
        client: A client of Dask.
        workers: Which workers, by address, name or host, as for `Client.submit`; by default all.
        resources: What each server takes of a worker's resources, such as `{"GPU": 1}`.
        servers: How many servers are to share these workers.

    Raises:
        ValueError: The client is none, or is no client for a notebook.
    """

    def __init__(
        self, client: Any, workers: str | Sequence[str] | None, resources: Mapping[str, float] | None, servers: int
    ) -> None:
        check_client(client)
        self.client = client
        self.workers = [workers] if isinstance(workers, str) else None if workers is None else list(workers)
        self.resources = dict(resources or {})
        self._servers = servers
        self._lost: dict[str, float] = {}  # address of a worker -> when it was lost
        self._limiter = trio.CapacityLimiter(MOST_CALLS)

    async def ask(self, function: Callable[..., T], *args: Any, **options: Any) -> T:
        """Call a method of the client in a thread of its own.

        Raises:
            ServerFailed: Dask does not answer; the text says why.
        """
        self._check_open()
        try:
            with trio.fail_after(ANSWER_TIMEOUT + 1.0):
                return await trio.to_thread.run_sync(
                    partial(function, *args, **options), limiter=self._limiter, abandon_on_cancel=True
                )
        except (TimeoutError, trio.TooSlowError):
            raise ServerFailed(f"Dask's scheduler at {self.address} gave no answer in {ANSWER_TIMEOUT:g} s") from None
        except (OSError, RuntimeError) as error:  # a connection that is lost, a loop that is closed
            raise ServerFailed(f"Dask's scheduler at {self.address} cannot be asked: {error}") from error

    @property
    def closed(self) -> bool:
        """Whether the client is closed."""
        return self.client.status in ("closed", "closing")

    def _check_open(self) -> None:
        if self.closed:
            raise ServerFailed("its Dask client is closed; serve anew, with a new one: on=Client(cluster)")

    @property
    def address(self) -> str:
        """Where the scheduler is."""
        scheduler = getattr(self.client, "scheduler", None)
        return str(getattr(scheduler, "address", "an unknown address"))

    async def all_workers(self) -> Workers:
        """What the scheduler says of all of its workers."""
        info = await self.ask(self.client.scheduler_info, n_workers=-1)
        workers: Workers = info["workers"]
        return workers

    def wanted(self, workers: Workers) -> Workers:
        """Those of the workers at which servers may run."""
        if self.workers is None:
            return workers
        asked = set(map(str, self.workers))
        return {
            address: info
            for address, info in workers.items()
            if asked & {address, address.rpartition("/")[2], str(info["name"]), info["host"]}
        }

    async def check(self, workers: Workers) -> dict[str, str]:
        """Look whether these workers have the same labkit. Returns their versions of Python.

        Raises:
            ServerFailed: A worker has none, or another one; the text names its host.
        """
        if not workers:
            return {}
        answers = await self.ask(
            self.client.run, eval, PROBE, workers=list(workers), on_error="return", callback_timeout=ANSWER_TIMEOUT
        )
        version = str(sys.modules["labkit"].__version__)
        missing, other, found = list[str](), list[str](), dict[str, str]()
        for address, answer in answers.items():
            host = f"{workers[address]['host']} (worker {address})" if address in workers else address
            if isinstance(answer, ImportError):
                missing.append(f"{host}: {answer}")
            elif isinstance(answer, BaseException):
                continue  # it is being lost
            elif answer[0] != version:
                other.append(f"{host}: {answer[0]}")
            else:
                found[address] = answer[1]
        if missing or other:
            said = [f"labkit is missing on {_listed(missing)}"] * bool(missing)
            said += [f"labkit is another version on {_listed(other)}"] * bool(other)
            raise ServerFailed(
                f"{'; '.join(said)}. Workers need version {version}, as here: install it there (pip install "
                f"labkit=={version}) and restart them, or choose others with workers=[…]"
            )
        return found

    def choose(self, workers: Workers) -> str | None:
        """The one of these workers that has room and the fewest servers; None if none has room."""
        now = time.monotonic()
        there = [address for address in workers if now > self._lost.get(address, -math.inf) + LOST_FOR] or list(workers)
        free = [address for address in there if self.room.fits(address, self.resources, workers[address]["resources"])]
        return min(free, key=lambda address: (self.room.servers[address], address), default=None)

    async def submit(self, run: str, number: int, address: str | None) -> Any:
        """Submit the task that keeps a server. Returns its future.

        Args:
            run: The name of the server's run, under which its messages come to the mailbox.
            number: How many submissions there have been for it.
            address: The worker that was chosen; None to let Dask choose.
        """
        return await self.ask(
            self.client.submit, keep_server, self.mailbox.topic, run, number, key=f"{TASK}{uuid.uuid4().hex}",
            workers=self.workers if address is None else [address], resources=self.resources or None, pure=False,
        )  # fmt: skip

    @property
    def mailbox(self) -> Mailbox:
        """Where the messages of all servers come that this client has started."""
        box = _mailboxes.get(self.client)
        if box is None:
            self._check_open()
            box = _mailboxes[self.client] = Mailbox()
            self.client.subscribe_topic(box.topic, box.deliver)  # which does not wait
        return box

    @property
    def room(self) -> Room:
        """What the servers that were started from here hold of the workers."""
        return _rooms.setdefault(self.address, Room())

    def note_lost(self, address: str) -> None:
        """Remember that this worker is lost, which the scheduler may not know yet."""
        self._lost[address] = time.monotonic()

    def threads(self, nthreads: int, workers: Workers) -> int:
        """Torch's threads for a server at a worker with `nthreads`, which its servers share."""
        return max(1, nthreads // math.ceil(self._servers / max(1, len(workers))))

    async def order(self, address: str, attempt: str, order: str, text: str = "") -> None:
        """Give a server's keeper at a worker an order. A worker that is gone takes none: see `take_order`."""
        await self.ask(
            self.client.run, take_order, attempt, order, text, workers=[address], on_error="ignore",
            callback_timeout=ANSWER_TIMEOUT,
        )  # fmt: skip

    def why_none(self, workers: Workers) -> str:
        """Why no worker has begun a server, and what to try."""
        where = f"the cluster at {self.address}"
        if not workers:
            return f"{where} has no worker yet; wait until it has: client.wait_for_workers(1)"
        wanted = self.wanted(workers)
        if not wanted:
            names = _listed(f"{info['name']} at {address}" for address, info in workers.items())
            return f"{where} has no worker {_listed(map(str, self.workers or ()))}; it has {names}"
        if self.resources:
            offers = _listed(f"{info['host']} {info['resources'] or 'nothing'}" for info in wanted.values())
            return (
                f"no worker of {where} has {self.resources} free; of resources they offer: {offers} (dask worker "
                "--resources 'GPU=1' offers one); what other servers hold is free when these are stopped"
            )
        return (
            f"none of the {len(wanted)} workers of {where} has begun it: all threads are busy with other tasks, or the "
            "worker is paused for its memory; see Dask's own dashboard: client.dashboard_link"
        )


def cluster_of(
    client: Any, workers: str | Sequence[str] | None, resources: Mapping[str, float] | None, servers: int
) -> Cluster | None:
    """The cluster that a user means, if any: the arguments of `Cluster`, as `Swarm.serve` gets them."""
    if client is not None:
        return Cluster(client, workers, resources, servers)
    if workers is not None or resources is not None:
        raise ValueError("workers=… and resources=… choose workers of a cluster: give on=Client(cluster), too")
    return None


def this_python() -> str:
    """This process's version of Python, as `PROBE` tells that of a worker."""
    return f"{sys.version_info[0]}.{sys.version_info[1]}"


def check_client(client: Any) -> None:
    """Raise `ValueError` if this is no client that a notebook can wait for."""
    distributed = sys.modules.get("distributed")
    if distributed is None or not isinstance(client, distributed.Client):
        raise ValueError(f"on={client!r}: {HOW} (which `pip install 'labkit[cluster]'` brings)")
    if client.asynchronous:
        raise ValueError(f"on={client!r}: a client that is asynchronous cannot be waited for in a cell; give {HOW}")


def _listed(names: Iterable[str]) -> str:
    texts = list(names)
    more = f" and {len(texts) - MOST_NAMED} more" if len(texts) > MOST_NAMED else ""
    return ", ".join(texts[:MOST_NAMED]) + more
