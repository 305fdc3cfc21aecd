"""Traces: what a real collector receives over loopback, and that one which is dead or hangs stops nobody."""

from __future__ import annotations

import asyncio
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from lmgraph.errors import MissingExtra, SettingsError
from lmgraph.serve import tracing
from lmgraph.serve.tracing import Tracing, open_tracing
from lmgraph.types import Decision, Step

BEGAN = 1_700_000_000_000_000_000
SECRET = "the widow Kowalski"
DECISION = Decision(SECRET, "law", "math", 1, 0.25, rewritten=f"about {SECRET}", fallback=True, rewrite_note=SECRET,
                    tokenise_ms=1, prefill_ms=20, decode_ms=4, prompt_tokens=9, rewrite_tokens=3)
STEPS = (Step("math", SECRET, ms=100, attempts=2, error=f"cannot read {SECRET}"),
         Step("law", SECRET, SECRET, ms=300, first_ms=50, usage={"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}))


class Collector:
    """An OTLP/HTTP collector in a thread: `bodies` has what came; it answers with `status`, once it is `free` to."""

    def __init__(self, status: int = 200) -> None:
        self.bodies: queue.Queue[tuple[bytes, Mapping[str, str]]] = queue.Queue()
        self.status = status
        self.free = threading.Event()
        self.free.set()
        self.url = ""
        self._over: asyncio.Event | None = None

    @contextmanager
    def running(self) -> Iterator[Collector]:
        ready = threading.Event()
        thread = threading.Thread(target=lambda: asyncio.run(self._run(ready)))
        thread.start()
        assert ready.wait(60)
        try:
            yield self
        finally:
            self.free.set()
            assert self._over
            self._loop.call_soon_threadsafe(self._over.set)
            thread.join(60)

    async def _run(self, ready: threading.Event) -> None:
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application()
        app.router.add_post("/v1/traces", self._take)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        ready.set()
        await self._over.wait()
        await runner.cleanup()

    async def _take(self, request: web.Request) -> web.Response:
        self.bodies.put((await request.read(), dict(request.headers)))
        await asyncio.to_thread(self.free.wait)
        return web.Response(status=self.status)


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector().running() as found:
        yield found


def opened(url: str) -> Tracing:
    found = open_tracing({"OTEL_EXPORTER_OTLP_ENDPOINT": url})
    assert found is not None
    return found


def record(to: Tracing, **more: Any) -> None:
    to.record(**{"request_id": "r1", "trace_parent": None, "began_ns": BEGAN, "ended_ns": BEGAN + 500_000_000, "status": 200} | more)


def received(collector: Collector) -> tuple[list[Any], dict[str, Any], bytes]:
    """(spans in the order they were ended, attributes of the resource, the raw bytes) of the one batch that came."""
    body, headers = collector.bodies.get(timeout=60)
    assert headers["Content-Type"] == "application/x-protobuf" and collector.bodies.empty()
    (about,) = ExportTraceServiceRequest.FromString(body).resource_spans
    return [span for scope in about.scope_spans for span in scope.spans], attributes(about.resource), body


def attributes(of: Any) -> dict[str, Any]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in of.attributes}


# ---------------------------------------------------------------- what is sent


def test_a_request_is_one_trace_with_its_decision_and_its_steps(collector: Collector) -> None:
    to = opened(collector.url)
    record(to, decision=DECISION, steps=STEPS, attributes={"gen_ai.request.model": "lmgraph", "gen_ai.conversation.id": "c1"},
           trace_parent=f"00-{'ab' * 16}-{'cd' * 8}-01")
    to.close()
    (second, first, decision, root), about, body = received(collector)
    assert [s.name for s in (root, decision, first, second)] == ["chat lmgraph", "decide lmgraph", "chat math", "chat law"]
    assert {s.trace_id for s in (root, decision, first, second)} == {bytes.fromhex("ab" * 16)} and root.parent_span_id == bytes.fromhex("cd" * 8)
    assert {s.parent_span_id for s in (decision, first, second)} == {root.span_id} and [s.kind for s in (root, decision, first)] == [2, 1, 3]
    times = [(s.start_time_unix_nano - BEGAN, s.end_time_unix_nano - BEGAN) for s in (root, decision, first, second)]
    assert times == [(0, 500_000_000), (75_000_000, 100_000_000), (100_000_000, 200_000_000), (200_000_000, 500_000_000)]
    assert attributes(root) == {"gen_ai.operation.name": "chat", "gen_ai.provider.name": "lmgraph", "gen_ai.request.model": "lmgraph",
                                "gen_ai.response.model": "lmgraph/law", "gen_ai.usage.input_tokens": 11, "gen_ai.usage.output_tokens": 7,
                                "gen_ai.conversation.id": "c1", "lmgraph.request.id": "r1", "http.response.status_code": 200}
    chosen = attributes(decision)
    assert (chosen["lmgraph.decision.node"], chosen["lmgraph.decision.chosen"], chosen["lmgraph.decision.probability"]) == ("law", "math", 0.25)
    assert chosen["lmgraph.decision.fallback"] is True and chosen["lmgraph.decision.rewritten"] is True
    assert attributes(first)["error.type"] == "worker_error" and attributes(first)["lmgraph.step.attempts"] == 2
    assert attributes(second)["gen_ai.response.time_to_first_chunk"] == 0.05 and attributes(second)["gen_ai.usage.output_tokens"] == 7
    assert [s.status.code for s in (root, decision, first, second)] == [0, 0, 2, 0] and about["service.name"] == "lmgraph"
    assert SECRET.encode() not in body


def test_voters_begin_together_before_the_judge_and_the_root_has_what_all_of_them_used(collector: Collector) -> None:
    to = opened(collector.url)
    used = {"prompt_tokens": 2, "completion_tokens": 3}
    record(to, steps=(Step("math", "x", ms=200, usage=used, voter=True), Step("law", "x", ms=50, error="down", voter=True),
                      Step("health", "x", ms=100, usage=used, voter=True), Step("general", "y", ms=150, usage=used)))
    to.close()
    spans, _, _ = received(collector)
    times = {s.name: (s.start_time_unix_nano - BEGAN, s.end_time_unix_nano - BEGAN) for s in spans}
    assert times == {"chat math": (150_000_000, 350_000_000), "chat law": (150_000_000, 200_000_000), "chat health": (150_000_000, 250_000_000),
                     "chat general": (350_000_000, 500_000_000), "chat lmgraph": (0, 500_000_000)}
    (root,) = (attributes(s) for s in spans if s.name == "chat lmgraph")
    assert (root["gen_ai.response.model"], root["gen_ai.usage.input_tokens"], root["gen_ai.usage.output_tokens"]) == ("lmgraph/general", 6, 9)


def test_hops_of_a_walk_lie_where_they_ended_also_side_by_side(collector: Collector) -> None:
    to = opened(collector.url)
    steps = (Step("law", SECRET, SECRET, ms=200, hop=0), Step("math", SECRET, ms=100, error=SECRET, hop=1), Step("health", SECRET, SECRET, ms=50, hop=1),
             Step("general", SECRET, SECRET, ms=100, hop=2))
    record(to, steps=steps, decision=DECISION, ended={0: BEGAN + 250_000_000, 1: BEGAN + 300_000_000, 2: BEGAN + 490_000_000})
    to.close()
    spans, _, body = received(collector)
    times = {s.name: ((s.start_time_unix_nano - BEGAN) // 1_000_000, (s.end_time_unix_nano - BEGAN) // 1_000_000) for s in spans}
    assert times == {"chat law": (50, 250), "chat math": (150, 250), "chat health": (250, 300), "chat general": (390, 490), "decide lmgraph": (25, 50),
                     "chat lmgraph": (0, 500)}
    assert {s.name: attributes(s).get("lmgraph.step.hop") for s in spans if s.kind == 3} == {"chat law": 0, "chat math": 1, "chat health": 1, "chat general": 2}
    assert SECRET.encode() not in body


def test_a_walk_that_failed_shows_its_hops_and_names_nobody_who_answered(collector: Collector) -> None:
    to = opened(collector.url)
    record(to, steps=(Step("law", "x", "y", ms=200, hop=0), Step("math", "z", ms=100, error="down", hop=1)), ended={0: BEGAN + 200_000_000, 1: BEGAN + 9**18}, status=502)
    to.close()
    spans = {s.name: s for s in received(collector)[0]}
    second, root = spans["chat math"], spans["chat lmgraph"]
    assert {name: s.status.code for name, s in spans.items()} == {"chat law": 0, "chat math": 2, "chat lmgraph": 2}
    assert second.end_time_unix_nano == root.end_time_unix_nano, "inside its request, whatever was measured"
    assert "gen_ai.response.model" not in attributes(root)


@pytest.mark.parametrize("parent", [None, "", "nonsense", f"00-{'0' * 32}-{'cd' * 8}-01", "ä" * 55])
def test_without_a_usable_parent_a_request_is_a_trace_of_its_own(collector: Collector, parent: str | None) -> None:
    to = opened(collector.url + "/")
    record(to, trace_parent=parent, status=502)
    to.close()
    ((root,), _, _) = received(collector)
    assert root.parent_span_id == b"" and root.status.code == 2 and len(root.trace_id) == 16


def test_children_lie_inside_their_request_whatever_was_measured(collector: Collector) -> None:
    to = opened(collector.url)
    record(to, steps=(Step("law", "x", ms=9000), Step("math", "x", ms=400)), decision=DECISION)
    to.close()
    spans, _, _ = received(collector)
    assert len(spans) == 4 and all(BEGAN <= s.start_time_unix_nano <= s.end_time_unix_nano <= BEGAN + 500_000_000 for s in spans)


def test_an_unsampled_parent_is_not_recorded(collector: Collector) -> None:
    to = opened(collector.url)
    record(to, trace_parent=f"00-{'ab' * 16}-{'cd' * 8}-00", steps=STEPS)
    to.close()
    assert collector.bodies.empty()


# ---------------------------------------------------------------- a collector that fails


def test_a_hanging_collector_holds_up_neither_answers_nor_the_end(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "CLOSE_S", 0.2)
    collector.free.clear()
    to = opened(collector.url)
    for i in range(600):  # more than a batch: it is sent at once
        record(to, request_id=str(i))
    collector.bodies.get(timeout=60)
    record(to)  # while the collector holds the first batch
    began = time.monotonic()
    to.close()
    assert time.monotonic() - began < 15, "the SDK alone waits 30 s"
    assert not collector.free.is_set()


def test_a_dead_collector_stops_nobody() -> None:
    with Collector().running() as gone:
        url = gone.url
    to = opened(url)
    record(to, decision=DECISION, steps=STEPS)
    to.close()
    record(to)  # after the end: dropped


def test_a_refusing_collector_stops_nobody() -> None:
    with Collector(status=400).running() as refusing:
        to = opened(refusing.url)
        record(to)
        to.close()
        assert refusing.bodies.qsize() == 1


# ---------------------------------------------------------------- on and off


@pytest.mark.parametrize("environment", [{}, {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
                                         {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_SDK_DISABLED": "TRUE"}])
def test_without_a_collector_there_are_no_traces(environment: dict[str, str]) -> None:
    assert open_tracing(environment) is None


def test_the_sdk_is_not_imported_without_a_collector() -> None:
    code = "import sys; from lmgraph.serve.tracing import open_tracing; open_tracing({}); sys.exit('opentelemetry' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_the_address_for_traces_is_taken_as_it_is(collector: Collector) -> None:
    to = open_tracing({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"{collector.url}/v1/traces", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"})
    assert to is not None
    record(to)
    to.close()
    assert len(received(collector)[0]) == 1


def test_a_missing_extra_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(MissingExtra) as caught:
        opened("http://127.0.0.1:9")
    assert "lmgraph[otel]" in caught.value.hint


@pytest.mark.parametrize(("environment", "words"), [
    ({"OTEL_EXPORTER_OTLP_ENDPOINT": "localhost:4318"}, "http://"), ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "ftp://x"}, "TRACES_ENDPOINT"),
    ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "http/protobuf"),
])
def test_what_cannot_be_a_collector_is_refused(environment: dict[str, str], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        open_tracing(environment)
