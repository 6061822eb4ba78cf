"""What the system lets a process have, and what a process takes of it."""

from __future__ import annotations

import sys
from pathlib import Path


def open_files() -> int:
    """How many files and sockets this process may have open."""
    try:
        import resource
    except ImportError:  # Windows, which sets no such limit
        return 1 << 16
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 16 if soft == resource.RLIM_INFINITY else min(soft, 1 << 16)


def peak_rss_mb(pid: int | None = None) -> int:
    """The most memory that a process, this one by default, had at a time, in MB; 0 where the system does not say."""
    # What `getrusage` says on Linux is, at the least, what the parent had when it started this process.
    status = Path(f"/proc/{pid or 'self'}/status")
    if status.exists():
        line = next((line for line in status.read_text().splitlines() if line.startswith("VmHWM")), "VmHWM: 0 kB")
        return int(line.split()[1]) >> 10
    if pid is not None:
        return 0
    try:
        import resource
    except ImportError:
        return 0
    scale = 1 << 20 if sys.platform == "darwin" else 1 << 10  # it is in bytes there
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // scale
