"""Refusals: experts that are left out for another reason than that they are gone or late. The caller is told.

On a batch's way: `client/dispatch` asks here, when a pass has ended, what to say about the experts that failed. An
expert that is gone or late is ordinary; others take its rows. One that refuses them is not: the pass goes on, but a
model may be training without the experts that somebody meant it to have.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from labkit.client.session import Session
from labkit.errors import (
    BadReply,
    BadRequest,
    CallCancelled,
    ConnectionLost,
    DeadlineExceeded,
    ExpertsRefused,
    MessageTooLarge,
    NonFiniteTensor,
    NotAdmitted,
    Overloaded,
    RemoteFailure,
    RPCError,
    SecurityMismatch,
    UnknownExpert,
    UnknownMethod,
    VersionMismatch,
)
from labkit.expert_uid import ExpertInfo

logger = logging.getLogger(__name__)

GONE_OR_LATE = (ConnectionLost, DeadlineExceeded, UnknownExpert, CallCancelled)
SHUT_OUT = (NotAdmitted, SecurityMismatch)  # connections are lost for these, and yet nobody is gone
MAX_CAUSES = 4  # that an error lists

MEANINGS: dict[type[RPCError], str] = {
    BadRequest: "such rows are not what it takes",
    NonFiniteTensor: "numbers were not finite",
    MessageTooLarge: "a single row is more than its server accepts in a message",
    UnknownMethod: "its server runs another version of labkit",
    VersionMismatch: "its server runs another version of labkit",
    RemoteFailure: "its own code failed",
    BadReply: "its answer is of no use",
    Overloaded: "its server has too much to do: serve more experts, or train with fewer trainers",
    NotAdmitted: "its server does not admit us",
    SecurityMismatch: "only one side encrypts",
}


def is_refusal(error: RPCError) -> bool:
    """Whether the expert is neither gone nor late."""
    return isinstance(error, SHUT_OUT) or not isinstance(error, GONE_OR_LATE)


def tell(
    session: Session, name: str, direction: str, failed: Mapping[str, RPCError], rows: Mapping[str, int],
    experts: Mapping[str, ExpertInfo],
) -> None:  # fmt: skip
    """Log a warning about experts that refused rows in a pass that goes on: once for each grid and kind of refusal.

    Args:
        session: The swarm.
        name: The grid.
        direction: "forward" or "backward".
        failed: The errors of the experts that failed, by uid.
        rows: How many rows each of them was sent in vain.
        experts: Where these experts live.
    """
    for uid, error in failed.items():
        if is_refusal(error) and session.first_time(f"refused {name} {direction} {type(error).__name__}"):
            went_on = (
                "they went on without it"
                if direction == "forward"
                else "it did not learn from them, and their gradients lack its part"
            )
            logger.warning(
                "expert %s at %s refused %d rows of the grid %r in a %s pass, and %s. %s: %s (This is said once for "
                "each grid and kind of refusal.)",
                uid, experts[uid].contact.endpoint, rows[uid], name, direction, went_on,
                _meaning(error).capitalize(), _end_of_sentence(_in_words(error, uid, experts[uid])),
            )  # fmt: skip


def refused_by_all(
    name: str, direction: str, failed: Mapping[str, RPCError], experts: Mapping[str, ExpertInfo], rows: str
) -> ExpertsRefused | None:
    """The error if all experts that failed have refused; None if one of them is gone, late or overloaded.

    Args:
        name: The grid.
        direction: "forward" or "backward".
        failed: The errors of the experts, by uid.
        experts: Where these experts live.
        rows: Which rows got too few answers, in words.
    """
    if not failed or any(not is_refusal(error) or isinstance(error, Overloaded) for error in failed.values()):
        return None
    causes: dict[str, list[str]] = {}
    for uid, error in sorted(failed.items()):
        causes.setdefault(_in_words(error, uid, experts[uid]), []).append(uid)
    if len(causes) == 1:
        (cause,), n = causes, len(failed)
        who = f"expert {next(iter(failed))}" if n == 1 else f"all {n} experts of the grid {name!r} that were asked"
        said = f"{who} refused: {cause}"
    else:
        listed = [f"{', '.join(uids[:3])}{', …' * (len(uids) > 3)}: {cause}" for cause, uids in causes.items()]
        more = f"; and {len(listed) - MAX_CAUSES} other reasons" if len(listed) > MAX_CAUSES else ""
        said = (
            f"all {len(failed)} experts of the grid {name!r} that were asked refused: "
            f"{'; '.join(listed[:MAX_CAUSES])}{more}"
        )
    refused = ExpertsRefused(f"{_end_of_sentence(said)} So {rows} in a {direction} pass got too few answers")
    refused.recoverable = any(each.recoverable for each in failed.values())
    return refused


def alike(failed: Mapping[str, RPCError], experts: Mapping[str, ExpertInfo]) -> bool:
    """Whether all these experts refused for one reason, which others of the same grid would have, too."""
    reasons = {_in_words(error, uid, experts[uid]) for uid, error in failed.items() if not error.recoverable}
    return len(reasons) == 1 and not any(error.recoverable for error in failed.values())


def _in_words(error: RPCError, uid: str, expert: ExpertInfo) -> str:
    """What the expert said, without its name, since others may say the same."""
    said = str(error).removeprefix(f"{expert.contact.endpoint}: ")
    return said.replace(f"expert {uid}", "it").replace(uid, "it").removesuffix(".") or error.cause


def _meaning(error: RPCError) -> str:
    return next((MEANINGS[kind] for kind in type(error).__mro__ if kind in MEANINGS), "it would not answer")


def _end_of_sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."
