"""The parts of a service as they work in simulated time: servers that take one after another, the batched master, groups of workers.

It knows who waits for whom and how an autoscaler counts. It does not know what a request goes through (run.py), nor how a model server
divides its time (engine.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from math import ceil
from random import Random
from typing import Any

import simpy

from lmgraph.simulate.engine import Call, Replica
from lmgraph.simulate.scenario import Master, Scaling, Workers

Process = Generator[simpy.Event, Any, None]
HOUR_S = 3600.0


class Station:
    """One server that takes its visitors in the order in which they come: their waits are computed, not played (Lindley's recursion).

    `slowed`: it works so many times slower, and waits are counted so many times shorter. For Poisson arrivals that are so many times
    rarer, that is the same queue as the fast one on another clock.
    """

    def __init__(self, slowed: float = 1.0) -> None:
        self._slowed, self._free = slowed, 0.0
        self.busy_s = 0.0

    def visit(self, now: float, work_s: float) -> tuple[float, float]:
        """(seconds until it is free for a visitor who comes now, seconds until it has worked `work_s` for them)."""
        begins = max(now, self._free)
        self._free = begins + work_s * self._slowed
        self.busy_s += work_s * self._slowed
        return (begins - now) / self._slowed, (self._free - now) / self._slowed


class Batcher:
    """One server of a batched master: it takes all that wait, up to a limit, and answers them together."""

    def __init__(self, env: simpy.Environment, spec: Master) -> None:
        self._env, self._spec = env, spec
        self._waiting: deque[simpy.Event] = deque()
        self._works = False
        self.has = 0
        self.busy_s = 0.0

    def ask(self) -> simpy.Event:
        """Happens when the decision is there."""
        made = self._env.event()
        self._waiting.append(made)
        self.has += 1
        if not self._works:
            self._begin()
        return made

    def _begin(self) -> None:
        batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), self._spec.batch))]
        self._works = bool(batch)
        if not batch:
            return
        took = (self._spec.batch_ms + len(batch) * self._spec.query_ms) / 1000
        self.busy_s += took
        alarm: Any = self._env.timeout(took)
        alarm.callbacks.append(lambda _: self._end(batch))

    def _end(self, batch: list[simpy.Event]) -> None:
        self.has -= len(batch)
        for made in batch:
            made.succeed()
        self._begin()


@dataclass
class Paid:
    """Time that replicas are paid for, and what they did in it."""

    replica_s: float = 0.0
    busy_s: float = 0.0
    slot_s: float = 0.0


@dataclass
class Group:
    """The replicas of one group of workers: who gets a call, how long a first token may take, how many there are."""

    env: simpy.Environment
    spec: Workers
    rng: Random
    ready: list[Replica] = field(default_factory=list)
    starting: int = 0
    waiting: deque[Call] = field(default_factory=deque)
    """before all replicas: where they share a queue, and where there is none"""

    def __post_init__(self) -> None:
        self._numbers = 0
        self._deadlines: deque[tuple[float, Call]] = deque()
        self._new: simpy.Event | None = None
        self._leaving: list[Replica] = []
        self._gone = Paid()
        self._changed = 0.0
        self._replica_s = 0.0
        for _ in range(self.spec.replicas):
            self._arrive()
        self.env.process(self._watch())
        if self.spec.scaling:
            self.env.process(self._scale(self.spec.scaling))

    def call(self, prompt: float, output: float, begun: Callable[[], None]) -> Call:
        """Send a call; its `done` says how it ended."""
        self._numbers += 1
        call = Call(self._numbers, prompt, output, self.env.event(), begun)
        self._deadlines.append((self.env.now + self.spec.timeout_s, call))
        if self._new is not None:
            self._new.succeed()
            self._new = None
        self._send(call)
        return call

    def _send(self, call: Call) -> None:
        if not self.ready or self.spec.balance == "shared":
            self.waiting.append(call)
            if (idle := next((r for r in self.ready if r.free), None)) is not None:
                idle.look()
            return
        count = len(self.ready)
        number = int(self.rng.random() * count)
        one = self.ready[number]
        if self.spec.balance == "two" and count > 1:
            other = self.ready[(number + 1 + int(self.rng.random() * (count - 1))) % count]
            one = other if other.has < one.has else one
        one.submit(call)

    # ---------------------------------------------------------------- patience

    def _watch(self) -> Process:
        """Give up calls whose first token does not come in time. All have the same patience, so the oldest is the first to lose it."""
        while True:
            now = self.env.now
            while self._deadlines and (self._deadlines[0][1].over or self._deadlines[0][1].first <= now or self._deadlines[0][0] <= now):
                _, call = self._deadlines.popleft()
                if not call.over and call.first > now:
                    self._drop(call)
            if self._deadlines:
                yield self.env.timeout(self._deadlines[0][0] - now)
            else:
                self._new = self.env.event()
                yield self._new

    def _drop(self, call: Call) -> None:
        if call.replica is not None:
            call.replica.drop(call)
        else:
            self.waiting.remove(call)
            call.over = True
            call.done.succeed("timeout")

    # ---------------------------------------------------------------- replicas

    @property
    def replicas(self) -> int:
        """Those that are paid for: ready, starting or finishing their last calls."""
        return len(self.ready) + self.starting + len(self._leaving)

    def counts(self) -> tuple[int, int]:
        """(calls that wait, calls that wait or run)."""
        everywhere = [*self.ready, *self._leaving]
        has = sum(replica.has for replica in everywhere) + len(self.waiting)
        return has - sum(replica.running for replica in everywhere), has

    def paid(self) -> Paid:
        """What all replicas have cost and done by now."""
        self._count()
        out = Paid(self._replica_s, self._gone.busy_s, self._gone.slot_s)
        for replica in (*self.ready, *self._leaving):
            replica.settle()
            out.busy_s += replica.busy_s
            out.slot_s += replica.slot_s
        return out

    def _count(self) -> None:
        """Add up the time since the number of replicas has changed; to be called before it changes."""
        self._replica_s += (self.env.now - self._changed) * self.replicas
        self._changed = self.env.now

    def _arrive(self) -> None:
        shared = self.spec.balance == "shared"
        replica = Replica(self.env, self.spec, self.waiting if shared else deque(), self._freed)
        self.ready.append(replica)
        if shared:
            replica.look()
        else:
            parked, self.waiting = self.waiting, deque()
            for call in parked:
                self._send(call)

    def _freed(self, replica: Replica) -> None:
        if replica in self._leaving:
            self._count()
            self._leaving.remove(replica)
            replica.settle()
            self._gone.busy_s += replica.busy_s
            self._gone.slot_s += replica.slot_s

    # ---------------------------------------------------------------- scaling

    def _scale(self, spec: Scaling) -> Process:
        """Look every interval. HorizontalPodAutoscaler's rules: up at once, doubling or by 4 (KEDA: from none to one); down to the most
        wanted of late."""
        wanted: deque[tuple[float, int]] = deque()
        while True:
            yield self.env.timeout(spec.interval_s)
            now, (waiting, all_) = self.env.now, self.counts()
            have = len(self.ready) + self.starting
            want = ceil((waiting if spec.counts == "waiting" else all_) / spec.target)
            want = min(max(want, spec.least), spec.most, max(2 * have, have + 4) if have else max(1, spec.least))
            wanted.append((now, want))
            while wanted[0][0] < now - spec.cooldown_s:
                wanted.popleft()
            target = max(number for _, number in wanted)
            if target < have and now < spec.cooldown_s:  # nothing is known yet of the time before
                target = have
            if target > have:
                self._count()
                self.starting += target - have
                for _ in range(target - have):
                    self.env.process(self._start())
            for _ in range(min(have - target, len(self.ready))):
                self._leave()

    def _start(self) -> Process:
        yield self.env.timeout(self.spec.start_s)
        self._count()
        self.starting -= 1
        self._arrive()

    def _leave(self) -> None:
        """The replica with the least to do takes no more calls and ends when it has answered those it has."""
        replica = min(self.ready, key=lambda r: r.has)
        self.ready.remove(replica)
        self._leaving.append(replica)
        replica.leave()
        if not replica.has:
            self._freed(replica)
