"""A scenario played through: what a request goes through, and the figures of it all.

A request reaches the next gateway in turn, waits for its event loop, asks Redis, is decided by the master, answered by a group's
replica, passes through the gateway piece by piece, and is kept in Redis. What fails is tried again and falls back as lmgraph.execute
does it: a refused call after 0.2 s, doubled each time; a call without a first token in time not again but at the fallback. What pieces
cost a gateway is charged in two lumps, at the first and the last token: they make others wait, not the answer that they belong to. Two
runs with one seed are the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from random import Random

import simpy

from lmgraph.simulate.figures import Figures, Record, Spread
from lmgraph.simulate.load import times
from lmgraph.simulate.parts import HOUR_S, Batcher, Group, Process, Station
from lmgraph.simulate.scenario import Scenario

GRACE_S = 600.0
"""after the last counted arrival and twice the longest patience: an answer that is not there by then is unfinished"""
Watch = Callable[[float, float], None]
"""told (simulated seconds, of how many)"""


class _Gate:
    """One gateway."""

    def __init__(self) -> None:
        self.loop, self.engine = Station(), Station()
        self.active = 0


class _Run:
    """One run of a scenario."""

    def __init__(self, scenario: Scenario, seed: int) -> None:
        self.scenario, self.env = scenario, simpy.Environment()
        self.rng = {name: Random(f"{seed} {name}") for name in ("arrivals", "sizes", "work", "ways")}
        self.gates = [_Gate() for _ in range(scenario.gateway.replicas)]
        self.redis = [Station(scenario.slices) for _ in range(scenario.redis.shards)]
        self.batchers = [Batcher(self.env, scenario.master) for _ in range(scenario.master.replicas)]
        self.groups = {spec.name: Group(self.env, spec, Random(f"{seed} {spec.name}")) for spec in scenario.workers}
        self.shares = [(spec.name, spec.share) for spec in scenario.workers]
        self.until = scenario.warm_s + scenario.seconds
        self.found: list[Record] = []
        self.open = 0
        """counted requests that are not over"""
        self.over = self.env.event()
        self.inside, self.changed, self.area = 0, 0.0, 0.0
        self.marks: list[dict[str, float]] = []
        self.series: dict[str, list[float]] = {}
        self.arrived = self.turn = 0

    # ---------------------------------------------------------------- a request

    def arrive(self) -> Process:
        """Open arrivals, without end: also while the last counted answers are made, the rest goes on as before."""
        now = 0.0
        for at in times(self.scenario.arrivals, self.rng["arrivals"]):
            yield self.env.timeout(at - now)
            now = at
            self.env.process(self.request())

    def client(self) -> Process:
        """Somebody who asks again as soon as the answer is there."""
        while True:
            yield from self.request()
            yield self.env.timeout(self.scenario.network_ms / 1000)

    def request(self) -> Process:
        """From its arrival to its end."""
        now = self.env.now
        made = Record(now, self.scenario.warm_s <= now < self.until)
        self.arrived += 1
        if made.counted:
            self.found.append(made)
            self.open += 1
        self._step(1)
        gate = self.gates[self.turn % len(self.gates)]
        self.turn += 1
        if gate.active >= self.scenario.gateway.active:
            made.failure = "busy"
        else:
            gate.active += 1
            yield from self._serve(made, gate)
            gate.active -= 1
        self._step(-1)
        if made.counted:
            self.open -= 1
            self._look()

    def _serve(self, made: Record, gate: _Gate) -> Process:
        spec, network = self.scenario.gateway, self.scenario.network_ms / 1000
        wait, took = gate.loop.visit(self.env.now, self._work(spec.request_ms, spec.cv))
        made.waits["gateway"] += wait
        yield from self._pass(took)
        yield from self._pass(self._redis(made))
        for _ in range(self._hops()):
            yield from self._decide(made, gate)
            made.first = self.env.now
            made.failure = ""
            if (group := self._group()) is not None:
                yield from self._ask(made, gate, group)
            if made.failure:
                return
        made.first += network / 2 - made.arrived
        yield from self._pass(self._redis(made))
        made.end = self.env.now + network - made.arrived

    def _ask(self, made: Record, gate: _Gate, group: Group | None) -> Process:
        """One call, with what comes after a failure."""
        sizes = self.rng["sizes"]
        tried: set[str] = set()
        prompt, output = self.scenario.prompt.draw(sizes), self.scenario.output.draw(sizes)
        lump = output * self.scenario.gateway.piece_ms / 2000

        def begun() -> None:
            wait, _ = gate.loop.visit(self.env.now, lump)
            made.first = self.env.now + wait

        while group is not None and group.spec.name not in tried:
            made.fallbacks += bool(tried)
            tried.add(group.spec.name)
            made.failure = "refused"
            for attempt in range(1 + group.spec.retries):
                made.retries += bool(attempt)
                if group.spec.errors and self.rng["ways"].random() < group.spec.errors:
                    if attempt < group.spec.retries:
                        yield self.env.timeout(min(0.2 * 2**attempt, 2.0))
                    continue
                sent = self.env.now
                call = group.call(prompt, output, begun)
                made.failure = yield call.done
                made.waits["workers"] += min(call.began, self.env.now) - sent
                break
            if not made.failure:
                made.group = group.spec.name
                wait, _ = gate.loop.visit(self.env.now, lump)
                made.waits["gateway"] += wait
                yield from self._pass(wait)
                return
            group = self.groups.get(group.spec.fallback)

    def _decide(self, made: Record, gate: _Gate) -> Process:
        spec = self.scenario.master
        if spec.kind == "none" or (spec.share < 1 and self.rng["ways"].random() >= spec.share):
            return
        if spec.kind == "embedded":
            wait, took = gate.engine.visit(self.env.now, self._work(spec.decision_ms, spec.cv))
            yield from self._pass(took)
        else:
            asked = self.env.now
            yield min(self.batchers, key=lambda b: b.has).ask()
            wait = self.env.now - asked - (spec.batch_ms + spec.query_ms) / 1000
        made.waits["master"] += wait

    def _pass(self, seconds: float) -> Process:
        if seconds:  # an event less for what takes no time
            yield self.env.timeout(seconds)

    def _redis(self, made: Record) -> float:
        """Seconds of half of a request's calls."""
        spec = self.scenario.redis
        shard = self.redis[0] if len(self.redis) == 1 else self.rng["ways"].choice(self.redis)
        wait, took = shard.visit(self.env.now, spec.work_ms / 2000)
        made.waits["redis"] += wait
        return took + spec.calls * spec.trip_ms / 2000

    def _work(self, mean_ms: float, cv: float) -> float:
        if not cv:
            return mean_ms / 1000
        return self.rng["work"].gammavariate(1 / cv**2, mean_ms * cv**2) / 1000

    def _hops(self) -> int:
        """1, and as many more as it takes for the mean (geometric)."""
        more, hops = 1 - 1 / self.scenario.hops, 1
        while more and hops < 20 and self.rng["ways"].random() < more:
            hops += 1
        return hops

    def _group(self) -> Group | None:
        left = self.rng["ways"].random()
        for name, share in self.shares:
            left -= share
            if left < 0:
                return self.groups[name]
        return None

    # ---------------------------------------------------------------- figures

    def _step(self, change: int) -> None:
        now = self.env.now
        low, high = max(self.changed, self.scenario.warm_s), min(now, self.until)
        self.area += self.inside * max(0.0, high - low)
        self.inside += change
        self.changed = now

    def _look(self) -> None:
        if not self.open and self.env.now >= self.until and not self.over.triggered:
            self.over.succeed()

    def mark(self) -> Process:
        """Note what all parts have done when counting begins and when it ends; then wait for the answers that are still made."""
        for at in (self.scenario.warm_s, self.until):
            yield self.env.timeout(at - self.env.now)
            done = {
                "gateway": sum(gate.loop.busy_s for gate in self.gates),
                "master": sum(gate.engine.busy_s for gate in self.gates) + sum(batcher.busy_s for batcher in self.batchers),
                "redis": sum(shard.busy_s for shard in self.redis),
            }
            for name, group in self.groups.items():
                paid = group.paid()
                done |= {f"{name} replicas": paid.replica_s, f"{name} busy": paid.busy_s, f"{name} slots": paid.slot_s}
            self.marks.append(done)
        self._step(0)
        self._look()
        patience = max((group.timeout_s for group in self.scenario.workers), default=0.0)
        yield self.env.timeout(2 * patience + GRACE_S)
        if not self.over.triggered:
            self.over.succeed()

    def sample(self, number: int, watch: Watch | None) -> Process:
        """`number` samples of the whole time, and tell the watcher."""
        every, before = self.until / (number or 50), 0
        while True:
            yield self.env.timeout(every)
            if watch:
                watch(min(self.env.now, self.until), self.until)
            if number and self.env.now <= self.until * (1 + 1e-9):
                row = {"at": self.env.now, "rate": (self.arrived - before) / every}
                for name, group in self.groups.items():
                    row |= {f"waiting:{name}": group.counts()[0], f"replicas:{name}": group.replicas}
                for name, value in row.items():
                    self.series.setdefault(name, []).append(value)
                before = self.arrived

    def figures(self) -> Figures:
        """All of it, when the run is over."""
        scenario, found = self.scenario, self.found
        good = [made for made in found if not made.failure]
        did = {name: self.marks[1][name] - self.marks[0][name] for name in self.marks[0]}
        masters = {"embedded": len(self.gates), "batched": len(self.batchers)}.get(scenario.master.kind, 1)
        used = {"gateway": did["gateway"] / len(self.gates), "master": did["master"] / masters, "redis": did["redis"] / len(self.redis)}
        used = {name: value / scenario.seconds for name, value in used.items()}
        hourly = scenario.gateway.replicas * scenario.gateway.price + scenario.redis.shards * scenario.redis.price / scenario.slices
        hourly += scenario.master.replicas * scenario.master.price * (scenario.master.kind == "batched")
        replicas: dict[str, float] = {}
        for spec in scenario.workers:
            had = did[f"{spec.name} replicas"]
            replicas[spec.name] = had / scenario.seconds
            used[spec.name] = did[f"{spec.name} busy"] / had if had else 0.0
            used[f"{spec.name} slots"] = did[f"{spec.name} slots"] / (had * spec.slots) if had else 0.0
            hourly += replicas[spec.name] * spec.price
        waits = {part: Spread.of(made.waits[part] for made in good) for part in ("gateway", "redis", "master")}
        for spec in scenario.workers:
            waits[spec.name] = Spread.of(made.waits["workers"] for made in good if made.group == spec.name)
        return Figures(
            requests=len(found),
            answered=len(good),
            failures=dict(sorted(Counter(made.failure for made in found if made.failure).items())),
            retries=sum(made.retries for made in found),
            fallbacks=sum(made.fallbacks for made in found),
            waiting=Spread.of(sum(made.waits.values()) for made in good),
            first=Spread.of(made.first for made in good),
            whole=Spread.of(made.end for made in good),
            waits=waits,
            groups={spec.name: Spread.of(made.first for made in good if made.group == spec.name) for spec in scenario.workers},
            utilisation=used,
            replicas=replicas,
            in_system=self.area / scenario.seconds,
            per_hour=hourly,
            per_thousand=hourly / HOUR_S * scenario.seconds / len(good) * 1000 if good else 0.0,
            series={name: tuple(values) for name, values in self.series.items()},
        )


def run(scenario: Scenario, seed: int = 0, *, samples: int = 0, watch: Watch | None = None) -> Figures:
    """Play a scenario (one that `scenario.check` finds nothing wrong with). `samples` of queues and replicas are taken over the time."""
    made = _Run(scenario, seed)
    if scenario.arrivals.kind == "closed":
        for _ in range(scenario.arrivals.clients):
            made.env.process(made.client())
    else:
        made.env.process(made.arrive())
    made.env.process(made.mark())
    if samples or watch:
        made.env.process(made.sample(samples, watch))
    made.env.run(until=made.over)
    return made.figures()
