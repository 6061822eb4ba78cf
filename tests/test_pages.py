"""Who looks at a dashboard, and what is sent to whom, when. All times are invented."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest

from labkit.view.page.commands import check_command
from labkit.view.page.pages import (
    BEAT_PERIOD,
    BEAT_TIMEOUT,
    CHUNK_BYTES,
    FRAME_PERIOD,
    LAST_FRAMES,
    MAX_FRAME_PERIOD,
    MAX_PAGES,
    MAX_UNACKNOWLEDGED,
    PAGE_TIMEOUT,
    Beat,
    Chunk,
    FrameDue,
    Pages,
)

TICK = 0.01


def look(page: str = "a", *, looking: bool = True, fresh: bool = False, layer: int = 0, mode: str = "load") -> dict:
    return {"type": "look", "page": page, "looking": looking, "fresh": fresh, "layer": layer, "mode": mode}


def ack(page: str, seq: int) -> dict:
    return {"type": "ack", "page": page, "seq": seq}


def command(do: Any, page: str = "a", id: Any = 1) -> dict:
    return {"type": "command", "page": page, "id": id, "command": do}


class Kernel:
    """The pages of a dashboard, and a clock."""

    def __init__(self) -> None:
        self.gone: list[str] = []
        self.pages = Pages(self.gone.append)
        self.now = 100.0

    def take(self, *messages: object) -> list[Any]:
        return [self.pages.on_message(message, self.now) for message in messages]

    def send(self, over: bool = False) -> tuple[dict, FrameDue | None] | None:
        """What goes out at this moment: its header, and for a frame what it was to show."""
        turn = self.pages.turn(self.now, over)
        if isinstance(turn, Chunk):
            return turn.header, None
        if isinstance(turn, Beat):
            return {"type": "beat", "ack": False}, None
        return None if turn is None else (self.pages.sent(turn, {"at": self.now}), turn)

    def run(
        self, seconds: float, *, acknowledge: bool = True, over: bool = False, looks: bool = True
    ) -> list[tuple[float, dict]]:
        """All that goes out in this time, and when. Pages repeat that they look, and acknowledge at once."""
        sent = []
        for tick in range(round(seconds / TICK)):
            while (message := self.send(over)) is not None:
                sent.append((self.now, message[0]))
                if acknowledge and message[0].get("ack", True):
                    self.take(ack(message[0]["page"], message[0]["seq"]))
            if looks and tick % 500 == 499:
                self.take(*(look(page) for page in self.pages.known))
            self.now += TICK
        return sent


def frames(sent: list[tuple[float, dict]]) -> list[tuple[float, dict]]:
    return [message for message in sent if message[1].get("type") == "frame"]


def beats(sent: list[tuple[float, dict]]) -> list[float]:
    return [at for at, header in sent if header.get("type") == "beat"]


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


def test_nobody_looks_and_nothing_is_sent(kernel):
    assert kernel.run(10) == []
    assert kernel.pages.wait(kernel.now) is None


def test_a_page_that_looks_gets_four_frames_a_second(kernel):
    kernel.take(look(fresh=True))
    times = [at for at, _ in kernel.run(10)]
    assert 39 <= len(times) <= 40
    assert min(b - a for a, b in pairwise(times)) >= FRAME_PERIOD - 1e-9


@pytest.mark.parametrize(("took", "period"), [(0.001, FRAME_PERIOD), (0.0022, 0.6), (0.1, MAX_FRAME_PERIOD)])
def test_frames_that_take_long_to_make_are_rarer(took, period):
    pages = Pages(lambda page: None)
    pages.on_message(look(fresh=True), 0.0)
    due = pages.turn(0.0)
    assert isinstance(due, FrameDue)
    pages.sent(due, {}, took)
    assert pages.wait(0.0) == pytest.approx(period)


def test_several_pages_share_them(kernel):
    kernel.take(look("a", fresh=True), look("b", fresh=True), look("c", fresh=True))
    sent = kernel.run(12)
    assert len(sent) <= 48
    counts = [sum(header["page"] == page for _, header in sent) for page in "abc"]
    assert sum(counts) == len(sent) and max(counts) - min(counts) <= 1


def test_two_frames_without_an_acknowledgement_and_then_silence(kernel):
    kernel.take(look(fresh=True))
    sent = frames(kernel.run(5, acknowledge=False))
    assert [header["seq"] for _, header in sent] == [1, 2] == list(range(1, MAX_UNACKNOWLEDGED + 1))
    assert kernel.send() is None and 0 < kernel.pages.wait(kernel.now) <= BEAT_PERIOD
    kernel.take(ack("a", 1))
    assert kernel.pages.wait(kernel.now) == 0
    assert [header["seq"] for _, header in frames(kernel.run(5, acknowledge=False))] == [3]


def test_every_second_frame_is_to_be_acknowledged_and_that_is_for_both(kernel):
    kernel.take(look(fresh=True))
    acknowledged = [header["ack"] for _, header in kernel.run(2)]
    assert acknowledged == [False, True] * 4


def test_a_late_acknowledgement_brings_one_frame_of_now_and_none_of_those_that_were_missed(kernel):
    kernel.take(look(fresh=True))
    kernel.run(5, acknowledge=False)
    kernel.take(ack("a", 2))  # one for both
    assert kernel.send() is not None and kernel.send() is None


def test_acknowledgements_of_what_was_never_sent_are_ignored(kernel):
    kernel.take(look(fresh=True))
    kernel.run(1, acknowledge=False)
    kernel.take(ack("a", 99), ack("b", 1), ack("a", 0))
    assert kernel.send() is None
    assert kernel.pages.known == ["a"]


def test_a_page_that_gets_frames_gets_no_other_signs_of_life(kernel):
    kernel.take(look(fresh=True))
    assert beats(kernel.run(10)) == []


def test_a_page_that_is_not_heard_gets_signs_of_life_as_long_as_a_cell_may_run_and_no_frames(kernel):
    kernel.take(look(fresh=True))
    kernel.run(5, acknowledge=False)
    sent = kernel.run(600, acknowledge=False, looks=False)
    assert frames(sent) == [] and kernel.pages.known == []
    assert max(b - a for a, b in pairwise(beats(sent))) <= BEAT_PERIOD + 2 * TICK
    kernel.now += BEAT_TIMEOUT
    kernel.run(BEAT_PERIOD, looks=False)
    assert kernel.pages.wait(kernel.now) is None


def test_a_paused_page_gets_signs_of_life_only(kernel):
    kernel.take({**look(fresh=True, looking=False), "paused": True})
    sent = kernel.run(4.9, looks=False)
    assert frames(sent) == [] and len(beats(sent)) == 1
    kernel.take(look(looking=False))
    assert kernel.run(60, looks=False) == []


def test_a_dashboard_that_was_displayed_gives_signs_of_life_before_its_page_is_heard(kernel):
    kernel.pages.shown(kernel.now)
    assert len(beats(kernel.run(60))) in (23, 24)
    kernel.take(look(looking=False))
    assert kernel.run(60, looks=False) == []


def test_a_kernel_that_runs_no_long_cells_gives_none_to_pages_that_are_not_heard():
    pages, now = Pages(lambda id: None, unheard=False), 0.0
    pages.shown(now)
    assert pages.turn(now + 60) is None and pages.wait(now + 60) is None
    pages.on_message(look(looking=False) | {"paused": True}, now + 60)
    assert pages.wait(now + 61) is not None, "it is there, in sight"
    gone = now + 61 + PAGE_TIMEOUT
    assert pages.turn(gone) is None and pages.wait(gone) is None and not pages.known


def test_when_all_is_over_a_page_that_speaks_is_answered(kernel):
    kernel.take(look(fresh=True))
    kernel.run(20, over=True)
    kernel.run(1, over=True, looks=False)
    kernel.take(look())
    assert len(beats(kernel.run(4, over=True, looks=False))) == 1
    assert kernel.pages.wait(kernel.now, over=True) is None


def test_a_page_out_of_sight_gets_nothing(kernel):
    kernel.take(look(fresh=True))
    assert kernel.run(1)
    kernel.take(look(looking=False))
    assert [kernel.send(), kernel.pages.wait(kernel.now)] == [None, None]


def test_a_page_that_went_silent_is_forgotten(kernel):
    kernel.take(look(fresh=True))
    kernel.send()
    kernel.now += PAGE_TIMEOUT + 0.1
    assert frames(kernel.run(0.1)) == []
    assert kernel.gone == ["a"] and kernel.pages.known == []


def test_a_page_that_is_not_known_any_more_begins_anew(kernel):
    kernel.take(look(fresh=True))
    assert kernel.send()[1].fresh
    kernel.now += PAGE_TIMEOUT + 0.1
    kernel.take(look())
    header, due = kernel.send()
    assert due.fresh and header["seq"] == 1


def test_a_page_that_was_loaded_again_has_nothing_and_owes_nothing(kernel):
    kernel.take(look(fresh=True))
    kernel.run(1, acknowledge=False)
    kernel.take(look(fresh=True))
    header, due = kernel.send()
    assert due.fresh and header["seq"] == 3
    kernel.now += 1
    assert not kernel.send()[1].fresh


def test_a_frame_that_could_not_be_made_is_followed_by_one_that_begins_anew(kernel):
    kernel.take(look(fresh=True))
    kernel.run(1)
    kernel.now += 1
    due = kernel.pages.turn(kernel.now)
    kernel.pages.missed(due)
    assert kernel.send() is None, "it is not tried again at once"
    kernel.now += 1
    assert kernel.send()[1].fresh


def test_a_frame_is_of_the_layer_and_mode_that_the_page_looks_at(kernel):
    kernel.take(look(fresh=True), look(layer=2, mode="staleness"))
    header, due = kernel.send()
    assert (due.layer, due.mode) == (2, "staleness")
    assert header == {"type": "frame", "page": "a", "seq": 1, "ack": False, "at": 100.0}


def test_too_many_pages_displace_the_one_that_is_silent_longest(kernel):
    for number in range(MAX_PAGES + 1):
        kernel.now += 0.01
        kernel.take(look(f"page {number}", fresh=True))
    assert kernel.gone == ["page 0"] and len(kernel.pages.known) == MAX_PAGES


def test_when_all_is_over_a_page_gets_a_last_series_of_frames_and_then_none(kernel):
    kernel.take(look(fresh=True))
    kernel.run(2)
    assert len(frames(kernel.run(20, over=True))) == LAST_FRAMES
    kernel.run(1, over=True, looks=False)
    assert kernel.pages.wait(kernel.now, True) is None
    kernel.take(look(mode="latency"))
    assert len(kernel.run(4, over=True)) == LAST_FRAMES
    kernel.take(look("b", fresh=True))
    assert {header["page"] for _, header in kernel.run(4, over=True)} == {"b"}


def test_an_export_goes_in_chunks_through_the_same_window(kernel):
    kernel.take(command({"do": "export", "format": "png"}))
    data = bytes(range(256)) * 1000
    assert kernel.pages.send_file("a", 1, "it.png", "image/png", data)
    chunks: list[Chunk] = []
    while not chunks or not chunks[-1].last:
        chunk = kernel.pages.turn(kernel.now)
        if isinstance(chunk, Chunk):
            assert len(chunk.data) <= CHUNK_BYTES
            chunks.append(chunk)
        elif kernel.pages.wait(kernel.now) is None:  # the window is full
            assert len(chunks) % MAX_UNACKNOWLEDGED == 0
            kernel.take(ack("a", chunks[-1].header["seq"]))
        kernel.now += TICK
    assert b"".join(chunk.data for chunk in chunks) == data
    assert [chunk.header["index"] for chunk in chunks] == list(range(6))
    assert chunks[0].header == {
        "type": "chunk", "page": "a", "id": 1, "seq": 1, "index": 0, "total": 6, "name": "it.png", "mime": "image/png",
    }  # fmt: skip
    assert kernel.pages.wait(kernel.now) is None


def test_frames_go_on_while_an_export_is_fetched(kernel):
    kernel.take(look(fresh=True))
    kernel.pages.send_file("a", 1, "it.html", "text/html", b"x" * CHUNK_BYTES * 1000)
    kinds = [header["type"] for _, header in kernel.run(4)]
    assert 15 <= kinds.count("frame") <= 16
    assert kinds.count("chunk") >= 100


def test_a_page_that_is_gone_or_has_much_to_fetch_is_sent_no_more_files(kernel):
    kernel.take(look(fresh=True))
    assert not kernel.pages.send_file("b", 1, "it.png", "image/png", b"x")
    assert [kernel.pages.send_file("a", id, "it.png", "image/png", b"x") for id in range(3)] == [True, True, False]


def test_an_empty_file_is_one_empty_chunk(kernel):
    kernel.take(look())
    kernel.pages.send_file("a", 1, "it.json", "application/json", b"")
    kernel.send()  # a frame
    header, _ = kernel.send()
    assert (header["index"], header["total"]) == (0, 1)
    assert kernel.send() is None


@pytest.mark.parametrize(
    "message",
    [
        None, 7, "look", [], {}, {"type": "look"}, look(""), look("x" * 65), look(7), look(None),  # type: ignore[arg-type]
        {**look(), "looking": "yes"}, {**look(), "fresh": 1}, {**look(), "mode": "x" * 10**6}, {**look(), "mode": []},
        {**look(), "layer": -1}, {**look(), "layer": True}, {**look(), "layer": 1.5}, {**look(), "layer": 10**30},
        {**look(), "type": "gaze"}, ack("a", 1), {**ack("a", 1), "seq": "1"}, {"type": "command", "page": "a"},
        command({"do": "stop_run"}, id="1"), command({"do": "stop_run"}, id=-1),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_ignored(kernel, message):
    assert kernel.take(message) == [None]
    assert kernel.pages.known == [] and kernel.send() is None


@pytest.mark.parametrize(
    "do",
    [
        None, "kill", [], {}, {"do": "format the disk"}, {"do": ["kill"]}, {"do": "kill"},
        {"do": "kill", "server": "0"}, {"do": "kill", "server": -1}, {"do": "kill", "server": True},
        {"do": "kill", "server": 10**9}, {"do": "faults", "server": 0, "latency": -1.0},
        {"do": "faults", "latency": math.nan},
        {"do": "faults", "loss": math.inf}, {"do": "faults", "loss": 1.5}, {"do": "faults", "loss": "0.5"},
        {"do": "export", "format": "exe"}, {"do": "export"},
    ],
)  # fmt: skip
def test_a_command_that_makes_no_sense_says_so(kernel, do):
    [heard] = kernel.take(command(do))
    assert heard.do is None and heard.problem
    with pytest.raises(ValueError, match=r".+"):
        check_command(do)


@pytest.mark.parametrize(
    "do",
    [
        {"do": "kill", "server": 2}, {"do": "stop", "server": 0}, {"do": "restart", "server": 9}, {"do": "stop_run"},
        {"do": "faults", "server": None, "latency": 0.5, "loss": None}, {"do": "export", "format": "html"},
        {"do": "faults", "server": 1, "latency": None, "loss": 0.25},
    ],
)  # fmt: skip
def test_a_command_is_passed_on_without_what_does_not_belong_to_it(kernel, do):
    [heard] = kernel.take(command({**do, "surprise": "x" * 1000}, id=12))
    assert (heard.page, heard.id, heard.do) == ("a", 12, do)
