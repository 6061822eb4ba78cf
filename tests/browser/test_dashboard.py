"""The dashboard of a swarm that trains, in a real browser: in JupyterLab, and on the page of `labkit demo --watch`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.browser.conftest import profile, shoot
from tests.browser.places import Place, in_jupyterlab, in_watch_page
from tests.browser.view import View

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module", params=["jupyterlab", "watch"])
def place(request, browser, tmp_path_factory) -> Iterator[Place]:
    if request.param == "jupyterlab":
        with in_jupyterlab(browser, request.getfixturevalue("lab")) as place:
            yield place
    else:
        with in_watch_page(browser, tmp_path_factory.mktemp("watch")) as place:
            yield place


@pytest.fixture
def view(place, request) -> Iterator[View]:
    yield place.view
    shoot(place.page, request.node.name)


def test_the_heat_map_fills_and_the_numbers_move(view):
    expect(view.headline).to_contain_text("16 of 16 experts")
    expect(view.headline).to_contain_text("4 of 4 servers")
    view.expect_step_beyond(view.number(r"step ([\d,]+) of"))
    expect(view.headline).to_contain_text(re.compile(r"loss [0-9.]+"))
    expect(view.experts).to_have_count(16)
    expect(view.experts.filter(has_text="alive")).to_have_count(16)
    expect(view.experts.first).to_contain_text(re.compile(r"ffn\.0\.0.*[0-9]"))
    expect(view.servers).to_have_count(4)


def test_the_modes_of_the_heat_map_show_other_values(view):
    header = view.root.get_by_role("table", name="Experts").get_by_role("columnheader").last
    for mode, unit in [("Latency", "ms"), ("Failures", "%"), ("Staleness", "updates"), ("Load", "rows/s")]:
        view.region("Routing").get_by_role("radio", name=mode).check()
        expect(header).to_contain_text(unit)


def test_an_expert_is_chosen_with_the_keyboard(view):
    view.heat_map.focus()
    for key in ("ArrowRight", "ArrowDown", "Enter"):
        view.page.keyboard.press(key)
    expert = view.region("Expert")
    expect(expert).to_contain_text(re.compile(r"ffn\.[0-3]\.[0-3]"))
    expect(expert).to_contain_text(re.compile(r"servers\[[0-3]\]"))
    expect(expert).to_contain_text("alive")


def test_a_server_is_killed_while_the_model_trains_and_others_take_its_experts_over_until_it_is_started_again(view):
    expect(view.headline).to_contain_text("0 at risk")
    view.kill("servers[2]")
    expect(view.server("servers[2]")).to_contain_text("dead")
    expect(view.servers.first).to_contain_text("servers[2]")  # worst first
    expect(view.headline).to_contain_text("3 of 4 servers")
    expect(view.happened).to_contain_text("servers[2] killed")
    expect(view.happened).to_contain_text(re.compile(r"took over 4 experts of servers\[2\], .* lost"))
    expect(view.headline).to_contain_text("16 of 16 experts")
    expect(view.experts.filter(has_text="alive, adopted")).to_have_count(4)
    expect(view.region("Servers")).to_contain_text("4 adopted from other servers")
    shoot(view.page, "killed")
    step = view.number(r"step ([\d,]+) of")
    view.expect_step_beyond(step)

    view.button("Restart servers[2]").click()
    expect(view.server("servers[2]")).to_contain_text("alive")
    expect(view.headline).to_contain_text("16 of 16 experts")


def test_latency_is_injected_with_a_slider_and_seen(view):
    view.button("Details of servers[1]").click()
    slider = view.slider("Latency of servers[1]")
    slider.focus()
    for _ in range(6):
        view.page.keyboard.press("ArrowRight")
    expect(slider).to_have_attribute("aria-valuetext", "50 ms")
    network = view.root.get_by_role("table", name="Latency split of servers[1]").get_by_role("row", name="network")
    # Exponential delays with a mean of 50 ms: half of them are longer than 35 ms.
    expect(network.get_by_role("cell").first).to_have_text(re.compile(r"^([3-9]\d|\d{3,})"))
    slider.focus()
    view.page.keyboard.press("Home")
    expect(slider).to_have_attribute("aria-valuetext", "none")
    view.button("Details of servers[1]").click()


def test_a_destructive_button_asks_and_forgets(view):
    view.button("Kill servers[1]").click()
    expect(view.button("Really kill servers[1]?")).to_be_focused()
    expect(view.button("Kill servers[1]")).to_be_visible()  # after four seconds
    expect(view.server("servers[1]")).to_contain_text("alive")


def test_a_paused_view_stands_still(view):
    view.button("Pause view").click()
    expect(view.status).to_have_text("paused")
    shown = view.headline.text_content()
    expect(view.headline.locator("[data-age]")).to_have_text(re.compile(r"view [2-9]"))
    now = view.headline.text_content()
    assert shown is not None and now is not None
    assert shown.split("view")[0] == now.split("view")[0]
    view.button("Resume view").click()
    expect(view.headline.locator("[data-age]")).to_have_text(re.compile(r"view (0|1)"))


def test_it_turns_dark_and_light(place, view):
    colours = []
    for dark in (True, False):
        place.set_dark(dark)
        expect(view.root).to_have_attribute("data-theme", "dark" if dark else "light")
        colours.append(view.root.evaluate("element => getComputedStyle(element).color"))
        shoot(place.page, f"{'dark' if dark else 'light'}-{type(place).__name__}")
    assert colours[0] != colours[1]


def exported(view: View, format: str, folder: Path) -> Path:
    with view.page.expect_download() as download:
        view.button(f"Export {format}").click()
    path = folder / str(download.value.suggested_filename)
    download.value.save_as(path)
    return path


def test_the_picture_is_exported(view, tmp_path):
    path = exported(view, "PNG", tmp_path)
    assert path.suffix == ".png"
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert path.stat().st_size > 20_000


def test_the_numbers_are_exported(view, tmp_path):
    assert json.loads(exported(view, "JSON", tmp_path).read_text())["swarm"]


def test_the_recording_is_exported_and_replays_without_a_network(view, browser, tmp_path):
    path = exported(view, "HTML", tmp_path)
    with profile(browser) as context:
        context.set_offline(True)
        page = context.new_page()
        page.goto(path.as_uri())
        replay = View(page)
        expect(replay.experts).to_have_count(16)
        end = replay.number(r"step ([\d,]+) of")
        time = replay.slider("Time")
        time.focus()
        page.keyboard.press("PageDown")
        expect(replay.headline).not_to_contain_text(f"step {end:,} of")
        expect(page.get_by_role("button", name="Play")).to_be_visible()
        expect(page.get_by_role("button", name="Kill servers[0]")).to_be_disabled()
        shoot(page, "replay")


def test_a_reloaded_page_gets_the_state_back(place, view):
    step = view.number(r"step ([\d,]+) of")
    happened = view.happened.get_by_role("listitem").first.text_content()
    assert happened
    place.reload()
    view.expect_first_frame()
    assert view.number(r"step ([\d,]+) of") > step
    expect(view.experts).to_have_count(16)
    expect(view.happened).to_contain_text(re.sub(r"^\S+ ", "", happened))
    view.expect_step_beyond(view.number(r"step ([\d,]+) of"))


def test_the_run_is_stopped(place, view):
    view.button("Stop run").click()
    view.button("Really stop the run?").click()
    place.expect_run_over()
