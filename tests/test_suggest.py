"""Did you mean …? Wherever a word is misspelt, the error names the one that is meant."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace

import pytest
from torch import nn

import labkit as lk
from labkit.dht.node import DHTConfig
from labkit.directory import DirectoryConfig
from labkit.node import NodeConfig
from labkit.suggest import did_you_mean, nearest, suggest_fields
from labkit.swarm import Swarm
from labkit.wire.compression import codec_for


class Mine(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()

    def forward(self, x):
        return x


@pytest.fixture(scope="module")
def swarm():
    with Swarm("misspelt") as swarm:
        swarm.serve("nop", grid=(1, 1), name="experts", isolation="task")
        yield swarm


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        (lambda s: s.serve("fnn", hidden=4), "ffn"),
        (lambda s: s.serve("ffn", hiden=4), "hidden"),
        (lambda s: s.serve("ffn", hidden=4, experst=4), "experts"),
        (lambda s: s.serve("ffn", hidden=4, chekpoint_dir="x"), "checkpoint_dir"),
        (lambda s: s.serve(Mine, widht=4), "width"),
        (lambda s: s.serve("ffn", hidden_size=4), "hidden"),
        (lambda s: s.moe(4, top_k=2), "k_best"),
        (lambda s: lk.Swarm("other", lissten="tcp://127.0.0.1:*"), "listen"),  # type: ignore[call-arg]
        (lambda s: lk.Swarm.join("labkit://", nmae="other"), "name"),  # type: ignore[call-arg]
        (lambda s: s.faults(latncy=1), "latency"),
        (lambda s: s.expert("experts.0.0", time_out=1), "timeout"),
        (lambda s: s.serve("nop", isolation="taks"), "task"),
        (lambda s: s.moe(4, name="expert"), "experts"),
        (lambda s: s.moe(4, grid=(1, 1), k_bst=4), "k_best"),
        (lambda s: lk.BackendConfig(optimizer="Adma"), "adam"),
        (lambda s: lk.BackendConfig(schedule="liner"), "linear"),
        (lambda s: lk.BackendConfig(optimzer="adam"), "optimizer"),  # type: ignore[call-arg]
        (lambda s: NodeConfig(anounce="host"), "announce"),  # type: ignore[call-arg]
        (lambda s: DHTConfig(republish=3.0), "republish_period"),  # type: ignore[call-arg]
        (lambda s: DirectoryConfig(time_out=3.0), "timeout"),  # type: ignore[call-arg]
        (lambda s: lk.fit(nn.Linear(1, 1), [], trainer=1), "trainers"),  # type: ignore[call-arg]
        (lambda s: lk.fit(nn.Linear(1, 1), [], learning_rate=1), "lr"),  # type: ignore[call-arg]
        (lambda s: lk.fit(nn.Linear(1, 1), [], val_data=1), "validate"),  # type: ignore[call-arg]
        (lambda s: lk.evaluate(nn.Linear(1, 1), [], metric="acuracy"), "accuracy"),
        (lambda s: lk.evaluate(nn.Linear(1, 1), [], metrics="accuracy"), "metric"),  # type: ignore[call-arg]
        (lambda s: lk.load("digits", seeds=1), "seed"),  # type: ignore[call-overload]
        (lambda s: lk.resume("ckpt", nn.Linear(1, 1), s, [], step=1), "steps"),  # type: ignore[call-arg]
        (lambda s: lk.TrainConfig(trainer=3), "trainers"),  # type: ignore[call-arg]
        (lambda s: lk.DispatchConfig(k_bets=3), "k_best"),  # type: ignore[call-arg]
        (lambda s: s.moe(4, grid=(1, 1), routing="sofmax"), "softmax"),
        (lambda s: s.moe(4, grid=(1, 1), codec="floatt16"), "float16"),
        (lambda s: s.expert("experts.0.0", codec="flaot16"), "float16"),
        (lambda s: codec_for("blockwise", nn.Linear(1, 1).weight.dtype), "blockwise8"),
    ],
)
def test_a_misspelt_word_is_asked_back(swarm: Swarm, wrong: Callable[[Swarm], object], meant: str):
    with pytest.raises((ValueError, TypeError), match=f"did you mean '{meant}'\\?"):
        wrong(swarm)


def test_a_misspelt_name_of_the_package_is_asked_back():
    with pytest.raises(AttributeError, match="no attribute 'Swrm'; did you mean 'Swarm'\\?"):
        lk.Swrm  # noqa: B018
    assert not hasattr(lk, "__fit__")


@pytest.mark.parametrize(
    "wrong",
    [{"accumulate": "x"}, {"accumulate": 1.5}, {"max_batch_size": True}, {"lr": "x"}, {"beta1": "x"},
     {"age_power": None}, {"clip_grad_norm": "x"}, {"total_steps": None}, {"device": "gpu"}, {"device": 1.5}],
)  # fmt: skip
def test_a_value_of_the_wrong_kind_is_refused_in_words(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
        lk.BackendConfig(**wrong)


def test_nothing_is_suggested_that_is_not_near():
    assert did_you_mean("zebra", ["adam", "sgd"]) == did_you_mean(7, ["adam"]) == ""
    assert nearest("ADAMW", ["adam", "adamw"]) == "adamw"


def test_a_config_that_suggests_is_the_dataclass_that_it_was():
    config = lk.BackendConfig("sgd", lr=0.5)
    assert replace(config, lr=0.1) == lk.BackendConfig(optimizer="sgd", lr=0.1)
    assert pickle.loads(pickle.dumps(config)) == config
    assert suggest_fields.__doc__ and lk.BackendConfig.__doc__
    with pytest.raises(TypeError, match="it has optimizer, lr"):
        lk.BackendConfig(zebra=1)  # type: ignore[call-arg]


def test_a_value_too_many_by_its_place_is_told_what_may_stand_there():
    with pytest.raises(TypeError, match=r"fit takes model, data by their places, .* x and y are one value, \(x, y\)"):
        lk.fit(nn.Linear(1, 1), [1], [1], steps=1)  # type: ignore[call-arg, arg-type]
