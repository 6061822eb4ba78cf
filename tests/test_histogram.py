"""Histograms of durations: which bucket a duration falls into, and how exact percentiles are."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from labkit.histogram import BUCKET_MIDDLES, BUCKETS, LONGEST, RELATIVE_ERROR, SHORTEST, Histogram, bucket, percentiles

DURATIONS = st.floats(SHORTEST, LONGEST * 0.999)


def histogram(durations):
    result = Histogram()
    for seconds in durations:
        result.add(seconds)
    return result


@given(st.floats())
def test_every_float_has_a_bucket(seconds):
    assert 0 <= bucket(seconds) < BUCKETS


def test_what_is_too_short_or_no_number_is_in_the_first_and_what_is_too_long_in_the_last():
    assert [bucket(x) for x in (math.nan, -math.inf, -1.0, 0.0, SHORTEST / 2)] == [0] * 5
    assert [bucket(x) for x in (LONGEST, 1e9, math.inf)] == [BUCKETS - 1] * 3


@given(DURATIONS)
def test_a_duration_is_near_the_middle_of_its_bucket(seconds):
    assert abs(BUCKET_MIDDLES[bucket(seconds)] / seconds - 1) <= RELATIVE_ERROR + 1e-6


@given(DURATIONS, DURATIONS)
def test_longer_durations_are_in_higher_buckets(one, other):
    assert (bucket(one) <= bucket(other)) == (one <= other or bucket(one) == bucket(other))


@given(st.lists(DURATIONS, min_size=1, max_size=200))
def test_percentiles_are_those_of_the_durations_but_for_the_stated_error(durations):
    exact = np.percentile(durations, (50, 95, 99), method="inverted_cdf")
    assert histogram(durations).percentiles() == pytest.approx(1000 * exact, rel=RELATIVE_ERROR + 1e-4)


@given(st.lists(DURATIONS), st.lists(DURATIONS))
def test_histograms_add_up_and_an_earlier_one_can_be_taken_away(first, then):
    both = histogram(first + then)
    assert histogram(first) + histogram(then) == both
    assert both - histogram(first) == histogram(then)
    assert len(both) == len(first) + len(then)


def test_percentiles_of_many_at_once_with_weights_and_with_nothing():
    counts = np.zeros((2, 3, BUCKETS))
    counts[0, 1, 40] = 0.001
    counts[1, 2, 50], counts[1, 2, 60] = 1e9, 1e7
    result = percentiles(counts)
    assert result.shape == (2, 3, 3)
    assert result[0, 1].tolist() == pytest.approx([1000 * BUCKET_MIDDLES[40]] * 3)
    assert result[1, 2].tolist() == pytest.approx([1000 * BUCKET_MIDDLES[n] for n in (50, 50, 50)])
    assert np.isnan(result[0, 0]).all() and np.isnan(result[1, 1]).all()
    assert percentiles(counts, (99.5,))[1, 2, 0] == pytest.approx(1000 * BUCKET_MIDDLES[60])


def test_a_histogram_has_its_buckets_and_no_others():
    with pytest.raises(ValueError, match="not 3"):
        Histogram([1, 2, 3])
