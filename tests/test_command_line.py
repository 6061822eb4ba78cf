"""`labkit serve` and `labkit keygen` as a person at a terminal has them."""

from __future__ import annotations

import importlib.metadata
import re
import signal
import stat
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor, nn

import labkit as lk
from labkit.__main__ import main
from labkit.cli import serve as cli_serve
from labkit.cli.parser import in_options
from labkit.cli.serve import read_options
from labkit.errors import SwarmClosed
from labkit.events import CallFinished, CopyFailed, ExpertHandedOver, ExpertTakenOver
from labkit.server.checkpoints import load_expert
from labkit.server.statistics import ServerStatistics
from labkit.swarm import Swarm
from labkit.wire.security import Identity, key_text
from tests.commands import run_until_ended, run_until_signalled
from tests.swarms import eventually
from tests.test_inventory import SAID

X = torch.linspace(-1, 1, 12).reshape(3, 4)


def unhurried_batches() -> Iterator[tuple[Tensor, Tensor]]:
    """Without end, at a pace that leaves time to those who start meanwhile."""
    while True:
        time.sleep(0.02)
        yield torch.randn(8, 4), torch.randint(2, (8,))


class Terminal:
    """A running `labkit serve` and what it has printed."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.printed = ""

    def invitation(self) -> str:
        """Wait until it serves, and read off its invitation."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.printed += line
            if line.startswith("serving"):
                break
        found = re.search(r"^invitation: (\S+)$", self.printed, re.MULTILINE)
        assert found is not None, self.printed
        return found[1]


@contextmanager
def terminal(*arguments: str) -> Iterator[Terminal]:
    command = [sys.executable, "-m", "labkit", "serve", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            yield Terminal(process)
        finally:
            process.kill()


@pytest.mark.usefixtures("forked_python")
def test_a_swarm_of_terminals_and_a_trainer_lives_on_without_the_terminal_that_started_it(tmp_path):
    alone = ("--expert", "nop", "--backups", "0")  # the second keeps no copies of the first's experts
    with terminal(*alone, "--grid", "2", "2", "--experts", "2") as first:
        invite = first.invitation()
        assert "grid nop 2 × 2: 2 experts alive" in first.printed
        assert "same machine only" in first.printed
        with Swarm.join(invite, name="trainer") as swarm:
            old = set(swarm.experts())
            assert len(old) == 2
            used: set[str] = set()
            swarm.on_event(lambda event: used.add(event.uid) if isinstance(event, CallFinished) else None)
            model = nn.Sequential(swarm.moe(4, name="nop", k_best=4), nn.Linear(4, 2))
            run = lk.fit(model, unhurried_batches(), steps=1_000_000, trainers=1)
            eventually(lambda: used == old)

            with terminal("--join", invite, *alone, "--checkpoint-dir", str(tmp_path)) as second:
                second.invitation()
                assert "grid nop 2 × 2: 4 experts alive" in second.printed  # it took the free places
                eventually(lambda: len(used) == 4)  # without a restart
                new = used - old

                first.process.kill()
                used.clear()
                eventually(lambda: new <= used)
                assert run.running
                with Swarm.join(swarm.invite(), name="late") as late:
                    assert new <= set(late.experts())
                    assert late.expert(min(new))(X).equal(X)

                run.stop()
                second.process.send_signal(signal.SIGTERM)
                assert second.process.wait(10) == 0
                assert {path.name for path in tmp_path.iterdir()} == {f"{uid}.safetensors" for uid in new}


# ---------------------------------------------------------------- in this process, which is as good


def kill(swarm: Swarm) -> None:
    """End the server of `labkit serve`, and so the command."""
    with suppress(SwarmClosed):  # the command may hear of it, and close the swarm, before this call returns
        swarm.servers[0].kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_stop_cleanly_and_save(tmp_path, number):
    arguments = ["serve", "--grid", "1", "--hidden", "4", "--checkpoint-dir", str(tmp_path)]
    status, printed = run_until_signalled(arguments, number, lambda swarm: swarm.expert("ffn.0")(X).sum().backward())
    assert status == 0 and "serving until Ctrl-C" in printed
    state = load_expert(tmp_path, "ffn.0")
    assert state is not None and state["counter.updates"] == 1


def test_a_server_that_ends_by_itself_ends_the_command_with_its_reason(capsys):
    status, _ = run_until_ended(["serve", "--expert", "nop"], kill)
    assert status == 1
    assert "labkit: the server ended" in capsys.readouterr().err


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command says that cannot be done: one line, without a traceback, and status 1."""
    assert main(arguments) == 1
    text = capsys.readouterr().err
    assert text.startswith("labkit: ")
    assert text.count("\n") == 1
    return text


def test_a_swarm_that_cannot_be_joined_is_a_line_that_says_why(capsys):
    nobody = f"labkit://{key_text(Identity.generate().public_key)}@127.0.0.1:1"
    assert "127.0.0.1:1: nothing listens there" in complaint(capsys, "serve", "--join", nobody)
    assert "an invitation looks like" in complaint(capsys, "serve", "--join", "127.0.0.1:4000")
    with Swarm("private", members=[]) as private:
        text = complaint(capsys, "serve", "--join", private.invite())
        assert "private" in text and "labkit keygen" in text


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--experts", "0"], "--experts 0: "),
        (["--grid", "0", "4"], "--grid 0 4: "),
        (["--expert", "cnn"], "unknown expert kind 'cnn'; known are"),
        (["--expert", "no.such:Thing"], "'no.such:Thing' cannot be imported"),
        (["--hidden", "0"], "--hidden 0: a whole number from 1"),
        (["--hidden", "7", "--expert", "transformer"], "--hidden 7 is not a multiple of heads=8"),
        (["--listen", "4000"], "tcp://HOST:PORT"),
        (["--key", "/no/such/key"], "make one: labkit keygen /no/such/key"),
        (["--member", "me"], "'me' is not a public key"),
        (["--member", "-" + 42 * "A", "--listen", "4000"], "tcp://HOST:PORT"),
        (["--checkpoint-dir", "/dev/null"], "no checkpoints can be kept in /dev/null"),
        (["--checkpoint-period", "0"], "--checkpoint-period 0.0: "),
        (["--checkpoint-keep", "0"], "--checkpoint-keep 0: "),
        (["--checkpoint-dir", ""], "--checkpoint-dir '': "),
        (["--announce", "a:b:c"], "--announce a:b:c is not an address"),
        (["--name", "a.b"], "'a.b' is not a grid name"),
        (["--device", "gpu"], "--device gpu: write cpu, or cuda"),
        (["--device", "meta"], "--device meta: write cpu, or cuda"),
        (["--device", "cuda:99"], "--device cuda:99: not here; torch can compute on cpu"),
        (["--optimizer", "adm"], "--optimizer adm: one of adam, adamw, sgd; did you mean 'adam'?"),
        (["--clip", "-1"], "--clip -1.0: "),
        (["--lr", "nan"], "--lr nan: "),
        (["--threads", "0"], "--threads 0: "),
        (["--threads", "100000"], "--threads 100000: from 1 to 1,024"),
        (["--label", "a\nb"], "at most 64 characters in one line"),
        (["--expert", "transfomer"], "did you mean 'transformer'?"),
        (["--option", "inner"], "--option 'inner': write NAME=VALUE"),
        (["--option", "inner=8", "--option", "inner=9"], "inner is given twice"),
        (["--option", "iner=8"], "takes no option iner; did you mean 'inner'? It takes hidden (required), inner"),
        (["--option", "inner=wide"], "inner='wide': a whole number from 1"),
        (
            ["--option", "lr=1"],
            "takes no option lr; it takes hidden (required), inner. How it is trained is set by --lr, --opt",
        ),
        (["--expert", "transformer", "--option", "heads=0"], "heads=0: a whole number from 1"),
        (["--expert", "transformer", "--option", "causal=yes"], "causal='yes': true or false"),
        (["--option", "label=x"], "--option label=…: not an option of a kind"),
        (["--hidden", "4", "--option", "hidden=8"], "either --hidden"),
    ],
)
def test_what_cannot_be_served_is_a_line_that_says_why(capsys, arguments, text):
    assert text in complaint(capsys, "serve", *arguments)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["demo", "--seed", "-1"], "--seed -1: "),
        (["demo", "--seed", f"{10**30}"], "--seed 1000"),
        (["demo", "--data-dir", "here"], "--data-dir: the data set digits reads no files"),
        (["demo", "--dataset", "mnist", "--data-dir", ""], "--data-dir '': "),
        (["bench", "rpc", "--hidden", "0"], "--hidden 0: "),
        (["bench", "moe", "--k-best", "100"], "--k-best 100"),
        (["bench", "latency", "--delays-ms", "-5"], "--delays-ms -5"),
    ],
)
def test_what_a_command_cannot_do_is_said_in_the_words_of_its_options(capsys, arguments, text):
    assert text in complaint(capsys, *arguments)


def test_an_error_is_put_in_the_words_of_a_command_line_and_what_is_no_argument_is_left_as_it_is():
    names = ["lr", "grid", "name", "key"]
    assert in_options("serve it with name=…, as grid=(2, 3) or lr=0.5", names) == (
        "serve it with --name …, as --grid 2 3 or --lr 0.5"
    )
    assert in_options("name='a b': no name", names) == "--name 'a b': no name"
    other = "labkit://host:1?key=3, with heads=8 and color=1"
    assert in_options(other, names) == other


def test_options_of_a_server_reach_its_experts_and_its_label_is_seen_by_all(capsys):
    seen: list[Any] = []

    def look(swarm: Swarm) -> None:
        with Swarm.join(swarm.invite(), name="other") as other:
            seen.append((swarm.servers[0].plan.server, repr(other), other._repr_html_()))
        kill(swarm)

    arguments = ["--expert", "transformer", "--hidden", "8", "--option", "heads=2", "--option", "causal=True"]
    training = ["--lr", "0.01", "--optimizer", "sgd", "--clip", "1.5", "--threads", "1", "--label", "kitchen <b>"]
    run_until_ended(["serve", "--grid", "1", "2", *arguments, *training], look)
    [(config, text, html)] = seen
    assert config.options == {"hidden": 8, "heads": 2, "causal": True}
    assert (config.backend.lr, config.backend.optimizer, config.backend.clip_grad_norm) == (0.01, "sgd", 1.5)
    assert config.threads == 1
    assert "kitchen <b>  remote" in text and "kitchen &lt;b&gt;" in html and "○  elsewhere" not in text


def test_values_of_options_are_read_as_what_they_look_like():
    texts = ["a=3", "b=0.5", "c=true", "d=None", "e=gelu", 'f="3"', "g=nan", "h-i=x=y", "j="]
    assert read_options(texts) == {
        "a": 3, "b": 0.5, "c": True, "d": None, "e": "gelu", "f": "3", "g": "nan", "h_i": "x=y", "j": "",
    }  # fmt: skip


@pytest.mark.parametrize("quiet", [False, True])
def test_a_server_says_now_and_then_what_it_does_when_it_was_called_and_else_nothing(monkeypatch, quiet):
    monkeypatch.setattr(cli_serve, "LOOK_PERIOD", 0.01)
    monkeypatch.setattr(cli_serve, "REPORT_PERIOD", 0.05)

    lines: list[str] = []
    monkeypatch.setattr(cli_serve.Report, "_print", lambda report, line: lines.append(line))

    def call(swarm: Swarm) -> None:
        for _ in range(3):
            swarm.expert("nop.0.0")(X)
        eventually(lambda: quiet or any("3 calls answered" in line for line in lines))
        time.sleep(0.3)  # in which nothing is said
        kill(swarm)

    run_until_ended(["serve", "--expert", "nop", "--experts", "2", *(["--quiet"] if quiet else [])], call)
    assert bool(lines) is not quiet
    for line in lines[-1:]:
        assert re.fullmatch(r"\d\d:\d\d:\d\d  2 experts, 3 calls answered, 0 peers: [\d,.]+ calls/s", line)
    assert sum("3 calls answered" in line for line in lines) == len(lines[-1:])


def test_in_a_terminal_one_line_is_written_again_and_again(capsys):
    with Swarm("line") as swarm:
        (server,) = swarm.serve("nop", grid=(1, 1), isolation="task")
        report = cli_serve.Report(swarm, rewrite=True)
        report.write(server)
        report.write(server)
        report.end_line()
    out = capsys.readouterr().out
    assert out.count("\r") == 2 and out.count("\n") == 1 and "1 expert, 0 calls answered, 0 peers" in out


def test_a_server_says_what_it_took_over_and_gave_and_once_what_is_not_copied(capsys):
    with Swarm("news") as swarm:
        (server,) = swarm.serve("nop", grid=(1, 1), isolation="task")
        assert server.contact is not None
        own = server.contact.endpoint
        report = cli_serve.Report(swarm, rewrite=False)
        taken = [
            ExpertTakenOver(uid=f"nop.0.{n}", address=own, before="b:1", epoch=1, lost_updates=n, seconds=1.5)
            for n in range(3)
        ]
        failed = [CopyFailed(uid="nop.0.0", address="c:1", cause="refused", detail="the disk is full")] * 2
        report.write_all_news(deque([*taken, *failed]))
        out = capsys.readouterr().out
        assert out[10:] == "nop.0.0 is not copied to c:1: the disk is full\n", "of the others more may come"
        report.write_all_news(
            deque([ExpertHandedOver(uid="nop.0.0", address=own, to="c:1", epoch=2), *failed]), last=True
        )
    said = [line[10:] for line in capsys.readouterr().out.splitlines()]
    assert said == ["this server took over 3 experts of b:1, 3 updates lost", "this server gave 1 expert to c:1"]


def test_a_server_counts_the_experts_that_it_adopted_and_the_copies_that_it_keeps():
    said = msgspec.convert(SAID | {"copies": {"adopted": ["ffn.0.0"], "kept": 2}}, ServerStatistics)
    assert cli_serve._experts(said) == "1 expert (1 adopted), 2 copies of others"
    assert cli_serve._experts(msgspec.convert(SAID, ServerStatistics)) == "1 expert"


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [(["serv"], "'serve'"), (["serve", "--lable", "x"], "'--label'"), (["bench", "mo"], "'moe'")],
)
def test_a_misspelt_command_or_option_is_asked_back(capsys, arguments, meant):
    with pytest.raises(SystemExit):
        main(arguments)
    assert f"did you mean {meant}?" in capsys.readouterr().err


def test_a_joined_server_listens_as_wide_as_the_swarm(capsys):
    with Swarm("wide", listen="tcp://0.0.0.0:*") as wide:
        heard: list[str] = []

        def look(swarm: Swarm) -> None:
            heard.extend(info.contact.host for info in wide.experts().values())
            kill(swarm)

        run_until_ended(["serve", "--join", wide.invite(), "--expert", "nop", "--experts", "1"], look)
        assert heard == [wide._node.contact.host]


def test_a_joined_server_takes_all_free_places_of_a_grid_that_is_named_after_its_factory(capsys):
    with Swarm("growing") as growing:
        growing.serve("labkit.server.layers:Nop", grid=(3, 4), experts=2, isolation="task")
        taken: list[int] = []

        def look(swarm: Swarm) -> None:
            taken.append(len(swarm.servers[0].uids))
            kill(swarm)

        run_until_ended(["serve", "--join", growing.invite(), "--expert", "labkit.server.layers:Nop"], look)
        assert taken == [10]


def test_keygen_makes_a_file_for_its_owner_alone_and_prints_the_public_key(tmp_path, capsys):
    path = tmp_path / "keys" / "mine"
    assert main(["keygen", str(path)]) == 0
    assert capsys.readouterr().out.strip() == key_text(Identity.load(path).public_key)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "never overwritten" in complaint(capsys, "keygen", str(path))
    assert "cannot be written" in complaint(capsys, "keygen", str(path / "below"))


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"labkit {lk.__version__}\n"
    assert lk.__version__ == importlib.metadata.version("labkit")


def test_a_command_that_is_misspelt_is_explained(capsys):
    for wrong in ([], ["srve"], ["serve", "--experts", "many"]):
        with pytest.raises(SystemExit, match="2"):
            main(wrong)
        assert "usage: labkit" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["labkit.__main__", "labkit.cli.page_server", "labkit.launch.parent"])
def test_options_are_read_and_parents_are_watched_without_an_import_of_torch(module):
    code = f"import sys, {module}; sys.exit(any(name in sys.modules for name in ('torch', 'trio', 'zmq')))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
