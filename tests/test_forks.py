"""A forked child of a process with a swarm: it is told at once what it cannot do, and ends nothing of its parent's."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.swarms import eventually

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork"),
    pytest.mark.usefixtures("forked_python"),
]

SWARM = """
import atexit, gc, json, multiprocessing, os, signal, sys, time, warnings
import torch, labkit as lk
from torch import nn
warnings.simplefilter("ignore")  # Python 3.12 and later warn of every fork beside threads
torch.set_num_threads(1)
x, y = torch.randn(16, 4), torch.randint(2, (16,))
swarm = lk.Swarm()
(server,) = swarm.serve("ffn", hidden=4, grid=(2, 2), isolation=ISOLATION)
layer = swarm.moe(4, k_best=2)
model = nn.Sequential(layer, nn.Linear(4, 2))
folder = swarm._folder.name

def refused(act):
    began = time.monotonic()
    try:
        act()
    except lk.SwarmClosed as error:
        said = str(error)
        return time.monotonic() - began < 2 and "forked" in said
    return False

def forked(act, end=None):
    '''What `act` returns in a forked child that ends as those of `multiprocessing` do, or by `end`.'''
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(write, json.dumps(act()).encode())
        if end is not None:
            end()
        # Not to the very end: where the parent computes, torch's own exit may wait for threads that are not there.
        atexit._run_exitfuncs()
        gc.collect()
        os._exit(0)
    os.close(write)
    with open(read) as answer:
        text = answer.read()
    _, status = os.waitpid(pid, 0)
    assert status == 0, status
    return json.loads(text)
"""


def run(code: str, isolation: str = "task") -> str:
    """What a script prints after the words above."""
    script = SWARM.replace("ISOLATION", repr(isolation)) + code
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_whatever_would_wait_for_a_thread_of_the_parent_is_refused_at_once_and_says_what_to_do():
    assert (
        run("""
dashboard, logging = swarm.dashboard(), swarm.log_to(lk.JsonlLogger(folder + "/log"))
run = lk.fit(model, (x, y), steps=1_000_000, batch_size=4, trainers=2)
leaf = swarm.expert("ffn.0.0")
loss = layer(x).sum()
asks = dict(
    layer=lambda: layer(x), expert=lambda: leaf(x), backward=lambda: loss.backward(), serve=lambda: swarm.serve("nop"),
    moe=lambda: swarm.moe(4), grids=swarm.grids, experts=swarm.experts, alive=swarm.experts_alive,
    statistics=swarm.statistics, faults=lambda: swarm.faults(loss=0.5), admit=lambda: swarm.admit("a" * 43),
    dashboard=swarm.dashboard, snapshot=swarm.snapshot, log_to=lambda: swarm.log_to(lk.JsonlLogger(os.devnull)),
    export=lambda: dashboard.export(folder + "/page.html"), kill=server.kill, stop=server.stop, wait=server.wait,
    restart=server.restart, handle_faults=lambda: server.faults(loss=0.5), handle_statistics=server.statistics,
    run_wait=run.wait, run_stop=run.stop, logging_stop=logging.stop,
)
while run.steps < 5:
    time.sleep(0.01)
for _ in range(5):  # at other moments of the trainers, who hold locks
    outcome = forked(lambda: {name: refused(ask) for name, ask in asks.items()})
    assert all(outcome.values()), outcome
assert forked(lambda: [swarm.closed, run.running, repr(swarm)[:23]]) == [True, False, "swarm 'default', closed"]
def close_all():
    dashboard.close()
    swarm.close()
forked(close_all)
assert run.running and server.alive and not swarm.closed and not dashboard.ended
assert layer(x).shape == x.shape
run.stop()
swarm.close()
print("well")
""")
        == "well\n"
    )


def test_a_child_that_ends_leaves_its_parents_files_so_that_a_restarted_expert_carries_on():
    assert (
        run("""
leaf = swarm.expert("ffn.0.0")
leaf(x).sum().backward()
def nothing(): pass
forked(nothing)
forked(nothing, end=sys.exit)
for method in ("fork", "forkserver", "spawn"):
    child = multiprocessing.get_context(method).Process(target=os.getpid)
    child.start(); child.join()
    assert child.exitcode == 0
assert os.path.isdir(folder)
before = leaf(x)
server.stop(); server.restart()
assert leaf(x).equal(before) and server.statistics().experts["ffn.0.0"] == 1
print("well")
""")
        == "well\n"
    )


def test_workers_of_a_data_loader_are_told_too():
    assert (
        run("""
class Rows(torch.utils.data.Dataset):
    def __len__(self): return 4
    def __getitem__(self, number): return layer(x[number])
try:
    next(iter(torch.utils.data.DataLoader(Rows(), num_workers=1)))
except lk.SwarmClosed as error:
    assert "multiprocessing_context" in str(error)
    print("well")
""")
        == "well\n"
    )


def test_a_child_may_join_its_parents_swarm_and_closes_only_its_own():
    assert (
        run("""
invite = swarm.invite()
def join():
    with lk.Swarm.join(invite, name="default") as mine:
        answered = list(layer(x).shape)
        mine.serve("nop", grid=(1,), isolation="task")
        return [answered, mine.closed, mine._folder.name != folder]
assert forked(join) == [[16, 4], False, True]
def fresh():
    mine = lk.Swarm()
    mine.serve("nop", grid=(1,), isolation="process")
    return sorted(mine.experts())
assert forked(fresh) == ["nop.0"]  # not closed: that is left to the end of the process
assert swarm.experts_alive() == 4 and not swarm.closed and os.path.isdir(folder)
print("well")
""")
        == "well\n"
    )


def test_servers_and_files_end_with_a_killed_parent_even_if_a_child_that_it_forked_lives_on(tmp_path):
    code = """
def say(*words):  # a line at a time: an unbuffered print could be cut in two by another process's
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())
def live_on():
    say(os.getpid())
    time.sleep(600)
multiprocessing.get_context("fork").Process(target=live_on).start()
say(server.pid, folder)
time.sleep(600)
"""
    script = SWARM.replace("ISOLATION", "'process'") + code
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment)
    with contextlib.ExitStack() as stack:
        stack.enter_context(parent)
        stack.callback(parent.kill)  # before it is waited for, whatever fails here
        assert parent.stdout is not None
        said = [parent.stdout.readline().split() for _ in range(2)]
        [child], [server, folder] = sorted(said, key=len)
        stack.callback(os.kill, int(child), signal.SIGKILL)
        served = psutil.Process(int(server))
        parent.kill()
        parent.wait()
        eventually(lambda: not served.is_running() or served.status() == psutil.STATUS_ZOMBIE, 10)
        assert psutil.pid_exists(int(child))
        eventually(lambda: not Path(folder).exists(), 10)
