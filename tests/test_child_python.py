"""What a child process of labkit can import, whatever lies in the current folder and in `sys.path`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from labkit.launch.child_python import importable, search_working_folder_last, working_folder_last

KINDS = """
from torch import nn
class Mine(nn.Module):
    def forward(self, x): return 2 * x
"""
NAMES = ("secrets", "queue", "random", "json", "labkit", "torch", "trio", "zmq", "msgspec", "numpy", "logging")
COMMAND = "import sys; from labkit.__main__ import main; sys.exit(main())"  # as the console script does it


@pytest.fixture
def crowded(tmp_path):
    """A folder with files of the names of modules that labkit needs, and with a kind of experts."""
    for name in NAMES:
        (tmp_path / f"{name}.py").write_text("raise ImportError('a file of the user was imported')")
    (tmp_path / "kinds.py").write_text(KINDS)
    return tmp_path


def test_a_command_finds_kinds_in_a_folder_whose_files_have_names_of_modules(crowded):
    command = [sys.executable, "-P", "-c", COMMAND, "serve", "--expert", "kinds:Mine", "--experts", "1"]
    with subprocess.Popen(command, cwd=crowded, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as serving:
        assert serving.stdout is not None
        said = ""
        for line in serving.stdout:
            said += line
            if line.startswith("serving"):
                serving.send_signal(signal.SIGTERM)
        assert serving.wait() == 0, said
    assert "grid mine" in said and "1 experts alive" in said


def test_servers_start_from_such_a_folder_and_with_anything_in_the_search_path(crowded):
    code = """
import os, pathlib, sys, torch, labkit as lk
lk.Swarm  # imported, as in a notebook, before its folder came into the path
sys.path[:0] = [pathlib.Path(os.curdir), b"bytes", "relative", "no/such", "\\udcff", ""]
sys.path += [None, 3]
with lk.Swarm() as swarm:
    swarm.serve("kinds:Mine", grid=(1,), isolation="process")
    assert swarm.expert("mine.0")(torch.ones(1, 2)).tolist() == [[2.0, 2.0]]
"""
    subprocess.run([sys.executable, "-P", "-c", code], cwd=crowded, check=True, timeout=60)


def test_and_from_a_folder_that_is_gone(tmp_path):
    (tmp_path / "gone").mkdir()
    code = """
import os, sys, torch, labkit as lk
(torch.ones(2, 2) @ torch.ones(2, 2)).sum()  # torch loads the rest of itself, which it cannot do in such a folder
lk.Swarm  # and so do the packages that it imports
sys.path[:0] = ["", "relative"]
os.rmdir(os.getcwd())
with lk.Swarm() as swarm:
    swarm.serve("ffn", hidden=2, grid=(1,), isolation="process")
    assert swarm.expert("ffn.0")(torch.ones(1, 2)).shape == (1, 2)
"""
    # Python keeps what it compiles for -O, or this would compile all of torch every time.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-O", "-c", code]
    subprocess.run(command, cwd=tmp_path / "gone", env=environment, check=True, timeout=60)


def test_pythons_library_comes_first_and_what_python_itself_ignores_last(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    library = sysconfig.get_path("stdlib")
    path = ["", Path("odd"), "src", library, str(tmp_path / "other"), b"bytes", None, 3]
    own = str(tmp_path)
    expected = [library, own, f"{own}/src", f"{own}/other", f"{own}/odd", f"{own}/bytes"]
    assert importable(path) == [str(Path(entry)) for entry in expected]
    assert working_folder_last(importable(path)) == [*importable(path)[:1], *importable(path)[2:], own]


def test_a_command_looks_into_the_current_folder_last(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    search_working_folder_last()
    assert sys.path[-1] == str(tmp_path) and sys.path.count(str(tmp_path)) == 1


SERVES_ITSELF = """
import labkit as lk
swarm = lk.Swarm()
swarm.serve(KIND, grid=(1,), isolation=ISOLATION)
"""
MODULES = {  # what each serves, and where
    "exp0": ("Mine", "'task'"),
    "exp1": ("'exp1:Mine'", "'task'"),
    "exp2": ("'exp2:Later'", "'task'"),
    "exp3": ("Mine", "None"),
}
IMPORT_ALL = """
import importlib, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
        print("done")
    except Exception as error:
        print(f"{type(error).__name__}: {error}".splitlines()[-1])
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> dict[str, str]:
    """The last words of the import of each module, all in one process."""
    folder = tmp_path_factory.mktemp("modules")
    for name, (kind, isolation) in MODULES.items():
        code = SERVES_ITSELF.replace("KIND", kind).replace("ISOLATION", isolation)
        (folder / f"{name}.py").write_text(KINDS + code)
    command = [sys.executable, "-c", IMPORT_ALL, *MODULES]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=True)
    return dict(zip(MODULES, done.stdout.splitlines(), strict=True))


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("exp0", "done"),
        ("exp1", "done"),
        ("exp2", "the module is still being imported, and has not come to 'Later'"),
        ("exp3", "the module 'exp3' starts a swarm when it is imported"),
    ],
)
def test_a_module_that_serves_its_own_class_while_it_is_imported(said, module, words):
    assert words in said[module]
    assert "ServerFailed" not in said[module] or "if __name__ == '__main__'" in said[module]
