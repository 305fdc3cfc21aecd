"""What the gateway counts, for Prometheus. The one home of its client; one registry a gateway, so that two in a process do not mix."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

TYPE = CONTENT_TYPE_LATEST
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


@dataclass
class Load:
    """What one node does and did, since the start."""

    active: int = 0
    answers: int = 0
    failures: int = 0


class Loads(dict[str, Load]):
    """Loads by node."""

    def __missing__(self, node: str) -> Load:
        made = self[node] = Load()
        return made


class Metrics:
    """Counters and histograms of one gateway. Times are in seconds, as Prometheus wants them."""

    def __init__(self) -> None:
        self.loads = Loads()
        self._registry = CollectorRegistry()
        self.requests = Counter("lmgraph_requests", "Requests by path and HTTP status", ["path", "status"], registry=self._registry)
        self.answers = Counter("lmgraph_answers", "Answers by the node that gave them", ["node"], registry=self._registry)
        self.tokens = Counter("lmgraph_tokens", "Tokens that workers counted", ["node", "kind"], registry=self._registry)
        self.active = Gauge("lmgraph_active", "Answers in the making", registry=self._registry)
        self.cache = Counter("lmgraph_cache", "Answers that might come from the cache: hit or miss", ["result"], registry=self._registry)
        self.store = Gauge("lmgraph_store_up", "1: the store works, 0: answers go on without it", registry=self._registry)
        self.dropped = Gauge("lmgraph_turns_dropped", "Turns that were not kept because the store was down", registry=self._registry)
        self.decision = Histogram(
            "lmgraph_decision_seconds", "Choosing a node and rewriting the query", buckets=SECONDS, registry=self._registry
        )
        self.first = Histogram(
            "lmgraph_first_piece_seconds", "From the request to the first piece of the answer", buckets=SECONDS, registry=self._registry
        )
        self.total = Histogram(
            "lmgraph_answer_seconds", "From the request to the end of the answer", buckets=SECONDS, registry=self._registry
        )

    def text(self) -> bytes:
        """The page of GET /metrics."""
        return generate_latest(self._registry)
