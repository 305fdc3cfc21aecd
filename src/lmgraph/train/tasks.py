"""Tasks that need several experts: JSON Lines of {query, steps: [{node, needs, rewrite, answer?}], lang?} -> ids and what is learnt.

A task is taught in the forms that serving meets: as a plan (nothing answered yet) or as a walk (each step answered before the next choice,
or the first steps only), and besides without requests: that is what serving meets where the query is too long to be rewritten, and it
teaches the choices once more at a third of the cost. It knows files and the joining of prompts.py with
tokens.py; it knows no model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lmgraph import plan, prompts, tokens
from lmgraph.errors import DataError
from lmgraph.train.examples import Encode, Encoded, lines, prompt

KEPT = 20
"""percent of tasks that are kept aside (`examples.held_out`)"""
PLAN, BARE = 0, -1
"""how a task is taught (otherwise a number: so many of its first steps have been answered): nothing answered; without requests"""
EXPECTED = 'Each line: {"query": ..., "steps": [{"node": ..., "needs": [0-based earlier steps], "rewrite": "... {0}"}, ...]}'


@dataclass(frozen=True)
class Task:
    """A query and the steps that answer it, in the order in which they run; one step for a query that needs one expert only."""

    query: str
    steps: tuple[plan.Request, ...]
    answers: tuple[str, ...] = ()
    """what workers said to the steps, where that is recorded"""
    lang: str = "en"


def load(paths: Iterable[Path]) -> list[Task]:
    """Read files (.jsonl or .jsonl.gz); a line with `node` in place of `steps` is a task of one step.

    Raises DataError naming file and line.
    """
    found = [_parse(line, where) for line, where in lines(paths)]
    if not found:
        raise DataError("No tasks found.", EXPECTED)
    return found


def _parse(row: Mapping[str, Any], where: str) -> Task:
    query, steps = row.get("query"), row.get("steps", [row] if "node" in row else None)
    if not isinstance(query, str) or not query.strip() or not isinstance(steps, list) or not steps:
        raise DataError(f"{where}: needs a non-empty string `query` and a list `steps`; found keys {sorted(row)}.", EXPECTED)
    made, answers = [], []
    for number, step in enumerate(steps):
        node, text, answer = (step.get(key, "") if isinstance(step, dict) else None for key in ("node", "rewrite", "answer"))
        needs = step.get("needs", []) if isinstance(step, dict) else None
        if not isinstance(node, str) or not node or not isinstance(text, str) or not isinstance(answer, str):
            raise DataError(f"{where}: step {number} needs a string `node`; `rewrite` and `answer` are strings where given.", EXPECTED)
        if not isinstance(needs, list) or not all(type(need) is int and 0 <= need < number for need in needs):
            raise DataError(f"{where}: step {number} needs {json.dumps(needs)}, expected numbers of steps before it, from 0.", EXPECTED)
        if text and set(needs) != set(plan.needs(text)):
            raise DataError(
                f"{where}: step {number} needs {needs}, its rewrite names {list(plan.needs(text))}.",
                "Expected {i} in the rewrite for each i in needs.",
            )
        made.append(plan.Request(node, text, tuple(needs)))
        answers.append(answer)
    return Task(query, tuple(made), tuple(answers) if all(answers) else (), str(row.get("lang") or "en"))


def encode(task: Task, vocabulary: tokens.Vocabulary, encode_text: Encode, limit: int, form: int = PLAN) -> Encoded:
    """The whole walk as one sequence: prompt, then for each step choice, request and what follows it, and the end.

    `form`: PLAN, BARE, or how many of the first steps have been answered. A task without answers is taught as a plan.
    """
    ids = prompt(task.query, vocabulary, encode_text, limit)
    choices, written = [], []
    for number, step in enumerate(task.steps):
        choices.append(len(ids))
        text = step.text if form != BARE else ""
        ids += tokens.encode(vocabulary, step.node, encode_text(tokens.quote(vocabulary.dialect, text), False) if text else [])
        if text:
            written.append(range(choices[-1] + 1, len(ids)))
        answer = task.answers[number] if number < form and task.answers else ""
        for segment in prompts.passed(answer, vocabulary.dialect):
            told = encode_text(segment.text, segment.special)
            ids += told if segment.special else prompts.shorten(told, prompts.ANSWER_LIMIT)[0]
    return Encoded([*ids, vocabulary.end_id], (*choices, len(ids)), tuple(written))


def bare(task: Task) -> Task:
    """The task without its requests and answers: it teaches the choices only."""
    return replace(task, steps=tuple(replace(step, text="") for step in task.steps), answers=())


def forms(tasks: Sequence[Task]) -> list[int]:
    """A form for each task: half are walks, as far as answers are recorded, the rest plans. (BARE is for all of them, besides.)

    Every second walk has answers of its first steps only: whether another step will follow is asked before a step is answered.
    """
    found, plans, walks = [], 0, 0
    for task in tasks:
        if task.answers and walks < plans:
            found.append(len(task.steps) if walks % 2 else 1 + walks // 2 % max(1, len(task.steps) - 1))
            walks += 1
        else:
            found.append(PLAN)
            plans += 1
    return found
