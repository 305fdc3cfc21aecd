"""What a run is measured by: times with their percentiles, utilisation, failures, cost.

It knows names and units of figures, and what is noted of one request. It does not know how they come about (run.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Spread:
    """Of some times, in seconds."""

    mean: float
    p50: float
    p99: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """All 0 where there are none."""
        found = np.fromiter(values, dtype=np.float64)
        return cls(float(found.mean()), *(float(v) for v in np.percentile(found, (50, 99)))) if found.size else cls(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Figures:
    """What a run found. Counts and prices are of the scenario as it was given: of one slice, where it is one."""

    requests: int
    """that came in the counted time"""
    answered: int
    failures: Mapping[str, int]
    """busy: the gateway has too many; timeout, refused: no worker could answer; unfinished at the end"""
    retries: int
    fallbacks: int
    waiting: Spread
    """in all queues together, of answered requests like all times here"""
    first: Spread
    """from the request to its first token"""
    whole: Spread
    """to the end of the answer"""
    waits: Mapping[str, Spread]
    """by part: gateway, redis, master, and each group of workers (of the calls that it answered)"""
    groups: Mapping[str, Spread]
    """first token by the group that answered"""
    utilisation: Mapping[str, float]
    """share of time: gateway (its event loop), master, redis; of each group's replicas with something to do, and of slots that are taken"""
    replicas: Mapping[str, float]
    """of each group, on average"""
    in_system: float
    """requests under way, on average"""
    per_hour: float
    per_thousand: float
    """price of 1,000 answered requests"""
    series: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """samples: at (seconds), rate (requests a second), and of each group waiting:NAME and replicas:NAME"""

    def to_json(self) -> dict[str, Any]:
        """One JSON object."""
        return asdict(self)


@dataclass
class Record:
    """What became of one request."""

    arrived: float
    counted: bool
    waits: dict[str, float] = field(default_factory=lambda: {"gateway": 0.0, "redis": 0.0, "master": 0.0, "workers": 0.0})
    """seconds in queues, by part"""
    group: str = ""
    """that answered (last)"""
    first: float = 0.0
    end: float = 0.0
    """seconds from the request to its first token, to its end"""
    failure: str = "unfinished"
    retries: int = 0
    fallbacks: int = 0
