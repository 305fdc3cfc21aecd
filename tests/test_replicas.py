"""Replicas of one node: who takes the next call, breakers, Retry-After. Pure: clock and chance are passed in."""

from __future__ import annotations

from datetime import datetime, timezone
from email.utils import format_datetime
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmgraph.workers.replicas import OPEN_MOST_S, Replica, Replicas, wait_of

SLOW = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=60)
URLS = ["http://a/v1", "http://b/v1", "http://c/v1"]


def first(n: int) -> int:
    return 0


def take(replicas: Replicas, now: float = 0.0, *tried: Replica) -> Replica:
    replica = replicas.choose(now, tried)
    assert replica is not None
    return replica


def fail(replicas: Replicas, now: float, times: int = 1) -> Replica:
    for _ in range(times):
        replica = take(replicas, now)
        replicas.fail(replica, now)
        replicas.release(replica)
    return replica


def test_of_two_at_random_the_one_with_fewer_calls_in_hand_is_taken() -> None:
    replicas = Replicas(URLS[:2], first)
    one, two = take(replicas), take(replicas)
    assert one is not two
    replicas.release(one)
    assert take(replicas) is one
    replicas.release(two)
    replicas.release(one)
    assert take(replicas) is two, "when equal: the one that was used longer ago"


def test_a_replica_that_was_tried_is_not_taken_again_and_none_is_left_at_last() -> None:
    replicas = Replicas(URLS, first)
    tried: list[Replica] = []
    while (replica := replicas.choose(0.0, tried)) is not None:
        tried.append(replica)
    assert sorted(r.url for r in tried) == URLS
    assert replicas.choose(0.0, tried) is None and Replicas([], first).choose(0.0) is None


def test_three_failures_in_a_row_open_a_breaker_and_success_in_between_does_not_count() -> None:
    replicas = Replicas(URLS[:1], first)
    replica = fail(replicas, 0.0, 2)
    replicas.succeed(replica)
    fail(replicas, 0.0, 2)
    assert replica.open_until == 0.0
    fail(replicas, 5.0)
    assert replica.open_until == 6.0


def test_a_replica_that_is_gone_is_left_alone_after_one_failure() -> None:
    replicas = Replicas(URLS[:1], first)
    replica = take(replicas)
    replicas.fail(replica, 3.0, gone=True)
    assert replica.open_until == 4.0
    replicas.fail(replica, 4.0, gone=True)
    assert replica.open_until == 6.0


def test_a_breaker_stays_open_twice_as_long_each_time_up_to_half_a_minute() -> None:
    replicas, now, waits = Replicas(URLS[:1], first), 0.0, []
    replica = fail(replicas, now, 3)
    for _ in range(8):
        waits.append(replica.open_until - now)
        now = replica.open_until
        fail(replicas, now)
    assert waits == [1, 2, 4, 8, 16, 30, 30, 30]
    replicas.succeed(replica)
    fail(replicas, now + 100, 3)
    assert replica.open_until == now + 101, "a success begins anew"


def test_many_calls_that_fail_at_once_open_a_breaker_once() -> None:
    replicas = Replicas(URLS[:1], first)
    calls = [take(replicas) for _ in range(50)]
    for replica in calls:
        replicas.fail(replica, 7.0)
        replicas.release(replica)
    assert calls[0].open_until == 8.0 and calls[0].failures == 50


def test_an_open_replica_gets_no_calls_and_then_one_probe() -> None:
    replicas = Replicas(URLS[:2], first)
    bad = take(replicas)
    for _ in range(3):
        replicas.fail(bad, 0.0)
    replicas.release(bad)
    assert {take(replicas, 0.5).url for _ in range(5)} == {URLS[1]}
    probe = take(replicas, 1.0)
    assert probe is bad, "it has fewer calls in hand"
    assert {take(replicas, 1.0).url for _ in range(5)} == {URLS[1]}
    replicas.begin(probe)
    assert take(replicas, 1.0) is bad


@pytest.mark.parametrize("given_up", [False, True])
def test_a_probe_that_was_given_up_may_be_made_again(given_up: bool) -> None:
    replicas = Replicas(URLS[:2], first)
    bad = take(replicas)
    for _ in range(3):
        replicas.fail(bad, 0.0)
    replicas.release(bad)
    other = take(replicas, 0.5)
    assert take(replicas, 1.0) is bad
    replicas.release(bad, given_up=given_up)
    assert take(replicas, 1.0) is (bad if given_up else other)


def test_when_an_answer_has_begun_one_more_failure_opens_the_breaker_again() -> None:
    replicas = Replicas(URLS[:1], first)
    replica = fail(replicas, 0.0, 3)
    replicas.begin(take(replicas, 1.0))
    assert replica.open_until == 0.0
    replicas.fail(replica, 2.0)
    assert replica.open_until == 4.0, "longer than the first time"


def test_when_all_are_open_the_one_that_opens_soonest_is_tried_anyway() -> None:
    replicas = Replicas(URLS, first)
    taken: list[Replica] = []
    for seconds in (9, 5, 7):
        taken.append(take(replicas, 0.0, *taken))
        replicas.pause(taken[-1], 0.0, seconds)
        replicas.release(taken[-1])
    order: list[Replica] = []
    for _ in URLS:
        order.append(take(replicas, 1.0, *order))
    assert [r.open_until for r in order] == [5, 7, 9]


def test_replicas_rest_while_each_is_left_alone_or_being_tried() -> None:
    replicas = Replicas(URLS[:2], first)
    one = take(replicas)
    for _ in range(3):
        replicas.fail(one, 0.0)
    replicas.release(one)
    assert not replicas.resting(0.5), "the other one is well"
    two = take(replicas, 0.5)
    replicas.pause(two, 0.5, 10)
    assert replicas.resting(0.9) and not replicas.resting(1.0)
    assert take(replicas, 1.0) is one and replicas.resting(1.0), "it is being tried"
    replicas.begin(one)
    assert not replicas.resting(1.0)


def test_a_replica_that_asked_for_rest_gets_it_though_an_older_answer_is_finished() -> None:
    replicas = Replicas(URLS[:1], first)
    replica = take(replicas)
    replicas.pause(replica, 10.0, 1000)
    replicas.pause(replica, 10.0, 2)
    replicas.succeed(replica)
    assert replica.open_until == 40.0


def test_states_say_how_each_replica_does_without_its_password() -> None:
    replicas = Replicas(["http://me:secret@a/v1"], first)
    replicas.fail(take(replicas), 3.0)
    assert replicas.states() == [{"url": "http://a/v1", "outstanding": 1, "failures": 1, "open_until": 0.0}]


@SLOW
@given(st.randoms(use_true_random=False), st.integers(1, 4), st.lists(st.tuples(st.integers(0, 6), st.integers(0, 9), st.floats(0, 20))))
def test_whatever_happens_calls_are_counted_and_someone_is_always_there(
    chance: Random, count: int, acts: list[tuple[int, int, float]]
) -> None:
    replicas = Replicas([f"http://r{i}/v1" for i in range(count)], chance.randrange)
    held: list[Replica] = []
    now = 0.0
    for act, which, step in acts:
        now += step
        if act == 0 or not held:
            ready = [s["url"] for s in replicas.states() if s["open_until"] <= now]
            probed = {r.url for r in held if r.probing}
            replica = take(replicas, now)
            assert replica.url in ready or not set(ready) - probed, "an open replica is taken only when there is no other"
            held.append(replica)
            continue
        replica = held[which % len(held)]
        if act == 1:
            replicas.begin(replica)
        elif act == 2:
            replicas.succeed(replica)
        elif act == 3:
            replicas.fail(replica, now)
        elif act == 4:
            replicas.pause(replica, now, step)
        else:
            held.remove(replica)
            replicas.release(replica, given_up=act == 5)
        assert replica.open_until <= now + OPEN_MOST_S
        states = replicas.states()
        assert sum(s["outstanding"] for s in states) == len(held) and all(s["outstanding"] >= 0 for s in states)
    for replica in held:
        replicas.release(replica, given_up=True)
    later = now + OPEN_MOST_S
    assert {r.url for r in _all(replicas, later)} == {s["url"] for s in replicas.states()}


def _all(replicas: Replicas, now: float) -> list[Replica]:
    tried: list[Replica] = []
    while (replica := replicas.choose(now, tried)) is not None:
        assert replica.open_until <= now, "no breaker stays open for ever"
        tried.append(replica)
    return tried


@pytest.mark.parametrize("header, seconds", [
    ("0", 0), ("2", 2), (" 1.5 ", 1.5), ("30", 30), ("31", 30), ("999999999", 30), ("", None), ("-1", None), ("soon", None), ("1e3", None),
    ("٣", None), ("nan", None), ("9" * 400, None), ("Mon, 99 Foo 2026 00:00:00 GMT", None)])
def test_retry_after_in_seconds_is_bounded_and_nonsense_is_none(header: str, seconds: float | None) -> None:
    assert wait_of(header, 0.0) == seconds


@pytest.mark.parametrize("ahead, seconds", [(-100, 0), (0, 0), (7, 7), (86_400, 30)])
def test_retry_after_may_be_a_date(ahead: int, seconds: float) -> None:
    wall = 1_800_000_000
    for zone in (True, False):
        date = format_datetime(datetime.fromtimestamp(wall + ahead, timezone.utc), usegmt=zone)
        assert wait_of(date, wall) == seconds


@SLOW
@given(st.text(max_size=40))
def test_no_retry_after_header_breaks_anything(header: str) -> None:
    seconds = wait_of(header, 1_800_000_000)
    assert seconds is None or 0 <= seconds <= OPEN_MOST_S
