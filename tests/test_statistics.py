"""Areas under curves, paired differences, Pareto fronts and small figures: known answers, and the definitions themselves."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmgraph.evaluate.statistics import auroc, difference, pareto, ratio, share, spread, wilson

scores = st.lists(st.integers(-3, 3).map(lambda x: x / 2), min_size=1, max_size=12)
"""few values, so that there are ties"""
numbers = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20)
patient = settings(deadline=None, max_examples=60)
points = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=14)


# ---------------------------------------------------------------- areas


def test_scores_that_tell_apart_have_an_area_of_one_and_reversed_ones_of_nothing() -> None:
    assert auroc([0.9, 0.8], [0.1, 0.2, 0.3]) == 1.0
    assert auroc([0.1, 0.2, 0.3], [0.9, 0.8]) == 0.0


def test_scores_that_say_nothing_have_an_area_of_a_half() -> None:
    assert auroc([0.4] * 3, [0.4] * 5) == 0.5


def test_an_area_with_ties_is_what_a_hand_counts() -> None:
    """3 > 1, 3 = 3, 2 > 1, 2 < 3: (1 + 1/2 + 1 + 0) of 4 pairs."""
    assert auroc([3, 2], [1, 3]) == 0.625


def test_an_area_needs_both_sides() -> None:
    assert auroc([], [1.0]) is None and auroc([1.0], []) is None and auroc([], []) is None


@patient
@given(scores, scores)
def test_an_area_is_the_share_of_pairs_in_the_right_order(positive: list[float], negative: list[float]) -> None:
    pairs = [1.0 if p > n else 0.5 if p == n else 0.0 for p, n in product(positive, negative)]
    assert auroc(positive, negative) == pytest.approx(sum(pairs) / len(pairs))


@patient
@given(scores, scores, st.randoms(use_true_random=False))
def test_an_area_depends_on_the_order_of_scores_only(positive: list[float], negative: list[float], random: object) -> None:
    found = auroc(positive, negative)
    random.shuffle(positive)  # type: ignore[attr-defined]
    assert auroc([math.exp(x) for x in positive], [math.exp(x) for x in negative]) == pytest.approx(found)
    assert auroc(negative, positive) == pytest.approx(1 - found)  # type: ignore[operator]


def test_large_samples_are_no_matter_of_patience() -> None:
    """Uniform against uniform shifted by a half: P(x + 1/2 > y) = 7/8."""
    draw = np.random.default_rng(0)
    assert auroc(draw.random(200_000) + 0.5, draw.random(200_000)) == pytest.approx(0.875, abs=0.003)


# ---------------------------------------------------------------- differences


@patient
@given(numbers)
def test_a_policy_does_not_differ_from_itself(values: list[float]) -> None:
    assert difference(values, values) == (0.0, (0.0, 0.0))


@patient
@given(st.lists(st.integers(-50, 50), min_size=1, max_size=20), st.integers(-9, 9))
def test_a_shift_that_is_the_same_everywhere_is_known_without_doubt(values: list[int], shift: int) -> None:
    assert difference([v + shift for v in values], values) == (shift, (pytest.approx(shift), pytest.approx(shift)))


def test_pairs_take_away_what_both_share() -> None:
    """Questions differ by thousands, the two policies by 0 or 2: only the second counts."""
    hard = [1000.0 * i for i in range(400)]
    value, (low, high) = difference([h + 2 * (i % 2) for i, h in enumerate(hard)], hard)
    assert value == 1.0 and 0.85 < low < 1 < high < 1.15


def test_an_interval_is_as_wide_as_the_standard_error_says() -> None:
    """A gap of 1 on 100 of 400 questions, 0 on the others: standard error sqrt(0.25 * 0.75 / 400)."""
    value, (low, high) = difference([1.0] * 100 + [0.0] * 300, [0.0] * 400)
    assert value == 0.25 and high - low == pytest.approx(2 * 1.96 * math.sqrt(0.25 * 0.75 / 400), rel=0.1)


@patient
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=40))
def test_a_difference_lies_within_what_is_possible_turns_over_and_repeats_itself(pairs: list[tuple[int, int]]) -> None:
    one, other = [a for a, _ in pairs], [b for _, b in pairs]
    value, (low, high) = difference(one, other)
    gaps = [a - b for a, b in pairs]
    assert value == pytest.approx(sum(gaps) / len(gaps)) and min(gaps) <= low <= high <= max(gaps)
    assert difference(one, other) == (value, (low, high))
    assert difference(other, one)[0] == pytest.approx(-value)


# ---------------------------------------------------------------- fronts


def test_a_front_holds_the_best_for_each_cost_cheapest_first() -> None:
    assert pareto([(3, 0.9), (1, 0.5), (2, 0.4), (2, 0.7), (4, 0.9)]) == [1, 3, 0]
    assert pareto([(5, 0.1)]) == [0] and pareto([]) == []


def test_of_equal_points_the_first_stays() -> None:
    assert pareto([(1, 0.5), (1, 0.5), (0, 0.1), (0, 0.1)]) == [2, 0]


@patient
@given(points)
def test_nobody_on_a_front_is_beaten_and_everybody_off_it_is(found: list[tuple[int, int]]) -> None:
    front = pareto(found)

    def beaten(i: int) -> bool:
        cost, value = found[i]
        return any((c <= cost and v > value) or (c < cost and v >= value) for c, v in found)

    assert not [i for i in front if beaten(i)]
    doubles = {i for i, point in enumerate(found) if found.index(point) != i}
    assert all(beaten(i) for i in range(len(found)) if i not in front and i not in doubles)
    assert not doubles & set(front)
    costs, values = [found[i][0] for i in front], [found[i][1] for i in front]
    assert costs == sorted(set(costs)) and values == sorted(set(values)), "from cheap and poor to dear and good"


# ---------------------------------------------------------------- small figures


def test_a_share_comes_with_its_count_and_interval() -> None:
    assert share(15, 20) == {"correct": 15, "accuracy": 0.75, "interval": list(wilson(15, 20))}
    assert share(0, 1)["accuracy"] == 0.0


def test_a_ratio_of_nothing_is_none() -> None:
    assert ratio(3, 4) == 0.75 and ratio(0, 4) == 0.0
    assert ratio(3, 0) is None and ratio(0, 0.0) is None


def test_times_are_median_95th_percentile_and_mean() -> None:
    """Of 0 to 100, of one, and of 1 to 4, where the percentile lies 0.95 * 3 steps above the first."""
    assert spread(range(101)) == {"median": 50.0, "p95": 95.0, "mean": 50.0}
    assert spread([7.5]) == {"median": 7.5, "p95": 7.5, "mean": 7.5}
    assert spread([4, 1, 3, 2]) == {"median": 2.5, "p95": pytest.approx(3.85), "mean": 2.5}


@patient
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=30))
def test_times_lie_between_the_shortest_and_the_longest(values: list[float]) -> None:
    found = spread(values)
    assert all(min(values) <= x * (1 + 1e-12) and x <= max(values) * (1 + 1e-12) for x in found.values()) and found["median"] <= found["p95"]
