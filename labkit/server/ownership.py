"""Who owns which checkpoints of a folder: one server at a time saves an expert there, and none overwrites another's.

A batch passes by. `server/serving` claims its experts before it loads them, and gives them back when it has saved them.

A claim is a file in the folder, `.claim~….lock`, that its server keeps locked (`flock`, or its like on Windows). The
system unlocks it when the process ends, however it ends, so a killed server leaves a file that says nothing any more;
whoever claims next removes it. To read checkpoints takes no claim. Machines that share a disk see each other's claims
where the file system passes locks on, as NFS does.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import secrets
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from functools import partial
from pathlib import Path

import msgspec
import trio

from labkit.errors import CheckpointError

logger = logging.getLogger(__name__)

GRACE = 2.0  # seconds in which an owner whose notebook has just ended may notice it
HURRIED_GRACE = 1.0  # the same for experts that have just moved, where a whole swarm is closed, within two seconds
LEAVING_TIMEOUT = 60.0  # seconds in which an owner that is stopping may save its experts
RETRY_INTERVAL = 1.0  # seconds between two attempts to own an expert that has come
INTERVAL = 0.1  # seconds between two attempts
GATE = ".claims~.lock"  # locked by whoever looks at the claims and makes one, for a moment
GATE_TIMEOUT = 5.0  # seconds
LOCKED_BYTE = 1 << 30  # where Windows locks: behind the end, since what is locked cannot be read there
UNSUPPORTED = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EBADF, errno.ENOTTY}


class ClaimRecord(msgspec.Struct):
    """What a claim says of its owner, in JSON."""

    host: str
    pid: int
    since: str  # its local time
    names: list[str]  # what is claimed: experts, by their uids
    leaving: bool = False  # whether it is about to save them and to end


class FolderTaken(CheckpointError):
    """Another server owns an expert's checkpoint in this folder."""

    def __init__(self, text: str, leaving: bool) -> None:
        super().__init__(text)
        self.leaving = leaving


class FolderClaim:
    """A claim that holds until `release`, or until this process ends."""

    def __init__(self, path: Path | None = None, descriptor: int = -1, record: ClaimRecord | None = None) -> None:
        self._path, self._descriptor, self._record = path, descriptor, record
        self.busy = trio.Lock()  # held while one of the files is written, or the claim is changed
        self.refused: FolderTaken | None = None  # why it has not all that was wanted at first

    def owns(self, name: str) -> bool:
        """Whether this may be saved: it is claimed, or there is nothing to claim."""
        return self._record is None or name in self._record.names

    def claim_anew(self, names: Iterable[str]) -> set[str]:
        """Own these from now on and no others, except what others own, which is returned. Raises `OSError`."""
        if self._path is None or self._record is None or self._descriptor < 0:
            return set()
        wanted, folder = set(names), self._path.parent
        missing = wanted - set(self._record.names)
        gate = _open_gate(folder)
        try:
            taken = set[str]()
            for path in folder.glob(".claim~*.lock") if missing else ():
                if path != self._path and (record := _owner(path, missing)) is not None:
                    taken |= missing.intersection(record.names)
            self._record.names = sorted(wanted - taken)
            _write(self._descriptor, self._record)
        finally:
            _close_gate(folder, gate)
        return taken

    def leave(self) -> None:
        """Tell whoever wants the same experts that they will be free soon, and that waiting is worth it."""
        if self._record is not None and self._descriptor >= 0:
            self._record.leaving = True
            with suppress(OSError):  # it is a courtesy
                _write(self._descriptor, self._record)

    def release(self) -> None:
        """Give the experts back. Safe to repeat."""
        if self._path is None or self._descriptor < 0:
            return
        _held.pop(self._path.name, None)
        descriptor, self._descriptor = self._descriptor, -1
        if os.name == "posix":
            self._path.unlink(missing_ok=True)  # before it is unlocked, or it could be another's by then
        os.close(descriptor)
        with suppress(OSError):
            self._path.unlink(missing_ok=True)

    def _close(self) -> None:
        with suppress(OSError):
            os.close(self._descriptor)
        self._descriptor = -1


_held: dict[str, FolderClaim] = {}  # of this process, by the name of the file


@asynccontextmanager
async def own_checkpoints(
    folder: str | None, names: Sequence[str], *, in_thread: bool = True, all_of_them: bool = True
) -> AsyncIterator[FolderClaim]:
    """Own these experts' checkpoints in a folder for the length of the block.

    It waits for an owner that is about to end: a moment for any, since its notebook may just have been restarted, and
    longer for one that says that it is leaving.

    Args:
        folder: The folder, made if need be; None claims nothing.
        names: The experts, by their uids.
        in_thread: Whether a thread may look at the disk; in virtual time it may not.
        all_of_them: Whether all are needed; if not, those that others own are left out: see `FolderClaim.owns` and
            `FolderClaim.refused`.

    Raises:
        FolderTaken: A server that lives owns one of them. The text says which, and what to do.
        CheckpointError: The folder cannot be written to.
    """
    claim = FolderClaim() if folder is None else await _claim_patiently(folder, names, in_thread, all_of_them)
    try:
        yield claim
    finally:
        claim.release()


async def _claim_patiently(folder: str, names: Sequence[str], in_thread: bool, all_of_them: bool) -> FolderClaim:
    def claim_some(refused: FolderTaken) -> FolderClaim:
        claim = claim_checkpoints(folder, ())
        claim.claim_anew(names)
        claim.refused = refused
        return claim

    async def do(claim: Callable[[], FolderClaim]) -> FolderClaim:
        return await trio.to_thread.run_sync(claim) if in_thread else claim()

    started = trio.current_time()
    while True:
        try:
            return await do(partial(claim_checkpoints, folder, names))
        except FolderTaken as error:
            if trio.current_time() - started > (LEAVING_TIMEOUT if error.leaving else GRACE):
                if all_of_them:
                    raise
                return await do(partial(claim_some, error))
        await trio.sleep(INTERVAL)


async def keep_claimed(
    claim: FolderClaim, held: Collection[str], until_changed: Callable[[], Awaitable[object]], in_thread: bool = True
) -> None:
    """Own the checkpoints of the experts that a server holds, as they come and go, until cancelled.

    What another owns is tried again, since its owner may be about to give it up, or to end.

    Args:
        claim: The claim.
        held: The experts, now.
        until_changed: Waits until those are others.
        in_thread: Whether a thread may look at the disk; in virtual time it may not.
    """
    said = set[str]()
    while True:
        wanted, missing = set(held), set[str]()
        try:
            async with claim.busy:
                if in_thread:
                    missing = await trio.to_thread.run_sync(claim.claim_anew, wanted)
                else:
                    missing = claim.claim_anew(wanted)
        except OSError as error:
            logger.warning("the checkpoints of experts cannot be claimed: %s", error)
            missing = wanted
        for name in sorted(missing - said):
            logger.info("%s is saved by another server in the same folder, and not yet by this one", name)
        said = missing
        with trio.move_on_after(RETRY_INTERVAL if missing else math.inf):
            if wanted == set(held):
                await until_changed()


async def claim_the_rest(claim: FolderClaim, names: Collection[str], patience: float, in_thread: bool = True) -> None:
    """Claim what a server is about to save that it has been given a moment ago, by one that saved it until then.

    Args:
        claim: The claim.
        names: The experts.
        patience: Seconds to try.
        in_thread: Whether a thread may look at the disk; in virtual time it may not.
    """
    with trio.move_on_after(patience):
        while any(not claim.owns(name) for name in names):
            try:
                await trio.to_thread.run_sync(claim.claim_anew, names) if in_thread else claim.claim_anew(names)
            except OSError as error:
                logger.warning("the checkpoints of experts cannot be claimed: %s", error)
            await trio.sleep(INTERVAL)


def claim_checkpoints(folder: str | os.PathLike[str], names: Iterable[str]) -> FolderClaim:
    """Claim experts' checkpoints in a folder, now. Raises as `own_checkpoints` does."""
    folder, wanted = Path(folder), set(names)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        gate = _open_gate(folder)
        try:
            for path in folder.glob(".claim~*.lock"):
                _check(path, folder, wanted)
            return _make_claim(folder, wanted)
        finally:
            _close_gate(folder, gate)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise CheckpointError(f"no checkpoints can be kept in {folder}: {error.strerror or error}") from None
    logger.warning(
        "files in %s cannot be locked, so nobody notices if two servers save the same experts there: make sure that "
        "this is the only one",
        folder,
    )
    return FolderClaim()


def _owner(path: Path, wanted: set[str]) -> ClaimRecord | None:
    """Look at another's claim: None if its owner is gone, and then it is removed."""
    if path.name not in _held and _is_stale(path):  # our own are not opened: on NFS, to close one would unlock it
        with suppress(OSError):
            path.unlink(missing_ok=True)
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=ClaimRecord)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError):
        return ClaimRecord("?", 0, "?", sorted(wanted))  # being rewritten, or not readable: believe it to be in use


def _check(path: Path, folder: Path, wanted: set[str]) -> None:
    """Look at another's claim. Raises `FolderTaken` if it has what is wanted."""
    record = _owner(path, wanted)
    if record is None:
        return
    both = sorted(wanted.intersection(record.names))
    if not both:
        return
    who = f"the process {record.pid} on {record.host} (since {record.since})"
    if (record.pid, record.host) == (os.getpid(), socket.gethostname()):
        who = "another server of this process"
    others = f" and {len(both) - 1} more" if len(both) > 1 else ""
    raise FolderTaken(
        f"{folder} has an owner: {who} saves {both[0]}{others} there. Two that save to the same files would "
        "overwrite each other: stop that one first, or give this one a folder of its own",
        record.leaving,
    )


def _is_stale(path: Path) -> bool:
    """Whether the owner of a claim has ended: then nobody has locked its file."""
    try:
        descriptor = _open(path, os.O_RDWR)
    except PermissionError:
        try:
            descriptor = _open(path, os.O_RDONLY)
        except PermissionError:
            return False
        except FileNotFoundError:
            return True
    except FileNotFoundError:
        return True
    try:
        return _try_lock(descriptor)
    finally:
        os.close(descriptor)


def _make_claim(folder: Path, names: set[str]) -> FolderClaim:
    since = datetime.now().astimezone().isoformat(" ", "seconds")
    record = ClaimRecord(socket.gethostname(), os.getpid(), since, sorted(names))
    path = folder / f".claim~{secrets.token_hex(8)}.lock"
    descriptor = _open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        if not _try_lock(descriptor):
            raise OSError(errno.ENOLCK, "a new file is locked already")
        _write(descriptor, record)
    except BaseException:
        os.close(descriptor)
        with suppress(OSError):
            path.unlink(missing_ok=True)
        raise
    claim = _held[path.name] = FolderClaim(path, descriptor, record)
    return claim


def _open_gate(folder: Path) -> int:
    """Lock the gate: one at a time looks at the claims of a folder and makes one. Returns its descriptor."""
    path, deadline = folder / GATE, time.monotonic() + GATE_TIMEOUT
    while time.monotonic() < deadline:
        descriptor = _open(path, os.O_RDWR | os.O_CREAT)
        try:
            # The one before removes the file, and then a lock of it locks nothing.
            if _try_lock(descriptor) and os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            with suppress(OSError):
                path.unlink()
            raise
        os.close(descriptor)
        time.sleep(INTERVAL / 10)
    raise OSError(errno.EBUSY, f"another process holds {path.name} for longer than {GATE_TIMEOUT:.0f} s; is it frozen?")


def _close_gate(folder: Path, descriptor: int) -> None:
    with suppress(OSError):  # Windows does not let go of a file that is open
        (folder / GATE).unlink(missing_ok=True)
    os.close(descriptor)


def _open(path: Path, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_CLOEXEC", 0), 0o666)


def _write(descriptor: int, record: ClaimRecord) -> None:
    data = json.dumps(msgspec.to_builtins(record)).encode()
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.write(descriptor, data + b" " * 8)  # it only grows
    os.ftruncate(descriptor, len(data))


if sys.platform == "win32":
    import msvcrt

    def _try_lock(descriptor: int) -> bool:
        """Lock an open file until it is closed. Returns whether nobody else has it locked."""
        os.lseek(descriptor, LOCKED_BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except PermissionError:
            return False
        return True

else:
    import fcntl

    def _try_lock(descriptor: int) -> bool:
        """Lock an open file until it is closed. Returns whether nobody else has it locked."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
        return True


def _forget_in_child() -> None:
    """A forked child holds the same open files: it lets go of them, so that a claim ends with its server's process."""
    for claim in _held.values():
        claim._close()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
