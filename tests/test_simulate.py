"""The simulation against known answers of queueing theory, against what was measured, and against itself in slices."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice, pairwise
from math import factorial
from pathlib import Path
from random import Random
from statistics import mean, pvariance
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmgraph.errors import UserError
from lmgraph.simulate.figures import Figures
from lmgraph.simulate.load import Arrivals, Size, times
from lmgraph.simulate.run import run
from lmgraph.simulate.scenario import Gateway, Master, Redis, Scaling, Scenario, Workers, slice_of

FEW = settings(deadline=None, max_examples=15)
EXPONENTIAL, CONSTANT = Size(1, 1), Size(1, 0)
NOTHING: dict[str, Any] = {"gateway": Gateway(request_ms=0, piece_ms=0), "master": Master("none"), "redis": Redis(0, 0, 0), "network_ms": 0, "prompt": Size(0)}
"""parts that take no time"""
ONE = Workers("w", slots=1, alone=1, total=1, timeout_s=1e6, balance="shared")
"""a server that writes one token a second"""
GATEWAY = Path(__file__).parent.parent / "benchmarks" / "results" / "gateway.json"


def queue(rate: float, *workers: Workers, output: Size = EXPONENTIAL, seconds: float = 8000, **more: Any) -> Scenario:
    """Requests that go through workers and nothing else."""
    return Scenario(Arrivals(rate), workers, **{**NOTHING, "output": output, "warm_s": 500, "seconds": seconds, **more})


def closed(clients: int, *workers: Workers, output: Size = CONSTANT, seconds: float = 200, **more: Any) -> Scenario:
    """Clients that ask again as soon as they have their answer."""
    made = queue(0, *workers, output=output, seconds=seconds, **more)
    return replace(made, arrivals=Arrivals(0, "closed", clients=clients))


def erlang_c(rate: float, servers: int) -> float:
    """Mean wait in an M/M/c queue with services of 1 s (Erlang 1917)."""
    last = rate**servers / factorial(servers) * servers / (servers - rate)
    waits = last / (sum(rate**n / factorial(n) for n in range(servers)) + last)
    return waits / (servers - rate)


# ---------------------------------------------------------------- arrivals


@given(st.sampled_from(["poisson", "bursty", "diurnal"]), st.floats(0.1, 500), st.integers(0, 1000))
@FEW
def test_arrivals_come_one_after_another_and_the_same_seed_gives_the_same(kind: str, rate: float, seed: int) -> None:
    arrivals = Arrivals(rate, kind, day_s=100)
    found = list(islice(times(arrivals, Random(seed)), 200))
    assert all(0 <= one < other for one, other in pairwise(found)) and len(found) == 200
    assert found == list(islice(times(arrivals, Random(seed)), 200))


def counts(arrivals: Arrivals, seconds: int, every: int, seed: int = 0) -> list[int]:
    out = [0] * (seconds // every)
    for at in times(arrivals, Random(seed)):
        if at >= seconds:
            return out
        out[int(at) // every] += 1
    raise AssertionError


def test_poisson_arrivals_have_their_rate_and_as_much_variance() -> None:
    found = counts(Arrivals(5), 10_000, 10)
    assert mean(found) == pytest.approx(50, rel=0.03)
    assert pvariance(found) == pytest.approx(50, rel=0.15)


def test_bursts_keep_the_mean_rate_and_are_far_more_uneven() -> None:
    bursty = Arrivals(5, "bursty", peak=4, busy_s=20, quiet_s=180)
    assert bursty.quiet_rate() == pytest.approx((5 - 0.1 * 20) / 0.9)
    found = counts(bursty, 40_000, 10)
    assert mean(found) == pytest.approx(50, rel=0.1)
    assert pvariance(found) > 5 * 50
    assert max(found) > 150, "a burst is four times the mean"


def test_over_a_day_the_rate_follows_its_curve() -> None:
    day = Arrivals(2, "diurnal", swing=0.5, day_s=8000)
    night, morning, noon, evening = counts(day, 8000, 2000)
    assert day.intensity(0) == pytest.approx(1) and day.intensity(4000) == pytest.approx(3) and day.most() == pytest.approx(3)
    assert night + noon + morning + evening == pytest.approx(16_000, rel=0.03)
    assert sum(counts(day, 8000, 500)[7:9]) == pytest.approx(1000 * 3, rel=0.1), "around the top"
    assert counts(day, 8000, 500)[0] == pytest.approx(500, rel=0.15), "at the bottom"


@given(st.floats(0, 1000), st.sampled_from([0.0, 0.3, 1.0, 2.0]), st.integers(0, 100))
@FEW
def test_sizes_have_their_mean_and_spread(average: float, cv: float, seed: int) -> None:
    rng = Random(seed)
    found = [Size(average, cv).draw(rng) for _ in range(3000)]
    assert min(found) >= 0
    assert mean(found) == pytest.approx(average, rel=0.2 if cv > 1 else 0.1)
    assert pvariance(found) ** 0.5 == pytest.approx(average * cv, rel=0.35 if cv > 1 else 0.15, abs=1e-6)


# ---------------------------------------------------------------- known answers


def test_one_server_waits_as_an_m_m_1_queue_does() -> None:
    found = run(queue(0.5, ONE, seconds=30_000), 1)
    assert found.waiting.mean == pytest.approx(0.5 / 0.5, rel=0.1)
    assert found.whole.mean == pytest.approx(1 / 0.5, rel=0.07)
    assert found.utilisation["w"] == pytest.approx(0.5, rel=0.04)
    assert found.utilisation["w slots"] == pytest.approx(found.utilisation["w"])


@pytest.mark.parametrize("servers", [replace(ONE, replicas=3), replace(ONE, slots=3, total=3)])
def test_servers_with_one_queue_wait_as_erlang_c_says_whether_replicas_or_slots(servers: Workers) -> None:
    found = run(queue(1.8, servers, seconds=3000), 2)
    assert found.waiting.mean == pytest.approx(erlang_c(1.8, 3), rel=0.12)


def test_replicas_chosen_at_random_are_queues_of_their_own_and_two_choices_lie_between() -> None:
    waits = {balance: run(queue(1.8, replace(ONE, replicas=3, balance=balance), seconds=2000), 3).waiting.mean for balance in ("random", "two", "shared")}
    assert waits["random"] == pytest.approx(0.6 / 0.4, rel=0.2)
    assert waits["shared"] == pytest.approx(erlang_c(1.8, 3), rel=0.2)
    assert waits["shared"] < 0.8 * waits["two"] < 0.6 * waits["random"]


@pytest.mark.parametrize("output", [EXPONENTIAL, CONSTANT])
def test_a_server_that_divides_its_speed_answers_as_processor_sharing_whatever_the_sizes(output: Size) -> None:
    shared = replace(ONE, slots=10_000)  # alone one token a second, all together no more
    assert run(queue(0.5, shared, output=output), 4).whole.mean == pytest.approx(1 / 0.5, rel=0.08)


@pytest.mark.parametrize(("cv", "factor"), [(0.0, 0.5), (1.0, 1.0)])
def test_a_gateway_waits_as_an_m_g_1_queue_does(cv: float, factor: float) -> None:
    made = queue(600, seconds=10, warm_s=1, gateway=Gateway(1, 1.0, 0, cv))
    found = run(made, 5)
    assert found.waits["gateway"].mean == pytest.approx(factor * 0.6 / 0.4 / 1000, rel=0.12)  # Pollaczek and Khinchine
    assert found.utilisation["gateway"] == pytest.approx(0.6, rel=0.03)


@pytest.mark.parametrize("made", [queue(0.7, ONE, seconds=3000), queue(2, replace(ONE, replicas=2, slots=4, total=2.5), seconds=1500)])
def test_as_many_are_under_way_as_arrive_while_one_is_answered(made: Scenario) -> None:
    found = run(made, 6)
    assert found.answered == found.requests
    assert found.in_system == pytest.approx(found.requests / made.seconds * found.whole.mean, rel=0.03)  # Little 1961


def test_the_same_seed_gives_the_same_figures_and_another_one_others() -> None:
    made = queue(0.6, ONE, seconds=500)
    assert run(made, 7, samples=10) == run(made, 7, samples=10)
    assert run(made, 7).whole != run(made, 8).whole


# ---------------------------------------------------------------- continuous batching


@given(st.integers(1, 12), st.integers(1, 12), st.floats(1, 100), st.floats(0, 1))
@FEW
def test_so_many_sequences_write_as_fast_as_the_two_measured_speeds_say(slots: int, clients: int, alone: float, gain: float) -> None:
    total = alone * (1 + gain * (slots - 1))
    running = min(slots, clients)
    t1 = (slots / total - 1 / alone) / (slots - 1) if slots > 1 else 0.0
    step = 1 / alone - t1 + running * t1
    made = closed(clients, replace(ONE, slots=slots, alone=alone, total=total), output=Size(50), seconds=1000 * step, warm_s=200 * step)
    found = run(made)
    assert found.whole.mean == pytest.approx(50 * step * clients / running, rel=0.1)
    assert found.answered / made.seconds == pytest.approx(running / (50 * step), rel=0.1)


def test_a_prompt_is_read_at_its_speed_and_slows_those_who_write_by_its_own_time() -> None:
    server = replace(ONE, slots=8, alone=10, total=80, prefill=1000, chunk=100)  # a step takes 0.1 s, however many write
    alone = run(closed(1, server, output=Size(20), prompt=Size(500)))
    assert alone.first.p50 == pytest.approx(0.5) and alone.whole.p50 == pytest.approx(2.5)
    both = run(closed(2, server, output=Size(20), prompt=Size(500), seconds=2000))
    # reading beside one that writes: a step of 0.1 s more for each 100 tokens; in that time the other writes a token for each step
    assert both.first.p50 == pytest.approx(1.0, rel=0.02)
    assert both.whole.p50 == pytest.approx(1.0 + 20 * 0.1 + 0.5, rel=0.02)


def test_prompts_are_read_one_after_another() -> None:
    server = replace(ONE, slots=10, alone=1000, total=10_000, prefill=100)
    found = run(closed(5, server, output=Size(1), prompt=Size(100), seconds=500))
    assert found.answered / 500 == pytest.approx(1, rel=0.05), "a prompt takes a second of the server, however many wait"


# ---------------------------------------------------------------- the master


def test_a_batched_master_takes_more_at_a_time_the_more_there_are() -> None:
    master = Master("batched", batch=16, batch_ms=100, query_ms=10)
    one = run(closed(1, master=master))
    assert one.whole.p50 == pytest.approx(0.110)
    many = run(closed(64, master=master))
    assert many.answered / 200 == pytest.approx(16 / 0.260, rel=0.03), "full batches"
    assert many.whole.p50 == pytest.approx(64 / 16 * 0.260, rel=0.05)


def test_a_master_in_the_gateway_decides_one_after_another_and_only_where_asked() -> None:
    half = Master(decision_ms=100, share=0.5)
    found = run(queue(8, seconds=1000, warm_s=20, master=half, gateway=Gateway(1, 0, 0)), 9)
    assert found.utilisation["master"] == pytest.approx(0.4, rel=0.06)
    assert found.whole.mean == pytest.approx(0.5 * (0.1 + 0.1 * 0.4 / 0.6 / 2), rel=0.1)  # half of them: a service and an M/D/1 wait


def test_several_hops_take_a_decision_and_a_call_each() -> None:
    made = queue(0.05, replace(ONE, slots=100, total=100), output=CONSTANT, hops=2.5, master=Master(decision_ms=500), seconds=40_000)
    found = run(made, 10)
    assert found.whole.mean == pytest.approx(2.5 * 1.5, rel=0.1)
    assert found.whole.mean - found.first.mean == pytest.approx(1, rel=0.1), "the first token that is seen is the last call's"


# ---------------------------------------------------------------- what fails


SLOW, FAST = replace(ONE, name="slow", timeout_s=2.0, fallback="fast"), replace(ONE, name="fast", share=0, slots=100, total=100)


def test_a_call_without_a_first_token_in_time_is_answered_by_the_fallback() -> None:
    found = run(queue(1.5, SLOW, FAST, seconds=1000, warm_s=50), 11)
    assert found.answered == found.requests and found.fallbacks > 0.2 * found.requests and not found.retries
    assert found.waits["slow"].p99 <= 2.0, "who waited longer has left"
    assert found.groups["fast"].mean == pytest.approx(2.0, rel=0.01), "the patience, and no time more"


def test_without_a_fallback_it_fails_and_a_long_prompt_is_given_up_too() -> None:
    found = run(queue(1.5, replace(SLOW, fallback=""), seconds=500, warm_s=50), 12)
    assert found.failures == {"timeout": found.requests - found.answered} and found.failures["timeout"] > 100
    reading = run(closed(1, replace(SLOW, fallback="", prefill=10), prompt=Size(100)))
    assert reading.answered == 0 and set(reading.failures) == {"timeout"}


def test_a_refused_call_is_tried_again_a_little_later_each_time_and_then_elsewhere() -> None:
    refusing = replace(ONE, name="bad", errors=1.0, retries=2, fallback="fast")
    found = run(closed(1, refusing, FAST))
    assert found.answered == found.requests and found.retries == 2 * found.requests and found.fallbacks == found.requests
    assert found.whole.p50 == pytest.approx(0.2 + 0.4 + 1.0)
    assert set(run(closed(1, replace(refusing, fallback=""))).failures) == {"refused"}


def test_a_gateway_refuses_more_answers_than_it_may_have_in_the_making() -> None:
    busy = run(queue(5, replace(ONE, slots=1000, total=1000), output=Size(10), seconds=300, gateway=Gateway(2, 0, 0, active=10)), 13)
    assert set(busy.failures) == {"busy"}
    assert busy.in_system < 20


# ---------------------------------------------------------------- autoscaling


SCALED = replace(ONE, replicas=0, slots=2, alone=1, total=2, start_s=40, price=3.6, balance="random", scaling=Scaling(0, 10, "all", 2, interval_s=10, cooldown_s=60))


def test_the_first_request_to_a_group_of_none_waits_for_a_replica_to_start() -> None:
    made = replace(queue(0.001, SCALED, output=CONSTANT, seconds=20_000), warm_s=0)
    found = run(made, 14)
    assert found.requests > 10 and found.failures == {}
    assert 40 <= found.first.mean <= 50, "up to one interval until it is seen, then its start"
    assert found.replicas["w"] == pytest.approx(found.requests / 20_000 * (40 + 60), rel=0.2), "paid from its start to the end of the cooldown"
    assert found.per_hour == pytest.approx(3.6 * found.replicas["w"])


def test_replicas_follow_the_load_up_and_down_again() -> None:
    day = Arrivals(2, "diurnal", swing=0.9, day_s=2000)
    scaled = replace(SCALED, replicas=2, scaling=replace(SCALED.scaling or Scaling(), least=1, most=20))
    made = replace(queue(0, scaled, output=EXPONENTIAL, seconds=2000), arrivals=day, warm_s=0)
    found = run(made, 15, samples=40)
    replicas = found.series["replicas:w"]
    assert max(replicas[15:25]) > 2 * min(replicas[-3:])
    assert len(found.series["at"]) == 40 and found.series["at"][-1] == pytest.approx(2000)
    assert found.replicas["w"] < max(replicas), "cheaper than the most of all day"


def test_counting_only_those_who_wait_drops_replicas_that_are_needed() -> None:
    """Why docs/scaling.md warns of a target on waiting requests alone."""
    steady = queue(8, replace(SCALED, replicas=8, scaling=replace(SCALED.scaling or Scaling(), least=1, counts="all", target=1.4)), seconds=700)
    waiting = replace(steady, workers=(replace(steady.workers[0], scaling=Scaling(1, 10, "waiting", 1, 10, 60)),))
    assert run(waiting, 16).waiting.p99 > 2 * run(steady, 16).waiting.p99


# ---------------------------------------------------------------- slices


def whole() -> Scenario:
    """100 requests a second through every part."""
    groups = (
        Workers("small", 0.7, 16, 8, 4000, 60, 300, balance="random"),
        Workers("other", 0.3, 8, 8, 4000, 60, 300, balance="two"),
    )
    return Scenario(
        Arrivals(100), groups, prompt=Size(200, 1), output=Size(40, 1), gateway=Gateway(8, 1.1, 0.05, 1.0, price=1), master=Master(decision_ms=40),
        redis=Redis(4.0, 6, 0.2, price=8), warm_s=5, seconds=30,
    )  # fmt: skip


def near(one: Figures, other: Figures, names: Sequence[str], rel: float) -> None:
    for name in names:
        assert getattr(one, name).p50 == pytest.approx(getattr(other, name).p50, rel=rel), name
        assert getattr(one, name).p99 == pytest.approx(getattr(other, name).p99, rel=rel), name


@pytest.mark.parametrize("master", [Master(decision_ms=40), Master("batched", replicas=2, batch=16, batch_ms=100, query_ms=5, price=2)])
def test_a_slice_finds_what_the_whole_finds(master: Master) -> None:
    made = replace(whole(), master=master)
    full = run(made, 17)
    part = run(replace(slice_of(made, 4), seconds=120), 17)
    assert part.requests == pytest.approx(full.requests, rel=0.05), "as many, in four times the time"
    near(full, part, ("first", "whole"), 0.1)
    for name, share in full.utilisation.items():
        assert part.utilisation[name] == pytest.approx(share, rel=0.06), name
    assert part.waits["redis"].mean == pytest.approx(full.waits["redis"].mean, rel=0.15), "Redis is not divided"
    assert part.per_thousand == pytest.approx(full.per_thousand, rel=0.03)


def test_numbers_that_cannot_be_divided_are_named() -> None:
    with pytest.raises(UserError, match=r"gateway\.replicas is 8, workers\.small\.replicas is 16, workers\.other\.replicas is 8"):
        slice_of(whole(), 5)


# ---------------------------------------------------------------- the real gateway


@pytest.mark.parametrize(("server", "mode"), [("lmgraph", "stream"), ("lmgraph", "plain"), ("kept", "stream"), ("kept", "plain"), ("whole", "plain")])
def test_the_gateway_as_it_was_measured_is_foretold_within_a_fifth(server: str, mode: str) -> None:
    """Calibrated on what benchmarks/gateway/run.py recorded of 16 clients; 64 are foretold."""
    real = json.loads(GATEWAY.read_text(encoding="utf-8"))["median"]
    known, told = real[f"{server}/{mode}/16"], real[f"{server}/{mode}/64"]
    cv = (known["p99_ms"] / known["p50_ms"] - 1) * 16**0.5 / 2.33  # the 99th percentile of a sum of 16 services
    found = run(closed(64, gateway=Gateway(1, 1000 / known["rps"], 0, cv), seconds=1.5, warm_s=0.3))
    assert found.answered / 1.5 == pytest.approx(told["rps"], rel=0.2)
    assert found.whole.p50 * 1000 == pytest.approx(told["p50_ms"], rel=0.2)
    assert found.whole.p99 * 1000 == pytest.approx(told["p99_ms"], rel=0.2)
