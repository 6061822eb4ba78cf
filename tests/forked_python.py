"""Python processes that are forked from one that has imported torch, since that import takes each a second and a half.

A third of what the suite computed were such imports. Where a test is not about how a process starts, `forked_python`
gives `subprocess.Popen` another way to do it: a template process, which imports torch once, forks for each command.
What comes out is a process like any other: a child of whoever asked, with arguments, an environment, a folder, streams
and, if wanted, a session of its own, and it ends as Python ends. labkit is not imported in the template, but in each.

Commands that the template cannot stand for, as they have other options of Python, are started as ever. So are all where
the system is not Linux.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import io
import json
import os
import random
import runpy
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = str(Path(__file__).parent.parent)
MODULES = ("torch", "trio", "zmq", "msgspec", "safetensors.torch")  # that the template imports
LARGEST = 1 << 17  # bytes of an order
PR_SET_CHILD_SUBREAPER = 36  # of Linux's prctl
AT_START = ("LANG", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH", "LD_PRELOAD", "OMP_NUM_THREADS")  # variables read once
TEMPLATE = "import sys; sys.path.append({!r}); from tests.forked_python import serve; serve({})"
PLAIN = subprocess.Popen

Order = dict[str, Any]  # what to run, as `order_of` says; besides its streams, which are sent along

# ---------------------------------------------------------------- whoever asks


class Template:
    """The process that forks. It ends with `close`, or with this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._prctl = ctypes.CDLL(None, use_errno=True).prctl
        with theirs:
            self.process = PLAIN(
                [sys.executable, "-P", "-c", TEMPLATE.format(ROOT, theirs.fileno())], pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL, start_new_session=True, env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ},
            )  # fmt: skip

    def fork(self, order: Order, streams: Sequence[int]) -> int:
        """Have a process forked, and adopt it: this process is the parent. Returns its id."""
        with self._lock:
            self._prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            try:
                socket.send_fds(self._socket, [json.dumps(order).encode()], list(streams))
                answer = self._socket.recv(100)
            finally:
                self._prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
        if not answer:
            raise OSError("the template process has ended")
        return int(answer)

    def close(self) -> None:
        self._socket.close()
        self.process.wait()


class ForkedPopen(subprocess.Popen[Any]):
    """`subprocess.Popen`, whose Python processes are forked by the template where that can be."""

    template: Template

    def _execute_child(self, args: Any, executable: Any, preexec_fn: Any, close_fds: Any, *rest: Any) -> None:
        pass_fds, folder, environment, _, _, shell, *streams, _, gid, gids, uid, umask, session, group = rest
        odd = any((executable, preexec_fn, shell, pass_fds, not close_fds, gid, gids, uid, umask != -1, group != -1))
        order = None if odd else order_of(args, os.environ if environment is None else environment, folder, session)
        if order is None:
            super()._execute_child(args, executable, preexec_fn, close_fds, *rest)  # type: ignore[misc]
            return
        read, _, _, write, _, write_errors = streams
        given = [own if stream == -1 else stream for own, stream in enumerate((read, write, write_errors))]
        try:
            self.pid = self.template.fork(order, given)
            self._child_created = True
        finally:
            self._close_pipe_fds(*streams)  # type: ignore[attr-defined]


def order_of(
    command: object, environment: Mapping[str, str], folder: str | os.PathLike[str] | None, session: bool
) -> Order | None:
    """What to fork in place of this command; None if it has to be started as ever."""
    if not isinstance(command, Sequence) or isinstance(command, (str, bytes)):
        return None
    program, *arguments = map(os.fspath, command)
    flags = set[str]()
    while arguments and arguments[0] in ("-B", "-P"):
        flags.add(arguments.pop(0))
    kind = arguments[0] if arguments else ""
    if kind in ("-c", "-m"):
        arguments.pop(0)
    if program != sys.executable or not arguments or arguments[0].startswith("-"):
        return None
    where = os.fspath(folder or os.curdir)
    changed = {name for name in os.environ.keys() | environment.keys() if os.environ.get(name) != environment.get(name)}
    decides = (name in AT_START or name.startswith("PYTHON") for name in changed - {"PYTHONUNBUFFERED"})
    if not os.path.isdir(where) or any(decides):
        return None
    return {
        "kind": kind, "arguments": arguments, "flags": sorted(flags), "environment": dict(environment),
        "session": session, "folder": os.path.abspath(where), "parent": os.getpid(),
    }  # fmt: skip


@contextmanager
def template() -> Iterator[type[subprocess.Popen[Any]]]:
    """A template process. Yields what is to stand in place of `subprocess.Popen` until the end of the block."""
    if not sys.platform.startswith("linux"):
        yield PLAIN
        return
    ForkedPopen.template = Template()
    try:
        yield ForkedPopen
    finally:
        ForkedPopen.template.close()


def fork_from_now_on() -> None:
    """Have the Python processes of this one forked, until it ends."""
    if sys.platform.startswith("linux"):
        ForkedPopen.template = Template()
        subprocess.Popen = ForkedPopen  # type: ignore[misc]


# ---------------------------------------------------------------- the template


def serve(descriptor: int) -> None:
    """Fork for each order that comes. Returns in no process but at the end of what a forked one was to run."""
    gc.disable()
    for name in MODULES:
        importlib.import_module(name)
    gc.enable()
    gc.freeze()  # or each would copy all of it at its first collection
    orders = socket.socket(fileno=descriptor)
    while True:
        message, streams, _, _ = socket.recv_fds(orders, LARGEST, 3)
        if not message:
            os._exit(0)
        first = os.fork()
        if first == 0:
            if os.fork() == 0:
                return become(json.loads(message), streams, orders)
            os._exit(0)  # so that whoever asked becomes the parent
        os.waitpid(first, 0)
        for stream in streams:
            os.close(stream)


def become(order: Order, streams: Sequence[int], orders: socket.socket) -> None:
    """Be the process that was ordered, and run what it is to run."""
    while os.getppid() != order["parent"]:
        if os.getppid() == 1:
            os._exit(1)  # whoever asked has ended
        time.sleep(0.0005)
    if order["session"]:
        os.setsid()
    for own, stream in enumerate(streams):
        os.dup2(stream, own)
    for stream in streams:
        os.close(stream)
    os.environ.clear()
    os.environ.update(order["environment"])
    os.chdir(order["folder"])
    orders.send(str(os.getpid()).encode())
    orders.close()
    forget_the_template()
    run(order["kind"], order["arguments"], order["flags"])


def forget_the_template() -> None:
    """Replace what was made when the template started, and what its environment and its streams decided."""
    unbuffered = bool(os.environ.get("PYTHONUNBUFFERED"))
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        old = getattr(sys, name)
        binary: Any = open(number, f"{mode}b", closefd=False)  # noqa: SIM115, until the process ends
        lines = name == "stderr" or (name == "stdout" and os.isatty(number))
        stream = io.TextIOWrapper(binary, old.encoding, old.errors, line_buffering=lines, write_through=unbuffered)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    tempfile.tempdir = None
    random.seed()
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed()


def run(kind: str, arguments: list[str], flags: Sequence[str]) -> None:
    """What `python -c`, `python -m` or `python SCRIPT` does."""
    what, *rest = arguments
    del sys.path[sys.path.index(ROOT)]  # which was appended
    sys.dont_write_bytecode |= "-B" in flags
    if "-P" not in flags:
        sys.path.insert(0, {"-c": "", "-m": os.getcwd()}.get(kind, os.path.dirname(os.path.realpath(what))))
    sys.argv[:] = [kind or what, *rest]
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
        return
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__dict__["__builtins__"] = __builtins__
    if kind == "-c":
        code = compile(what, "<string>", "exec")
    else:
        main.__file__ = what
        code = compile(Path(what).read_bytes(), what, "exec")
    exec(code, main.__dict__)
