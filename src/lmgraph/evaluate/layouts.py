"""Files of recorded answers -> rows: MMLU-Pro, RouterBench and lmgraph's own JSON Lines and CSV, told apart by what they hold.

It knows how each layout writes a question, its category and what every model made of it. It knows no sizes or prices of models and
puts no table together (outcomes.py). A pickle is never opened. Problems are gathered, each with its file and line.
"""

from __future__ import annotations

import ast
import csv
import gzip
import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

from lmgraph.errors import DataError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MOST = 10
"""problems after which reading stops"""
CELL = 1 << 24
"""characters of the longest cell of a CSV file"""
MODEL, COST, RESPONSE = "model:", "|total_cost", "|model_response"
PLAIN = ("id", "query", "category", "answer", "options")
FORMS = (
    'Expected JSON Lines with "outcomes" (or MMLU-Pro\'s "predictions"), CSV with columns model:NAME, or RouterBench: see docs/outcomes.md.'
)


@dataclass(frozen=True)
class Row:
    """One question. A model without a recorded answer is not in `scores`, one that gave no letter not in `letters`."""

    line: int
    id: str
    """'' where the file gives none"""
    query: str
    category: str
    truth: str
    """the right answer; a letter where models answered with letters"""
    options: int
    """how many there are to choose from, 0 when unknown"""
    scores: Mapping[str, float]
    """model -> 0 (wrong) to 1 (right)"""
    letters: Mapping[str, str] = field(default_factory=dict)
    costs: Mapping[str, float] = field(default_factory=dict)
    """model -> what this one answer cost"""


def read(path: Path) -> list[Row]:
    """Every row of a file (gzip-compressed ones too), in its order. Raises DataError with up to ten problems, file and line named."""
    rows: list[Row] = []
    problems: list[str] = []
    line = 0
    try:
        with _open(path) as file:
            for line, found in _rows(file):
                if isinstance(found, Row):
                    rows.append(found)
                else:
                    problems += [f"{path.name}:{line}: {text}" for text in found]
                if len(problems) >= MOST:
                    break
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist.", FORMS) from error
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path.name}:{line + 1}: cannot be read: {error}.", f"{FORMS} Text is UTF-8.") from error
    if not problems and not rows:
        problems = [f"{path.name} holds no rows."]
    refuse(path.name, problems, FORMS)
    return rows


def refuse(name: str, problems: Sequence[str], hint: str) -> None:
    """Raise DataError with a file's problems, if there are any; the first ten are shown."""
    if len(problems) == 1:
        raise DataError(problems[0], hint)
    if problems:
        listed = "".join(f"\n  - {text}" for text in problems[:MOST])
        raise DataError(f"{name} has {len(problems)}{' or more' if len(problems) >= MOST else ''} problems:{listed}", hint)


def brief(value: Any) -> str:
    """A value as a message shows it."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _open(path: Path) -> TextIO:
    """The text of a file that is no pickle."""
    with path.open("rb") as plain:
        start = plain.read(2)
    packed = start == b"\x1f\x8b"
    if packed:
        with gzip.open(path) as file:
            start = file.read(2)
    if (
        path.name.removesuffix(".gz").endswith((".pkl", ".pickle")) or start[:1] == b"\x80"
    ):  # no UTF-8 text begins so, every newer pickle does
        export = f"import pandas; pandas.read_pickle({str(path)!r}).to_csv({path.name.split('.')[0] + '.csv'!r}, index=False)"
        raise DataError(
            f"{path} is a pickle, which lmgraph does not open: a pickle runs whatever code its maker put into it.",
            f'If you trust where it comes from, export it and give the CSV:\n  python -c "{export}"',
        )
    return gzip.open(path, "rt", encoding="utf-8-sig", newline="") if packed else path.open(encoding="utf-8-sig", newline="")


def _rows(file: TextIO) -> Iterator[tuple[int, Row | list[str]]]:
    """(line, row or its problems) of a text in any layout."""
    first = next((line.lstrip() for line in file if line.strip()), "")
    file.seek(0)
    if first.startswith("["):
        yield 1, ["found a JSON array, expected one object a line"]
    else:
        yield from _of_json(file) if first.startswith("{") else _of_csv(file)


def _of_json(file: TextIO) -> Iterator[tuple[int, Row | list[str]]]:
    layout: _Layout | None = None
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
            if "\\ud" in line.lower():
                json.dumps(data, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            yield number, ["holds half of a surrogate pair, which is no character"]
            continue
        except (ValueError, RecursionError) as error:
            yield number, [f"not JSON ({getattr(error, 'msg', error)})"]
            continue
        if not isinstance(data, dict):
            yield number, [f"found {brief(data)}, expected an object"]
            continue
        layout = layout or next((known for key, known in _BY_KEY.items() if key in data), None)
        if layout is None:
            yield number, [f"expected one of the keys {', '.join(_BY_KEY)}; found {', '.join(data) or 'none'}"]
            return
        yield number, _Reading(data).row(number, layout)


def _of_csv(file: TextIO) -> Iterator[tuple[int, Row | list[str]]]:
    csv.field_size_limit(max(CELL, csv.field_size_limit()))
    reader = csv.reader(file, strict=True)
    head: list[str] = []
    line = 1
    try:
        for cells in reader:
            if not head and any(cells):
                head = [MODEL + name.strip()[len(MODEL) :].strip() if name.strip().startswith(MODEL) else name.strip() for name in cells]
                if problems := _strange(head):
                    yield line, problems
                    return
            elif any(cells) and len(cells) != len(head):
                yield line, [f"found {len(cells)} cells, expected {len(head)} as in the header"]
            elif any(cells):
                yield line, _Reading(dict(zip(head, cells, strict=True))).row(line, _routerbench if "eval_name" in head else _columns)
            line = reader.line_num + 1
    except csv.Error as error:
        yield line, [f"not CSV ({error})"]


def _strange(head: Sequence[str]) -> list[str]:
    """What is wrong with a CSV file's columns."""
    problems = [f"column {brief(name)} is there twice" for name in sorted({name for name in head if head.count(name) > 1})]
    if "eval_name" in head:
        return problems
    if not any(name.startswith(MODEL) for name in head):
        mark = next((mark for mark in ";\t|" if len(head) == 1 and mark in head[0]), "")
        found = f"cells parted by {mark!r}, expected commas" if mark else f"the columns {', '.join(map(brief, head))}"
        return [f"found {found}; expected one column {MODEL}NAME for each model"]
    return problems + [
        f"unknown column {brief(name)}; valid: {', '.join(PLAIN)}, and {MODEL}NAME for a model"
        for name in head
        if name not in PLAIN and not name.startswith(MODEL)
    ]


class _Reading:
    """One row on its way: takes values out of the file's object and gathers what is wrong with them."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.data = data
        self.problems: list[str] = []

    def row(self, line: int, layout: _Layout) -> Row | list[str]:
        row = layout(self, line)
        for name in row.scores:
            if not name.strip() or not name.isprintable():
                self.problems.append(f"found {brief(name)} as a model's name, expected text on one line")
        return self.problems or row

    def text(self, key: str) -> str:
        """A text (a whole number is one too), '' where there is none."""
        value = self.data.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if value is not None and not isinstance(value, str):
            self.problems.append(f"{key}: found {brief(value)}, expected text")
        return value if isinstance(value, str) and value.strip() else ""

    def answer(self) -> str:
        """The right answer; a single letter is a capital."""
        truth = self.text("answer").strip()
        return _letter(truth) or truth

    def options(self) -> tuple[int, list[str]]:
        """How many options there are (0 unknown), and which, where they are written out."""
        value = self.data.get("options")
        listed = value if isinstance(value, list) and all(isinstance(item, str) for item in value) else []
        count = len(value) if isinstance(value, list) else value or 0
        if isinstance(count, str) and count.strip().isdecimal():
            count = int(count[:9])
        if (
            (isinstance(value, list) and not listed)
            or isinstance(count, bool)
            or not isinstance(count, int)
            or not 0 <= count <= len(LETTERS)
        ):
            self.problems.append(f"options: found {brief(value)}, expected a list of texts, or their number, at most {len(LETTERS)}")
            return 0, []
        return count, listed

    def models(self, key: str) -> Mapping[str, Any]:
        """An object of model -> what it answered."""
        value = self.data.get(key)
        if not isinstance(value, dict):
            self.problems.append(f"{key}: found {brief(value)}, expected an object of models" if key in self.data else f"needs {key!r}")
            return {}
        return value

    def outcome(self, model: str, value: Any, truth: str) -> tuple[float, str] | None:
        """(score, letter or '') of a cell, None where nothing is recorded."""
        text = value.strip() if isinstance(value, str) else ""
        if value is None or (isinstance(value, str) and not text):
            return None
        if isinstance(value, bool) or text.lower() in ("true", "false"):
            return float(value is True or text.lower() == "true"), ""
        if letter := _letter(text):
            return float(letter == truth), letter
        number = _number(value)
        if number is None or not 0 <= number <= 1:
            self.problems.append(f"{model}: found {brief(value)}, expected 0 to 1, true or false, or a letter")
            return None
        return number, ""


def _letter(text: str) -> str:
    """The capital of a single letter, '' for anything else."""
    letter = text.upper()
    return letter if len(letter) == 1 and letter in LETTERS else ""


def _number(value: Any) -> float | None:
    try:
        number = float(value) if isinstance(value, (int, float, str)) else math.nan
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _row(reading: _Reading, line: int, cells: Mapping[str, Any]) -> Row:
    truth, query = reading.answer(), reading.text("query")
    count, listed = reading.options()
    if count and _letter(truth) and truth > LETTERS[count - 1]:
        reading.problems.append(f"answer: found {truth}, the last of {count} options is {LETTERS[count - 1]}")
    found = {model: outcome for model, value in cells.items() if (outcome := reading.outcome(model, value, truth))}
    scores = {model: score for model, (score, _) in found.items()}
    letters = {model: letter for model, (_, letter) in found.items() if letter}
    if letters and not _letter(truth):
        reading.problems.append(f"answer: found {brief(truth)}, expected a letter, for {next(iter(letters))} answered with one")
    asked = "\n".join([query, *(f"{letter}. {option}" for letter, option in zip(LETTERS, listed))]) if query else ""
    return Row(line, reading.text("id").strip(), asked, reading.text("category").strip(), truth, count, scores, letters)


def _objects(reading: _Reading, line: int) -> Row:
    """lmgraph's own JSON Lines."""
    return _row(reading, line, reading.models("outcomes"))


def _columns(reading: _Reading, line: int) -> Row:
    """lmgraph's own CSV."""
    return _row(reading, line, {name[len(MODEL) :].strip(): cell for name, cell in reading.data.items() if name.startswith(MODEL)})


def _mmlu_pro(reading: _Reading, line: int) -> Row:
    """MMLU-Pro (Wang et al. 2024) with the letters of models; null, where no letter was found in the answer, is wrong."""
    reading.data = {**reading.data, "query": reading.data.get("question")}
    cells = {model: False if value is None else value for model, value in reading.models("predictions").items()}
    return _row(reading, line, cells)


def _routerbench(reading: _Reading, line: int) -> Row:
    """RouterBench (Hu et al. 2024) as pandas exports it; a column is a model where a cost or a response column belongs to it."""
    data = reading.data
    names = [name for name in data if f"{name}{COST}" in data or f"{name}{RESPONSE}" in data]
    if not names:
        reading.problems.append(f"found no model, expected columns NAME, NAME{RESPONSE} and NAME{COST}")
    reading.data = {"id": data.get("sample_id"), "query": data.get("prompt"), "category": data.get("eval_name")}
    row = _row(reading, line, {name: data[name] for name in names})
    costs = {}
    for name in row.scores:
        value = data.get(f"{name}{COST}")
        if value not in (None, ""):
            costs[name] = _number(value) or 0.0
            if _number(value) is None or costs[name] < 0:
                reading.problems.append(f"{name}{COST}: found {brief(value)}, expected a number from 0")
    return replace(row, query=_turns(row.query), costs=costs)


def _turns(prompt: str) -> str:
    """RouterBench writes a prompt as the Python list of its turns."""
    try:
        turns = ast.literal_eval(prompt) if prompt.startswith("[") else None
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return prompt
    return "\n\n".join(turns) if isinstance(turns, list) and all(isinstance(turn, str) for turn in turns) else prompt


_Layout = Callable[[_Reading, int], Row]
_BY_KEY: Mapping[str, _Layout] = {"outcomes": _objects, "predictions": _mmlu_pro, "eval_name": _routerbench}
