"""All errors that labkit raises on purpose. They are one family: `except lk.LabkitError` catches them all.

A failed remote call is an `RPCError`. Its `cause` is the word that events, counters and widgets show. Its `code` is the
word that crosses the wire, so that the caller gets the class that the other side raised.
"""

from __future__ import annotations

from typing import ClassVar


class LabkitError(Exception):
    """The base of all errors that labkit raises on purpose.

    `recoverable` is False for what cannot get better by itself, however often it is tried.
    """

    recoverable: bool = True


# ---------------------------------------------------------------- failed remote calls


class RPCError(LabkitError):
    """A remote call returned no result. `cause` says why; it is one of the words in `CAUSES`."""

    cause: ClassVar[str] = "failed"
    code: ClassVar[str] = "failed"


class DeadlineExceeded(RPCError):
    """No answer came before the deadline."""

    cause = "timeout"
    code = "deadline"


class ConnectionLost(RPCError):
    """The peer could not be reached, or the connection broke before the answer came."""

    cause = "lost"
    code = "lost"


class NoWay(ConnectionLost):
    """This machine has no way to any address of the peer, as where one has only IPv4 and the other only IPv6."""


class HandshakeFailed(ConnectionLost):
    """The two sides of a connection could not agree: wrong key or protocol, or not admitted."""


class WrongServerKey(HandshakeFailed):
    """The peer at this address does not hold the key that was expected, or is not labkit at all."""


class SecurityMismatch(HandshakeFailed):
    """One side encrypts (CURVE) and the other does not."""

    recoverable = False


class NotAdmitted(HandshakeFailed):
    """The swarm is private and our key is not on its list."""

    recoverable = False


class Overloaded(RPCError):
    """The peer has too much to do and said so at once. It computed nothing."""

    cause = "overloaded"
    code = "overloaded"


class RequestRefused(RPCError):
    """The peer understood the request and refused it."""

    cause = "refused"
    code = "refused"


class BadRequest(RequestRefused):
    """The method does not take such a body or such tensors."""

    code = "bad_request"
    recoverable = False


class UnknownMethod(RequestRefused):
    """The peer has no such method."""

    code = "unknown_method"
    recoverable = False


class UnknownExpert(RequestRefused):
    """The server does not hold this expert."""

    code = "unknown_expert"


class NonFiniteTensor(RequestRefused):
    """Inputs or gradients contain NaN or infinity. The expert was not changed."""

    code = "non_finite"


class MessageTooLarge(RequestRefused):
    """The message is larger than the receiver accepts."""

    code = "too_large"
    recoverable = False


class VersionMismatch(RequestRefused):
    """The peer speaks another version of labkit's protocol."""

    code = "version"
    recoverable = False


class BadReply(RPCError):
    """The peer's answer is no valid reply to this request."""

    cause = "bad_reply"
    code = "bad_reply"


class CallCancelled(RPCError):
    """The caller gave up before the call was answered."""

    cause = "cancelled"
    code = "cancelled"


class RemoteFailure(RPCError):
    """The peer failed while it worked on the request. The text is the peer's."""


CAUSES = ("timeout", "refused", "overloaded", "lost", "bad_reply", "cancelled", "failed")

BY_CODE: dict[str, type[RPCError]] = {
    cls.code: cls
    for cls in (
        DeadlineExceeded, ConnectionLost, Overloaded, RequestRefused, BadRequest, UnknownMethod, UnknownExpert,
        NonFiniteTensor, MessageTooLarge, VersionMismatch, BadReply, CallCancelled, RemoteFailure,
    )
}  # fmt: skip


# ---------------------------------------------------------------- the wire, before any call


class MalformedMessage(LabkitError):
    """These frames are no labkit message. Raised by the decoder, never sent."""


# ---------------------------------------------------------------- joining and finding


class InviteError(LabkitError, ValueError):
    """This text is no invitation."""


class JoinError(LabkitError):
    """A swarm could not be joined. The text says at which address, why, and what to try."""


class ExpertsTaken(LabkitError, ValueError):
    """The places are taken: another server, which is alive, serves these experts."""


class NoExperts(LabkitError):
    """No live expert was found. Not `recoverable` if the swarm knows of no such grid at all."""


class NotEnoughExperts(LabkitError):
    """Fewer than `k_min` experts answered some rows. The text names experts and causes."""


class ExpertsRefused(NotEnoughExperts):
    """All experts that were asked for some rows refused them. The text gives each reason once.

    Not `recoverable` if they would refuse such rows every time, as those of another width.
    """


# ---------------------------------------------------------------- the notebook


class SwarmClosed(LabkitError):
    """The swarm is closed, or its lab thread has ended."""


class ServerFailed(LabkitError):
    """An expert server could not be started, or ended by itself."""


class CheckpointError(LabkitError):
    """A checkpoint cannot be read into this expert."""


class DataNotFound(LabkitError, FileNotFoundError, ValueError):
    """A data set is not on disk, or cannot be read, and cannot be loaded from the hub."""


class TrainingFailed(LabkitError):
    """Training stopped because too many batches in a row failed."""
