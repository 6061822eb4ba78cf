"""What a server holds: the options with which it is started, here or in a child process.

It comes before any batch: `server.server` builds its experts from it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from labkit.expert_protocol import MAX_LABEL, clean_label
from labkit.expert_uid import check_inside, check_name, split_uid
from labkit.paths import user_path
from labkit.server.optimizer import BackendConfig

MAX_BACKUPS = 8  # copies of an expert that its record names
MAX_THREADS = 1024  # of one operation; many more than a system gives a process end it, without a word


@dataclass(frozen=True)
class ServerConfig:
    """What a server holds. The values are plain (if `kind` is text), so that a child process can get them as JSON.

    Args:
        uids: The experts to serve at the start, each once; at least one, unless it is a spare.
        grid: Sizes of the grid that the uids lie in, which is declared with them; None to declare no grid.
        kind: A registered name, `"package.module:factory"`, or a factory; see `make_expert`.
        options: What the factory is given.
        backend: How the experts are trained and what they accept.
        checkpoint_dir: Experts are loaded from there at the start, and saved there regularly and at a clean stop.
        checkpoint_period: Seconds between two saves; None for `usual_period`.
        checkpoint_keep: Checkpoints of each expert that are kept, the last one included.
        max_queue_rows: Rows that may wait before requests are turned away.
        threads: Torch's threads for one operation; None leaves them as they are.
        seed: Makes each expert's fresh parameters a function of the seed and its uid, provided that nothing else in
            this process draws from torch's generator meanwhile. In a server process nothing does. A trainer beside a
            server that is a task may; then some of the trainer's own numbers come twice, too.
        label: A name for the server, which others see.
        spare: Whether the server stays in the swarm without any expert, at the start or when others have taken its own.
        name: Of the grid; that of `uids` by default.
        backups: How many other servers keep a copy of each expert, besides the one with that in reserve; 0 for no part
            in copies, also for those of others.
        copies_dir: Where copies of others' experts are kept; None for a temporary folder.
    """

    uids: tuple[str, ...]
    grid: tuple[int, ...] | None = None
    kind: Any = "ffn"  # str | Factory
    options: dict[str, Any] = field(default_factory=dict)
    backend: BackendConfig = field(default_factory=BackendConfig)
    checkpoint_dir: str | None = None
    checkpoint_period: float | None = None
    checkpoint_keep: int = 1
    max_queue_rows: int = 65536
    threads: int | None = None
    seed: int | None = None
    label: str = ""
    spare: bool = False
    name: str = ""
    backups: int = 0
    copies_dir: str | None = None

    def __post_init__(self) -> None:
        if self.checkpoint_dir is not None:  # absolute, so that a later restart finds it, whatever the folder is then
            object.__setattr__(self, "checkpoint_dir", str(user_path(self.checkpoint_dir, "checkpoint_dir")))
        for uid in self.uids:
            split_uid(uid)
        if self.grid is not None:
            check_inside(self.uids, self.grid)
        if len(set(self.uids)) != len(self.uids) or not (self.uids or self.spare):
            raise ValueError("uids: at least one, and each once")
        names = {split_uid(uid)[0] for uid in self.uids}
        if self.name and names - {check_name(self.name)}:
            raise ValueError(f"name={self.name!r}: the experts are of the grid {', '.join(sorted(names))}")
        if self.grid is not None and not (self.name or names):
            raise ValueError("name: that of the grid, where there are no uids")
        if not self.name and len(names) == 1:
            object.__setattr__(self, "name", *names)
        if self.checkpoint_period is not None and not 0 < self.checkpoint_period < math.inf:
            raise ValueError(f"checkpoint_period={self.checkpoint_period}: a number of seconds above 0")
        if not isinstance(self.checkpoint_keep, int) or self.checkpoint_keep < 1:
            raise ValueError(f"checkpoint_keep={self.checkpoint_keep!r}: a number of checkpoints, at least 1")
        if not isinstance(self.backups, int) or not 0 <= self.backups <= MAX_BACKUPS:
            raise ValueError(f"backups={self.backups!r}: a number of copies, from 0 to {MAX_BACKUPS}")
        if self.threads is not None and not (isinstance(self.threads, int) and 1 <= self.threads <= MAX_THREADS):
            raise ValueError(f"threads={self.threads!r}: from 1 to {MAX_THREADS:,}")
        if not isinstance(self.label, str) or self.label != clean_label(self.label):
            raise ValueError(f"label={self.label!r}: at most {MAX_LABEL} characters in one line")

    @property
    def carries(self) -> bool:
        """Whether the server takes part in copies: it makes them, keeps those of others, and takes experts over."""
        return bool(self.name) and (self.backups > 0 or self.spare)
