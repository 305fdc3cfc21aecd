"""MMLU with a graph: the files in each layout, the prompt, marks against cases counted by hand, going on, and the command end to end."""

from __future__ import annotations

import asyncio
import csv
import gzip
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import WORDS, toy_queries
from lmgraph import cli, files, graphfile
from lmgraph.errors import AssetError, DataError, MissingExtra, SettingsError
from lmgraph.evaluate import marks, mmlu, mmludata, report
from lmgraph.evaluate.asking import Reply
from lmgraph.evaluate.journal import Journal, key_of, open_journal
from lmgraph.evaluate.mmlu import Candidate, Results, Routed
from lmgraph.evaluate.mmludata import LETTERS, NODE_OF, Question, prompt
from lmgraph.graph import Graph
from lmgraph.types import Decision
from lmgraph.workers.scripted import ScriptedWorker

PARQUET = importlib.util.find_spec("pyarrow") is not None
SUBJECT_OF = {"math": "abstract_algebra", "law": "jurisprudence", "health": "anatomy"}
"""node of the toy -> a subject that belongs there"""
HARD = 'What is "1, 2" and\nthen?'
"""a question that CSV must quote"""


def question(subject: str = "anatomy", number: int = 0, text: str = "What is it?", answer: int = 0, kind: str = "test") -> Question:
    return Question(f"{subject}/{kind}/{number}", subject, NODE_OF[subject], text, ("one", "two, or 2", "", "four\n4"), answer)


DEV = [question(subject, i, f"Shown {i}?", i % 4, "dev") for subject in ("anatomy", "virology") for i in range(5)]
TEST = [question("anatomy", 0, HARD, 3), question("anatomy", 1, "b?", 1), question("virology", 0, "c?", 0)]


def write(path: Path, data: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def lines(rows: Sequence[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def plain(q: Question, *keys: str) -> dict[str, Any]:
    """A question as a row, with these keys or all."""
    row = {"id": q.id, "subject": q.subject, "node": q.node, "question": q.question, "choices": list(q.choices), "answer": q.answer}
    return {key: row[key] for key in keys or row}


def table(questions: Sequence[Question]) -> str:
    out = io.StringIO()
    csv.writer(out).writerows([q.question, *q.choices, LETTERS[q.answer]] for q in questions)
    return out.getvalue()


# ---------------------------------------------------------------- files


def original(folder: Path) -> None:
    for kind, questions in (("dev", DEV), ("test", TEST)):
        for subject in ("anatomy", "virology"):
            write(folder / kind / f"{subject}_{kind}.csv", table([q for q in questions if q.subject == subject]))


def face_all(folder: Path) -> None:
    for kind, questions in (("dev", DEV), ("test", TEST)):
        write(folder / "all" / f"{kind}-00000-of-00001.jsonl", lines([plain(q, "question", "subject", "choices", "answer") for q in questions]))
    write(folder / "anatomy" / "test-00000-of-00001.jsonl", "these are in all/ already")


def face_subjects(folder: Path) -> None:
    for kind, questions in (("dev", DEV), ("test", TEST)):
        for subject in ("anatomy", "virology"):
            rows = [plain(q, "question", "choices", "answer") | {"answer": LETTERS[q.answer]} for q in questions if q.subject == subject]
            write(folder / subject / f"{kind}.json", lines(rows))


def ours(folder: Path) -> None:
    write(folder / "dev.jsonl.gz", gzip.compress(lines([plain(q) for q in DEV]).encode()))
    write(folder / "test_sample.jsonl", lines([plain(q, "id", "subject", "question", "choices", "answer") for q in TEST]))


def parquet(folder: Path) -> None:
    from pyarrow import Table
    from pyarrow.parquet import write_table

    (folder / "all").mkdir(parents=True)
    for kind, questions in (("dev", DEV), ("test", TEST)):
        rows = [plain(q, "question", "subject", "choices", "answer") for q in questions]
        write_table(Table.from_pylist(rows), folder / "all" / f"{kind}-00000-of-00001.parquet")


@pytest.mark.parametrize("make", [original, face_all, face_subjects, ours,
                                  pytest.param(parquet, marks=pytest.mark.skipif(not PARQUET, reason="pyarrow is not installed"))])
def test_every_layout_holds_the_same_questions(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path)
    found = mmludata.load(tmp_path)
    assert found.test == TEST
    assert found.dev == {subject: [q for q in DEV if q.subject == subject] for subject in ("anatomy", "virology")}


def test_one_file_is_test_without_dev(tmp_path: Path) -> None:
    found = mmludata.load(write(tmp_path / "mine.jsonl", "\n" + lines([plain(q) for q in reversed(TEST)])))
    assert sorted(found.test, key=lambda q: q.id) == TEST and [q.subject for q in found.test] == ["anatomy", "anatomy", "virology"]
    assert found.dev == {} and mmludata.few_shots(found.dev, found.test, 0) == {"anatomy": [], "virology": []}
    with pytest.raises(DataError, match=r"5 shots .* anatomy \(0\), virology \(0\)") as caught:
        mmludata.few_shots(found.dev, found.test, 5)
    assert "--shots 0" in caught.value.hint
    assert mmludata.load(write(tmp_path / "virology_test.csv", table(TEST[2:]))).test == TEST[2:]


@pytest.mark.skipif(PARQUET, reason="pyarrow is installed")
def test_parquet_without_pyarrow_is_an_error_with_the_command_that_helps(tmp_path: Path) -> None:
    write(tmp_path / "all" / "test-00000-of-00001.parquet", b"PAR1")
    with pytest.raises(MissingExtra, match=r"test-00000-of-00001\.parquet needs pyarrow") as caught:
        mmludata.load(tmp_path)
    assert caught.value.hint == "Install it: pip install pyarrow"


@pytest.mark.skipif(not PARQUET, reason="pyarrow is not installed")
def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    write(tmp_path / "all" / "test-00000-of-00001.parquet", b"PAR1 and no more")
    with pytest.raises(DataError, match=r"all/test-00000-of-00001\.parquet:1: cannot be read as Parquet"):
        mmludata.load(tmp_path)


GOOD = plain(TEST[1])


@pytest.mark.parametrize(("row", "complaint"), [
    ({**GOOD, "answer": 4}, "found 4 as `answer`, expected 0 to 3 or A to D"), ({**GOOD, "answer": "E"}, "found 'E' as `answer`"),
    ({**GOOD, "answer": True}, "found True as `answer`"), ({**GOOD, "answer": ""}, "found '' as `answer`"),
    ({**GOOD, "choices": ["a", "b", "c"]}, "expected 4 texts"), ({**GOOD, "choices": "abcd"}, "found 'abcd' as `choices`"),
    ({**GOOD, "choices": ["a", "b", "c", 4]}, "expected 4 texts"), ({**GOOD, "question": " "}, "found ' ' as `question`, expected text"),
    ({**GOOD, "question": None}, "found nothing as `question`"), ({**GOOD, "subject": ""}, "found nothing as `subject`"),
    ({**GOOD, "subject": "anatomie", "node": ""}, "'anatomie', which is none of MMLU's 57 (did you mean anatomy?)"),
    ({**GOOD, "subject": "anatomy", "node": 7}, "none of MMLU's 57"), ([1], "found list, expected an object"), ("text", "found str"),
    ({**GOOD, "question": "\ud800"}, "half of a surrogate pair")])
def test_a_row_that_is_no_question_is_named_with_its_line(tmp_path: Path, row: Any, complaint: str) -> None:
    path = write(tmp_path / "test.jsonl", lines([GOOD, row, GOOD]))
    with pytest.raises(DataError) as caught:
        mmludata.load(path)
    assert "has 1 problem:" in caught.value.message and "/test.jsonl:2: " in caught.value.message and complaint in caught.value.message


def test_all_problems_are_named_at_once_but_not_endlessly(tmp_path: Path) -> None:
    write(tmp_path / "test" / "anatomy_test.csv", table(TEST[:1]) + 'a,b\n"x\ny",1,2,3,4,A\n' + "a,b,c\n" * 9)
    with pytest.raises(DataError) as caught:
        mmludata.load(tmp_path)
    message = caught.value.message
    assert "has 10 problems" in message and "and 2 more" in message
    assert "test/anatomy_test.csv:4: found 2 columns" in message and "anatomy_test.csv:7: found 3 columns" in message, "rows of many lines count"


@pytest.mark.parametrize(("name", "data", "complaint"), [
    ("test.jsonl", b"{not json}\n", "test.jsonl:1: not JSON"), ("test.jsonl", b"[" * 100_000, "test.jsonl:1: not JSON"),
    ("test.jsonl", b'{"a": "\xff"}\n', "test.jsonl:1: cannot be read"), ("test.jsonl.gz", b"no gzip", "test.jsonl.gz:1: cannot be read"),
    ("test.jsonl", b"\n", "holds no test questions"), ("anatomy_test.csv", b'"a', "anatomy_test.csv:1: cannot be read"),
    ("questions.txt", b"", "its name ends in .txt")])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, data: bytes, complaint: str) -> None:
    with pytest.raises(DataError) as caught:
        mmludata.load(write(tmp_path / name, data))
    assert complaint in caught.value.message and "dev.jsonl" in caught.value.hint


def test_a_place_without_questions_is_named_with_what_lies_there(tmp_path: Path) -> None:
    write(tmp_path / "val" / "x.csv", "")
    with pytest.raises(DataError, match="no test questions; found there: val/"):
        mmludata.load(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        mmludata.load(tmp_path / "nowhere")


def test_the_57_subjects_belong_to_the_17_nodes_of_the_built_in_graph() -> None:
    assert len(NODE_OF) == 57
    assert set(NODE_OF.values()) == set(graphfile.loads(files.builtin_graph()).nodes) and len(set(NODE_OF.values())) == 17


@given(st.integers(1, 200), st.integers(1, 200))
def test_a_sample_is_spread_evenly(n: int, count: int) -> None:
    found = mmludata.spread([question(number=i) for i in range(n)], count)
    numbers = [int(q.id.rsplit("/", 1)[1]) for q in found]
    assert len(numbers) == min(n, count) and numbers == sorted(set(numbers))
    gaps = [b - a for a, b in zip([*numbers], [*numbers[1:], n])]
    assert max(gaps) - min(gaps) <= 1


# ---------------------------------------------------------------- prompt


def test_the_prompt_is_the_usual_one() -> None:
    shown = Question("", "us_foreign_policy", "politics", "Who?", ("a", "b", "c", "d"), 2)
    assert prompt(shown, "Whom?", [shown]) == (
        "The following are multiple choice questions (with answers) about us foreign policy.\n\n"
        "Who?\nA. a\nB. b\nC. c\nD. d\nAnswer: C\n\nWhom?\nA. a\nB. b\nC. c\nD. d\nAnswer:")


@given(st.text(), st.text(), st.lists(st.text(), min_size=4, max_size=4), st.integers(0, 3), st.integers(0, 3))
def test_whatever_the_stem_the_choices_stay_as_they_are(stem: str, text: str, choices: list[str], answer: int, shots: int) -> None:
    asked = Question("", "anatomy", "health", text, tuple(choices), answer)
    found = prompt(asked, stem, DEV[:shots])
    end = stem + "".join(f"\n{name}. {choice}" for name, choice in zip(LETTERS, choices)) + "\nAnswer:"
    assert found == prompt(question(), "", DEV[:shots]).removesuffix(prompt(question(), "", []).split("\n\n", 1)[1]) + end


# ---------------------------------------------------------------- journal


def reply(choice: int | None = 0, how: str = "likelihood", ms: float = 1.0, tokens: int = 10, shots: int = 5) -> Reply:
    return Reply(choice, how, ms, tokens, shots)


def test_what_was_found_is_there_again_and_a_line_that_was_cut_off_is_not(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "answers.jsonl"
    with open_journal(path, Reply) as journal:
        for i in range(3):
            journal.add(f"k{i}", reply(i), {"id": "ä"})
            assert path.read_bytes().count(b"\n") == i + 1, "in the file at once"
    path.write_bytes(path.read_bytes()[:-3])
    with open_journal(path, Reply) as journal:
        assert len(journal) == 2 and journal.get("k1") == reply(1) and journal.get("k2") is None
        journal.add("k2", reply(None), {})
    with open_journal(path, Reply) as journal:
        assert journal.get("k2") == reply(None)
    with open_journal(path, Reply, fresh=True) as journal:
        assert len(journal) == 0 and path.read_bytes() == b""


@pytest.mark.parametrize("line", ["not json", "[]", "{}", '{"key": "k", "choice": 1}', '{"key": "k", "more": 1}', "null"])
def test_a_line_that_the_journal_did_not_write_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "answers.jsonl"
    with open_journal(path, Reply) as journal:
        journal.add("k", reply(), {})
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DataError, match=r"answers\.jsonl:2: ") as caught, open_journal(path, Reply):
        pass
    assert "--fresh" in caught.value.hint


def test_a_journal_that_cannot_be_written_is_an_error_with_its_name(tmp_path: Path) -> None:
    write(tmp_path / "file", "")
    with pytest.raises(AssetError, match=r"file.answers\.jsonl cannot be written"), open_journal(tmp_path / "file" / "answers.jsonl", Reply):
        pass


def test_without_a_file_a_journal_only_remembers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with open_journal(None, Reply) as journal:
        journal.add("k", reply(2), {})
        assert journal.get("k") == reply(2) and list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- the run


def graph(*workers: str) -> Graph:
    nodes = "\n".join(f"  n{i}: {{token: {i}, description: d, worker: {worker}}}" for i, worker in enumerate(workers))
    return graphfile.loads(f"version: 1\nnodes:\n{nodes}\nedges: {{start: ['*']}}\n")


def test_workers_are_the_same_where_their_answers_must_be() -> None:
    server = "{{kind: openai, model: m, urls: [{}], system: {}, timeout_s: {}, retries: {}}}"
    given = graph("{kind: embedded, model: a.gguf, system: one}", "{kind: embedded, model: b.gguf, system: two}",
                  "{kind: embedded, model: c.gguf}", server.format("http://x/v1", "s", 1, 0), server.format("http://x/v1", "s", 9, 3),
                  server.format("http://y/v1", "s", 1, 0), server.format("http://x/v1", "t", 1, 0), "{kind: scripted, answers: {'*': a}}")
    found = mmlu.candidates(given, lambda spec: "same bytes" if spec.model in ("a.gguf", "b.gguf") else "other bytes")
    assert [c.nodes for c in found] == [("n0", "n1"), ("n2",), ("n3", "n4"), ("n5",), ("n6",), ("n7",)]
    assert [c.name for c in found] == ["a.gguf", "c.gguf", "m (n3)", "m (n5)", "m (n6)", "scripted"]
    assert len({c.key for c in found}) == 6 and found[2].retries == 3


def test_decisions_depend_on_what_the_master_and_the_graph_say_about_choosing_and_on_no_worker() -> None:
    one, two = graph("{kind: scripted}", "{kind: scripted}"), graph("{kind: embedded, model: x}", "{kind: scripted}")
    key = mmlu.master_key(one, "d", False)
    assert mmlu.master_key(two, "d", False) == key
    others = {mmlu.master_key(one, "e", False), mmlu.master_key(one, "d", True), mmlu.master_key(graph("{kind: scripted}"), "d", False)}
    others.add(mmlu.master_key(replace(one, master=replace(one.master, scope=1.0)), "d", False))
    assert len(others | {key}) == 5


def routed(node: str, chosen: str = "", stem: str = "", ms: float = 2.0, rewrite_ms: float = 3.0) -> Routed:
    return Routed(node, chosen or node, 0.9, bool(chosen), stem, ms, rewrite_ms)


QUIET: Any = lambda task, done, total, note: None  # noqa: E731


def test_the_master_sees_the_text_of_a_question_and_nothing_else_and_is_asked_once() -> None:
    asked: list[str] = []
    seen: list[tuple[str, int, int, str]] = []

    async def decide(query: str) -> Decision:
        asked.append(query)
        return Decision(query, "law", "health", 1, 0.7, rewritten="new", fallback=True, tokenise_ms=1, prefill_ms=2, decode_ms=4)

    async def work() -> list[list[Routed]]:
        with open_journal(None, Routed) as journal:
            return [await mmlu.route(decide, TEST, "key", journal, concurrency=2, progress=lambda *a: seen.append(a)) for _ in range(2)]

    once, again = asyncio.run(work())
    assert asked == [HARD, "b?", "c?"] and once == again == [Routed("law", "health", 0.7, True, "new", 3, 4)] * 3
    assert seen[-1] == ("routing", 3, 3, "100.0% right") and len(seen) == 3


def sit(questions: Sequence[Question], where: Sequence[Routed], those: Sequence[Candidate], workers: dict[str, ScriptedWorker],
        journal: Journal[Reply], shots: int = 0, concurrency: int = 2) -> Results:
    async def open_worker(candidate: Candidate) -> ScriptedWorker:
        return workers[candidate.name]

    shown = {q.subject: [d for d in DEV if d.subject == q.subject][:shots] for q in questions}
    return asyncio.run(mmlu.sit(questions, shown, where, those, open_worker, journal, concurrency=concurrency, progress=QUIET))


def test_every_worker_answers_every_question_and_the_routed_one_the_rewritten_one_too() -> None:
    those = [Candidate("one", "k1", ("law", "math"), 0), Candidate("two", "k2", ("health",), 0)]
    one, two = ScriptedWorker({"*": "A", prompt(TEST[1], "new b?", DEV[:2]): "B"}), ScriptedWorker({"*": "C"})
    where = [routed("health", stem=HARD), routed("math", stem="new b?"), routed("health", stem="new c?")]
    with open_journal(None, Reply) as journal:
        found = sit(TEST, where, those, {"one": one, "two": two}, journal, shots=2)
        assert len(journal) == 8
    assert [r.choice for r in found.replies["one"]] == [0] * 3 and [r.choice for r in found.replies["two"]] == [2] * 3
    assert [r and r.choice for r in found.rewritten] == [None, 1, 2]
    texts = [[messages[0].content for messages in worker.asked] for worker in (one, two)]
    shots = {"anatomy": DEV[:2], "virology": DEV[5:7]}
    own = [prompt(q, q.question, shots[q.subject]) for q in TEST]
    assert texts[0] == [own[0], own[1], prompt(TEST[1], "new b?", DEV[:2]), own[2]], "in the order of the questions, rewritten ones beside"
    assert texts[1] == [*own, prompt(TEST[2], "new c?", DEV[5:7])]


def test_a_worker_that_fails_ends_the_run_and_what_was_answered_is_kept(tmp_path: Path) -> None:
    those = [Candidate("one", "k1", ("health",), 0)]
    where = [routed("health", stem=q.question) for q in TEST]
    failing = ScriptedWorker({"*": "A", prompt(TEST[1], "b?", []): "! broken"})
    with open_journal(tmp_path / "a.jsonl", Reply) as journal, pytest.raises(Exception, match="broken"):
        sit(TEST, where, those, {"one": failing}, journal, concurrency=1)
    healed = ScriptedWorker({"*": "A"})
    with open_journal(tmp_path / "a.jsonl", Reply) as journal:
        assert len(sit(TEST, where, those, {"one": healed}, journal).replies["one"]) == 3
    assert len(healed.asked) == 2
    with open_journal(tmp_path / "a.jsonl", Reply) as journal:
        sit(TEST, where, those, {}, journal)  # nothing is left to ask: no worker is opened


def test_a_concurrency_of_nothing_is_refused() -> None:
    with open_journal(None, Reply) as journal, pytest.raises(SettingsError, match="at least 1"):
        sit(TEST, [routed("health")] * 3, [Candidate("one", "k", ("health",), 0)], {"one": ScriptedWorker({})}, journal, concurrency=0)


# ---------------------------------------------------------------- marks

FOUR = [question("anatomy", 0, answer=0), question("anatomy", 1, answer=1), question("jurisprudence", 0, answer=2), question("jurisprudence", 1, answer=3)]
PAIR = [Candidate("big", "k1", ("health", "math"), 0), Candidate("small", "k2", ("law",), 0)]


@pytest.fixture
def four() -> dict[str, Any]:
    results = Results(
        routed=[routed("health"), routed("health", "law"), routed("law"), routed("math")],
        replies={"big": [reply(0, ms=10), reply(0, ms=10, tokens=20), reply(2, ms=10), reply(3, ms=10, shots=3)],  # right: 1 0 1 1
                 "small": [reply(1, "parsed", 4), reply(1, "parsed", 4), reply(2, "parsed", 4), reply(None, "parsed", 4)]},  # right: 0 1 1 0
        rewritten=[None, reply(1, ms=30), None, reply(None, ms=50)])
    return marks.measure(FOUR, results, PAIR, ["health", "law", "math"], shots=5, rewriting=True)


def test_policies_are_what_a_hand_counts(four: dict[str, Any]) -> None:
    assert four["n"] == 4 and four["best"] == "big" and four["nodes"] == ["health", "math", "law"]
    correct = {name: row["correct"] for name, row in four["policies"].items()}
    assert correct == {marks.BEST: 3, marks.RANDOM: pytest.approx((2 * 3 + 1 * 2) / 3), marks.ORACLE: 2, marks.ROUTED: 3,
                       marks.REWRITTEN: 3, marks.ANY: 4}
    assert {name: row["correct"] for name, row in four["alone"].items()} == {"big": 3, "small": 2}
    assert four["policies"][marks.ROUTED]["accuracy"] == 0.75 and four["policies"][marks.ORACLE]["difference"] == -0.25
    assert four["policies"][marks.BEST]["difference_interval"] == [0, 0]
    assert four["policies"][marks.ROUTED]["interval"] == pytest.approx([0.3006, 0.9544], abs=1e-4), "Wilson, 3 of 4"


def test_the_rewritten_policy_takes_the_answer_to_the_rewritten_question_where_there_is_one(four: dict[str, Any]) -> None:
    subjects = {name: row["policies"] for name, row in four["by_subject"].items()}
    assert subjects["anatomy"][marks.ROUTED] == 0.5 and subjects["anatomy"][marks.REWRITTEN] == 1.0
    assert subjects["jurisprudence"][marks.ROUTED] == 1.0 and subjects["jurisprudence"][marks.REWRITTEN] == 0.5
    assert four["rewrites"] == {"used": 2}


def test_costs_are_those_of_who_was_asked(four: dict[str, Any]) -> None:
    policies = four["policies"]
    assert policies[marks.ROUTED]["ms"] == pytest.approx((10 + 10 + 4 + 10) / 4 + 2)
    assert policies[marks.ORACLE]["ms"] == pytest.approx((10 + 10 + 4 + 4) / 4)
    assert policies[marks.REWRITTEN]["ms"] == pytest.approx((10 + 30 + 4 + 50) / 4 + 2 + 3)
    assert policies[marks.RANDOM]["ms"] == pytest.approx((10 + 10 + 4) / 3) and policies[marks.ANY]["ms"] is None
    assert four["alone"]["big"]["prompt_tokens"] == 12.5 and policies[marks.ROUTED]["prompt_tokens"] == 12.5


def test_tokens_that_one_worker_does_not_count_are_in_no_mean(four: dict[str, Any]) -> None:
    results = Results([routed("health"), routed("law")], {"big": [reply(0, tokens=800)] * 2, "small": [reply(0, tokens=0)] * 2}, [])
    found = marks.measure(FOUR[1:3], results, PAIR, ["health", "law"], shots=0, rewriting=False)
    assert found["alone"]["big"]["prompt_tokens"] == 800 and found["alone"]["small"]["prompt_tokens"] is None
    assert found["policies"][marks.ROUTED]["prompt_tokens"] is None


def test_router_and_workers_are_what_a_hand_counts(four: dict[str, Any]) -> None:
    router = four["router"]
    assert (router["correct"], router["after_fallback"]["correct"], router["fallbacks"]) == (2, 3, 1)
    assert {node: (row["n"], row["correct"], row["after_fallback"]) for node, row in router["by_node"].items()} == {
        "health": (2, 1, 1.0), "law": (2, 1, 0.5)}
    assert four["workers"]["big"] == {"nodes": ["health", "math"], "share_routed": 0.75, "share_oracle": 0.5, "no_answer": 0,
                                      "likelihood": 4, "parsed": 0, "fewer_shots": 1}
    assert four["workers"]["small"] == {"nodes": ["law"], "share_routed": 0.25, "share_oracle": 0.5, "no_answer": 1, "likelihood": 0,
                                        "parsed": 4, "fewer_shots": 0}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["anatomy", "jurisprudence"]), st.sampled_from(["health", "law"]),
                          *[st.sampled_from([0, 1, None])] * 2), min_size=1, max_size=30), st.booleans())
def test_every_policy_lies_between_none_and_any(rows: list[tuple[str, str, int | None, int | None]], rewriting: bool) -> None:
    those = [Candidate("one", "k1", ("health",), 0), Candidate("two", "k2", ("law",), 0)]
    questions = [question(subject, i) for i, (subject, *_) in enumerate(rows)]
    results = Results([routed(node) for _, node, _, _ in rows], {"one": [reply(a) for *_, a, _ in rows], "two": [reply(b) for *_, b in rows]},
                      [None] * len(rows))
    found = marks.measure(questions, results, those, ["health", "law"], shots=5, rewriting=rewriting)
    correct = {name: row["correct"] for name, row in (found["policies"] | found["alone"]).items()}
    assert all(0 <= count <= correct[marks.ANY] for count in correct.values())
    assert correct[marks.BEST] == max(correct["one"], correct["two"]) and 2 * correct[marks.RANDOM] == correct["one"] + correct["two"]
    assert all(row["interval"][0] <= row["accuracy"] <= row["interval"][1] for row in found["policies"].values())
    assert all(row["difference_interval"][0] <= row["difference"] <= row["difference_interval"][1] for row in found["policies"].values())
    if all(q.node == r.node for q, r in zip(questions, results.routed)):
        assert correct[marks.ROUTED] == correct[marks.ORACLE] and found["router"]["accuracy"] == 1
    for name in found["policies"]:
        assert sum(row["n"] * row["policies"][name] for row in found["by_subject"].values()) == pytest.approx(correct[name])
    assert (marks.REWRITTEN in found["policies"]) == rewriting
    assert sum(row["share_routed"] for row in found["workers"].values()) == pytest.approx(1)
    json.dumps(found, allow_nan=False)


def test_nothing_and_strangers_are_refused() -> None:
    with pytest.raises(DataError, match="nothing to measure"):
        marks.measure([], Results([], {}, []), PAIR, ["law"], shots=0, rewriting=False)
    with pytest.raises(DataError, match="belong to physics") as caught:
        marks.measure([question("astronomy")], Results([], {}, []), PAIR, ["law"], shots=0, rewriting=False)
    assert "health, math, law" in caught.value.hint


def test_a_report_shows_policies_workers_and_subjects_and_says_what_does_not_compare(four: dict[str, Any]) -> None:
    text = report.markdown(marks.report(four, "title", "lmgraph evaluate mmlu x"))
    for words in ("| best single | 75.0 %", "| best single worker | 75.0 % | big, known", "| small alone | 50.0 %", "| anatomy | health | 2 | 50.0 %", "rewritten questions",
                  "4 answers were read from words", "1 prompts were too long", "-25.0"):
        assert words in text, words
    lone = marks.measure([FOUR[0]], Results([routed("health")], {"only": [reply(0)]}, [None]), [Candidate("only", "k", ("health",), 0)],
                         ["health"], shots=0, rewriting=False)
    made = marks.report(lone, "t", "c")
    assert "routing can change no answer" in made.note and "read from words" not in made.note and len(made.pictures) == 1


# ---------------------------------------------------------------- the command


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LMGRAPH_THREADS", "1")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("PYTHONPATH", str(Path(cli.__file__).parents[2]))


@pytest.fixture
def lmgraph(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command in this process: (exit code, stdout, stderr)."""
    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main(["evaluate", "mmlu", *arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err and "Internal error" not in err
        return int(caught.value.code or 0), out, err

    return run


def exam(master: Path, workers: dict[str, str], per_node: int = 4) -> list[Question]:
    """graph.yaml and a folder `data`: the right answer of a node's questions is the node's number."""
    nodes = "\n".join(f"  {name}: {{token: {i}, description: d, worker: {workers[name]}}}" for i, name in enumerate(WORDS))
    write(Path("graph.yaml"), f"version: 1\nmaster: {{bundle: {master}}}\nnodes:\n{nodes}\nedges: {{start: ['*']}}\n")
    right = {name: i for i, name in enumerate(WORDS)}
    asked = [Question(f"q{i}", SUBJECT_OF[n], n, q, ("a", "b", "c", "d"), right[n]) for i, (q, n) in enumerate(toy_queries(per_node, salt=1))]
    shown = [question(subject, i, kind="dev") for subject in SUBJECT_OF.values() for i in range(5)]
    write(Path("data/test.jsonl"), lines([plain(q) for q in asked]))
    write(Path("data/dev.jsonl"), lines([plain(q) for q in shown]))
    return sorted(asked, key=lambda q: q.subject)


EXPERTS = {name: f"{{kind: scripted, answers: {{'*': 'Answer: {letter}'}}}}" for name, letter in zip(WORDS, LETTERS)}
"""each knows the answer to its own questions and to no others"""


def test_experts_that_know_only_their_field_are_worth_what_the_router_is_worth(lmgraph: Callable[..., Any], toy_master: Path) -> None:
    exam(toy_master, EXPERTS)
    code, out, err = lmgraph("data", "--json")
    assert code == 0, err
    found = json.loads(out)
    accuracy = {name: row["accuracy"] for name, row in found["policies"].items()}
    assert accuracy[marks.ORACLE] == accuracy[marks.ANY] == 1 and accuracy[marks.BEST] == accuracy[marks.RANDOM] == pytest.approx(1 / 3)
    assert accuracy[marks.ROUTED] == found["router"]["accuracy"] > 0.5 and marks.REWRITTEN not in accuracy
    assert found["n"] == 12 and found["shots"] == 5 and set(found["alone"]) == {"scripted (math)", "scripted (law)", "scripted (health)"}
    assert not Path("out").exists()


def test_the_report_is_written_and_shown(lmgraph: Callable[..., Any], toy_master: Path) -> None:
    exam(toy_master, EXPERTS)
    code, out, err = lmgraph("data", "--out", "out", "--rewrite", "--sample", "9", "--shots", "2", "--concurrency", "2")
    assert code == 0, err
    assert "best single" in out and "routed, rewritten" in out and "wrote out/report.md" in err.replace("\\", "/")
    assert {"report.json", "report.md", "decisions.jsonl", "answers.jsonl"} <= {p.name for p in Path("out").iterdir()}
    made = json.loads(Path("out/report.json").read_text())
    assert made["metrics"]["n"] == 9 and "2-shot" in made["title"] and len(Path("out/decisions.jsonl").read_text().splitlines()) == 9
    assert report.drawable() is Path("out/subjects.svg").is_file() is Path("out/cost.png").is_file()


@pytest.fixture
def server() -> Iterator[tuple[str, list[str], list[Callable[[], None]]]]:
    """A server that answers B: (its URL, the prompts it got, what it does before it answers)."""
    asked: list[str] = []
    before: list[Callable[[], None]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body["messages"][-1]["content"])
            for act in before:
                act()
            top = {"token": "B", "logprob": -0.1}
            choice = {"index": 0, "delta": {"content": "B"}, "finish_reason": "stop", "logprobs": {"content": [{**top, "top_logprobs": [top]}]}}
            data = f"data: {json.dumps({'choices': [choice]})}\n\ndata: [DONE]\n\n".encode()
            try:
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except OSError:
                """whoever asked went away"""

        def log_message(self, *args: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{made.server_port}/v1", asked, before
        made.shutdown()
        thread.join()


def served(url: str) -> dict[str, str]:
    return dict.fromkeys(WORDS, f"{{kind: openai, model: m, urls: ['{url}'], retries: 0}}")


def test_a_second_run_asks_only_what_is_missing(lmgraph: Callable[..., Any], toy_master: Path, server: Any) -> None:
    url, asked, _ = server
    questions = exam(toy_master, served(url))
    first = lmgraph("data", "--out", "out", "--json")
    assert first[0] == 0 and len(asked) == 12, first[2]
    assert "All nodes have the same worker" in Path("out/report.md").read_text()
    second = lmgraph("data", "--out", "out", "--json")
    assert len(asked) == 12 and second[1] == first[1] and "12 answers are in out" in second[2]
    data = Path("out/answers.jsonl").read_bytes()
    Path("out/answers.jsonl").write_bytes(data[:-9])
    third = lmgraph("data", "--out", "out", "--json")
    assert len(asked) == 13 and json.loads(third[1])["policies"][marks.ROUTED]["correct"] == json.loads(first[1])["policies"][marks.ROUTED]["correct"]
    cut = next(q for q in questions if q.id == json.loads(data.splitlines()[-1])["of"]["id"])
    assert asked[-1] == prompt(cut, cut.question, [question(cut.subject, i) for i in range(5)])
    lmgraph("data", "--out", "out", "--shots", "4")
    assert len(asked) == 25, "another prompt is another question"
    lmgraph("data", "--out", "out", "--fresh")
    assert len(asked) == 37 and len(Path("out/answers.jsonl").read_text().splitlines()) == 12


def test_an_error_of_a_worker_says_how_to_go_on(lmgraph: Callable[..., Any], toy_master: Path) -> None:
    exam(toy_master, EXPERTS | {"health": "{kind: scripted, retries: 0, answers: {'*': '! out of order'}}"})
    code, out, err = lmgraph("data", "--out", "out")
    assert code == 1 and out == "" and "out of order" in err and "go on with the same command" in err
    assert len(Path("out/answers.jsonl").read_text().splitlines()) == 24 and not Path("out/report.md").exists()
    exam(toy_master, EXPERTS)
    assert lmgraph("data", "--out", "out")[0] == 0


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT cannot be sent to one process")
def test_ctrl_c_keeps_what_was_answered_and_says_how_to_go_on(lmgraph: Callable[..., Any], toy_master: Path, server: Any) -> None:
    url, asked, before = server
    exam(toy_master, served(url))
    reached, free = threading.Event(), threading.Event()
    before.append(lambda: (reached.set(), free.wait(60)) if len(asked) == 4 else None)  # type: ignore[arg-type, return-value]
    command = [sys.executable, "-m", "lmgraph", "evaluate", "mmlu", "data", "--out", "out", "--concurrency", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ) as running:
        assert reached.wait(100)
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=100)
    free.set()
    assert running.returncode == 130 and out == "" and "Traceback" not in err
    assert "What was answered is kept; go on with the same command." in err and "Interrupted." in err
    assert len(Path("out/answers.jsonl").read_text().splitlines()) == 3 and not Path("out/report.md").exists()
    assert lmgraph("data", "--out", "out")[0] == 0 and len(asked) == 4 + 9


def test_an_embedded_graph_sits_the_exam(lmgraph: Callable[..., Any], toy_master: Path, toy_base: Path) -> None:
    exam(toy_master, dict.fromkeys(WORDS, f"{{kind: embedded, model: '{toy_base}'}}") | {"law": EXPERTS["law"]}, per_node=2)
    code, out, err = lmgraph("data", "--json", "--out", "out", "--shots", "1")
    assert code == 0, err
    found = json.loads(out)
    assert found["workers"][str(toy_base)]["likelihood"] == 6 and found["workers"]["scripted"]["parsed"] == 6
    assert found["workers"][str(toy_base)]["nodes"] == ["math", "health"] and found["workers"][str(toy_base)]["no_answer"] == 0
    rows = [json.loads(line) for line in Path("out/answers.jsonl").read_text().splitlines()]
    assert {row["of"]["worker"] for row in rows} == set(found["workers"]) and all(row["prompt_tokens"] > 0 for row in rows)


@pytest.mark.parametrize(("arguments", "complaint"), [
    (("nowhere",), "nowhere does not exist"), (("data/test.jsonl",), "5 shots were asked for"), (("physics.jsonl", "--shots", "0"), "'physics'"),
    (("data", "--shots", "6"), "--shots"), (("data", "--bundle", "nowhere"), "'nowhere' not found")])
def test_what_cannot_be_measured_is_refused_before_anybody_is_asked(lmgraph: Callable[..., Any], toy_master: Path, server: Any,
                                                                   arguments: tuple[str, ...], complaint: str) -> None:
    url, asked, _ = server
    exam(toy_master, served(url))
    write(Path("physics.jsonl"), lines([plain(question("astronomy"))]))
    code, out, err = lmgraph(*arguments)
    assert code in (1, 2) and complaint in err and out == "" and asked == []


def test_equal_data_has_an_equal_key_and_other_data_another() -> None:
    assert key_of("a", {"b": 1, "c": (2,)}) == key_of("a", {"c": [2], "b": 1}) != key_of("a", {"b": 1, "c": [3]})
    assert key_of("ab", "c") != key_of("a", "bc")
