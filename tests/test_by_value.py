"""Experts that no import finds: what a cell, a function or `__main__` defines is served by a process, too.

How a notebook does it is in the third tutorial, and a cluster in `network/test_local_cluster`.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import labkit as lk
from labkit.launch import by_value
from labkit.launch.by_value import HandedKind
from labkit.launch.planning import isolate
from labkit.launch.server_process import is_plain
from labkit.server.checkpoints import load_expert
from labkit.server.layers import make_expert
from labkit.swarm import Swarm

pytestmark = pytest.mark.usefixtures("forked_python")

X = torch.linspace(-1, 1, 12).reshape(3, 4)


@pytest.fixture(scope="module")
def swarm() -> Iterator[Swarm]:
    with Swarm("by value") as swarm:
        yield swarm


def test_a_class_of_a_function_is_served_by_a_process_with_options_that_are_no_json(swarm, tmp_path):
    scale = 3.0

    class Scaled(nn.Module):
        def __init__(self, activation: nn.Module, shape: tuple[int, ...]) -> None:
            super().__init__()
            self.activation, self.weight = activation, nn.Parameter(torch.zeros(shape))

        def forward(self, x):
            print("an expert speaks", flush=True)
            return scale * self.activation(x) + self.weight

    (server,) = swarm.serve(Scaled, grid=(1,), activation=nn.Tanh(), shape=(4,), checkpoint_dir=tmp_path)
    assert server.isolation == "process" and server.pid not in (None, os.getpid())
    torch.testing.assert_close(swarm.expert("scaled.0")(X), 3 * X.tanh())
    assert server.logs() == "\n".join(["an expert speaks"] * server.logs().count("an")), "of trials and of the call"
    server.stop()
    assert load_expert(tmp_path, "scaled.0", kind="Scaled") is not None
    (task,) = swarm.serve(
        Scaled, uids=["scaled.0"], activation=nn.Tanh(), shape=(4,), checkpoint_dir=tmp_path, isolation="task"
    )
    assert task.alive, "the checkpoint of a process is read by a task: the kind has one name"
    task.stop()


def test_a_name_that_only_this_process_knows_is_served_by_a_process_under_that_name(swarm, tmp_path):
    lk.register_expert("only_here", lambda width: nn.Linear(width, width))
    (server,) = swarm.serve("only_here", grid=(1,), width=4, checkpoint_dir=tmp_path)
    assert server.isolation == "process" and swarm.expert("only_here.0")(X).shape == X.shape
    server.stop()
    assert load_expert(tmp_path, "only_here.0", kind="only_here") is not None


def test_what_cannot_be_handed_over_is_served_by_a_task_unless_a_process_is_asked_for():
    lock = threading.Lock()

    def locked() -> nn.Module:
        with lock:
            return nn.Identity()

    assert isolate(None, locked, {}) == ("task", locked)
    with pytest.raises(ValueError, match=r"locked cannot be handed .*TypeError: cannot pickle.*isolation=\"task\""):
        isolate("process", locked, {})
    with pytest.raises(ValueError, match=r"locked cannot be handed .*a module that the workers can import"):
        isolate(None, locked, {}, cluster=True)
    with pytest.raises(ValueError, match=r"lock=<unlocked .* cannot be handed"):
        isolate("process", "torch.nn:Identity", {"lock": lock})


def test_what_can_be_imported_goes_by_its_name_unless_its_module_is_to_go_by_value():
    cloudpickle = pytest.importorskip("cloudpickle")
    assert isolate(None, nn.Linear, {}) == ("process", "torch.nn.modules.linear:Linear")
    assert isolate(None, "ffn", {"hidden": 4}) == ("process", "ffn")
    module: Any = importlib.import_module("tests.swarms")

    def factory() -> nn.Module:
        return nn.Identity()

    factory.__module__, factory.__qualname__ = module.__name__, "factory"
    module.factory = factory
    try:
        assert isolate(None, factory, {}) == ("process", "tests.swarms:factory")
        cloudpickle.register_pickle_by_value(module)
        where, handed = isolate(None, factory, {})
        assert where == "process" and isinstance(handed, HandedKind) and not handed.registered
        assert isinstance(make_expert(by_value.read(handed.code)), nn.Identity)
    finally:
        del module.factory
        if module.__name__ in cloudpickle.list_registry_pickle_by_value():
            cloudpickle.unregister_pickle_by_value(module)


@pytest.mark.parametrize("isolation", ["process", "task"])
def test_a_module_in_place_of_a_kind_is_refused(swarm, isolation):
    with pytest.raises(ValueError, match=r"does not make modules|makes a module, not a module"):
        swarm.serve(nn.Linear(2, 2), grid=(1,), name="wrong", isolation=isolation)


def test_code_that_does_not_fit_the_process_says_so(monkeypatch):
    with pytest.raises(ValueError, match="cannot be used in this process"):
        by_value.read(b"no code")
    monkeypatch.setattr(by_value, "MODULE_LIMIT", 1000)
    with pytest.raises(ValueError, match="let it load its data itself"):
        by_value.write(bytes(2000))


@pytest.mark.parametrize(
    ("value", "plain"),
    [(1, True), ("text", True), ([1, 2.5], True), (None, True), ((1, 2), False), (torch.float16, False), ({1}, False)],
)
def test_options_are_plain_if_json_gives_them_back_as_they_were(value, plain):
    assert is_plain({"option": value}) is plain
