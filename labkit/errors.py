"""Everything that labkit raises on purpose, as one family.

A failed remote call is an `RPCError`. Its `cause` is the word that events, counters and widgets show; its `code` is the
word that crosses the wire, so that the caller gets the same class that the other side raised.
"""

from __future__ import annotations

from typing import ClassVar


class LabkitError(Exception):
    """Base of every error that labkit raises on purpose."""


# ---------------------------------------------------------------- failed remote calls


class RPCError(LabkitError):
    """A remote call that did not return a result. `cause` says why, in one of the words of `CAUSES`."""

    cause: ClassVar[str] = "failed"
    code: ClassVar[str] = "failed"


class DeadlineExceeded(RPCError):
    """No answer came before the deadline, or the server dropped the work because the deadline had passed."""

    cause = "timeout"
    code = "deadline"


class ConnectionLost(RPCError):
    """The peer could not be reached, or the connection broke before the answer came."""

    cause = "lost"
    code = "lost"


class HandshakeFailed(ConnectionLost):
    """A connection was made, but the two sides could not agree: wrong key, wrong protocol, or not admitted."""


class WrongServerKey(HandshakeFailed):
    """The peer at this address does not hold the key that was expected (or does not speak labkit at all)."""


class SecurityMismatch(HandshakeFailed):
    """One side encrypts (CURVE) and the other does not."""


class NotAdmitted(HandshakeFailed):
    """The swarm is private and our key is not on its list."""


class Overloaded(RPCError):
    """The peer is full and said so at once; nothing was computed."""

    cause = "overloaded"
    code = "overloaded"


class RequestRefused(RPCError):
    """The peer understood the request and will not do it."""

    cause = "refused"
    code = "refused"


class BadRequest(RequestRefused):
    """The request's body or tensors are not what the method takes."""

    code = "bad_request"


class UnknownMethod(RequestRefused):
    """The peer has no such method."""

    code = "unknown_method"


class UnknownExpert(RequestRefused):
    """The server does not hold this expert."""

    code = "unknown_expert"


class NonFiniteTensor(RequestRefused):
    """Inputs or gradients contain NaN or infinity; nothing was changed."""

    code = "non_finite"


class MessageTooLarge(RequestRefused):
    """The message is over the size that the receiver accepts."""

    code = "too_large"


class VersionMismatch(RequestRefused):
    """The peer speaks another version of the protocol."""

    code = "version"


class BadReply(RPCError):
    """The peer answered with something that is not a valid reply to this request."""

    cause = "bad_reply"
    code = "bad_reply"


class CallCancelled(RPCError):
    """The caller gave the call up before it was answered."""

    cause = "cancelled"
    code = "cancelled"


class RemoteFailure(RPCError):
    """The peer failed while it worked on the request; the text is what it said."""


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
    """Frames that are not a labkit message. Raised by the decoder, never sent."""


# ---------------------------------------------------------------- joining and finding


class InviteError(LabkitError, ValueError):
    """A text that is not an invitation."""


class JoinError(LabkitError):
    """A swarm could not be joined; the text says for which address, why, and what to try."""


class NoExperts(LabkitError):
    """No live expert was found where one was looked for."""


class NotEnoughExperts(LabkitError):
    """Rows of a batch that fewer than `k_min` experts answered; names the experts and the causes."""


# ---------------------------------------------------------------- the notebook


class SwarmClosed(LabkitError):
    """The swarm (or its lab thread) is closed."""


class ServerFailed(LabkitError):
    """An expert server could not be started, or ended by itself."""


class CheckpointError(LabkitError):
    """A checkpoint that cannot be read into this expert."""


class DataNotFound(LabkitError, FileNotFoundError):
    """A data set is neither on disk nor to be had from the hub."""


class TrainingFailed(LabkitError):
    """Training stopped because too many batches in a row failed."""
