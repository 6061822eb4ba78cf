"""A forked process of Python is like one that was started: what tests of processes rely on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import psutil
import pytest

from tests.forked_python import PLAIN, order_of

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere all are started"),
    pytest.mark.usefixtures("forked_python"),
]
SAY = (
    "import os, sys; print(sys.argv, os.environ['HERE'], os.getcwd(), os.getppid(), os.getsid(0) == os.getpid(), "
    "'torch' in sys.modules, 'labkit' in sys.modules); print(sys.stdin.read(), file=sys.stderr); sys.exit(7)"
)


def test_it_has_arguments_an_environment_a_folder_streams_a_parent_and_a_session_and_imports_labkit_itself(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SAY, "a", "b c"], input="typed", capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "HERE": "ä"}, start_new_session=True,
    )  # fmt: skip
    assert done.stdout == f"['-c', 'a', 'b c'] ä {tmp_path} {os.getpid()} True True False\n"
    assert (done.stderr, done.returncode) == ("typed\n", 7)


def test_it_runs_modules_and_scripts_ends_as_python_does_and_shows_what_it_raises(tmp_path):
    (tmp_path / "beside.py").write_text("WORD = 'found'")
    (tmp_path / "script.py").write_text("import atexit, beside\natexit.register(print, beside.WORD, __name__)\n1 / 0")
    done = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("found __main__\n", 1) and "ZeroDivisionError" in done.stderr
    assert b"usage: labkit" in subprocess.run([sys.executable, "-m", "labkit", "--help"], capture_output=True).stdout


def test_it_is_killed_like_any_other_and_leaves_nothing():
    with subprocess.Popen([sys.executable, "-c", "print(flush=True); input()"], stdout=-1, stdin=-1) as process:
        assert process.stdout is not None and process.stdout.readline() == b"\n"
        assert process.pid in {child.pid for child in psutil.Process().children()}
        process.kill()
        assert process.wait(20) == -signal.SIGKILL and not psutil.pid_exists(process.pid)


@pytest.mark.parametrize(
    ("command", "environment"),
    [
        (["sh", "-c", "exit"], {}), ([sys.executable, "-O", "-c", ""], {}), ([sys.executable], {}),
        ([sys.executable, "-c", ""], {"PYTHONUTF8": "0"}), ([sys.executable, "-c", ""], {"LC_ALL": "xx"}),
    ],
)  # fmt: skip
def test_what_the_template_cannot_stand_for_is_started(command, environment):
    assert subprocess.Popen is not PLAIN
    assert order_of(command, {**os.environ, **environment}, None, False) is None
