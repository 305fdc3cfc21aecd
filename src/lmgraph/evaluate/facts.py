"""Plain facts of a question's text and of its options, as numbers. Pure.

They are what anybody sees at a glance: how long, how many digits, how many options, an option that says "none of the above". It knows no
answers and no models. Facts of options are facts of a set of questions, too: in MMLU-Pro, where most wrong options were written by a
language model, they alone say something about which one is right.
"""

from __future__ import annotations

import math
import re

from lmgraph.vote import OPTION

FACTS = ("length", "options", "digits", "formula", "blank", "question", "lines")
"""of a question, without the texts of its options"""
LIST_FACTS = ("option length", "option digits", "short options")
"""of all its options together"""
OPTION_FACTS = ("length", "rank", "relative length", "has digits", "digits", "none or all")
"""of one option"""
ALL = re.compile(r"\b(?:none|all) of (?:the|these|those)\b", re.IGNORECASE)


def options_of(query: str) -> list[str]:
    """The texts of the options that a multiple-choice question lists, [] where it lists none.

    As `vote.option_count` counts them: at least two lines that begin with A. or A) or (A), then B, C, ...; of several lists the last.
    """
    marks = _marks(query)
    begins = [m.start() for m in marks] + [len(query)]
    return [query[m.end() : following].strip() for m, following in zip(marks, begins[1:], strict=True)]


def _marks(query: str) -> list[re.Match[str]]:
    """What stands before each option."""
    found: list[re.Match[str]] = []
    run: list[re.Match[str]] = []
    for mark in OPTION.finditer(query):
        place = ord(mark[1] or mark[2]) - ord("A")
        if place == 0:
            run = []
        if place == len(run):
            run.append(mark)
        if len(run) > 1:
            found = run
    return found


def of_question(query: str) -> list[float]:
    """One number for each of FACTS, then one for each of LIST_FACTS."""
    options = options_of(query)
    stem = query[: _marks(query)[0].start()] if options else query
    joined = " ".join(options)
    return [
        math.log1p(len(stem)),
        len(options),
        _digits(stem),
        float("\\" in stem or "=" in stem),
        float("_" in stem),
        float("?" in stem),
        min(stem.count("\n"), 20),
        math.log1p(len(joined) / max(1, len(options))),
        _digits(joined),
        sum(len(option) < 25 and _digits(option) > 0 for option in options) / max(1, len(options)),
    ]


def of_options(query: str, most: int) -> list[list[float]]:
    """`most` rows of one number for each of OPTION_FACTS; an option that is not there has not-a-number."""
    options = options_of(query)[:most]
    lengths = [len(option) for option in options]
    mean = sum(lengths) / max(1, len(lengths)) or 1.0
    rows = [
        [
            math.log1p(len(option)),
            sum(other < len(option) for other in lengths) / len(lengths),
            len(option) / mean,
            float(_digits(option) > 0),
            _digits(option),
            float(bool(ALL.search(option))),
        ]
        for option in options
    ]
    return rows + [[math.nan] * len(OPTION_FACTS)] * (most - len(rows))


def _digits(text: str) -> float:
    """The share of its characters."""
    return sum(map(str.isdigit, text)) / max(1, len(text))
