"""What the gateway counts, for Prometheus. The one home of its client; one registry a gateway, so that two in a process do not mix.

The gateway runs on one thread, so counters are plain numbers; the client library's own, with a lock each, cost a tenth of a request.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

TYPE = CONTENT_TYPE_LATEST
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
COUNTERS = {
    "requests": ("Requests by path and HTTP status", ("path", "status")),
    "answers": ("Answers by the node that gave them", ("node",)),
    "hops": ("Hops of walks by node and how they ended: answered or failed", ("node", "result")),
    "tokens": ("Tokens that workers counted", ("node", "kind")),
    "cache": ("Answers that might come from the cache: hit or miss", ("result",)),
}
GAUGES = {
    "active": "Answers in the making",
    "store_up": "1: the store works, 0: answers go on without it",
    "turns_dropped": "Turns that were not kept because the store was down",
}


TIMES = {
    "decision": "Choosing a node and rewriting the query",
    "first_piece": "From the request to the first piece of the answer",
    "answer": "From the request to the end of the answer",
}


class Times:
    """How often something took how long."""

    def __init__(self) -> None:
        self.counts = [0] * (len(SECONDS) + 1)
        """not summed up: by the bucket that a time falls into"""
        self.sum = 0.0

    def observe(self, seconds: float) -> None:
        """Count one."""
        self.counts[bisect_left(SECONDS, seconds)] += 1
        self.sum += seconds


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


class Metrics(Collector):
    """Counters and histograms of one gateway. Times are in seconds, as Prometheus wants them."""

    def __init__(self) -> None:
        self.loads = Loads()
        self.requests: Counter[tuple[str, ...]] = Counter()
        self.answers: Counter[tuple[str, ...]] = Counter()
        self.hops: Counter[tuple[str, ...]] = Counter()
        self.tokens: Counter[tuple[str, ...]] = Counter()
        self.cache: Counter[tuple[str, ...]] = Counter()
        self.active = 0
        self.store_up = True
        self.turns_dropped = 0
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self.decision, self.first_piece, self.answer = Times(), Times(), Times()

    def collect(self) -> Iterator[Metric]:
        """The counters as the client library wants them."""
        for name, (text, labels) in COUNTERS.items():
            family = CounterMetricFamily(f"lmgraph_{name}", text, labels=labels)
            for values, count in getattr(self, name).items():
                family.add_metric(values, count)
            yield family
        for name, text in TIMES.items():
            times: Times = getattr(self, name)
            names = (*(str(float(limit)) for limit in SECONDS), "+Inf")
            buckets = list(zip(names, accumulate(times.counts)))
            yield HistogramMetricFamily(f"lmgraph_{name}_seconds", text, buckets=buckets, sum_value=times.sum)
        for name, text in GAUGES.items():
            yield GaugeMetricFamily(f"lmgraph_{name}", text, value=float(getattr(self, name)))
        busy = GaugeMetricFamily("lmgraph_node_active", "Answers in the making by node, waiting ones too", labels=("node",))
        for node, load in self.loads.items():
            busy.add_metric((node,), load.active)
        yield busy

    def text(self) -> bytes:
        """The page of GET /metrics."""
        return generate_latest(self._registry)
