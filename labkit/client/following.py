"""Following: calls go on at the servers that carry experts on whose own was lost.

On a batch's way: `client/dispatch` asks here when rows of a backward pass can't have enough answers any more. Their
experts have answered the forward pass, and no others can take their places. `client/expert` asks, too, since it calls
one expert and no other; and so does who reads an expert's whole state. Where there are copies, others serve them within
seconds.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
import trio
from torch import Tensor

from labkit.client.gather import RowGroup
from labkit.directory import Directory
from labkit.errors import ConnectionLost, RPCError, UnknownExpert
from labkit.expert_uid import ExpertInfo, parent

FOLLOW_TIME = 8.0  # seconds in which an expert is carried on, if it is at all
LOOK_AGAIN = 0.2  # seconds between two looks for it

T = TypeVar("T")


async def carried_on(
    directory: Directory, requests: Sequence[RowGroup], failed: Mapping[str, RPCError], short: Tensor, deadline: float
) -> list[RowGroup]:
    """Wait until other servers serve the experts of some rows.

    Args:
        directory: Where they are found.
        requests: Those of the pass.
        failed: The experts that have failed, and why.
        short: The rows that lack answers.
        deadline: Of the pass, on trio's clock.

    Returns:
        The same requests to the servers that have the experts now, for these rows; none for experts that nobody carries
        on, as where there is no copy of them.
    """
    lost = [
        RowGroup(request.expert, request.rows[mine], request.slots[mine])
        for request in requests
        if isinstance(failed.get(request.expert.uid), ConnectionLost)
        if (mine := torch.isin(request.rows, short)).any()
    ]
    copied = await _copied(directory, [request.expert for request in lost], deadline)
    lost = [request for request in lost if request.expert.uid in copied]
    wanted = {row for request in lost for row in request.rows.tolist()}
    found: list[RowGroup] = []
    with trio.move_on_at(min(deadline, trio.current_time() + FOLLOW_TIME)):
        while wanted:
            await directory.look_up({parent(request.expert.uid)[0] for request in lost})
            newest = [directory.newest(request.expert) for request in lost]
            found = [
                replace(request, expert=info)
                for request, info in zip(lost, newest, strict=True)
                if info.epoch > request.expert.epoch
            ]
            if wanted <= {row for request in found for row in request.rows.tolist()}:
                break
            await trio.sleep(LOOK_AGAIN)
    return found


async def _copied(directory: Directory, experts: Sequence[ExpertInfo], deadline: float) -> set[str]:
    """Which of these experts have copies. Where we know of none, it may have been made since we read of the expert."""
    copied = {info.uid for info in experts if info.copies}
    if others := [info for info in experts if not info.copies]:
        with trio.move_on_at(deadline):
            now = await directory.holders(info.uid for info in others)
            copied |= {info.uid for info in others if info.uid in now and _goes_on(info, now[info.uid])}
    return copied


def _goes_on(before: ExpertInfo, now: ExpertInfo) -> bool:
    return bool(now.copies) or now.epoch > before.epoch


async def successor(
    directory: Directory, info: ExpertInfo, deadline: float, *, anew: bool = False
) -> ExpertInfo | None:
    """Find the server that has an expert now, and wait for it where there is a copy from which one goes on with it.

    Args:
        directory: Where it is found.
        info: The expert, where it was.
        deadline: Of the call, on trio's clock.
        anew: Whether only a server will do that has taken it over since, as after a call that may have changed it.

    Returns:
        Where it is; None if nobody has it, as far as is known.
    """
    prefix, coordinate = parent(info.uid)
    with trio.move_on_at(min(deadline, trio.current_time() + FOLLOW_TIME)):
        while True:
            found = (await directory.look_up([prefix]))[prefix].experts.get(coordinate)
            if found is not None and (found.epoch > info.epoch if anew else found != info):
                return found
            if not _has_copies(directory, info):
                return None
            await trio.sleep(LOOK_AGAIN)
    return None


async def read_where_it_is(directory: Directory, info: ExpertInfo, read: Callable[[ExpertInfo], Awaitable[T]]) -> T:
    """Read something of an expert, anew from whoever has it then if its server has given it away or is gone.

    Args:
        directory: Where that is found.
        info: The expert, where it was last.
        read: Reads it there; it may be called several times.

    Returns:
        What `read` returned.

    Raises:
        RPCError: As `read`, where nobody else has the expert.
    """
    until = math.inf
    while True:
        try:
            return await read(info)
        except (ConnectionLost, UnknownExpert):
            until = min(until, trio.current_time() + FOLLOW_TIME)
            found = await successor(directory, info, until)
            if found is None:
                raise
            until = math.inf if found.epoch > info.epoch else until  # another has taken it over
            info = found
        await trio.sleep(LOOK_AGAIN)


def _has_copies(directory: Directory, info: ExpertInfo) -> bool:
    """Whether there are copies of an expert that does not answer, as far as we know."""
    known = directory.suspended([parent(info.uid)[0]]).get(info.uid, info)
    return bool(info.copies or known.copies)
