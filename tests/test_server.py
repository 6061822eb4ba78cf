"""An expert server over the real wire: what it answers, and how it begins and ends."""

from __future__ import annotations

import gc
import threading
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import trio
from torch import Tensor, nn

from labkit.contact import Contact
from labkit.dht.lookup import Lookup
from labkit.dht.storage import Entry
from labkit.directory.grids import GRIDS_KEY, GridInfo, find_grids, keep_grid_declared
from labkit.errors import (
    BadRequest,
    CheckpointError,
    LabkitError,
    NonFiniteTensor,
    Overloaded,
    UnknownExpert,
    UnknownMethod,
)
from labkit.expert_protocol import BACKWARD, FORWARD, SCHEMA, ExpertRequest, ExpertSchema, TensorSchema
from labkit.faults import Faults
from labkit.histogram import BUCKETS
from labkit.node import Node, open_node
from labkit.portal import unwrap
from labkit.server import checkpoints
from labkit.server.backend import ExpertBackend
from labkit.server.checkpoints import checkpoint_directory, load_expert, save_expert
from labkit.server.config import ServerConfig
from labkit.server.leaving import stop_timeout
from labkit.server.optimizer import BackendConfig
from labkit.server.runtime import Runtime
from labkit.server.serving import serve_experts
from labkit.server.statistics import ServerStatistics
from labkit.server.task_pool import Task
from labkit.wire.rpc_types import BULK
from labkit.wire.security import Identity
from labkit.wire.zmq_transport import open_network
from tests.swarms import soon

SGD = BackendConfig(optimizer="sgd", lr=0.1)
UIDS = ("ffn.0.0", "ffn.0.1")
X = torch.linspace(-1, 1, 12).reshape(3, 4)
FOUR = ExpertSchema((TensorSchema("float32", (4,)),), (TensorSchema("float32", (4,)),))


def config(**changes: Any) -> ServerConfig:
    usual: dict[str, Any] = {"uids": UIDS, "grid": (1, 2), "options": {"hidden": 4}, "backend": SGD}
    return ServerConfig(**usual | changes)


class Lab:
    """A node that calls a server."""

    def __init__(self, node: Node, server: Contact, crash: trio.CancelScope, ended: trio.Event) -> None:
        self.node, self.server, self.crash, self.ended = node, server, crash, ended

    async def call(self, direction: str, tensors: Sequence[Tensor], uid: str = UIDS[0], timeout: float = 5.0) -> Tensor:
        reply = await self.node.client.call(
            self.server, f"expert.{direction}", [uid], tensors, timeout=timeout, lane=BULK
        )
        return reply.tensors[0]

    async def statistics(self) -> ServerStatistics:
        reply = await self.node.client.call(self.server, "server.statistics", returns=ServerStatistics, timeout=5.0)
        assert isinstance(reply.body, ServerStatistics)
        return reply.body


@asynccontextmanager
async def lab(server: ServerConfig, faults: Faults | None = None, stop: trio.Event | None = None) -> AsyncIterator[Lab]:
    """A server and a node that it has joined; the server stops cleanly at the end, unless it has crashed."""
    stop, crash, ended = trio.Event() if stop is None else stop, trio.CancelScope(), trio.Event()
    async with (
        open_network() as network,
        open_node(network, Identity.generate()) as node,
        trio.open_nursery() as nursery,
    ):

        async def serve(task_status: trio.TaskStatus[Contact]) -> None:
            with crash:
                await serve_experts(
                    network, Identity.generate(), server, join=[node.contact], faults=faults, stop=stop,
                    task_status=task_status,
                )  # fmt: skip
            ended.set()

        yield Lab(node, await nursery.start(serve), crash, ended)
        stop.set()


# ---------------------------------------------------------------- what it answers


async def test_a_server_can_be_found_as_soon_as_it_has_started():
    async with lab(config()) as here:
        found = await here.node.directory.find(UIDS)
        assert [info and info.contact for info in found.values()] == [here.server] * 2
        assert await find_grids(here.node.dht, 5.0) == {"ffn": GridInfo((1, 2), "ffn", {"hidden": 4}, FOUR)}


async def test_forward_answers_outputs_and_backward_answers_gradients_and_takes_a_step():
    async with lab(config()) as here:
        before = await here.call("forward", [X])
        assert before.shape == X.shape
        gradient = await here.call("backward", [X, torch.ones_like(X)])
        assert gradient.shape == X.shape
        assert not (await here.call("forward", [X])).equal(before)
        statistics = await here.statistics()
        assert statistics.experts == {UIDS[0]: 1, UIDS[1]: 0}
        assert (statistics.batches, statistics.rows) == (3, 9)


async def test_what_was_answered_is_let_go_of_without_the_garbage_collector():
    async with lab(config()) as here:
        await here.call("forward", [X])
        gc.collect()
        gc.disable()
        try:
            for _ in range(10):
                await here.call("backward", [X, torch.ones_like(X)])
                with suppress(UnknownMethod):
                    await here.node.client.call(here.server, "nothing", timeout=5.0)
                await here.node.dht.get("nothing")
            left = Counter(type(one) for one in gc.get_objects() if type(one) in (Task, Lookup, UnknownMethod))
        finally:
            gc.enable()
        assert max(left.values(), default=0) <= 1  # that of the last call, at most


async def test_what_an_expert_takes_can_be_asked_before_its_first_call():
    async with lab(config()) as here:

        async def ask(uid: str) -> object:
            reply = await here.node.client.call(
                here.server, SCHEMA, ExpertRequest(uid), returns=ExpertSchema | None, timeout=5.0
            )
            return reply.body

        assert await ask(UIDS[0]) == await ask(UIDS[1]) == FOUR
        with pytest.raises(UnknownExpert):
            await ask("ffn.7.7")
    async with lab(config(kind="torch.nn:Identity")) as here:
        assert await ask(UIDS[0]) is None
        await here.call("forward", [X])
        assert await ask(UIDS[0]) == FOUR  # a call has shown it
        assert await ask(UIDS[1]) is None


async def test_a_server_that_does_not_know_what_its_experts_take_declares_what_another_one_knows():
    async with lab(config(kind="nop")) as here, trio.open_nursery() as nursery:
        unknown = (await find_grids(here.node.dht, 5.0))["ffn"]
        known = msgspec.structs.replace(unknown, schema=FOUR)
        assert unknown.schema is None
        for declared, expected in (
            (known, known),
            (unknown, known),  # the same experts
            (msgspec.structs.replace(unknown, kind="ffn"), msgspec.structs.replace(unknown, kind="ffn")),
        ):
            await nursery.start(keep_grid_declared, here.node.dht, "ffn", declared, 30.0)
            assert (await find_grids(here.node.dht, 5.0))["ffn"] == expected
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "schema",
    [
        [[["<b>", [4]]], []],
        [[["float32", [4], "a b"]], []],
        [[["float32", [-2]]], []],
        [[["float32", [4]]] * 17, []],
        [[["float32", [4] * 8]], []],
    ],
)
async def test_a_grid_with_words_that_no_schema_has_is_ignored(schema):
    async with lab(config()) as here:
        for name, shown in (("good", [[["float32", [4]]], []]), ("bad", schema)):
            record = msgspec.msgpack.encode([[1, 2], "ffn", {}, shown])
            await here.node.dht.store_many([Entry(GRIDS_KEY, record, 30.0, name)])
        assert set(await find_grids(here.node.dht, 5.0)) == {"ffn", "good"}


async def test_a_caller_asks_for_input_gradients_only_and_for_several_outputs_by_keyword():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, x: Tensor, *, scale: Tensor) -> tuple[Tensor, Tensor]:
            return self.linear(x) * scale, x.sum(1)

    async with lab(config(kind=Two, options={})) as here:

        async def call(method: str, body: ExpertRequest, *tensors: Tensor) -> list[list[int]]:
            reply = await here.node.client.call(here.server, method, body, tensors, timeout=5.0, lane=BULK)
            return [list(tensor.shape) for tensor in reply.tensors]

        scale, grads = torch.ones(3, 1), (torch.ones(3, 2), torch.ones(3))
        assert await call(FORWARD, ExpertRequest(UIDS[0], keywords=("scale",)), X, scale) == [[3, 2], [3]]
        for train, updates in ((False, 0), (True, 1)):
            body = ExpertRequest(UIDS[0], outputs=2, keywords=("scale",), train=train)
            assert await call(BACKWARD, body, X, scale, *grads) == [[3, 4], [3, 1]]
            assert (await here.statistics()).experts[UIDS[0]] == updates


async def test_statistics_tell_what_each_expert_did_and_how_long_requests_took():
    async with lab(config()) as here:
        for _ in range(3):
            await here.call("forward", [X])
        await here.call("backward", [X, torch.ones_like(X)], UIDS[1])
        with pytest.raises(NonFiniteTensor):
            await here.call("forward", [X / 0])
        statistics = await here.statistics()
        assert list(statistics.experts) == list(UIDS)
        assert (statistics.expert_requests, statistics.expert_rows) == ([3, 1], [9, 3])
        assert all(0 < seconds < 60 for seconds in statistics.expert_seconds)
        for times in (statistics.total_times, statistics.queue_times, statistics.compute_times):
            assert (len(times), sum(times)) == (BUCKETS, 4)
        assert 0 < statistics.processor_seconds < 60 and 0 < statistics.uptime < 60


async def test_what_an_expert_cannot_take_is_refused_and_changes_nothing():
    async with lab(config()) as here:
        before = await here.call("forward", [X])
        for direction, tensors, failure in [
            ("forward", [X / 0], NonFiniteTensor),
            ("backward", [X, X / 0], NonFiniteTensor),
            ("forward", [], BadRequest),
            ("backward", [X], BadRequest),
        ]:
            with pytest.raises(failure):
                await here.call(direction, tensors)
        with pytest.raises(LabkitError, match=r"float32 \[rows, 4\]"):  # it says what it takes
            await here.call("forward", [X[:, :3]])
        with pytest.raises(UnknownExpert, match=r"does not hold expert 'ffn.7.7'; look it up again"):
            await here.call("forward", [X], uid="ffn.7.7")
        with pytest.raises(BadRequest):
            await here.node.client.call(here.server, "expert.forward", {"no": "uid"}, [X], timeout=5.0)
        assert (await here.call("forward", [X])).equal(before)
        assert (await here.statistics()).experts[UIDS[0]] == 0


async def test_a_full_server_says_so_at_once():
    begun, go_on = threading.Event(), threading.Event()

    class Slow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            begun.set()
            go_on.wait(20)
            return x

    async with lab(config(kind=Slow, options={}, max_queue_rows=4)) as here, trio.open_nursery() as nursery:

        async def one_waits() -> bool:
            return (await here.statistics()).queued_rows == 3

        nursery.start_soon(here.call, "forward", [X], UIDS[0], 20.0)
        await trio.to_thread.run_sync(begun.wait, 20)
        nursery.start_soon(here.call, "forward", [X], UIDS[0], 20.0)
        await soon(one_waits)
        with trio.fail_after(2), pytest.raises(Overloaded, match="3 rows wait here already, of at most 4"):
            await here.call("forward", [X])
        go_on.set()


async def test_injected_faults_hold_for_experts_and_not_for_statistics():
    faults = Faults(loss=1.0)
    async with lab(config(), faults=faults) as here:
        with pytest.raises(LabkitError, match="gave no answer"):
            await here.call("forward", [X], timeout=0.1)
        assert (await here.statistics()).loss == 1.0
        faults.set(loss=0.0)
        assert (await here.call("forward", [X])).shape == X.shape


# ---------------------------------------------------------------- how it begins and ends


async def test_a_clean_stop_saves_every_expert_and_the_next_server_carries_on(tmp_path):
    there = config(checkpoint_dir=str(tmp_path))
    async with lab(there) as here:
        await here.call("backward", [X, torch.ones_like(X)])
        before = [await here.call("forward", [X], uid=uid) for uid in UIDS]
    async with lab(there) as here:
        for uid, output in zip(UIDS, before, strict=True):
            assert (await here.call("forward", [X], uid=uid)).equal(output)
        assert (await here.statistics()).experts == {UIDS[0]: 1, UIDS[1]: 0}


class Slow(nn.Module):
    """Computes until it is told to end."""

    begun, go = threading.Event(), threading.Event()

    def forward(self, x: Tensor) -> Tensor:
        self.begun.set()
        assert self.go.wait(20)
        return x


async def test_a_clean_stop_waits_for_the_batch_that_is_being_computed(tmp_path, monkeypatch):
    settle = Runtime.settle

    async def let_it_end(runtime: Runtime) -> None:
        Slow.go.set()
        await settle(runtime)

    monkeypatch.setattr(Runtime, "settle", let_it_end)
    async with trio.open_nursery() as nursery:
        async with lab(config(checkpoint_dir=str(tmp_path), kind=Slow, options={})) as here:

            async def ask() -> None:
                with pytest.raises(LabkitError):  # the server is gone before it answers
                    await here.call("forward", [X])

            nursery.start_soon(ask)
            assert await trio.to_thread.run_sync(Slow.begun.wait, 5.0)
    assert {path.name for path in tmp_path.iterdir()} == {f"{uid}.safetensors" for uid in UIDS}


@pytest.mark.parametrize(("experts", "megabytes", "seconds"), [(2, 10, 30.0), (1, 1000, 50.0), (60, 100, 150.0)])
def test_a_clean_stop_may_take_longer_where_more_is_to_be_saved(monkeypatch, experts, megabytes, seconds):
    monkeypatch.setattr(ExpertBackend, "state_bytes", megabytes * 1_000_000)
    backends = [ExpertBackend(f"nop.{i}", nn.Identity()) for i in range(experts)]
    assert stop_timeout(backends) == seconds


async def test_experts_are_saved_every_so_many_seconds_if_they_have_changed(tmp_path):
    async def saved() -> bool:
        return load_expert(tmp_path, UIDS[0]) is not None

    async with lab(config(checkpoint_dir=str(tmp_path), checkpoint_period=0.05)) as here:
        await here.call("backward", [X, torch.ones_like(X)])
        await soon(saved)
        assert load_expert(tmp_path, UIDS[1]) is None


async def test_a_clean_stop_saves_only_what_is_not_saved_already(tmp_path, monkeypatch):
    saves: list[str] = []

    def save(directory: Path, uid: str, *rest: Any, **options: Any) -> Path:
        saves.append(uid)
        return save_expert(directory, uid, *rest, **options)

    async def saved() -> bool:
        return load_expert(tmp_path, UIDS[0]) is not None

    monkeypatch.setattr(checkpoints, "save_expert", save)
    async with lab(config(checkpoint_dir=str(tmp_path), checkpoint_period=0.05)) as here:
        await here.call("backward", [X, torch.ones_like(X)])
        await soon(saved)
    assert saves == list(UIDS)


async def test_a_seed_leaves_the_callers_own_random_numbers_alone(monkeypatch):
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    expected = torch.Generator().set_state(torch.get_rng_state())
    async with lab(config(seed=1)):
        pass
    assert torch.rand(3).equal(torch.rand(3, generator=expected))
    assert seeded == []  # or a GPU would draw the numbers of an expert from here on


async def test_a_crash_saves_nothing(tmp_path):
    async with lab(config(checkpoint_dir=str(tmp_path))) as here:
        await here.call("backward", [X, torch.ones_like(X)])
        here.crash.cancel()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["cut short", "another kind", "another width"])
async def test_a_checkpoint_that_does_not_fit_stops_the_start_and_names_the_file(tmp_path, damage):
    async with lab(config(checkpoint_dir=str(tmp_path))):
        pass
    path = tmp_path / f"{UIDS[0]}.safetensors"
    if damage == "cut short":
        path.write_bytes(path.read_bytes()[:-1])
    changed: dict[str, dict[str, Any]] = {
        "another kind": {"kind": "transformer", "options": {"hidden": 8}},
        "another width": {"options": {"hidden": 8}},
    }
    with pytest.raises(BaseException) as caught:
        async with lab(config(checkpoint_dir=str(tmp_path), **changed.get(damage, {}))):
            pass
    error = unwrap(caught.value)
    assert isinstance(error, CheckpointError)
    assert str(path) in str(error)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"uids": ()}, "at least one"),
        ({"uids": ("ffn.0.0", "ffn.0.0")}, "each once"),
        ({"uids": ("ffn",)}, "not an expert uid"),
        ({"uids": ("ffn.0.2",)}, "not in a grid of 1 x 2"),
        ({"checkpoint_period": float("nan")}, "checkpoint_period=nan"),
        ({"threads": 0}, "threads=0"),
    ],
)
def test_a_server_that_cannot_be_is_refused_before_it_starts(wrong, text):
    with pytest.raises(ValueError, match=text):
        config(**wrong)


def test_a_directory_for_checkpoints_is_made_or_refused(tmp_path: Path):
    assert checkpoint_directory(None) is None
    assert checkpoint_directory(tmp_path / "new" / "one") == str(tmp_path / "new" / "one")
    assert (tmp_path / "new" / "one").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(LabkitError, match=r"no checkpoints can be kept in .*file: File exists"):
        checkpoint_directory(tmp_path / "file")
