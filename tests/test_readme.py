"""The README's code does what it says, as a script.

`tests/browser/test_readme.py` runs it line by line in IPython's shell, and cell by cell in JupyterLab.
"""

from __future__ import annotations

import re
import tomllib

import pytest

from tests.readme import README, blocks, run

pytestmark = [pytest.mark.timeout(180), pytest.mark.usefixtures("forked_python")]


ROOT = README.parent


def test_it_runs_as_a_script(tmp_path):
    (tmp_path / "readme.py").write_text("\n".join(blocks()), encoding="utf-8")
    run(tmp_path, "readme.py")


@pytest.mark.parametrize("file", ["README.md", "Makefile", "environment.yml"])
def test_the_extras_that_are_named_exist(file):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    named = re.findall(r"(?:labkit|\.)\[([a-z,]+)\]", (ROOT / file).read_text(encoding="utf-8"))
    assert "lab" in ",".join(named).split(",") and set(",".join(named).split(",")) <= set(extras)


def test_make_lab_opens_a_notebook_that_exists():
    [notebook] = re.findall(r"default_url=/lab/tree/(\S+\.ipynb)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert (ROOT / notebook).is_file()
