"""Temporary folders and their owners: what a killed process leaves is removed, and nothing else."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import labkit as lk
from labkit.launch import temporary_folder
from labkit.launch.temporary_folder import (
    HEADER,
    NEW_OWNER_FILE,
    OWNER_FILE,
    TemporaryFolder,
    remove_abandoned,
    remove_if_abandoned,
    use,
)


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@contextmanager
def owner(temporary: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process with a folder, and that folder."""
    code = "from labkit.launch.temporary_folder import *; print(TemporaryFolder().name, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "TMPDIR": str(temporary)},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        name = Path(process.stdout.readline().strip())
        try:
            yield process, name
        finally:
            process.kill()


def test_the_folder_of_a_killed_process_is_removed_by_the_next_swarm_and_that_of_a_living_one_is_not(temporary):
    with owner(temporary) as (killed, left), owner(temporary) as (_, living):
        (left / "checkpoints").mkdir()
        killed.kill()
        killed.wait()
        with lk.Swarm("next") as swarm:
            assert not left.exists() and living.exists()
            assert Path(swarm._folder.name).exists() and remove_abandoned() == 0
    assert list(temporary.iterdir()) == [living]  # its owner was killed at the end
    assert remove_abandoned() == 1


def test_a_process_that_uses_the_folder_keeps_it_beyond_its_owners_death(temporary):
    with owner(temporary) as (killed, left):
        hold = use(left)
        assert hold is not None
        killed.kill()
        killed.wait()
        assert not remove_if_abandoned(left)
        hold.close()
        assert remove_if_abandoned(left) and not left.exists()
        assert use(left) is None


def test_what_is_not_known_to_be_abandoned_is_left_alone(temporary, monkeypatch):
    with owner(temporary) as (process, left):
        process.kill()
    (temporary / "labkit-older").mkdir()  # of a version that knew no owners
    (temporary / "labkit-notes.txt").write_text("mine")
    (temporary / "elsewhere").mkdir()
    (temporary / "elsewhere" / OWNER_FILE).write_bytes((left / OWNER_FILE).read_bytes())
    (temporary / "labkit-link").symlink_to(temporary / "elsewhere")
    (temporary / "labkit-linked").mkdir()
    (temporary / "labkit-linked" / OWNER_FILE).symlink_to(left / OWNER_FILE)
    (temporary / "labkit-other").mkdir()
    (temporary / "labkit-other" / OWNER_FILE).write_text("not labkit's")
    (temporary / "labkit-remote").mkdir()  # of a machine whose locks this one may not see
    (temporary / "labkit-remote" / OWNER_FILE).write_text(f"{HEADER}\nanother{socket.gethostname()}\nthen\n")
    before = set(temporary.iterdir())
    monkeypatch.setattr(os, "getuid", lambda: os.geteuid() + 1)  # all of it is another user's
    assert remove_abandoned() == 0
    monkeypatch.undo()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    assert remove_abandoned() == 1
    assert set(temporary.iterdir()) == before - {left}
    assert (temporary / "elsewhere" / OWNER_FILE).exists()


@pytest.mark.parametrize("begun", [[], [NEW_OWNER_FILE]])
def test_a_folder_whose_making_was_broken_off_is_removed_when_it_is_old(temporary, begun):
    folder = temporary / "labkit-begun"
    folder.mkdir()
    for name in begun:
        (folder / name).touch()
    assert remove_abandoned() == 0
    os.utime(folder, (1e9, 1e9))
    assert remove_abandoned() == 1 and not folder.exists()


def test_a_removal_that_is_broken_off_is_finished_by_the_next_start(temporary, monkeypatch):
    with owner(temporary) as (process, left):
        process.kill()
    (left / "experts").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda path, **_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            remove_abandoned()
    assert remove_abandoned() == 1 and not left.exists()


def test_a_file_system_without_locks_leaves_folders_without_owners(temporary, monkeypatch):
    monkeypatch.setattr(temporary_folder, "_lock_shared", lambda descriptor: False)
    unowned = TemporaryFolder()
    os.utime(unowned.name, (1e9, 1e9))
    assert remove_abandoned() == 0 and Path(unowned.name).exists()
    unowned.cleanup()
    unowned.cleanup()
    assert list(temporary.iterdir()) == []


def test_a_thousand_other_folders_hold_nobody_up(temporary, monkeypatch):
    for number in range(1000):
        (temporary / f"labkit-{number}").mkdir()
    began = time.monotonic()
    assert remove_abandoned() == 0
    assert time.monotonic() - began < 2 * temporary_folder.MOST_TIME
    monkeypatch.setattr(tempfile, "tempdir", str(temporary / "gone"))
    assert remove_abandoned() == 0
