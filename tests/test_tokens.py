"""Vocabulary and parser: node <-> functional token <-> id, in both dialects, from any stream of ids."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmgraph import tokens
from lmgraph.errors import VocabularyMismatch
from lmgraph.tokens import Parsed, Parser, Vocabulary, encode, parse, quote, unquote

FIRST, SIZE, END = 1000, 8, 1020
WORDS = Vocabulary(FIRST, SIZE, END, {"math": 4, "law": 0, "general": 7})


@st.composite
def vocabularies(draw: st.DrawFn) -> Vocabulary:
    size = draw(st.integers(1, 20))
    first = draw(st.integers(0, 50_000))
    names = draw(st.lists(st.text(max_size=8), max_size=size, unique=True))
    numbers = draw(st.permutations(range(size)))
    return Vocabulary(first, size, first + size + draw(st.integers(0, 9)), dict(zip(names, numbers)),
                      draw(st.sampled_from(tokens.DIALECTS)), draw(st.floats(0.01, 100) | st.integers(1, 5)), draw(st.text(max_size=8)))


def test_a_decision_is_token_then_text_then_end() -> None:
    assert encode(WORDS, "math", [5, 6]) == [FIRST + 4, 5, 6, END]


def test_a_decision_is_read_back_as_it_was_written() -> None:
    assert parse(WORDS, encode(WORDS, "law", [5, 6])) == Parsed(0, (5, 6), True, 1)


def test_a_node_that_was_not_trained_names_the_known_ones_and_the_command() -> None:
    with pytest.raises(VocabularyMismatch, match="no functional token for node 'art'; it knows: math, law, general") as caught:
        encode(WORDS, "art", [])
    assert "lmgraph train heads" in caught.value.hint


def test_tokens_are_written_as_the_dialect_writes_them() -> None:
    octopus = Vocabulary(FIRST, SIZE, END, dialect="octopus-v4")
    assert (WORDS.name(4), WORDS.end_name) == ("<fn_4>", "<fn_end>")
    assert (octopus.name(4), octopus.end_name) == ("<nexa_4>", "<nexa_end>")


def test_only_the_reserved_rows_are_functional() -> None:
    functional = [i for i in range(FIRST - 3, END + 3) if WORDS.is_functional(i)]
    assert functional == list(range(FIRST, FIRST + SIZE))


def test_an_id_belongs_to_a_node_or_to_none() -> None:
    assert WORDS.node_of(FIRST + 4) == "math"
    for other in (FIRST + 1, FIRST - 1, FIRST + SIZE, END, -1):
        assert WORDS.node_of(other) is None


def test_the_lowest_unused_token_is_the_spare_one() -> None:
    assert WORDS.spare() == 1
    assert Vocabulary(0, 2, 2, {"a": 1}).spare() == 0
    assert Vocabulary(0, 2, 2, {"a": 1, "b": 0}).spare() is None


@given(vocabularies())
@settings(max_examples=50, deadline=None)
def test_every_node_is_found_again_by_its_id(vocabulary: Vocabulary) -> None:
    for name in vocabulary.nodes:
        assert vocabulary.node_of(vocabulary.id_of(name)) == name
        assert vocabulary.is_functional(vocabulary.id_of(name))


@given(vocabularies(), st.data())
@settings(max_examples=50, deadline=None)
def test_any_stream_of_ids_is_read_without_an_error(vocabulary: Vocabulary, data: st.DataObject) -> None:
    near = st.integers(vocabulary.first_id - 3, vocabulary.end_id + 3)
    ids = data.draw(st.lists(near | st.integers(), max_size=40))
    parsed = parse(vocabulary, ids)
    functional = [i for i in (ids[:ids.index(vocabulary.end_id)] if vocabulary.end_id in ids else ids) if vocabulary.is_functional(i)]
    assert parsed.finished == (vocabulary.end_id in ids)
    assert parsed.calls == len(functional)
    assert parsed.token == (functional[0] - vocabulary.first_id if functional else None)
    assert not any(vocabulary.is_functional(i) or i == vocabulary.end_id for i in parsed.text_ids)


@given(st.lists(st.integers(FIRST - 2, END + 2), max_size=20))
@settings(max_examples=50, deadline=None)
def test_what_was_read_so_far_is_what_the_piece_would_give(ids: list[int]) -> None:
    parser = Parser(WORDS)
    for i, token_id in enumerate(ids, 1):
        parser.feed(token_id)
        assert parser.parsed == parse(WORDS, ids[:i])


def test_of_several_calls_the_first_one_counts() -> None:
    assert parse(WORDS, [FIRST + 4, 5, FIRST, 6, FIRST + 4, 7, END]) == Parsed(4, (5,), True, 3)


def test_the_same_token_again_is_another_call() -> None:
    assert parse(WORDS, [FIRST + 4, FIRST + 4, 5]) == Parsed(4, (), False, 2)


def test_a_decision_that_is_cut_off_is_not_finished() -> None:
    assert parse(WORDS, [FIRST + 4, 5, 6]) == Parsed(4, (5, 6), False, 1)


def test_nothing_read_is_no_decision() -> None:
    assert parse(WORDS, []) == Parsed(None, (), False, 0)


def test_an_end_before_anything_is_finished_without_a_token() -> None:
    assert parse(WORDS, [END, FIRST + 4, 5]) == Parsed(None, (), True, 0)


def test_text_before_the_token_is_no_part_of_the_query() -> None:
    assert parse(WORDS, [1, 2, FIRST, 3, END]) == Parsed(0, (3,), True, 1)


def test_a_spare_token_is_read_and_belongs_to_no_node() -> None:
    parsed = parse(WORDS, [FIRST + 2, 5, END])
    assert parsed == Parsed(2, (5,), True, 1)
    assert WORDS.node_of(FIRST + 2) is None


def test_feeding_says_when_to_stop_and_then_takes_nothing_more() -> None:
    parser = Parser(WORDS)
    assert [parser.feed(i) for i in (FIRST, 5, END, 6, FIRST)] == [True, True, False, False, False]
    assert parser.parsed == Parsed(0, (5,), True, 1)


@pytest.mark.parametrize(("written", "read"), [
    ("('What is 2 + 2?')", "What is 2 + 2?"),
    ("('What's Newton's law?')", "What's Newton's law?"),
    ("('the students' books')", "the students' books"),
    ("('say \"hello\" twice')", 'say "hello" twice'),
    ('("double quoted")', "double quoted"),
    ("(\"what's this\")", "what's this"),
    (" ('a blank before')", "a blank before"),
    ("('a newline before the end')\n", "a newline before the end"),
    ("('a newline inside'\n)", "a newline inside"),
    ("( 'blanks inside' )", "blanks inside"),
    ("('two\nlines')", "two\nlines"),
    ("('f(x) = (x + 1)')", "f(x) = (x + 1)"),
    ("('sin(x)')", "sin(x)"),
    ("('(a)')", "(a)"),
    ("('a trailing comma',)", "a trailing comma"),
    ("('a, 'quoted', comma')", "a, 'quoted', comma"),
    ("('it was cut", "it was cut"),
    ("('it was cut after sin(x)", "it was cut after sin(x)"),
    ("('it was cut after \"this\"", 'it was cut after "this"'),
    ("('only the bracket was cut'", "only the bracket was cut"),
    ("(no quotes)", "no quotes"),
    ("no wrapping", "no wrapping"),
    ("it's f(x)", "it's f(x)"),
    ("('')", ""), ("('", ""), ("(", ""), ("()", ""), ("", ""), ("  \n", ""), ("')", "')"),
])
def test_an_octopus_call_loses_its_wrapping_and_nothing_else(written: str, read: str) -> None:
    assert unquote("octopus-v4", written) == read


def test_the_dialects_quote_as_their_models_were_trained() -> None:
    assert quote("lmgraph", "a 'b'") == "a 'b'"
    assert quote("octopus-v4", "a 'b'") == "('a 'b'')"


def test_plain_text_that_looks_like_a_call_stays_in_the_plain_dialect() -> None:
    assert unquote("lmgraph", " ('a')\n") == "('a')"


@given(st.sampled_from(tokens.DIALECTS), st.text() | st.text(alphabet="'\"(), \na"))
@settings(max_examples=100, deadline=None)
def test_a_quoted_text_is_read_back_without_its_outer_blanks(dialect: str, text: str) -> None:
    assert unquote(dialect, quote(dialect, text.strip())) == text.strip()


@given(st.text() | st.text(alphabet="'\"(), \na"))
@settings(max_examples=100, deadline=None)
def test_unquoting_any_text_takes_away_and_adds_nothing(text: str) -> None:
    assert unquote("octopus-v4", text) in text


@given(vocabularies())
@settings(max_examples=50, deadline=None)
def test_a_vocabulary_comes_back_from_json_with_the_same_digest(vocabulary: Vocabulary) -> None:
    again = Vocabulary.from_json(json.loads(json.dumps(vocabulary.to_json())))
    assert again == vocabulary
    assert again.digest == vocabulary.digest


def test_keys_of_a_later_version_are_ignored_and_defaults_filled_in() -> None:
    data: dict[str, Any] = {"first_id": 10, "size": 2, "end_id": 20, "nodes": {"a": 1}, "colour": "red"}
    assert Vocabulary.from_json(data) == Vocabulary(10, 2, 20, {"a": 1}, "lmgraph", 1.0, "")


@pytest.mark.parametrize("other", [
    WORDS.with_node("math", 5), WORDS.with_node("art", 1), Vocabulary(FIRST, SIZE, END, {"math": 0, "law": 4, "general": 7}),
    Vocabulary(FIRST + 1, SIZE, END, WORDS.nodes), Vocabulary(FIRST, SIZE + 1, END, WORDS.nodes),
    Vocabulary(FIRST, SIZE, END + 1, WORDS.nodes),
    Vocabulary(FIRST, SIZE, END, WORDS.nodes, "octopus-v4"), Vocabulary(FIRST, SIZE, END, WORDS.nodes, temperature=2.0),
    Vocabulary(FIRST, SIZE, END, WORDS.nodes, base="ab"),
], ids=["re-pointed", "one more", "swapped", "first id", "size", "end id", "dialect", "temperature", "base"])
def test_the_digest_changes_with_whatever_gives_ids_their_meaning(other: Vocabulary) -> None:
    assert other.digest != WORDS.digest


def test_the_digest_does_not_depend_on_the_order_of_nodes() -> None:
    assert Vocabulary(FIRST, SIZE, END, dict(reversed(WORDS.nodes.items()))).digest == WORDS.digest


def test_a_node_is_added_or_re_pointed_without_touching_the_original() -> None:
    assert WORDS.with_node("math", 5).id_of("math") == FIRST + 5
    assert WORDS.with_node("art", 1).nodes == {"math": 4, "law": 0, "general": 7, "art": 1}
    assert WORDS.id_of("math") == FIRST + 4
    with pytest.raises(VocabularyMismatch, match="share"):
        WORDS.with_node("art", 4)


GOOD: dict[str, Any] = {"first_id": 10, "size": 4, "end_id": 20, "nodes": {"a": 1}}


@pytest.mark.parametrize("missing", GOOD)
def test_a_vocabulary_file_without_a_needed_key_is_refused(missing: str) -> None:
    with pytest.raises(VocabularyMismatch, match=missing):
        Vocabulary.from_json({key: value for key, value in GOOD.items() if key != missing})


@pytest.mark.parametrize("change", [
    {"first_id": "ten"}, {"first_id": "10"}, {"first_id": None}, {"first_id": 10.5}, {"first_id": True}, {"size": [4]},
    {"size": float("inf")}, {"end_id": float("nan")}, {"nodes": "a"}, {"nodes": None}, {"nodes": 5}, {"nodes": {"a": "one"}},
    {"nodes": {"a": 1.5}}, {"temperature": "warm"}, {"temperature": None}, {"temperature": 10**400},
], ids=str)
def test_a_vocabulary_file_with_a_wrong_type_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(VocabularyMismatch, match=r"vocabulary\.json cannot be read") as caught:
        Vocabulary.from_json({**GOOD, **change})
    assert caught.value.hint.startswith("Expected: ")


@pytest.mark.parametrize(("change", "words"), [
    ({"size": 0}, "size >= 1"), ({"first_id": -1}, "first_id >= 0"), ({"temperature": 0}, "temperature > 0"),
    ({"temperature": -1.0}, "temperature > 0"), ({"temperature": float("nan")}, "temperature > 0"),
    ({"temperature": float("inf")}, "temperature > 0"), ({"end_id": 13}, "lies among the functional tokens"),
    ({"nodes": {"a": 4}}, "outside 0..3"), ({"nodes": {"a": -1}}, "outside 0..3"), ({"nodes": {"a": 1, "b": 1}}, "share"),
    ({"dialect": "klingon"}, "known: lmgraph, octopus-v4"),
], ids=str)
def test_a_vocabulary_that_contradicts_itself_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(VocabularyMismatch, match=words):
        Vocabulary.from_json({**GOOD, **change})


@pytest.mark.parametrize("data", [[], None, 5, "text"])
def test_a_vocabulary_file_that_is_no_object_is_refused(data: Any) -> None:
    with pytest.raises(VocabularyMismatch):
        Vocabulary.from_json(data)
