"""A recording of a swarm with many layers, as those of a Transformers model, replayed in a real browser."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import expect

from labkit.view.recording import Recording
from tests.browser.conftest import profile, shoot
from tests.browser.view import View
from tests.scenes import make_scene

pytestmark = pytest.mark.timeout(300)


def test_the_heat_map_shows_all_layers_at_once_or_one_of_them(browser, tmp_path):
    recording = Recording()
    for second in range(1, 6):
        scene = make_scene(
            12 * 32, 6, grid=(32,), layers=[f"olmoe.layer{n}" for n in range(12)], dead_servers=[3], at=float(second)
        )
        recording.add(scene)
    page_file = tmp_path / "replay.html"
    page_file.write_bytes(recording.to_html(scene))
    with profile(browser) as context:
        page = context.new_page()
        page.goto(page_file.as_uri())
        view = View(page)
        layers = view.region("Routing").get_by_role("combobox", name="Layer")
        expect(view.experts).to_have_count(32)
        expect(view.headline.get_by_text("at risk")).to_be_hidden()  # no server of theirs makes copies
        layers.select_option("all layers")
        expect(view.experts).to_have_count(12 * 32)
        expect(view.heat_map).to_have_accessible_name(re.compile("^Experts of all layers, 12 × 32, by load: 384 seen"))
        box = view.heat_map.bounding_box()
        assert box is not None
        shoot(page, "all_layers")
        view.heat_map.click(position={"x": box["width"] * 0.5, "y": box["height"] * 0.5})
        expect(view.region("Expert")).to_contain_text(re.compile(r"olmoe\.layer\d+\.\d+"))
        layers.select_option("olmoe.layer7 (32)")
        expect(view.experts).to_have_count(32)
        expect(view.experts.first).to_contain_text("olmoe.layer7.0")
