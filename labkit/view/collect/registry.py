"""The registry: which experts and servers there are, and in what state. Each gets a row at first sight and keeps it.

The `sampler` asks it for the rows behind a scene's columns. The registry learns from inventories (`inventory`), and,
where the swarm is not polled, from the names in telemetry. A server started here is identified by its index in
`swarm.servers`, whatever its address; a server started elsewhere by its address.
"""

# N: experts, S: servers

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from labkit.contact import Contact
from labkit.expert_uid import ExpertInfo, split_uid
from labkit.view.collect.inventory import MAX_EXPERTS, MAX_GRIDS, MAX_SERVERS, Inventory, LocalServer
from labkit.view.collect.rates import pad_rows
from labkit.view.scene import Doubles, Ints, Layer, State

MAX_GRID_CELLS = 1 << 24  # of a grid that is shown whole; a larger one is shown as far as it has experts
SUSPECT_AFTER_POLLS = 2  # failed polls in a row that make a server suspect
DEAD_AFTER_SILENCE = 10.0  # seconds after which a suspect server counts as dead
UNDECLARED, OFFERED, SUSPENDED = range(3)  # how the directory lists an expert

_LOCAL_STATES = {"running": State.ALIVE, "starting": State.STARTING}
_REMOTE_WORDS = {State.ALIVE: "remote", State.SUSPECT: "silent", State.DEAD: "gone"}


class Registry:
    """The rows of experts and servers, and their states by the last inventory."""

    def __init__(self) -> None:
        self.layers: list[Layer] = []
        self.uids: tuple[str, ...] = ()
        self.layer = self.cell = self.server = self._declared = np.zeros(0, dtype=np.int64)  # [N]
        self.labels: list[str] = []
        self.addresses: list[str] = []
        self.local = np.zeros(0, dtype=np.int64)  # [S]
        self.injected: Doubles = np.zeros((0, 2))  # [S, 2]
        self._words: list[str] = []  # the handle's state; empty for a server started elsewhere
        self._first_seen: Doubles = np.zeros(0)  # [S]
        self._failures = np.zeros(0, dtype=np.int64)  # [S]
        self._layers: dict[str, int] = {}
        self._layer_known: list[bool] = []  # whether a grid's sizes were declared (True) or guessed from its uids
        self._experts: dict[str, int] = {}
        self._places: list[tuple[int, ...]] = []  # coordinates of experts
        self._expert_layers: list[int] = []
        self._by_address: dict[str, int] = {}
        self._by_contact: dict[Contact, int] = {}
        self._by_key: dict[bytes, int] = {}  # a server that has moved keeps its row
        self._locals: list[int] = []  # rows of the servers started here
        self._local_uids: list[tuple[str, ...]] = []
        self._inventory: Inventory | None = None
        self._declarations: tuple[list[str], list[str], list[Contact]] | None = None  # as last taken
        self._cells_outdated = False

    # ------------------------------------------------------------ rows

    def expert(self, uid: str) -> int:
        """Returns the row of an expert, adding one if needed; -1 if the expert cannot be shown."""
        row = self._experts.get(uid)
        if row is not None:
            return row
        try:
            name, place = split_uid(uid)
        except ValueError:
            return -1
        layer = self._layers.get(name)
        if layer is None:
            layer = self._add_layer(name, tuple(at + 1 for at in place), known=False)
        if layer < 0 or len(self._experts) >= MAX_EXPERTS:
            return -1
        sizes = self.layers[layer].sizes
        if len(sizes) != len(place):
            return -1
        outside = any(at >= size for at, size in zip(place, sizes, strict=True))
        if outside and (self._layer_known[layer] or not self._enlarge(layer, tuple(at + 1 for at in place))):
            return -1
        row = self._experts[uid] = len(self._experts)
        self._places.append(place)
        self._expert_layers.append(layer)
        return row

    def known_expert(self, uid: str) -> int:
        """Returns the row of an expert, or -1."""
        return self._experts.get(uid, -1)

    def known_server(self, uid: str) -> int:
        """Returns the row of the server of an expert, or -1."""
        row = self._experts.get(uid, -1)
        return int(self.server[row]) if 0 <= row < len(self.server) else -1

    def known_address(self, address: str) -> int:
        """Returns the row of the server at an address, or -1."""
        return self._by_address.get(address, -1)

    def address_row(self, address: str, now: float) -> int:
        """Returns the row of the server at an address, adding one if needed; -1 beyond the limit."""
        row = self._by_address.get(address)
        return self._add_server(address, address, now) if row is None else row

    def _add_server(self, label: str, address: str, now: float) -> int:
        row = len(self.labels)
        if row >= MAX_SERVERS:
            return -1
        self.labels.append(label)
        self.addresses.append(address)
        self._words.append("")
        self.local = pad_rows(self.local, row + 1, -1)
        self.injected = pad_rows(self.injected, row + 1, math.nan)
        self._first_seen = pad_rows(self._first_seen, row + 1, now)
        self._failures = pad_rows(self._failures, row + 1)
        if address:
            self._by_address[address] = row
        return row

    def _add_layer(self, name: str, sizes: tuple[int, ...], *, known: bool) -> int:
        if len(self.layers) >= MAX_GRIDS or math.prod(sizes) > MAX_GRID_CELLS:
            return -1
        self._layers[name] = len(self.layers)
        self.layers.append(Layer(name, sizes))
        self._layer_known.append(known)
        self._declarations = None
        return self._layers[name]

    def _enlarge(self, layer: int, sizes: tuple[int, ...]) -> bool:
        """Enlarge a grid to at least these sizes. Grids never shrink, so every expert keeps its place."""
        old = self.layers[layer]
        if len(sizes) != len(old.sizes):
            return False
        both = tuple(map(max, sizes, old.sizes))
        if both != old.sizes and math.prod(both) <= MAX_GRID_CELLS:
            self.layers[layer] = Layer(old.name, both)
            self._cells_outdated, self._declarations = True, None
        return self.layers[layer].sizes == both

    # ------------------------------------------------------------ learning

    def take(self, inventory: Inventory, now: float) -> None:
        """Learn from an inventory. Taking the same one again costs nothing."""
        if inventory is self._inventory:
            return
        last, self._inventory = self._inventory, inventory
        for name, grid in inventory.grids.items():
            layer = self._layers.get(name)
            if layer is None:
                self._add_layer(name, grid.sizes, known=True)
            elif self._enlarge(layer, grid.sizes):
                self._layer_known[layer] = True
        for number, server in enumerate(inventory.locals):
            self._take_local(number, server, now)
        if last is None or last.experts is not inventory.experts or last.suspects is not inventory.suspects:
            self._take_experts(inventory, now)
        self._take_labels(inventory)
        self._failures = np.zeros(len(self.labels), dtype=np.int64)
        for address, count in inventory.failures.items():
            if (row := self._by_address.get(address)) is not None:
                self._failures[row] = count

    def _take_labels(self, inventory: Inventory) -> None:
        """Call servers by the labels that they report. None of them passes for a server started here.

        Beside it stands who relays for a server that takes no connections.
        """
        for address, (statistics, _) in inventory.statistics.items():
            row = self._by_address.get(address)
            if row is None:
                continue
            if self.local[row] < 0:
                label = "" if statistics.label.startswith("servers[") else statistics.label
                self.labels[row] = label or address
            if statistics.relay:
                self.labels[row] += f" (relayed by {statistics.relay})"

    def _take_local(self, number: int, server: LocalServer, now: float) -> None:
        if number == len(self._locals):
            known = self._by_address.get(server.address)  # it may have a row by its address already
            if known is None or self.local[known] >= 0:
                known = self._add_server(f"servers[{number}]", server.address, now)
            self._locals.append(known)
            self._local_uids.append(())
        row = self._locals[number]
        if row < 0:
            return
        self.local[row] = number
        self.labels[row] = f"servers[{number}] {server.label}".rstrip()
        self._words[row] = server.word
        self.injected[row] = server.latency, server.loss
        if server.address and self._by_address.get(server.address) != row:
            self._by_address[server.address] = row
            self._by_contact.clear()
            self._declarations = None
        self.addresses[row] = server.address
        if self._local_uids[number] is not server.uids:
            self._local_uids[number] = server.uids
            rows = np.array([expert for uid in server.uids if (expert := self.expert(uid)) >= 0], dtype=np.int64)
            self._grow()
            # What a server begins with when it runs again is not its own meanwhile: others may have taken it over.
            self.server[rows if server.word == "running" else rows[self.server[rows] < 0]] = row

    def _take_experts(self, inventory: Inventory, now: float) -> None:
        contacts = [info.contact for table in (inventory.experts, inventory.suspects) for info in table.values()]
        declarations = list(inventory.experts), list(inventory.suspects), contacts
        if declarations == self._declarations:
            return
        rows = [self._rows_of(inventory.experts), self._rows_of(inventory.suspects)]
        self._declarations = declarations  # after the rows, which may change the layers
        self._grow()
        servers = np.array([self._contact_row(contact, now) for contact in contacts], dtype=np.int64)
        self._declared[:] = UNDECLARED
        suspended, offered = servers[len(rows[0]) :], servers[: len(rows[0])]
        for contact, row in dict(zip(contacts[: len(offered)], offered.tolist(), strict=True)).items():
            self._show_address(contact, row)
        for listed, theirs, at in ((SUSPENDED, rows[1], suspended), (OFFERED, rows[0], offered)):
            shown = theirs >= 0
            self._declared[theirs[shown]] = listed
            self.server[theirs[shown]] = at[shown]

    def _rows_of(self, infos: Mapping[str, ExpertInfo]) -> Ints:
        known = map(self._experts.get, infos)
        rows = (self.expert(uid) if row is None else row for uid, row in zip(infos, known, strict=True))
        return np.fromiter(rows, dtype=np.int64, count=len(infos))

    def _contact_row(self, contact: Contact, now: float) -> int:
        row = self._by_contact.get(contact)
        if row is None:
            moved = self._by_key.get(contact.key) if contact.endpoint not in self._by_address else None
            row = self.address_row(contact.endpoint, now) if moved is None else moved
            if row >= 0:
                self._by_address[contact.endpoint] = self._by_key[contact.key] = row
            self._by_contact[contact] = row
            if len(self._by_contact) > 4 * MAX_SERVERS:
                self._by_contact.clear()
                self._by_key.clear()
        return row

    def _show_address(self, contact: Contact, row: int) -> None:
        """Show the address at which a server that was started elsewhere is now."""
        if row < 0 or self.local[row] >= 0 or self.addresses[row] == contact.endpoint:
            return
        if self.labels[row] == self.addresses[row]:
            self.labels[row] = contact.endpoint
        self.addresses[row] = contact.endpoint

    def called(self, rows: Ints, servers: Ints) -> None:
        """Learn from telemetry at which servers [n] experts [n] were last called, for experts without a server."""
        self._grow()
        unknown = (rows >= 0) & (servers >= 0)
        unknown[unknown] = self.server[rows[unknown]] < 0
        self.server[rows[unknown]] = servers[unknown]

    def _grow(self) -> None:
        count = len(self._experts)
        if count > len(self.uids):
            self.uids = tuple(self._experts)
            self.server = pad_rows(self.server, count, -1)
            self._declared = pad_rows(self._declared, count)
            self._cells_outdated = True
        if self._cells_outdated:
            self._cells_outdated = False
            self.layer = np.array(self._expert_layers, dtype=np.int64)
            self.cell = np.zeros(count, dtype=np.int64)
            for number, layer in enumerate(self.layers):
                (rows,) = (self.layer == number).nonzero()
                if len(rows):
                    places = np.array([self._places[row] for row in rows])  # [n, dimensions]
                    strides = np.cumprod((1, *layer.sizes[:0:-1]))[::-1]
                    self.cell[rows] = places @ strides

    # ------------------------------------------------------------ states

    def states(self, heard_at: Doubles, now: float) -> tuple[Ints, Ints, tuple[str, ...]]:
        """Returns the states of the experts [N] and of the servers [S], and the servers' states in words.

        `heard_at` [S] is when each server last answered anything, monotonic; NaN if never.
        """
        self._grow()
        servers = self._server_states(heard_at, now)
        words = tuple(
            word or _REMOTE_WORDS[State(state)] for word, state in zip(self._words, servers.tolist(), strict=True)
        )
        # Where an expert's server is not known, only the directory counts.
        theirs = np.append(servers, State.ALIVE)[self.server]
        experts = np.full(len(theirs), State.DEAD, dtype=np.int64)
        polled = self._inventory is not None and self._inventory.polled_at > -math.inf
        offered = self._declared == OFFERED if polled else np.ones(len(theirs), dtype=np.bool_)
        experts[offered] = theirs[offered]
        experts[(self._declared == SUSPENDED) & (theirs != State.DEAD)] = State.SUSPECT
        # Experts of a server started here that runs, but which the directory does not list yet.
        coming = ~offered & (self._declared == UNDECLARED) & self._is_local_uid()
        experts[coming & ((theirs == State.ALIVE) | (theirs == State.STARTING))] = State.STARTING
        return experts, servers, words

    def _is_local_uid(self) -> npt.NDArray[np.bool_]:
        local = np.append(self.local, -1)[self.server] >= 0
        return np.asarray(local, dtype=np.bool_)

    def _server_states(self, heard_at: Doubles, now: float) -> Ints:
        count = len(self.labels)
        known = self.server >= 0
        offered = np.bincount(self.server[known & (self._declared == OFFERED)], minlength=count)
        suspended = np.bincount(self.server[known & (self._declared == SUSPENDED)], minlength=count)
        suspect = (self._failures >= SUSPECT_AFTER_POLLS) | ((offered == 0) & (suspended > 0))
        silent = now - np.fmax(heard_at, self._first_seen) >= DEAD_AFTER_SILENCE
        states = np.full(count, State.ALIVE, dtype=np.int64)
        if self._inventory is not None and self._inventory.polled_at > -math.inf:
            states[suspect] = State.SUSPECT
            states[(offered + suspended == 0) | (suspect & silent)] = State.DEAD
        else:
            states[silent] = State.SUSPECT
        for row in self._locals:
            if row >= 0:
                state = _LOCAL_STATES.get(self._words[row], State.DEAD)
                states[row] = State.SUSPECT if state is State.ALIVE and suspect[row] else state
        return states
