"""A path means later what it meant when it was given, whatever the current folder is by then, and `~` is home."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import labkit as lk
from labkit.__main__ import main
from labkit.paths import user_path
from labkit.server.config import ServerConfig
from labkit.swarm import Swarm
from labkit.view.log.loggers import JsonlLogger, WandbLogger
from labkit.view.picture.canvas import Picture
from labkit.wire.security import Identity

pytestmark = pytest.mark.usefixtures("forked_python")

X = torch.linspace(-1, 1, 12).reshape(3, 4)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch) -> Path:
    """A home directory, which is not the current folder."""
    for folder in ("home", "here", "elsewhere"):
        (tmp_path / folder).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


@pytest.mark.parametrize("given", ["ck", Path("ck"), "./ck", "ck/"])
def test_a_relative_path_begins_at_the_folder_in_which_it_was_given(given, tmp_path, monkeypatch):
    path = user_path(given)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert path == tmp_path / "here" / "ck"


def test_a_link_stays_a_link_and_two_dots_lead_where_the_system_says(tmp_path):
    (tmp_path / "here" / "link").symlink_to(tmp_path / "elsewhere")
    assert user_path("link").is_symlink()
    assert os.path.samefile(user_path("link/.."), tmp_path)


@pytest.mark.parametrize(("given", "said"), [("", "which is not empty"), ("~no such user/x", "home directory")])
def test_a_path_that_leads_nowhere_is_refused_by_the_name_of_its_argument(given, said):
    with pytest.raises(ValueError, match=rf"checkpoint_dir=.*{said}"):
        ServerConfig(uids=("ffn.0",), checkpoint_dir=given)
    with Swarm("nowhere") as swarm, pytest.raises(ValueError, match=rf"checkpoint_dir=.*{said}"):
        swarm.serve("nop", grid=(1,), isolation="task", checkpoint_dir=given)


@pytest.mark.parametrize("isolation", ["task", "process"])
def test_a_server_that_is_restarted_in_another_folder_finds_its_checkpoint(isolation, tmp_path, monkeypatch):
    with Swarm("moves") as swarm:
        (server,) = swarm.serve("ffn", hidden=4, grid=(1,), isolation=isolation, checkpoint_dir="ck")
        swarm.expert("ffn.0")(X).sum().backward()
        learnt = swarm.expert("ffn.0")(X)
        server.stop()
        monkeypatch.chdir(tmp_path / "elsewhere")
        server.restart()
        assert swarm.expert("ffn.0")(X).equal(learnt)
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == []


def test_home_is_understood_wherever_a_path_is_given(home, capsys):
    run = SimpleNamespace(log=print, define_metric=lambda *_, **__: None, log_artifact=print, id="r")
    (home / "data").mkdir()
    assert main(["keygen", "~/key"]) == 0
    assert Identity.load("~/key").public_key
    Picture(b"png").save("~/picture.png")
    JsonlLogger("~/rows.jsonl").finish()
    with pytest.raises(ValueError, match=f"no checkpoints .* in {home}/ck"):
        WandbLogger(run, checkpoints="~/ck").finish()  # type: ignore[arg-type]
    with pytest.raises(lk.DataNotFound, match=f"neither {home}/data"):
        lk.load("mnist", "~/data")
    with Swarm("home", key="~/key") as swarm:
        swarm.serve("nop", grid=(1,), isolation="task", checkpoint_dir="~/ck")
        swarm.snapshot("~/snapshot.png")
    written = {"key", "picture.png", "rows.jsonl", "data", "ck", "snapshot.png"}
    assert written <= {path.name for path in home.iterdir()}


def test_what_a_logger_writes_at_its_end_comes_from_the_folder_that_was_meant(tmp_path, monkeypatch):
    run = SimpleNamespace(log=print, define_metric=lambda *_, **__: None, log_artifact=print, id="r")
    wandb, jsonl = WandbLogger(run, checkpoints="ck"), JsonlLogger("rows.jsonl")  # type: ignore[arg-type]
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert jsonl.path == tmp_path / "here" / "rows.jsonl"
    with pytest.raises(ValueError, match=f"in {tmp_path}/here/ck"):
        wandb.finish()
    jsonl.finish()


def test_a_path_that_is_empty_or_nobodys_ends_a_command_with_words(capsys):
    assert main(["keygen", "~no such user/key"]) == 1
    assert "key=" in capsys.readouterr().err
