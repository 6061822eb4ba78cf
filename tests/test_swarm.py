"""The swarm as a notebook holds it. Its servers are tasks here; `test_servers` is about processes."""

from __future__ import annotations

import gc
import os
import pickle
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn

import labkit as lk
from labkit import swarm_lifecycle
from labkit.directory import DirectoryConfig
from labkit.errors import NonFiniteTensor, ServerFailed, SwarmClosed
from labkit.events import CallFinished
from labkit.node import NodeConfig
from labkit.server.checkpoints import load_expert
from labkit.server.layers import FeedForward
from labkit.swarm import Swarm
from labkit.swarm_lifecycle import close_all
from labkit.view.scene import Scene
from labkit.wire.security import Identity
from tests.ports import free_ports
from tests.swarms import eventually, parameters

pytestmark = pytest.mark.usefixtures("forked_python")

SGD = lk.BackendConfig(optimizer="sgd", lr=0.1)
QUICK = NodeConfig(directory=DirectoryConfig(refresh=0.2, absence=0.1))  # sees what others do a moment later
X = torch.linspace(-1, 1, 12).reshape(3, 4)


@pytest.fixture
def swarm() -> Iterator[Swarm]:
    with Swarm("test") as swarm:
        yield swarm


@pytest.fixture(scope="module")
def still() -> Iterator[Swarm]:
    """A swarm with a 2 × 3 grid, half of it served, for tests that change nothing."""
    with Swarm("still", node=QUICK) as swarm:
        swarm.serve("ffn", hidden=4, grid=(2, 3), experts=3, isolation="task", backend=SGD)
        yield swarm


# ---------------------------------------------------------------- which experts are served


def test_servers_that_run_here_share_the_threads_that_torch_has_unless_told_otherwise(swarm):
    def threads(servers: int, threads: int | None = None) -> list[int | None]:
        begun = swarm.serve("nop", grid=(4, 4), experts=4, servers=servers, isolation="task", threads=threads)
        return [server.plan.server.threads for server in begun]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(6)
        assert threads(servers=2) == [3, 3]
        assert threads(servers=1) == [2]
        assert threads(servers=4) == [1, 1, 1, 1]
        swarm.servers[0].stop()
        assert threads(servers=1, threads=5) == [5]
    finally:
        torch.set_num_threads(before)


def test_experts_are_found_as_soon_as_serve_returns(swarm):
    for count in range(1, 5):  # also in a grid that this node has looked at a moment ago
        swarm.serve("nop", grid=(2, 2), experts=1, isolation="task")
        assert len(swarm.experts()) == count


def test_an_invitation_can_be_sent_to_another_process(still):
    assert pickle.loads(pickle.dumps(still.invite())) == still.invite()


def test_a_newcomer_takes_the_free_places_of_the_grid_with_the_options_of_the_others(still):
    with lk.Swarm.join(still.invite()) as newcomer:
        (server,) = newcomer.serve("ffn", isolation="task", backups=0, backend=SGD)  # which leaves no expert behind
        assert not set(server.uids) & set(still.servers[0].uids)
        assert sorted(newcomer.experts()) == [f"ffn.{i}.{j}" for i in range(2) for j in range(3)]
        assert newcomer.expert(server.uids[0])(X).shape == X.shape


def test_a_part_of_a_grid_has_something_in_every_row(swarm):
    (server,) = swarm.serve("nop", grid=(4, 4), experts=4, isolation="task")
    rows, columns = zip(*(uid.split(".")[1:] for uid in server.uids), strict=True)
    assert sorted(rows) == sorted(columns) == ["0", "1", "2", "3"]


def test_experts_are_spread_over_servers_so_that_none_holds_a_whole_row(swarm):
    for server in swarm.serve("nop", grid=(4, 4), servers=4, isolation="task"):
        assert sorted(uid.split(".")[1] for uid in server.uids) == ["0", "1", "2", "3"]


def test_without_a_grid_experts_get_one_that_is_nearly_square(swarm):
    swarm.serve("nop", experts=6, isolation="task")
    assert swarm.grids()["nop"].sizes == (2, 3)


def test_uids_name_their_grid_and_its_least_sizes(swarm):
    swarm.serve("nop", uids=["mine.1.0", "mine.0.2"], isolation="task")
    assert swarm.grids()["mine"].sizes == (2, 3)


def test_the_sizes_of_a_grid_may_change_when_nobody_serves_it_any_more(swarm):
    (server,) = swarm.serve("nop", grid=(2, 2), isolation="task")
    server.kill()
    swarm.serve("nop", grid=(3,), isolation="task")
    assert swarm.grids()["nop"].sizes == (3,)


def test_the_places_of_servers_that_are_gone_are_free_at_once(swarm):
    (server,) = swarm.serve("nop", grid=(2, 2), isolation="task")
    server.kill()
    with Swarm.join(swarm.invite()) as newcomer:
        newcomer.serve("nop", isolation="task")
        assert len(newcomer.experts()) == 4
        assert newcomer.expert("nop.0.0")(X).equal(X)


def test_two_grids_live_side_by_side(swarm):
    swarm.serve("nop", grid=(2,), isolation="task")
    swarm.serve("nop", grid=(1, 2), name="other", isolation="task")
    assert sorted(swarm.experts()) == ["nop.0", "nop.1", "other.0.0", "other.0.1"]
    assert swarm.moe(4, name="other", k_best=2)(X).shape == X.shape


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "what is it": (dict(kind="cnn"), "unknown expert kind 'cnn'"),
    "a misspelt option": (dict(kind="ffn", name="new", hiden=4), "hiden; did you mean 'hidden'\\? It takes hidden"),
    "a missing option": (dict(kind="ffn", name="new"), "hidden"),
    "isolation": (dict(isolation="thread"), "isolation='thread': 'process' or 'task'"),
    "other sizes": (dict(grid=(3, 3)), r"has the sizes \(2, 3\), not \(3, 3\); serve another with name="),
    "another width": (dict(hidden=8), r"experts of the kind ffn, hidden=4, not ffn, hidden=8; .* name="),
    "another kind": (dict(kind="nop", name="ffn"), "experts of the kind ffn, not nop"),
    "too many": (dict(experts=4), "has 3 free places of 6, so 4 more experts do not fit; .* name=…"),
    "none": (dict(experts=0), "experts=0: a number of experts, at least one"),
    "not a number": (dict(experts="8"), "experts='8': a number"),
    "a grid that is a number": (dict(name="new", hidden=4, grid=4), r"grid=4: the sizes of a grid are whole numbers"),
    "half a place": (dict(name="new", hidden=4, grid=(2.5, 2)), "whole numbers"),
    "no place": (dict(name="new", hidden=4, grid=(0, 2)), "1 to 8 dimensions"),
    "too large to choose from": (dict(name="new", hidden=4, grid=(5000, 5000)), "too large .* uids="),
    "more servers than experts": (dict(servers=4), "servers=4: between 1 and the number of experts, 3"),
    "no servers": (dict(servers=0), "servers=0"),
    "a bad name": (dict(name="a.b", hidden=4), "'a.b' is not a grid name"),
    "no uid": (dict(uids=["ffn"]), "'ffn' is not an expert uid"),
    "uids outside": (dict(uids=["ffn.7.7"]), "'ffn.7.7' is not in a grid of 2 x 3"),
    "uids of two grids": (dict(uids=["a.0", "b.0"], hidden=4), "several grids: a, b"),
    "uids of two shapes": (dict(uids=["a.0", "a.0.0"], hidden=4), "same number of coordinates"),
    "uids and a name": (dict(uids=["a.0"], name="b", hidden=4), "name='b': the uids are of the grid 'a'"),
    "uids and a number": (dict(uids=["ffn.0.0"], experts=1), "either uids=… or experts=…"),
    "a period": (dict(checkpoint_period=0), "checkpoint_period=0"),
    "none kept": (dict(checkpoint_keep=0), "checkpoint_keep=0: a number of checkpoints, at least 1"),
    "threads": (dict(threads=0), "threads=0: from 1 to 1,024"),
    "a kind for a process": (
        dict(kind=partial(nn.Identity, threading.Lock()), name="new", isolation="process"),
        "partial cannot be handed to a server process .* isolation=.task.",
    ),
    "an option for a process": (
        dict(kind="torch.nn:Linear", name="new", isolation="process", device=threading.Lock()),
        "device=<unlocked .* cannot be handed to a server process .* isolation=.task.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_served_is_refused_and_the_text_says_what_to_change(still, case):
    wrong, text = WRONG[case]
    with pytest.raises(ValueError, match=text):
        still.serve(**({"kind": "ffn", "isolation": "task"} | wrong))
    assert len(still.servers) == 1


def test_a_directory_that_cannot_hold_checkpoints_is_refused(still, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(lk.LabkitError, match=r"no checkpoints can be kept in .*file/below: Not a directory"):
        still.serve("ffn", isolation="task", checkpoint_dir=tmp_path / "file" / "below")


# ---------------------------------------------------------------- kinds of experts


class Sum(nn.Module):
    """An expert with two inputs."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(hidden))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (x + y) * self.scale


def test_an_expert_may_have_several_inputs_and_is_trained_through_each(swarm):
    swarm.serve(Sum, hidden=4, grid=(1,), isolation="task", backend=SGD)
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    expert = swarm.expert("sum.0")
    output = expert(x, y)
    torch.testing.assert_close(output, 2 * X)
    output.sum().backward()
    torch.testing.assert_close(x.grad, torch.ones_like(X))
    torch.testing.assert_close(y.grad, torch.ones_like(X))
    torch.testing.assert_close(expert(X, X), 2 * X * (1 - 0.1 * 2 * X.sum(0)))  # one step of SGD


def test_a_registered_kind_and_one_from_a_module_are_served_by_their_names(swarm):
    lk.register_expert("doubling", lambda: nn.Linear(4, 4))
    (mine,) = swarm.serve("doubling", grid=(1,), isolation="task")
    (imported,) = swarm.serve("torch.nn:Linear", grid=(1,), isolation="task", in_features=4, out_features=4)
    assert (mine.uids, imported.uids) == (("doubling.0",), ("linear.0",))
    assert swarm.expert("linear.0")(X).shape == X.shape


def test_a_task_keeps_what_labkit_says_of_its_experts_and_python_prints_it_as_ever(swarm, capsys):
    class Failing(nn.Identity):
        def forward(self, x):
            raise ZeroDivisionError("an expert of a test")

    (server,) = swarm.serve(Failing, grid=(1,), isolation="task")
    assert server.pid == os.getpid()
    with pytest.raises(lk.LabkitError, match="an expert of a test"):
        swarm.expert("failing.0")(X)
    assert "an expert of a test" in server.logs()
    assert server.logs(1) in server.logs() and server.logs(0) == ""


def test_a_seed_makes_the_same_experts_whoever_serves_them(swarm, tmp_path):
    found = []
    for servers in (1, 3):
        directory = tmp_path / str(servers)
        started = swarm.serve(
            "ffn", hidden=4, uids=[f"seeded.{i}" for i in range(3)], servers=servers, seed=1, isolation="task",
            backend=SGD, checkpoint_dir=directory,
        )  # fmt: skip
        for server in started:
            server.stop()
        found.append([parameters(directory, f"seeded.{i}") for i in range(3)])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    assert not found[0][0]["layers.0.weight"].equal(found[0][1]["layers.0.weight"])


# ---------------------------------------------------------------- kill, stop, restart


def test_a_server_that_is_killed_and_restarted_is_the_same_node_at_the_same_address(swarm):
    (server,) = swarm.serve("nop", grid=(2,), isolation="task")
    contact = server.contact
    server.kill()
    assert (server.state, server.alive, server.pid) == ("killed", False, None)
    with pytest.raises(lk.LabkitError):
        swarm.expert("nop.0")(X)
    assert swarm.experts() == {}
    server.restart()
    assert (server.state, server.contact) == ("running", contact)
    assert swarm.expert("nop.0")(X).equal(X)  # at once, though it was known to be gone


def test_what_was_killed_a_moment_ago_is_dead_in_the_next_scene(swarm):
    servers = swarm.serve("nop", grid=(4,), servers=2, isolation="task")
    scenes: list[Scene] = []
    swarm.view.add(scenes.append, 0.05)
    eventually(lambda: bool(scenes) and scenes[-1].headline.experts_alive == 4)
    servers[0].kill()
    swarm.close()
    assert scenes[-1].headline.experts_alive == 2


def test_a_server_restarts_from_its_checkpoints_exact_to_the_bit(swarm, tmp_path):
    (server,) = swarm.serve("ffn", hidden=4, grid=(1,), isolation="task", backend=SGD, checkpoint_dir=tmp_path)
    expert = swarm.expert("ffn.0")
    expert(X).sum().backward()
    before = expert(X)
    server.stop()
    assert server.state == "stopped"
    server.restart()
    assert expert(X).equal(before)
    assert server.statistics().experts == {"ffn.0": 1}


def test_a_later_swarm_carries_on_from_the_checkpoints_of_an_earlier_one(tmp_path):
    how: dict[str, Any] = {
        "hidden": 4, "grid": (1,), "isolation": "task", "backend": SGD, "checkpoint_dir": tmp_path
    }  # fmt: skip
    with Swarm("earlier") as earlier:
        earlier.serve("ffn", **how)
        earlier.expert("ffn.0")(X).sum().backward()
        before = earlier.expert("ffn.0")(X)
    with Swarm("later") as later:
        later.serve("ffn", **how)
        assert later.expert("ffn.0")(X).equal(before)


def test_a_task_carries_on_from_the_checkpoints_of_a_process_and_a_partial_is_served(swarm, tmp_path):
    swarm.serve(FeedForward, hidden=4, grid=(1,), name="a", isolation="process", checkpoint_dir=tmp_path, backend=SGD)
    swarm.expert("a.0")(X).sum().backward()
    before = swarm.expert("a.0")(X)
    swarm.servers[0].stop()
    swarm.serve(FeedForward, hidden=4, grid=(1,), name="a", isolation="task", checkpoint_dir=tmp_path, backend=SGD)
    assert swarm.expert("a.0")(X).equal(before)
    swarm.serve(partial(FeedForward, 4), grid=(1,), name="b", backend=SGD)
    assert swarm.expert("b.0")(X).shape == X.shape


def test_experts_are_saved_every_so_many_seconds(swarm, tmp_path):
    swarm.serve(
        "ffn", hidden=4, grid=(1,), isolation="task", backend=SGD, checkpoint_dir=tmp_path, checkpoint_period=0.05
    )
    swarm.expert("ffn.0")(X).sum().backward()
    state = eventually(lambda: load_expert(tmp_path, "ffn.0"))
    assert state is not None and state["counter.updates"] == 1


def test_a_server_keeps_as_many_checkpoints_of_an_expert_as_it_is_told(swarm, tmp_path):
    (server,) = swarm.serve(
        "ffn", hidden=4, grid=(1,), isolation="task", backend=SGD, checkpoint_dir=tmp_path, checkpoint_keep=2
    )
    for _ in range(3):
        swarm.expert("ffn.0")(X).sum().backward()
        server.restart()
    kept = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert kept == ["ffn.0.safetensors", "ffn.0~2.safetensors", "ffn.0~3.safetensors"]


def test_a_damaged_checkpoint_stops_the_start_and_leaves_nothing(swarm, tmp_path):
    (tmp_path / "ffn.0.safetensors").write_bytes(b"damaged")
    (tmp_path / "ffn.1.safetensors").write_bytes(b"damaged")
    with pytest.raises(ServerFailed, match=r"did not start: .*ffn\.[01]\.safetensors cannot be read .* move it away"):
        swarm.serve("ffn", hidden=4, grid=(2,), servers=2, isolation="task", backend=SGD, checkpoint_dir=tmp_path)
    assert swarm.servers == []
    assert swarm.experts() == {}


def test_an_expert_whose_own_code_fails_is_told_of_with_its_own_words(swarm):
    def broken() -> nn.Module:
        raise KeyError("my weights")

    with pytest.raises(ServerFailed, match=r"the server of broken.0 did not start: 'my weights'") as caught:
        swarm.serve(broken, grid=(1,), isolation="task")
    assert isinstance(caught.value.__cause__, KeyError)  # a notebook shows where it happened


def test_a_stop_that_cannot_save_says_so(swarm, tmp_path):
    directory = tmp_path / "gone"
    (server,) = swarm.serve("ffn", hidden=4, grid=(1,), isolation="task", backend=SGD, checkpoint_dir=directory)
    shutil.rmtree(directory)
    directory.touch()
    with pytest.raises(ServerFailed, match=r"did not end cleanly: .*gone"):
        server.stop()
    assert server.state == "failed"
    server.stop()  # it has ended: there is nothing left to say
    directory.unlink()
    server.restart()
    assert server.alive


class Endless(nn.Module):
    """Computes until the test is over."""

    begun, go = threading.Event(), threading.Event()

    def forward(self, x: Tensor) -> Tensor:
        self.begun.set()
        self.go.wait(20)
        return x


def test_a_server_that_takes_long_to_stop_can_be_killed_meanwhile(swarm):
    server = swarm.serve(Endless, grid=(1,), isolation="task")[0]

    def ask() -> None:
        with pytest.raises(lk.LabkitError):
            swarm.expert("endless.0")(X)

    def stop() -> None:
        with pytest.raises(ServerFailed, match="did not end cleanly: it was killed"):
            server.stop()

    asking, stopping = threading.Thread(target=ask), threading.Thread(target=stop)
    asking.start()
    assert Endless.begun.wait(10)
    stopping.start()
    eventually(lambda: server.state == "stopped")
    server.kill()
    stopping.join(5)
    assert not stopping.is_alive() and server.state == "killed"
    Endless.go.set()
    asking.join()


def test_a_server_that_is_killed_while_it_starts_does_not_come_to_life(swarm):
    begun, go_on = threading.Event(), threading.Event()

    def slow() -> nn.Module:
        begun.set()
        go_on.wait(10)
        return nn.Identity()

    go_on.set()
    (server,) = swarm.serve(slow, grid=(1,))
    begun.clear()
    go_on.clear()
    server.restart(wait=False)
    assert server.state == "starting"
    begun.wait(10)
    threading.Timer(0.05, go_on.set).start()
    server.kill()
    assert server.state == "killed"
    server.restart()
    assert server.alive


def test_two_restarts_at_once_leave_one_server(swarm):
    (server,) = swarm.serve("nop", grid=(1,), isolation="task")
    for _ in range(3):
        server.restart(wait=False)
    eventually(lambda: server.alive)
    assert swarm.expert("nop.0")(X).equal(X)
    assert len(swarm.experts()) == 1


def test_somebody_may_wait_for_the_end_of_a_server(swarm):
    (server,) = swarm.serve("nop", grid=(1,), isolation="task")
    ended: list[str] = []
    waiter = threading.Thread(target=lambda: ended.append(server.wait()))
    waiter.start()
    server.kill()
    waiter.join(5)
    assert ended == [""]


# ---------------------------------------------------------------- faults


def test_faults_change_while_running_and_hold_for_servers_started_later(swarm):
    swarm.serve("nop", grid=(2,), experts=1, isolation="task")
    swarm.faults(loss=1.0)
    (later,) = swarm.serve("nop", isolation="task")
    for uid in ("nop.0", "nop.1"):
        with pytest.raises(lk.LabkitError, match="gave no answer"):
            swarm.expert(uid, timeout=0.1)(X)
    assert repr(swarm.faults(loss=0.0, latency=0.001)) == "Faults(latency=0.001, loss=0)"
    assert (later.statistics().latency, later.statistics().loss) == (0.001, 0.0)
    assert swarm.expert("nop.0")(X).equal(X)


@pytest.mark.parametrize("wrong", [{"latency": -1}, {"loss": 1.5}, {"latency": float("nan")}])
def test_faults_that_cannot_be_are_refused_by_name(still, wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
        still.faults(**wrong)
    assert repr(still.faults()) == "Faults(latency=0, loss=0)"


# ---------------------------------------------------------------- layers and looking


def test_a_layer_takes_the_sizes_of_its_grid_from_the_swarm(still):
    layer = still.moe(4)
    assert layer.grid == (2, 3)
    assert still.moe(4, (2, 3)).grid == (2, 3)
    with pytest.raises(ValueError, match=r"grid=\(3, 3\): the grid 'ffn' has the sizes \(2, 3\)"):
        still.moe(4, (3, 3))
    with pytest.raises(ValueError, match=r"nobody serves a grid 'cnn' in this swarm, but ffn; .*name=….*grid=…"):
        still.moe(4, name="cnn")
    with pytest.raises(ValueError, match=r"moe has no option k_bets; did you mean 'k_best'\? It has dim, grid"):
        still.moe(4, k_bets=2)


def test_layers_use_experts_that_join_later_without_a_restart():
    with Swarm("quick", node=QUICK) as swarm, Swarm.join(swarm.invite()) as other:
        swarm.serve("nop", grid=(2, 2), experts=1, isolation="task")
        layer = swarm.moe(4, name="nop", k_best=4)
        used: set[str] = set()
        swarm.on_event(lambda event: used.add(event.uid) if isinstance(event, CallFinished) else None)
        layer(X)
        assert len(used) == 1
        other.serve("nop", isolation="task")
        eventually(lambda: layer(X) is not None and len(used) == 4)


def test_what_is_not_finite_is_refused_and_changes_nothing(still):
    uid = still.servers[0].uids[0]
    with pytest.raises(NonFiniteTensor):
        still.expert(uid)(X / 0)
    x = X.clone().requires_grad_()
    with pytest.raises(NonFiniteTensor):
        still.expert(uid)(x).backward(X / 0)
    assert still.servers[0].statistics().experts[uid] == 0


def test_a_server_that_was_killed_a_moment_ago_is_shown_once(swarm):
    swarm.serve("nop", grid=(2,), servers=2, isolation="task")
    swarm.servers[1].kill()
    text = repr(swarm)
    assert "servers[1]  killed" in text and "remote" not in text
    assert "0 of 1" in text


def test_the_swarm_shows_its_servers_and_those_elsewhere(still):
    with Swarm.join(still.invite(), name="guest") as guest:
        guest.serve("ffn", experts=1, isolation="task", backups=0, backend=SGD)
        eventually(lambda: len(still.experts()) == 4)
        text = repr(still)
        assert "swarm 'still', open at 127.0.0.1:" in text
        assert "grid ffn 2 × 3: 4 experts alive" in text
        assert "servers[0]  running" in text
        assert "elsewhere   remote" in text
        assert "servers[0]" in guest._repr_html_()
    assert repr(guest).startswith("swarm 'guest', closed")


# ---------------------------------------------------------------- beginning and ending


def leftovers() -> tuple[list[str], int, list[str]]:
    """Our threads, open sockets of this process, our folders."""
    gc.collect()
    threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("labkit-")]
    folders = [path.name for path in Path(tempfile.gettempdir()).glob("labkit-*")]
    return threads, len(psutil.Process().net_connections()), folders


def nothing_more_than(before: tuple[list[str], int, list[str]]) -> bool:
    """Whether nothing is left over but what was there before, of which some may have ended by itself."""
    (threads, sockets, folders), (old_threads, old_sockets, old_folders) = leftovers(), before
    return set(threads) <= set(old_threads) and sockets <= old_sockets and set(folders) <= set(old_folders)


@pytest.fixture
def own_temporary_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_close_takes_no_time_and_leaves_no_thread_socket_or_folder(own_temporary_folder):
    before = leftovers()
    swarm = Swarm("closing")
    swarm.serve("ffn", hidden=4, grid=(2,), servers=2, isolation="task", backend=SGD)
    swarm.expert("ffn.0")(X).sum().backward()
    assert leftovers() != before
    swarm.servers[0].kill()
    started = time.monotonic()
    swarm.close()
    assert time.monotonic() - started < 2
    eventually(lambda: nothing_more_than(before))
    swarm.close()  # once more is fine
    with pytest.raises(SwarmClosed, match="'closing' is closed; start or join one again"):
        swarm.experts()


@pytest.mark.parametrize("step", ["view.end", "_portal.call", "_portal.close", "view.close", "_folder.cleanup"])
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interrupt_waits_until_all_is_closed(own_temporary_folder, tmp_path, monkeypatch, name, step):
    swarm = Swarm("interrupted")
    part, method = step.split(".")
    with interrupted_at(monkeypatch, getattr(swarm, part), method, getattr(signal, name)):
        swarm.close()
    assert swarm.closed and list(tmp_path.iterdir()) == []


@contextmanager
def interrupted_at(monkeypatch, part: object, method: str, number: int) -> Iterator[None]:
    """A call of this method begins with a signal, whose handler raises; it does so at the end of this block."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def interrupted(*arguments: Any, **options: Any) -> Any:
        signal.raise_signal(number)
        return unhurt(*arguments, **options)

    unhurt = getattr(part, method)
    before = signal.signal(number, interrupt)
    try:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(part, method, interrupted)
            yield
        assert signal.getsignal(number) is interrupt
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("step", ["TemporaryFolder", "Portal", "ExpertClient", "SwarmView", "open_session"])
def test_an_interrupt_while_a_swarm_begins_leaves_nothing(own_temporary_folder, tmp_path, monkeypatch, step):
    before = leftovers()
    with interrupted_at(monkeypatch, swarm_lifecycle, step, signal.SIGINT):
        Swarm("interrupted")
    if (late := swarm_lifecycle._open.get("interrupted")) is not None:  # it was there already when it came
        late.close()
    eventually(lambda: nothing_more_than(before))
    assert list(tmp_path.iterdir()) == []


def test_servers_that_run_when_an_interrupt_comes_are_listed(own_temporary_folder, monkeypatch):
    with Swarm("listed") as swarm:
        call = swarm._portal.call

        def interrupted(function, *arguments, **options):
            answer = call(function, *arguments, **options)
            if getattr(function, "__name__", "") == "execute":
                raise KeyboardInterrupt
            return answer

        monkeypatch.setattr(swarm._portal, "call", interrupted)
        with pytest.raises(KeyboardInterrupt):
            swarm.serve("nop", grid=(1,), isolation="task")
        assert [server.state for server in swarm.servers] == ["running"]


def test_close_does_not_wait_for_an_expert_that_computes_forever():
    computing, go_on = threading.Event(), threading.Event()

    class Endless(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            computing.set()
            go_on.wait(30)
            return x

    def call() -> None:
        with pytest.raises(lk.LabkitError):
            expert(X)

    with Swarm("busy") as swarm:
        swarm.serve(Endless, grid=(1,), backend=SGD)
        expert = swarm.expert("endless.0")
        caller = threading.Thread(target=call)
        caller.start()
        assert computing.wait(10)
        started = time.monotonic()
        swarm.close()
        assert time.monotonic() - started < 2
        caller.join()
    go_on.set()


def test_a_swarm_of_the_same_name_is_closed_first():
    with Swarm("same") as first, Swarm("same") as second:
        assert first.closed
        assert not second.closed
        first.close()
        assert not second.closed


@pytest.mark.parametrize(
    "wrong",
    [
        {"listen": "127.0.0.1:5555"}, {"announce": "http://here"}, {"members": ["me"]}, {"key": "/no/such/key"},
        {"secure": False, "listen": "tcp://0.0.0.0:*"}, {"listen": "tcp://no.such.host.invalid:*"},
        {"listen": "tcp://192.0.2.1:*"},
    ],
)  # fmt: skip
def test_a_swarm_that_does_not_come_to_be_closes_no_other(still, wrong):
    with pytest.raises((ValueError, lk.LabkitError)):
        Swarm("still", **wrong)
    assert not still.closed and still.servers[0].alive
    assert still.expert(still.servers[0].uids[0])(X).shape == X.shape  # layers find it under its name


def test_nor_does_one_that_cannot_join_or_whose_port_is_taken(still):
    nobody = str(still.invite()).rpartition(":")[0] + ":1?plain"
    key = Identity.generate()
    with Swarm("other", key=key) as other:
        port = other.invite().rpartition(":")[2].partition("?")[0]
        with pytest.raises(lk.LabkitError, match="in use"):
            Swarm("still", listen=f"tcp://127.0.0.1:{port}")
        with pytest.raises(lk.JoinError):
            Swarm.join(nobody, name="other", key=key)  # the same node as the one that is open
        assert not other.closed
    for invite in (still.invite(), still.servers[0].contact.invitation()):
        with pytest.raises(lk.JoinError, match="leads to the swarm 'still' of this process"):
            Swarm.join(invite, name="still")
    with pytest.raises(lk.JoinError):
        Swarm.join(nobody.replace(nobody[9:20], "AAAAAAAAAAA"), name="still")
    with pytest.raises(ValueError, match="did you mean 'listen'"):
        Swarm.join(still.invite(), name="still", lisen="tcp://127.0.0.1:*")  # type: ignore[call-arg]
    assert not still.closed


def test_a_cell_with_a_port_or_a_key_of_its_own_may_run_twice(tmp_path):
    key, port = Identity.generate(), free_ports()
    for options in ({"listen": f"tcp://127.0.0.1:{port}"}, {"key": key}):
        with Swarm("twice", **options) as first, Swarm("twice", **options) as second:
            assert first.closed and not second.closed


def test_what_cannot_be_served_makes_no_folder(still, tmp_path):
    for wrong in ({"servers": 9}, {"checkpoint_period": 0}, {"threads": 0}):
        with pytest.raises(ValueError):
            still.serve("ffn", isolation="task", checkpoint_dir=tmp_path / "new", **wrong)
    assert list(tmp_path.iterdir()) == []


def test_a_swarm_that_does_not_come_to_be_leaves_nothing(own_temporary_folder):
    before = leftovers()
    with pytest.raises(ValueError, match=r"listen='4000' is not an address; write tcp://HOST:PORT"):
        Swarm("never", listen="4000")
    with pytest.raises(lk.LabkitError, match=r"there is no key file .*; make one: labkit keygen"):
        Swarm("never", key="/no/such/key")
    with pytest.raises(ValueError, match="announce="):
        Swarm("never", announce="host:port")
    assert nothing_more_than(before)


def test_all_swarms_are_closed_at_exit(monkeypatch):
    with Swarm("one") as one, Swarm("two") as two:
        with interrupted_at(monkeypatch, one.view, "end", signal.SIGINT):
            close_all()
        assert one.closed and two.closed


def test_a_key_file_makes_it_the_same_node_each_time(tmp_path):
    path = tmp_path / "key"
    Identity.generate().save(path)
    with Swarm("keyed", key=path) as swarm:
        first = swarm.invite().partition("@")[0]
    with Swarm("keyed", key=path) as swarm:
        assert swarm.invite().partition("@")[0] == first
    path.chmod(0o644)
    with pytest.raises(lk.LabkitError, match=r"can be read by others; .* chmod 600"):
        Swarm("keyed", key=path)


# ---------------------------------------------------------------- nobody is needed


def test_the_swarm_works_on_without_the_node_that_everybody_joined_through():
    with Swarm("first") as first:
        first.serve("nop", grid=(2, 2), experts=1, isolation="task")
        one = Swarm.join(first.invite(), name="one")
        two = Swarm.join(first.invite(), name="two")
    with one, two:
        assert first.closed
        one.serve("nop", uids=["nop.0.1"], isolation="task")
        two.serve("nop", uids=["nop.1.1"], isolation="task")
        with Swarm.join(one.invite(), name="three") as three:
            eventually(lambda: {"nop.0.1", "nop.1.1"} <= set(three.experts()))
            for swarm in (one, two, three):
                assert swarm.expert("nop.0.1")(X).equal(X)
                assert swarm.expert("nop.1.1")(X).equal(X)
