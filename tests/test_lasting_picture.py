"""The picture that stays in a notebook: when it is drawn, and how it is seen without a kernel. Times are invented."""

from __future__ import annotations

from base64 import b64decode
from dataclasses import replace
from itertools import pairwise
from typing import Any

import nbformat
import pytest
from IPython.core import display_functions
from nbconvert import HTMLExporter

from labkit.view.page.lasting_picture import FIRST_AFTER, MAX_PERIOD, MAX_PLACES, LastingPicture
from labkit.view.scene import Scene
from tests.scenes import make_scene

MAX_PICTURE = 250_000  # bytes that one adds to a notebook


class Place:
    """An output of a cell."""

    def __init__(self) -> None:
        self.updates: list[dict[str, str]] = []

    def update(self, data: dict[str, str], raw: bool) -> None:
        assert raw
        self.updates.append(data)


class Notebook:
    """Where the picture is displayed, and a clock."""

    def __init__(self) -> None:
        self.now = 0.0
        self.places: list[Place] = []
        self.picture = LastingPicture("<dashboard>", lambda: self.now)

    def display(self, data: dict[str, str], **options: Any) -> Place | None:
        if "display_id" not in options:
            return None
        self.places.append(Place())
        return self.places[-1]

    def watch(self, seconds: float, **changes: Any) -> list[float]:
        """Show a scene every second. Returns when the first place was updated."""
        times = []
        for _ in range(round(seconds)):
            self.now += 1
            before = len(self.places[0].updates)
            self.picture.show(scene(self.now, **changes))
            times += [self.now] * (len(self.places[0].updates) - before)
        return times


def scene(at: float, **changes: Any) -> Scene:
    made = make_scene(at=at)
    head = {name: changes.pop(name) for name in ("running", "steps") if name in changes}
    return replace(made, headline=replace(made.headline, **{"steps": int(at), **head}), **changes)


@pytest.fixture
def notebook(monkeypatch) -> Notebook:
    notebook = Notebook()
    monkeypatch.setattr("IPython.display.display", notebook.display)
    monkeypatch.setattr(display_functions, "display", notebook.display)
    monkeypatch.setattr("labkit.view.picture.snapshot.draw", lambda scene: f"{scene.at}".encode())
    notebook.picture.add_place()
    return notebook


def test_it_is_there_in_the_first_minute_and_renewed_now_and_then(notebook):
    times = notebook.watch(3600)
    assert times[0] == FIRST_AFTER
    gaps = [b - a for a, b in pairwise(times)]
    assert gaps == sorted(gaps) and 40 < gaps[0] < 60 and gaps[-1] == MAX_PERIOD


def test_it_is_renewed_when_the_run_ends_and_when_the_swarm_is_closed_and_then_no_more(notebook):
    notebook.watch(20)
    assert len(notebook.watch(3, running=False, steps=20)) == 1
    assert len(notebook.watch(3, running=False, steps=20, open=False)) == 1
    assert notebook.watch(600, running=False, steps=20, open=False) == []


def test_a_swarm_in_which_nothing_trains_has_one_too(notebook):
    assert notebook.watch(60, running=False, steps=0)[0] == FIRST_AFTER


def test_a_cell_that_is_run_again_and_again_keeps_few_places_up_to_date(notebook):
    for _ in range(3 * MAX_PLACES):
        notebook.picture.add_place()
    notebook.watch(FIRST_AFTER)
    assert sum(len(place.updates) for place in notebook.places) == MAX_PLACES


def test_it_is_a_png_of_bounded_size(monkeypatch, notebook):
    monkeypatch.undo()
    notebook.now = FIRST_AFTER
    notebook.picture.show(make_scene(4096, 200, at=3000.0))
    [data] = notebook.places[0].updates
    assert b64decode(data["image/png"]).startswith(b"\x89PNG") and len(data["image/png"]) < MAX_PICTURE


def test_nbconvert_shows_the_picture():
    view = {"model_id": "gone", "version_major": 2, "version_minor": 0}
    widget = {"application/vnd.jupyter.widget-view+json": view, "text/html": "<table></table>", "text/plain": "swarm"}
    picture = {"image/png": "aGFsbG8=", "text/plain": "<dashboard>"}
    outputs = [nbformat.v4.new_output("display_data", data) for data in (widget, picture)]
    cell = nbformat.v4.new_code_cell("swarm.dashboard()", outputs=outputs)
    page, _ = HTMLExporter().from_notebook_node(nbformat.v4.new_notebook(cells=[cell]))
    assert 'src="data:image/png;base64,aGFsbG8="' in page.replace("\n", "") and "model not found" not in page
