"""A small internet: hosts and routers, each in a network namespace, and the processes that tests run there.

    public       5.5.5.10, 2a00:5::10         everybody reaches it
    two_faced    5.5.5.11 and 10.9.0.1        one leg in the internet, one in a cluster's own network
    inner        10.9.0.2                     in that network, which has no way out
    one          192.168.1.10                 behind router_one, 5.5.5.21
    two          192.168.1.10                 behind router_two, 5.5.5.22
    deep         192.168.7.10                 behind router_deep, itself behind router_three, 5.5.5.23
    firewalled   5.5.5.30                     takes connections at ports 31000 to 31099 only
    six          2a00:5::40                   has no IPv4 address
    docker       5.5.5.40 and 172.17.0.1      runs a container, and publishes ports 31000 to 31009 of it
    container    172.17.0.2                   in it

Routers translate addresses, let nobody in who was not called from inside, and drop what belongs to no connection that
they know.
"""

from __future__ import annotations

import itertools
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
START_TIME = 60.0  # seconds, of which most are an import of torch on a machine that is busy
END_TIME = 10.0  # seconds
ROUTER = """
table ip nat {
  chain forward { type filter hook forward priority 0; policy drop
    ct state invalid drop
    ct state established,related accept
    iifname "lan" accept
  }
  chain post { type nat hook postrouting priority 100
    oifname "wan" masquerade
  }
}
"""
FIREWALL = """
table inet firewall {
  chain in { type filter hook input priority 0; policy drop
    iifname "lo" accept
    meta l4proto { icmp, ipv6-icmp } accept
    ct state established,related accept
    tcp dport 31000-31099 accept
  }
}
"""
CONTAINERS = """
table ip docker {
  chain forward { type filter hook forward priority 0; policy drop
    ct state established,related accept
    iifname "docker0" accept
    ct status dnat accept
  }
  chain pre { type nat hook prerouting priority -100
    ip daddr 5.5.5.40 tcp dport 31000-31009 dnat to 172.17.0.2
  }
  chain out { type nat hook output priority -100
    ip daddr 5.5.5.40 tcp dport 31000-31009 dnat to 172.17.0.2
  }
  chain post { type nat hook postrouting priority 100
    ip saddr 172.17.0.0/16 oifname != "docker0" masquerade
    ip saddr 172.17.0.0/16 ct status dnat masquerade
  }
}
"""  # as Docker's own


_numbers = itertools.count()


def execute(*command: str, given: str | None = None) -> str:
    done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


class Host:
    """A host: a network namespace, and what runs in it."""

    def __init__(self, name: str) -> None:
        self.name = name
        execute("ip", "netns", "add", name)
        self.ip("link", "set", "lo", "up")

    def ip(self, *arguments: str) -> str:
        return execute("ip", "-n", self.name, *arguments)

    def command(self, *command: str) -> list[str]:
        """The command that runs another one on this host."""
        return ["nsenter", f"--net=/run/netns/{self.name}", *command]

    def nft(self, rules: str) -> None:
        execute(*self.command("nft", "-f", "-"), given=rules)

    def rules(self) -> str:
        """Its rules, for `nft`."""
        return execute(*self.command("nft", "list", "ruleset"))

    def set(self, setting: str, value: int) -> None:
        execute(*self.command("sh", "-c", f"echo {value} > /proc/sys/net/{setting}"))

    def attach(self, interface: str, bridge: str, *addresses: str, via: str | None = None) -> None:
        """Plug an interface into a bridge. `via`: the default route."""
        plug = f"plug{next(_numbers)}"
        execute("ip", "link", "add", plug, "type", "veth", "peer", "name", interface, "netns", self.name)
        execute("ip", "link", "set", plug, "master", bridge, "up")
        for address in addresses:
            self.ip("address", "add", address, "dev", interface, *(["nodad"] if ":" in address else []))
        self.ip("link", "set", interface, "up")
        if via is not None:
            self.ip("route", "add", "default", "via", via)

    def route(self) -> None:
        """Make a router of it: `lan` inside, `wan` outside."""
        self.set("ipv4/ip_forward", 1)
        self.nft(ROUTER)
        self.set("netfilter/nf_conntrack_tcp_loose", 0)  # it takes no connection for its own that it saw not begin

    def contain(self, container: Host) -> None:
        """Run a container, as Docker would."""
        self.ip("link", "add", "docker0", "type", "bridge")
        self.ip("address", "add", "172.17.0.1/16", "dev", "docker0")
        self.ip("link", "add", "veth0", "type", "veth", "peer", "name", "eth0", "netns", container.name)
        self.ip("link", "set", "veth0", "master", "docker0", "up")
        self.ip("link", "set", "docker0", "up")
        container.ip("address", "add", "172.17.0.2/16", "dev", "eth0")
        container.ip("link", "set", "eth0", "up")
        container.ip("route", "add", "default", "via", "172.17.0.1")
        self.set("ipv4/ip_forward", 1)
        self.nft(CONTAINERS)

    def forget(self) -> None:
        """Let a router forget its connections, as a restart does."""
        route = self.ip("route", "show", "default").split()
        self.ip("link", "set", "wan", "down")
        self.ip("link", "set", "wan", "up")
        if route:
            self.ip("route", "add", *route[:3])


class World:
    """All hosts, by their names."""

    def __init__(self) -> None:
        self.hosts: dict[str, Host] = {}
        for bridge in ("internet", "cluster", "lan_one", "lan_two", "lan_three", "lan_deep"):
            execute("ip", "link", "add", bridge, "type", "bridge")
            execute("ip", "link", "set", bridge, "up")
        self.add("public").attach("eth0", "internet", "5.5.5.10/24", "2a00:5::10/64")
        self.add("two_faced").attach("eth0", "internet", "5.5.5.11/24")
        self["two_faced"].attach("eth1", "cluster", "10.9.0.1/24")
        self.add("inner").attach("eth0", "cluster", "10.9.0.2/24")
        for name, address in (("one", "5.5.5.21/24"), ("two", "5.5.5.22/24")):
            self.add_router(f"router_{name}", f"lan_{name}", "192.168.1.1/24", "internet", address)
            self.add(name).attach("eth0", f"lan_{name}", "192.168.1.10/24", via="192.168.1.1")
        self.add_router("router_three", "lan_three", "10.3.0.1/24", "internet", "5.5.5.23/24")
        self.add_router("router_deep", "lan_deep", "192.168.7.1/24", "lan_three", "10.3.0.2/24", via="10.3.0.1")
        self.add("deep").attach("eth0", "lan_deep", "192.168.7.10/24", via="192.168.7.1")
        self.add("firewalled").attach("eth0", "internet", "5.5.5.30/24")
        self["firewalled"].nft(FIREWALL)
        self.add("docker").attach("eth0", "internet", "5.5.5.40/24")
        self.add("container")
        self["docker"].contain(self["container"])
        self.add("six").attach("eth0", "internet", "2a00:5::40/64")

    def add(self, name: str) -> Host:
        host = self.hosts[name] = Host(name)
        return host

    def add_router(self, name: str, lan: str, inside: str, wan: str, outside: str, via: str | None = None) -> None:
        router = self.add(name)
        router.attach("lan", lan, inside)
        router.attach("wan", wan, outside, via=via)
        router.route()

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]


class Process:
    """A process on a host, and the lines that it has said."""

    def __init__(self, host: Host, arguments: list[str], home: Path) -> None:
        self.host = host
        self.said: list[str] = []
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._process = subprocess.Popen(
            host.command(sys.executable, "-u", *arguments), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, start_new_session=True,
            env={**os.environ, "HOME": str(home), "TMPDIR": str(home), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line.rstrip("\n"))
        self._lines.put(None)

    def until(self, *words: str, timeout: float = START_TIME) -> str:
        """Wait for lines with each of these words, in any order, and return the last one."""
        deadline, missing = time.monotonic() + timeout, set(words)
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                line = None
            assert line is not None, f"{self.host.name} did not say {missing}, but:\n" + "\n".join(self.said)
            self.said.append(line)
            missing = {some for some in missing if some not in line}
            if not missing:
                return line

    def ask(self, question: Any) -> Any:
        """Send a line of JSON to a process that answers each with one."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self.until("ANSWER ").partition("ANSWER ")[2])
        return answer

    @contextmanager
    def asleep(self) -> Iterator[None]:
        """In this block the process stands still, as on a laptop that sleeps."""
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self._process.kill()

    def end(self) -> None:
        for stream in (self._process.stdin,):
            assert stream is not None
            stream.close()
        self._process.terminate()
        try:
            self._process.wait(END_TIME)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(END_TIME)
        self._reader.join(END_TIME)
        assert self._process.stdout is not None
        self._process.stdout.close()


# A notebook on a host, which does what it is told, a line at a time: joins, serves, and calls every expert.
NOTEBOOK = """
import json, sys, torch, labkit as lk
from labkit.view import export
swarm = None
news = []
def hear(event):
    name = type(event).__name__
    said = {"ReachabilityChanged": "text", "AddressChanged": "reason", "RelayChanged": "detail"}
    if name in said:
        news.append(f"{name}: {getattr(event, said[name])}")
def start(**options):
    global swarm
    swarm = lk.Swarm(**options)
    swarm.on_event(hear)
    return str(swarm.invite())
def join(invite, **options):
    global swarm
    swarm = lk.Swarm.join(invite, **options)
    swarm.on_event(hear)
    return repr(swarm)
def serve(on=None, **options):
    if on is None:
        where = {"isolation": "task"}
    else:
        from distributed import Client
        where = {"on": Client(on)}
    swarm.serve(**{**where, **options})
    return repr(swarm)
def order(number, name, options):
    return getattr(swarm.servers[number], name)(**options)
def served():
    return sorted(str(uid) for server in swarm.servers for uid in server.uids)
def copied():
    portal, node = swarm._portal, swarm._node
    found = portal.call(node.directory.holders_below, "ffn", 1)
    return sorted(str(uid) for uid, info in found.items() if info.copies)
def invite():
    return str(swarm.invite())
def look():
    return repr(swarm)
def told():
    return {
        "news": news,
        "view": json.loads(export.to_json(swarm.view.scene()))["reachability"],
        "relaying": swarm.relaying,
        "relays": [statistics.relay for statistics in swarm.statistics().values()],
        "note": swarm.invite().note,
    }
def call():
    answers = {}
    for uid in swarm.experts():
        try:
            output = swarm.expert(str(uid), timeout=3.0)(torch.ones(1, 4))
            answers[str(uid)] = "" if output.shape == (1, 4) else "wrong shape"
        except lk.LabkitError as error:
            answers[str(uid)] = str(error)
    return answers
for line in sys.stdin:
    name, options = json.loads(line)
    try:
        answer = {"value": globals()[name](**options), "error": ""}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    sys.stdout.write(f"ANSWER {json.dumps(answer)}\\n")  # at once, since others write there, too
    sys.stdout.flush()
"""


class Processes:
    """What a test runs on hosts. All of it ends with the test."""

    def __init__(self, world: World, home: Path, stack: ExitStack) -> None:
        self._world, self._home, self._stack = world, home, stack

    def start(self, host: str, *arguments: str) -> Process:
        """Run Python with these arguments on a host."""
        process = Process(self._world[host], list(arguments), self._home)
        self._stack.callback(process.end)
        return process

    def labkit(self, host: str, *arguments: str) -> Process:
        """Run a command of labkit on a host."""
        return self.start(host, "-m", "labkit", *arguments)

    def notebook(self, host: str) -> Notebook:
        """Start Python on a host, to do what a notebook's cells would."""
        return Notebook(self.start(host, "-c", NOTEBOOK))


class Notebook:
    """A process that does what a notebook's cells would: `NOTEBOOK` says which there are."""

    def __init__(self, process: Process) -> None:
        self.process = process

    def start(self, **options: Any) -> str:
        """Start a swarm. Returns an invitation."""
        return str(self._ask("start", options))

    def join(self, invite: str, **options: Any) -> str:
        """Join a swarm. Returns how it shows itself."""
        return str(self._ask("join", {"invite": invite, **options}))

    def serve(self, **options: Any) -> str:
        """Serve experts of width 4. Returns how the swarm shows itself."""
        return str(self._ask("serve", {"kind": "ffn", "hidden": 4, **options}))

    def order(self, number: int, name: str, **options: Any) -> Any:
        """Call a method of a server that was started there. Returns what it returns."""
        return self._ask("order", {"number": number, "name": name, "options": options})

    def served(self) -> list[str]:
        """Returns the experts of the servers that were started there."""
        return list(self._ask("served", {}))

    def copied(self) -> list[str]:
        """Returns the experts that are said in the DHT to have copies."""
        return list(self._ask("copied", {}))

    def invite(self) -> str:
        """Returns an invitation."""
        return str(self._ask("invite", {}))

    def address(self) -> str:
        """Returns where its node is reached, or would be."""
        return self.invite().partition("@")[2]

    def look(self) -> str:
        """Returns how the swarm shows itself."""
        return str(self._ask("look", {}))

    def told(self) -> dict[str, Any]:
        """Returns what is said of who is reached, and how, but for how the swarm shows itself.

        `news`: events, with their names; `view`: lines of the dashboard; `relaying`: `swarm.relaying`; `relays`: those
        of the servers, from their statistics; `note`: of the invitation.
        """
        return dict(self._ask("told", {}))

    def refused(self, name: str, /, **options: Any) -> str:
        """Returns what a cell says that fails."""
        return str(self.process.ask([name, options])["error"])

    def call(self) -> dict[str, str]:
        """Call every expert. Returns what went wrong with each; nothing is an empty text."""
        return dict(self._ask("call", {}))

    def _ask(self, name: str, options: dict[str, Any]) -> Any:
        answer = self.process.ask([name, options])
        assert answer["error"] == "", answer["error"]
        return answer["value"]


@contextmanager
def processes(world: World, home: Path) -> Iterator[Processes]:
    with ExitStack() as stack:
        yield Processes(world, home, stack)
