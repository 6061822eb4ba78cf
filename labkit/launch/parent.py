"""What the processes of an experiment have in common: they end with their parent."""

from __future__ import annotations

import os
import sys
import threading


def end_with_parent() -> None:
    """End this process when its standard input ends, which its parent holds open and writes nothing to."""

    def heed() -> None:
        sys.stdin.read()
        os._exit(1)

    threading.Thread(target=heed, name="labkit-parent", daemon=True).start()
