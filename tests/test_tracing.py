"""The trace of a search says what the layer does."""

from __future__ import annotations

import pytest
import torch

import labkit as lk
from labkit.client.expert import RemoteExpert
from labkit.client.tracing import trace_search


@pytest.fixture(scope="module")
def layer():
    torch.manual_seed(0)
    with lk.Swarm(name="tracing") as swarm:
        swarm.serve("ffn", hidden=2, grid=(4, 4), experts=14, servers=2, isolation="task")
        yield swarm.moe(2, k_best=3, timeout_after_k_min=30.0)


def test_a_trace_names_the_records_that_were_read_and_the_experts_that_were_found(layer):
    trace = trace_search(layer, torch.randn(1, 2))
    first, second = trace.lookups
    assert list(first) == ["ffn"] and len(second) == 3, "a beam of three of four prefixes"
    assert all(uid.rsplit(".", 1)[0] in second for uid in trace.uids())
    assert trace.routing.scores[0].tolist() == sorted(trace.routing.scores[0].tolist(), reverse=True)


def test_its_weights_give_the_output_of_the_layer_and_what_is_missing_leaves_the_softmax(layer):
    x = torch.randn(1, 2)
    trace = trace_search(layer, x)
    with torch.no_grad():
        answers = torch.cat([RemoteExpert(uid, layer.swarm)(x) for uid in trace.uids()])
        torch.testing.assert_close(trace.weights() @ answers, layer(x))
    rest = trace.weights(missing=trace.uids()[:1])[0]
    assert rest[0] == 0
    torch.testing.assert_close(rest[1:], trace.weights()[0, 1:] / trace.weights()[0, 1:].sum())
