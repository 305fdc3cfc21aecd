"""Recorded answers of many models to the same questions: one table, and what is known of the models.

It knows questions, categories, who was right, and what a model weighs and costs. It asks no model and knows no graph but for the
form of a `worker`; how the files are laid out is layouts.py's.
"""

from __future__ import annotations

import difflib
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lmgraph import graphfile
from lmgraph.errors import DataError, GraphError
from lmgraph.evaluate import layouts
from lmgraph.evaluate.layouts import Row, brief

FIELDS = ("name", "billion_parameters", "cost", "worker")
FORM = 'Expected {"models": [{"name": ..., "billion_parameters": ..., "cost": ..., "worker": {...}}]}; all but the name may be left out.'


@dataclass(frozen=True)
class Model:
    """A model whose answers were recorded."""

    name: str
    billions: float | None = None
    """parameters, in billions"""
    cost: float | None = None
    """of 1,000 queries, in any currency"""
    worker: Mapping[str, Any] | None = None
    """what stands under `worker` in graph.yaml to use it"""


@dataclass(frozen=True, eq=False)
class Table:
    """Q questions times M models. Texts are '' where the file does not know them."""

    ids: tuple[str, ...]
    queries: tuple[str, ...]
    """as a user would send them: a multiple-choice question has its options as lines "A. ..." below it"""
    categories: tuple[str, ...]
    options: tuple[int, ...]
    """how many there are to choose from, 0 when unknown"""
    models: tuple[Model, ...]
    right: np.ndarray
    """(Q, M) float64: 0 (wrong) to 1 (right), NaN where not recorded"""
    letters: tuple[tuple[str, ...], ...] | None
    """(Q x M) the option each model chose, '' where it gave none; None when the file has only scores"""
    truth: tuple[str, ...]
    """the right answer, '' when unknown"""

    def select(self, models: Sequence[str]) -> Table:
        """The table of these models only, in this order. Raises DataError that names unknown and repeated ones."""
        valid = [model.name for model in self.models]
        for name in models:
            if name not in valid:
                raise DataError(f"No model is called {name!r}.", f"Valid: {', '.join(nearest(name, valid))}")
        if not models or len(set(models)) < len(models):
            raise DataError(f"Expected at least one model and each once; found {', '.join(models) or 'none'}.")
        columns = [valid.index(name) for name in models]
        letters = None if self.letters is None else tuple(tuple(row[c] for c in columns) for row in self.letters)
        return replace(self, models=tuple(self.models[c] for c in columns), right=self.right[:, columns], letters=letters)

    def rows(self, indices: Sequence[int] | np.ndarray) -> Table:
        """The table of these questions only, in this order; an array of truth values picks those that are true."""
        index = np.asarray(indices)
        chosen = np.arange(len(self.ids))[index if index.size else index.astype(np.int64)]

        def of(values: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(values[i] for i in chosen)

        return replace(
            self,
            ids=of(self.ids),
            queries=of(self.queries),
            categories=of(self.categories),
            options=of(self.options),
            right=self.right[chosen],
            letters=None if self.letters is None else of(self.letters),
            truth=of(self.truth),
        )


def nearest(name: str, valid: Iterable[str]) -> list[str]:
    """The valid names, those most like `name` first."""
    return sorted(valid, key=lambda other: -difflib.SequenceMatcher(None, name.casefold(), other.casefold()).ratio())


def joined(one: Table, other: Table) -> Table:
    """The questions of both, with the models of `one`.

    Raises DataError where `other` lacks a model, where only one of them has letters, and where a question is in both: questions are the
    same whose texts are, and, where a text is missing, whose ids are.
    """
    has = [model.name for model in other.models]
    both = [model.name for model in one.models if model.name in has]
    if lacking := [model.name for model in one.models if model.name not in has]:
        raise DataError(
            f"The table to judge on records no answer of {', '.join(lacking)}.",
            f"Name models that both have: {' '.join(f'--only {shlex.quote(name)}' for name in both)}"
            if both
            else f"It has: {', '.join(has)}.",
        )
    if (one.letters is None) != (other.letters is None):
        raise DataError("One of the two tables holds letters and the other scores alone.", "Expected letters in both, or scores in both.")
    texts, ids = set(one.queries) - {""}, dict(zip(one.ids, one.queries, strict=True))
    known = [
        query in texts or (number in ids and not (query and ids[number])) for number, query in zip(other.ids, other.queries, strict=True)
    ]
    if any(known):
        raise DataError(
            f"Question {other.ids[known.index(True)]!r} of the table to judge on is also in the table to learn from ({sum(known)} are): "
            "its own outcome would reach the policy.",
            "Take it out of one of them. Without texts, ids tell questions apart (numbered from 1 where the file has none).",
        )
    other = other.select([model.name for model in one.models])
    return replace(
        one,
        ids=(*one.ids, *other.ids),
        queries=(*one.queries, *other.queries),
        categories=(*one.categories, *other.categories),
        options=(*one.options, *other.options),
        right=np.vstack([one.right, other.right]),
        letters=None if one.letters is None or other.letters is None else (*one.letters, *other.letters),
        truth=(*one.truth, *other.truth),
    )


def load(path: Path, models: Path | None = None) -> Table:
    """A table from a file in any layout of layouts.py; sizes, costs and workers from a models file (models.json beside it when None).

    Questions without an id are numbered from 1. A cost that the table itself records (RouterBench) is the mean over its answers,
    times 1,000; the models file wins. Raises DataError with every problem found, up to ten.
    """
    rows = layouts.read(path)
    names = list(dict.fromkeys(name for row in rows for name in row.scores))
    if not names:
        raise DataError(f"{path.name} records no answer of any model.", layouts.FORMS)
    ids = [row.id or str(number) for number, row in enumerate(rows, 1)]
    _check_ids(path.name, ids, rows)
    column = {name: i for i, name in enumerate(names)}
    right = np.full((len(rows), len(names)), np.nan)
    for i, row in enumerate(rows):
        for name, score in row.scores.items():
            right[i, column[name]] = score
    known = {model.name: model for model in _beside(path, models, names)}
    return Table(
        tuple(ids),
        tuple(row.query for row in rows),
        tuple(row.category for row in rows),
        tuple(row.options for row in rows),
        tuple(_priced(known.get(name, Model(name)), rows) for name in names),
        right,
        tuple(tuple(row.letters.get(name, "") for name in names) for row in rows) if any(row.letters for row in rows) else None,
        tuple(row.truth for row in rows),
    )


def _check_ids(name: str, ids: Sequence[str], rows: Sequence[Row]) -> None:
    first: dict[str, int] = {}
    problems = []
    for given, row in zip(ids, rows, strict=True):
        if first.setdefault(given, row.line) != row.line:
            problems.append(f"{name}:{row.line}: id {brief(given)} stands already in line {first[given]}")
    layouts.refuse(name, problems, "Every question has an id of its own, or none has one and they are numbered.")


def _priced(model: Model, rows: Sequence[Row]) -> Model:
    costs = [row.costs[model.name] for row in rows if model.name in row.costs]
    return replace(model, cost=float(np.mean(costs)) * 1000) if costs and model.cost is None else model


def _beside(path: Path, models: Path | None, names: Sequence[str]) -> list[Model]:
    """The models file's entries: the one given (which must know at least one of the names), or the one beside the table."""
    if models is None:
        default = path.with_name("models.json")
        return read_models(default) if default.is_file() else []
    found = read_models(models)
    if not {model.name for model in found} & set(names):
        raise DataError(f"{models.name} knows none of the models of {path.name}.", f"Models there: {', '.join(names)}")
    return found


def read_models(path: Path) -> list[Model]:
    """A models file, JSON or YAML. Raises DataError with every problem, file and line named."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}.", FORM) from error
    try:
        data = json.loads(text) if text.lstrip().startswith("{") else yaml.safe_load(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path.name}:{error.lineno}: not JSON ({error.msg}).", FORM) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        raise DataError(f"{path.name}:{mark.line + 1 if mark else 1}: not YAML ({getattr(error, 'problem', error)}).", FORM) from error
    entries = data.get("models") if isinstance(data, dict) else None
    if not isinstance(entries, list):
        raise DataError(f"{path.name}:1: found {brief(data)}, expected a mapping with a list of models.", FORM)
    lines = _lines(text)
    problems: list[str] = []
    found: dict[str, Model] = {}
    for number, entry in enumerate(entries):
        where = f"{path.name}:{lines[number] if number < len(lines) else 1}"
        said = _wrong(entry)
        if not said and entry["name"] in found:
            said = [f"{entry['name']} is there twice"]
        problems += [f"{where}: {text}" for text in said]
        if not said:
            billions, cost = entry.get("billion_parameters"), entry.get("cost")
            found[entry["name"]] = Model(
                entry["name"], None if billions is None else float(billions), None if cost is None else float(cost), entry.get("worker")
            )
    layouts.refuse(path.name, problems, FORM)
    return list(found.values())


def _lines(text: str) -> list[int]:
    """The line each model begins at. JSON is YAML but for tabs between its parts."""
    try:
        root = yaml.compose(text.replace("\t", " "), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError, ValueError):
        return []
    pairs = root.value if isinstance(root, yaml.MappingNode) else []
    return [item.start_mark.line + 1 for key, value in pairs if key.value == "models" for item in value.value]


def _wrong(entry: Any) -> list[str]:
    """What is wrong with one entry of a models file."""
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str) or not entry["name"].strip():
        return [f"found {brief(entry)}, expected a model with a name"]
    name = entry["name"]
    problems = [f"{name}: unknown key {brief(key)}; valid: {', '.join(FIELDS)}" for key in entry if key not in FIELDS]
    for key, low in (("billion_parameters", "above"), ("cost", "from")):
        value = entry.get(key)
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e12
        if value is not None and (not number or (value == 0 and low == "above")):
            problems.append(f"{name}: {key}: found {brief(value)}, expected a number {low} 0")
    if entry.get("worker") is not None:
        node = {"token": 0, "description": "", "worker": entry["worker"]}
        try:
            graphfile.of_dict({"version": 1, "nodes": {"model": node}, "edges": {"start": ["*"]}})
        except GraphError as error:
            problems += [f"{name}: {text.removeprefix('nodes.model.')}" for text in error.problems]
    return problems
