"""The script that measures what a dashboard costs: that it still speeds up what the package has."""

from __future__ import annotations

import subprocess
import sys

from tests.measure_dashboard import FASTER


def test_what_recurs_is_found_under_the_names_by_which_it_is_sped_up():
    subprocess.run([sys.executable, "-c", f"TIMES = 8\n{FASTER}"], check=True, timeout=60)
