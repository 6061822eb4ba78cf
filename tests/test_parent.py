"""The watch over a parent process: a child ends when its standard input does, and is not hurt by the watch before."""

from __future__ import annotations

import subprocess
import sys

import pytest


def child(code: str) -> subprocess.Popen[str]:
    """A process that runs `code`, with `watch_parent` and `sleep` at hand."""
    lines = ["from time import sleep", "from labkit.launch.parent import limit_time, watch_parent", code]
    return subprocess.Popen(
        [sys.executable, "-c", "\n".join(lines)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_child_that_is_done_before_its_parent_ends_without_a_fault():
    with child("watch_parent()\nsleep(0.2)\nprint('done')") as process:
        assert process.stdout is not None and process.stderr is not None
        assert (process.stdout.read(), process.stderr.read()) == ("done\n", "")
        assert process.wait(10) == 0  # its thread still reads the standard input, which is open


@pytest.mark.parametrize("seconds", [0.0, 0.2])
def test_a_child_whose_parent_is_gone_ends_even_if_it_cannot_by_itself(seconds):
    with child(f"watch_parent(lambda: print('gone', flush=True), exit_after=lambda: {seconds})\nsleep(60)") as process:
        output, errors = process.communicate(timeout=10)
        assert (output, errors, process.returncode) == ("gone\n", "", 1)


def test_lines_are_handed_on_and_one_of_them_may_stand_for_the_end():
    code = "watch_parent(on_line=lambda line: print(line, flush=True) or line == b'stop\\n')\nsleep(60)"
    with child(code) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("go\nstop\nmore\n")
        process.stdin.flush()
        assert process.stdout.read() == "b'go\\n'\nb'stop\\n'\n"
        assert process.wait(10) == 1


def test_a_child_with_a_limit_ends_when_its_time_is_up():
    with child("limit_time(0.1)\nsleep(60)") as process:
        assert process.wait(10) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="there a process keeps its parent's id")
def test_a_child_ends_with_its_parent_even_if_another_process_holds_its_input_open():
    code = "watch_parent(lambda: print('gone', flush=True))\nprint('begun', flush=True)\nsleep(60)"
    lines = "\n".join(["from time import sleep", "from labkit.launch.parent import watch_parent", code])
    parent = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {lines!r}]); input()"
    with subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == b"begun\n"
        process.kill()  # the input is still open: this process holds it
        assert process.stdout.read() == b"gone\n"
