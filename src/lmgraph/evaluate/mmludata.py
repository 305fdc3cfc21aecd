"""MMLU's questions: where they lie, how the files look, which node a subject belongs to, and the prompt that everybody uses.

It knows three layouts (the original CSV files, the Hugging Face data set `cais/mmlu`, JSON Lines of this project) and says by file
and line what is wrong in them. It knows no worker, no master and no score.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from lmgraph.errors import DataError, MissingExtra

LETTERS = "ABCD"
SUBJECTS: Mapping[str, tuple[str, ...]] = {
    "physics": ("astronomy", "college_physics", "conceptual_physics", "high_school_physics"),
    "chemistry": ("college_chemistry", "high_school_chemistry"),
    "biology": ("college_biology", "high_school_biology"),
    "computer_science": ("college_computer_science", "computer_security", "high_school_computer_science", "machine_learning"),
    "math": (
        "abstract_algebra",
        "college_mathematics",
        "elementary_mathematics",
        "high_school_mathematics",
        "high_school_statistics",
    ),
    "electrical_engineering": ("electrical_engineering",),
    "history": ("high_school_european_history", "high_school_us_history", "high_school_world_history", "prehistory"),
    "philosophy": ("formal_logic", "logical_fallacies", "moral_disputes", "moral_scenarios", "philosophy", "world_religions"),
    "law": ("international_law", "jurisprudence", "professional_law"),
    "politics": ("high_school_government_and_politics", "public_relations", "security_studies", "us_foreign_policy"),
    "culture": ("human_sexuality", "sociology"),
    "economics": ("econometrics", "high_school_macroeconomics", "high_school_microeconomics"),
    "geography": ("high_school_geography",),
    "psychology": ("high_school_psychology", "professional_psychology"),
    "business": ("business_ethics", "management", "marketing"),
    "health": (
        "anatomy",
        "clinical_knowledge",
        "college_medicine",
        "human_aging",
        "medical_genetics",
        "nutrition",
        "professional_medicine",
        "virology",
    ),
    "general": ("global_facts", "miscellaneous", "professional_accounting"),
}
"""node of the built-in graph -> its subjects; the 17 groups are those of the Octopus v4 paper (Chen and Li 2024)"""
NODE_OF: Mapping[str, str] = {subject: node for node, subjects in SUBJECTS.items() for subject in subjects}
"""subject -> node, for all 57 subjects"""
LAYOUTS = (
    "Expected one of: dev/SUBJECT_dev.csv and test/SUBJECT_test.csv (the original files); all/ or SUBJECT/ with dev-*.parquet and "
    "test-*.parquet, or the same as .jsonl (Hugging Face cais/mmlu); dev.jsonl and test.jsonl (.gz too); one .jsonl file (--shots 0)."
)
ENDINGS = (".parquet", ".jsonl", ".jsonl.gz", ".json")
LISTED = 8
"""problems of a file that a message lists"""


@dataclass(frozen=True)
class Question:
    """One question: `answer` is the index of the right one of `choices`; `node` is where its subject belongs."""

    id: str
    subject: str
    node: str
    question: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Sheets:
    """The questions shown with their answers (`dev`, by subject, in the order of the file) and those that are asked (`test`)."""

    dev: dict[str, list[Question]]
    test: list[Question]


def load(path: Path) -> Sheets:
    """Read a folder or a file; the layout is recognised by what lies there. Test questions come sorted by subject.

    Raises DataError that names file and line, what was found and what was expected; MissingExtra for Parquet without pyarrow.
    """
    problems: list[str] = []
    dev, test = _files(path)
    shown = [question for file, subject in dev for question in _questions(file, subject, "dev", problems)]
    asked = [question for file, subject in test for question in _questions(file, subject, "test", problems)]
    if problems:
        more = f"\n  and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        listed = "\n".join(f"  - {problem}" for problem in problems[:LISTED])
        raise DataError(f"{path} has {len(problems)} problem{'s' if len(problems) > 1 else ''}:\n{listed}{more}", LAYOUTS)
    if not asked:
        raise DataError(f"{path} holds no test questions.", LAYOUTS)
    by_subject: dict[str, list[Question]] = {}
    for question in shown:
        by_subject.setdefault(question.subject, []).append(question)
    return Sheets(by_subject, sorted(asked, key=lambda question: question.subject))


def spread(questions: Sequence[Question], count: int) -> list[Question]:
    """`count` of the questions, evenly over their order; all where there are not more."""
    if count >= len(questions):
        return list(questions)
    return [questions[i * len(questions) // count] for i in range(count)]


def few_shots(dev: Mapping[str, Sequence[Question]], asked: Sequence[Question], count: int) -> dict[str, Sequence[Question]]:
    """The first `count` dev questions of every subject that is asked. Raises DataError where a subject has fewer."""
    subjects = dict.fromkeys(question.subject for question in asked)
    short = [f"{subject} ({len(dev.get(subject, ()))})" for subject in subjects if len(dev.get(subject, ())) < count]
    if short:
        more = f" and {len(short) - LISTED} more subjects" if len(short) > LISTED else ""
        raise DataError(
            f"{count} shots were asked for; fewer dev questions are there for {', '.join(short[:LISTED])}{more}.",
            "Give a folder that has dev questions too, or ask for fewer: --shots 0",
        )
    return {subject: dev.get(subject, [])[:count] for subject in subjects}


def prompt(question: Question, stem: str, shots: Sequence[Question]) -> str:
    """The prompt of Hendrycks et al. (Measuring Massive Multitask Language Understanding, ICLR 2021), up to `Answer:`.

    `stem` stands for the question's text, which may have been rewritten; the choices are always the question's own.
    """
    head = f"The following are multiple choice questions (with answers) about {question.subject.replace('_', ' ')}.\n\n"
    shown = "".join(f"{_asked(shot, shot.question)} {LETTERS[shot.answer]}\n\n" for shot in shots)
    return head + shown + _asked(question, stem)


def _asked(question: Question, stem: str) -> str:
    return "\n".join([stem, *(f"{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices, strict=True)), "Answer:"])


def _files(path: Path) -> tuple[list[tuple[Path, str]], list[tuple[Path, str]]]:
    """((file, subject it is of or ''), ...) of dev and of test. Raises DataError where no layout is recognised."""
    if path.is_file():
        if path.name.endswith((".csv", *ENDINGS)):
            return [], [(path, path.stem.removesuffix("_test") if path.suffix == ".csv" else "")]
        raise DataError(f"{path} is no file of questions: its name ends in {path.suffix or 'nothing'}.", LAYOUTS)
    if not path.is_dir():
        raise DataError(f"{path} does not exist.", LAYOUTS)
    if test := _csv(path, "test"):
        return _csv(path, "dev"), test
    folders = [path / "all"] if (path / "all").is_dir() else sorted(f for f in path.iterdir() if f.is_dir() and f.name in NODE_OF)
    for places in (folders, [path]):
        dev, test = ([(file, _of(file.parent)) for place in places for file in _named(place, kind)] for kind in ("dev", "test"))
        if test:
            return dev, test
    found = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in path.iterdir())
    listed = ", ".join(found[:LISTED]) + (", ..." if len(found) > LISTED else "")
    raise DataError(f"{path} holds no test questions; found there: {listed or 'nothing'}.", LAYOUTS)


def _csv(path: Path, kind: str) -> list[tuple[Path, str]]:
    return [(file, file.stem.removesuffix(f"_{kind}")) for file in sorted((path / kind).glob(f"*_{kind}.csv"))]


def _of(folder: Path) -> str:
    return folder.name if folder.name in NODE_OF else ""


def _named(place: Path, kind: str) -> list[Path]:
    """`kind`-*.parquet and the like in a folder, else `kind`.jsonl and the like, else `kind`_sample.jsonl."""
    for pattern in (f"{kind}-*", f"{kind}.*", f"{kind}_sample.*"):
        for ending in ENDINGS:
            if found := sorted(file for file in place.glob(pattern) if file.name.endswith(ending) and file.is_file()):
                return found
    return []


def _questions(file: Path, subject: str, kind: str, problems: list[str]) -> Iterator[Question]:
    """The questions of one file; what is wrong with it goes to `problems`."""
    counts: dict[str, int] = {}
    for line, row in _rows(file, problems):
        found = _question(row, subject, f"{_name(file)}:{line}: ", problems)
        if found is not None:
            number = counts[found.subject] = counts.get(found.subject, -1) + 1
            yield found if found.id else replace(found, id=f"{found.subject}/{kind}/{number}")


def _question(row: Mapping[str, Any], subject: str, where: str, problems: list[str]) -> Question | None:
    """The question of a row, '' as its id where the row has none; None where something is wrong."""
    before = len(problems)
    of, text, choices, answer = row.get("subject") or subject, row.get("question"), row.get("choices"), row.get("answer")
    node = row.get("node") or (NODE_OF.get(of) if isinstance(of, str) else None)
    if not isinstance(of, str) or not of:
        problems.append(f"{where}found {_short(of or None)} as `subject`, expected one of MMLU's 57, or any with a `node`")
    elif not isinstance(node, str):
        near = get_close_matches(of, NODE_OF, 1)
        problems.append(f"{where}found subject {of!r}, which is none of MMLU's 57{f' (did you mean {near[0]}?)' if near else ''}")
    if not isinstance(text, str) or not text.strip():
        problems.append(f"{where}found {_short(text)} as `question`, expected text")
    if not isinstance(choices, list) or len(choices) != len(LETTERS) or not all(isinstance(choice, str) for choice in choices):
        problems.append(f"{where}found {_short(choices)} as `choices`, expected {len(LETTERS)} texts")
    if isinstance(answer, str) and len(letter := answer.strip()) == 1 and letter in LETTERS:
        answer = LETTERS.index(letter)
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(LETTERS):
        problems.append(f"{where}found {_short(answer)} as `answer`, expected 0 to 3 or A to D")
    if len(problems) > before:
        return None
    return Question(str(row.get("id") or ""), str(of), str(node), str(text), tuple(choices or ()), int(answer or 0))


def _rows(file: Path, problems: list[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(line, row) of a file; a row of a Parquet file counts as a line."""
    if file.suffix == ".parquet":
        yield from enumerate(_parquet(file, problems), 1)
        return
    line = 0
    opener = gzip.open if file.suffix == ".gz" else open
    try:
        with opener(file, "rt", encoding="utf-8", newline="" if file.suffix == ".csv" else None) as text:
            for line, row in _cells(text, _name(file), problems) if file.suffix == ".csv" else _objects(text, _name(file), problems):
                yield line, row
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        problems.append(f"{_name(file)}:{line + 1}: cannot be read: {error}")


def _cells(text: Iterable[str], name: str, problems: list[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Rows of an original file: no head; question, four choices, letter. A row may go over several lines: the first one counts."""
    reader = csv.reader(text, strict=True)
    line = 1
    for cells in reader:
        if len(cells) == 2 + len(LETTERS):
            yield line, {"question": cells[0], "choices": cells[1:-1], "answer": cells[-1]}
        elif cells:
            problems.append(f"{name}:{line}: found {len(cells)} columns, expected question, A, B, C, D, letter")
        line = reader.line_num + 1


def _objects(text: Iterable[str], name: str, problems: list[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for line, raw in enumerate(text, 1):
        if not raw.strip():
            continue
        try:
            row = json.loads(raw)
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            problems.append(f"{name}:{line}: holds half of a surrogate pair, which is no character")
            continue
        except (ValueError, RecursionError) as error:
            problems.append(f"{name}:{line}: not JSON ({getattr(error, 'msg', error)}), expected one object a line")
            continue
        if isinstance(row, dict):
            yield line, row
        else:
            problems.append(f"{name}:{line}: found {type(row).__name__}, expected an object with question, choices, answer, subject")


def _parquet(file: Path, problems: list[str]) -> list[Mapping[str, Any]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise MissingExtra(f"Reading {file.name}", package="pyarrow") from error
    try:
        rows: list[Mapping[str, Any]] = parquet.read_table(file).to_pylist()
    except (OSError, ValueError, NotImplementedError) as error:  # what pyarrow's own exceptions are
        problems.append(f"{_name(file)}:1: cannot be read as Parquet: {error}")
        return []
    return rows


def _name(file: Path) -> str:
    """With its folder: many subjects have a test.jsonl each."""
    return f"{file.parent.name}/{file.name}"


def _short(value: Any) -> str:
    return "nothing" if value is None else f"{value!r:.60}"
