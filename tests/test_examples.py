"""Training examples: files to examples, a split that never moves, and the ids that a master learns."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmgraph import prompts, tokens
from lmgraph.errors import DataError, VocabularyMismatch
from lmgraph.tokens import Vocabulary
from lmgraph.train import examples
from lmgraph.train.examples import Example

FIRST, END = 3_000_000, 3_000_099
WORDS = Vocabulary(FIRST, 8, END, {"math": 4, "law": 0})
OCTOPUS = Vocabulary(FIRST, 8, END, {"math": 4}, "octopus-v4")
SPECIAL = 2_000_000
EXAMPLES = st.lists(st.builds(Example, st.text(min_size=1), st.sampled_from(["math", "law"])), max_size=30)


def spell(text: str, special: bool) -> list[int]:
    """A toy tokenizer: one id a character; those of special text can be told apart."""
    return [ord(c) + (SPECIAL if special else 0) for c in text]


def write(folder: Path, *rows: Any, name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return path


def test_rows_become_examples_with_their_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, {"query": "q", "node": "math"},
                 {"query": "é", "node": "law", "rewrite": "r", "lang": "fr", "style": "casual", "subject": "s", "more": 1})
    assert examples.load([path]) == [Example("q", "math"), Example("é", "law", "r", "fr", "casual", "s")]


def test_a_question_counts_as_a_query(tmp_path: Path) -> None:
    assert examples.load([write(tmp_path, {"question": "q", "node": "math"})]) == [Example("q", "math")]


def test_nothing_given_is_the_default(tmp_path: Path) -> None:
    path = write(tmp_path, {"query": "q", "node": "math", "rewrite": None, "lang": None, "style": "", "subject": None})
    assert examples.load([path]) == [Example("q", "math")]


def test_blank_lines_are_passed_over_and_counted(tmp_path: Path) -> None:
    path = write(tmp_path, {"query": "q", "node": "math"}, "", "   ", {"query": "q"})
    with pytest.raises(DataError, match=r"data\.jsonl:4"):
        examples.load([path])


def test_files_are_read_in_the_order_given(tmp_path: Path) -> None:
    one, two = write(tmp_path, {"query": "1", "node": "a"}), write(tmp_path, {"query": "2", "node": "a"}, name="two.jsonl")
    assert [e.query for e in examples.load([two, one])] == ["2", "1"]


def test_a_compressed_file_is_read_like_any_other(tmp_path: Path) -> None:
    plain = write(tmp_path, {"query": "日本", "node": "math"}, {"query": "b", "node": "law"})
    packed = tmp_path / "data.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert examples.load([packed]) == examples.load([plain])


def test_an_error_in_a_compressed_file_names_its_line(tmp_path: Path) -> None:
    packed = tmp_path / "data.jsonl.gz"
    packed.write_bytes(gzip.compress(b'{"query": "a", "node": "b"}\nnonsense\n'))
    with pytest.raises(DataError, match=r"data\.jsonl\.gz:2: not JSON"):
        examples.load([packed])


@pytest.mark.parametrize(("row", "words"), [
    ("{", "not JSON"), ("[" * 100_000, "not JSON"), ('{"query": ' + "9" * 5000 + "}", "not JSON"),
    ("[1]", "found list, expected an object"),
    ("null", "found NoneType"), ('"text"', "found str"), ({}, r"found keys \[\]"), ({"query": "q"}, r"found keys \['query'\]"),
    ({"node": "n"}, "non-empty"), ({"query": "", "node": "n"}, "non-empty"), ({"query": " \n", "node": "n"}, "non-empty"),
    ({"query": 5, "node": "n"}, "non-empty"), ({"query": "q", "node": ""}, "non-empty"), ({"query": "q", "node": 4}, "non-empty"),
    ({"query": "q", "node": "n", "rewrite": 5}, "are strings"), ({"query": "q", "node": "n", "style": ["x"]}, "are strings"),
    ({"query": "q", "node": "n", "subject": {"a": 1}}, "are strings"), ('{"query": "\\ud800", "node": "n"}', "surrogate"),
], ids=range(18))
def test_a_row_that_cannot_be_used_is_named_with_file_and_line(tmp_path: Path, row: Any, words: str) -> None:
    path = write(tmp_path, {"query": "fine", "node": "math"}, row)
    with pytest.raises(DataError, match=rf"(?s)^data\.jsonl:2: .*{words}"):
        examples.load([path])


def test_a_file_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.jsonl does not exist"):
        examples.load([tmp_path / "absent.jsonl"])


@pytest.mark.parametrize("data", [b"", b"\n\n"])
def test_files_without_examples_are_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_bytes(data)
    with pytest.raises(DataError, match="No examples found"):
        examples.load([path])


PACKED = gzip.compress(b'{"query": "q", "node": "n"}\n')


@pytest.mark.parametrize(("name", "data"), [
    ("latin.jsonl", '{"query": "é", "node": "n"}'.encode("latin-1")), ("plain.jsonl.gz", b'{"query": "q", "node": "n"}'),
    ("cut.jsonl.gz", PACKED[:-12]), ("spoilt.jsonl.gz", PACKED[:12] + b"\xff" * 8 + PACKED[20:]),
])
def test_bytes_that_cannot_be_read_are_a_data_error_that_names_the_file(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=f"^{name}:1: "):
        examples.load([tmp_path / name])


def test_a_folder_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        examples.load([tmp_path])


@given(EXAMPLES, st.integers(0, 100), st.randoms())
@settings(max_examples=50, deadline=None)
def test_the_split_does_not_move_when_examples_are_reordered_or_left_out(rows: list[Example], percent: int, random: Any) -> None:
    train, kept = examples.split(rows, percent)
    assert [e for e in rows if e in train] == train
    assert len(train) + len(kept) == len(rows)
    other = random.sample(rows, random.randint(0, len(rows)))
    train_again, kept_again = examples.split(other, percent)
    assert set(train_again) <= set(train)
    assert set(kept_again) <= set(kept)


@given(EXAMPLES)
@settings(max_examples=30, deadline=None)
def test_the_same_query_is_on_one_side_whatever_its_label(rows: list[Example]) -> None:
    train, kept = examples.split(rows, 50)
    assert not {e.query for e in train} & {e.query for e in kept}


def test_the_ends_of_the_percentage_keep_nothing_and_everything() -> None:
    rows = [Example(str(i), "math") for i in range(50)]
    assert examples.split(rows, 0) == (rows, [])
    assert examples.split(rows, 100) == ([], rows)


def test_about_as_many_are_kept_aside_as_asked_for_and_more_percent_only_add() -> None:
    rows = [Example(f"question {i}", "math") for i in range(2000)]
    ten, twenty = examples.split(rows, 10)[1], examples.split(rows, 20)[1]
    assert 140 <= len(ten) <= 260
    assert set(ten) < set(twenty)


def test_the_start_is_the_functional_token_and_all_before_it_is_prompt() -> None:
    encoded = examples.encode(Example("two?", "math", "2?"), WORDS, spell, 100)
    template = prompts.TEMPLATES["lmgraph"]
    assert encoded.ids[:encoded.start] == spell(template.head, True) + spell("two?", False) + spell(template.tail, True)
    assert encoded.ids[encoded.start:] == [FIRST + 4, *spell("2?", False), END]


def test_without_a_rewrite_only_the_choice_is_taught() -> None:
    encoded = examples.encode(Example("two?", "law"), WORDS, spell, 100)
    assert encoded.ids[encoded.start:] == [FIRST]


def test_an_octopus_example_is_quoted() -> None:
    encoded = examples.encode(Example("two?", "math", "it's 2?"), OCTOPUS, spell, 100)
    assert encoded.ids[encoded.start:] == [FIRST + 4, *spell("('it's 2?')", False), END]
    assert encoded.ids[:encoded.start][-1] >= SPECIAL


def test_a_node_without_a_token_is_refused() -> None:
    with pytest.raises(VocabularyMismatch, match="'art'"):
        examples.encode(Example("q", "art"), WORDS, spell, 100)


@given(st.text(min_size=1, max_size=40), st.text(max_size=10), st.integers(0, 50), st.sampled_from([WORDS, OCTOPUS]))
@settings(max_examples=50, deadline=None)
def test_a_query_is_shortened_as_in_serving_and_the_start_moves_with_it(query: str, rewrite: str, limit: int, words: Vocabulary) -> None:
    encoded = examples.encode(Example(query, "math", rewrite), words, spell, limit)
    head, body, tail = prompts.render(query, words.dialect)
    shown, _ = prompts.shorten(spell(body.text, body.special), limit)
    assert encoded.ids[:encoded.start] == spell(head.text, True) + shown + spell(tail.text, True)
    assert encoded.ids[encoded.start] == words.id_of("math")
    parsed = tokens.parse(words, encoded.ids[encoded.start:])
    assert (parsed.token, parsed.calls, parsed.finished) == (4, 1, bool(rewrite))


@pytest.mark.parametrize("text", ["<fn_4>", "<|im_end|>", "<nexa_end>"])
def test_special_words_of_a_user_are_encoded_as_plain_text(text: str) -> None:
    encoded = examples.encode(Example(text, "math", text), WORDS, spell, 100)
    plain = [i for i in encoded.ids if i < SPECIAL]
    assert plain == spell(text, False) * 2
