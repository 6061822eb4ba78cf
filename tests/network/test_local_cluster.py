"""Servers on a cluster: a real one of Dask, with two worker processes under nannies on this machine.

Workers in network namespaces, which reach each other or not, are in `test_cluster`.
"""

from __future__ import annotations

import io
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from distributed import Client, LocalCluster
from torch import nn

import labkit as lk
from labkit.contact import Contact
from labkit.errors import ServerFailed
from labkit.events import Event, ExpertHandedOver
from labkit.launch import cluster_runner, order, placement, planning
from labkit.launch.by_value import HandedKind
from labkit.launch.cluster_runner import no_way_there
from labkit.launch.handle import ServerHandle
from labkit.launch.placement import Placement
from labkit.swarm import Swarm
from labkit.view.starting import show_start
from labkit.wire.security import Identity, key_text
from tests.swarms import eventually

HOST = os.uname().nodename
SGD = lk.BackendConfig(optimizer="sgd", lr=0.1)
# What workers are told here, as text, so that they need not load this module and torch.
KEEPER = "from labkit.launch import cluster_worker as k; "
KEEPERS = "len(__import__('sys').modules['labkit.launch.cluster_worker']._keepers)"
SLEEP = "__import__('time').sleep"
TAKE_MEMORY = f"[{SLEEP}(0.02) or bytes([1]) * (1 << 26) for _ in range(32)] and {SLEEP}(9)"

X = torch.linspace(-1, 1, 12).reshape(3, 4)


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    """Two workers, named 0 and 1, each of which offers one GPU that is none."""
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=2, dashboard_address=":0", resources={"GPU": 1}, memory_limit="1GiB",
            silence_logs=False,
        ) as cluster,
        Client(cluster) as client,
    ):  # fmt: skip
        yield client


@pytest.fixture(scope="module")
def swarm() -> Iterator[Swarm]:
    with Swarm("on a cluster") as swarm:
        yield swarm


@pytest.fixture(scope="module")
def servers(client: Client, swarm: Swarm) -> list[ServerHandle]:
    """Two servers, each of which has a GPU."""
    return swarm.serve("ffn", hidden=4, grid=(2, 2), servers=2, on=client, resources={"GPU": 1}, backend=SGD)


def children(pid: int) -> set[psutil.Process]:
    return set(psutil.Process(pid).children())


# ---------------------------------------------------------------- where servers run, and what they do


def test_servers_run_at_the_workers_and_are_called_by_the_name_of_their_host(client, swarm, servers):
    pids = client.run(os.getpid)
    assert {server.worker for server in servers} == set(pids)
    for server in servers:
        assert psutil.Process(server.pid).ppid() == pids[server.worker]
        assert (server.isolation, server.host, server.label) == ("cluster", HOST, HOST)
    assert swarm.expert("ffn.0.0")(X).shape == X.shape
    assert {statistics.label for statistics in swarm.statistics().values()} == {HOST}
    assert f"servers[0] {HOST}" in repr(swarm)


def test_resources_are_held_and_without_them_it_says_what_there_is(client, swarm, servers, monkeypatch):
    monkeypatch.setattr(placement, "WORKER_TIMEOUT", 0.5)
    with pytest.raises(ServerFailed, match=r"no worker of .* has {'GPU': 1} free; .* offer: .*'GPU': 1"):
        swarm.serve("nop", grid=(1,), on=client, resources={"GPU": 1})
    with pytest.raises(ServerFailed, match=r"within 0.5 s: .* has no worker 10.1.1.1; it has . at tcp://"):
        swarm.serve("nop", grid=(1,), on=client, workers="10.1.1.1")


def test_a_server_on_a_cluster_takes_the_orders_that_any_server_takes(client, swarm, servers):
    server, other = servers
    uid = server.uids[0]
    expert = swarm.expert(uid)
    expert(X).sum().backward()
    after = expert(X).detach()
    server.faults(loss=0.5)
    eventually(lambda: server.statistics().loss == 0.5)
    server.faults(loss=0.0)
    pid = server.pid
    assert pid is not None
    server.stop()
    assert (server.state, server.host) == ("stopped", HOST) and not psutil.pid_exists(pid)
    server.restart()  # which takes the GPU again; the other one has its experts, and gives it two
    eventually(lambda: len(server.uids) == len(other.uids) == 2)
    assert {**server.statistics().experts, **other.statistics().experts}[uid] == 1
    torch.testing.assert_close(swarm.expert(uid)(X).detach(), after, rtol=0, atol=0)
    assert other.pid is not None
    os.kill(other.pid, signal.SIGKILL)
    assert f"its process on {HOST} was ended by SIGKILL, as by a host that is out of memory" in other.wait(20)


def test_a_worker_that_hears_nothing_of_the_notebook_stops_its_server(client, servers, monkeypatch):
    monkeypatch.setattr(cluster_runner, "RENEW_INTERVAL", 600.0)
    client.run(exec, KEEPER + "k.LEASE = 1.0")
    try:
        assert servers[0].wait(30) == "its worker heard nothing of the notebook for 1 s, and stopped it"
    finally:
        client.run(exec, KEEPER + "k.LEASE = 60.0")


def test_a_class_of_a_function_runs_at_the_worker_that_is_named_and_what_it_prints_comes_here(client, swarm):
    class Speaking(nn.Module):
        def __init__(self, activation: nn.Module) -> None:
            super().__init__()
            self.activation = activation

        def forward(self, x):
            print("spoken by an expert", flush=True)
            return self.activation(x)

    (server,) = swarm.serve(Speaking, grid=(1,), on=client, workers="1", activation=nn.Tanh())
    torch.testing.assert_close(swarm.expert("speaking.0")(X), X.tanh())
    assert client.scheduler_info()["workers"][server.worker]["name"] == 1
    eventually(lambda: "spoken by an expert" in server.logs())
    pid = server.pid
    server.kill()
    assert server.state == "killed" and pid is not None and not psutil.pid_exists(pid)
    assert "spoken by an expert" in server.logs()


# ---------------------------------------------------------------- what fails says so


async def test_code_is_not_handed_to_a_worker_with_another_python():
    class OldWorkers:
        async def check(self, workers: Any) -> dict[str, str]:
            return dict.fromkeys(workers, "3.9")

    fake: Any = OldWorkers()
    server = SimpleNamespace(kind=HandedKind("Mine", False, b""))
    plan: Any = SimpleNamespace(server=server)
    with pytest.raises(
        ServerFailed, match=r"Mine is defined here .* but 10.1.1.1 \(worker tcp://a\) has 3.9; use the same"
    ):
        await Placement(fake, "a run")._check(plan, {"tcp://a": {"host": "10.1.1.1"}})
    server.kind = "a.module:Mine"
    await Placement(fake, "a run")._check(plan, {"tcp://a": {"host": "10.1.1.1"}})


def test_workers_without_labkit_or_with_another_are_named_with_their_hosts(client, swarm):
    first, second = client.scheduler_info()["workers"]
    client.run(exec, "import labkit; labkit.__version__ = '0.0.9'", workers=[first])
    client.run(exec, "import sys; sys.hidden, sys.modules['labkit'] = sys.modules['labkit'], None", workers=[second])
    try:
        with pytest.raises(ServerFailed) as caught:
            swarm.serve("nop", grid=(1,), name="other", on=client)
    finally:
        client.run(exec, "import sys; sys.modules['labkit'] = sys.hidden", workers=[second])
        client.run(exec, f"import labkit; labkit.__version__ = {lk.__version__!r}", workers=[first])
    said = str(caught.value)
    assert f"labkit is missing on 127.0.0.1 (worker {second})" in said
    assert f"another version on 127.0.0.1 (worker {first}): 0.0.9" in said
    assert f"pip install labkit=={lk.__version__}" in said


def test_a_worker_that_cannot_reach_the_notebook_says_at_which_address_and_what_to_try(client, monkeypatch):
    monkeypatch.setattr(order, "check_announced", no_check)
    text = f"the worker on {HOST} cannot reach this notebook at 127.0.0.1:1: "
    with Swarm("hidden", announce="127.0.0.1:1") as swarm:
        with pytest.raises(ServerFailed, match=text) as caught:
            swarm.serve("nop", grid=(1,), on=client)
    assert 'listens on this machine only: begin it with lk.Swarm(listen="tcp://0.0.0.0:*")' in str(caught.value)
    hint = no_way_there("node7", Contact(bytes(32), "10.1.1.1", 7, True), "nothing answered")
    assert "port 7 through the firewall of this machine" in hint and 'announce="HOST"' in hint


async def no_check(*_: Any) -> None: ...


def test_a_server_that_the_notebook_cannot_reach_is_named_with_its_address(client, swarm, monkeypatch):
    elsewhere = planning.plans_elsewhere

    def announced(*arguments: Any) -> Any:
        return [replace(p, node=replace(p.node, announce="127.0.0.1:1")) for p in elsewhere(*arguments)]

    monkeypatch.setattr(planning, "plans_elsewhere", announced)
    monkeypatch.setattr(cluster_runner, "RELAY_TIMEOUT", 0.1)
    with pytest.raises(ServerFailed, match=r"cannot reach the server on .* at 127.0.0.1:1: .* firewall of that host"):
        swarm.serve("nop", grid=(1,), name="unreached", on=client)


# ---------------------------------------------------------------- what ends


def test_an_interrupt_while_a_server_starts_leaves_none(client, swarm):
    pids = client.run(os.getpid).values()
    before = {child for pid in pids for child in children(pid)}

    def interrupt() -> None:
        eventually(lambda: {child for pid in pids for child in children(pid)} - before)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        swarm.serve("nop", grid=(1,), name="interrupted", on=client)
    thread.join()
    eventually(lambda: {child for pid in pids for child in children(pid)} <= before)


def test_a_private_swarm_needs_no_file_that_both_hosts_have_and_ends_quickly(client):
    client.run(exec, KEEPER + "k.is_here = lambda folder: False")
    try:
        swarm = Swarm("private", members=[])
        (server,) = swarm.serve("ffn", hidden=4, grid=(1,), on=client, backend=SGD)
        swarm.expert("ffn.0")(X).sum().backward()
        key = Identity.generate()
        swarm.admit(key_text(key.public_key))
        with Swarm.join(str(swarm.invite()), key=key) as guest:
            eventually(guest.statistics)  # the worker has heard of the guest
            assert guest.expert("ffn.0")(X).shape == X.shape
        server.stop()
        server.restart()
        assert server.statistics().experts["ffn.0"] == 1, "from a folder of its worker"
    finally:
        client.run(exec, KEEPER + "import os; k.is_here = os.path.isdir")
    child, began = psutil.Process(server.pid), time.monotonic()
    swarm.close()
    assert time.monotonic() - began < 2.5
    child.wait(20)
    eventually(lambda: not any(client.run(eval, KEEPERS).values()))


# ---------------------------------------------------------------- what is asked for


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"on": "tcp://127.0.0.1:8786"}, r"on='tcp://127.0.0.1:8786': a Client of Dask"),
        ({"workers": ["a"]}, r"workers=… and resources=… .* on=Client"),
        ({"resources": {"GPU": 1}}, r"workers=… and resources=… .* on=Client"),
    ],
)
def test_what_is_no_cluster_is_refused_in_words(swarm, arguments, text):
    with pytest.raises(ValueError, match=text):
        swarm.serve("nop", grid=(1,), name="refused", **arguments)


def test_servers_of_a_client_that_is_gone_end_and_a_closed_one_is_told_of(client, swarm):
    second = Client(client.scheduler.address)
    (server,) = swarm.serve("nop", grid=(1,), name="late", on=second)
    child = psutil.Process(server.pid)
    second.close()  # as the end of its process does
    child.wait(20)
    assert "its client of Dask was closed" in server.wait(20)
    with pytest.raises(ServerFailed, match="its Dask client is closed; serve anew"):
        server.restart()


def test_a_cluster_that_is_closed_under_its_servers_says_nothing_but_that_they_have_ended(swarm, capfd):
    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") as cluster:
        client = Client(cluster)
        (server,) = swarm.serve("nop", grid=(1,), name="closed", on=client)
        capfd.readouterr()
    assert "its client of Dask was closed" in server.wait(20)
    client.close()
    said = [line for line in "".join(capfd.readouterr()).splitlines() if line]
    assert said == [line for line in said if line.startswith("the server of closed.0 has ended: its client of Dask")]


def test_isolation_is_left_out_on_a_cluster(client, swarm):
    with pytest.raises(ValueError, match="isolation='task': a server on a cluster"):
        swarm.serve("nop", grid=(1,), name="refused", on=client, isolation="task")


def test_a_bar_shows_how_many_servers_run_and_on_which_hosts():
    handles, said = list[Any](), io.StringIO()
    with show_start(handles, 2, file=said, delay=0.0, period=0.0) as show:
        show()
        handles += [SimpleNamespace(alive=True, host="node1"), SimpleNamespace(alive=False, host="")]
        show()
        handles[1].alive, handles[1].host = True, "node2"
    assert "starting servers:  50%" in said.getvalue() and "on node1]" in said.getvalue()
    assert "2/2" in said.getvalue() and "on node1, node2]" in said.getvalue()


# ---------------------------------------------------------------- the last, which ends the workers


def test_a_worker_that_is_lost_is_a_server_that_is_lost_and_comes_back_on_another_with_restart(
    client, swarm, monkeypatch
):
    (server,) = swarm.serve("nop", grid=(1,), name="lost", on=client)
    where, child = server.worker, psutil.Process(server.pid)
    given = swarm.serve("ffn", hidden=4, grid=(2, 2), name="given", servers=2, on=client)
    (uids,) = [other.uids for other in given if other.worker == where]
    told = list[Event]()
    swarm.on_event(told.append)
    dashboard = swarm.dashboard()
    os.kill(client.run(os.getpid)[where], signal.SIGKILL)
    assert f"({where}) was lost; restart() brings" in server.wait(20)
    assert server.state == "failed"
    child.wait(20)  # it ends with its worker
    # What it gave away meanwhile, who got it tells.
    moved = eventually(lambda: [event for event in told if isinstance(event, ExpertHandedOver) and event.uid in uids])
    assert {event.to for event in moved} <= {other.contact.endpoint for other in given if other.contact}
    dashboard.close()
    server.restart()
    assert server.alive and server.worker != where
    # A task beside it takes more memory than there is.
    client.submit(eval, TAKE_MEMORY, workers=[server.worker], key="hog")
    failure = server.wait(30)
    assert "Dask killed it, since it took" in failure and "memory limit" in failure
    client.cluster.scale(0)
    eventually(lambda: not client.scheduler_info()["workers"])
    monkeypatch.setattr(placement, "WORKER_TIMEOUT", 0.5)
    with pytest.raises(ServerFailed, match=r"within 0.5 s: the cluster at .* has no worker yet; .*wait_for_workers"):
        server.restart()
    client.close()
    client.cluster.close()
