"""What happens in the run, one thing after another: each fault lasts until things go well in spite of it, and then is taken back.

It knows which hosts, links and processes fail and what must hold then; how figures come about is figures.py's.
"""

from __future__ import annotations

import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import httpx
import openai
from figures import WELL, Concerns, Figures
from hosts import Net
from places import GATEWAYS, Places
from processes import Broken, Process
from talk import BROKEN, KEPT, PAUSE_S, UNTYPED, Held, Talkers, Turn, ask, client

ASKED = ("lmgraph", "lmgraph/math", "lmgraph/law", "lmgraph/physics")
DELAY_MS, LOSS_PERCENT = 200, 5.0
GONE = {BROKEN, "gateway_lost", "no_gateway", "gateway_timeout"}
"""what a client may be told when the gateway that worked for it is gone"""


def play(net: Net, places: Places, talkers: int) -> Figures:
    """The whole of it. Raises Broken where something does not start or stop."""
    with places.running():
        with Talkers(places.hosts["client"], places.address, places.key, ASKED, talkers) as talking:
            scenario = Scenario(net, places, Figures(talking))
            scenario.quiet()
            scenario.adapters()
            scenario.crossing()
            scenario.workers_cut_off()
            scenario.gateway_killed()
            scenario.gateway_cut_off()
            scenario.gateway_drained()
            scenario.redis_killed()
            scenario.redis_cut_off()
            scenario.gateway_far_away()
        scenario.history()
    said = "".join(places.processes[name].log.read_text(errors="replace") for name in GATEWAYS)
    scenario.figures.must("no gateway's log has a traceback", "Traceback" not in said)
    return scenario.figures


class Scenario:
    """Faults of a net and of what runs on it, while clients talk."""

    def __init__(self, net: Net, places: Places, figures: Figures) -> None:
        self.net, self.places, self.figures = net, places, figures

    def quiet(self) -> None:
        """Nothing happens."""
        figures, began = self.figures, 0.0

        def enough(turns: list[Turn]) -> bool:
            ways = Counter((turn.model, turn.gateway) for turn in turns if turn.answered and turn.began > began)
            return all(ways[model, gateway] >= WELL for model in ASKED for gateway in GATEWAYS)

        figures.wait("first answers", enough)  # each way is slower for the first time
        began = time.monotonic()

        figures.wait("every way of asking through both gateways", enough)
        turns = figures.during(began, time.monotonic())
        figures.slow_s = max(figures.slow_s, 2 * max(turn.took for turn in turns))
        figures.note("quiet", began, turns, fault=False)
        figures.must("quiet: every turn is answered and kept", all(turn.outcome == KEPT for turn in turns))

    def adapters(self) -> None:
        """The base and both adapters say different things to the same question."""
        with self.places.hosts["client"].inside(), client(self.places.address, self.places.key) as api:
            said = {ask(api, "", 0, f"lmgraph/{node}", stream=False).answer for node in ("health", "physics", "history")}
        self.figures.must("the base and its two LoRA adapters answer the same question differently", len(said) == 3)

    def crossing(self) -> None:
        """A conversation that began on one gateway goes on on the other, whichever is first."""
        for one, other in (GATEWAYS, GATEWAYS[::-1]):
            name = f"crossing-{one}"
            with self.places.hosts["client"].inside():
                with client(self.places.gateway(one), self.places.key) as api:
                    first = ask(api, name, 0, "lmgraph", stream=False)
                with client(self.places.gateway(other), self.places.key) as api:
                    second = ask(api, name, 1, "lmgraph", stream=True)
                told = [turn["answer"] for turn in self.read(f"{self.places.gateway(one)}/v1/history/{name}")]
            kept = first.outcome == second.outcome == KEPT and told == [first.answer, second.answer]
            knows = second.prompt_tokens > first.prompt_tokens
            self.figures.must(f"a conversation begun on {one} goes on on {other}, which knows what was said", kept and knows)

    def workers_cut_off(self) -> None:
        """One of math's two workers, and law's only one."""
        figures, began = self.figures, time.monotonic()
        concerned: dict[str, Concerns] = {name: _pinned(name) for name in ("math", "law")}
        with self.net.cut(*(self.places.hosts[name] for name in ("w1", "w3"))):
            fast = figures.wait("workers", lambda turns: all(figures.well(turns, began, concerns) for concerns in concerned.values()))
            ended = time.monotonic()
        turns = figures.during(began, ended)
        answered = {turn.node for turn in turns if concerned["law"](turn) and turn.answered and began < turn.began and turn.ended < ended}
        back = figures.first(ended, lambda turn: turn.node == "law" and turn.answered, "an answer of law's own worker")
        figures.note("one of two workers cut off", began, [turn for turn in turns if concerned["math"](turn)])
        figures.note("only worker cut off", began, [turn for turn in turns if concerned["law"](turn)], back=back)
        figures.must("workers cut off: the other worker and the fallback answer, in the end as fast as before", fast)
        figures.must("workers cut off: where there is no other worker, the fallback answers", answered == {"health"})
        figures.few("workers cut off", turns)

    def gateway_killed(self) -> None:
        """SIGKILL in the middle of a stream; then it is started again."""
        figures, gateway, worker = self.figures, self.places.processes["g1"], self.places.processes["w6"]
        held = self.hold("g1", worker)
        began = time.monotonic()
        gateway.kill()
        worker.send(signal.SIGCONT)
        told = held.rest()
        moved = figures.wait("conversations that move", lambda turns: figures.well(turns, began) and bool(_moved(turns, began)))
        ended = time.monotonic()
        self.start("g1")
        turns = figures.during(began, ended)
        figures.note("gateway killed", began, turns, back=figures.kept_by(ended, "g1"))
        failed = [turn for turn in turns if not turn.answered]
        figures.must("gateway killed: its conversations go on on the other one, which knows what was said", moved)
        figures.must("gateway killed: only turns fail that were under way", all(turn.began < began + 0.5 for turn in failed))
        self.gone("gateway killed", told, turns)

    def gateway_cut_off(self) -> None:
        """Its link goes down in the middle of a stream: nothing breaks off, it hangs."""
        figures, worker = self.figures, self.places.processes["w6"]
        held = self.hold("g1", worker)
        began = time.monotonic()
        with self.net.cut(self.places.hosts["g1"]):
            worker.send(signal.SIGCONT)
            told = held.rest()
            fast = figures.wait("the other gateway", lambda turns: figures.well(turns, began))
            ended = time.monotonic()
        turns = figures.during(began, ended)
        figures.note("gateway cut off", began, turns, back=figures.kept_by(ended, "g1"))
        figures.must("gateway cut off: the other one answers, in the end as fast as before", fast)
        self.gone("gateway cut off", told, turns)

    def gateway_drained(self) -> None:
        """No new requests, and SIGTERM in the middle of a stream; then it is started again."""
        figures, gateway, worker = self.figures, self.places.processes["g2"], self.places.processes["w6"]
        held = self.hold("g2", worker)
        began = time.monotonic()
        self.places.balancer.ask("set server gateways/g2 state drain")
        gateway.send(signal.SIGTERM)
        fast = figures.wait("the other gateway", lambda turns: figures.well(turns, began))
        waits = gateway.alive
        worker.send(signal.SIGCONT)
        told = held.rest()
        gateway.ended()
        ended = time.monotonic()
        self.places.balancer.ask("set server gateways/g2 state ready")
        self.start("g2")
        turns = figures.during(began, ended)
        figures.note("gateway drained", began, turns, back=figures.kept_by(ended, "g2"))
        figures.must("gateway drained: its stream ends as it should before it goes", waits and told in ("stop", "length"))
        figures.must("gateway drained: the other one answers", fast)
        figures.none("gateway drained", turns)

    def redis_killed(self) -> None:
        """SIGKILL; then it is started again, with its append-only file."""
        began, redis = time.monotonic(), self.places.processes["redis"]
        redis.kill()
        on = self.without_redis(began)
        redis.start()
        redis.wait()
        self.redis_back("Redis killed", began, on)

    def redis_cut_off(self) -> None:
        """Its link goes down: it does not refuse, it hangs."""
        began = time.monotonic()
        with self.net.cut(self.places.hosts["redis"]):
            on = self.without_redis(began)
        self.redis_back("Redis cut off", began, on)

    def gateway_far_away(self) -> None:
        """Everything that a gateway says and hears is late, and some of it is lost."""
        figures = self.figures

        def there(turn: Turn) -> bool:
            return turn.gateway == "g1"

        with self.net.slow(self.places.hosts["g1"], delay_ms=DELAY_MS, loss_percent=LOSS_PERCENT) as how:
            began = time.monotonic()
            answers = figures.wait("g1", lambda turns: sum(there(t) and t.answered and t.began > began for t in turns) >= 2 * WELL)
            ended = time.monotonic()
        turns = [turn for turn in figures.during(began, ended) if turn.began > began and (there(turn) or not turn.gateway)]
        back = figures.first(ended, lambda turn: there(turn) and turn.answered and turn.took <= figures.slow_s, "g1")
        figures.note(f"gateway {DELAY_MS} ms away, {LOSS_PERCENT:g} % lost", began, turns, back=back, how=how)
        figures.must("gateway far away: it answers", answers)
        figures.few("gateway far away", turns)

    def history(self) -> None:
        """What clients were told is what the gateways remember."""
        figures, turns = self.figures, self.figures.talkers.turns
        told: dict[str, list[Any]] = {}
        with self.places.hosts["client"].inside():
            for name in dict.fromkeys(turn.conversation for turn in turns if turn.outcome == KEPT):
                told[name] = self.read(f"{self.places.address}/v1/history/{name}")
        lost, ignorant = 0, 0
        for name, rows in told.items():
            kept = [turn for turn in turns if turn.conversation == name and turn.outcome == KEPT]
            found = {(row["request"]["messages"][-1]["content"], row["answer"]) for row in rows}
            lost += sum((turn.text, turn.answer) not in found for turn in kept)
            knowing = [turn.prompt_tokens for turn in kept if turn.recalled]
            ignorant += sum(later <= earlier for earlier, later in pairwise(knowing))
        acknowledged = sum(turn.outcome == KEPT for turn in turns)
        figures.note("all", 0.0, turns, fault=False, acknowledged=acknowledged, conversations=len(told), lost=lost)
        figures.must("no acknowledged turn is lost", acknowledged > 0 and not lost)
        figures.must("every answer knows the turns before it, or says that it does not", not ignorant)
        figures.must("every error has OpenAI's form and a code, or is a broken connection", all(turn.outcome != UNTYPED for turn in turns))

    # ------------------------------------------------------------ pieces

    def hold(self, gateway: str, worker: Process) -> Held:
        """A stream through a gateway that has begun; `worker`, which is history's, is stopped in the middle of it."""
        with self.places.hosts["client"].inside():
            api = client(self.places.address, self.places.key)
            failure: Exception | None = None
            for _ in range(100):
                try:
                    held = Held(api, "lmgraph/history", 600)
                except (openai.APIError, httpx.TransportError, StopIteration) as error:  # what failed before may not be quite back
                    failure = error
                    time.sleep(PAUSE_S)
                    continue
                worker.send(signal.SIGSTOP)
                if held.gateway == gateway:
                    return held
                worker.send(signal.SIGCONT)
                held.close()
        raise Broken(f"HAProxy sends nothing to {gateway}: {self.places.balancer.states('gateways')}; the last failure: {failure!r}")

    def gone(self, phase: str, told: str, turns: Sequence[Turn]) -> None:
        """What clients of a gateway that is gone are told."""
        failed = {turn.outcome for turn in turns if not turn.answered}
        self.figures.must(f"{phase}: the stream under way breaks off with a typed error, and with no end", told in GONE)
        self.figures.must(f"{phase}: turns that fail are told that the gateway is lost", failed <= GONE)
        self.figures.few(phase, turns)

    def start(self, gateway: str) -> None:
        """Start a gateway again, until HAProxy knows it."""
        self.places.processes[gateway].start()
        self.places.processes[gateway].wait()
        self.places.until_up(gateway)

    def without_redis(self, began: float) -> bool:
        """Whether both gateways come to answer well without it."""
        figures = self.figures
        return figures.wait("answers that are not kept", lambda turns: all(figures.unkept_well(turns, began, name) for name in GATEWAYS))

    def redis_back(self, phase: str, began: float, on: bool) -> None:
        """It has just come back."""
        figures, ended = self.figures, time.monotonic()
        back = [figures.kept_by(ended, gateway) for gateway in GATEWAYS]
        turns = figures.during(began, ended)
        figures.note(phase, began, turns, back=max((one for one in back if one), default=None), down=ended - began)
        figures.must(f"{phase}: answers go on, in the end as fast as before, and say that they are not kept", on)
        figures.must(f"{phase}: then they are kept again", all(back))
        figures.none(phase, turns)

    def read(self, url: str) -> list[Any]:
        """The turns of a conversation."""
        answer = httpx.get(url, headers={"authorization": f"Bearer {self.places.key}"}, timeout=60)
        return list(answer.raise_for_status().json()["data"])


def _pinned(node: str) -> Concerns:
    return lambda turn: turn.model == f"lmgraph/{node}"


def _moved(turns: Sequence[Turn], since: float) -> list[Turn]:
    """Turns on g2 that knew what g1 had answered before."""
    on_one: dict[str, int] = {}
    found = []
    for turn in turns:
        if turn.outcome == KEPT and turn.gateway == "g1" and turn.ended < since:
            on_one[turn.conversation] = turn.prompt_tokens
        later = turn.outcome == KEPT and turn.gateway == "g2" and turn.began > since and turn.recalled
        if later and turn.prompt_tokens > on_one.get(turn.conversation, sys.maxsize):
            found.append(turn)
    return found
