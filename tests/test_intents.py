"""Public intent sets in their original layouts, made on the spot: plain and packed, names made into nodes, few examples, errors."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmgraph.errors import DataError
from lmgraph.evaluate import intents
from lmgraph.evaluate.intents import Intents
from lmgraph.train.examples import Example

TRAIN = [("Where is my card?", "card_arrival"), ('He said "wait, one week"\nWhy?', "card_arrival"), ("It came back", "reverted_card_payment?"),
         ("I lost it", "Lost or stolen")]
TEST = [("Is my card on its way?", "card_arrival"), ("The payment was undone", "reverted_card_payment?")]
OUTSIDE = [("What is the weather?", "oos")]


def write(path: Path, text: str, packed: bool = False) -> Path:
    path = path.with_name(f"{path.name}.gz") if packed else path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    return path


def table(rows: Sequence[Sequence[str]], head: Sequence[str] = ("text", "category")) -> str:
    out = io.StringIO()
    csv.writer(out).writerows([head, *rows])
    return out.getvalue()


def banking(folder: Path, train: str = table(TRAIN), test: str = table(TEST), packed: bool = False, prefix: str = "banking77_") -> Path:
    write(folder / f"{prefix}train.csv", train, packed)
    write(folder / f"{prefix}test.csv", test, packed)
    return folder


def clinc(folder: Path, packed: bool = False, name: str = "clinc150_data_full.json", **changes: Any) -> Path:
    data = {"train": TRAIN, "val": [], "test": TEST, "oos_test": OUTSIDE, "oos_train": [], "oos_val": []} | changes
    write(folder / name, json.dumps({key: value for key, value in data.items() if value is not None}), packed)
    return folder


def rows(found: Sequence[Example]) -> list[tuple[str, str]]:
    return [(e.query, e.node) for e in found]


# ---------------------------------------------------------------- layouts


@pytest.mark.parametrize("packed", [False, True])
def test_banking77_is_read_as_it_was_published(tmp_path: Path, packed: bool) -> None:
    found = intents.load("banking77", banking(tmp_path, packed=packed))
    assert found.name == "banking77" and found.outside == ()
    assert rows(found.train) == [("Where is my card?", "card_arrival"), ('He said "wait, one week"\nWhy?', "card_arrival"),
                                 ("It came back", "reverted_card_payment"), ("I lost it", "lost_or_stolen")]
    assert rows(found.test) == [("Is my card on its way?", "card_arrival"), ("The payment was undone", "reverted_card_payment")]
    assert found.nodes == ("card_arrival", "lost_or_stolen", "reverted_card_payment")


@pytest.mark.parametrize("packed", [False, True])
def test_clinc150_is_read_as_it_was_published_with_the_queries_of_no_intent(tmp_path: Path, packed: bool) -> None:
    found = intents.load("clinc150", clinc(tmp_path, packed=packed))
    assert found.name == "clinc150" and found.outside == ("What is the weather?",)
    assert rows(found.test) == [("Is my card on its way?", "card_arrival"), ("The payment was undone", "reverted_card_payment")]
    assert "oos" not in found.nodes and len(found.train) == 4


def test_the_names_under_which_the_sets_were_published_are_known_too(tmp_path: Path) -> None:
    banking(tmp_path / "b", prefix="")
    clinc(tmp_path / "c", name="data_full.json")
    assert len(intents.load("banking77", tmp_path / "b").train) == len(intents.load("clinc150", tmp_path / "c").train) == 4


def test_a_byte_order_mark_windows_lines_and_empty_lines_change_nothing(tmp_path: Path) -> None:
    plain = intents.load("banking77", banking(tmp_path / "plain"))
    text = "\ufeff" + table(TRAIN).replace("\r\n", "\n").replace("\n", "\r\n").replace("stolen\r\n", "stolen\r\n\r\n")
    assert rows(intents.load("banking77", banking(tmp_path / "other", text)).train) == [
        (query.replace("\n", "\r\n"), node) for query, node in rows(plain.train)]


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(blacklist_categories=("Cs",)), min_size=1, max_size=30).filter(lambda name: name.strip()))
def test_any_intent_becomes_a_name_that_a_node_may_have(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    data = {"train": [("a", name)], "test": [("b", name)]}
    (node,) = intents.load("clinc150", clinc(tmp_path_factory.mktemp("set"), **data)).nodes
    assert re.fullmatch(r"[a-z0-9_-]+", node)
    assert not re.fullmatch(r"[a-z0-9-]+", name) or node == name, "what is a name already stays"


# ---------------------------------------------------------------- few examples


def many(sizes: dict[str, int]) -> Intents:
    train = tuple(Example(f"{node} {i}", node) for i in range(max(sizes.values())) for node, size in sizes.items() if i < size)
    return Intents("made", train, train[:1])


def test_few_examples_are_as_many_for_each_node_and_all_where_it_has_fewer() -> None:
    found = many({"b": 20, "a": 9, "c": 3}).few(5)
    assert [e.node for e in found] == ["a"] * 5 + ["b"] * 5 + ["c"] * 3, "the nodes in order"
    assert {e.query for e in found if e.node == "c"} == {"c 0", "c 1", "c 2"}


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 12), min_size=1), st.integers(1, 15), st.integers(0, 5))
def test_no_example_is_drawn_twice_and_a_seed_repeats_itself(sizes: dict[str, int], shots: int, seed: int) -> None:
    made = many(sizes)
    found = made.few(shots, seed)
    assert Counter(e.node for e in found) == {node: min(size, shots) for node, size in sizes.items()}
    assert len({e.query for e in found}) == len(found) and set(found) <= set(made.train)
    assert made.few(shots, seed) == found


def test_another_seed_draws_other_examples_from_everywhere() -> None:
    made = many({"a": 40, "b": 40})
    drawn = [made.few(4, seed) for seed in range(60)]
    assert drawn[0] != drawn[1] and made.few(4) == drawn[0]
    assert {e.query for found in drawn for e in found} == {e.query for e in made.train}


# ---------------------------------------------------------------- errors

ONE = "text,category\nWhere?,card\n"


def test_a_set_that_nobody_knows_is_named_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no intent set 'atis'") as caught:
        intents.load("atis", tmp_path)
    assert "banking77, clinc150" in caught.value.hint


@pytest.mark.parametrize("name", intents.NAMES)
def test_a_folder_without_the_set_is_named_with_what_was_looked_for(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError) as caught:
        intents.load(name, tmp_path)
    wanted = {"banking77": "banking77_train.csv, train.csv", "clinc150": "clinc150_data_full.json, data_full.json"}[name]
    assert str(tmp_path) in caught.value.message and f"none of {wanted} (plain or .gz)" in caught.value.message and caught.value.hint


@pytest.mark.parametrize(("text", "complaint"), [
    ("", r"banking77_train\.csv:1: found columns none, expected text, category"),
    ("query,intent\nWhere?,card\n", r"banking77_train\.csv:1: found columns query, intent, expected text, category"),
    (ONE + "\nWhat?\n", r"banking77_train\.csv:4: found \"\['What\?'\]\", expected a query and its intent"),
    (ONE + "What?,card,late\n", r"banking77_train\.csv:3: found .*late"),
    (ONE + "   ,card\n", r"banking77_train\.csv:3: found"),
    (ONE + "What?,\n", r"banking77_train\.csv:3: found"),
    (ONE + '"two\nlines",card\nWhat?\n', r"banking77_train\.csv:5: found"),
    (ONE + f'"{"x" * 200_000}",card\n', r"banking77_train\.csv:3: not CSV \(field larger"),
])
def test_what_is_wrong_in_a_table_is_named_with_file_and_line(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(DataError, match=complaint) as caught:
        intents.load("banking77", banking(tmp_path, text))
    assert "banking77_train.csv and banking77_test.csv (text,category)" in caught.value.hint


def test_an_error_in_the_second_table_names_the_second_table(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"banking77_test\.csv:2: found"):
        intents.load("banking77", banking(tmp_path, test="text,category\nalone\n"))


@pytest.mark.parametrize(("changes", "complaint"), [
    ({"train": [*TRAIN, ["alone"]]}, r"clinc150_data_full\.json: train\[4\]: found \"\['alone'\]\", expected a query and its intent"),
    ({"test": [["a", "b"], "ab"]}, r"test\[1\]: found 'ab'"),
    ({"test": [["a", 3]]}, r"test\[0\]: found"),
    ({"oos_test": [[" ", "oos"]]}, r"oos_test\[0\]: found"),
    ({"oos_test": [None]}, r"oos_test\[0\]: found 'None'"),
    ({"test": None}, r"found train, val, oos_test, oos_train, oos_val, expected an object with lists train, test, oos_test"),
    ({"train": {"a": "b"}}, r"expected an object with lists train, test, oos_test"),
])
def test_what_is_wrong_in_json_is_named_with_its_place(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(DataError, match=complaint) as caught:
        intents.load("clinc150", clinc(tmp_path, **changes))
    assert caught.value.message.startswith("clinc150_data_full.json") and "CLINC150's data_full.json" in caught.value.hint


@pytest.mark.parametrize(("data", "complaint"), [
    (b"{", r"data_full\.json: not JSON \(Expecting property name"),
    (b"[" * 100_000, r"data_full\.json: not JSON \("),
    (b"[1]", r"data_full\.json: found list, expected an object"),
    (b"\xff\xfe", r"data_full\.json cannot be read: 'utf-8' codec"),
])
def test_a_file_that_is_not_what_it_should_be_is_named(tmp_path: Path, data: bytes, complaint: str) -> None:
    (tmp_path / "data_full.json").write_bytes(data)
    with pytest.raises(DataError, match=complaint):
        intents.load("clinc150", tmp_path)


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: b"not packed", lambda data: data[:30] + b"\0\0\0\0" + data[34:]])
def test_a_damaged_archive_is_named(tmp_path: Path, damage: Any) -> None:
    banking(tmp_path, packed=True)
    path = tmp_path / "banking77_test.csv.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"banking77_test\.csv\.gz cannot be read: "):
        intents.load("banking77", tmp_path)


@pytest.mark.parametrize(("train", "test", "complaint"), [
    ("text,category\n", ONE, "banking77 has 0 training and 1 test queries"),
    (ONE, "text,category\n", "banking77 has 1 training and 0 test queries"),
    (ONE, ONE + "a,zebra\nb,yak\n", "test queries of intents without training queries: yak, zebra"),
])
def test_a_set_that_cannot_be_learnt_or_tested_is_refused(tmp_path: Path, train: str, test: str, complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        intents.load("banking77", banking(tmp_path, train, test))
