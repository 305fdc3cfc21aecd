"""The vocabulary of a master: node <-> functional token <-> id; encoding a decision, parsing ids as they come.

With prompts.py this is the contract between training and serving. It knows ids and names, not models or tokenizers:
text becomes ids elsewhere. Two dialects are known:

- `lmgraph`: `<fn_i>` then the rewritten query then `<fn_end>`; the token *is* the choice, what follows is plain text.
- `octopus-v4`: `<nexa_i>('rewritten query')<nexa_end>` (Octopus v2 section 3, v4 model card); the text is a quoted call.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from lmgraph.errors import VocabularyMismatch

DIALECTS = ("lmgraph", "octopus-v4")


@dataclass(frozen=True)
class Vocabulary:
    """Functional tokens of one master.

    `first_id` is the id of functional token 0, `size` how many rows are reserved, `end_id` the id that ends a decision.
    `nodes` maps node names to functional tokens (0-based). `temperature` divides the logits before the softmax over the
    allowed tokens, so that probabilities are calibrated. `base` is the sha256 of the base weights, '' when unknown.
    """

    first_id: int
    size: int
    end_id: int
    nodes: Mapping[str, int] = field(default_factory=dict)
    dialect: str = "lmgraph"
    temperature: float = 1.0
    base: str = ""

    def __post_init__(self) -> None:
        if self.dialect not in DIALECTS:
            raise VocabularyMismatch(f"Unknown dialect {self.dialect!r}; known: {', '.join(DIALECTS)}.")
        if self.size < 1 or self.first_id < 0 or not 0 < self.temperature < math.inf:
            raise VocabularyMismatch(
                "A vocabulary needs size >= 1, first_id >= 0 and a finite temperature > 0; "
                f"found {self.size}, {self.first_id}, {self.temperature}."
            )
        if self.first_id <= self.end_id < self.first_id + self.size:
            raise VocabularyMismatch(f"The end token {self.end_id} lies among the functional tokens.")
        bad = {name: token for name, token in self.nodes.items() if not 0 <= token < self.size}
        if bad:
            raise VocabularyMismatch(f"Tokens outside 0..{self.size - 1}: {bad}.")
        if len(set(self.nodes.values())) != len(self.nodes):
            raise VocabularyMismatch("Two nodes share one functional token.")

    def id_of(self, node: str) -> int:
        """The id of a node's functional token. Raises VocabularyMismatch for a node this master was not trained for."""
        if node not in self.nodes:
            raise VocabularyMismatch(
                f"The master has no functional token for node {node!r}; it knows: {', '.join(self.nodes)}.",
                "Fit one from examples: lmgraph train heads --node NAME --examples FILE",
            )
        return self.first_id + self.nodes[node]

    def is_functional(self, token_id: int) -> bool:
        """Whether the id is a functional token (used or spare)."""
        return self.first_id <= token_id < self.first_id + self.size

    def name(self, token: int) -> str:
        """How the functional token is written: `<fn_4>` or `<nexa_4>`."""
        return f"<fn_{token}>" if self.dialect == "lmgraph" else f"<nexa_{token}>"

    @property
    def end_name(self) -> str:
        """How the end token is written."""
        return "<fn_end>" if self.dialect == "lmgraph" else "<nexa_end>"

    def node_of(self, token_id: int) -> str | None:
        """The node of an id, or None (not a functional token, or a spare one)."""
        token = token_id - self.first_id
        return next((name for name, number in self.nodes.items() if number == token), None)

    def spare(self) -> int | None:
        """The lowest unused functional token, or None when all rows are taken."""
        used = set(self.nodes.values())
        return next((token for token in range(self.size) if token not in used), None)

    def with_node(self, name: str, token: int) -> Vocabulary:
        """A vocabulary with one node more (or re-pointed)."""
        return replace(self, nodes={**self.nodes, name: token})

    @property
    def digest(self) -> str:
        """sha256 over what gives ids their meaning; a graph or weights file made for another vocabulary differs here."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, object]:
        """The JSON form, as vocabulary.json holds it (without the digest)."""
        return {
            "version": 1,
            "dialect": self.dialect,
            "first_id": self.first_id,
            "size": self.size,
            "end_id": self.end_id,
            "nodes": dict(self.nodes),
            "temperature": float(self.temperature),
            "base": self.base,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> Vocabulary:
        """The reverse of to_json; unknown keys are ignored. Raises VocabularyMismatch when a key is missing or wrong."""
        try:
            nodes = {str(k): _whole(v) for k, v in dict(data["nodes"]).items()}  # type: ignore[call-overload]
            return cls(
                first_id=_whole(data["first_id"]),
                size=_whole(data["size"]),
                end_id=_whole(data["end_id"]),
                nodes=nodes,
                dialect=str(data.get("dialect", "lmgraph")),
                temperature=float(data.get("temperature", 1.0)),  # type: ignore[arg-type]
                base=str(data.get("base", "")),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise VocabularyMismatch(
                f"vocabulary.json cannot be read: {error!r}.", "Expected: first_id, size, end_id (integers) and nodes (name -> token)."
            ) from error


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"found {value!r}, expected a whole number")
    return value


def encode(vocabulary: Vocabulary, node: str, text_ids: list[int]) -> list[int]:
    """Ids of one decision as the master should write it: functional token, rewritten query, end token.

    `text_ids` are the ids of the rewritten query as this dialect writes it (for `octopus-v4`: already quoted, see `quote`).
    """
    return [vocabulary.id_of(node), *text_ids, vocabulary.end_id]


def quote(dialect: str, text: str) -> str:
    """The rewritten query as the dialect writes it between functional token and end token."""
    return text if dialect == "lmgraph" else f"('{text}')"


def unquote(dialect: str, text: str) -> str:
    """The rewritten query out of what stood between the tokens.

    Octopus v4 writes `('...')`, sometimes with a blank before or a newline after; the argument may hold apostrophes,
    quotes and brackets of its own, and may be cut off: only the outermost wrapping is taken away.
    """
    text = text.strip()
    if dialect == "lmgraph":
        return text
    if text.startswith("("):
        text = text[1:].lstrip()
        body = text[:-1].rstrip() if text.endswith(")") else text
        mark = text[:1]
        if mark not in ("'", '"'):
            return body
        if body.endswith(mark + ","):
            body = body[:-1]
        # A bracket at the end without the quote before it belongs to the argument, which was cut off.
        text = body[1:-1] if len(body) > 1 and body.endswith(mark) else text[1:]
    return text.strip()


@dataclass(frozen=True)
class Parsed:
    """What the master wrote, read from ids.

    `token`: the first functional token (0-based) or None; `text_ids`: ids of its argument; `finished`: the end token came;
    `calls`: how many functional tokens were seen (the first one counts, the rest are ignored).
    """

    token: int | None
    text_ids: tuple[int, ...]
    finished: bool
    calls: int


class Parser:
    """Reads a master's output id by id. `feed` says whether more is wanted; `parsed` is valid at any time."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._token: int | None = None
        self._text: list[int] = []
        self._finished = False
        self._calls = 0

    def feed(self, token_id: int) -> bool:
        """Take one id; False when the decision is complete and decoding should stop."""
        if self._finished:
            return False
        if token_id == self._vocabulary.end_id:
            self._finished = True
            return False
        if self._vocabulary.is_functional(token_id):
            self._calls += 1
            if self._token is None:
                self._token = token_id - self._vocabulary.first_id
        elif self._calls == 1:
            self._text.append(token_id)
        return True

    @property
    def parsed(self) -> Parsed:
        """What has been read so far."""
        return Parsed(self._token, tuple(self._text), self._finished, self._calls)


def parse(vocabulary: Vocabulary, ids: Iterable[int]) -> Parsed:
    """Read a whole output at once: a fold over Parser."""
    parser = Parser(vocabulary)
    for token_id in ids:
        if not parser.feed(token_id):
            break
    return parser.parsed
