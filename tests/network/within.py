"""Runs a command in a network of its own, in which it may make hosts, routers and firewalls: `make test-network`.

The command gets a network and a `/run` that nobody else sees, so that nothing of this machine is touched and nothing is
left of what it makes. It takes Linux, and root or user namespaces for everybody.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

MARK = "LABKIT_NETWORK"  # set in the environment of the command
TOOLS = {"ip": "iproute2", "nft": "nftables", "unshare": "util-linux", "nsenter": "util-linux"}  # and their packages
SETUP = 'mount -t tmpfs labkit /run && mkdir /run/netns && ip link set lo up && exec "$@"'


def main(command: list[str]) -> int:
    missing = sorted({package for tool, package in TOOLS.items() if shutil.which(tool, path=search_path()) is None})
    if sys.platform != "linux" or missing:
        packages = " ".join(missing)
        print(f"The network tests take Linux and {packages or 'its namespaces'}." + (
            f" On Debian: apt-get install {packages}" if packages else ""), file=sys.stderr)  # fmt: skip
        return 1
    own = ["unshare", "--net", "--mount"] + ([] if os.geteuid() == 0 else ["--user", "--map-root-user"])
    environment = {**os.environ, "PATH": search_path(), MARK: "1"}
    if subprocess.run([*own, "true"], env=environment, capture_output=True).returncode != 0:
        print("This system gives nobody but root a network of their own; run it as root.", file=sys.stderr)
        return 1
    return subprocess.run([*own, "sh", "-c", SETUP, "sh", *command], env=environment).returncode


def search_path() -> str:
    """Where `nft` is, which is not in everybody's path."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
