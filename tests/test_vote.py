"""Votes: what is read out of an answer, how it weighs, who wins; graph.yaml; the runtime with voters that answer, fail, hang or are judged."""

from __future__ import annotations

import asyncio
import json
import math
import re
import textwrap
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import openai
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from conftest import say, serving, toy_graph
from lmgraph import cli, graphedit, graphfile, runtime, vote
from lmgraph import settings as environment
from lmgraph.errors import GraphError, QueryError, WorkerError
from lmgraph.graph import AnswerSpec
from lmgraph.runtime import Runtime
from lmgraph.types import Answer, Ask, Message

FREE = "It depends on so many things that nobody could say it in a few words"
BROKEN = "! out of order"


@pytest.fixture(autouse=True)
def one_thread(own_machine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMGRAPH_THREADS", "1")  # two threads of llama.cpp wait for each other where other work runs beside them


# ---------------------------------------------------------------- options


def listing(letters: str, form: str) -> str:
    return "\n".join(form.format(letter) + f" option {i}" for i, letter in enumerate(letters))


@given(st.integers(2, 26), st.sampled_from(["{}.", "{})", "({})", "  {}."]))
@settings(max_examples=50, deadline=None)
def test_the_options_of_a_question_are_counted(count: int, form: str) -> None:
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[:count]
    assert vote.option_count(f"Which one?\n{listing(letters, form)}\nAnswer:") == count


@pytest.mark.parametrize(("text", "count"), [
    ("", 0), ("What is A?", 0), ("A. Smith wrote it.\nWhy?", 0), ("B. one\nC. two", 0), ("A. one\nC. two\nB. three", 2), ("A. one B. two", 0),
    ("A.\none\nB.\ntwo", 2), ("A.one\nB.two", 0),
    ("A. one\nB. two\nC. three\nAnswer: A\n\nWhich?\nA. one\nB. two\nAnswer:", 2),
    ("A. one\nB. two\nBecause of what\nA. Smith wrote", 2),
])
def test_only_lines_of_letters_in_a_row_are_options(text: str, count: int) -> None:
    assert vote.option_count(text) == count


# ---------------------------------------------------------------- keys


@pytest.mark.parametrize("text", [
    "C", "C.", "C)", "(C)", "(c)", "**C**", "**C.**", "C\n", "Answer: C", "answer is C", "**Answer:** C", "**Answer: C**", "Answer:\n\nC.", "\\boxed{C}",
    "$\\boxed{\\text{C}}$", "The answer is (C).", "the answer is (c)", "The answer is \\(C\\).", 'The answer is "C".', "The correct option is C",
    "The correct answer is option C, of course.", "Therefore, the correct answer is:\n\n(C) the third", "The answer to this is C.", "My choice is C!",
    "The best answer would be C", "The answer is therefore C.", "The answer is C because of what was said before about all of it.",
    "(c) because the water boils at a lower temperature up there", "C. The third of them, which is the only one that holds water", "C) the third",
    "C - the third, which is the only one of them all that holds", "C, because the water boils at a lower temperature", "**C. The third**",
    "First I look at the water.\nThen at the height.\n\nC", "First I look at the water.\nThen at the height.\n\n**(C)**",
    "Final Answer: The final answer is $C$. I hope it is correct.", "While there is much to say for B, I find that C is the correct answer.",
    "The answer is A. No, wait: that was too fast. The answer is C.", "The answer is 3, so the answer is C.", "The answer is C.\n\nThe answer is clear.",
])
def test_a_chosen_letter_is_read_however_it_is_said(text: str) -> None:
    assert vote.key(text, 4) == "C"


@pytest.mark.parametrize("text", [
    "A dog barks at everybody who passes by the old house.", "I think that this is too long a story to be told here.", "Answer: A dog barks at everybody who passes",
    "Answer: I think that this is too long a story to be told here", "The answer is A and B, both of them, as was said at length.",
    "The answer is A, B and C, all of them, as was said at length.", "The answer is (A) and (B), both of them, as was said.",
    "Option A is wrong. Option B is right for many reasons that I have given above.", "The answer is not A, it is something that nobody thought of yet.",
    "Is the correct answer A? Or is it: A or B? I cannot tell from all of this.", "The answer is U.S. policy, as it was in the last hundred years.",
    "A. one of them\nB. two of them\nC. three of them\nI could not say which of them it is.", "The answer is i.e. nothing of what anybody has proposed.",
    "The answer is A's brother, who has not been seen since that day", "I'm not sure what to say about any of these many options here.",
])
@pytest.mark.parametrize("options", [0, 4])
def test_prose_is_no_choice(text: str, options: int) -> None:
    assert vote.key(text, options) is None


@pytest.mark.parametrize("text", ["E. coli is a bacterium that lives in the gut of many mammals.", "I, as a model, cannot answer questions of this kind here.",
                                  "J. K. Rowling wrote that, as far as I have heard from others.", "(a) First one looks at it, (b) then one goes on with it all.",
                                  "A: it is a long story about many things that happened there."])
def test_where_no_options_are_listed_a_sentence_that_opens_like_a_choice_is_none(text: str) -> None:
    assert vote.key(text) is None


def test_only_a_letter_that_the_question_lists_is_a_choice() -> None:
    assert vote.key("The answer is F, as was shown above with great care.", 4) is None
    assert vote.key("The answer is F, as was shown above with great care.", 6) == "F"
    assert vote.key("The answer is C. If there were six, the answer is F.", 4) == "C"
    assert vote.key("The answer is J, as was shown above with great care.") == "J"


@pytest.mark.parametrize(("text", "number"), [
    ("42", "42"), ("42.", "42"), ("42.0", "42"), ("-0", "0"), ("$1,234.50", "1234.5"), ("the answer is 1,234.50", "1234.5"), ("#### 42", "42"),
    ("6 times 7, so 6 * 7 = 42", "42"), ("So \\boxed{42} is what comes out of all of this work.", "42"), ("Answer: -12", "-12"), ("answer = 3.50", "3.5"),
    ("Then 3 + 4 = 7 apples.", "7"), ("The answer is 5% of what was there in the beginning", "5"), ("The answer is 3/4.", "0.75"), ("The answer is 2/3.", "2/3"),
    ("The answer is 4/2.", "2"), ("The answer is 10,000,000.", "10000000"), ("The answer is 41. I forgot one. The answer is 42.", "42"),
    ("The answer is 42, and that is all there is to say about it.", "42"), ("x = 1\n\nSo\nx = 12", "12"), ("The answer is −7 degrees, as measured.", "-7"),
    ("The answer is 42 kg of something that nobody wants", "42"), ("1/0", "1/0"),
])
def test_a_final_number_is_read_in_its_plainest_form(text: str, number: str) -> None:
    assert vote.key(text) == number


@pytest.mark.parametrize("text", [
    "The answer is 3-5 of all the things that there are in the world", "The answer is 12/05/2020, a day like many other days before it",
    "The answer is 12:30 in the afternoon of some day in the week", "The answer is 2^10 and nothing else of all that there is", "\\boxed{2\\sqrt{3}} is what comes out of it in the end",
    "The answer is 1.234,50 in the money of some other country", "The answer is 3, 4 and 5, which are numbers like any other", "The answer is 5 million, which is more than anybody has got",
    "With g = 9.81 m/s^2 things fall, and nobody can do anything about that.", "The answer is 3x + 2 for every x that anybody could name",
])
def test_a_part_of_a_longer_figure_is_no_number(text: str) -> None:
    assert vote.key(text) is None


@given(st.decimals(-10**12, 10**12, places=3), st.sampled_from(["{}", "The answer is {}.", "#### {}", "So x = {}", "\\boxed{{{}}}", "**{}**", "${}"]),
       st.booleans())
@settings(max_examples=50, deadline=None)
def test_a_number_has_one_key_however_it_is_written(number: Any, form: str, commas: bool) -> None:
    found = vote.key(form.format(f"{number:,}" if commas else f"{number:f}"))
    assert found is not None and not {",", "e", "E"} & set(found)
    assert found == vote.key(f"{number:f}") == vote.key(found) and float(found) == float(number)


@pytest.mark.parametrize(("one", "other"), [("Paris", "**paris.**"), ("Yes", "yes!"), ("New  York\n", "new-york"), ("Straße", "STRASSE"), ("ﬁne", "Fine"), ("é", "e\u0301")])
def test_short_answers_are_compared_folded(one: str, other: str) -> None:
    assert vote.key(one) == vote.key(other) is not None


@pytest.mark.parametrize(("one", "other"), [
    ("x > 5", "x < 5"), ("2x+1", "2x-1"), ("a * b", "a - b"), ("√2", "2"), ("-5 °C", "5 °C"), ("3.5 kg", "3-5 kg"), ("C++", "C#"), ("¬p", "p"),
    ("A ∪ B", "A ∩ B"), ("p ≥ q", "p ≤ q"), ("दिल", "दाल"), ("ไม่", "ไม"),
])
def test_short_answers_that_differ_by_a_sign_are_not_the_same(one: str, other: str) -> None:
    assert vote.key(one) != vote.key(other)


@pytest.mark.parametrize("text", ["", " \n", "...", "one two three four five six seven", "a" * 41, FREE])
def test_nothing_and_long_texts_are_free_text(text: str) -> None:
    assert vote.key(text) is None


@given(st.text() | st.lists(st.sampled_from(["answer ", "is ", "the ", ": ", "A", "B", "I", " ", "\n", "(", ")", "*", "\\boxed{", "}", "42", ",", "1,000", ".", "/", "= ",
                                             "#### ", "because ", "and ", "correct "])).map("".join), st.integers(0, 26))
@settings(max_examples=50, deadline=None)
def test_a_key_of_whatever_text_is_a_letter_in_range_or_short(text: str, options: int) -> None:
    found = vote.key(text, options)
    assert found is None or (found and len(found) <= 80)
    if found and re.fullmatch("[A-Z]", found):
        assert not options or ord(found) - ord("A") < options
    assert vote.key(f"{text}\n\nThe answer is (B).", 4) == "B"


@pytest.mark.parametrize("scrap", ["answer is " + "*" * 50_000, "= 1 " + "w" * 100_000 + "!", "= 1" + " w!" * 30_000, "answer to x " * 9_000, "(" * 100_000, "1," * 50_000,
                                   "answer:" + "\n" * 100_000 + FREE, "####" + " " * 100_000, "1,111" * 20_000, "A, " * 50_000, "9" * 100_000])
def test_a_text_made_to_be_slow_is_read_at_once(scrap: str) -> None:
    assert vote.key(scrap + "\nThe answer is D.", 4) == "D"  # minutes, were a pattern to try every way through it
    assert vote.key(scrap, 4) is None


# ---------------------------------------------------------------- weights and tallies


@pytest.mark.parametrize(("competence", "options", "expected"), [
    (0.75, 2, math.log(3)), (0.5, 2, 0.01), (0.4, 4, math.log(2)), (0.25, 4, 0.01), (0.1, 4, 0.01), (0.5, 0, math.log(3)), (0.5, 10, math.log(9)),
    (0, 4, 0.01), (1, 2, math.log((1 - 1e-6) / 1e-6)),
])
def test_a_vote_weighs_its_log_odds(competence: float, options: int, expected: float) -> None:
    assert vote.weight(competence, options) == pytest.approx(expected)


@given(st.floats(0, 1), st.floats(0, 1), st.integers(0, 26))
@settings(max_examples=50, deadline=None)
def test_who_is_more_competent_never_weighs_less(one: float, other: float, options: int) -> None:
    low, high = sorted((one, other))
    assert 0.01 <= vote.weight(low, options) <= vote.weight(high, options) < math.inf


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0.3, 0.95)), min_size=1, max_size=9))
@settings(max_examples=50, deadline=None)
def test_the_winning_option_is_the_most_probable_one_given_all_votes(votes: list[tuple[int, float]]) -> None:
    likely = [math.prod(c if option == k else (1 - c) / 3 for option, c in votes) for k in range(4)]
    best, second, *_ = sorted(likely, reverse=True)
    assume(best > second * 1.001)
    found = vote.tally([(f"v{i}", "ABCD"[option], vote.weight(c, 4)) for i, (option, c) in enumerate(votes)])
    assert found.key == "ABCD"[likely.index(best)]
    assert found.winner in {f"v{i}" for i, (option, _) in enumerate(votes) if option == likely.index(best)}


VOTES = st.lists(st.tuples(st.none() | st.sampled_from("AB"), st.integers(1, 5)), min_size=1, max_size=7)


@given(VOTES)
@settings(max_examples=50, deadline=None)
def test_a_tally_is_what_counting_by_hand_gives(given_votes: list[tuple[str | None, int]]) -> None:
    votes = [(f"v{i}", found, float(heavy)) for i, (found, heavy) in enumerate(given_votes)]
    found = vote.tally(votes)
    sums = {k: sum(h for key, h in given_votes if key == k) for k, _ in given_votes if k}
    assert found.votes == tuple(votes)
    if not sums:
        assert found.key is None and found.share == 0
    else:
        assert found.key and sums[found.key] == max(sums.values()) and found.share == pytest.approx(sums[found.key] / sum(h for _, h in given_votes))
    agreeing = [(voter, heavy) for voter, key, heavy in votes if key == found.key or found.key is None]
    assert found.winner == next(voter for voter, heavy in agreeing if heavy == max(h for _, h in agreeing))


def test_a_tie_goes_to_the_heaviest_single_vote_then_to_the_earlier_voter() -> None:
    assert vote.tally([("a", "X", 0.1), ("b", "X", 0.2), ("c", "Y", 0.3)]).winner == "c"  # 0.1 + 0.2 is a little more than 0.3 to a computer
    assert vote.tally([("a", "X", 1.0), ("b", "Y", 1.0)]).winner == "a"
    assert vote.tally([("a", None, 1.0), ("b", None, 1.0)]).winner == "a"
    assert vote.tally([("a", "X", 2.0), ("b", "Y", 2.0), ("c", None, 9.0)]).key == "X"


def test_a_vote_without_votes_is_refused() -> None:
    with pytest.raises(ValueError, match="without votes"):
        vote.tally([])


# ---------------------------------------------------------------- graph.yaml


def graph_text(answers: Mapping[str, str], answer: str = "", node: str = "", master: str = "{bundle: no-such-master.gguf}", more: str = "") -> str:
    """graph.yaml of scripted nodes, name -> answer ('name>other' has a fallback); `answer` of the graph, `node` of the first node."""
    rows = []
    for i, (key, said) in enumerate(answers.items()):
        name, _, fallback = key.partition(">")
        worker = said if said.startswith("{") else json.dumps({"kind": "scripted", "retries": 0, "answers": {"*": said}})
        own = f", answer: {node}" if node and not i else ""
        rows.append(f"  {name}: {{token: {i}, description: d, worker: {worker}{f', fallback: {fallback}' if fallback else ''}{own}{more}}}\n")
    return f"version: 1\nmaster: {master}\n{f'answer: {answer}' if answer else ''}\nnodes:\n{''.join(rows)}edges: {{start: ['*']}}\n"


def test_how_to_answer_is_read_for_the_graph_and_for_a_node() -> None:
    text = graph_text({"a": "x", "b": "y"}, "{mode: vote, workers: 2}", "{mode: vote, voters: {a: 0.48, b: 0.41}, judge: b}")
    one = graphfile.loads(text)
    assert one.answer == AnswerSpec("vote", 2) and one.nodes["b"].answer is None
    assert one.nodes["a"].answer == AnswerSpec("vote", 3, {"a": 0.48, "b": 0.41}, "b")
    assert graphfile.loads(graphfile.dumps(one)) == one


def test_a_node_may_answer_alone_where_the_graph_votes_and_keeps_that_in_its_file() -> None:
    one = graphfile.loads(graph_text({"a": "x"}, "{mode: vote}", "{mode: single}"))
    assert one.nodes["a"].answer == AnswerSpec() and graphfile.loads(graphfile.dumps(one)) == one
    assert "answer" not in graphfile.to_dict(graphfile.loads(graph_text({"a": "x"})))


def problems(text: str) -> Sequence[str]:
    with pytest.raises(GraphError) as caught:
        graphfile.loads(text)
    return caught.value.problems


def test_every_problem_of_votes_is_named_with_its_line() -> None:
    found = problems(textwrap.dedent("""\
        version: 1
        answer: {mode: quorum, workers: 1}
        nodes:
          a:
            token: 0
            description: d
            worker: {kind: scripted}
            answer:
              workers: 10
              voters:
                a: 1
                b: 0.0
                c: often
                d: true
                7: 0.5
                e: .nan
              judges: a
          b: {token: 1, description: d, worker: {kind: scripted}, answer: vote}
        edges: {start: ['*']}
    """))
    expected = [(2, "answer.mode: found 'quorum'; valid: single, vote"), (2, "answer.workers: found 1, expected 2 to 9"), (8, "nodes.a.answer: needs 'mode'"),
                (9, "workers: found 10, expected 2 to 9"), (11, "voters.a: found a whole number (1), expected a probability between 0 and 1"), (12, "voters.b: found a number (0.0)"),
                (13, "voters.c: found text ('often')"), (14, "voters.d: found true or false (True)"), (15, "voters.7: found a whole number (7) as a node's name"),
                (16, "voters.e: found a number (nan)"), (17, "judges: unknown key; valid: mode, workers, voters, judge"), (18, "nodes.b.answer: found text ('vote'), expected a mapping")]
    for line, words in expected:
        assert any(p.startswith(f"line {line}: ") and words in p for p in found), (line, words, found)
    assert len(found) == len(expected), found


def test_a_voter_or_judge_that_is_no_node_is_named_with_its_line_and_the_valid_ones() -> None:
    text = graph_text({"a": "x", "b": "y"}, "{mode: vote, judge: nobody}", "{mode: vote, voters: {a: 0.5, ghost: 0.5}}")
    assert problems(text) == ("line 3: answer: judge 'nobody' is no node; valid: a, b", "line 5: nodes.a.answer: voter 'ghost' is no node; valid: a, b")


def test_an_edit_keeps_how_to_answer_as_it_stands_and_names_a_voter_that_it_takes_away() -> None:
    text = graph_text({"a": "x", "b": "y"}, "{mode: vote, workers: 2}  # all of it", "{mode: vote, voters: {a: 0.48, b: 0.41}}")
    after = graphedit.edited(text, lambda data: data["nodes"]["b"].update(description="changed"))
    assert after.splitlines()[2] == "answer: {mode: vote, workers: 2}  # all of it" and "answer: {mode: vote, voters: {a: 0.48, b: 0.41}}" in after
    with pytest.raises(GraphError, match="voter 'b' is no node"):
        graphedit.edited(text, lambda data: graphedit.remove(data, "b"))
    patch = {"nodes": {"b": None, "a": {"answer": {"voters": {"b": None}}}}}
    assert graphfile.loads(graphedit.edited(text, lambda data: graphedit.merge(data, patch))).nodes["a"].answer == AnswerSpec("vote", 3, {"a": 0.48})


# ---------------------------------------------------------------- a vote


def asking(text: str = "hello", **options: Any) -> Ask:
    return Ask((Message("user", text),), **options)


async def ask_of(text: str, ask: Ask, told: list[str] | None = None) -> Answer:
    async with Runtime.open(environment.read(), given=graphfile.loads(text)) as opened:
        return await runtime.fold(opened.answer(ask, answering=told.append if told is not None else None))


def answer_to(text: str, ask: Ask | None = None, told: list[str] | None = None) -> Answer:
    """The whole answer of a graph to an ask (pinned to node a unless it says otherwise)."""
    return asyncio.run(ask_of(text, ask or asking(node="a"), told))


def test_two_weak_voters_win_against_a_strong_one() -> None:
    told: list[str] = []
    found = answer_to(graph_text({"a": "The answer is A, I am sure.", "b": "The answer is (B).", "c": "B"}, node="{mode: vote, voters: {a: 0.6, b: 0.5, c: 0.5}}"), told=told)
    assert found.text == "The answer is (B)." and told == ["b"]
    made = found.trace.vote
    assert made and made.winner == "b" and made.judge == ""
    assert made.votes == (("a", "A", pytest.approx(math.log(4.5))), ("b", "B", pytest.approx(math.log(3))), ("c", "B", pytest.approx(math.log(3))))
    assert made.share == pytest.approx(2 * math.log(3) / (math.log(4.5) + 2 * math.log(3)))
    assert [(s.node, s.request, s.error) for s in found.trace.steps] == [("a", "hello", ""), ("c", "hello", ""), ("b", "hello", "")]
    assert found.usage == {"prompt_tokens": 3, "completion_tokens": 7 + 1 + 4}


def test_a_strong_voter_wins_against_two_weak_ones() -> None:
    found = answer_to(graph_text({"a": "The answer is A, I am sure.", "b": "The answer is (B).", "c": "B"}, node="{mode: vote, voters: {b: 0.5, a: 0.9, c: 0.5}}"))
    assert found.text == "The answer is A, I am sure." and found.trace.vote and found.trace.vote.winner == "a"
    assert [v[0] for v in found.trace.vote.votes] == ["a", "b", "c"] and found.trace.steps[-1].node == "a"


def test_the_more_options_a_question_lists_the_more_an_agreement_weighs() -> None:
    text = graph_text({"a": "A", "b": "B", "c": "(B)"}, node="{mode: vote, voters: {a: 0.75, b: 0.55, c: 0.55}}")
    two, ten = (f"Which?\n{listing(letters, '{}.')}" for letters in ("AB", "ABCDEFGHIJ"))
    assert answer_to(text, asking(two, node="a")).text == "A"  # log 3 against 2 log 1.22
    assert answer_to(text, asking(ten, node="a")).text == "B"  # log 27 against 2 log 11


def test_the_most_competent_vote_and_only_as_many_as_the_graph_says() -> None:
    answers = {"a": "A", "b": "B", "c": "C", "d": "D"}
    found = answer_to(graph_text(answers, node="{mode: vote, workers: 2, voters: {a: 0.3, b: 0.5, c: 0.4, d: 0.6}}"))
    assert [s.node for s in found.trace.steps] == ["b", "d"] and found.text == "D"


def test_nodes_with_the_same_worker_vote_once() -> None:
    found = answer_to(graph_text({"a": "A", "b": "A", "c": "C"}, node="{mode: vote, voters: {a: 0.4, b: 0.5, c: 0.45}}"))
    assert found.trace.vote and [(v[0], v[1]) for v in found.trace.vote.votes] == [("b", "A"), ("c", "C")]
    alone = answer_to(graph_text({"a": "A", "b": "A"}, node="{mode: vote, voters: {a: 0.4, b: 0.5}}"))
    assert alone.trace.vote is None and [s.node for s in alone.trace.steps] == ["a"] and "vote" not in alone.trace.to_json()


def test_a_node_says_it_better_than_the_graph() -> None:
    answers = {"a": "A", "b": "B"}
    alone = answer_to(graph_text(answers, "{mode: vote, voters: {a: 0.4, b: 0.5}}", "{mode: single}"))
    assert alone.text == "A" and alone.trace.vote is None
    assert answer_to(graph_text(answers, "{mode: vote, voters: {a: 0.4, b: 0.5}}")).text == "B"


def test_a_pinned_node_without_voters_answers_alone() -> None:
    found = answer_to(graph_text({"a": "A", "b": "B"}, "{mode: vote}"))
    assert found.text == "A" and found.trace.vote is None and len(found.trace.steps) == 1


@pytest.mark.parametrize("options", [{"tools": [{"type": "function"}]}, {"n": 2}, {"logprobs": True}, {"response_format": {"type": "json_object"}}, {"functions": [{}]}])
def test_what_cannot_be_compared_is_answered_by_one(options: dict[str, Any]) -> None:
    text = graph_text({"a": "A", "b": "B"}, node="{mode: vote, voters: {a: 0.4, b: 0.5}}")
    found = answer_to(text, asking(node="a", options=options))
    assert found.text == "A" and found.trace.vote is None
    harmless = {"tools": [], "n": 1, "logprobs": False, "response_format": {"type": "text"}, "top_p": 0.5}
    assert answer_to(text, asking(node="a", options=harmless)).trace.vote


def test_the_turn_after_a_tools_answer_is_answered_by_one() -> None:
    turns = (Message("user", "how warm?"), Message("assistant", "", {"role": "assistant", "tool_calls": []}), Message("tool", "20", {"role": "tool", "content": "20"}))
    found = answer_to(graph_text({"a": "A", "b": "B"}, node="{mode: vote, voters: {a: 0.4, b: 0.5}}"), Ask(turns, node="a"))
    assert found.text == "A" and found.trace.vote is None


def test_pictures_are_looked_at_by_one_and_only_nodes_that_hear_vote_on_a_sound() -> None:
    text = graph_text({"a": "A", "b": "B", "c": "C"}, node="{mode: vote, voters: {a: 0.4, b: 0.5, c: 0.6}}", more=", accepts: [text, audio, image]")
    text = text.replace(", accepts: [text, audio, image]}\nedges", ", accepts: [text]}\nedges")  # c hears nothing
    assert answer_to(text, asking(node="a", needs=frozenset({"image"}))).trace.vote is None
    found = answer_to(text, asking(node="a", needs=frozenset({"audio"})))
    assert found.trace.vote and [v[0] for v in found.trace.vote.votes] == ["b", "a"]


# ---------------------------------------------------------------- the master's best


def with_votes(master: Path, answer: str, margin: float = 0.3) -> str:
    answers = iter(["{kind: scripted, answers: {'*': 'A'}}", "{kind: scripted, answers: {'*': 'B'}}", "{kind: scripted, answers: {'*': 'C'}}"])
    text = re.sub(r"\{kind: scripted, answers: \{'\*': 'answer to \{\}'\}\}", lambda _: next(answers), toy_graph(master, extra=f"answer: {answer}\n"))
    return text.replace(f"{{bundle: {master}}}", f"{{bundle: {master}, margin: {margin}}}")


def test_without_measured_voters_the_masters_best_vote_with_its_probabilities(toy_master: Path) -> None:
    found = answer_to(with_votes(toy_master, "{mode: vote, workers: 2}"), asking("court contract statute"))
    decision, made = found.trace.decision, found.trace.vote
    assert decision and made
    best = dict(decision.alternatives[:2])
    assert {v[0]: v[2] for v in made.votes} == {n: pytest.approx(vote.weight(min(max(p, 0.02), 0.98))) for n, p in best.items()}
    assert [v[0] for v in made.votes] == list(best) and made.winner == decision.node == found.trace.steps[-1].node
    assert {s.request for s in found.trace.steps} == {decision.rewritten}


def test_the_decided_node_votes_however_improbable_it_is(toy_master: Path) -> None:
    text = with_votes(toy_master, "{mode: vote, workers: 2}", margin=1)
    first = answer_to(text, asking("court contract statute"))
    assert first.trace.decision
    last = first.trace.decision.alternatives[-1][0]
    turns = (Message("user", "court contract statute"), Message("assistant", "B"), Message("user", "court contract statute"))
    found = answer_to(text, Ask(turns, stay=last))
    decision = found.trace.decision
    assert decision and decision.node == last and decision.stayed and decision.alternatives[-1][0] == last
    assert {s.node for s in found.trace.steps} == {decision.alternatives[0][0], last}


# ---------------------------------------------------------------- voters that fail


def test_a_voter_that_fails_is_a_step_with_its_error_and_the_others_vote() -> None:
    found = answer_to(graph_text({"a": BROKEN, "b": "B", "c": "C"}, node="{mode: vote, voters: {a: 0.9, b: 0.4, c: 0.5}}"))
    assert found.text == "C" and found.trace.vote and [v[0] for v in found.trace.vote.votes] == ["c", "b"]
    assert [(s.node, s.error) for s in found.trace.steps] == [("a", "out of order"), ("b", ""), ("c", "")]


def test_when_all_voters_fail_the_decided_nodes_fallbacks_answer_and_no_voter_is_asked_twice() -> None:
    async def work() -> None:
        text = graph_text({"a>b": BROKEN, "b>c": "! b too", "c": "at last"}, node="{mode: vote, voters: {a: 0.5, b: 0.6}}")
        async with Runtime.open(environment.read(), given=graphfile.loads(text)) as opened:
            told: list[str] = []
            found = await runtime.fold(opened.answer(asking(node="a"), answering=told.append))
            assert found.text == "at last" and found.trace.vote is None and told[-1] == "c" and "vote" not in found.trace.to_json()
            assert [(s.node, s.error) for s in found.trace.steps] == [("b", "b too"), ("a", "out of order"), ("c", "")]

    asyncio.run(work())


def test_when_all_voters_fail_a_decided_node_that_is_none_of_them_answers() -> None:
    found = answer_to(graph_text({"a": "here I am", "b": BROKEN, "c": "! c too"}, node="{mode: vote, voters: {b: 0.5, c: 0.6}}"))
    assert found.text == "here I am" and [s.node for s in found.trace.steps] == ["c", "b", "a"]


@pytest.mark.parametrize(("fallback", "tried"), [("", "b: b too, a: out of order"), (">c", "b: b too, a: out of order, c: c as well")])
def test_when_nobody_at_all_answers_the_error_names_each(fallback: str, tried: str) -> None:
    text = graph_text({f"a{fallback}": BROKEN, "b": "! b too", "c": "! c as well"}, node="{mode: vote, voters: {a: 0.5, b: 0.6}}")
    with pytest.raises(WorkerError) as caught:
        answer_to(text)
    assert caught.value.message == f"No worker could answer ({tried})"


def test_voters_that_refuse_the_ask_itself_are_left_out_and_it_is_the_asks_fault_only_when_all_do(toy_base: Path) -> None:
    embedded = [f"{{kind: embedded, model: {toy_base}, system: {s}, retries: 0}}" for s in ("one", "two")]
    picky = asking(node="a", options={"presence_penalty": 1})
    found = answer_to(graph_text({"a": embedded[0], "b": "B", "c": "B"}, node="{mode: vote, voters: {a: 0.9, b: 0.5, c: 0.4}}"), picky)
    assert found.text == "B" and "does not know the option 'presence_penalty'" in found.trace.steps[0].error
    with pytest.raises(QueryError, match="presence_penalty"):
        answer_to(graph_text({"a": embedded[0], "b": embedded[1]}, node="{mode: vote, voters: {a: 0.9, b: 0.5}}"), picky)


# ---------------------------------------------------------------- free texts and the judge


FREE_TEXTS = {"a": f"{FREE}, says a.", "b": f"{FREE}, says b.", "c": f"{FREE}, says c."}
JUDGED = "{{mode: vote, voters: {{a: 0.4, b: 0.6, c: 0.5}}{}}}"


def test_of_free_texts_the_most_competent_is_taken() -> None:
    found = answer_to(graph_text(FREE_TEXTS, node=JUDGED.format("")))
    assert found.text == FREE_TEXTS["b"] and found.trace.vote and found.trace.vote.winner == "b" and found.trace.vote.share == 0
    assert {v[1] for v in found.trace.vote.votes} == {None}


def test_a_voter_that_says_nothing_does_not_win_where_others_speak() -> None:
    found = answer_to(graph_text({"a": "", "b": FREE}, node="{mode: vote, voters: {a: 0.9, b: 0.3}}"))
    assert found.text == FREE and found.trace.vote and [v[0] for v in found.trace.vote.votes] == ["b"]


def test_a_judge_writes_one_answer_out_of_all_and_streams_it() -> None:
    async def work() -> None:
        text = graph_text({**FREE_TEXTS, "a": "x" * 5000, "wise": "this is best"}, node=JUDGED.format(", judge: wise"))
        async with Runtime.open(environment.read(), given=graphfile.loads(text)) as opened:
            told: list[str] = []
            turns = (Message("system", "be kind"), Message("user", "before"), Message("assistant", "indeed"), Message("user", "why {0}?"))
            deltas = [d async for d in opened.answer(Ask(turns, node="a"), answering=told.append)]
            assert [d.text for d in deltas] == ["this", " is", " best", ""] and set(told) == {"wise"}
            worker: Any = await opened.worker(opened.graph.nodes["wise"])
            [(*before, brief)] = worker.asked
            assert before == list(turns[:-1]) and brief.role == "user"
            parts = [brief.content.index(words) for words in ("Request:\nwhy {0}?", f"Answer 1:\n{FREE_TEXTS['b']}", f"Answer 2:\n{FREE_TEXTS['c']}",
                                                             "Answer 3:\n" + "x" * 4000 + "\n[... 1,000 more characters are left out]")]
            assert parts == sorted(parts) and "x" * 4001 not in brief.content
            trace = deltas[-1].trace
            assert trace and trace.vote and (trace.vote.judge, trace.vote.winner) == ("wise", "b")
            assert [s.node for s in trace.steps] == ["c", "a", "b", "wise"] and trace.to_json()["vote"]["judge"] == "wise"
            assert deltas[-1].usage == {kind: sum(s.usage[kind] for s in trace.steps) for kind in ("prompt_tokens", "completion_tokens")}

    asyncio.run(work())


@pytest.mark.parametrize("said", [BROKEN, ""])
def test_when_the_judge_fails_or_says_nothing_the_most_competent_answer_is_given(said: str) -> None:
    told: list[str] = []
    found = answer_to(graph_text({**FREE_TEXTS, "wise": said}, node=JUDGED.format(", judge: wise")), told=told)
    assert found.text == FREE_TEXTS["b"] and found.trace.vote and found.trace.vote.judge == "" and told[-1] == "b"
    assert [(s.node, s.error) for s in found.trace.steps] == [("c", ""), ("a", ""), ("wise", said[2:]), ("b", "")]


def test_a_judge_is_not_asked_where_a_vote_was_won_or_only_one_voter_answered() -> None:
    won = answer_to(graph_text({"a": "A", "b": "B", "c": FREE, "wise": "best"}, node=JUDGED.format(", judge: wise")))
    assert won.text == "B" and "wise" not in {s.node for s in won.trace.steps}
    alone = answer_to(graph_text({"a": FREE, "b": BROKEN, "c": BROKEN, "wise": "best"}, node=JUDGED.format(", judge: wise")))
    assert alone.text == FREE and "wise" not in {s.node for s in alone.trace.steps}


# ---------------------------------------------------------------- real servers


class Server:
    """An OpenAI-compatible server on loopback in this loop: sends `texts` as pieces, then hangs or breaks off."""

    def __init__(self, *texts: str, hang: bool = True) -> None:
        self.texts, self.hang = texts, hang
        self.asked, self.left = asyncio.Event(), asyncio.Event()
        self.worker = ""

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Server]:
        server = await asyncio.start_server(self._take, "127.0.0.1", 0)
        self.worker = f"{{kind: openai, model: m, retries: 0, urls: 'http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1'}}"
        try:
            yield self
        finally:
            server.close()
            await server.wait_closed()

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        found = re.search(rb"(?i)content-length: (\d+)", head)
        await reader.readexactly(int(found[1]) if found else 0)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n")
        for text in self.texts:
            writer.write(b"data: " + json.dumps({"choices": [{"delta": {"content": text}}]}).encode() + b"\n\n")
        await writer.drain()
        self.asked.set()
        if self.hang:
            with suppress(ConnectionError):
                await reader.read()  # until the other side is gone
            self.left.set()
        writer.close()


@pytest.mark.parametrize("texts", [(), ("half",)])
def test_leaving_a_vote_stops_every_voter(texts: Sequence[str]) -> None:
    async def work() -> None:
        async with AsyncExitStack() as stack:
            servers = [await stack.enter_async_context(Server(*texts).running()) for _ in range(3)]
            text = graph_text(dict(zip("abc", (s.worker for s in servers))), node="{mode: vote, voters: {a: 0.4, b: 0.5, c: 0.6}}")
            opened = await stack.enter_async_context(Runtime.open(environment.read(), given=graphfile.loads(text)))
            answering = asyncio.create_task(runtime.fold(opened.answer(asking(node="a"))))
            await asyncio.wait_for(asyncio.gather(*(s.asked.wait() for s in servers)), 30)
            answering.cancel()
            with pytest.raises(asyncio.CancelledError):
                await answering
            await asyncio.wait_for(asyncio.gather(*(s.left.wait() for s in servers)), 30)

    asyncio.run(work())


def test_a_voter_that_breaks_off_in_the_middle_is_left_out() -> None:
    async def work() -> None:
        async with Server("The answer", " is A", hang=False).running() as server:
            found = await ask_of(graph_text({"a": server.worker, "b": "B", "c": "C"}, node="{mode: vote, voters: {a: 0.9, b: 0.5, c: 0.4}}"), asking(node="a"))
            assert found.text == "B" and found.trace.steps[0].error and found.trace.steps[0].answer == "The answer is A"

    asyncio.run(work())


def test_a_judge_that_breaks_off_in_the_middle_is_an_error_for_what_was_seen_is_not_taken_back() -> None:
    async def work() -> None:
        async with Server("The best", hang=False).running() as server:
            with pytest.raises(WorkerError, match="'wise' failed in the middle of its answer"):
                await ask_of(graph_text({**FREE_TEXTS, "wise": server.worker}, node=JUDGED.format(", judge: wise")), asking(node="a"))

    asyncio.run(work())


# ---------------------------------------------------------------- doors


GATEWAY = "{mode: vote, voters: {math: 0.6, law: 0.5, health: 0.5}, judge: math}"


@pytest.fixture(scope="module")
def client(toy_master: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    text = with_votes(toy_master, GATEWAY).replace("'C'", "'The answer is B.'")
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setenv("LMGRAPH_THREADS", "1")
        address = stack.enter_context(serving(text, tmp_path_factory.mktemp("gateway")))
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as made:
            yield made


def test_the_official_client_gets_the_winners_answer_and_sees_the_vote(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(model="lmgraph", messages=say("sum sum"), extra_body={"lmgraph": {"trace": True}})
    answer = raw.parse()
    assert answer.choices[0].message.content == "B" and answer.model == "lmgraph/law" == f"lmgraph/{raw.headers['x-lmgraph-node']}"
    trace = (answer.model_extra or {})["lmgraph"]["trace"]
    assert [(v["node"], v["key"], v["weight"]) for v in trace["vote"]["votes"]] == [("math", "A", 1.5041), ("law", "B", 1.0986), ("health", "B", 1.0986)]
    assert {k: trace["vote"][k] for k in ("winner", "share", "judge")} == {"winner": "law", "share": 0.5936, "judge": ""}
    assert answer.usage and answer.usage.completion_tokens == 1 + 1 + 4 == sum(s["usage"]["completion_tokens"] for s in trace["steps"])


def test_a_vote_is_streamed_and_counted_for_each_voter(client: openai.OpenAI) -> None:
    def spent() -> list[float]:
        page = client.with_options(base_url=str(client.base_url).removesuffix("v1/")).get("metrics", cast_to=str)
        return [float(re.findall(rf'lmgraph_tokens_total\{{[^}}]*kind="completion"[^}}]*node="{n}"[^}}]*\}} (\S+)|$', page)[0] or 0) for n in ("math", "law", "health")]

    before = spent()
    chunks = list(client.chat.completions.create(model="lmgraph", messages=say("sum sum"), stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "B" and {c.model for c in chunks} == {"lmgraph/law"}
    assert chunks[-1].usage and chunks[-1].usage.completion_tokens == 6
    assert [b - a for a, b in zip(before, spent())] == [1, 1, 4]


def test_a_request_with_tools_is_answered_by_the_decided_node_alone(client: openai.OpenAI) -> None:
    tool: Any = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    answer = client.chat.completions.create(model="lmgraph/math", messages=say("sum sum"), tools=[tool], extra_body={"lmgraph": {"trace": True}})
    assert answer.choices[0].message.content == "A" and "vote" not in (answer.model_extra or {})["lmgraph"]["trace"]


def run_cli(*arguments: str) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(list(arguments))
    assert not caught.value.code


def test_ask_shows_a_line_for_each_voter_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "graph.yaml"
    path.write_text(graph_text({"a": "A", "b": "The answer is B.", "c": "B", "d": BROKEN}, node="{mode: vote, workers: 4, voters: {a: 0.6, b: 0.5, c: 0.5, d: 0.3}}"))
    run_cli("ask", "--graph", str(path), "--node", "a", "hello")
    out, err = capsys.readouterr()
    assert out == "The answer is B.\n"
    assert err.splitlines() == ["a  A  weight 1.50", "b  B  weight 1.10  won with 59%", "c  B  weight 1.10", "d failed: out of order"]
    path.write_text(graph_text({**FREE_TEXTS, "wise": "best"}, node=JUDGED.format(", judge: wise")))
    run_cli("ask", "--graph", str(path), "--node", "a", "hello")
    assert capsys.readouterr().err.splitlines() == ["b  free text  weight 1.50", "c  free text  weight 1.10", "a  free text  weight 0.69", "wise made one answer out of these"]
    run_cli("ask", "--graph", str(path), "--node", "a", "--json", "hello")
    assert json.loads(capsys.readouterr().out)["trace"]["vote"]["judge"] == "wise"


def test_show_tells_who_votes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    path = tmp_path / "graph.yaml"
    path.write_text(graph_text({"a": "A", "b": "B"}, "{mode: vote, workers: 4, judge: b}", "{mode: vote, voters: {a: 0.48, b: 0.4}}"))
    run_cli("graph", "show", "--graph", str(path))
    out = capsys.readouterr().out
    assert "vote of 4, judge b" in out and "vote of 3 among a 0.48, b 0.40" in out
    path.write_text(graph_text({"a": "A", "b": "B"}, "{mode: vote}", "{mode: single}"))
    run_cli("graph", "show", "--graph", str(path))
    assert "one answers" in capsys.readouterr().out
