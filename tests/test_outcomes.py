"""Recorded answers: every layout made on the spot, what is wrong with a file named by line, and JSON Lines and CSV saying the same."""

from __future__ import annotations

import csv
import gzip
import io
import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmgraph.errors import DataError
from lmgraph.evaluate import outcomes
from lmgraph.evaluate.outcomes import Model, Table, load

NAN = float("nan")


def write(folder: Path, text: str, name: str = "table.jsonl") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def jsonl(*rows: Any) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def sheet(*rows: list[str]) -> str:
    out = io.StringIO()
    csv.writer(out, quoting=csv.QUOTE_ALL).writerows(rows)
    return out.getvalue()


def same(one: Table, other: Table) -> bool:
    fields = ("ids", "queries", "categories", "options", "models", "letters", "truth")
    return all(getattr(one, f) == getattr(other, f) for f in fields) and np.array_equal(one.right, other.right, equal_nan=True)


def names(table: Table) -> list[str]:
    return [model.name for model in table.models]


MMLU_PRO = [
    {"id": 70, "category": "business", "source": "s", "question": "Two?", "options": ["1", "2", "3"], "answer": "B",
     "predictions": {"small": "B", "large": None}},
    {"id": 71, "category": "law", "source": "s", "question": "Three?\nYes?", "options": ["x", "y"], "answer": "A",
     "predictions": {"large": "A", "small": "J"}},
]
BENCH = ["sample_id", "prompt", "eval_name", "a/b", "a/b|model_response", "a/b|total_cost", "c", "c|model_response", "c|total_cost",
         "oracle_model_to_route_to"]


# ---------------------------------------------------------------- layouts


def test_mmlu_pro_becomes_a_table_with_the_questions_as_a_user_would_send_them(tmp_path: Path) -> None:
    table = load(write(tmp_path, jsonl(*MMLU_PRO)))
    assert table.ids == ("70", "71") and table.categories == ("business", "law")
    assert table.queries == ("Two?\nA. 1\nB. 2\nC. 3", "Three?\nYes?\nA. x\nB. y")
    assert table.options == (3, 2) and table.truth == ("B", "A")
    assert names(table) == ["small", "large"]
    assert table.letters == (("B", ""), ("J", "A"))


def test_in_mmlu_pro_an_answer_without_a_letter_is_a_wrong_one(tmp_path: Path) -> None:
    table = load(write(tmp_path, jsonl(*MMLU_PRO)))
    assert table.right.tolist() == [[1.0, 0.0], [0.0, 1.0]] and table.right.dtype == np.float64


def test_json_lines_of_ones_own_hold_scores_truths_and_letters(tmp_path: Path) -> None:
    table = load(write(tmp_path, jsonl(
        {"id": "q1", "query": "one", "category": "math", "answer": "b", "options": 4, "outcomes": {"x": "b", "y": "C", "z": 0.25}},
        {"id": 2, "query": "two", "outcomes": {"x": 1, "y": False, "z": None}},
        {"outcomes": {"y": True}},
    )))
    assert table.ids == ("q1", "2", "3") and table.queries == ("one", "two", "") and table.categories == ("math", "", "")
    assert table.options == (4, 0, 0) and table.truth == ("B", "", "")
    assert np.array_equal(table.right, [[1, 0, 0.25], [1, 0, NAN], [NAN, 1, NAN]], equal_nan=True)
    assert table.letters == (("B", "C", ""), ("", "", ""), ("", "", ""))


def test_options_written_out_stand_below_the_query(tmp_path: Path) -> None:
    table = load(write(tmp_path, jsonl({"query": "which", "options": ["this", "that"], "answer": "A", "outcomes": {"x": "A"}})))
    assert table.queries == ("which\nA. this\nB. that",) and table.options == (2,)


def test_csv_of_ones_own_holds_the_same(tmp_path: Path) -> None:
    text = sheet(["id", "query", "category", "answer", "options", "model:x", "model:y z"],
                 ["q1", "line one\nline two", "math", "b", "4", "b", "C"], ["q2", "two", "", "", "", "0.5", ""], ["q3", "", "law", "42", "", "TRUE", "0"])
    table = load(write(tmp_path, text, "table.csv"))
    assert names(table) == ["x", "y z"] and table.queries[0] == "line one\nline two"
    assert np.array_equal(table.right, [[1, 0], [0.5, NAN], [1, 0]], equal_nan=True)
    assert table.letters == (("B", "C"), ("", ""), ("", "")) and table.truth == ("B", "", "42")


def test_a_table_of_scores_alone_has_no_letters(tmp_path: Path) -> None:
    assert load(write(tmp_path, "model:x\n1\n", "a.csv")).letters is None


def routerbench() -> list[list[Any]]:
    return [["arc.1", "['Question one', 'and two']", "arc", 1.0, "A", 0.002, 0.0, "B", 0.0004, "a/b"],
            ["arc.2", "plain prompt", "arc", 0.25, "C", 0.004, 1.0, "D", 0.0006, "c"]]


@pytest.mark.parametrize("layout", ["csv", "jsonl"])
def test_an_export_of_routerbench_is_read_with_scores_and_costs(tmp_path: Path, layout: str) -> None:
    rows = routerbench()
    text = sheet(BENCH, *([str(c) for c in row] for row in rows)) if layout == "csv" else jsonl(*(dict(zip(BENCH, row)) for row in rows))
    table = load(write(tmp_path, text, f"bench.{layout}"))
    assert table.ids == ("arc.1", "arc.2") and table.categories == ("arc", "arc")
    assert table.queries == ("Question one\n\nand two", "plain prompt")
    assert names(table) == ["a/b", "c"] and table.right.tolist() == [[1, 0], [0.25, 1]]
    assert [model.cost for model in table.models] == [pytest.approx(3.0), pytest.approx(0.5)], "mean cost of an answer, times 1,000"
    assert table.letters is None and table.truth == ("", "")


def test_a_name_that_only_looks_like_a_pickles_is_none(tmp_path: Path) -> None:
    assert names(load(write(tmp_path, "model:x\n1\n", "x.pkl.csv"))) == ["x"]


def test_one_model_in_two_columns_is_told_however_they_are_spaced(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="column 'model:a' is there twice"):
        load(write(tmp_path, "model:a,model: a\n1,0\n", "x.csv"))


def test_a_prompt_that_is_no_literal_is_taken_as_text(tmp_path: Path) -> None:
    row = routerbench()[0]
    rows = [dict(zip(BENCH, [row[0], "[{[1]: 2}]", *row[2:]]))]
    assert load(write(tmp_path, jsonl(*rows), "b.jsonl")).queries == ("[{[1]: 2}]",)


@pytest.mark.parametrize("name", ["routerbench_0shot.pkl", "data.pickle", "data.pkl.gz", "renamed.csv"])
def test_a_pickle_is_refused_without_being_opened(tmp_path: Path, name: str) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    data = pickle.dumps(Trap())
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    with pytest.raises(DataError, match="runs whatever code") as caught:
        load(tmp_path / name)
    assert "read_pickle" in caught.value.hint and ".to_csv(" in caught.value.hint and name in caught.value.hint
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("name", "text"), [("a.jsonl", jsonl({"outcomes": {"x": 1}})), ("a.csv", "model:x\n1\n")])
def test_a_compressed_file_is_read_like_any_other_whatever_its_name(tmp_path: Path, name: str, text: str) -> None:
    plain = load(write(tmp_path, text, name))
    for packed in (tmp_path / f"{name}.gz", tmp_path / "noname"):
        packed.write_bytes(gzip.compress(text.encode()))
        assert same(load(packed), plain)


def test_a_byte_order_mark_and_blank_lines_change_nothing(tmp_path: Path) -> None:
    plain = load(write(tmp_path, "id,model:x\na,1\nb,0\n", "a.csv"))
    assert same(load(write(tmp_path, "\ufeffid,model:x\r\n\r\na,1\r\nb,0\r\n,\r\n", "b.csv")), plain)
    assert same(load(write(tmp_path, "\ufeff\n" + jsonl({"id": "a", "outcomes": {"x": 1}}, "", {"id": "b", "outcomes": {"x": 0}}))), plain)


# ---------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(("row", "words"), [
    ("{", "not JSON"), ("[" * 100_000, "not JSON"), ("[1]", "expected an object"), ("5", "found 5, expected an object"),
    ('{"outcomes": {"x": 1}, "query": "\\ud800"}', "surrogate"), ({"query": "q"}, "needs 'outcomes'"), ({"outcomes": [1]}, r"found \[1\]"),
    ({"outcomes": {"x": 2}}, "x: found 2, expected 0 to 1"), ({"outcomes": {"x": -0.5}}, "found -0.5"), ({"outcomes": {"x": "Paris"}}, "found 'Paris'"),
    ('{"outcomes": {"x": NaN}}', "found nan"), ({"outcomes": {"x": [1]}}, r"x: found \[1\]"), ({"outcomes": {"x": "1e999"}}, "found '1e999'"),
    ({"outcomes": {"x": "A"}}, "answer: found '', expected a letter, for x"), ({"outcomes": {"x": "A"}, "answer": "Paris"}, "answer: found 'Paris'"),
    ({"outcomes": {"x": 1}, "query": 5.5}, "query: found 5.5, expected text"), ({"outcomes": {"x": 1}, "category": ["a"]}, "category: found"),
    ({"outcomes": {"x": 1}, "options": 27}, "options: found 27"), ({"outcomes": {"x": 1}, "options": True}, "options: found True"),
    ({"outcomes": {"x": 1}, "options": "many"}, "options: found 'many'"), ({"outcomes": {"x": 1}, "options": [1, 2]}, "options: found"),
    ({"outcomes": {"x": "A"}, "answer": "D", "options": 3}, "answer: found D, the last of 3 options is C"),
    ({"outcomes": {"two\nlines": 1}}, "as a model's name"), ({"outcomes": {" ": 1}}, "as a model's name"),
    ({"outcomes": {"x": 1}, "id": "first"}, "id 'first' stands already in line 1"),
], ids=range(25))
def test_a_row_that_cannot_be_used_is_named_with_file_and_line(tmp_path: Path, row: Any, words: str) -> None:
    path = write(tmp_path, jsonl({"id": "first", "outcomes": {"x": 1}}, "", row))
    with pytest.raises(DataError, match=rf"(?s)^table\.jsonl:3: .*{words}"):
        load(path)


@pytest.mark.parametrize(("text", "words"), [
    ("id,query\n1,q\n", r":1: found the columns 'id', 'query'; expected one column model:NAME"),
    ("id;model:x\n1;1\n", ":1: found cells parted by ';', expected commas"),
    ("model:x,catgory\n1,a\n", r":1: unknown column 'catgory'; valid: id, query, category, answer, options, and model:NAME"),
    ("model:x,model:x\n1,1\n", r":1: column 'model:x' is there twice"), ("id,model:x\n1,1\n2\n", ":3: found 1 cells, expected 2"),
    ('id,model:x\n"a\nb",1\nc,7\n', r":4: x: found '7'"), ('id,model:x\n"a"b,1\n', ":2: not CSV"),
    ("sample_id,prompt,eval_name,x\n1,p,e,1\n", r":2: found no model, expected columns NAME, NAME\|model_response"),
    ("eval_name,x,x|total_cost\ne,1,cheap\n", r":2: x\|total_cost: found 'cheap'"), ("eval_name,x,x|total_cost\ne,1,-1\n", r"found '-1'"),
    ("eval_name,x,x|total_cost\ne,9,1\n", ":2: x: found '9', expected 0 to 1"),
])
def test_a_csv_file_that_cannot_be_used_is_named_with_its_line(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(DataError, match=rf"^table\.csv{words}" if words.startswith(":") else words):
        load(write(tmp_path, text, "table.csv"))


@pytest.mark.parametrize(("data", "words"), [
    (b"", "holds no rows"), (b"\n\n", "holds no rows"), (b"model:x\n", "holds no rows"), (b"[{}]", ":1: found a JSON array"),
    (b'{"queries": 1}', ":1: expected one of the keys outcomes, predictions, eval_name; found queries"),
    (b'{"outcomes": {"x": null}}', "records no answer"), ("model:é\n1".encode("latin-1"), ":1: cannot be read"),
    (gzip.compress(b"model:x\n" + b"1\n" * 99)[:-12], "cannot be read"),
], ids=range(8))
def test_a_file_that_is_no_table_is_refused(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "table").write_bytes(data)
    with pytest.raises(DataError, match=words) as caught:
        load(tmp_path / "table")
    assert "docs/outcomes.md" in caught.value.hint


def test_a_file_that_is_not_there_and_a_folder_are_data_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.csv does not exist"):
        load(tmp_path / "absent.csv")
    with pytest.raises(DataError, match="cannot be read"):
        load(tmp_path)


def test_several_problems_are_told_at_once_and_at_most_ten(tmp_path: Path) -> None:
    path = write(tmp_path, jsonl({"outcomes": {"x": 1}}, {"outcomes": {"x": 5, "y": 6}}, "{", {"outcomes": {"x": 0}}))
    with pytest.raises(DataError, match=r"table\.jsonl has 3 problems:\n  - table\.jsonl:2: x.*\n  - table\.jsonl:2: y.*\n  - table\.jsonl:3: not JSON"):
        load(path)
    with pytest.raises(DataError, match="has 10 or more problems") as caught:
        load(write(tmp_path, "{\n" * 50))
    assert caught.value.message.count("\n  - ") == 10 and "table.jsonl:10:" in caught.value.message


# ---------------------------------------------------------------- models


def test_sizes_costs_and_workers_come_from_the_models_file_beside_the_table(tmp_path: Path) -> None:
    worker = {"kind": "openai", "urls": ["http://localhost:9/v1"], "model": "X"}
    write(tmp_path, json.dumps({"models": [{"name": "x", "billion_parameters": 7, "cost": 0.5, "worker": worker},
                                           {"name": "other"}, {"name": "z", "billion_parameters": None}]}), "models.json")
    table = load(write(tmp_path, jsonl({"outcomes": {"x": 1, "y": 0, "z": 1}})))
    assert table.models == (Model("x", 7.0, 0.5, worker), Model("y"), Model("z"))


def test_a_models_file_that_is_given_wins_and_may_be_yaml(tmp_path: Path) -> None:
    write(tmp_path, "not json", "models.json")
    given = write(tmp_path, "models:\n- {name: x, billion_parameters: 1.5}\n- name: y\n  cost: 2\n", "sizes.yaml")
    table = load(write(tmp_path, jsonl({"outcomes": {"x": 1, "y": 0}})), given)
    assert table.models == (Model("x", 1.5), Model("y", None, 2.0))


def test_a_cost_in_the_models_file_wins_over_the_recorded_one(tmp_path: Path) -> None:
    given = write(tmp_path, '{"models": [{"name": "c", "cost": 9}]}', "m.json")
    table = load(write(tmp_path, jsonl(*(dict(zip(BENCH, row)) for row in routerbench()))), given)
    assert [model.cost for model in table.models] == [pytest.approx(3.0), 9.0]


@pytest.mark.parametrize(("text", "words"), [
    ('{\n"models": [\n{"name": "x"},\n{"billion_parameters": 3}]}', r"m:4: found .*expected a model with a name"),
    ('{"models": [\n\t{"name": "x"},\n\t{"name": "x"}]}', "m:3: x is there twice"),
    ("models:\n- name: x\n- name: y\n  billion_parameters: seven\n", "m:3: y: billion_parameters: found 'seven', expected a number above 0"),
    ("models: [{name: x, cost: -1}]", "m:1: x: cost: found -1, expected a number from 0"), ("models: [{name: x, cost: .nan}]", "cost: found nan"),
    ("models: [{name: x, billion_parameters: 0}]", "found 0, expected a number above 0"), ("models: [{name: x, cost: true}]", "found True"),
    ("models: [{name: x, billions: 3}]", "unknown key 'billions'; valid: name, billion_parameters, cost, worker"),
    ("models: [{name: x, worker: {kind: openai, model: m}}]", "x: worker: kind openai needs urls"),
    ("models: [{name: x, worker: qwen}]", "x: worker: found text"),
    ('{"models": [\n}', "m:2: not JSON"), ("models: [\n", "not YAML"), ("models: {a: 1}", "expected a mapping with a list of models"), ("- x", "found"),
    ("", "found None"), ("models: [{name: nobody}]", r"m knows none of the models of table\.jsonl"),
])
def test_what_is_wrong_with_a_models_file_is_named_with_its_line(tmp_path: Path, text: str, words: str) -> None:
    table = write(tmp_path, jsonl({"outcomes": {"x": 1, "y": 0}}))
    with pytest.raises(DataError, match=words):
        load(table, write(tmp_path, text, "m"))


def test_a_models_file_that_cannot_be_read_is_a_data_error(tmp_path: Path) -> None:
    table = write(tmp_path, jsonl({"outcomes": {"x": 1}}))
    (tmp_path / "bad").write_bytes(b"\xff\xfe")
    for name in ("absent", "bad"):
        with pytest.raises(DataError, match=f"{name} cannot be read"):
            load(table, tmp_path / name)


def test_a_models_file_beside_a_table_of_other_models_does_no_harm(tmp_path: Path) -> None:
    write(tmp_path, '{"models": [{"name": "nobody"}]}', "models.json")
    assert load(write(tmp_path, jsonl({"outcomes": {"x": 1}}))).models == (Model("x"),)


def test_the_examples_of_the_documentation_load(tmp_path: Path) -> None:
    text = (Path(__file__).parent.parent / "docs" / "outcomes.md").read_text(encoding="utf-8")
    sheets, (lines, mmlu_pro, sizes) = re.findall(r"```csv\n(.*?)```", text, re.DOTALL), re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    write(tmp_path, sizes, "models.json")
    table = load(write(tmp_path, sheets[0], "a.csv"))
    assert table.right.tolist() == [[1, 1], [0, 0.5], [0, 1]] and [model.billions for model in table.models] == [3.8, 70.0]
    assert load(write(tmp_path, lines)).queries == (table.queries[0], table.queries[2])
    assert load(write(tmp_path, mmlu_pro)).right.tolist() == [[1, 0]]


# ---------------------------------------------------------------- parts of a table


def test_models_are_selected_in_the_order_asked_for(tmp_path: Path) -> None:
    table = load(write(tmp_path, jsonl(*MMLU_PRO))).select(["large", "small"])
    assert names(table) == ["large", "small"] and table.right.tolist() == [[0, 1], [1, 0]] and table.letters == (("", "B"), ("A", "J"))
    assert names(table.select(["small"])) == ["small"] and table.select(["small"]).right.shape == (2, 1)


def test_an_unknown_model_is_answered_with_the_likeliest_first(tmp_path: Path) -> None:
    table = load(write(tmp_path, jsonl({"outcomes": {"zeta-70B": 1, "Yi-34B": 0, "alpha": 1}})))
    with pytest.raises(DataError, match="'yi-34'") as caught:
        table.select(["alpha", "yi-34"])
    assert caught.value.hint.startswith("Valid: Yi-34B, ") and "alpha" in caught.value.hint
    for wrong in ([], ["alpha", "alpha"]):
        with pytest.raises(DataError, match="each once"):
            table.select(wrong)


def test_rows_are_picked_by_number_or_by_truth_values(tmp_path: Path) -> None:
    table = load(write(tmp_path, jsonl(*MMLU_PRO, {**MMLU_PRO[0], "id": 72})))
    assert table.rows([2, 0]).ids == ("72", "70")
    picked = table.rows(np.array([False, True, False]))
    assert same(picked, table.rows([1])) and picked.letters == (("J", "A"),) and picked.right.tolist() == [[0, 1]]
    assert table.rows([]).ids == () and table.rows([]).right.shape == (0, 2)


# ---------------------------------------------------------------- one table, two layouts

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
model_names = st.lists(st.text("abcXYZ-._:/| é", min_size=1, max_size=8).map(str.strip).filter(bool), min_size=1, max_size=4, unique=True)
numbers = st.one_of(st.none(), st.booleans(), st.sampled_from([0, 1]), st.floats(0, 1))


@st.composite
def tables(draw: Any) -> list[dict[str, Any]]:
    models = draw(model_names)
    rows = []
    for i in range(draw(st.integers(1, 6))):
        truth = draw(st.sampled_from(["", "A", "c"]))
        cell = st.one_of(numbers, st.sampled_from("ABCDefg")) if truth else numbers
        rows.append({"id": f"n{i}", "query": draw(texts), "category": draw(texts), "answer": truth, "options": draw(st.sampled_from([0, 3, 10])),
                     "outcomes": {m: draw(cell) for m in models}})
    rows[0]["outcomes"][models[0]] = 1
    return rows


@given(tables())
@settings(max_examples=150, deadline=None)
def test_json_lines_and_csv_of_the_same_answers_are_the_same_table(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]) -> None:
    folder = tmp_path_factory.mktemp("t")
    models = list(rows[0]["outcomes"])
    plain = ["id", "query", "category", "answer", "options"]

    def spell(value: Any) -> str:
        return "" if value is None else str(value)

    cells = [[spell(row[key]) for key in plain] + [spell(row["outcomes"][m]) for m in models] for row in rows]
    one = load(write(folder, jsonl(*rows)))
    other = load(write(folder, sheet([*plain, *(f"model:{m}" for m in models)], *cells), "table.csv"))
    assert same(one, other)
    for i, row in enumerate(rows):
        for m, value in row["outcomes"].items():
            if m in names(one):
                expected = NAN if value is None else float(value.upper() == row["answer"].upper()) if isinstance(value, str) else float(value)
                assert np.array_equal(one.right[i, names(one).index(m)], expected, equal_nan=True)


@given(st.lists(st.text("abcAB-7", max_size=6), min_size=1, max_size=8), st.text("abcAB-7", max_size=6))
def test_the_nearest_names_are_all_the_names_with_an_equal_one_first(valid: list[str], name: str) -> None:
    found = outcomes.nearest(name, valid)
    assert sorted(found) == sorted(valid)
    assert name not in valid or found[0].casefold() == name.casefold()
