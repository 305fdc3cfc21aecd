"""A distributed run on one machine: eleven hosts, and what becomes of conversations while hosts, links and processes fail.

    .venv/bin/python benchmarks/hosts/run.py --out benchmarks/results/hosts.json        # toy models; root, on Linux; two minutes
    .venv/bin/python benchmarks/hosts/run.py --real                                     # the built-in master and SmolLM2-135M

Clients talk all the time, through HAProxy, and send only the new turn. One after another: worker hosts are cut off, a gateway is killed, one
is drained, Redis is killed, Redis is cut off, a gateway's link becomes slow and lossy. A fault lasts until things go well in spite of it;
then it is taken back. In the end the history is compared with what clients were told. The status is 1 where anything was not as it must be.

- `first`: seconds from the fault to the first answer to a turn that began after it (of those whom it concerns);
- `recovered`: seconds from the fault to the end of the last turn that failed or was slow (over twice the longest of the quiet time, at least 1 s);
- `back`: seconds from the end of the fault until what had failed works again;
- `longest`: the longest turn, answered or not. `unkept`: answers that say that they are in no history.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx

import models
from hosts import CannotMake, Net, network
from places import GATEWAYS, Places
from processes import Broken, Process, program
from talk import BROKEN, KEPT, UNKEPT, UNTYPED, Held, Talkers, Turn, ask, client

ASKED = ("lmgraph", "lmgraph/math", "lmgraph/law", "lmgraph/physics")
LIMIT_S = 150.0
"""for one thing to happen, on a busy machine"""
WELL = 3
"""turns in a row that go well: it has recovered"""
DELAY_MS, LOSS_PERCENT = 200, 5.0
GATEWAY_GONE = {BROKEN, "gateway_lost", "no_gateway", "gateway_timeout"}
"""what a client may be told when the gateway that worked for it dies"""


class Run:
    """One run: figures of each phase, and what must hold (sentence -> whether it does)."""

    def __init__(self, net: Net, places: Places, talkers: int) -> None:
        self.net, self.places, self.count = net, places, talkers
        self.phases: dict[str, dict[str, Any]] = {}
        self.musts: dict[str, bool] = {}
        self.slow_s = 0.0

    def must(self, sentence: str, holds: bool) -> None:
        """Something that must hold."""
        self.musts[sentence] = bool(holds)

    def go(self) -> None:
        """All of it."""
        places = self.places
        with places.running():
            self.adapters()
            with Talkers(places.hosts["client"], places.address, places.key, ASKED, self.count, "talk") as self.talkers:
                self.quiet()
                self.crossing()
                self.workers_cut_off()
                self.gateway_killed()
                self.gateway_drained()
                self.redis_killed()
                self.redis_cut_off()
                self.gateway_far_away()
                self.note("all", 0.0, self.talkers.turns)
            self.history()
        said = "".join(places.processes[name].log.read_text(errors="replace") for name in GATEWAYS)
        self.must("no gateway's log has a traceback", "Traceback" not in said)

    # ------------------------------------------------------------ phases

    def adapters(self) -> None:
        """The base and both adapters say different things to the same question."""
        with self.places.hosts["client"].inside(), client(self.places.gateway("g1"), self.places.key) as api:
            said = {ask(api, f"who-{node}", 0, f"lmgraph/{node}", stream=False).answer for node in ("health", "physics", "history")}
            asked = {ask(api, "who", 0, f"lmgraph/{node}", stream=False).text for node in ("health", "physics", "history")}
        self.must("the base and its two LoRA adapters answer the same question differently", len(said) == 3 and len(asked) == 1)

    def quiet(self) -> None:
        """Nothing happens."""
        began = time.monotonic()

        def enough(turns: list[Turn]) -> bool:
            ways = Counter((turn.model, turn.gateway) for turn in turns if turn.answered)
            return all(ways[model, gateway] >= WELL for model in ASKED for gateway in GATEWAYS)

        self.wait("quiet", enough)
        turns = self.since(began)
        self.slow_s = max(1.0, 2 * max(turn.took for turn in turns))
        self.note("quiet", began, turns)
        self.must("quiet: every turn is answered and kept", all(turn.outcome == KEPT for turn in turns))

    def crossing(self) -> None:
        """A conversation that began on one gateway goes on on the other, whichever is first."""
        for one, other in (GATEWAYS, GATEWAYS[::-1]):
            name = f"crossing-{one}"
            with self.places.hosts["client"].inside():
                with client(self.places.gateway(one), self.places.key) as api:
                    first = ask(api, name, 0, "lmgraph", stream=False)
                with client(self.places.gateway(other), self.places.key) as api:
                    second = ask(api, name, 1, "lmgraph", stream=True)
                told = self.get(f"{self.places.gateway(one)}/v1/history/{name}")
            self.must(
                f"a conversation begun on {one} goes on on {other}, which knows what was said",
                first.outcome == second.outcome == KEPT
                and second.node == first.node
                and second.prompt_tokens > 1.5 * first.prompt_tokens
                and [turn["answer"] for turn in told] == [first.answer, second.answer],
            )

    def workers_cut_off(self) -> None:
        """One of math's two workers, and law's only one."""
        began = time.monotonic()
        hosts = [self.places.hosts[name] for name in ("w1", "w3")]
        concerned: dict[str, Callable[[Turn], bool]] = {
            "math": lambda turn: turn.model == "lmgraph/math",
            "law": lambda turn: turn.model == "lmgraph/law",
        }
        with self.net.cut(*hosts):
            well = self.wait("workers", lambda turns: all(self.goes_well(turns, began, concerns) for concerns in concerned.values()))
            self.must("workers cut off: a replica and a fallback answer, as fast as before", well)
            ended = time.monotonic()
            turns = self.since(began)
            fallback = [turn for turn in turns if concerned["law"](turn) and turn.answered and turn.began > began]
            self.must("workers cut off: law is answered by its fallback", bool(fallback) and {turn.node for turn in fallback} == {"health"})
        back = self.first(ended, lambda turn: turn.node == "law" and turn.answered, "law")
        for node, concerns in concerned.items():
            name = f"worker cut off ({node}: {'one of two' if node == 'math' else 'the only one, a fallback'})"
            self.note(name, began, [turn for turn in turns if concerns(turn)], back=back if node == "law" else None)
        self.few("workers cut off", turns)

    def gateway_killed(self) -> None:
        """SIGKILL in the middle of a stream, then it is started again."""
        worker = self.places.processes["w6"]
        gateway = self.places.processes["g1"]
        held = self.hold("g1", worker)
        began = time.monotonic()
        gateway.kill()
        worker.send(signal.SIGCONT)
        told = held.rest()
        self.must("gateway killed: a stream that it was sending breaks off with a typed error, and not with an end", told in GATEWAY_GONE)

        def moved(turns: list[Turn]) -> bool:
            return self.goes_well(turns, began, lambda turn: True) and bool(_moved(turns, began))

        self.must("gateway killed: its conversations go on on the other one, which knows what was said", self.wait("killed", moved))
        ended = time.monotonic()
        turns = self.since(began)
        gateway.start()
        gateway.wait()
        self.places.until_up("g1")
        back = self.first(ended, lambda turn: turn.gateway == "g1" and turn.answered, "g1")
        self.note("gateway killed", began, turns, back=back)
        errors = [turn for turn in turns if not turn.answered]
        self.must("gateway killed: only turns fail that were under way at that moment", all(turn.began < began + 0.5 for turn in errors))
        self.must("gateway killed: their errors are a lost gateway's", {turn.outcome for turn in errors} <= GATEWAY_GONE)
        self.few("gateway killed", turns)

    def gateway_drained(self) -> None:
        """No new requests, SIGTERM in the middle of a stream, then it is started again."""
        worker = self.places.processes["w6"]
        gateway = self.places.processes["g2"]
        held = self.hold("g2", worker)
        began = time.monotonic()
        self.places.balancer.ask("set server gateways/g2 state drain")
        gateway.send(signal.SIGTERM)
        well = self.wait("drained", lambda turns: self.goes_well(turns, began, lambda turn: True))
        waits = gateway.alive
        worker.send(signal.SIGCONT)
        told = held.rest()
        gateway.ended()
        ended = time.monotonic()
        turns = self.since(began)
        gateway.start()
        gateway.wait()
        self.places.balancer.ask("set server gateways/g2 state ready")
        self.places.until_up("g2")
        back = self.first(ended, lambda turn: turn.gateway == "g2" and turn.answered, "g2")
        self.note("gateway drained", began, turns, back=back)
        self.must("gateway drained: its stream ends as it should before it goes", waits and told in ("stop", "length"))
        self.must("gateway drained: no turn fails", well and all(turn.answered for turn in turns))

    def redis_killed(self) -> None:
        """SIGKILL; later it is started again, with its append-only file."""
        redis = self.places.processes["redis"]
        began = time.monotonic()
        redis.kill()
        without = self.wait("redis", lambda turns: all(self.unkept_well(turns, began, gateway) for gateway in GATEWAYS))
        started = time.monotonic()
        redis.start()
        redis.wait()
        ended = time.monotonic()
        back = self.first(ended, lambda turn: turn.outcome == KEPT, "kept")
        turns = self.since(began)
        self.note("Redis killed", began, turns, back=back, down=ended - began, loading=ended - started)
        self.must("Redis killed: answers go on, and say that they are not kept", without)
        self.must("Redis killed: no turn fails", all(turn.answered for turn in turns))

    def redis_cut_off(self) -> None:
        """Its link goes down: it does not refuse, it hangs."""
        began = time.monotonic()
        with self.net.cut(self.places.hosts["redis"]):
            without = self.wait("redis", lambda turns: all(self.unkept_well(turns, began, gateway) for gateway in GATEWAYS))
            ended = time.monotonic()
        back = self.first(ended, lambda turn: turn.outcome == KEPT, "kept")
        turns = self.since(began)
        self.note("Redis cut off", began, turns, back=back, down=ended - began)
        self.must("Redis cut off: answers go on as fast as before, and say that they are not kept", without)
        self.must("Redis cut off: no turn fails", all(turn.answered for turn in turns))

    def gateway_far_away(self) -> None:
        """Everything that a gateway says and hears is late, and some of it is lost."""

        def there(turn: Turn) -> bool:
            return turn.gateway == "g1"

        began = time.monotonic()
        with self.net.slow(self.places.hosts["g1"], delay_ms=DELAY_MS, loss_percent=LOSS_PERCENT) as how:
            enough = self.wait("far", lambda turns: sum(there(t) and t.answered for t in turns if t.began > began) >= 2 * WELL)
            ended = time.monotonic()
        turns = [turn for turn in self.since(began) if there(turn) or not turn.gateway]
        back = self.first(ended, lambda turn: there(turn) and turn.answered and turn.took < self.slow_s, "g1")
        name = f"gateway with {DELAY_MS} ms and {LOSS_PERCENT:g} % loss each way"
        self.note(name, began, turns, back=back, how=how)
        self.must("gateway far away: it answers", enough)
        self.few("gateway far away", turns)

    def history(self) -> None:
        """What clients were told is what the gateways remember."""
        turns = self.talkers.turns
        lost, forgotten, held = [], [], {}
        with self.places.hosts["client"].inside():
            for name in dict.fromkeys(turn.conversation for turn in turns if turn.outcome == KEPT):
                held[name] = self.get(f"{self.places.address}/v1/history/{name}")
        for name, told in held.items():
            kept = [turn for turn in turns if turn.conversation == name and turn.outcome == KEPT]
            found = {(row["request"]["messages"][-1]["content"], row["answer"]) for row in told}
            lost += [turn for turn in kept if (turn.text, turn.answer) not in found]
            knowing = [turn for turn in kept if turn.recalled]
            forgotten += [two for one, two in zip(knowing, knowing[1:]) if two.prompt_tokens <= one.prompt_tokens]
        acknowledged = sum(turn.outcome == KEPT for turn in turns)
        errors = [turn for turn in turns if not turn.answered]
        self.phases["all"] |= {"acknowledged": acknowledged, "lost": len(lost), "forgotten": len(forgotten), "conversations": len(held)}
        self.must("no acknowledged turn is lost", acknowledged > 0 and not lost)
        self.must("every answer that does not say otherwise knows the turns before it", not forgotten)
        self.must("every error is OpenAI's form with a code, or a broken connection", all(turn.outcome != UNTYPED for turn in errors))

    # ------------------------------------------------------------ pieces

    def hold(self, gateway: str, worker: Process) -> Held:
        """A stream through a gateway that has begun; `worker` is stopped in the middle of it."""
        with self.places.hosts["client"].inside():
            api = client(self.places.address, self.places.key)
            for _ in range(100):
                held = Held(api, "lmgraph/history", 600)
                worker.send(signal.SIGSTOP)
                if held.gateway == gateway:
                    return held
                worker.send(signal.SIGCONT)
                held.close()
        raise Broken(f"HAProxy sends nothing to {gateway}: {self.places.balancer.states('gateways')}")

    def wait(self, what: str, condition: Callable[[list[Turn]], bool]) -> bool:
        """Whether it came to that within LIMIT_S."""
        came = self.talkers.until(condition, LIMIT_S)
        if not came:
            print(f"{what}: it did not come to that within {LIMIT_S:g} s; the last turns:", file=sys.stderr)
            for turn in self.talkers.turns[-12:]:
                print(f"  {turn}", file=sys.stderr)
        return came

    def since(self, began: float) -> list[Turn]:
        """The turns that ended after that."""
        return [turn for turn in self.talkers.turns if turn.ended > began]

    def first(self, after: float, fits: Callable[[Turn], bool], what: str) -> float | None:
        """Seconds until the first turn that began after that and fits has ended; None where there was none."""

        def found(turns: Sequence[Turn]) -> list[float]:
            return [turn.ended - after for turn in turns if turn.began > after and fits(turn)]

        return min(found(self.talkers.turns)) if self.wait(what, lambda turns: bool(found(turns))) else None

    def goes_well(self, turns: list[Turn], began: float, concerns: Callable[[Turn], bool]) -> bool:
        """Whether the newest turns of those concerned, begun since, were answered, and not slowly."""
        newest = [turn for turn in turns if turn.began > began and concerns(turn)][-WELL:]
        return len(newest) == WELL and all(turn.answered and turn.took < self.slow_s for turn in newest)

    def unkept_well(self, turns: list[Turn], began: float, gateway: str) -> bool:
        """The same of a gateway without its store."""
        return self.goes_well(turns, began, lambda turn: turn.gateway == gateway and turn.outcome == UNKEPT)

    def few(self, phase: str, turns: Sequence[Turn]) -> None:
        """A fault may cost each talker the turn that it is at."""
        self.must(f"{phase}: at most one turn of each talker fails", sum(not turn.answered for turn in turns) <= self.count)

    def note(self, phase: str, began: float, turns: Sequence[Turn], **more: Any) -> None:
        """Figures of a phase."""
        errors = Counter(turn.outcome for turn in turns if not turn.answered)
        bad = [turn.ended - began for turn in turns if not turn.answered or turn.took > self.slow_s]
        first = [turn.ended - began for turn in turns if turn.answered and turn.began > began]
        took = sorted(turn.took for turn in turns)
        figures: dict[str, Any] = {
            "turns": len(turns),
            "errors": dict(errors),
            "unkept": sum(turn.outcome == UNKEPT for turn in turns),
            "median": took[len(took) // 2] if took else None,
            "longest": took[-1] if took else None,
        }
        if phase not in ("quiet", "all"):
            figures |= {"first": min(first, default=None), "recovered": max(bad, default=0.0)}
        found = figures | {name: value for name, value in more.items() if value is not None}
        self.phases[phase] = {name: round(value, 3) if isinstance(value, float) else value for name, value in found.items()}

    def get(self, url: str) -> list[Any]:
        """The turns of a conversation."""
        answer = httpx.get(url, headers={"authorization": f"Bearer {self.places.key}"}, timeout=60)
        return list(answer.raise_for_status().json()["data"])


def _moved(turns: Sequence[Turn], since: float) -> list[Turn]:
    """Turns on g2 that knew what g1 had answered before."""
    on_one: dict[str, int] = {}
    found = []
    for turn in turns:
        if turn.outcome == KEPT and turn.gateway == "g1" and turn.ended < since:
            on_one[turn.conversation] = turn.prompt_tokens
        elif turn.outcome == KEPT and turn.gateway == "g2" and turn.began > since and turn.recalled:
            if turn.prompt_tokens > on_one.get(turn.conversation, sys.maxsize):
                found.append(turn)
    return found


def table(report: dict[str, Any]) -> str:
    """For people."""
    columns = ("turns", "errors", "unkept", "median", "longest", "first", "recovered", "back")
    rows = [("", *columns)]
    for phase, figures in report["phases"].items():
        cells = [
            ", ".join(f"{n} {code}" for code, n in value.items()) if isinstance(value := figures.get(c, ""), dict) else value
            for c in columns
        ]
        rows.append((phase, *(f"{cell:.2f}" if isinstance(cell, float) else str(cell) or "" for cell in cells)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    whole = report["phases"].get("all", {})
    lines += [
        "",
        f"{whole.get('acknowledged', 0)} turns acknowledged in {whole.get('conversations', 0)} conversations, {whole.get('lost', '?')} lost.",
    ]
    lines += [f"{'holds' if holds else 'FAILS'}  {sentence}" for sentence, holds in report["musts"].items()]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--talkers", type=int, default=8, help="conversations at the same time")
    parser.add_argument("--real", action="store_true", help="the built-in master and SmolLM2-135M in place of toys")
    parser.add_argument("--json", action="store_true", help="figures as JSON on stdout")
    parser.add_argument("--out", type=Path, help="write the figures there")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: everything is taken down
    began = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="lmgraph-hosts-") as name, network() as net:
            folder = Path(name)
            made = models.real(folder) if given.real else models.toy(folder)
            run = Run(net, Places(net, folder, made), given.talkers)
            run.go()
    except (CannotMake, Broken) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    report = {
        "command": " ".join(["benchmarks/hosts/run.py", *sys.argv[1:]]),
        "machine": {"cores": os.cpu_count(), "kernel": platform.release(), "load": round(os.getloadavg()[0], 1)},
        "models": made.kind,
        "talkers": given.talkers,
        "slow_s": round(run.slow_s, 3),
        "seconds": round(time.monotonic() - began, 1),
        "phases": run.phases,
        "musts": run.musts,
    }
    text = json.dumps(report, indent=1) + "\n"
    if given.out:
        given.out.write_text(text)
    print(text if given.json else table(report))
    return 0 if all(run.musts.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
