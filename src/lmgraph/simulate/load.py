"""When requests come and how large they are: steady, in bursts, over a day, or from clients that wait for their answers.

It knows random numbers: the same stream of them gives the same requests. It does not know what becomes of a request.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

KINDS = ("poisson", "bursty", "diurnal", "closed")
DAY_S = 86_400.0


@dataclass(frozen=True)
class Size:
    """A random size: gamma distributed with this mean and coefficient of variation (0: always the mean, 1: exponential)."""

    mean: float
    cv: float = 0.0

    def draw(self, rng: Random) -> float:
        """One size, at least 0."""
        if not self.cv or not self.mean:
            return self.mean
        shape = 1 / self.cv**2
        return rng.gammavariate(shape, self.mean / shape)


@dataclass(frozen=True)
class Arrivals:
    """How requests come, `rate` a second on average.

    `poisson`: independent of each other. `bursty`: a Poisson process whose rate switches (a two-state Markov-modulated one): `peak`
    times the mean for about `busy_s`, then less for about `quiet_s`, both exponential. `diurnal`: the rate follows a cosine over `day_s`
    that is least at 0 and `swing` above the mean at its top. `closed`: `clients` who ask again as soon as they have their answer; `rate`
    means nothing there.
    """

    rate: float
    kind: str = "poisson"
    peak: float = 3.0
    busy_s: float = 30.0
    quiet_s: float = 270.0
    swing: float = 0.6
    day_s: float = DAY_S
    clients: int = 0

    def quiet_rate(self) -> float:
        """The rate between bursts, so that the mean is `rate`; below 0 where no such rate exists."""
        busy = self.busy_s / (self.busy_s + self.quiet_s)
        return self.rate * (1 - busy * self.peak) / (1 - busy)

    def intensity(self, at: float) -> float:
        """Requests a second at a time of day (`diurnal`); else the mean rate."""
        if self.kind != "diurnal":
            return self.rate
        return self.rate * (1 - self.swing * math.cos(2 * math.pi * at / self.day_s))

    def most(self) -> float:
        """The highest rate that lasts for longer than an answer takes: what must be carried."""
        return {"bursty": self.rate * self.peak, "diurnal": self.rate * (1 + self.swing)}.get(self.kind, self.rate)


def times(arrivals: Arrivals, rng: Random) -> Iterator[float]:
    """Times of arrival from 0 on, in seconds, without end. Not for `closed`, where they depend on the answers."""
    if arrivals.rate <= 0:
        return
    if arrivals.kind == "bursty":
        yield from _bursts(arrivals, rng)
        return
    at, top = 0.0, arrivals.most()
    while True:
        at += rng.expovariate(top)
        # thinning (Lewis and Shedler 1979): a Poisson process of the top rate, of which each point stays with its own rate's share
        if arrivals.kind != "diurnal" or rng.random() * top < arrivals.intensity(at):
            yield at


def _bursts(arrivals: Arrivals, rng: Random) -> Iterator[float]:
    busy = rng.random() * (arrivals.busy_s + arrivals.quiet_s) < arrivals.busy_s  # begins as it is at any other time
    at = 0.0
    while True:
        until = at + rng.expovariate(1 / (arrivals.busy_s if busy else arrivals.quiet_s))
        rate = arrivals.rate * arrivals.peak if busy else arrivals.quiet_rate()
        while rate > 0:
            at += rng.expovariate(rate)
            if at >= until:  # memoryless: what was begun in one state is drawn anew in the next
                break
            yield at
        at, busy = until, not busy
