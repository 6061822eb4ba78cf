"""Beam search equals exhaustive search over the live experts, and asks for little."""

import itertools
import math

import pytest
import torch
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from labkit.client.beam_search import Routing, beam_search, group_rows
from labkit.directory import Directory
from labkit.expert_uid import grid_uids, make_uid
from tests.fake_records import FakeRecords, contact


def exhaustive(live: set[tuple[int, ...]], grid_scores: list[Tensor], k_best: int) -> list[list[tuple[float, str]]]:
    """The k best live experts of each row as (score, uid), by scoring every one of them."""
    grids = [scores.double() for scores in grid_scores]
    rows = []
    for row in range(len(grids[0])):
        scored = []
        for place in live:
            score = 0.0
            for grid, coordinate in zip(grids, place, strict=True):
                score += float(grid[row, coordinate])
            if score > -math.inf:
                scored.append((score, make_uid("ffn", place)))
        rows.append(sorted(scored, reverse=True)[:k_best])
    return rows


def chosen(routing: Routing) -> list[list[tuple[float, str]]]:
    """A routing in the form of `exhaustive`, checked against itself."""
    rows: list[list[tuple[float, str]]] = []
    for choice, scores, places in zip(routing.choice, routing.scores, routing.coordinates, strict=True):
        here = [int(c) for c in choice if c >= 0]
        assert choice.tolist() == here + [-1] * (len(choice) - len(here))
        assert all(scores[len(here) :] == -math.inf) and not places[len(here) :].any()
        assert scores.tolist() == sorted(scores.tolist(), reverse=True)
        assert [routing.experts[c].uid for c in here] == [make_uid("ffn", p) for p in places[: len(here)].tolist()]
        rows.append([(float(s), routing.experts[c].uid) for s, c in zip(scores, here, strict=False)])
    return rows


def assert_equal_up_to_ties(routing: Routing, live: set[tuple[int, ...]], grids: list[Tensor], k_best: int) -> None:
    everyone = [dict((uid, s) for s, uid in row) for row in exhaustive(live, grids, len(live))]
    for mine, best, scores in zip(chosen(routing), exhaustive(live, grids, k_best), everyone, strict=True):
        assert [s for s, _ in mine] == [s for s, _ in best]  # equal, not close
        assert len({uid for _, uid in mine}) == len(mine)
        assert all(scores[uid] == s for s, uid in mine)


async def make_directory(uids: list[str], records: FakeRecords | None = None) -> tuple[Directory, FakeRecords]:
    records = records or FakeRecords()
    await Directory(records).declare(uids, contact(1))
    return Directory(records), records  # a directory that has nothing cached


@st.composite
def searches(draw):
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    places = list(itertools.product(*map(range, sizes)))
    live = draw(st.sets(st.sampled_from(places)))
    markers = draw(st.sets(st.sampled_from(places)))  # declared once, and gone: their prefixes lead nowhere
    seed, ties = draw(st.integers(0, 1 << 30)), draw(st.booleans())
    rows, k_best = draw(st.integers(1, 6)), draw(st.integers(1, 8))
    random = torch.Generator().manual_seed(seed)
    grids = [torch.randn(rows, size, generator=random) for size in sizes]
    if ties:
        grids = [grid.round() for grid in grids]
    if draw(st.booleans()):
        grids = [grid.masked_fill(torch.rand(grid.shape, generator=random) < 0.2, -math.inf) for grid in grids]
    return live, markers, grids, k_best


@given(searches())
@settings(max_examples=150, deadline=None, database=None)
def test_beam_search_equals_exhaustive_search(search):
    live, markers, grids, k_best = search

    async def main():
        _, records = await make_directory([make_uid("ffn", place) for place in live | markers])
        for place in markers - live:
            del records.records["expert:" + make_uid("ffn", place[:-1])][str(place[-1])]
        routing = await beam_search(Directory(records), "ffn", grids, k_best)
        assert_equal_up_to_ties(routing, live, grids, k_best)

    trio.run(main)


async def test_a_full_grid_of_1024_experts_takes_one_prefix_and_k_more():
    directory, records = await make_directory(list(grid_uids("ffn", (32, 32))))
    grids = [torch.randn(1, 32), torch.randn(1, 32)]
    routing = await beam_search(directory, "ffn", grids, k_best=4)
    assert sum(map(len, records.gets)) == 1 + 4
    assert len(records.gets) == 2  # one bulk get a level
    assert_equal_up_to_ties(routing, set(itertools.product(range(32), range(32))), grids, 4)


@pytest.mark.parametrize("grid", [(16,), (5, 7), (3, 4, 5)])
async def test_in_a_full_grid_no_row_needs_a_second_pass(grid):
    rows, k_best = 20, 4
    directory, records = await make_directory(list(grid_uids("ffn", grid)))
    for scores in ([torch.randn(rows, size) for size in grid], [torch.zeros(rows, size) for size in grid]):
        await beam_search(directory, "ffn", scores, k_best)
    assert len(records.gets) <= 2 * len(grid)  # a second pass would ask again
    assert sum(map(len, records.gets)) <= 1 + rows * k_best * (len(grid) - 1)


async def test_all_scores_equal_do_not_widen_the_search():
    directory, records = await make_directory(list(grid_uids("ffn", (32, 32))))
    routing = await beam_search(directory, "ffn", [torch.zeros(3, 32), torch.zeros(3, 32)], k_best=4)
    assert sum(map(len, records.gets)) == 1 + 4
    assert routing.choice.tolist() == [[0, 1, 2, 3]] * 3


async def test_the_search_widens_past_prefixes_that_are_nearly_empty():
    live = {(0, 3), (1, 3), *((2, c) for c in range(4))}
    directory, _ = await make_directory([make_uid("ffn", place) for place in live])
    grids = [torch.tensor([[9.0, 8.0, 7.0]]), torch.tensor([[5.0, 4.0, 3.0, -50.0]])]
    routing = await beam_search(directory, "ffn", grids, k_best=2)
    assert [expert.uid for expert in routing.experts] == ["ffn.2.0", "ffn.2.1"]


async def test_the_second_search_costs_no_network():
    directory, records = await make_directory(list(grid_uids("ffn", (4, 4))))
    grids = [torch.randn(64, 4), torch.randn(64, 4)]
    first = await beam_search(directory, "ffn", grids, k_best=4)
    gets = len(records.gets)
    second = await beam_search(directory, "ffn", grids, k_best=4)
    assert len(records.gets) == gets
    assert torch.equal(first.choice, second.choice) and first.experts == second.experts


async def test_experts_of_a_lost_server_are_not_chosen():
    records = FakeRecords()
    await Directory(records).declare(["ffn.0", "ffn.1"], contact(1))
    await Directory(records).declare(["ffn.2", "ffn.3"], contact(2))
    directory = Directory(records)
    grids = [torch.tensor([[4.0, 3.0, 2.0, 1.0]])]
    routing = await beam_search(directory, "ffn", grids, k_best=2)
    directory.report_failure(routing.experts[0], "lost")
    routing = await beam_search(directory, "ffn", grids, k_best=3)
    assert [expert.uid for expert in routing.experts] == ["ffn.2", "ffn.3"]
    assert routing.choice.tolist() == [[0, 1, -1]]


async def test_with_nobody_there_the_routing_is_empty():
    directory, _ = await make_directory([])
    routing = await beam_search(directory, "ffn", [torch.randn(3, 4), torch.randn(3, 4)], k_best=2)
    assert routing.experts == [] and routing.choice.tolist() == [[-1, -1]] * 3
    assert routing.coordinates.shape == (3, 2, 2) and (routing.scores == -math.inf).all()


async def test_no_rows_are_no_work():
    directory, records = await make_directory(["ffn.0"])
    routing = await beam_search(directory, "ffn", [torch.randn(0, 4)], k_best=2)
    assert routing.choice.shape == (0, 2) and records.gets == []


async def test_coordinates_beyond_the_grid_are_ignored():
    directory, _ = await make_directory(["ffn.1.1", "ffn.1.4", "ffn.7.0"])
    routing = await beam_search(directory, "ffn", [torch.zeros(1, 4), torch.zeros(1, 4)], k_best=4)
    assert [expert.uid for expert in routing.experts] == ["ffn.1.1"]


async def test_grids_of_other_dimensions_do_not_disturb():
    directory, _ = await make_directory(["ffn.1.1", "ffn.1.1.0", "ffn.1"])
    for dims in (1, 2, 3):
        routing = await beam_search(directory, "ffn", [torch.zeros(1, 4)] * dims, k_best=4)
        assert [expert.uid for expert in routing.experts] == [make_uid("ffn", (1, 1, 0)[:dims])]


async def test_scores_may_be_half_precision_and_have_a_gradient():
    directory, _ = await make_directory(list(grid_uids("ffn", (4, 4))))
    grids = [torch.randn(5, 4).bfloat16().requires_grad_(), torch.randn(5, 4).half().requires_grad_()]
    routing = await beam_search(directory, "ffn", grids, k_best=2)
    assert_equal_up_to_ties(routing, set(itertools.product(range(4), range(4))), [g.detach() for g in grids], 2)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e301])
async def test_scores_that_cannot_be_compared_are_refused(bad):
    directory, _ = await make_directory(["ffn.0"])
    scores = torch.zeros(2, 4, dtype=torch.float64)
    scores[1, 2] = bad
    with pytest.raises(ValueError, match=r"grid_scores\[0\]"):
        await beam_search(directory, "ffn", [scores], k_best=1)


async def test_wrong_shapes_and_sizes_are_refused():
    directory, _ = await make_directory(["ffn.0"])
    for grids, k_best in (([], 1), ([torch.zeros(2)], 1), ([torch.zeros(2, 3), torch.zeros(3, 3)], 1),
                          ([torch.zeros(2, 0)], 1), ([torch.zeros(2, 3)], 0)):  # fmt: skip
        with pytest.raises(ValueError):
            await beam_search(directory, "ffn", grids, k_best)


def test_rows_are_grouped_by_expert():
    choice = torch.tensor([[2, 0], [0, -1], [2, 1]])
    groups = [(expert, rows.tolist(), slots.tolist()) for expert, rows, slots in group_rows(choice)]
    assert groups == [(0, [0, 1], [1, 0]), (1, [2], [1]), (2, [0, 2], [0, 0])]
    assert group_rows(torch.full((3, 2), -1)) == []
