"""The replicas of one node: which one takes the next call, and which ones are left alone for a while.

Pure: the clock is passed in, and so is chance. It knows how many calls each replica has in hand and how its last calls went
(passive health). It does not know what a call is, nor how one fails: the worker tells it with `begin`, `succeed`, `fail`, `pause`
and `release`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import timezone
from email.utils import parsedate_to_datetime
from typing import Any

FAILURES = 3
"""consecutive failures that open a replica's breaker"""
OPEN_S, OPEN_MOST_S = 1.0, 30.0
"""seconds that a breaker stays open at first (doubled each time) and at most; no Retry-After closes a replica for longer either"""


@dataclass(eq=False)
class Replica:
    """One URL and how it does. Only `Replicas` changes it."""

    url: str
    outstanding: int = 0
    """calls it has in hand"""
    failures: int = 0
    """consecutive ones"""
    broken_until: float = 0.0
    paused_until: float = 0.0
    """asked for by itself (Retry-After): an answer that was under way does not lift it"""
    trips: int = 0
    """how often the breaker has opened since the last success"""
    probing: bool = False
    """half open, and the one call that tries it is under way"""
    used: int = 0
    """number of the last call that it took"""

    @property
    def open_until(self) -> float:
        """Clock time until which it gets no calls; in the past: it gets them."""
        return max(self.broken_until, self.paused_until)

    @property
    def name(self) -> str:
        """The URL as it may be shown: without user name and password."""
        return re.sub(r"//[^/@]*@", "//", self.url)


class Replicas:
    """Chooses among `urls`. `pick(n)` is a random number below n. Times are seconds of any one monotonic clock."""

    def __init__(self, urls: Sequence[str], pick: Callable[[int], int], failures: int = FAILURES) -> None:
        self._replicas = [Replica(url) for url in urls]
        self._pick, self._limit, self._calls = pick, failures, 0

    def __iter__(self) -> Iterator[Replica]:
        """Every replica, in the order of the graph."""
        return iter(self._replicas)

    def choose(self, now: float, tried: Collection[Replica] = ()) -> Replica | None:
        """The replica for the next call, counted as taken until `release`; None when all were tried.

        Two at random of those that may be called, and of these the one with fewer calls in hand (when equal: the one that was used
        longer ago). When none may be called, the one that opens soonest is tried anyway: an attempt is better than none.
        """
        left = [r for r in self._replicas if r not in tried] if tried else self._replicas
        if not left:
            return None
        ready = [r for r in left if r.open_until <= now and not r.probing]
        if not ready:
            chosen = min(left, key=lambda r: (max(r.open_until, now), r.outstanding, r.used))
        elif len(ready) == 1:
            chosen = ready[0]
        else:
            i, j = self._pick(len(ready)), self._pick(len(ready) - 1)
            one, two = ready[i], ready[j + (j >= i)]
            chosen = two if (two.outstanding, two.used) < (one.outstanding, one.used) else one
        self._calls += 1
        chosen.used = self._calls
        chosen.outstanding += 1
        if chosen.failures >= self._limit and chosen.open_until <= now:
            chosen.probing = True
        return chosen

    def resting(self, now: float) -> bool:
        """Whether `choose` would take one only because an attempt is better than none: all are left alone, or being tried."""
        return all(replica.open_until > now or replica.probing for replica in self._replicas)

    def begin(self, replica: Replica) -> None:
        """Its answer has begun: a breaker closes, but one failure opens it again, as long as no answer was finished."""
        replica.probing = False
        replica.broken_until = 0.0
        replica.failures = min(replica.failures, self._limit - 1)

    def succeed(self, replica: Replica) -> None:
        """Its answer is finished."""
        replica.probing = False
        replica.failures = replica.trips = 0
        replica.broken_until = 0.0

    def fail(self, replica: Replica, now: float, gone: bool = False) -> None:
        """A call failed through the replica's fault. Calls that fail while the breaker is open already do not keep it open longer.

        `gone`: nothing is there at all, and that took its time to find out; one such failure opens the breaker.
        """
        replica.probing = False
        replica.failures = max(replica.failures + 1, self._limit if gone else 0)
        if replica.failures >= self._limit and replica.broken_until <= now:
            replica.broken_until = now + min(OPEN_S * 2 ** min(replica.trips, 10), OPEN_MOST_S)
            replica.trips += 1

    def pause(self, replica: Replica, now: float, seconds: float) -> None:
        """It asked to be left alone for that long; at most OPEN_MOST_S."""
        replica.probing = False
        replica.paused_until = max(replica.paused_until, now + min(max(seconds, 0.0), OPEN_MOST_S))

    def release(self, replica: Replica, given_up: bool = False) -> None:
        """The call is over, however it ended: exactly once for every `choose`. Where it was `given_up`, a probe may be made again."""
        replica.outstanding -= 1
        if given_up:
            replica.probing = False

    def states(self) -> list[dict[str, Any]]:
        """For health pages, in the order of the graph: url (no password in it), outstanding, failures, open_until (same clock)."""
        return [{"url": r.name, "outstanding": r.outstanding, "failures": r.failures, "open_until": r.open_until} for r in self._replicas]


def wait_of(header: str, wall: float) -> float | None:
    """Seconds that a Retry-After header asks for: a number or an HTTP date. `wall` is the time of day as a Unix time. None: unreadable."""
    text = header.strip()
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", text, re.ASCII):
        return min(float(text), OPEN_MOST_S)
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, IndexError, TypeError, OverflowError):  # what email.utils raises depends on what is wrong
        return None
    seconds = (date if date.tzinfo else date.replace(tzinfo=timezone.utc)).timestamp() - wall
    return min(max(seconds, 0.0), OPEN_MOST_S)
