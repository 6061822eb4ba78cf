"""Frames for one page: what it has in the end is what the scene holds, and no frame is over its budget."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from labkit.view.page.columns import COLUMNS, server_numbers
from labkit.view.page.frame_writer import FRAME_BUDGET, FrameWriter
from labkit.view.scene import ALL_LAYERS, MODES, Layer, Mark, Scene
from tests.frame_store import FrameStore
from tests.scenes import make_scene, play


class Page:
    """A page that is told of scenes, and what it looks at."""

    def __init__(self, *, layer: int = 0, mode: str = "load", budget: int = FRAME_BUDGET) -> None:
        self.writer = FrameWriter(budget)
        self.store = FrameStore()
        self.layer, self.mode, self.budget = layer, mode, budget

    def tell(self, scene: Scene) -> FrameStore:
        header, buffers = self.writer.frame(scene, layer=self.layer, mode=self.mode, control=True)
        self.store.apply(header, buffers)
        assert self.store.bytes <= self.budget
        return self.store


def wrong_rows(store: FrameStore, scene: Scene, table: str, name: str) -> np.ndarray:
    """[rows], those in which the page has another value than the scene, beyond what 16 bits cannot hold."""
    [column] = [column for column in COLUMNS if (column.table, column.name) == (table, name)]
    truth = column.read(scene).astype(np.float64)
    if (table, name) not in store.columns or len(store.column(table, name)) != len(truth):
        return np.ones(len(truth), bool)
    has = store.column(table, name)
    near = 1e-6 + np.nanmax(truth, initial=0) / 65534 if column.dtype == "scaled" else 0
    right = (np.abs(has - truth) <= near) | (np.isnan(has) & np.isnan(truth))
    return np.asarray(~right.reshape(len(right), -1).all(axis=1))


def is_complete(store: FrameStore, scene: Scene) -> bool:
    return not any(wrong_rows(store, scene, column.table, column.name).any() for column in COLUMNS)


def moved(scene: Scene, step: int) -> Scene:
    """The scene a moment later, in which every number of every expert and server is another one."""
    experts, servers = scene.experts, scene.servers
    shades = {mode: np.float32(step + 1) + np.nan_to_num(getattr(experts, mode)) for mode in MODES}
    counts = {name: getattr(experts, name) + step for name in ("calls", "failed", "updates")}
    return dataclasses.replace(
        scene,
        at=scene.at + step,
        experts=dataclasses.replace(experts, state=np.full_like(experts.state, step % 5), **shades, **counts),
        servers=dataclasses.replace(servers, heard=servers.heard + np.float32(step)),
    )


# ---------------------------------------------------------------- small swarms


def test_the_first_frame_tells_everything_of_a_small_swarm():
    scene = make_scene(16, 4)
    store = Page().tell(scene)
    assert store.header["reset"] and is_complete(store, scene)
    assert store.layers == [{"name": "ffn", "sizes": [4, 4]}]
    assert store.text == list(zip(scene.servers.labels, scene.servers.addresses, scene.servers.words, strict=True))
    assert store.marks == [(mark.at, mark.text) for mark in scene.marks] and len(store.marks) == 2
    assert (store.width, store.first) == (1.0, 0) and np.array_equal(store.series, scene.series.values)
    assert store.header["headline"]["failed"] == {"timeout": 6, "lost": 12}
    assert store.header["can"] == {"control": True}


def test_a_page_follows_a_run_in_which_a_server_dies_and_comes_back():
    page = Page()
    for number, scene in enumerate(play(30)):
        store = page.tell(scene)
        assert is_complete(store, scene)
        assert store.header["reset"] == (number == 0)
        assert np.array_equal(store.series, scene.series.values)
        assert [text for _, text in store.marks] == [mark.text for mark in scene.marks]
        assert [word for _, _, word in store.text] == list(scene.servers.words)
    assert len(store.marks) == 2


def test_what_has_not_changed_is_not_sent_again():
    page, scene = Page(), make_scene()
    page.tell(scene)
    store = page.tell(scene)
    assert not store.sent and not {"layers", "server_text", "marks", "series"} & set(store.header)
    store = page.tell(
        dataclasses.replace(scene, experts=dataclasses.replace(scene.experts, calls=scene.experts.calls + 1))
    )
    assert store.names() == {"experts.calls"}


def test_a_thousand_experts_have_all_that_changed_in_each_frame():
    page, scene = Page(), make_scene(1000, 20)
    page.tell(scene)
    for step in range(1, 5):
        assert is_complete(page.tell(moved(scene, step)), moved(scene, step))


def test_a_swarm_grows_while_a_page_looks():
    page = Page()
    for experts, servers in ((0, 0), (1, 1), (40, 3), (41, 3), (900, 30)):
        scene = make_scene(experts, servers, outages=[])
        store = page.tell(scene)
        assert is_complete(store, scene) and len(store.text) == servers
        assert store.layers[0]["sizes"] == list(scene.layers[0].sizes)


def test_shorter_tables_are_another_swarm_and_begin_anew():
    page = Page()
    page.tell(make_scene(16, 4))
    scene = make_scene(9, 2)
    store = page.tell(scene)
    assert store.header["reset"] and is_complete(store, scene) and len(store.text) == 2


def test_nothing_known_is_null_in_the_header_and_nan_in_a_column():
    scene = make_scene(running=False)
    store = Page().tell(scene)
    assert store.header["headline"]["loss"] is None
    assert math.isnan(store.column("experts", "latency")[6]) and store.column("experts", "latency")[5] > 0
    assert np.isnan(store.column("servers", "numbers")[2, 5:17]).all()


@pytest.mark.parametrize("value", [0.0, 1e-45, 3e38, math.inf, -1.0])
def test_extreme_numbers_do_no_harm(value):
    scene = make_scene()
    load = scene.experts.load.copy()
    load[0] = value
    headline = dataclasses.replace(scene.headline, loss=value)
    scene = dataclasses.replace(scene, headline=headline, experts=dataclasses.replace(scene.experts, load=load))
    store = Page().tell(scene)
    expected = {math.inf: math.nan, -1.0: 0.0}.get(value, value)
    assert store.column("experts", "load")[0] == pytest.approx(expected, nan_ok=True)


def test_counts_beyond_32_bits_stop_at_the_largest():
    scene = make_scene()
    scene = dataclasses.replace(
        scene, experts=dataclasses.replace(scene.experts, calls=scene.experts.calls + (1 << 40))
    )
    assert (Page().tell(scene).column("experts", "calls") == (1 << 32) - 1).all()


def test_the_numbers_of_a_server_stand_where_the_page_reads_them():
    scene = make_scene(16, 4)
    servers = dataclasses.replace(scene.servers, injected=np.array([[0.25, 0.5]] * 4, np.float32))
    numbers = server_numbers(servers)
    assert numbers.shape == (4, 27)
    assert numbers[1, :5].tolist() == pytest.approx([0.1, 4, servers.alive[1], servers.calls[1], servers.queue[1]])
    assert numbers[1, 5:8].tolist() == servers.latency[1, 0].tolist()  # p50, p95, p99 of the total
    assert numbers[0, 17:24].tolist() == servers.failed[0].tolist()
    assert numbers[1, 24:].tolist() == [0.25, 0.5, 1.0] and numbers[3, 26] == -1


# ---------------------------------------------------------------- the series


def test_bins_that_were_merged_replace_all_that_was_before():
    page = Page()
    page.tell(make_scene(at=599.0))
    store = page.tell(make_scene(at=601.0))
    assert store.width == 2.0 and store.header["series"]["reset"]
    assert np.array_equal(store.series, make_scene(at=601.0).series.values)


def test_the_last_bins_go_when_there_are_too_many():
    scene = make_scene(at=500.0)
    store = Page(budget=20_000).tell(scene)
    assert 100 < len(store.series) < 300 and store.first + len(store.series) == 500
    assert np.array_equal(store.series, scene.series.values[store.first :])


# ---------------------------------------------------------------- large swarms

SIZES: dict[str, dict[str, Any]] = {
    "10,000 experts": dict(experts=10_000, servers=200),
    "20,000 experts": dict(experts=20_000, servers=1000),
    "65,536 cells": dict(experts=65_536, servers=100, grid=(256, 256)),
    "a few of 65,536 cells": dict(experts=500, servers=20, grid=(64, 32, 32)),
    "100 layers": dict(experts=20_000, servers=50, layers=[f"{'layer' * 11}_{n}" for n in range(100)]),
}


@pytest.mark.parametrize("size", SIZES)
def test_a_page_that_opens_on_a_large_swarm_has_all_of_it_after_some_frames(size):
    page, scene = Page(mode="latency"), make_scene(**SIZES[size], at=580.0)
    frames = 0
    while frames == 0 or page.store.sent or "server_text" in page.store.header:
        page.tell(scene)
        frames += 1
        assert frames < 60
    assert is_complete(page.store, scene) and page.store.text[-1][1] == scene.servers.addresses[-1]
    assert len(page.store.layers) == len(scene.layers)


def test_a_new_page_is_told_first_where_the_experts_are_and_then_what_it_looks_at():
    page, scene = Page(mode="staleness"), make_scene(10_000, 200)
    first = page.tell(scene).names()
    assert first <= {"experts.layer", "experts.cell", "experts.server"}
    while wrong_rows(page.tell(scene), scene, "experts", "staleness").any():
        assert not page.store.names() & {"experts.load", "experts.latency", "experts.calls", "experts.updates"}


@pytest.mark.parametrize(("experts", "servers", "limit"), [(10_000, 200, 30), (20_000, 1000, 60), (65_536, 50, 200)])
def test_nothing_starves_while_everything_changes(experts, servers, limit):
    page, scene = Page(), make_scene(experts, servers)
    last = {(column.table, column.name): np.full(len(column.read(scene)), -1) for column in COLUMNS[3:]}
    for step in range(limit):
        for table, name, start, count in page.tell(moved(scene, step)).sent:
            if (table, name) in last:
                last[table, name][start : start + count] = step
    for key, steps in last.items():
        assert steps.min() >= 0, f"some of {key} were never sent"


@pytest.mark.parametrize("mode", MODES)
def test_state_and_what_is_looked_at_of_10_000_experts_are_never_older_than_two_frames(mode):
    page, scene = Page(mode=mode), make_scene(10_000, 200)
    past: list[Scene] = []
    for step in range(30):
        past = [*past[-2:], moved(scene, step)]
        store = page.tell(past[-1])
        if step >= 8:  # a page that has all places by now
            for name in ("state", mode):
                old = np.logical_and.reduce([wrong_rows(store, then, "experts", name) for then in past])
                assert not old.any()


def test_the_layer_that_is_looked_at_comes_before_others():
    page = Page(layer=3)
    scene = make_scene(40_000, 50, layers=["a", "b", "c", "d"], outages=[])
    for step in range(12):
        store = page.tell(moved(scene, step))
    here, elsewhere = scene.experts.layer == 3, scene.experts.layer == 0
    wrong = wrong_rows(store, moved(scene, step), "experts", "load")
    assert wrong[here].mean() < 0.6 < wrong[elsewhere].mean()


def test_who_looks_at_all_layers_at_once_gets_each_of_them_in_turn():
    page = Page(layer=ALL_LAYERS)
    scene = make_scene(40_000, 50, layers=["a", "b", "c", "d"], outages=[])
    wrong = []
    for step in range(12):
        store = page.tell(moved(scene, step))
        wrong.append(wrong_rows(store, moved(scene, step), "experts", "load"))
    for layer in range(4):
        assert min(rows[scene.experts.layer == layer].mean() for rows in wrong[-4:]) < 0.5


def test_text_that_a_peer_may_have_written_is_cut_and_does_not_fill_a_frame():
    scene = make_scene(16, 300)
    servers = dataclasses.replace(
        scene.servers, labels=["\N{SNOWMAN}" * 5000] * 300, words=["\N{MUSHROOM}" * 5000] * 300
    )
    scene = dataclasses.replace(
        scene,
        swarm="x" * 100_000,
        servers=servers,
        layers=[Layer("y" * 100_000, (4, 4)) for _ in range(2000)],
        marks=[Mark(float(n), "z" * 100_000 + str(n)) for n in range(1000)],
    )
    page = Page()
    for _ in range(60):
        page.tell(scene)
    assert len(page.store.text) == 300 and len(page.store.text[0][0]) == 120
    assert 100 < len(page.store.layers) < 2000 and len(page.store.marks) == 1000


def test_words_that_change_all_the_time_do_not_hold_up_others():
    page = Page()
    for step in range(20):
        scene = make_scene(1000, 1000)
        words = [f"word {step}", *scene.servers.words[1:]]
        page.tell(dataclasses.replace(scene, servers=dataclasses.replace(scene.servers, words=words)))
    assert len(page.store.text) == 1000 and page.store.text[999][0] == scene.servers.labels[999]


def test_a_budget_in_which_no_frame_fits_is_refused():
    with pytest.raises(ValueError, match="20000 bytes at least"):
        FrameWriter(1000)
