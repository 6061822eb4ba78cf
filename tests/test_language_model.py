"""The language model in virtual time: what it computes, what a run of it measures, and what its plans compare."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

import labkit as lk
from labkit.experiments import runner
from labkit.experiments.language_model import (
    SIZES,
    LanguageModel,
    LanguageModelConfig,
    TokenFeedForward,
    plan,
    run,
)
from labkit.experiments.results import load, load_all
from labkit.training.text import TextData

SMALL = LanguageModelConfig(
    grid=(2, 2), layers=1, k_best=2, width=16, heads=2, context=8, batch_size=4, trainers=4, updates=12,
    evaluate_every=4, latency=1.0, loss=0.1, lr=1e-2, measured=20,
)  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextData:
    path = tmp_path_factory.mktemp("text") / "abc.txt"
    path.write_text("the cat sat on the mat. " * 100)
    return lk.load("text", path, context=8)


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_it_learns_through_delays_and_failures_and_a_seed_gives_the_same_history_twice(text):
    told: list[int] = []
    first = run(SMALL, text, told.append)
    assert run(SMALL, text) == first
    assert told == list(range(1, 13))
    updates, seconds, validation, training = zip(*first.points, strict=True)
    assert updates == (4, 8, 12) and 0 < seconds[0] < seconds[1] < seconds[2]
    assert validation[2] < validation[0] and training[2] < training[0]
    assert first.measured == validation[2]
    assert first.failures["timeout"] > 0 and max(first.staleness) >= 3
    assert run(replace(SMALL, seed=1, updates=4), text).points != first.points[:1]


def test_with_one_trainer_and_no_delay_nothing_is_stale(text):
    history = run(replace(SMALL, trainers=1, latency=0.0, loss=0.0, updates=4, evaluate_every=4), text)
    assert dict(history.staleness) == {0: 4} and set(history.expert_staleness) == {0}
    assert history.points[-1][1] == 0.0 and not history.failures


def test_the_dense_model_computes_as_much_for_a_token_and_waits_as_long(text):
    dense = replace(SMALL, model="dense", layers=2, updates=64, evaluate_every=64)
    model = LanguageModel(dense, text.vocab_size)
    layer = next(module for module in model.modules() if isinstance(module, TokenFeedForward))
    weights = [sum(p.numel() for p in module.parameters() if p.ndim == 2) for module in (layer, TokenFeedForward(16))]
    assert weights[0] == SMALL.k_best * weights[1]
    history = run(dense, text)
    assert 2 <= sum(age * count for age, count in history.staleness.items()) / 64 <= 4
    assert history.points[-1][1] == pytest.approx(64 * 2 * 2 * 1.0 / 4, rel=0.4), "two layers, two ways, four trainers"


def test_what_comes_later_changes_no_score_of_what_came_before(text):
    model = LanguageModel(replace(SMALL, model="dense"), text.vocab_size).eval()
    x = text.test_x[:2]
    other = x.clone()
    other[:, 5:] = (other[:, 5:] + 1) % text.vocab_size
    with torch.no_grad():
        before, after = model(x), model(other)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


def test_its_runs_are_files_of_the_same_runner(tmp_path, monkeypatch, text):
    monkeypatch.setattr("labkit.experiments.runner.watch_parent", lambda: None)
    (tmp_path / "abc.txt").write_text("the cat sat on the mat. " * 100)
    dense = replace(SMALL, model="dense", updates=4, evaluate_every=4)
    path = tmp_path / "runs" / f"dense-{dense.seed}.parquet"
    runner.run_one(json.dumps(asdict(dense)), str(path), "mnist", str(tmp_path / "abc.txt"))
    assert runner.is_done(path, dense) and not runner.is_done(path, replace(dense, heads=4))
    assert load(path) == (dense, run(dense, text))
    assert load_all(path.parent)["dense"][dense.seed][0] == dense


def test_a_config_is_the_same_after_json():
    config = replace(SMALL, splits=("valid", "test"))
    assert LanguageModelConfig.of(json.loads(json.dumps(asdict(config)))) == config


def test_the_plans_hold_what_is_compared():
    runs = plan("laptop", [1, 2, 3])
    assert {runs[f"laptop-{experts}-experts-1"].grid for experts in (16, 64, 256)} == {(4, 4), (8, 8), (16, 16)}
    failing = runs["laptop-64-experts-100ms-failing-1"]
    assert (failing.latency, failing.loss) == (0.1, 0.1)
    for seed in (1, 2, 3):
        assert {f"laptop-16-experts-1s-failing-{seed}", f"laptop-dense-1s-{seed}"} < runs.keys()
    assert {config.trainers for name, config in runs.items() if "fresh" not in name} == {32}
    assert plan("wikitext", [1])["wikitext-dense-1"].splits == ("valid", "test")
    for size in SIZES:
        assert runner.plan(f"language-{size}", [1]) == plan(size, [1])
    with pytest.raises(ValueError, match="size='huge': small, crowd, laptop, wikitext"):
        runner.plan("language-huge")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"context": 0}, "context=0"),
        ({"heads": 3}, "width=16: a multiple of heads=3"),
        ({"validation": 5}, "validation=5"),
        ({"measured": -1}, "measured=-1"),
        ({"k_best": 5}, "k_best=5"),
    ],
)
def test_what_cannot_be_run_is_refused_by_the_name_of_the_argument(options, said):
    with pytest.raises(ValueError, match=said):
        replace(SMALL, **options)


def test_windows_of_another_size_are_refused(text):
    with pytest.raises(ValueError, match="context=16: the text that was loaded has windows of 8"):
        run(replace(SMALL, context=16), text)
