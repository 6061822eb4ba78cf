"""Views of the directory: one that adds the experts on back-off, one that leaves some experts out.

On a batch's way, `client/dispatch` hands one of them to `client/beam_search`, instead of the directory itself, when the
first search has found no expert, or when experts have failed and their rows need others.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from labkit.directory.directory import Directory
from labkit.directory.index import Children
from labkit.expert_uid import parent


class _View:
    """Reads the directory and changes what it returns, by `_change`."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory

    def cached(self, prefixes: Iterable[str]) -> dict[str, Children]:
        """See `Directory.cached`."""
        found = self._directory.cached(prefixes)
        return {prefix: self._change(prefix, children) for prefix, children in found.items()}

    async def children(self, prefixes: Iterable[str]) -> dict[str, Children]:
        """See `Directory.children`."""
        found = await self._directory.children(prefixes)
        return {prefix: self._change(prefix, children) for prefix, children in found.items()}

    def _change(self, prefix: str, children: Children) -> Children:
        raise NotImplementedError


class WithBackingOff(_View):
    """The directory with the experts that are on back-off: where no others are left, they are worth a try."""

    def _change(self, prefix: str, children: Children) -> Children:
        backing_off = {parent(uid)[1]: info for uid, info in self._directory.backing_off([prefix]).items()}
        return Children(children.inner, {**backing_off, **children.experts})


class WithoutExperts(_View):
    """The directory without some experts, such as those that failed in this pass."""

    def __init__(self, directory: Directory, uids: Collection[str]) -> None:
        super().__init__(directory)
        self._uids = uids

    def _change(self, prefix: str, children: Children) -> Children:
        others = {c: info for c, info in children.experts.items() if info.uid not in self._uids}
        return Children(children.inner, others)
