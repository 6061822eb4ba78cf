"""A notebook's front end, played: it runs cells in a real kernel, and says to a widget what its page would say."""

from __future__ import annotations

import os
import queue
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager

TIMEOUT = 50.0  # seconds; starting a kernel and importing torch takes most of it
WIDGET = "application/vnd.jupyter.widget-view+json"

Message = dict[str, Any]


@dataclass
class Cell:
    """A cell that was run. `outputs`: MIME bundles, those that were updated later as they are now."""

    id: str
    text: str = ""
    outputs: list[dict[str, Any]] = field(default_factory=list)
    error: str = ""
    done: bool = False

    @property
    def bundle(self) -> dict[str, Any]:
        return self.outputs[0] if self.outputs else {}


@dataclass
class Comm:
    """A widget's model, as the front end sees it. `sent`: when each custom message for a page came, and the message.
    `beats`: when signs of life came, which are for all pages."""

    state: dict[str, Any]
    sent: list[tuple[float, Message, list[bytes]]] = field(default_factory=list)
    beats: list[float] = field(default_factory=list)
    closed: bool = False


class FrontEnd:
    """Runs cells, and holds what the kernel sent. `subshell`: where it sends what pages say, as JupyterLab does."""

    def __init__(self, client: BlockingKernelClient, manager: KernelManager | None = None) -> None:
        self.client = client
        self.manager = manager
        self.cells: dict[str, Cell] = {}
        self.comms: dict[str, Comm] = {}
        self.subshell: str | None = None
        self._shown: dict[str, list[dict[str, Any]]] = {}  # outputs by display id
        self._acknowledge: set[tuple[str, str]] = set()

    # ------------------------------------------------------------ cells

    def begin(self, code: str) -> Cell:
        """Run a cell, and don't wait for it."""
        id = self.client.execute(textwrap.dedent(code))
        cell = self.cells[id] = Cell(id)
        return cell

    def run(self, code: str) -> Cell:
        """Run a cell to its end. Fails if it fails."""
        cell = self.begin(code)
        self.until(lambda: cell.done)
        assert not cell.error, cell.error
        return cell

    def value(self, expression: str) -> Any:
        """What an expression is in the kernel."""
        return eval(self.run(expression).bundle["text/plain"])

    def until(self, condition: Callable[[], object], timeout: float = TIMEOUT) -> None:
        """Take messages from the kernel until `condition` holds."""
        deadline = time.monotonic() + timeout
        while not condition():
            left = deadline - time.monotonic()
            assert left > 0, "it did not happen"
            try:
                self._take(self.client.get_iopub_msg(timeout=min(left, 1.0)))
            except queue.Empty:
                continue

    def _take(self, message: Message) -> None:
        kind, content = message["msg_type"], message["content"]
        cell = self.cells.get(message["parent_header"].get("msg_id", ""))
        if kind == "comm_open":
            self.comms[content["comm_id"]] = Comm(content["data"]["state"])
        elif kind == "comm_close":
            self.comms[content["comm_id"]].closed = True
        elif kind == "comm_msg" and content["data"].get("method") == "custom":
            said = content["data"]["content"]
            comm = self.comms[content["comm_id"]]
            if said["type"] == "beat":
                comm.beats.append(time.monotonic())
                return
            comm.sent.append((time.monotonic(), said, [bytes(buffer) for buffer in message["buffers"]]))
            if said.get("ack", "seq" in said) and (content["comm_id"], said["page"]) in self._acknowledge:
                self.say(content["comm_id"], {"type": "ack", "page": said["page"], "seq": said["seq"]})
        elif kind == "update_display_data":
            for bundle in self._shown.get(content["transient"]["display_id"], []):
                bundle.clear()
                bundle.update(content["data"])
        elif cell is not None:
            self._output(cell, kind, content)

    def _output(self, cell: Cell, kind: str, content: dict[str, Any]) -> None:
        if kind == "stream":
            cell.text += content["text"]
        elif kind in ("display_data", "execute_result"):
            cell.outputs.append(dict(content["data"]))
            if id := content.get("transient", {}).get("display_id"):
                self._shown.setdefault(id, []).append(cell.outputs[-1])
        elif kind == "error":
            cell.error = "\n".join(content["traceback"])
        elif kind == "status" and content["execution_state"] == "idle":
            cell.done = True

    def interrupt(self) -> None:
        """Interrupt the cell that runs, as the button of a notebook does."""
        assert self.manager is not None
        self.manager.interrupt_kernel()

    def restart(self) -> None:
        """Restart the kernel, as the button of a notebook does."""
        assert self.manager is not None
        self.manager.restart_kernel(now=True)
        self.client.wait_for_ready(timeout=TIMEOUT)

    # ------------------------------------------------------------ pages

    def open_subshell(self) -> None:
        """From now on, what pages say goes to a subshell of the kernel (ipykernel 7)."""
        request = self.client.session.msg("create_subshell_request", {})
        self.client.control_channel.send(request)
        reply = self.client.get_control_msg(timeout=TIMEOUT)
        assert reply["content"]["status"] == "ok", reply["content"]
        self.subshell = reply["content"]["subshell_id"]

    def say(self, comm: str, content: object) -> None:
        """A page says something to its model."""
        data = {"method": "custom", "content": content}
        message = self.client.session.msg("comm_msg", {"comm_id": comm, "data": data})
        if self.subshell is not None:
            message["header"]["subshell_id"] = self.subshell
        self.client.shell_channel.send(message)

    def page(self, comm: str, name: str = "page", *, acknowledge: bool = True) -> Page:
        """A page that shows this model."""
        if acknowledge:
            self._acknowledge.add((comm, name))
        return Page(self, comm, name)


class Page:
    """One load of the widget's front end."""

    def __init__(self, front_end: FrontEnd, comm: str, name: str) -> None:
        self.front_end = front_end
        self.comm = comm
        self.name = name
        self._commands = 0

    def look(self, looking: bool = True, *, fresh: bool = False, mode: str = "load") -> None:
        """Say whether somebody looks at it."""
        self._say(type="look", looking=looking, fresh=fresh, layer=0, mode=mode)

    def acknowledge(self, seq: int) -> None:
        """Say that a frame was drawn."""
        self._say(type="ack", seq=seq)

    def click(self, **command: Any) -> int:
        """Send the command of a button. Returns its number."""
        self._commands += 1
        self._say(type="command", id=self._commands, command=command)
        return self._commands

    def execute(self, **command: Any) -> tuple[str, str]:
        """The same, and wait for how it went: done or failed, and a sentence."""
        id = self.click(**command)
        self.front_end.until(lambda: self.answers(id, "done") + self.answers(id, "failed"))
        [answer] = self.answers(id, "done") + self.answers(id, "failed")
        return answer["type"], answer["text"]

    def _say(self, **content: Any) -> None:
        self.front_end.say(self.comm, {**content, "page": self.name})

    @property
    def got(self) -> list[tuple[float, Message, list[bytes]]]:
        """What was sent to it: when, and the message."""
        return [item for item in self.front_end.comms[self.comm].sent if item[1]["page"] == self.name]

    @property
    def frames(self) -> list[tuple[float, Message, list[bytes]]]:
        return [item for item in self.got if item[1]["type"] == "frame"]

    @property
    def headers(self) -> list[Message]:
        return [message for _, message, _ in self.frames]

    def answers(self, id: int, type: str) -> list[Message]:
        return [message for _, message, _ in self.got if message["type"] == type and message["id"] == id]


@contextmanager
def open_kernel(
    folder: Path, python: str | Path = sys.executable, *, within: Sequence[str] = (), **environment: str
) -> Iterator[FrontEnd]:
    """A kernel of its own.

    Args:
        folder: For its files.
        python: The interpreter that runs it.
        within: A command that runs it, such as one that gives it another network.
        **environment: Variables of its environment.
    """
    manager = KernelManager(kernel_name="python3")
    if within:  # files, and not TCP, lead there
        manager.transport, manager.ip = "ipc", str(folder / "kernel")
    spec = manager.kernel_spec
    assert spec is not None
    spec.argv = [*within, str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    manager.start_kernel(env={**os.environ, "IPYTHONDIR": str(folder), "MPLBACKEND": "agg", **environment})
    client = manager.blocking_client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=TIMEOUT)
        yield FrontEnd(client, manager)
    finally:
        client.stop_channels()
        if manager.has_kernel:
            manager.shutdown_kernel(now=True)
