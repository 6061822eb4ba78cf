"""Servers as processes: how they live, and above all how they die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import psutil
import pytest
import torch
from torch import nn

import labkit as lk
from labkit.errors import LabkitError, ServerFailed
from labkit.launch.child_python import server_environment
from labkit.server.checkpoints import load_expert
from labkit.swarm import Swarm
from labkit.wire.security import Identity, key_text
from tests.swarms import eventually

SGD = lk.BackendConfig(optimizer="sgd", lr=0.1)
X = torch.linspace(-1, 1, 12).reshape(3, 4)


@pytest.fixture(scope="module")
def four() -> Iterator[Swarm]:
    """A private swarm (servers are members too, and know the others) with four server processes."""
    with pytest.MonkeyPatch.context() as patch, Swarm("four", members=[]) as swarm:
        patch.delenv("OMP_WAIT_POLICY", raising=False)  # `make test` has it: see below what servers get without it
        swarm.serve("nop", grid=(4, 4), servers=4, isolation="process", threads=1)
        yield swarm


def test_each_server_has_a_process_and_a_session_of_its_own(four):
    pids = {server.pid for server in four.servers}
    assert len(pids) == 4
    assert os.getpid() not in pids
    assert os.getsid(0) not in {os.getsid(pid) for pid in pids}  # so Ctrl-C in a terminal does not reach them
    assert len(four.experts()) == 16


def test_the_secret_key_of_a_server_is_in_no_argument_and_no_environment(four):
    server = four.servers[0]
    process = psutil.Process(server.pid)
    secret = server.plan.identity.seed.hex()
    assert secret not in " ".join(process.cmdline())
    assert secret not in str(process.environ())


def test_torchs_threads_do_not_spin_in_a_server_unless_the_user_wants_them_to(four, monkeypatch):
    assert psutil.Process(four.servers[0].pid).environ()["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert server_environment()["OMP_WAIT_POLICY"] == "ACTIVE"


def test_faults_reach_processes_and_change_while_they_run(four):
    four.faults(loss=1.0)
    eventually(lambda: all(server.statistics().loss == 1.0 for server in four.servers))
    with pytest.raises(LabkitError, match="gave no answer"):
        four.expert("nop.0.0", timeout=0.2)(X)
    four.faults(loss=0.0)
    eventually(lambda: all(server.statistics().loss == 0.0 for server in four.servers))
    assert four.expert("nop.0.0")(X).equal(X)


def test_faults_of_one_server_are_its_own_until_those_of_all_are_set(four):
    first, second = four.servers[:2]
    assert repr(first.faults(latency=0.001)) == "Faults(latency=0.001, loss=0)"
    eventually(lambda: first.statistics().latency == 0.001)
    assert second.statistics().latency == second.faults().latency == four.faults().latency == 0.0
    with pytest.raises(ValueError, match="loss"):
        first.faults(latency=0.5, loss=2.0)
    four.faults(latency=0.0)
    eventually(lambda: first.statistics().latency == 0.0)


def test_a_swarm_asks_all_servers_for_statistics_those_started_elsewhere_too(four):
    here = {server.contact.endpoint for server in four.servers}
    asked = four.statistics()
    assert set(asked) == here
    assert sorted(uid for statistics in asked.values() for uid in statistics.experts) == sorted(four.experts())
    key = Identity.generate()
    four.admit(key_text(key.public_key))
    with Swarm.join(str(four.invite()), key=key) as elsewhere:
        assert set(elsewhere.statistics()) == here


def test_a_server_that_fails_to_start_says_why_in_its_own_words_and_leaves_nothing(four, tmp_path, monkeypatch):
    (tmp_path / "my_experts.py").write_text(
        "from torch import nn\n"
        "class Expert(nn.Linear):\n"
        "    def __init__(self, weights='my.weights'):\n"
        "        raise FileNotFoundError(f'there are no weights in {weights}')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)  # what the parent can import, so can its servers
    children = set(psutil.Process().children())
    with pytest.raises(ServerFailed, match=r"server of expert.0 did not start: there are no weights in my.weights"):
        four.serve("my_experts:Expert", grid=(1,))
    assert set(psutil.Process().children()) <= children


def test_an_interrupt_while_a_server_starts_leaves_none_and_the_swarm_works_on(four):
    children = set(psutil.Process().children())

    def interrupt() -> None:
        eventually(lambda: set(psutil.Process().children()) - children)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        four.serve("nop", grid=(1,), name="other", isolation="process")
    thread.join()
    eventually(lambda: set(psutil.Process().children()) <= children)
    assert len(four.experts()) == 16


def test_training_goes_on_when_half_of_four_servers_are_killed_and_closing_leaves_nothing(four):
    pids = [server.pid for server in four.servers]
    torch.manual_seed(0)
    x = torch.randn(512, 8)
    y = (x @ torch.randn(8, 3)).argmax(-1)
    moe = four.moe(16, name="nop", forward_timeout=5.0, backward_timeout=5.0, timeout_after_k_min=0.5)
    model = nn.Sequential(nn.Linear(8, 16), moe, nn.ReLU(), nn.Linear(16, 3))
    run = lk.fit(model, (x, y), steps=1_000_000, trainers=2, batch_size=32, lr=3e-3)
    eventually(lambda: run.steps >= 25)
    for pid in pids[::2]:
        os.kill(pid, signal.SIGKILL)
    steps, loss = run.steps, run.loss
    eventually(lambda: run.steps >= steps + 75)
    assert run.running
    assert run.failed_batches <= 2  # those that were between their forward and their backward pass
    assert run.loss < loss
    eventually(lambda: [server.state for server in four.servers] == ["failed", "running"] * 2)
    run.stop()
    os.kill(pids[1], signal.SIGSTOP)  # closing does not wait for one that hangs
    started = time.monotonic()
    four.close()
    assert time.monotonic() - started < 2
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_a_server_that_dies_is_noticed_and_comes_back_as_the_same_node_with_its_experts_exact_to_the_bit(tmp_path):
    with Swarm("mortal") as swarm:
        (server,) = swarm.serve(
            "ffn", hidden=4, grid=(1,), isolation="process", backend=SGD, checkpoint_dir=tmp_path, checkpoint_period=0.1
        )
        expert, contact = swarm.expert("ffn.0"), server.contact
        expert(X).sum().backward()
        before = expert(X)
        eventually(lambda: "counter.updates" in (load_expert(tmp_path, "ffn.0") or {}))
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        eventually(lambda: server.state == "failed")
        assert "code -9" in server.failure
        with pytest.raises(LabkitError):
            expert(X)
        assert swarm.experts() == {}

        server.restart()
        assert (server.state, server.contact) == ("running", contact)
        assert expert(X).equal(before)
        assert server.statistics().experts == {"ffn.0": 1}
        server.stop()  # it saves once more
        assert server.state == "stopped"
        state = load_expert(tmp_path, "ffn.0")
        assert state is not None and state["counter.updates"] == 1


LARGE = """
import torch
from torch import nn

class Large(nn.Identity):
    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.zeros(1).expand(250_000_000), persistent=False)  # 1 GB, but for its memory
"""


def test_a_process_says_how_long_its_experts_may_take_to_be_saved(tmp_path, monkeypatch):
    (tmp_path / "large_experts.py").write_text(LARGE)
    monkeypatch.syspath_prepend(tmp_path)
    with Swarm("large") as swarm:
        (server,) = swarm.serve("large_experts:Large", grid=(1,), isolation="process")
        assert server.lifecycle._runner is not None and server.lifecycle._runner.stop_timeout == 50.0


# ---------------------------------------------------------------- orphans

PARENT = """
import labkit as lk
swarm = lk.Swarm()
(server,) = swarm.serve("nop", grid=(1,), isolation="process", checkpoint_dir={directory!r})
print(server.pid, flush=True)
swarm.servers[0].wait()
"""


def test_a_killed_parent_leaves_no_orphan_and_its_servers_save_their_experts(tmp_path):
    code = PARENT.format(directory=str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        orphan = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    eventually(lambda: not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE)
    assert [path.name for path in tmp_path.iterdir()] == ["nop.0.safetensors"]
