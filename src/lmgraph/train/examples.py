"""Training examples: JSON Lines of {query, node, rewrite?, lang?, style?, subject?} -> ids and which of them are learnt.

It knows files, splits and the joining of prompts.py with tokens.py. It knows no model; the tokenizer is a function.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

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
    """`ids` of prompt and decision; `start` is the index of the functional token (what stands before it is not learnt)."""

    ids: list[int]
    start: int


def load(paths: Iterable[Path]) -> list[Example]:
    """Read files (.jsonl or .jsonl.gz); MMLU's own `question` counts as `query`. Raises DataError naming file and line."""
    examples: list[Example] = []
    for path in paths:
        if not path.exists():
            raise DataError(f"{path} does not exist.", "Expected JSON Lines with query, node and (optional) rewrite.")
        opener = gzip.open if path.suffix == ".gz" else open
        number = 0
        try:
            with opener(path, "rt", encoding="utf-8") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        examples.append(_parse(line, f"{path.name}:{number}"))
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            raise DataError(
                f"{path.name}:{number + 1}: cannot be read: {error}.",
                "Expected JSON Lines in UTF-8, gzip-compressed where the name ends in .gz.",
            ) from error
    if not examples:
        raise DataError("No examples found.", "Expected JSON Lines with query, node and (optional) rewrite.")
    return examples


def _parse(line: str, where: str) -> Example:
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
    query = row.get("query", row.get("question"))
    node = row.get("node")
    if not isinstance(query, str) or not query.strip() or not isinstance(node, str) or not node:
        raise DataError(f"{where}: needs a non-empty string `query` and `node`; found keys {sorted(row)}.")
    values = {key: row.get(key) or "" for key in ("rewrite", "style", "subject")}
    if not all(isinstance(value, str) for value in values.values()):
        raise DataError(f"{where}: rewrite, style and subject are strings where given.")
    return Example(query, node, lang=str(row.get("lang") or "en"), **values)


def held_out(example: Example, percent: int) -> bool:
    """Whether the example belongs to the part kept aside: decided by a hash of the query, so it never moves."""
    return int(hashlib.sha256(example.query.encode()).hexdigest(), 16) % 100 < percent


def split(examples: Sequence[Example], percent: int = 10) -> tuple[list[Example], list[Example]]:
    """(training part, part kept aside); the same query is always on the same side, whatever the order or other data."""
    kept = [e for e in examples if held_out(e, percent)]
    return [e for e in examples if not held_out(e, percent)], kept


def encode(example: Example, vocabulary: tokens.Vocabulary, encode_text: Encode, limit: int) -> Encoded:
    """Join prompt and decision. The query is shortened to `limit` tokens as in serving.

    Without a rewrite the example ends with the functional token: nothing is taught about what follows.
    """
    head, query, tail = prompts.render(example.query, vocabulary.dialect)
    query_ids, _ = prompts.shorten(encode_text(query.text, query.special), limit)
    prompt = encode_text(head.text, head.special) + query_ids + encode_text(tail.text, tail.special)
    if example.rewrite:
        text = encode_text(tokens.quote(vocabulary.dialect, example.rewrite), False)
        decision = tokens.encode(vocabulary, example.node, text)
    else:
        decision = [vocabulary.id_of(example.node)]
    return Encoded(prompt + decision, len(prompt))
