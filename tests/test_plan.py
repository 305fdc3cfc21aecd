"""Plans: what a request needs, the waves in which steps run, earlier answers in later requests and what is left out of them."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmgraph import plan
from lmgraph.plan import Request

MARKER = re.compile(r" \[\.\.\. ([\d,]+) characters left out \.\.\.\] ")
ANSWERS = st.dictionaries(st.integers(0, 12), st.text(max_size=300))


@st.composite
def plans(draw: st.DrawFn) -> list[Request]:
    """Plans in which every step needs only what comes before it."""
    steps: list[Request] = []
    for number in range(draw(st.integers(0, 9))):
        needs = draw(st.sets(st.integers(0, number - 1), max_size=3)) if number else set()
        steps.append(Request("n", "", tuple(needs)))
    return steps


# ---------------------------------------------------------------- needs


@pytest.mark.parametrize(("text", "found"), [
    ("", ()), ("no place", ()), ("use {0}", (0,)), ("{2} and {0} and {2}", (0, 2)), ("{11}{1}", (1, 11)), ("{100}", ()), ("{}", ()), ("{a}", ()), ("{ 0 }", ()),
    ("{-1}", ()), ("{{3}}", (3,)), ("{0", ()), ("f'{0:.2f}'", ()), ("{07}", (7,)),
])
def test_a_request_needs_the_answers_that_it_has_places_for(text: str, found: tuple[int, ...]) -> None:
    assert plan.needs(text) == found


@given(st.lists(st.tuples(st.text(alphabet="ab {}\n"), st.integers(0, 99))))
def test_needs_are_found_each_once_and_in_order_whatever_stands_around_them(pieces: list[tuple[str, int]]) -> None:
    assert plan.needs("".join(f"{text}{{{number}}}" for text, number in pieces)) == tuple(sorted({number for _, number in pieces}))


# ---------------------------------------------------------------- waves


@given(plans())
@settings(max_examples=100, deadline=None)
def test_every_step_runs_once_as_early_as_what_it_needs_allows(steps: list[Request]) -> None:
    waves = plan.waves(steps)
    wave_of = {number: at for at, wave in enumerate(waves) for number in wave}
    assert sorted(number for wave in waves for number in wave) == list(range(len(steps))) and [] not in waves
    assert all(wave == sorted(wave) for wave in waves)
    for number, step in enumerate(steps):
        assert wave_of[number] == max((wave_of[need] + 1 for need in step.needs), default=0)


def test_independent_steps_run_together_and_a_chain_one_by_one() -> None:
    assert plan.waves([Request("a", ""), Request("b", ""), Request("c", "", (0, 1))]) == [[0, 1], [2]]
    assert plan.waves([Request("a", ""), Request("b", "", (0,)), Request("c", "", (1,))]) == [[0], [1], [2]]
    assert plan.waves([]) == []


@pytest.mark.parametrize(("needs", "said"), [
    ([(), (2,), (1,)], ["step 1 (n1) needs step 2, which comes after it"]),
    ([(0,)], ["step 0 (n0) needs step 0, which comes with it"]),
    ([(), (7,)], ["step 1 (n1) needs step 7; the plan has 2"]),
    ([(1,), (0,), (5,)], ["step 0 (n0) needs step 1, which comes after it", "step 2 (n2) needs step 5; the plan has 3"]),
])
def test_needs_in_a_circle_or_of_a_missing_step_are_refused_by_name(needs: list[tuple[int, ...]], said: list[str]) -> None:
    steps = [Request(f"n{number}", "", need) for number, need in enumerate(needs)]
    assert plan.problems(steps) == said
    with pytest.raises(ValueError, match=re.escape("; ".join(said))):
        plan.waves(steps)


@given(st.lists(st.sets(st.integers(0, 6), max_size=3), max_size=5))
@settings(max_examples=100, deadline=None)
def test_a_plan_has_waves_or_problems(needs: list[set[int]]) -> None:
    steps = [Request("n", "", tuple(need)) for need in needs]
    if any(need >= number for number, step in enumerate(steps) for need in step.needs):
        assert plan.problems(steps)
    else:
        assert not plan.problems(steps) and sum(map(len, plan.waves(steps))) == len(steps)


# ---------------------------------------------------------------- answers in requests


def test_answers_stand_where_the_request_has_places_for_them_and_what_is_no_place_is_text() -> None:
    assert plan.fill("given {0}, and {1}; again {0}", {0: "A", 1: "B"}, 100) == "given A, and B; again A"
    assert plan.fill("given x^{2}, and {1}", {1: "B"}, 100) == "given x^{2}, and B"
    assert plan.fill("given {0}", {0: "{1} and {0}", 1: "B"}, 100) == "given {1} and {0}", "an answer is text, whatever it looks like"


@given(st.lists(st.sampled_from(["{0}", "{1}", "{7}", "word ", "{", "}"])).map("".join), ANSWERS, st.integers(0, 200))
@settings(max_examples=100, deadline=None)
def test_all_answers_together_have_no_more_than_the_limit(text: str, answers: dict[int, str], limit: int) -> None:
    plain = {number: answer.replace("{", "(").replace("[", "(") for number, answer in answers.items()}
    found = plan.fill(text, plain, limit)
    assert not set(plan.needs(found)) & set(plain)
    without = plan.PLACE.sub(lambda match: "" if int(match[1]) in plain else match[0], text)
    assert len(MARKER.sub("", found)) <= len(without) + limit
    if sum(len(plain.get(int(number), "")) for number in plan.PLACE.findall(text)) == 0:
        assert MARKER.sub("", found) == without


@given(st.text(alphabet="abc[", max_size=400), st.integers(0, 400))
@settings(max_examples=100, deadline=None)
def test_a_long_text_keeps_its_beginning_and_its_end_and_says_how_much_is_left_out(text: str, limit: int) -> None:
    found = plan.cut(text, limit)
    if len(text) <= limit:
        assert found == text
    else:
        (marker,) = MARKER.finditer(found)
        head, tail = found[:marker.start()], found[marker.end():]
        assert text.startswith(head) and text.endswith(tail) and len(head) + len(tail) == limit
        assert int(marker[1].replace(",", "")) == len(text) - limit and 2 * len(tail) >= len(head) - 2


def test_what_is_left_out_is_counted_readably() -> None:
    assert plan.cut("x" * 10_000 + "end", 9) == "xxxxxx [... 9,994 characters left out ...] end"
