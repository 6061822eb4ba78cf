"""The swarm: what a notebook holds. It starts or joins one, serves experts in it, and looks at it.

A batch passes by: layers, which `swarm_layers` makes, call experts in the session that `swarm_lifecycle` opened.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import get_num_threads

from labkit.contact import Contact, Invitation
from labkit.events import Emit
from labkit.faults import Faults
from labkit.launch import planning
from labkit.launch.cluster import cluster_of
from labkit.launch.handle import ServerHandle
from labkit.launch.order import Initial, ServeOrder
from labkit.launch.places import Wish, spare_wish
from labkit.node import NodeConfig
from labkit.paths import user_path
from labkit.printable import printable
from labkit.reachability import invite_to
from labkit.relay.limits import RelayLimits
from labkit.server.layers import Factory, check_options
from labkit.server.optimizer import BackendConfig
from labkit.server.statistics import ServerStatistics
from labkit.suggest import suggest_options
from labkit.swarm_layers import SwarmLayers
from labkit.view.collect.inventory import ask_all_servers
from labkit.view.starting import show_order
from labkit.view.summary import SwarmSummary
from labkit.wire.addresses import LOOPBACK, all_interfaces
from labkit.wire.security import Identity, parse_key

if TYPE_CHECKING:
    from labkit.view.log.swarm_logging import Logging
    from labkit.view.page.dashboard import Dashboard
    from labkit.view.picture.snapshot import Picture


class Swarm(SwarmLayers):
    """A swarm of expert servers. `Swarm()` starts one, `Swarm.join(invite)` joins one.

    Its network runs in a thread of its own. Its methods may be called from any other thread,
    and block until they are done. It ends with `close()`, with the block if it is used as a
    context manager, and at exit. `servers` holds the servers started here.

    Example:
        swarm = lk.Swarm()
        swarm.serve("ffn", hidden=256, grid=(4, 4), servers=4)
        model = nn.Sequential(nn.Linear(784, 256), swarm.moe(256), nn.Linear(256, 10))

    Args:
        name: Its name in this process; a swarm of the same name is closed first, so that a
            cell may run twice.
        listen: Where it listens, `tcp://host:port`, with port `*` for any or a range such as
            31000-31099; by default only on this machine. Host 0.0.0.0: all interfaces.
        announce: `host` or `host:port` that others use, where that differs (behind a router).
        secure: Whether to encrypt; by default if it is private or can be reached from other
            machines.
        key: The file of a key that stays the same, made by `labkit keygen`; by default the
            key is new each time.
        members: Public keys of those who may join, which makes the swarm private.
        node: Timeouts and limits of its node.
        relay: Whether nodes that take no connections are reached through this one, at ports
            of their own; an `lk.RelayLimits` says within which limits.
    """

    @classmethod
    @suggest_options
    def join(
        cls, invite: str, *, name: str | None = None, listen: str | None = None, announce: str | None = None,
        secure: bool | None = None, key: str | Path | Identity | None = None, members: Sequence[str] | None = None,
        node: NodeConfig | None = None, relay: bool | RelayLimits = False,
    ) -> Swarm:  # fmt: skip
        """Join the swarm that an invitation leads to.

        Example:
            swarm = lk.Swarm.join("labkit://…@192.168.1.5:40123")

        Args:
            invite: What `swarm.invite()` returned there, `labkit://<public key>@host:port`.
            name: Its name in this process; by default a name of its own.
            listen: Where our node listens; by default where that swarm can call it.
            announce: `host` or `host:port` that others use to reach us, where that differs.
            secure: Whether our node encrypts; by default as the swarm does.
            key: The file of a key that stays the same, made by `labkit keygen`, which a private
                swarm has to admit; by default the key is new each time.
            members: Public keys of those who may call our node; by default anybody.
            node: Timeouts and limits of our node.
            relay: Whether nodes that take no connections may be reached through ours.

        Raises:
            InviteError: The text is no invitation.
            JoinError: It cannot be joined, within 10 seconds; it says why, and what to try.
        """
        contact = Contact.from_invitation(invite)
        far = contact.secure and not contact.is_loopback  # then others have to call back from another machine
        listen = (all_interfaces() if far else LOOPBACK) if listen is None else listen
        secure = True if secure is None and contact.secure and not far else secure
        return cls(
            name or f"joined {contact.endpoint}", listen=listen, announce=announce, secure=secure, key=key,
            members=members, node=node, relay=relay, _join=(contact,),
        )  # fmt: skip

    # ------------------------------------------------------------ serving

    def serve(
        self, kind: str | Factory = "ffn", *, grid: Sequence[int] | None = None, experts: int | None = None,
        servers: int = 1, name: str | None = None, uids: Sequence[str] | None = None, isolation: str | None = None,
        on: Any = None, workers: str | Sequence[str] | None = None, resources: Mapping[str, float] | None = None,
        checkpoint_dir: str | Path | None = None, checkpoint_period: float | None = None, checkpoint_keep: int = 1,
        backups: int = 1, spare: bool = False, backend: BackendConfig | None = None, threads: int | None = None,
        seed: int | None = None, initial: Initial | None = None, label: str = "",
        hidden: int | None = None, inner: int | None = None, heads: int | None = None, causal: bool | None = None,
        max_length: int | None = None, **options: Any,
    ) -> list[ServerHandle]:  # fmt: skip
        """Start expert servers, and return them when their experts can be found.

        Example:
            swarm.serve("ffn", hidden=256, grid=(4, 4), servers=4)
            swarm.serve("ffn", hidden=256, grid=(16, 16), servers=8, on=Client(cluster))

        Args:
            kind: "ffn" (default), "transformer", "gated", "nop", a name given to
                `register_expert`, or a factory of an `nn.Module`.
            grid: Sizes of the grid to serve in; by default those of the running swarm, or one
                that fits `experts`.
            experts: How many free places of the grid to take, by default all.
            servers: How many servers share the experts. Default 1.
            name: The grid's name, by default that of the kind.
            uids: Which places to take, instead of `experts`; nobody else may serve them.
            isolation: "process" (default), or "task" for a server in this process. A kind that
                no import finds, as from a notebook cell, is handed to a process as code.
            on: A `Client` of Dask, at whose workers the servers run; by default they run here.
                Workers on other machines have to reach this one: `listen="tcp://0.0.0.0:*"`.
            workers: Which workers, by addresses, names or hosts, as for Dask.
            resources: What each server takes of its worker's, as for Dask: `{"GPU": 1}`.
            checkpoint_dir: Where experts are loaded from and saved to; by default a folder that
                ends with the swarm, or with the worker. One that all hosts share outlives both.
            checkpoint_period: Seconds between two saves; by default 10, or more if saving takes
                over 2 % of the time.
            checkpoint_keep: Checkpoints of each expert that are kept; older ones are called
                `<uid>~<updates>.safetensors`. If the last is damaged, the one before is loaded.
            backups: Other servers that keep a copy of each expert, from which one of them goes on
                with it, within seconds, when its server is gone. Default 1; 0 for none. One more
                keeps a copy in reserve, which is older, for the case that all of them are gone.
            spare: Whether they begin without experts, keep copies, take over, and are given some.
                So do servers for which no place is free.
            backend: Optimizer and limits; by default those of `lk.BackendConfig()`: Adam with a
                learning rate of 1e-3.
            threads: Torch's threads in each server; by default they share this process's.
            seed: Makes fresh parameters depend only on it and on the uid; with "task", only if
                nothing else draws from torch meanwhile.
            initial: A function of a uid, which returns the `state_dict` that this expert begins
                with, unless there is a checkpoint of it; by default fresh parameters.
            label: A name for these servers, which all see.
            hidden: Of the kinds that come with labkit: width of inputs and outputs. A grid that
                runs already says this option and the next four where they are left out.
            inner: Of them: width of the layers between; by default 4 * hidden, and for
                "transformer" 2 * hidden.
            heads: Of "transformer": attention heads, by default 8.
            causal: Of "transformer": whether a position sees only itself and those before it, by
                default not.
            max_length: Of "transformer": the longest sequence that is accepted, by default 2048.
            **options: Keyword arguments of a kind of your own, as its factory takes them.

        Raises:
            ExpertsTaken: There are not as many free places, or others serve those that are named.
            ValueError: The arguments do not fit together, or do not fit the running swarm.
            ServerFailed: A server did not start; on a cluster it says at which host, and why.
        """
        options |= planning.given(hidden=hidden, inner=inner, heads=heads, causal=causal, max_length=max_length)
        check_options(kind, options, also=inspect.signature(Swarm.serve).parameters)
        name = planning.grid_name(kind, name, uids)
        fit = partial(planning.fit_options, kind, options, name)
        isolation, of_server = planning.isolate(isolation, kind, fit(self.grids().get(name)), cluster=on is not None)
        directory = Path(self._folder.name) / "checkpoints" if checkpoint_dir is None else checkpoint_dir
        order = ServeOrder(
            Wish(name, grid, experts, uids, spare_wish(spare, backups, uids)), of_server, options, fit, servers,
            isolation, config={
                "checkpoint_dir": str(user_path(directory, "checkpoint_dir")), "checkpoint_period": checkpoint_period,
                "checkpoint_keep": checkpoint_keep, "threads": threads, "seed": seed, "label": label,
                "backend": planning.check_backend(backend), "backups": backups,
            },
            node=self._node_config, members=self._members, lasting=checkpoint_dir is not None,
            threads=get_num_threads(), beside=sum(server.alive and not server.worker for server in self.servers),
            folder=self._folder.name, initial=initial, cluster=cluster_of(on, workers, resources, servers),
        )  # fmt: skip
        with show_order(order) as show:
            return self._portal.call(order.execute, self._lab, self.servers, meanwhile=show)

    @suggest_options
    def faults(self, latency: float | None = None, loss: float | None = None) -> Faults:
        """Inject faults into all servers started here. Returns the faults that hold now.

        Args:
            latency: Mean in seconds of an exponentially distributed delay before each call; by
                default as it is.
            loss: Share of the calls that get no answer, 0 to 1; by default as it is.

        Raises:
            ValueError: A number is out of range.
        """
        return self._inject_faults(latency, loss)

    def statistics(self, timeout: float = 5.0) -> dict[str, ServerStatistics]:
        """Returns the statistics of all servers of the swarm, by address.

        Servers are looked up anew, wherever they were started: one that has just joined is asked,
        too, and layers call its experts from then on. `timeout`: seconds; a server that gives no
        sensible answer within them is missing.
        """
        return self._portal.call(ask_all_servers, self._node, self.servers, timeout)

    # ------------------------------------------------------------ looking

    def on_event(self, listener: Emit) -> Callable[[], None]:
        """Call `listener` with every event, in its thread. Returns a function that ends this."""
        self._portal.check_open()
        return self.listeners.add(listener)

    def invite(self) -> Invitation:
        """Returns the invitation to this swarm, `labkit://<public key>@host:port`, for `Swarm.join`."""
        node, config = self._node, self._node_config
        return invite_to(node.contact, config.listen, config.announce, node.whereabouts.now)

    def admit(self, key: str) -> None:
        """Let the holder of a public key join this swarm. Raises `ValueError` if it is open."""
        self._portal.check_open()
        if not self._members.admit(parse_key(key)):
            raise ValueError("this swarm is open: everybody who has the invitation may join")

    def dashboard(self) -> Dashboard:
        """Returns the live view of this swarm, a widget; always the same one until it is closed."""
        return self.view.dashboard()

    def snapshot(self, path: str | Path | None = None) -> Picture:
        """Returns a picture of the dashboard as it looks now; with `path`, saves it as a PNG, too."""
        return self.view.picture(path)

    def log(self, *, step: int | None = None, loss: Any = None, samples: int | None = None, **metrics: Any) -> None:
        """Show a training loop of your own in the dashboard and in the loggers of `log_to`.

        It is cheap, and any thread may call it. A number may be a tensor or an array with one
        element; NaN is taken, too. `lk.fit` needs none of this. Once the swarm is closed nothing
        shows it any more, which a warning says: the loop goes on.

        Example:
            swarm.log(loss=loss, accuracy=0.93)

        Args:
            step: Number of the training step, by default one more than the last one.
            loss: The training loss, which becomes the curve of the loss.
            samples: How many samples the step trained on, for samples/s.
            metrics: Other numbers by name. Each becomes a curve, of which 24 are shown.

        Raises:
            TypeError: A value is no number.
            ValueError: A value has more than one element, or `step` is not a whole number.
        """
        self._custom_loop.log(step, loss, samples, metrics)

    def log_to(self, logger: Any, period: float = 1.0) -> Logging:
        """Log training steps and the swarm, until `stop()` of what this returns or the swarm's end.

        Example:
            logging = swarm.log_to(lk.JsonlLogger("run.jsonl"))

        Args:
            logger: A `WandbLogger`, a `JsonlLogger`, or any object with `log(dict)` and
                `finish()`.
            period: Seconds between two rows of the swarm.

        Raises:
            SwarmClosed: The swarm is closed.
        """
        self._portal.check_open()
        return self.view.log_to(logger, period)

    def summary(self) -> SwarmSummary:
        """Returns servers, experts, calls and failures as they are now, as the repr shows them."""
        return self.view.summary()

    def __repr__(self) -> str:
        return printable(self.summary().text())

    def _repr_html_(self) -> str:
        return self.summary().html()
