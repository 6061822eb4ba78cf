"""The life of a local server as a state machine: a table of what each order and each event leads to.

`ServerLifecycle` asks `next_state` before it does anything, and does what the change of state calls for. A runner is
what serves: a child process, or a task of the lab thread (see `runners`). No batch passes here.
"""

from __future__ import annotations

from enum import Enum


class ServerState(Enum):
    """Where a server is in its life."""

    STOPPED = "stopped"  # it was never started, or has ended cleanly
    KILLED = "killed"  # it was killed
    FAILED = "failed"  # it could not start, ended by itself, or could not save its experts
    STARTING = "starting"  # a runner is starting, once all runners that were killed before have ended
    RUNNING = "running"  # its runner serves
    SAVING = "saving"  # it was stopped; its runner saves the experts
    RESTARTING = "restarting"  # its runner saves the experts; the next one starts afterwards
    GIVEN_UP = "given up"  # as RESTARTING, but the restart was interrupted: no other runner starts

    @property
    def word(self) -> str:
        """The word that users see: starting, running, stopped, killed or failed."""
        return _WORDS.get(self, self.value)

    @property
    def at_rest(self) -> bool:
        """Whether nothing runs and nothing is about to run."""
        return self in (ServerState.STOPPED, ServerState.KILLED, ServerState.FAILED)

    @property
    def saves(self) -> bool:
        """Whether the runner has been asked to save its experts and to end."""
        return self in (ServerState.SAVING, ServerState.RESTARTING, ServerState.GIVEN_UP)


_WORDS = {ServerState.SAVING: "stopped", ServerState.RESTARTING: "starting", ServerState.GIVEN_UP: "failed"}


class ServerEvent(Enum):
    """What happens to a server: the orders that it is given, and what happens by itself."""

    # Orders
    START = "start"  # start it, or restart it: save first if it runs
    STOP = "stop"  # save the experts, then end
    DISCARD = "discard"  # end now, and save nothing: what the swarm's end does where no checkpoint outlives it
    KILL = "kill"  # end as a crash would
    # By itself
    READY = "ready"  # the runner serves
    START_FAILED = "start failed"  # the start raised, took too long, or was interrupted
    ENDED = "ended"  # the runner has ended without an order
    SAVED = "saved"  # the runner has saved its experts and ended
    NOT_SAVED = "not saved"  # the runner has ended without saving its experts, or takes too long


def _table() -> dict[tuple[ServerState, ServerEvent], ServerState]:
    stopped, killed, failed, starting, running, saving, restarting, given_up = ServerState
    never = None  # cannot happen in this state
    # fmt: off
    rows = {
        #            START       STOP      DISCARD  KILL     READY    START_FAILED  ENDED   SAVED     NOT_SAVED
        stopped:    (starting,   stopped,  stopped, stopped, never,   never,        never,  never,    never),
        killed:     (starting,   killed,   killed,  killed,  never,   never,        never,  never,    never),
        failed:     (starting,   failed,   failed,  failed,  never,   never,        never,  never,    never),
        starting:   (starting,   stopped,  stopped, killed,  running, failed,       never,  never,    never),
        running:    (restarting, saving,   stopped, killed,  never,   never,        failed, never,    never),
        saving:     (restarting, saving,   stopped, killed,  never,   never,        never,  stopped,  failed),
        restarting: (restarting, saving,   stopped, killed,  never,   given_up,     never,  starting, failed),
        given_up:   (restarting, given_up, stopped, killed,  never,   never,        never,  failed,   failed),
    }
    # fmt: on
    return {
        (state, event): after
        for state, row in rows.items()
        for event, after in zip(ServerEvent, row, strict=True)
        if after is not None
    }


TRANSITIONS = _table()


def next_state(state: ServerState, event: ServerEvent) -> ServerState:
    """The state that an order or an event leads to. The four orders may come in any state.

    Raises:
        ValueError: This event cannot happen in this state.
    """
    if (state, event) not in TRANSITIONS:
        raise ValueError(f"a server that is {state.value} cannot see the event {event.value!r}")
    return TRANSITIONS[state, event]
