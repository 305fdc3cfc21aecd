"""One server of a language model with continuous batching, as a fluid: between two events every sequence goes on at an even speed.

A step writes one token of each of n running sequences in t0 + n * t1 seconds: t0 reads the weights, whoever many sequences there are.
Both come from two figures, tokens a second of one sequence alone and of all slots together. While a prompt is read, each step also reads
a chunk of it and takes so much longer (chunked prefill); prompts are read one after another. A sequence has a slot from the beginning of
its prompt to its last token; who has none waits, first come first served. Not in here: memory for long contexts, prefix caches,
preemption, differences between adapters of one base.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

import simpy

from lmgraph.simulate.scenario import Workers

FOREVER = float("inf")


class Call:
    """One request at one replica: `done` says how it ended ("" well, "timeout")."""

    __slots__ = ("began", "begun", "done", "first", "number", "output", "over", "prompt", "replica")

    def __init__(self, number: int, prompt: float, output: float, done: simpy.Event, begun: Callable[[], None]) -> None:
        self.number, self.prompt, self.output, self.done, self.begun = number, prompt, output, done, begun
        self.began = self.first = FOREVER
        """when it got its slot; when its first token came"""
        self.over = False
        self.replica: Replica | None = None
        """None as long as it waits in a queue before several"""


class Replica:
    """One server. `queue` is its own, or one that several share; `freed` is told when it has nothing left to do."""

    def __init__(self, env: simpy.Environment, spec: Workers, queue: deque[Call], freed: Callable[[Replica], None]) -> None:
        self._env, self._spec, self._queue, self._freed = env, spec, queue, freed
        self._marginal = (spec.slots / spec.total - 1 / spec.alone) / (spec.slots - 1) if spec.slots > 1 else 0.0
        self._fixed = 1 / spec.alone - self._marginal
        self._prefilling: Call | None = None
        self._left = 0.0
        """prompt tokens that are not read yet"""
        self._decoding: list[tuple[float, int, Call]] = []
        """heap: what the token clock shows when a sequence is finished"""
        self._tokens = 0.0
        """the token clock: tokens that each sequence would have written that has been there from the beginning"""
        self._speed = self._reading = 0.0
        """of the token clock; prompt tokens a second"""
        self._at = env.now
        self._plan = 0
        """number of the present plan: an alarm of an older one means nothing"""
        self.has = 0
        """calls that were sent here and are not over, whether they run or wait"""
        self.busy_s = self.slot_s = 0.0
        """time with something to do; time of slots that were taken"""

    @property
    def running(self) -> int:
        """Slots that are taken."""
        return len(self._decoding) + (self._prefilling is not None)

    @property
    def free(self) -> bool:
        """Whether a call would get a slot at once."""
        return self._prefilling is None and len(self._decoding) < self._spec.slots

    def submit(self, call: Call) -> None:
        """Take a call, or let it wait."""
        self.has += 1
        call.replica = self
        self._queue.append(call)
        self.look()

    def look(self) -> None:
        """Begin what waits, as far as there is room."""
        if self.free and self._queue:
            self._advance()
            self._admit()
            self._go_on()

    def drop(self, call: Call) -> None:
        """Whoever asked has left: a call of this replica that waits or whose prompt is being read ends here."""
        if call is self._prefilling:
            self._advance()
            self._prefilling = None
            self._end(call, "timeout")
            self._admit()
            self._go_on()
        elif call.began == FOREVER:
            self._queue.remove(call)
            self._end(call, "timeout")

    def leave(self) -> None:
        """Take nothing more from a queue that is shared with others."""
        self._queue = deque(call for call in self._queue if call.replica is self)

    def settle(self) -> None:
        """Bring the figures up to now."""
        self._advance()

    def _advance(self) -> None:
        now = self._env.now
        if passed := now - self._at:
            self._at = now
            if running := self.running:
                self.busy_s += passed
                self.slot_s += passed * running
                self._tokens += passed * self._speed
                self._left -= passed * self._reading

    def _admit(self) -> None:
        while self._prefilling is None and self._queue and len(self._decoding) < self._spec.slots:
            call = self._queue.popleft()
            if call.replica is None:
                call.replica = self
                self.has += 1
            call.began = self._env.now
            if call.prompt > 0:
                self._prefilling, self._left = call, call.prompt
            else:
                self._first(call)

    def _first(self, call: Call) -> None:
        """The prompt is read: the first token is there with it."""
        call.first = self._env.now
        call.begun()
        heappush(self._decoding, (self._tokens + call.output, call.number, call))

    def _go_on(self) -> None:
        """Work out the present speeds, and ring when something is finished."""
        spec, sequences = self._spec, len(self._decoding)
        step = self._fixed + sequences * self._marginal
        if self._prefilling is None:
            self._reading = 0.0
            self._speed = 1 / step if sequences else 0.0
        elif sequences:
            step += spec.chunk / spec.prefill
            self._reading, self._speed = spec.chunk / step, 1 / step
        else:
            self._reading, self._speed = spec.prefill, 0.0
        prompt = max(0.0, self._left) / self._reading if self._prefilling is not None else FOREVER
        answer = max(0.0, self._decoding[0][0] - self._tokens) / self._speed if sequences else FOREVER
        self._plan += 1
        if (wait := min(prompt, answer)) < FOREVER:
            plan, read = self._plan, prompt <= answer
            alarm: Any = self._env.timeout(wait)
            alarm.callbacks.append(lambda _: self._ring(plan, read))

    def _ring(self, plan: int, read: bool) -> None:
        if plan != self._plan:
            return
        self._advance()
        if read and self._prefilling is not None:
            call, self._prefilling = self._prefilling, None
            self._first(call)
        elif self._decoding:
            finish = self._decoding[0][0]
            self._tokens = max(self._tokens, finish)  # rounding must not leave it a hair before the end
            while self._decoding and self._decoding[0][0] <= finish:
                self._end(heappop(self._decoding)[2], "")
        self._admit()
        self._go_on()
        if not self.has:
            self._freed(self)

    def _end(self, call: Call, how: str) -> None:
        call.over = True
        self.has -= 1
        call.done.succeed(how)
