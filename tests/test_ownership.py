"""A folder has an owner: two servers never save the same expert to the same place, and a killed one owns nothing."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import trio
from trio.testing import MockClock

import labkit as lk
from labkit.errors import CheckpointError, ServerFailed
from labkit.server import ownership
from labkit.server.checkpoints import load_expert, save_expert
from labkit.server.ownership import HURRIED_GRACE, FolderTaken, claim_checkpoints, claim_the_rest, own_checkpoints
from labkit.swarm import Swarm

pytestmark = pytest.mark.usefixtures("forked_python")

X = torch.linspace(-1, 1, 12).reshape(3, 4)
SGD = lk.BackendConfig(optimizer="sgd", lr=0.1)
HOLD = """
import sys
from labkit.server.ownership import claim_checkpoints
claim = claim_checkpoints(sys.argv[1], ["ffn.0"])
print(flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def owner(tmp_path):
    """Another process that owns ffn.0 in this folder."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        yield child
        child.kill()


def test_experts_belong_to_one_process_at_a_time_and_the_loser_is_told_to_whom_and_what_to_do(tmp_path, owner):
    with pytest.raises(FolderTaken, match=rf"an owner: the process {owner.pid} on .* \(since .*\) saves ffn\.0 there"):
        claim_checkpoints(tmp_path, ["ffn.0", "ffn.1"])
    with pytest.raises(FolderTaken, match=r"stop that one first, or give this one a folder of its own"):
        claim_checkpoints(tmp_path, ["ffn.0"])
    claim_checkpoints(tmp_path, ["ffn.1"]).release()  # servers of one swarm share a folder


async def test_an_expert_that_has_just_come_is_saved_although_its_last_server_closes_at_the_same_time(
    tmp_path, autojump_clock
):
    before, now = claim_checkpoints(tmp_path, ["ffn.0"]), claim_checkpoints(tmp_path, ["ffn.1"])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(claim_the_rest, now, ["ffn.0", "ffn.1"], HURRIED_GRACE, False)
        await trio.sleep(HURRIED_GRACE / 2)
        assert not now.owns("ffn.0")
        before.release()
    assert now.owns("ffn.0") and now.owns("ffn.1")
    now.release()


def test_another_name_of_the_folder_is_the_same_folder(tmp_path, owner):
    link = tmp_path.parent / f"{tmp_path.name} link"
    link.symlink_to(tmp_path)
    with pytest.raises(FolderTaken):
        claim_checkpoints(link, ["ffn.0"])


def test_a_killed_owner_owns_nothing_and_leaves_nothing(tmp_path, owner):
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    assert [path.name[:7] for path in tmp_path.iterdir()] == [".claim~"]
    claim_checkpoints(tmp_path, ["ffn.0"]).release()
    assert list(tmp_path.iterdir()) == []


def test_two_tasks_of_one_process_are_two_owners(tmp_path):
    claim = claim_checkpoints(tmp_path, ["ffn.0"])
    with pytest.raises(FolderTaken, match=r"another server of this process saves ffn\.0"):
        claim_checkpoints(tmp_path, ["ffn.0"])
    claim.release()
    claim.release()
    claim_checkpoints(tmp_path, ["ffn.0"]).release()


def test_who_reads_asks_nobody(tmp_path, owner):
    save_expert(tmp_path, "ffn.0", {"weight": torch.ones(2)})
    assert load_expert(tmp_path, "ffn.0") is not None


def test_a_child_that_was_forked_does_not_keep_what_its_parent_owned(tmp_path):
    forks = HOLD.replace(
        "print(", "import os\nif os.fork(): os._exit(0)\nprint("
    )  # the child prints, the parent is gone
    with subprocess.Popen(
        [sys.executable, "-c", forks, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as owner:
        assert owner.stdout is not None and owner.stdin is not None
        assert owner.stdout.readline() == b"\n"
        owner.wait()
        claim_checkpoints(tmp_path, ["ffn.0"]).release()
        owner.stdin.close()
        assert owner.stdout.read() == b""  # so the child has ended, too


async def test_whoever_comes_while_the_owner_saves_waits_for_its_end(tmp_path, autojump_clock: MockClock):
    async with trio.open_nursery() as nursery:
        claim = claim_checkpoints(tmp_path, ["ffn.0"])
        claim.leave()

        async def save() -> None:
            await trio.sleep(20)
            claim.release()

        nursery.start_soon(save)
        async with own_checkpoints(str(tmp_path), ["ffn.0"], in_thread=False):
            assert trio.current_time() >= 20


async def test_whoever_comes_while_the_owner_serves_is_refused_after_a_moment(tmp_path, autojump_clock: MockClock):
    with pytest.raises(FolderTaken):
        async with own_checkpoints(str(tmp_path), ["ffn.0"], in_thread=False):
            async with own_checkpoints(str(tmp_path), ["ffn.0"], in_thread=False):
                pass
    assert trio.current_time() < 5
    assert list(tmp_path.iterdir()) == []


def test_where_files_cannot_be_locked_a_server_starts_all_the_same_and_says_so(tmp_path, monkeypatch, caplog):
    def refuse(descriptor: int) -> bool:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(ownership, "_try_lock", refuse)
    claim_checkpoints(tmp_path, ["ffn.0"]).release()
    assert "cannot be locked" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_in_words_and_leaves_no_file(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ownership, "_write", refuse)
    with pytest.raises(CheckpointError, match=r"no checkpoints can be kept in .*No space left"):
        claim_checkpoints(tmp_path, ["ffn.0"])
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- servers


@pytest.mark.parametrize("isolation", ["task", "process"])
def test_two_swarms_over_one_folder_do_not_overwrite_each_other(tmp_path, isolation):
    how = dict(hidden=4, grid=(1, 1), backend=SGD, checkpoint_dir=tmp_path, checkpoint_period=0.1)
    with Swarm("one") as one, Swarm("two") as two:
        one.serve("ffn", isolation="task", **how)
        one.expert("ffn.0.0")(X).sum().backward()
        learnt = one.expert("ffn.0.0")(X)
        with pytest.raises(ServerFailed, match=r"did not start: .* has an owner: .* saves ffn\.0\.0 there"):
            two.serve("ffn", isolation=isolation, **how)
        assert two.servers == []
        one.servers[0].stop()
        two.serve("ffn", isolation=isolation, **how)
        assert two.expert("ffn.0.0")(X).equal(learnt)


def test_servers_of_one_swarm_share_a_folder_and_each_can_be_killed_and_restarted_at_once(tmp_path):
    with Swarm("shares") as swarm:
        first, second = swarm.serve(
            "ffn", hidden=4, grid=(2,), servers=2, isolation="process", backend=SGD, checkpoint_dir=tmp_path, backups=0
        )  # without copies, with which one may take over the other's expert at that moment
        first.kill(wait=False)
        first.restart()
        second.restart()
        assert [server.state for server in swarm.servers] == ["running", "running"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ffn.0.safetensors", "ffn.1.safetensors"]


def test_a_folder_that_was_removed_under_a_server_does_not_keep_it_from_saving(tmp_path):
    folder = Path(tmp_path / "ck")
    with Swarm("removed") as swarm:
        (server,) = swarm.serve("ffn", hidden=4, grid=(1,), isolation="task", backend=SGD, checkpoint_dir=folder)
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
        swarm.expert("ffn.0")(X).sum().backward()
        server.stop()
    assert load_expert(folder, "ffn.0") is not None
