"""Who is given scenes, and how often. All times are invented."""

from __future__ import annotations

from itertools import pairwise

import pytest

from labkit.view.outputs import FREE_SCENE_SECONDS, SCENE_CORE_SHARE, Output, Outputs
from tests.scenes import make_scene


class Machine:
    """A clock, and what a scene takes of a core."""

    def __init__(self, takes: float) -> None:
        self.takes = takes
        self.now = 100.0
        self.computed = 0.0

    def scene(self):
        self.computed += self.takes
        return make_scene()

    def seconds_between(self, period: float, longest: float) -> set[float]:
        """Seconds between the scenes of one output in two minutes."""
        shown: list[float] = []
        outputs = Outputs(Output(lambda _: shown.append(self.now), period, self.now, max_period=longest), "test")
        while self.now < 220.0:
            self.now += outputs.show(self.scene, self.scene, lambda: self.now, lambda: self.computed)
        return {round(after - before, 6) for before, after in pairwise(shown)}


@pytest.mark.parametrize(
    ("takes", "seconds"), [(FREE_SCENE_SECONDS / 2, 1.0), (FREE_SCENE_SECONDS + 2 * SCENE_CORE_SHARE, 2.0), (1.0, 2.4)]
)
def test_an_output_that_may_is_given_scenes_more_rarely_where_they_take_long(takes, seconds):
    assert Machine(takes).seconds_between(1.0, longest=2.4) == {seconds}


def test_any_other_is_given_them_by_its_period_whatever_they_take():
    assert Machine(1.0).seconds_between(1.0, longest=0.0) == {1.0}
