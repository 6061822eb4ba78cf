"""`labkit bench transformers`: what it prints, and that it measures what it says."""

from __future__ import annotations

import json

import pytest

from labkit.__main__ import main
from labkit.bench.transformers import TransformersConfig

TINY = {
    "servers": 2, "layers": 2, "hidden": 64, "inner": 8, "experts": 3, "k-best": 2, "texts": 2, "tokens": 3, "batch": 2,
    "context": 4, "steps": 1, "runs": 1,
}  # fmt: skip


@pytest.mark.usefixtures("forked_python")
def test_a_mixture_writes_and_learns_beside_the_local_one_and_each_token_costs_the_calls_that_it_makes(capsys):
    options = [word for name, value in TINY.items() for word in (f"--{name}", str(value))]
    assert main(["bench", "transformers", *options, "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    local, served = result["local"], result["2 servers"]
    for what in ("generate", "train"):
        assert local[f"{what}_tokens_per_s"] > 0
        of_local = served[f"{what}_tokens_per_s"] / local[f"{what}_tokens_per_s"]
        assert served[f"{what}_of_local"] == pytest.approx(of_local, abs=0.01)
    # Two layers; in each, two texts have two experts each, between them two or three.
    assert 2 * 2 / 2 <= served["generate_calls_per_token"] <= 2 * 3 / 2
    rows = 2 * 2 * 64 * 4  # bytes of what is sent in both layers for one token to two experts
    assert 2 * rows < served["generate_bytes_per_token"] < 2 * rows + 3 * 600
    # Forward and backward; eight tokens of a step share the calls.
    assert 2 * 2 * 2 / 8 <= served["train_calls_per_token"] <= 2 * 2 * 3 / 8
    assert 5 * rows < served["train_bytes_per_token"] < 5 * rows + 2 * 600


@pytest.mark.parametrize(
    "wrong", [{"hidden": 100}, {"k_best": 17}, {"servers": (1, 0)}, {"servers": ()}, {"context": 1}, {"runs": 0}]
)
def test_what_is_not_possible_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TransformersConfig(**wrong)
