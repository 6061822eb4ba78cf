"""The README's code does what it says: as a script, and line by line in IPython's shell.

`tests/browser/test_readme.py` runs it cell by cell in JupyterLab.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.readme import README, blocks, cells

TIMEOUT = 110.0  # seconds; importing torch in five processes takes most of it
pytestmark = pytest.mark.timeout(180)


ROOT = README.parent


def run(folder: Path, *command: str, typed: str = "") -> str:
    """Run a program to its end, with what is typed into it. Returns what it printed, errors included."""
    done = subprocess.run(
        [sys.executable, *command], input=typed, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=TIMEOUT, cwd=folder, env={**os.environ, "IPYTHONDIR": str(folder), "MPLBACKEND": "agg"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "Traceback" not in done.stdout and "Error" not in done.stdout, done.stdout
    return done.stdout


def test_it_runs_as_a_script(tmp_path):
    (tmp_path / "readme.py").write_text("\n".join(blocks()), encoding="utf-8")
    run(tmp_path, "readme.py")


def test_it_runs_in_the_shell_of_ipython(tmp_path):
    typed = "\n".join([*cells(), "run", "exit", ""])
    said = run(tmp_path, "-m", "IPython", "--simple-prompt", "--no-banner", typed=typed)
    assert "swarm 'default', open at" in said  # the dashboard, in words
    assert re.search(r"labkit://\S+@127\.0\.0\.1:\d+", said)
    assert re.search(r"<run \w+: [\d,]+ of 400 steps", said)


@pytest.mark.parametrize("file", ["README.md", "Makefile", "environment.yml"])
def test_the_extras_that_are_named_exist(file):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    named = re.findall(r"(?:labkit|\.)\[([a-z,]+)\]", (ROOT / file).read_text(encoding="utf-8"))
    assert "lab" in ",".join(named).split(",") and set(",".join(named).split(",")) <= set(extras)


def test_make_lab_opens_a_notebook_that_exists():
    [notebook] = re.findall(r"default_url=/lab/tree/(\S+\.ipynb)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert (ROOT / notebook).is_file()
