"""`labkit serve`: serve experts from a terminal, in a new swarm or in one that is running, until Ctrl-C.

What a notebook does with `Swarm()` or `Swarm.join`, and then `swarm.serve`, with options of a command line. Now and
then it says how it goes.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import signal
import sys
import time
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from types import FrameType
from typing import Any

from labkit.cli.terminal import output_is_read
from labkit.contact import Contact
from labkit.errors import LabkitError, ServerFailed
from labkit.events import AddressChanged, AddressNews, CopyFailed, ExpertNews
from labkit.expert_protocol import clean_label
from labkit.launch.handle import ServerHandle
from labkit.launch.planning import grid_name
from labkit.relay.limits import RelayLimits
from labkit.server.layers import BUILTIN_KINDS
from labkit.server.optimizer import BackendConfig
from labkit.server.statistics import ServerStatistics
from labkit.swarm import Swarm
from labkit.view.collect.moves import Move, MoveWords

DEFAULT_HIDDEN = 64  # width of the experts of a new grid
DEFAULT_EXPERTS = 8  # of a new grid
REPORT_PERIOD = 30.0  # seconds between two lines that say how it goes
TERMINAL_PERIOD = 2.0  # the same where one line is written again and again
REACH_TIMEOUT = 12.0  # seconds in which others find out whether they reach the server
REACH_LOOK_PERIOD = 0.05  # seconds between two looks whether they have
MAX_NEWS = 1_000  # that are not printed yet
LOOK_PERIOD = 2.0  # seconds between two looks whether somebody still reads the output


def serve(options: argparse.Namespace) -> None:
    """Start or join a swarm, serve experts in this process, print the invitation, and stay until stopped.

    Ctrl-C or SIGTERM is a clean stop: the experts are handed over to other servers, if there are any, or else saved, if
    there is a folder for it. A second one does not wait for that. So is the end of whoever reads the output, such as
    `head`.

    Args:
        options: The options of `labkit serve`.

    Raises:
        ValueError: An option is wrong.
        LabkitError: The swarm could not be joined, or the server has ended by itself. The message says why.
    """
    before = signal.signal(signal.SIGTERM, _raise_interrupt)
    try:
        _serve_until_stopped(options)
    finally:
        signal.signal(signal.SIGTERM, before)


def _serve_until_stopped(options: argparse.Namespace) -> None:
    arguments = _serve_arguments(options)  # first, so that nothing is started for a wrong one
    with open_swarm(options, "serve", relay=options.relay) as swarm:
        report = Report(swarm, rewrite=sys.stdout.isatty())
        news: deque[AddressNews | ExpertNews] = deque(maxlen=MAX_NEWS)
        try:
            (server,) = _start(options, swarm, arguments)
            _until_reach_is_known(server)
            print(repr(swarm))
            print_invitation(swarm)
            print("serving until Ctrl-C", flush=True)
            swarm.on_event(lambda event: news.append(event) if isinstance(event, AddressNews | ExpertNews) else None)
            while server.state == "running":
                server.wait(LOOK_PERIOD)
                report.write_all_news(news)
                if not output_is_read():
                    raise KeyboardInterrupt
                if server.state == "running" and not options.quiet:
                    report.write_if_due(server)
            report.end_line()
            raise ServerFailed(f"the server ended: {server.failure or server.state}")
        except KeyboardInterrupt:
            report.end_line()
            with suppress(OSError):
                print("stopping …", file=sys.stderr)
            for server in swarm.servers:
                server.stop()
            report.write_all_news(news, last=True)


def _start(options: argparse.Namespace, swarm: Swarm, arguments: dict[str, Any]) -> list[ServerHandle]:
    """Start the server: with experts of a kind, or with those of a Transformers model."""
    if options.experts_of is None:
        return swarm.serve(options.expert, isolation="task", **_defaults(options, swarm), **arguments)
    from labkit.integrations.serving_experts import serve_experts

    given = {name: value for name, value in arguments.items() if name not in ("grid", "spare")}
    return serve_experts(
        swarm, options.experts_of, experts=options.experts, lora=options.lora, isolation="task", **given
    )


def _until_reach_is_known(server: ServerHandle) -> None:
    """Wait a few seconds until others, if there are any, have tried to reach the server."""
    deadline = time.monotonic() + REACH_TIMEOUT
    while server.state == "running" and server.lifecycle.reachability is None and time.monotonic() < deadline:
        server.wait(REACH_LOOK_PERIOD)


def print_invitation(swarm: Swarm) -> None:
    """Print how others join a swarm, and how they see it."""
    invitation = swarm.invite()
    print(f"\ninvitation: {invitation}")
    if invitation.note:
        print(invitation.note)
    print(f"to see it as a web page: labkit watch {shlex.quote(invitation)}")


def _raise_interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


class Report:
    """Says now and then how a server is doing: a line if it was called or something has changed, else nothing.

    Args:
        swarm: The swarm.
        rewrite: Whether one line is written again and again, as a terminal can show it.
    """

    def __init__(self, swarm: Swarm, rewrite: bool) -> None:
        self.period = TERMINAL_PERIOD if rewrite else REPORT_PERIOD
        self._swarm = swarm
        self._rewrite = rewrite
        self._requests = 0
        self._at = time.monotonic()
        self._due = self._at + self.period
        self._said = ""  # all but the rate
        self._width = 0  # of the line that stands in the terminal
        self._moves = deque[Move](maxlen=MAX_NEWS)
        self._move_words = MoveWords(self._name)
        self._failed_copies: set[tuple[str, str]] = set()  # that were told: servers and causes

    def write_if_due(self, server: ServerHandle) -> None:
        """Write a line, if there is news and the last look for it is long enough ago."""
        if time.monotonic() >= self._due:
            self._due = time.monotonic() + self.period
            self.write(server)

    def write(self, server: ServerHandle) -> None:
        """Write a line, if there is news."""
        try:
            statistics, peers = server.statistics(), self._swarm.peers()
        except LabkitError:
            return  # busy, or about to end; the next line will say more
        now, requests = time.monotonic(), sum(statistics.expert_requests)
        rate = max(0, requests - self._requests) / max(1e-9, now - self._at)
        self._requests, self._at = requests, now
        said = f"{_experts(statistics)}, {requests:,} calls answered, {_count(peers, 'peer')}"
        waiting = f", {statistics.queued_requests:,} waiting" if statistics.queued_requests else ""
        if said != self._said or self._rewrite:
            self._print(f"{time.strftime('%H:%M:%S')}  {said}: {rate:,.1f} calls/s{waiting}")
        self._said = said

    def write_all_news(self, news: deque[AddressNews | ExpertNews], *, last: bool = False) -> None:
        """Say what has happened, in a line each.

        Args:
            news: The events, which are taken out.
            last: Whether no more will come.
        """
        while news:
            event = news.popleft()
            if isinstance(event, AddressNews):
                self.write_news(event)
            elif not isinstance(event, CopyFailed):
                self._moves.append(event)
            elif (event.address, event.cause) not in self._failed_copies and len(self._failed_copies) < MAX_NEWS:
                self._failed_copies.add((event.address, event.cause))
                self._write_line(f"{event.uid} is not copied to {event.address}: {event.detail}")
        for _, words in self._move_words.take(self._moves, time.monotonic(), last=last):
            self._write_line(words)

    def _name(self, address: str) -> str:
        own = (server.contact for server in self._swarm.servers)
        here = any(contact is not None and contact.endpoint == address for contact in own)
        return "this server" if here else address

    def write_news(self, event: AddressNews) -> None:
        """Say in a line that the swarm's node or server has another address, or is reached or not."""
        if isinstance(event, AddressChanged):
            said = f"{event.before} is {event.contact.endpoint} now: {event.reason}"
            if event.contact.key == Contact.from_invitation(self._swarm.invite()).key:
                said += f"; invitation: {self._swarm.invite()}"
        else:
            said = f"{event.contact.endpoint}: {event.text}"
        self._write_line(said)

    def _write_line(self, said: str) -> None:
        self.end_line()
        with suppress(OSError):
            print(f"{time.strftime('%H:%M:%S')}  {said}", flush=True)

    def _print(self, line: str) -> None:
        with suppress(OSError):  # the terminal is gone; the experts are not
            if self._rewrite:
                print(f"\r{line.ljust(self._width)}", end="", flush=True)
                self._width = len(line)
            else:
                print(line, flush=True)

    def end_line(self) -> None:
        """Let what is printed next begin on a line of its own."""
        if self._width:
            with suppress(OSError):
                print(flush=True)
            self._width = 0


def _experts(statistics: ServerStatistics) -> str:
    """Which experts a server has, and copies of which of others: 6 experts (2 adopted), 4 copies of others."""
    said, copies = _count(len(statistics.experts), "expert"), statistics.copies
    if copies is not None and copies.adopted:
        said += f" ({len(copies.adopted):,} adopted)"
    if copies is not None and copies.kept:
        said += f", {_count(copies.kept, 'copy', 'copies')} of others"
    return said


def _count(number: int, word: str, more: str = "") -> str:
    return f"{number:,} {word if number == 1 else more or word + 's'}"


def open_swarm(options: argparse.Namespace, name: str, *, relay: bool | RelayLimits) -> Swarm:
    """Start or join a swarm.

    Args:
        options: The options of `labkit serve` or `labkit relay`.
        name: The swarm's name.
        relay: See `Swarm`.

    Raises:
        ValueError: An option is wrong.
        LabkitError: The swarm cannot be started or joined.
    """
    given = {
        "listen": options.listen,
        "announce": options.announce,
        "secure": options.secure or None,
        "key": options.key,
    }
    network: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if options.join is None:
        return Swarm(name, members=options.member, relay=relay, **network)
    if options.member:
        raise ValueError("--member is for whoever starts a private swarm: leave it out with --join")
    return Swarm.join(options.join, name=name, relay=relay, **network)


def _serve_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `Swarm.serve` that the command line gives."""
    of_kind_too = {"--grid": options.grid, "--hidden": options.hidden, "--option": options.option}
    said = [name for name, value in of_kind_too.items() if value] + ["--spare"] * options.spare
    said += ["--expert"] * (options.expert != "ffn")
    if options.experts_of is not None and said:
        raise ValueError(f"--experts-of says what the experts are: leave {' and '.join(said)} out")
    if options.lora is not None and options.experts_of is None:
        raise ValueError("--lora is for --experts-of, the experts of a Transformers model")
    label = options.label or ""
    if label != clean_label(label):
        raise ValueError(f"--label {label!r}: at most 64 characters in one line")
    of_kind = read_options(options.option or ())
    if options.hidden is not None:
        if "hidden" in of_kind:
            raise ValueError("give either --hidden N or --option hidden=N")
        of_kind["hidden"] = options.hidden
    arguments: dict[str, Any] = {
        "grid": options.grid,
        "name": options.name,
        "checkpoint_dir": options.checkpoint_dir,
        "checkpoint_period": options.checkpoint_period,
        "checkpoint_keep": options.checkpoint_keep,
        "backups": options.backups,
        "spare": options.spare,
        "backend": BackendConfig(
            optimizer=options.optimizer, lr=options.lr, clip_grad_norm=options.clip, device=options.device
        ),
        "threads": options.threads,
        "label": label,
    }
    others = {"experts", "uids", "servers", "isolation", "seed", "on", "workers", "resources"}
    if clash := of_kind.keys() & {*arguments, *others}:
        raise ValueError(f"--option {min(clash)}=…: not an option of a kind of experts; see labkit serve --help")
    return arguments | of_kind


def _defaults(options: argparse.Namespace, swarm: Swarm) -> dict[str, Any]:
    """What the command line leaves out: in a new grid, how many experts, and how wide they are."""
    arguments: dict[str, Any] = {"experts": options.experts}
    if grid_name(options.expert, options.name, None) in swarm.grids():
        return arguments
    if options.experts is None and options.grid is None:
        arguments["experts"] = DEFAULT_EXPERTS
    given = {"hidden"} if options.hidden is not None else read_options(options.option or ()).keys()
    if options.expert in BUILTIN_KINDS and "hidden" not in given:
        arguments["hidden"] = DEFAULT_HIDDEN
    return arguments


def read_options(texts: Iterable[str]) -> dict[str, Any]:
    """Read options of a kind of experts, each `NAME=VALUE`.

    A value is a whole number, a number, true, false, none, or text; a text in double quotes is text in any case.

    Raises:
        ValueError: One of them has no name or no value, or a name is given twice.
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name.isidentifier():
            raise ValueError(f"--option {text!r}: write NAME=VALUE, such as --option heads=4")
        if name in found:
            raise ValueError(f"--option {text!r}: {name} is given twice")
        found[name] = _read_value(value.strip())
    return found


WORDS = {"true": True, "false": False, "none": None}


def _read_value(text: str) -> Any:
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    for read in (int, float):
        try:
            number = read(text)
        except ValueError:
            continue
        return number if math.isfinite(number) else text
    if len(text) >= 2 and text.startswith('"') and text.endswith('"'):
        try:
            return json.loads(text)
        except ValueError:
            pass
    return text
