"""Temporary folders that have an owner: they are removed when their processes have ended, however they ended.

A folder begins with `labkit-` and holds a file named `owner`, on which every process that uses the folder holds a lock.
The system releases the locks of a process that is killed. So a folder whose file can be locked exclusively belongs to
no living process, and whoever finds it so removes it: the last of its own server processes, or the next `lk.Swarm()` of
the same user (`remove_abandoned`). Unlike a recorded process id, a lock also speaks for processes in other containers,
and its number is never given to another process.
"""

from __future__ import annotations

import logging
import os
import platform
import shutil
import stat
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from labkit.forks import is_forked, keep_private, release, this_process

logger = logging.getLogger(__name__)

PREFIX = "labkit-"
OWNER_FILE = "owner"
NEW_OWNER_FILE = "owner.new"  # its name until it is locked
HEADER = "labkit folder 1"
MOST_TIME = 0.5  # seconds in which `remove_abandoned` begins to remove folders; others are left to the next start
UNLOCKED_FILE = "no-owner"  # or if it cannot be
LEAST_AGE = 600.0  # seconds since the last change of a folder without an owner, which may only be in the making
MAX_OWNER_BYTES = 1000


class TemporaryFolder:
    """A folder that belongs to this process, and to the processes that `use` it, until `cleanup`.

    A process that was forked from this one neither owns nor removes it.

    Args:
        kind: Follows `labkit-` in its name.
    """

    def __init__(self, kind: str = "") -> None:
        self._process = this_process()
        self.name = tempfile.mkdtemp(prefix=PREFIX + kind)
        self._lock: FolderLock | None = None
        try:
            self._lock = _make_owner_file(Path(self.name))
        except OSError as error:  # a file system without locks: then nobody will take the folder for abandoned
            logger.debug("%s has no owner: %s", self.name, error)
            with suppress(OSError):
                os.replace(Path(self.name) / NEW_OWNER_FILE, Path(self.name) / UNLOCKED_FILE)

    def cleanup(self) -> None:
        """Remove the folder. Safe to repeat."""
        if is_forked(self._process):
            return
        _remove(Path(self.name))
        if self._lock is not None:
            self._lock.close()
            self._lock = None
            _remove(Path(self.name))  # on Windows the file that was open is left


class FolderLock:
    """A hold on a folder, through its file `owner`: as long as it is not closed, nobody removes the folder."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        keep_private(descriptor)

    def close(self) -> None:
        """Give the hold up. Safe to repeat."""
        if self._descriptor >= 0:
            release(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1


def use(folder: str | os.PathLike[str]) -> FolderLock | None:
    """Keep another process's folder as long as this process lives. Returns None if it has no owner any more."""
    try:
        descriptor = os.open(Path(folder) / OWNER_FILE, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
    except OSError:
        return None
    if _lock_shared(descriptor):
        return FolderLock(descriptor)
    os.close(descriptor)
    return None


def remove_if_abandoned(folder: str | os.PathLike[str]) -> bool:
    """Remove a folder if it is ours and no living process uses it. Returns whether that was so."""
    path = Path(folder)
    try:
        if not _is_ours(path.lstat(), stat.S_ISDIR):
            return False
        descriptor = os.open(path / OWNER_FILE, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
    except FileNotFoundError:
        return _remove_if_broken_off(path)  # or of an earlier version, or somebody else's
    except OSError:
        return False
    try:
        if not _is_ours(os.fstat(descriptor), stat.S_ISREG) or not _is_from_here(descriptor):
            return False
        if sys.platform == "win32":
            os.close(descriptor)
            descriptor = -1
            aside = path.with_name(f"{path.name}.old")
            path.rename(aside)  # fails while any process has the file open
            path = aside
        elif not _lock_exclusively(descriptor):
            return False
        _remove(path)
        return True
    except OSError:
        return False
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def _remove_if_broken_off(path: Path) -> bool:
    """Remove a folder whose making or removal was broken off: it holds nothing, or an owner's file yet to be named."""
    try:
        if time.time() < path.lstat().st_mtime + LEAST_AGE or {*os.listdir(path)} - {NEW_OWNER_FILE}:
            return False
        (path / NEW_OWNER_FILE).unlink(missing_ok=True)
        path.rmdir()
        return True
    except OSError:
        return False


def _remove(path: Path) -> None:
    """Remove a folder; its owner's file last, so that the next start can go on with what is broken off."""
    with suppress(OSError), os.scandir(path) as entries:
        for entry in entries:
            if entry.name != OWNER_FILE:
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path, ignore_errors=True)
                else:
                    with suppress(OSError):
                        os.unlink(entry.path)
    shutil.rmtree(path, ignore_errors=True)


def remove_abandoned() -> int:
    """Remove what processes that were killed have left among the temporary files. Returns how many folders.

    Quick and quiet: what cannot be removed, or not in half a second, is left as it is.
    """
    until, removed = time.monotonic() + MOST_TIME, 0
    with suppress(OSError), os.scandir(tempfile.gettempdir()) as entries:
        for entry in entries:
            if entry.name.startswith(PREFIX) and remove_if_abandoned(entry.path):
                removed += 1
                logger.info("%s was left by a process that is gone, and is removed", entry.path)
            if time.monotonic() > until:
                break
    return removed


def _make_owner_file(folder: Path) -> FolderLock:
    """The file gets its name when it is locked: nobody ever sees it unlocked while we live."""
    new = folder / NEW_OWNER_FILE
    descriptor = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(descriptor, f"{HEADER}\n{_host()}\n{_boot()}\n".encode())
        if not _lock_shared(descriptor):
            raise OSError("it cannot be locked")
        if sys.platform == "win32":
            os.close(descriptor)  # an open file cannot be renamed there
            new.rename(folder / OWNER_FILE)
            descriptor = os.open(folder / OWNER_FILE, os.O_RDWR)
        else:
            new.rename(folder / OWNER_FILE)
    except OSError:
        os.close(descriptor)
        raise
    return FolderLock(descriptor)


def _is_ours(status: os.stat_result, is_kind: object) -> bool:
    assert callable(is_kind)
    return bool(is_kind(status.st_mode)) and (not hasattr(os, "getuid") or status.st_uid == os.getuid())


def _is_from_here(descriptor: int) -> bool:
    """Whether a process of this machine has made the file: locks of other machines may be unknown here."""
    lines = os.read(descriptor, MAX_OWNER_BYTES).decode(errors="replace").split("\n")
    if lines[0] != HEADER or len(lines) < 3:
        return False
    host, boot = lines[1:3]
    return host == _host() or (boot != "" and boot == _boot())


def _host() -> str:
    return platform.node()


def _boot() -> str:
    """What tells this run of the machine from all others, in all of its containers; empty where that is not known."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""


if sys.platform == "win32":

    def _lock_shared(descriptor: int) -> bool:
        return True  # an open file is lock enough

    def _lock_exclusively(descriptor: int) -> bool:
        return False

else:
    import fcntl

    def _lock_shared(descriptor: int) -> bool:
        return _try_lock(descriptor, fcntl.LOCK_SH)

    def _lock_exclusively(descriptor: int) -> bool:
        return _try_lock(descriptor, fcntl.LOCK_EX)

    def _try_lock(descriptor: int, kind: int) -> bool:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except OSError:
            return False
        return True
