"""Training examples: JSON Lines of {query, node, rewrite?, lang?, style?, subject?} -> ids and which of them are learnt.

It knows files, splits and the joining of prompts.py with tokens.py. It knows no model; the tokenizer is a function.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, TypeVar

from lmgraph import prompts, tokens
from lmgraph.errors import DataError

Encode = Callable[[str, bool], list[int]]
"""(text, special) -> ids; with special=False, special tokens in the text stay plain text."""


@dataclass(frozen=True)
class Example:
    """One labelled query. `rewrite` is '' where only the choice is taught."""

    query: str
    node: str
    rewrite: str = ""
    lang: str = "en"
    style: str = ""
    subject: str = ""


@dataclass(frozen=True)
class Encoded:
    """`ids` of prompts and decisions, and which of them are learnt: what was chosen, and what was written for the chosen one."""

    ids: list[int]
    choices: tuple[int, ...]
    """indexes of what is chosen: functional tokens, and from the second on the end token"""
    written: tuple[range, ...] = ()
    """indexes of requests with their end tokens"""
    begins: bool = True
    """whether the first of the choices is a walk's first, which cannot be the end"""

    @property
    def start(self) -> int:
        """Index of the first choice: what stands before it is the prompt."""
        return self.choices[0]

    def after(self, token: int) -> Encoded:
        """The same ids, of which only what follows the choice of `token` is learnt: choices (maybe none) and their requests."""
        at = [here for before, here in pairwise(self.choices) if self.ids[before] == token]
        return Encoded(self.ids, tuple(at), tuple(span for span in self.written if span.start - 1 in at), begins=False)


def load(paths: Iterable[Path]) -> list[Example]:
    """Read files (.jsonl or .jsonl.gz); MMLU's own `question` counts as `query`. Raises DataError naming file and line."""
    examples = [_parse(row, where) for row, where in lines(paths)]
    if not examples:
        raise DataError("No examples found.", "Expected JSON Lines with query, node and (optional) rewrite.")
    return examples


def lines(paths: Iterable[Path]) -> Iterator[tuple[dict[str, Any], str]]:
    """(object, "file:line") of each line that is not empty. Raises DataError naming file and line."""
    for path in paths:
        if not path.exists():
            raise DataError(f"{path} does not exist.", "Expected JSON Lines with query, node and (optional) rewrite.")
        opener = gzip.open if path.suffix == ".gz" else open
        number = 0
        try:
            with opener(path, "rt", encoding="utf-8") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield _object(line, f"{path.name}:{number}"), f"{path.name}:{number}"
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            raise DataError(
                f"{path.name}:{number + 1}: cannot be read: {error}.",
                "Expected JSON Lines in UTF-8, gzip-compressed where the name ends in .gz.",
            ) from error


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: holds half of a surrogate pair, which is no character.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: not JSON ({getattr(error, 'msg', error)}).", 'Each line is one object: {"query": ..., "node": ...}'
        ) from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: found {type(row).__name__}, expected an object.")
    return row


def _parse(row: dict[str, Any], where: str) -> Example:
    query = row.get("query", row.get("question"))
    node = row.get("node")
    if not isinstance(query, str) or not query.strip() or not isinstance(node, str) or not node:
        raise DataError(f"{where}: needs a non-empty string `query` and `node`; found keys {sorted(row)}.")
    values = {key: row.get(key) or "" for key in ("rewrite", "style", "subject")}
    if not all(isinstance(value, str) for value in values.values()):
        raise DataError(f"{where}: rewrite, style and subject are strings where given.")
    return Example(query, node, lang=str(row.get("lang") or "en"), **values)


class Asked(Protocol):
    """What has a query: an example, a task."""

    @property
    def query(self) -> str:
        """The query."""
        ...


Query = TypeVar("Query", bound=Asked)


def held_out(example: Asked, percent: int) -> bool:
    """Whether the example belongs to the part kept aside: decided by a hash of the query, so it never moves."""
    return int(hashlib.sha256(example.query.encode()).hexdigest(), 16) % 100 < percent


def split(examples: Sequence[Query], percent: int = 10) -> tuple[list[Query], list[Query]]:
    """(training part, part kept aside); the same query is always on the same side, whatever the order or other data."""
    kept = [e for e in examples if held_out(e, percent)]
    return [e for e in examples if not held_out(e, percent)], kept


def encode(example: Example, vocabulary: tokens.Vocabulary, encode_text: Encode, limit: int, ends: bool = False) -> Encoded:
    """Join prompt and decision. The query is shortened to `limit` tokens as in serving.

    Without a rewrite the example ends with the functional token: nothing is taught about what follows. `ends`: that the walk ends
    after this step is taught, too.
    """
    ids = prompt(example.query, vocabulary, encode_text, limit)
    start = len(ids)
    if example.rewrite:
        ids += tokens.encode(vocabulary, example.node, encode_text(tokens.quote(vocabulary.dialect, example.rewrite), False))
    else:
        ids += [vocabulary.id_of(example.node), *([vocabulary.end_id] if ends else [])]
    written = (range(start + 1, len(ids)),) if example.rewrite else ()
    if not ends:
        return Encoded(ids, (start,), written)
    ids += [i for segment in prompts.passed("", vocabulary.dialect) for i in encode_text(segment.text, segment.special)]
    return Encoded([*ids, vocabulary.end_id], (start, len(ids)), written)


def prompt(query: str, vocabulary: tokens.Vocabulary, encode_text: Encode, limit: int) -> list[int]:
    """Ids up to the first choice."""
    head, body, tail = prompts.render(query, vocabulary.dialect)
    ids, _ = prompts.shorten(encode_text(body.text, body.special), limit)
    return encode_text(head.text, head.special) + ids + encode_text(tail.text, tail.special)
