"""The dashboard as a PNG: what stands in it, what its cells look like, and that drawing it disturbs nobody."""

from __future__ import annotations

import io
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from labkit.expert_uid import MAX_COORDINATE
from labkit.view.picture.canvas import Picture, Sheet, clip, shorten, text_width
from labkit.view.picture.formatting import age, amount, clock, failures, figures, rate
from labkit.view.picture.heat_map import MAX_DRAWN_CELLS, draw_heat_map, lay_out, lay_out_layers
from labkit.view.picture.snapshot import LINED_MARKS, draw
from labkit.view.scene import SERIES, CopySummary, Layer, Mark, State
from tests.scenes import make_scene


def nothing_known():
    scene = make_scene(0, 0, at=0.2, running=False, outages=[])
    return replace(scene, layers=[], series=replace(scene.series, values=scene.series.values[:0]))


SCENES = {
    "healthy": make_scene(outages=[]),
    "a dead server": make_scene(32, 6, dead_servers=[1, 3], at=40.0),
    "large": make_scene(10_000, 200, dead_servers=[3, 50], at=300.0),
    "slices": make_scene(64, 8, grid=(4, 5, 6), at=20.0),
    "many layers": make_scene(96, 4, layers=[f"layer{i}" for i in range(6)], at=900.0),
    "nothing known": nothing_known(),
    "closed": replace(make_scene(running=False), open=False),
}


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


@pytest.fixture
def texts(monkeypatch):
    """`texts(scene)`: all that is written in its picture."""

    def of(scene):
        seen = []
        with monkeypatch.context() as patch:
            plain = Sheet.text

            def text(self, x, y, text, **style):
                seen.append(text)
                plain(self, x, y, text, **style)

            patch.setattr(Sheet, "text", text)
            draw(scene)
        return seen

    return of


# ---------------------------------------------------------------- the whole picture


@pytest.mark.parametrize("name", SCENES)
def test_the_picture_is_a_small_png_of_one_size_and_the_same_each_time(name):
    png = draw(SCENES[name])
    image = Image.open(io.BytesIO(png))
    assert (image.format, image.size) == ("PNG", (1200, 800))
    assert len(png) < 150_000
    assert draw(SCENES[name]) == png


def test_the_headline_and_the_servers_are_told_worst_first(texts):
    seen = texts(SCENES["large"])
    assert {"9,139 of 10,000", "198 of 200", "failed, of 20,755,624 calls", "steps of 1,000"} <= set(seen)
    assert "and 188 more, all of them alive" in seen
    rows = [text for text in seen if text.startswith(("servers[", "tcp://"))]
    assert rows[:3] == ["tcp://10.0.0.4:40003", "servers[50]", "servers[0]"] and len(rows) == 12
    assert [seen[seen.index(row) - 1] for row in rows[:3]] == ["✕", "✕", "●"]
    assert seen[seen.index("servers[50]") + 1] == "killed"


def test_failures_are_told_by_cause_and_marks_in_words(texts):
    seen = texts(SCENES["a dead server"])
    assert {"timeout 12", "lost connection 24"} <= set(seen)
    assert seen[-2:] == ["▼ 0:37 servers[1] killed", "▼ 0:37 tcp://10.0.0.4:40003 lost"]


def test_who_took_over_stands_in_a_line_of_its_own_and_whole(texts):
    marks = [
        Mark(4.0, "servers[2] killed"),
        Mark(5.0, "servers[4], [5] and [3] took over 4 experts of servers[2], 158 updates lost"),
        Mark(6.0, "a third"),
    ]
    seen = texts(replace(make_scene(), marks=marks))
    assert seen[-3:] == [f"▼ 0:0{mark.at:.0f} {mark.text}" for mark in marks]


def test_the_table_says_how_many_copies_a_server_keeps_and_how_many_experts_it_adopted(texts):
    scene = make_scene(outages=[])
    nan = math.nan
    copies, adopted = np.array([nan, 12, 3, 4], np.float32), np.array([nan, 7, 1, 0], np.float32)
    seen = texts(replace(scene, servers=replace(scene.servers, copies=copies, adopted=adopted)))
    heads = seen[seen.index("server") : seen.index("failures") + 1]
    at = heads.index("copies")
    assert heads[at + 1] == "adopted"
    for label, cells in (("servers[0]", ["–", "–"]), ("servers[1]", ["12", "7"]), ("servers[2]", ["3", "1"])):
        row = seen.index(label)
        assert seen[row + at : row + at + 2] == cells


def test_a_swarm_of_which_nothing_is_known_says_so(texts):
    seen = texts(SCENES["nothing known"])
    assert {"No expert has been seen yet.", "No server has been seen yet.", "no call has failed"} <= set(seen)
    assert seen.count("nothing known") == 4
    assert not any("nan" in text for text in seen)


def test_a_closed_swarm_and_one_whose_servers_report_say_so(texts):
    assert "closed" in texts(SCENES["closed"])
    seen = texts(make_scene(source="servers"))
    assert not any("0 failed" in text or text == "no call has failed" for text in seen)
    assert "training" in seen and any("as the servers report" in text for text in seen)


def test_up_to_four_layers_are_grids_and_more_of_them_are_rows_with_their_names(texts):
    seen = texts(make_scene(64, 4, layers=[f"layer{i}" for i in range(4)]))
    assert [text for text in seen if text.startswith("layer")] == [f"layer{i} 4 × 4" for i in range(4)]
    seen = texts(SCENES["many layers"])
    assert [text for text in seen if "layer" in text] == ["6 layers × experts", *(f"layer{i}" for i in range(6))]


def test_of_very_many_layers_the_first_are_drawn_and_it_says_how_many_are_left(texts):
    seen = texts(make_scene(1000, 4, layers=[f"layer{i}" for i in range(100)]))
    assert {"64 layers × experts", "and 36 more layers", "layer0"} <= set(seen) and "layer64" not in seen


@given(
    st.lists(st.lists(st.integers(1, MAX_COORDINATE), min_size=1, max_size=4), min_size=1, max_size=64),
    st.integers(0, 2**62),
)
def test_layers_as_rows_have_a_cell_for_each_expert_or_each_few_of_them(sizes, cell):
    layers = [Layer(f"layer{number}", tuple(some)) for number, some in enumerate(sizes)]
    scene = make_scene(1, 1, outages=[])
    last = len(layers) - 1
    cell = cell % min(math.prod(layers[last].sizes), 2**62)
    experts = replace(scene.experts, layer=np.array([last]), cell=np.array([cell]), load=np.array([3.0], np.float32))
    cells = lay_out_layers(experts, layers)
    assert cells.rows == len(layers) and 1 <= len(cells.row) <= MAX_DRAWN_CELLS
    assert set(cells.row.tolist()) == set(range(len(layers)))
    (found,) = np.flatnonzero(cells.state != State.UNCLAIMED)
    assert cells.row[found] == last and cells.load[found] == 3.0
    assert all(math.prod(some) >= cells.column[cells.row == row].max() + 1 for row, some in enumerate(sizes))


def test_infinite_and_lonely_values_and_many_marks_are_drawn(texts):
    scene = make_scene(at=10.0)
    scene.series.values[:, SERIES.index("loss")] = [math.nan, 1, math.nan, math.inf, *[math.nan] * 6]
    marks = [Mark(0.01 * n, f"servers[{n}] back") for n in range(900)]
    seen = texts(replace(scene, marks=marks))
    assert seen.count("▼") == LINED_MARKS
    assert [text for text in seen if text.startswith("▼ ")] == [f"▼ 0:08 servers[{n}] back" for n in (897, 898, 899)]


def test_names_from_elsewhere_are_written_as_they_are_or_with_question_marks(texts):
    names = [r"$\frac{", "x" * 10_000, "机器\n\x00", "a$b$c"]
    scene = make_scene()
    servers = replace(scene.servers, labels=names, words=names)
    seen = texts(replace(scene, swarm=r"$x^{", servers=servers))
    assert "swarm $x^{" in seen and r"$\frac{" in seen
    assert max(map(len, seen)) < 120


# ---------------------------------------------------------------- cells


def cell(image, row, column, side=60):
    """The inside and all of a cell of the picture of one layer by itself."""
    top, left = 46 + row * side, 16 + column * side
    return image[top : top + side - 1, left : left + side - 1].reshape(-1, 3)


def test_the_state_of_a_cell_can_be_told_without_colour():
    scene = make_scene(6, 2, grid=(2, 4), outages=[])
    states = np.array([State.ALIVE, State.DEAD, State.SUSPECT, State.ALIVE, State.STARTING, State.ALIVE])
    load = np.array([5, 0, 5, np.nan, 5, 10], np.float32)
    scene = replace(scene, experts=replace(scene.experts, cell=np.arange(6), state=states, load=load))
    image = pixels(draw_heat_map(scene))
    gray = [cell(image, n // 4, n % 4).mean(axis=1) for n in range(8)]
    levels = [len(np.unique(each)) for each in gray]
    assert levels[0] == levels[3] == levels[5] == 1  # plain: alive
    assert gray[0][0] < gray[5][0] < gray[3][0]  # little load, much, not known
    dark = [(each < 200).mean() for each in gray]
    assert 0.1 < dark[1] < 0.5  # dead: hatched on white
    assert levels[2] > 1 and dark[2] > 0.9  # suspect: a dot on its colour
    middle = [each.reshape(59, 59)[5:-5, 5:-5] for each in gray]
    assert (middle[6] == 255).all() and (gray[6] < 255).any()  # unclaimed: only an outline


def test_each_expert_is_in_its_cell():
    scene = make_scene(16, 4)
    cells = lay_out(scene.experts, 0, scene.layers[0])
    assert (cells.planes, cells.rows, cells.columns, cells.bin) == (1, 4, 4, "")
    assert np.array_equal(cells.load, scene.experts.load) and np.array_equal(cells.state, scene.experts.state)
    assert (cells.row[6], cells.column[6]) == (1, 2)


def test_a_grid_with_three_dimensions_is_shown_as_slices():
    scene = make_scene(120, 4, grid=(4, 5, 6))
    cells = lay_out(scene.experts, 0, scene.layers[0])
    assert (cells.planes, cells.rows, cells.columns) == (4, 5, 6)
    where = scene.experts.uids.index("ffn.2.3.4")
    at = (cells.plane == 2) & (cells.row == 3) & (cells.column == 4)
    assert at.sum() == 1 and cells.load[at] == scene.experts.load[where]


def test_a_large_grid_is_binned_into_means_and_a_bin_is_dead_when_half_of_it_is():
    scene = make_scene(10_000, 200)
    load = np.arange(10_000, dtype=np.float32)
    state = np.full(10_000, State.ALIVE)
    state[[0, 101, 2]] = State.DEAD
    cells = lay_out(replace(scene.experts, load=load, state=state), 0, scene.layers[0])
    assert (cells.rows, cells.columns, cells.bin) == (50, 50, "2 × 2 places")
    assert cells.load[0] == np.mean([0, 1, 100, 101])
    assert [State(s) for s in cells.state[:3]] == [State.DEAD, State.ALIVE, State.ALIVE]


@given(st.lists(st.integers(1, MAX_COORDINATE), min_size=1, max_size=8), st.data())
def test_whatever_the_sizes_of_a_grid_it_has_few_cells_and_every_expert_is_in_one(sizes, data):
    places = min(math.prod(sizes), 2**62)
    where = data.draw(st.lists(st.integers(0, places - 1), min_size=4, max_size=4))
    table = make_scene(4, 1, outages=[]).experts
    table = replace(table, cell=np.array(where), state=np.full(4, State.ALIVE), load=np.ones(4, np.float32))
    cells = lay_out(table, 0, Layer("ffn", tuple(sizes)))
    assert len(cells.load) == len(cells.row) <= MAX_DRAWN_CELLS
    assert 1 <= np.isfinite(cells.load).sum() <= 4
    assert cells.plane.max() < cells.planes and cells.row.max() < cells.rows and cells.column.max() < cells.columns
    assert set(cells.state.tolist()) <= {State.ALIVE, State.UNCLAIMED}


def test_an_expert_outside_its_grid_is_left_out():
    scene = make_scene(4, 1)
    cells = lay_out(replace(scene.experts, cell=np.array([0, 4, -1, 10**12])), 0, Layer("ffn", (2, 2)))
    assert np.isfinite(cells.load).tolist() == [True, False, False, False]


# ---------------------------------------------------------------- drawing disturbs nobody


def test_what_the_user_has_set_for_matplotlib_is_neither_changed_nor_felt():
    import matplotlib

    png = draw(SCENES["a dead server"])
    theirs: Any = {
        "text.usetex": True, "font.family": "serif", "text.color": "red", "figure.facecolor": "black",
        "path.sketch": (1, 100, 2), "figure.autolayout": True, "lines.linewidth": 7, "figure.dpi": 50,
    }  # fmt: skip
    with matplotlib.rc_context(theirs):
        before = dict(matplotlib.rcParams)
        assert draw(SCENES["a dead server"]) == png
        assert dict(matplotlib.rcParams) == before


def test_no_pyplot_is_imported_and_no_figure_is_left():
    code = (
        "import sys; from labkit.view.picture.snapshot import draw; assert 'matplotlib' not in sys.modules; "
        "from tests.scenes import make_scene; draw(make_scene()); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_threads_may_draw_at_the_same_time():
    png = draw(SCENES["healthy"])
    with ThreadPoolExecutor(3) as threads:
        assert set(threads.map(draw, [SCENES["healthy"]] * 3)) == {png}


# ---------------------------------------------------------------- small things


def test_a_picture_is_shown_by_a_notebook_and_can_be_saved(tmp_path):
    picture = Picture(b"\x89PNG 123")
    assert picture._repr_png_() == b"\x89PNG 123"
    assert picture.save(tmp_path / "a.png").read_bytes() == b"\x89PNG 123"
    assert repr(picture) == "<picture: PNG of 8 bytes>"


def test_numbers_are_written_as_people_read_them():
    assert [figures(n) for n in (0.01234, 0.4119, 4.123, 41.23, 412.3, 4120, 0, math.nan)] == [
        "0.012", "0.412", "4.12", "41.2", "412", "4,120", "0", "–",
    ]  # fmt: skip
    assert [rate(n) for n in (88.2, 7.41, 0.25, 0, math.inf)] == ["88", "7.4", "0.25", "0", "–"]
    assert [amount(n) for n in (3.02e6, 999.6, 12, math.nan)] == [
        ("3.02", "MB"),
        ("1.00", "KB"),
        ("12", "B"),
        ("–", "B"),
    ]
    assert [age(s) for s in (0.31, 12, 180, 7300, math.nan)] == ["0.3 s", "12 s", "3 min", "2 h", "–"]
    assert [clock(s) for s in (7.9, 725, 3725)] == ["0:07", "12:05", "1:02:05"]
    assert failures({"lost": 2, "bad_reply": 3, "timeout": 0}) == "5 (bad reply 3, lost 2)" and failures({}) == "0"


def test_long_texts_lose_their_middle_or_their_end():
    assert shorten("tcp://127.0.0.1:40001", 12) == "tcp….1:40001" and shorten("short", 12) == "short"
    assert clip("lost 12, timeout 6", 9) == "lost 12,…"
    assert text_width("wide", 20) > text_width("wide", 10) > text_width("ii", 10) > 0


def test_experts_at_risk_and_adopted_ones_are_drawn():
    scene = make_scene(16, 4)
    plain = replace(scene, experts=replace(scene.experts, adopted=np.zeros(16, dtype=np.bool_)))
    copies = CopySummary(backups=1, servers=4, experts=16, at_risk=3, adopted=2, period=41.0)
    at_risk = replace(scene, copies=copies, headline=replace(scene.headline, at_risk=3.0))
    assert len({draw(each) for each in (scene, plain, at_risk)}) == 3


def test_a_cell_is_adopted_if_one_of_its_experts_is():
    scene = make_scene(10_000, 4, grid=(100, 100))
    cells = lay_out(replace(scene.experts, adopted=np.arange(10_000) == 9_999), 0, scene.layers[0])
    assert cells.bin == "2 × 2 places" and cells.adopted.nonzero()[0].tolist() == [len(cells.adopted) - 1]
