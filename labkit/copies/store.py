"""The copies that a server keeps: one file for each expert, the newest that is whole, replaced atomically.

A copy `ffn.3.17` of epoch 2 with 1,400 updates is two files in the store's folder:

    ffn.3.17~2.1400~<random>.safetensors    the state, as in a checkpoint
    ffn.3.17~2.1400~<random>.json           what it is of: its `CopyHead`; with this file the copy counts

What arrives is appended to a hidden file, `.ffn.3.17~2.1400~<random>.part`, and is never in memory as a whole, but for
one copy at a time while it is checked. What a crash leaves behind is removed at the next start. A file is written once
and never changed, so that a copy can be read while a newer one arrives.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import msgspec
import trio

from labkit.contact import Contact
from labkit.copies.messages import CopyHead
from labkit.errors import RequestRefused
from labkit.expert_uid import split_uid
from labkit.tensor_files import sync_directory

logger = logging.getLogger(__name__)

SPARE_BYTES = 8 << 20  # that are left free on the disk
READ_AT_ONCE = 1 << 20  # bytes
_HEAD = msgspec.json.Decoder(tuple[CopyHead, float])
T = TypeVar("T")
Bytes = bytes | bytearray | memoryview

Check = Callable[[CopyHead, Path], object]  # raises `CheckpointError` for a file that is no such copy; may block


@dataclass(frozen=True, slots=True)
class Copy:
    """A copy that is kept.

    Args:
        head: What it is of.
        path: The file of its state. It stays until a newer copy, or `remove`, takes its place.
        at: When it was stored, in seconds since 1970, by this machine's clock.
    """

    head: CopyHead
    path: Path
    at: float

    @property
    def uid(self) -> str:
        """The expert."""
        return self.head.uid

    @property
    def epoch(self) -> int:
        """The epoch of the primary that sent it."""
        return self.head.epoch

    @property
    def updates(self) -> int:
        """Optimizer steps that the expert had made."""
        return self.head.updates

    @property
    def primary(self) -> Contact:
        """The server that sent it."""
        return self.head.primary


def newer_is_kept(held: Copy) -> str:
    """Why an older copy is refused, in words."""
    return f"a newer copy of {held.uid} is kept here: epoch {held.epoch}, {held.updates} updates"


class CopyStore:
    """The copies in one folder, which is this server's alone.

    Args:
        folder: Where they are; made if need be. Copies that are there are kept, as after a restart.
        in_thread: Whether the disk is waited for in a thread; if not, in this one, as in virtual time.
        durable: Whether a copy that counts survives a power failure, and not only the end of this process.
        on_change: Called when there is another copy than before, or one is gone.

    Raises:
        OSError: The folder cannot be made or read.
    """

    def __init__(
        self, folder: Path, *, in_thread: bool = True, durable: bool = True,
        on_change: Callable[[], object] = lambda: None,
    ) -> None:  # fmt: skip
        self.folder = folder
        self.durable = durable
        self._in_thread = in_thread
        self._on_change = on_change
        self._copies: dict[str, Copy] = {}
        self._settling = trio.Lock()  # one copy at a time is checked, in memory
        self._readers = Counter[Path]()  # how many read a file now
        self._unwanted: dict[Path, Copy] = {}  # which are read still
        self.arriving: set[IncomingCopy] = set()
        folder.mkdir(parents=True, exist_ok=True)
        self._find()

    @property
    def copies(self) -> Mapping[str, Copy]:
        """The copies by uid, at any time up to date."""
        return MappingProxyType(self._copies)

    async def begin(self, head: CopyHead, data: Bytes = b"") -> IncomingCopy:
        """Begin to take a copy in, with its first bytes. Raises `OSError` if the disk has no room for it, or fails."""
        incoming = IncomingCopy(self, head)
        self.arriving.add(incoming)
        try:
            await self.wait_for(lambda: incoming.open(memoryview(data)))
        except BaseException:
            self.arriving.discard(incoming)
            raise
        return incoming

    async def read(self, uid: str, work: Callable[[CopyHead, Path], T]) -> T:
        """Read a copy. Its file stays as long as that takes, even if the copy is replaced or removed meanwhile.

        Args:
            uid: The expert.
            work: Is called with the copy's head and file, such as `checking.check_copy`. It may block.

        Returns:
            What `work` returns.

        Raises:
            KeyError: No copy of this expert is kept.
        """
        copy = self._copies[uid]
        self._readers[copy.path] += 1
        try:
            return await self.wait_for(lambda: work(copy.head, copy.path))
        finally:
            self._readers[copy.path] -= 1
            if not self._readers[copy.path]:
                del self._readers[copy.path]
                if self._unwanted.pop(copy.path, None) is not None:
                    await self._remove(copy)

    async def remove(self, uid: str) -> None:
        """Keep a copy no more. Does nothing if there is none."""
        copy = self._copies.pop(uid, None)
        if copy is not None:
            self._on_change()
            await self._remove(copy)

    async def _remove(self, copy: Copy) -> None:
        if self._readers[copy.path]:
            self._unwanted[copy.path] = copy
            return
        with trio.CancelScope(shield=True):
            try:
                await self.wait_for(lambda: self._unlink(copy))
            except OSError as error:  # it counts no more, or a newer one counts; the next start tries again
                logger.warning("a copy of %s that is not needed could not be removed: %s", copy.uid, error)

    async def wait_for(self, work: Callable[[], T]) -> T:
        """Do something that waits for the disk. It is not interrupted by a cancellation."""
        if self._in_thread:
            return await trio.to_thread.run_sync(work)
        await trio.lowlevel.checkpoint()
        return work()

    async def keep(self, incoming: IncomingCopy, check: Check) -> Copy:
        """Check a copy that has arrived, and let it take the place of the older one. See `IncomingCopy.finish`."""
        uid = incoming.head.uid
        async with self._settling:
            held = self._copies.get(uid)
            if held is not None and held.head.version > incoming.head.version:
                raise RequestRefused(newer_is_kept(held))
            with trio.CancelScope(shield=True):  # as long as the disk takes
                copy = self._copies[uid] = await self.wait_for(lambda: incoming.settle(check))
                self._on_change()
            if held is not None:
                await self._remove(held)
        return copy

    def _unlink(self, copy: Copy) -> None:
        copy.path.with_suffix(".json").unlink(missing_ok=True)  # it counts no more
        copy.path.unlink(missing_ok=True)

    def _find(self) -> None:
        """Read what is in the folder, and remove all else that a store has left there."""
        found: dict[str, Copy] = {}
        for path in sorted(self.folder.glob("*~*~*.json")):
            copy = _read(path)
            older = copy
            if copy is not None and (copy.uid not in found or _age(copy) > _age(found[copy.uid])):
                older = found.get(copy.uid)
                found[copy.uid] = copy
            if older is not None:
                self._unlink(older)
        kept = {copy.path for copy in found.values()}
        kept |= {path.with_suffix(".json") for path in kept}
        for pattern in ("*~*~*.json", "*~*~*.safetensors", ".*~*~*.part"):
            for path in self.folder.glob(pattern):
                if path not in kept:
                    path.unlink(missing_ok=True)
        self._copies = found


class IncomingCopy:
    """A copy on its way in. Made by `CopyStore.begin`. It ends with `finish` or `discard`, whatever happens between.

    Attributes:
        head: What it is said to be.
        older: The copy that it is to replace, from which it may take bytes; None if there is none.
        received: Bytes that have been written.
    """

    def __init__(self, store: CopyStore, head: CopyHead) -> None:
        self.head = head
        self.older = store.copies.get(head.uid)
        self.received = 0
        self._store = store
        self._name = f"{head.uid}~{head.epoch}.{head.updates}~{secrets.token_hex(8)}"
        self._part = store.folder / f".{self._name}.part"
        self._file: int | None = None

    async def append(self, data: Bytes) -> None:
        """Write the next bytes. Raises `OSError`; then only `discard` is left to do."""
        await self._store.wait_for(lambda: self._append(memoryview(data)))

    async def append_same(self, size: int) -> None:
        """Let the next bytes be those of the older copy, at the same place. Raises `OSError`, as `append`.

        Raises `RequestRefused` if that is not kept any more, or has not so many.
        """
        older, store = self.older, self._store
        if older is None or store.copies.get(self.head.uid) is not older or self.received + size > older.head.size:
            raise RequestRefused(f"no older copy of {self.head.uid} is kept here that has these bytes")
        await store.read(self.head.uid, lambda _, path: self._append_from(path, size))

    async def finish(self, check: Check) -> Copy:
        """Let the copy count. When this returns, it is checked and on disk, and the older one is gone.

        Args:
            check: Raises `CheckpointError` if the file is no such copy.

        Raises:
            CheckpointError: It is none.
            RequestRefused: A newer copy is kept already.
            OSError: The disk is full, or fails.

        If this raises, nothing has changed, and nothing is left of the new copy.
        """
        try:
            return await self._store.keep(self, check)
        finally:
            with trio.CancelScope(shield=True):
                await self.discard()

    async def discard(self) -> None:
        """Forget what has arrived. Does nothing after `finish`."""
        self._store.arriving.discard(self)
        if self._file is not None:
            await self._store.wait_for(self._discard)

    # ------------------------------------------------------------ what waits for the disk

    def open(self, data: memoryview) -> None:
        """Make the file, with its first bytes. Raises `OSError`; then nothing is left of it."""
        promised = sum(one.head.size - one.received for one in list(self._store.arriving) if one is not self)
        free = shutil.disk_usage(self._store.folder).free - promised
        if self.head.size + SPARE_BYTES > free:
            left = max(0, free) / 1e6
            size, spare = self.head.size / 1e6, SPARE_BYTES / 1e6
            raise OSError(
                f"the copy takes {size:.1f} MB, and the disk has {left:.1f} MB left, of which {spare:.1f} MB stay free"
            )
        self._file = os.open(self._part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600)
        try:
            self._append(data)
        except BaseException:
            self._discard()
            raise

    def _append(self, data: memoryview) -> None:
        assert self._file is not None, "this copy has ended"
        while data:
            written = os.write(self._file, data)
            self.received += written
            data = data[written:]

    def _append_from(self, path: Path, size: int) -> None:
        with open(path, "rb", buffering=0) as file:
            file.seek(self.received)
            while size:
                data = file.read(min(size, READ_AT_ONCE))
                if not data:
                    raise OSError(f"{path.name} has become shorter")
                self._append(memoryview(data))
                size -= len(data)

    def settle(self, check: Check) -> Copy:
        """Sync, check and rename the state, and write the head, with which the copy counts (half a head is none).

        If this raises, nothing is left of it.
        """
        assert self._file is not None, "this copy has ended"
        path, at = self._store.folder / f"{self._name}.safetensors", time.time()
        head = path.with_suffix(".json")
        try:
            if self._store.durable:
                os.fsync(self._file)
            self._close()
            check(self.head, self._part)
            os.replace(self._part, path)
            _write(head, msgspec.json.encode((self.head, at)), durable=self._store.durable)
            if self._store.durable:
                sync_directory(self._store.folder)
        except BaseException:
            for file in (head, path):
                file.unlink(missing_ok=True)
            self._discard()
            raise
        return Copy(self.head, path, at)

    def _discard(self) -> None:
        try:
            self._close()
        finally:
            self._part.unlink(missing_ok=True)

    def _close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            os.close(file)


def _age(copy: Copy) -> tuple[tuple[int, int], float]:
    return copy.head.version, copy.at


def _write(path: Path, data: bytes, *, durable: bool) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        if durable:
            os.fsync(file.fileno())


def _read(path: Path) -> Copy | None:
    """Read the head of a copy. Returns None if it is none, or its state is not there in its full length."""
    state = path.with_suffix(".safetensors")
    try:
        head, at = _HEAD.decode(path.read_bytes())
        split_uid(head.uid)
        whole = state.stat().st_size == head.size and path.name.startswith(f"{head.uid}~")
    except (msgspec.MsgspecError, ValueError, OSError, RecursionError):
        return None
    return Copy(head, state, at) if whole else None
