"""Orders to a running server: put states that were saved elsewhere in the place of its experts' own.

A batch passes by. A notebook that resumes a run orders this of the servers that it has started (`launch/runners`); no
remote call can. All servers check first, and only if none refuses they load. Meanwhile they give no expert away only to
make loads even. What was loaded is in the next epoch, so that no older copy counts, however far that has come.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial

import trio

from labkit.errors import CheckpointError, RPCError
from labkit.server.checkpoints import Progress, load_expert, save_expert
from labkit.server.holdings import Holdings
from labkit.server.ownership import FolderClaim

logger = logging.getLogger(__name__)

KEPT = 60.0  # seconds for which an expert that was checked is not given away to make loads even; then it is loaded
HAND_OVER_TIME = 10.0  # seconds in which a hand-over that is under way has ended
LOOK_AGAIN = 0.02  # seconds between two looks whether it has


@dataclass(frozen=True, eq=False)
class LoadOrder:
    """An order to load experts.

    Args:
        folder: Where their checkpoints are.
        uids: The experts.
        check_only: Whether to find out if that would go well, and to change nothing.
        answer: Called with what went wrong, in words; with an empty text if nothing did.
    """

    folder: str
    uids: Sequence[str]
    check_only: bool
    answer: Callable[[str], object]


async def carry_out_loads(
    holdings: Holdings,
    orders: trio.MemoryReceiveChannel[LoadOrder],
    checkpoint_dir: str | None,
    saved: MutableMapping[str, Progress],
    keep: int = 1,
    claim: FolderClaim | None = None,
) -> None:
    """Carry out orders to load, one after the other, until cancelled.

    Args:
        holdings: The experts.
        orders: Where orders come from.
        checkpoint_dir: Where this server saves its experts. What was loaded is saved there at once, so that a server
            that is killed and restarted carries on from it.
        saved: How far each expert had learnt when it was saved; see `keep_checkpoints`.
        keep: Checkpoints of each expert to keep.
        claim: Says which experts this server saves there; None for all.
    """
    async for order in orders:
        try:
            for uid in order.uids:
                await _carry_out(holdings, order, uid, checkpoint_dir, saved, keep, claim)
        except (CheckpointError, RPCError, OSError, ValueError) as error:
            order.answer(str(error) or repr(error))
        except Exception as error:  # no memory, say: the server goes on, and whoever ordered it is told
            logger.exception("experts could not be loaded")
            order.answer(repr(error))
        else:
            order.answer("")


async def _carry_out(
    holdings: Holdings, order: LoadOrder, uid: str, checkpoint_dir: str | None, saved: MutableMapping[str, Progress],
    keep: int, claim: FolderClaim | None,
) -> None:  # fmt: skip
    with trio.move_on_after(HAND_OVER_TIME):  # it may be about to be given to another server
        while holdings.is_on_hold(uid):  # noqa: ASYNC110, it takes milliseconds
            await trio.sleep(LOOK_AGAIN)
    backend = holdings.backend(uid)
    if backend is None:
        raise CheckpointError(f"this server does not hold expert {uid}")
    state = await trio.to_thread.run_sync(partial(load_expert, order.folder, uid, kind=backend.kind))
    if state is None:
        raise CheckpointError(f"there is no checkpoint of {uid} in {order.folder}")
    backend.check_state(state)
    if order.check_only:
        holdings.keep(uid, KEPT)
        return
    await holdings.load(uid, state)
    saved.pop(uid, None)
    if checkpoint_dir is not None and (claim is None or claim.owns(uid)):
        await trio.to_thread.run_sync(partial(save_expert, checkpoint_dir, uid, state, kind=backend.kind, keep=keep))
